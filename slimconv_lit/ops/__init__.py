"""Convolution operators: pure `nn.Module`s under one contract (see `base.py`)."""

from slimconv_lit.ops.base import (
    Operator,
    OperatorFactory,
    OperatorLike,
    describe_operator,
    operator_classes,
    resolve_operator,
)
from slimconv_lit.ops.compact_conv import CompactConv2d, JoinChannels
from slimconv_lit.ops.ghost import GhostConv2d
from slimconv_lit.ops.oct_conv import HighLowConv2d, OctConv2d
from slimconv_lit.ops.reconstruct import use_kernel
from slimconv_lit.ops.sc_conv import CRU, SRU, SCConv2d
from slimconv_lit.ops.select_kernel import SKConv2d
from slimconv_lit.ops.slim_conv import SlimConv2d
from slimconv_lit.ops.sp_conv import SPConv2d
from slimconv_lit.ops.squeeze_excite import SEConv2d

__all__ = [
    "CRU",
    "SRU",
    "CompactConv2d",
    "GhostConv2d",
    "HighLowConv2d",
    "JoinChannels",
    "OctConv2d",
    "Operator",
    "OperatorFactory",
    "OperatorLike",
    "SCConv2d",
    "SEConv2d",
    "SKConv2d",
    "SPConv2d",
    "SlimConv2d",
    "describe_operator",
    "operator_classes",
    "resolve_operator",
    "use_kernel",
]
