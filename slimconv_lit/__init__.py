"""slimconv_lit: reduce channel redundancy in convolutional networks.

The names below are loaded when they are first used, so that `python -m slimconv_lit --help` need not import torch.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from slimconv_lit.backbones import create_backbone as create_backbone
    from slimconv_lit.backbones import load_weights as load_weights
    from slimconv_lit.data import CIFAR100DataModule as CIFAR100DataModule
    from slimconv_lit.data import COCO2014DataModule as COCO2014DataModule
    from slimconv_lit.data import DigitsDataModule as DigitsDataModule
    from slimconv_lit.data import ImageNetDataModule as ImageNetDataModule
    from slimconv_lit.data import VOC2007DataModule as VOC2007DataModule
    from slimconv_lit.data import VOC2012AugDataModule as VOC2012AugDataModule
    from slimconv_lit.ops import SlimConv2d as SlimConv2d
    from slimconv_lit.ops import use_kernel as use_kernel
    from slimconv_lit.surgery import FuseReport as FuseReport
    from slimconv_lit.surgery import PruneReport as PruneReport
    from slimconv_lit.surgery import Report as Report
    from slimconv_lit.surgery import apply_plan as apply_plan
    from slimconv_lit.surgery import fuse as fuse
    from slimconv_lit.surgery import plans_of as plans_of
    from slimconv_lit.surgery import prune as prune
    from slimconv_lit.surgery import slimify as slimify
    from slimconv_lit.surgery import substitute as substitute
    from slimconv_lit.tasks import ClassificationTask as ClassificationTask
    from slimconv_lit.tasks import DetectionTask as DetectionTask
    from slimconv_lit.tasks import SegmentationTask as SegmentationTask

_HOMES = {
    "CIFAR100DataModule": "data",
    "COCO2014DataModule": "data",
    "ClassificationTask": "tasks",
    "DetectionTask": "tasks",
    "DigitsDataModule": "data",
    "FuseReport": "surgery",
    "ImageNetDataModule": "data",
    "PruneReport": "surgery",
    "Report": "surgery",
    "SegmentationTask": "tasks",
    "SlimConv2d": "ops",
    "VOC2007DataModule": "data",
    "VOC2012AugDataModule": "data",
    "apply_plan": "surgery",
    "create_backbone": "backbones",
    "fuse": "surgery",
    "load_weights": "backbones",
    "plans_of": "surgery",
    "prune": "surgery",
    "slimify": "surgery",
    "substitute": "surgery",
    "use_kernel": "ops",
}

__version__ = "0.1.0"
__all__ = ["__version__", *_HOMES]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'slimconv_lit' has no attribute {name!r}; it has {', '.join(_HOMES)}")
    value = getattr(importlib.import_module(f"slimconv_lit.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
