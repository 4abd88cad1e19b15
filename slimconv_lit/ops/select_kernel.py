"""Selective kernels: two kernel sizes, weighed against each other channel by channel.

Li et al., "Selective Kernel Networks", CVPR 2019, https://arxiv.org/abs/1903.06586

Two things are as SKNet-50 counts in SlimConv's Table VI: the larger kernel is a true one (5x5 beside 3x3) instead of a
dilated 3x3, and the descriptor has a bias instead of a norm, so that one image is enough to train on.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

from slimconv_lit.ops.base import Operator, Size, check_whole, padding_of, pair, reset_convolutions


class SKConv2d(Operator):
    """A selective kernel unit in the place of a spatial convolution and its norm (paper, Section 3.1).

    Split: two convolutions, KxK and (K+2)x(K+2), each with norm and ReLU. Fuse: the average of their sum, through a
    linear layer to D = max(out_channels // reduction, min_hidden) (Eq. 2 to 4). Select: a softmax over the two (Eq. 5
    and 6). Shapes: (B, in_channels, H, W) -> (B, out_channels, H', W'), H' and W' as the host's.

    Args:
        in_channels: Channels that it reads.
        out_channels: Channels that it writes.
        kernel_size: K.
        stride: Of both convolutions.
        dilation: Of both convolutions.
        groups: Of both convolutions.
        padding: Of the smaller convolution; the larger has what gives it the same size.
        reduction: r in the paper.
        min_hidden: L in the paper, the least D.

    Raises:
        ValueError: If reduction or min_hidden is below 1.
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
        min_hidden: int = 32,
    ) -> None:
        super().__init__()
        check_whole(reduction=reduction, min_hidden=min_hidden)
        self.in_channels = in_channels
        self.out_channels = width = out_channels
        kernel, spread = pair(kernel_size), pair(dilation)
        pad = padding_of(kernel_size, dilation, padding)

        def branch(more: int) -> nn.Sequential:
            size = (kernel[0] + 2 * more, kernel[1] + 2 * more)
            fill = (pad[0] + more * spread[0], pad[1] + more * spread[1])
            return nn.Sequential(
                nn.Conv2d(in_channels, width, size, pair(stride), fill, spread, groups, bias=False),
                nn.BatchNorm2d(width),
                nn.ReLU(inplace=True),
            )

        self.small, self.large = branch(0), branch(1)
        hidden = max(width // reduction, min_hidden)
        self.squeeze = nn.Linear(width, hidden)
        self.select = nn.ModuleList(nn.Linear(hidden, width) for _ in range(2))
        reset_convolutions(self)

    def forward(self, x: Tensor) -> Tensor:
        """Maps (B, in_channels, H, W) to (B, out_channels, H', W')."""
        small, large = self.small(x), self.large(x)
        z = functional.relu(self.squeeze((small + large).mean((2, 3))))
        logits = torch.stack([choice(z)[..., None, None] for choice in self.select])
        of_small, of_large = logits.softmax(dim=0).unbind()
        return of_small * small + of_large * large
