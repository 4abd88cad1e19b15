"""Ghost module: some channels by a convolution, the others from them by a cheap one.

Han et al., "GhostNet: More Features from Cheap Operations", CVPR 2020, https://arxiv.org/abs/1911.11907

The cheap operation is linear in the normed primary channels, as Eq. 3 has it: an activation between the two, which the
published ImageNet code places where the host has one, cannot be known in the place of a single convolution.
"""

import torch
from torch import Tensor, nn

from slimconv_lit.ops.base import Operator, Size, nearest_divisors, padding_of, pair, reset_convolutions


class GhostConv2d(Operator):
    """The Ghost module in the place of any convolution, 1x1 too, and its norm (paper, Section 3.1, Eq. 2 and 3).

    The host's convolution writes out_channels / s primary channels; a depthwise 3x3 of stride 1 makes s - 1 ghosts of
    each. Both have a norm. Shapes: (B, in_channels, H, W) -> (B, out_channels, H', W').

    Args:
        in_channels: Channels that it reads.
        out_channels: Channels that it writes.
        kernel_size: Of the primary convolution.
        stride: Of the primary convolution.
        dilation: Of the primary convolution.
        groups: Of the primary convolution.
        padding: Of the primary convolution; None keeps the size at stride 1.
        s: How many channels, itself among them, come of each primary one.

    Raises:
        ValueError: If s does not divide out_channels, or groups not out_channels / s; the message gives the nearest
            that do.
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
        s: int = 2,
    ) -> None:
        super().__init__()
        self.in_channels = in_channels
        self.out_channels = out_channels
        if s < 2 or self.out_channels % s:
            nearest = nearest_divisors(s, self.out_channels, least=2)
            raise ValueError(f"s={s} does not divide out_channels={self.out_channels}; nearest: {nearest}")
        primary = self.out_channels // s
        if groups < 1 or primary % groups or in_channels % groups:
            nearest = nearest_divisors(groups, primary, in_channels)
            raise ValueError(
                f"groups={groups} does not divide in_channels={in_channels} and the {primary} primary channels "
                f"(out_channels={self.out_channels}, s={s}); nearest: {nearest}"
            )
        pad = padding_of(kernel_size, dilation, padding)
        self.primary = nn.Sequential(
            nn.Conv2d(in_channels, primary, pair(kernel_size), pair(stride), pad, pair(dilation), groups, bias=False),
            nn.BatchNorm2d(primary),
        )
        self.cheap = nn.Sequential(
            nn.Conv2d(primary, self.out_channels - primary, 3, padding=1, groups=primary, bias=False),
            nn.BatchNorm2d(self.out_channels - primary),
        )
        reset_convolutions(self)

    def forward(self, x: Tensor) -> Tensor:
        """Maps (B, in_channels, H, W) to (B, out_channels, H', W')."""
        primary = self.primary(x)
        return torch.cat([primary, self.cheap(primary)], dim=1)
