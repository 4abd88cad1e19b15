"""LightningModules: a model, its loss, its metrics and its optimizer, from plain values."""

from slimconv_lit.tasks.base import BaseTask, Picture
from slimconv_lit.tasks.classification import ClassificationTask
from slimconv_lit.tasks.detection import DetectionTask
from slimconv_lit.tasks.segmentation import SegmentationTask

__all__ = ["BaseTask", "ClassificationTask", "DetectionTask", "Picture", "SegmentationTask"]
