"""Squeeze-and-excitation: channels weighed by a gate that looks at the whole map.

Hu et al., "Squeeze-and-Excitation Networks", CVPR 2018, https://arxiv.org/abs/1709.01507

The gate is torchvision's. It has to stand behind a norm, so the operator is a convolution, its norm and the gate: put
in the place of a bottleneck's last 1x1 it makes the paper's SE-ResNet of a ResNet.
"""

from torch import Tensor, nn
from torchvision.ops import SqueezeExcitation

from slimconv_lit.ops.base import Operator, Size, check_whole, padding_of, pair, reset_convolutions


class SEConv2d(Operator):
    """The host's convolution and a norm, then a squeeze-excite gate (paper, Section 3, Eq. 2 to 4).

    Shapes: (B, in_channels, H, W) -> (B, out_channels, H', W'), H' and W' as the host's.

    Args:
        in_channels: Channels that it reads.
        out_channels: Channels that it writes and weighs.
        kernel_size: Of the convolution.
        stride: Of the convolution.
        dilation: Of the convolution.
        groups: Of the convolution.
        padding: Of the convolution; None keeps the size at stride 1.
        reduction: r in the paper; the gate is max(out_channels // reduction, 1) wide inside.

    Raises:
        ValueError: If reduction is below 1.
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
        reduction: int = 16,
    ) -> None:
        super().__init__()
        check_whole(reduction=reduction)
        self.in_channels = in_channels
        self.out_channels = width = out_channels
        pad = padding_of(kernel_size, dilation, padding)
        self.conv = nn.Conv2d(
            in_channels, width, pair(kernel_size), pair(stride), pad, pair(dilation), groups, bias=False
        )
        self.norm = nn.BatchNorm2d(width)
        self.gate = SqueezeExcitation(width, max(width // reduction, 1))
        reset_convolutions(self)

    def forward(self, x: Tensor) -> Tensor:
        """Maps (B, in_channels, H, W) to (B, out_channels, H', W')."""
        return self.gate(self.norm(self.conv(x)))
