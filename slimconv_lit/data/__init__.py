"""Datamodules: what to read, how it is split, and the normalised batches that a network sees."""

from slimconv_lit.data.base import BaseDataModule
from slimconv_lit.data.cifar100 import CIFAR100DataModule
from slimconv_lit.data.coco2014 import COCO2014DataModule
from slimconv_lit.data.digits import DigitsDataModule
from slimconv_lit.data.imagenet import ImageNetDataModule
from slimconv_lit.data.voc2007 import VOC2007DataModule
from slimconv_lit.data.voc2012_aug import VOC2012AugDataModule

__all__ = [
    "BaseDataModule",
    "CIFAR100DataModule",
    "COCO2014DataModule",
    "DigitsDataModule",
    "ImageNetDataModule",
    "VOC2007DataModule",
    "VOC2012AugDataModule",
]
