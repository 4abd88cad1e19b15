"""Datamodules: what to read, how it is split, and the normalised batches that a network sees."""

from slimconv_lit.data.base import BaseDataModule
from slimconv_lit.data.cifar100 import CIFAR100DataModule
from slimconv_lit.data.digits import DigitsDataModule
from slimconv_lit.data.imagenet import ImageNetDataModule

__all__ = ["BaseDataModule", "CIFAR100DataModule", "DigitsDataModule", "ImageNetDataModule"]
