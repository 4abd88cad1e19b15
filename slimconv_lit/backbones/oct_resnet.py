"""Oct-ResNet: ResNets whose stages carry a pair of maps, the low one at half the resolution.

Chen et al., "Drop an Octave", ICCV 2019, https://arxiv.org/abs/1904.05049. The convolution is in `ops/oct_conv.py`.

SlimConv's tables hold two Oct-ResNet-50 that differ in more than their stems:

| | ImageNet (Table II) | CIFAR (Table VI) |
|---|---|---|
| the last stage | its first block leaves the pair behind with its first 1x1 | with its last 1x1 |
| the very first projection reads | the block's input | what the block's first 1x1 writes |
| at a stride, low to high reads | the low map unpooled | pooled |

Table VI says alpha = 0.5, but its counts are those of 0.25.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from slimconv_lit.ops import HighLowConv2d


class OctBottleneck(nn.Module):
    """1x1, 3x3, 1x1 and a way around, on pairs: in_channels -> 4 * width channels, high and low together.

    Args:
        in_channels: Channels of both maps that it reads.
        width: Channels of both maps in between.
        stride: Of the 3x3 and of the projection.
        alphas: Part of the channels that is low: in what it reads, in between, in what it writes.
        late_projection: The projection reads what the first 1x1 writes.
        unpooled_cross: As in `HighLowConv2d`.
    """

    def __init__(
        self,
        in_channels: int,
        width: int,
        stride: int,
        alphas: tuple[float, float, float],
        *,
        late_projection: bool = False,
        unpooled_cross: bool = False,
    ) -> None:
        super().__init__()

        def conv(reads: int, writes: int, kernel: int, stride: int, low_in: float, low_out: float) -> HighLowConv2d:
            return HighLowConv2d(
                *(reads, writes, kernel, stride), alpha_in=low_in, alpha_out=low_out, unpooled_cross=unpooled_cross
            )

        first, between, last = alphas
        self.conv1 = conv(in_channels, width, 1, 1, first, between)
        self.conv2 = conv(width, width, 3, stride, between, between)
        self.conv3 = conv(width, 4 * width, 1, 1, between, last)
        self.late_projection = late_projection
        self.projection = None
        if late_projection:
            self.projection = conv(width, 4 * width, 1, stride, between, last)
        elif stride > 1 or in_channels != 4 * width:
            self.projection = conv(in_channels, 4 * width, 1, stride, first, last)

    def forward(self, high: Tensor, low: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Maps a pair to a pair, either of which may lack its low map."""
        between = _relu(*self.conv1(high, low))
        if self.projection is not None:
            high, low = self.projection(*(between if self.late_projection else (high, low)))
        out_high, out_low = self.conv3(*_relu(*self.conv2(*between)))
        return _relu(out_high + high, None if out_low is None else out_low + low)


def _relu(high: Tensor, low: Tensor | None) -> tuple[Tensor, Tensor | None]:
    return functional.relu(high), None if low is None else functional.relu(low)


class OctResNet(nn.Module):
    """(B, in_channels, H, W) -> (B, num_classes).

    Args:
        layers: Blocks in each of the four stages.
        alpha: Part of the channels that is low in the first three stages.
        num_classes: Width of the classifier.
        in_channels: Channels of the images.
        cifar: The layout for 32x32 images; see above.
    """

    def __init__(
        self,
        layers: Sequence[int],
        alpha: float = 0.5,
        num_classes: int = 1000,
        in_channels: int = 3,
        *,
        cifar: bool = False,
    ) -> None:
        super().__init__()
        stem = (3, 1, 1) if cifar else (7, 2, 3)
        self.conv1 = nn.Conv2d(in_channels, 64, *stem, bias=False)
        nn.init.kaiming_normal_(self.conv1.weight, mode="fan_out", nonlinearity="relu")
        self.bn1 = nn.BatchNorm2d(64)
        self.maxpool = nn.Identity() if cifar else nn.MaxPool2d(3, 2, 1)
        channels = 64
        for stage, blocks in enumerate(layers, 1):
            built = nn.ModuleList()
            for i in range(blocks):
                width, stride = 32 * 2**stage, 2 if stage > 1 and i == 0 else 1
                alphas = self._alphas(stage, i, alpha, cifar)
                late = cifar and stage == 1 and i == 0
                built.append(
                    OctBottleneck(channels, width, stride, alphas, late_projection=late, unpooled_cross=not cifar)
                )
                channels = 4 * width
            self.add_module(f"layer{stage}", built)
            # A stage writes a pair, which no head reads; its high map passes through here to be had by name.
            self.add_module(f"high{stage}", nn.Identity())
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(channels, num_classes)

    @staticmethod
    def _alphas(stage: int, block: int, alpha: float, cifar: bool) -> tuple[float, float, float]:
        if stage < 4:
            return 0 if (stage, block) == (1, 0) else alpha, alpha, alpha
        if block == 0:
            return alpha, alpha if cifar else 0, 0
        return 0, 0, 0

    def forward(self, x: Tensor) -> Tensor:
        """Class logits; see the class."""
        high = self.maxpool(functional.relu(self.bn1(self.conv1(x))))
        low: Tensor | None = None
        for stage in (1, 2, 3, 4):
            for block in self.get_submodule(f"layer{stage}").children():
                high, low = block(high, low)
            high = self.get_submodule(f"high{stage}")(high)
        return self.fc(torch.flatten(self.avgpool(high), 1))
