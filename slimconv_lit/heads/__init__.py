"""Heads over any backbone: pure `nn.Module`s without Lightning."""

from slimconv_lit.heads.deeplab_v3plus import DeepLabV3Plus, deeplab_v3plus
from slimconv_lit.heads.faster_rcnn import WithoutProposals, faster_rcnn

__all__ = ["DeepLabV3Plus", "WithoutProposals", "deeplab_v3plus", "faster_rcnn"]
