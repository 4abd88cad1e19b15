"""Octave convolution: a part of the channels at half the resolution.

Chen et al., "Drop an Octave: Reducing Spatial Redundancy in Convolutional Neural Networks with Octave Convolution",
ICCV 2019, https://arxiv.org/abs/1904.05049

An octave network carries a pair of maps from layer to layer, high and low, which the operators' contract (one map in,
one map out) does not know. So there are two modules. `HighLowConv2d` is the paper's: it reads and writes a pair, and
Oct-ResNet is built of it. `OctConv2d` keeps the contract: it makes a pair of the map that it reads, puts it through a
`HighLowConv2d`, and joins what comes out to one map of the host's width, so that it can stand in any network.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

from slimconv_lit.ops.base import (
    Operator,
    Size,
    check_keeps_size,
    fraction,
    nearest_divisors,
    pair,
    reset_convolutions,
    same_padding,
)


class HighLowConv2d(nn.Module):
    """The octave convolution of a pair of maps, and a norm for each (paper, Section 3.2, Eq. 2, and Fig. 2).

    A stride is an average pooling before all that follows. High to low is an average pooling over 2x2 and a
    convolution; low to high a convolution and the nearest neighbour.
    Shapes: high (B, in_channels - L, H, W) and low (B, L, ceil(H / 2), ceil(W / 2)), with L = in_channels * alpha_in,
    to high (B, out_channels - M, H', W') and low (B, M, ...), M = out_channels * alpha_out, H' = ceil(H / stride).

    Args:
        in_channels: Channels of both maps that it reads.
        out_channels: Channels of both maps that it writes.
        kernel_size: Of all its convolutions; odd.
        stride: Of the poolings in front.
        dilation: Of all its convolutions.
        groups: Of each of its convolutions.
        alpha_in: Part of in_channels that is low; at 0 it reads no low map (the first of a network).
        alpha_out: Part of out_channels that is low; at 0 it writes none (the last).
        exchange: Whether the two maps read each other. Depthwise convolutions do not.
        unpooled_cross: Low to high reads the low map before the pooling of the stride; at stride 2 what it writes then
            has the size of the high map already. It costs more (SlimConv's Table II counts so, Table VI does not).

    Raises:
        ValueError: If the kernel is even, an alpha is not at least 0 and below 1, or groups do not divide a width; the
            message gives the nearest that work.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Size = 3,
        stride: Size = 1,
        dilation: Size = 1,
        groups: int = 1,
        *,
        alpha_in: float | str = 0.5,
        alpha_out: float | str = 0.5,
        exchange: bool = True,
        unpooled_cross: bool = False,
    ) -> None:
        super().__init__()
        low_in, low_out = low_width("alpha_in", alpha_in, in_channels), low_width("alpha_out", alpha_out, out_channels)
        high_in, high_out = in_channels - low_in, out_channels - low_out
        check_keeps_size(kernel_size, dilation, None)

        def convolution(reads: int, writes: int) -> nn.Conv2d:
            own_groups = groups if exchange else reads
            if reads % own_groups or writes % own_groups:
                nearest = nearest_divisors(groups, reads, writes)
                raise ValueError(f"groups={groups} does not divide {reads} and {writes}; nearest: {nearest}")
            kernel, spread = pair(kernel_size), pair(dilation)
            return nn.Conv2d(reads, writes, kernel, 1, same_padding(kernel, spread), spread, own_groups, bias=False)

        self.high_to_high = convolution(high_in, high_out)
        self.high_to_low = convolution(high_in, low_out) if low_out and exchange else None
        self.low_to_high = convolution(low_in, high_out) if low_in and exchange else None
        self.low_to_low = convolution(low_in, low_out) if low_in and low_out else None
        self.high_norm = nn.BatchNorm2d(high_out)
        self.low_norm = nn.BatchNorm2d(low_out) if low_out else None
        self.unpooled_cross = unpooled_cross
        # Windows that the border cuts average over what they hold, so that odd sizes are rounded up.
        self.subsample = nn.AvgPool2d(pair(stride), ceil_mode=True) if max(pair(stride)) > 1 else nn.Identity()
        self.halve = nn.AvgPool2d(2, ceil_mode=True)
        reset_convolutions(self)

    def forward(self, high: Tensor, low: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Maps a pair to a pair, either of which may lack its low map; see the class."""
        high = self.subsample(high)
        out_high, out_low = self.high_to_high(high), None
        if self.high_to_low is not None:
            out_low = self.high_to_low(self.halve(high))
        if low is not None:
            pooled = self.subsample(low)
            if self.low_to_high is not None:
                cross = self.low_to_high(low if self.unpooled_cross else pooled)
                out_high = out_high + functional.interpolate(cross, size=out_high.shape[-2:])
            if self.low_to_low is not None:
                from_low = self.low_to_low(pooled)
                out_low = from_low if out_low is None else out_low + from_low
        if out_low is not None and self.low_norm is not None:
            out_low = self.low_norm(out_low)
        return self.high_norm(out_high), out_low


class OctConv2d(Operator):
    """Octave convolution between ordinary maps, in the place of a spatial convolution and its norm.

    The last channels that it reads, a part alpha of them, are averaged over 2x2; what a `HighLowConv2d` writes at low
    resolution is scaled up again (nearest neighbour) and put behind the rest.
    Shapes: (B, in_channels, H, W) -> (B, out_channels, ceil(H / stride), ceil(W / stride)).

    Args:
        in_channels: Channels that it reads.
        out_channels: Channels that it writes.
        kernel_size: Of all its convolutions; odd.
        stride: Of the poolings in front of them.
        dilation: Of all its convolutions.
        groups: Of each of its convolutions. Equal to both widths, all are depthwise and the two halves do not meet.
        padding: Must be what keeps the size at stride 1, which None stands for.
        alpha: Part of the channels, on either side, that is low; a number, or text such as "1/4".

    Raises:
        ValueError: If alpha leaves a side without channels, or groups, kernel_size or padding cannot be had; the
            message gives the nearest that work.
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
        alpha: float | str = 0.5,
    ) -> None:
        super().__init__()
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.alpha = fraction("alpha", alpha)
        check_keeps_size(kernel_size, dilation, padding)
        narrower = min(in_channels, out_channels)
        if narrower < 2 or not low_width("alpha", alpha, narrower):
            least = f"1/{narrower}" if narrower > 1 else "none; it takes 2 channels"
            raise ValueError(
                f"alpha={alpha} leaves no channel at low resolution (in_channels={in_channels}, "
                f"out_channels={out_channels}); nearest: {least}"
            )
        self.octave = HighLowConv2d(
            in_channels,
            out_channels,
            kernel_size,
            stride,
            dilation,
            groups,
            alpha_in=alpha,
            alpha_out=alpha,
            exchange=not groups == in_channels == out_channels,
        )

    def forward(self, x: Tensor) -> Tensor:
        """Maps (B, in_channels, H, W) to (B, out_channels, H', W')."""
        split = x.shape[1] - x.shape[1] * self.alpha.numerator // self.alpha.denominator
        low = functional.avg_pool2d(x[:, split:], 2, ceil_mode=True)
        high, low = self.octave(x[:, :split], low)
        return torch.cat([high, functional.interpolate(low, size=high.shape[-2:])], dim=1)

    def extra_repr(self) -> str:
        """What the printed module shows besides its children."""
        return f"{self.in_channels}, {self.out_channels}, alpha={self.alpha}"


def low_width(argument: str, alpha: float | str, channels: int) -> int:
    """How many of `channels` are at low resolution: channels * alpha, rounded down.

    Raises:
        ValueError: If alpha is not at least 0 and below 1.
    """
    part = fraction(argument, alpha)
    if not 0 <= part < 1:
        raise ValueError(f"{argument}={alpha} is not at least 0 and below 1; nearest: {'1/2' if part > 0 else '0'}")
    return channels * part.numerator // part.denominator
