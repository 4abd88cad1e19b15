"""LightningModules: a model, its loss, its metrics and its optimizer, from plain values."""

from slimconv_lit.tasks.base import BaseTask, Picture
from slimconv_lit.tasks.classification import ClassificationTask

__all__ = ["BaseTask", "ClassificationTask", "Picture"]
