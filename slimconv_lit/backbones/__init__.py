"""Backbones: our own families, torchvision's and timm's, whole or as feature maps, at any output stride."""

from slimconv_lit.backbones.registry import create_backbone, list_backbones
from slimconv_lit.backbones.weights import LoadReport, load_weights

__all__ = ["LoadReport", "create_backbone", "list_backbones", "load_weights"]
