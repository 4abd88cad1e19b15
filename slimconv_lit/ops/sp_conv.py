"""SPConv: a part of the channels gets the spatial convolution, the rest a 1x1.

Zhang et al., "Split to Be Slim: An Overlooked Redundancy in Vanilla Convolution", IJCAI 2020,
https://arxiv.org/abs/2006.12085

    B batch   C channels read   O channels written   R = C * ratio representative channels   H W space

Of what the paper leaves open, this is what its published ResNet-50 counts: the redundant channels' 1x1 has a bias, and
the block's norm stays behind the two that are inside.
"""

from fractions import Fraction

import torch
from torch import Tensor, nn
from torch.nn import functional

from slimconv_lit.ops.base import Operator, Size, check_keeps_size, fraction, pair, reset_convolutions, same_padding

GROUPS = 2


class SPConv2d(Operator):
    """SPConv in the place of a spatial convolution and its norm (paper, Section 3, Fig. 4).

    The representative channels go through a KxK convolution in two groups and a 1x1 one, whose sum is normed; the
    others go through a 1x1 one and a norm. The two maps are weighed, channel by channel, by the softmax over their
    averages, added, and normed. At a stride the 1x1 convolutions read averages over strides.
    Shapes: (B, C, H, W) -> (B, O, ceil(H / stride), ceil(W / stride)).

    Args:
        in_channels: C.
        out_channels: O.
        kernel_size: K; odd.
        stride: Of the KxK convolution and of the averages.
        dilation: Of the KxK convolution.
        groups: Of the host, which must be an ordinary convolution: 1.
        padding: Must be what keeps the size at stride 1, which None stands for.
        ratio: Part of C that is representative, as a number or as text ("1/8").

    Raises:
        ValueError: If ratio leaves no channel for a side, R or O is odd, or groups, kernel_size or padding cannot be
            had; the message gives the nearest that work.
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
        ratio: float | str = 0.5,
    ) -> None:
        super().__init__()
        self.in_channels = in_channels
        self.out_channels = width = out_channels
        if groups != 1:
            raise ValueError(f"groups={groups}: SPConv takes the place of ordinary convolutions; nearest: groups=1")
        if width % GROUPS:
            raise ValueError(f"out_channels={width} is odd; nearest: {width - 1} or {width + 1}")
        check_keeps_size(kernel_size, dilation, padding)
        self.ratio = fraction("ratio", ratio)
        heavy = self._representative(in_channels)
        if heavy % GROUPS or not 0 < heavy < in_channels:
            even = sorted(range(2, in_channels, 2), key=lambda n: abs(n - self.ratio * in_channels))[:2]
            nearest = " or ".join(str(Fraction(n, in_channels)) for n in sorted(even)) or "none; it takes 3 channels"
            raise ValueError(
                f"ratio={ratio} makes {heavy} of in_channels={in_channels} representative, which is not an even "
                f"number between; nearest: {nearest}"
            )
        self.stride = pair(stride)
        pad = same_padding(kernel_size, dilation)
        self.spatial = nn.Conv2d(
            heavy, width, pair(kernel_size), self.stride, pad, pair(dilation), groups=GROUPS, bias=False
        )
        self.pointwise = nn.Conv2d(heavy, width, 1, bias=False)
        self.heavy_norm = nn.BatchNorm2d(width)
        self.light = nn.Sequential(nn.Conv2d(in_channels - heavy, width, 1), nn.BatchNorm2d(width))
        self.norm = nn.BatchNorm2d(width)
        reset_convolutions(self)

    def _representative(self, channels: int) -> int:
        return channels * self.ratio.numerator // self.ratio.denominator

    def _average(self, x: Tensor) -> Tensor:
        # Windows that the border cuts average over what they hold, so odd sizes meet those of the convolution.
        return functional.avg_pool2d(x, self.stride, ceil_mode=True) if max(self.stride) > 1 else x

    def forward(self, x: Tensor) -> Tensor:
        """Maps (B, C, H, W) to (B, O, H', W')."""
        split = self._representative(x.shape[1])
        averaged = self._average(x)
        heavy = self.heavy_norm(self.spatial(x[:, :split]) + self.pointwise(averaged[:, :split]))
        light = self.light(averaged[:, split:])
        means = torch.stack([heavy.mean((2, 3), keepdim=True), light.mean((2, 3), keepdim=True)])
        of_heavy, of_light = means.softmax(dim=0).unbind()
        return self.norm(of_heavy * heavy + of_light * light)

    def extra_repr(self) -> str:
        """What the printed module shows besides its children."""
        return f"{self.in_channels}, {self.out_channels}, ratio={self.ratio}"
