"""Compact convolution: between a depthwise and a pointwise convolution, groups of channels are joined without weights.

Liang, Zhang and Feng, "Channel Compression: Rethinking Information Redundancy among Channels in CNN Architecture",
IEEE Access 2020, https://arxiv.org/abs/2007.01696

    B batch   C channels read   O channels written   g channels in a group   H W space

Only its abstract and a figure were open to us. From these: a depthwise-separable convolution with a point-wise
operation across channels between its two halves, which has no parameters, joins neighbouring channels in pairs, and so
halves what the pointwise convolution reads; several such operations are compared. Ours are: which operations, other
group sizes and the other layout, where norms and activation stand. It is not the operator of CompConv
(arXiv 2106.10486), which goes by the same name.
"""

from collections.abc import Callable, Sequence
from functools import reduce
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from slimconv_lit.lookup import closest
from slimconv_lit.ops.base import Operator, Size, nearest_divisors, padding_of, pair, reset_convolutions

Join = Literal["max", "min", "mean", "sum", "difference", "product"]
Layout = Literal["adjacent", "halves"]

# "difference" is the first less the others.
JOINS: dict[Join, Callable[[Sequence[Tensor]], Tensor]] = {
    "max": lambda parts: reduce(torch.maximum, parts),
    "min": lambda parts: reduce(torch.minimum, parts),
    "mean": lambda parts: reduce(torch.add, parts) / len(parts),
    "sum": lambda parts: reduce(torch.add, parts),
    "difference": lambda parts: reduce(torch.sub, parts),
    "product": lambda parts: reduce(torch.mul, parts),
}


class JoinChannels(nn.Module):
    """The point-wise interchannel operation: (B, C, H, W) -> (B, C / g, H, W), without parameters.

    Args:
        join: What a group becomes, a key of `JOINS`.
        group_size: g.
        layout: Which channels make the j-th group: "adjacent" ones, g * j and those behind it, or those in the same
            place of g equal parts, j, j + C / g, ... ("halves" for g = 2).

    Raises:
        ValueError: If join or layout is none, or group_size is below 1.
    """

    def __init__(self, join: Join = "max", group_size: int = 2, layout: Layout = "adjacent") -> None:
        super().__init__()
        if join not in JOINS:
            raise ValueError(f"join={join!r}; {closest(str(join), JOINS)}")
        if layout not in get_args(Layout):
            raise ValueError(f"layout={layout!r}; {closest(str(layout), get_args(Layout))}")
        if group_size < 1:
            raise ValueError(f"group_size={group_size} must be at least 1; the paper's figure has 2")
        self.join = join
        self.group_size = group_size
        self.layout = layout

    def forward(self, x: Tensor) -> Tensor:
        """Joins the groups; see the class."""
        if self.group_size == 1:
            return x
        batch, channels, *space = x.shape
        width = channels // self.group_size
        adjacent = self.layout == "adjacent"
        shape = (batch, width, self.group_size) if adjacent else (batch, self.group_size, width)
        return JOINS[self.join](x.reshape(*shape, *space).unbind(2 if adjacent else 1))

    def extra_repr(self) -> str:
        """What the printed module shows."""
        return f"{self.join!r}, group_size={self.group_size}, layout={self.layout!r}"


class CompactConv2d(Operator):
    """Compact convolution in the place of a convolution and its norm (paper, abstract and figure).

    Of an ordinary host it makes all: depthwise, norm, join, ReLU, pointwise, norm; k^2 C + (C / g) O weights.
    Shapes: (B, C, H, W) -> (B, O, H', W'), H' and W' as the host's.

    A depthwise host has its pointwise convolution behind it already. There it is depthwise, norm and join, and writes
    the g-th part of the host's channels; `substitute` narrows the pointwise convolution to them.
    Shapes: (B, C, H, W) -> (B, O / g, H', W').

    Args:
        in_channels: C.
        out_channels: O, what the host convolution wrote; see `op.out_channels`.
        kernel_size: Of the depthwise convolution.
        stride: Of the depthwise convolution.
        dilation: Of the depthwise convolution.
        groups: Of the host: 1, or in_channels for a depthwise one.
        padding: Of the depthwise convolution; None keeps the size at stride 1.
        join: As in `JoinChannels`. Which operations the paper compares is not known to us.
        group_size: As in `JoinChannels`; 1 is the depthwise-separable convolution itself.
        layout: As in `JoinChannels`; "adjacent" is the figure's.

    Raises:
        ValueError: If groups is another, group_size does not divide the channels that are joined, or as
            `JoinChannels`; the message gives the nearest that work.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Size = 3,
        stride: Size = 1,
        dilation: Size = 1,
        groups: int = 1,
        padding: Size | None = None,
        *,
        join: Join = "max",
        group_size: int = 2,
        layout: Layout = "adjacent",
    ) -> None:
        super().__init__()
        if groups not in (1, in_channels):
            raise ValueError(
                f"groups={groups}: compact convolution takes the place of ordinary and of depthwise convolutions; "
                f"nearest: groups=1 or groups={in_channels}"
            )
        separable = groups > 1
        joins = JoinChannels(join, group_size, layout)
        width = out_channels if separable else in_channels
        if width % group_size:
            argument = "out_channels" if separable else "in_channels"
            nearest = nearest_divisors(group_size, width)
            raise ValueError(f"group_size={group_size} does not divide {argument}={width}; nearest: {nearest}")
        self.in_channels = in_channels
        self.out_channels = width // group_size if separable else out_channels
        pad = padding_of(kernel_size, dilation, padding)
        self.depthwise = nn.Sequential(
            nn.Conv2d(
                in_channels, width, pair(kernel_size), pair(stride), pad, pair(dilation), in_channels, bias=False
            ),
            nn.BatchNorm2d(width),
        )
        self.join = joins
        self.pointwise = None
        if not separable:
            self.pointwise = nn.Sequential(
                nn.ReLU(inplace=True),
                nn.Conv2d(width // group_size, out_channels, 1, bias=False),
                nn.BatchNorm2d(out_channels),
            )
        reset_convolutions(self)

    def forward(self, x: Tensor) -> Tensor:
        """Maps (B, in_channels, H, W) to (B, out_channels, H', W')."""
        x = self.join(self.depthwise(x))
        return x if self.pointwise is None else self.pointwise(x)
