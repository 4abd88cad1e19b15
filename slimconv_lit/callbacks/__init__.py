"""Lightning callbacks: the run folder, pictures, predictions, class reports.

`slimconv_lit.callbacks.bolts` is left out on purpose: importing it brings in a frozen package.
"""

from slimconv_lit.callbacks.class_report import ClassReport
from slimconv_lit.callbacks.detection_report import DetectionReport
from slimconv_lit.callbacks.detections import DetectionWriter
from slimconv_lit.callbacks.finite_loss import FiniteLoss
from slimconv_lit.callbacks.last_validation import LastValidation
from slimconv_lit.callbacks.predictions import PredictionWriter
from slimconv_lit.callbacks.run_folder import RunFolder
from slimconv_lit.callbacks.segmentation_masks import MaskWriter
from slimconv_lit.callbacks.segmentation_report import SegmentationReport
from slimconv_lit.callbacks.sparsity import Sparsity
from slimconv_lit.callbacks.visualize import Visualize

__all__ = [
    "ClassReport",
    "DetectionReport",
    "DetectionWriter",
    "FiniteLoss",
    "LastValidation",
    "MaskWriter",
    "PredictionWriter",
    "RunFolder",
    "SegmentationReport",
    "Sparsity",
    "Visualize",
]
