"""Convolution operators: pure `nn.Module`s under one contract (see `base.py`)."""

from slimconv_lit.ops.base import (
    Operator,
    OperatorFactory,
    OperatorLike,
    describe_operator,
    operator_classes,
    resolve_operator,
)
from slimconv_lit.ops.slim_conv import SlimConv2d

__all__ = [
    "Operator",
    "OperatorFactory",
    "OperatorLike",
    "SlimConv2d",
    "describe_operator",
    "operator_classes",
    "resolve_operator",
]
