"""bL-ResNet: every stage looks twice, with a big branch at half resolution and a little one at full.

Chen et al., "Big-Little Net: An Efficient Multi-Scale Feature Representation for Visual and Speech Recognition",
ICLR 2019, https://arxiv.org/abs/1807.03848

The big branch is as deep and as wide as the ResNet's stage; the little one is `beta` times less deep and `alpha` times
less wide. A last block, the fusion, reads their sum and carries the stage's stride.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional


def _conv(reads: int, writes: int, kernel: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(reads, writes, kernel, stride, kernel // 2, bias=False)


class Bottleneck(nn.Module):
    """1x1, 3x3, 1x1 and a way around: (B, in_channels, H, W) -> (B, out_channels, H', W').

    Args:
        in_channels: Channels that it reads.
        out_channels: Channels that it writes; it is a quarter as wide in between.
        stride: Of the 3x3; the way around is averaged over 3x3.
        last_relu: Whether a ReLU ends it.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int = 1, last_relu: bool = True) -> None:
        super().__init__()
        width = out_channels // 4
        self.conv1, self.bn1 = _conv(in_channels, width, 1), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = _conv(width, width, 3, stride), nn.BatchNorm2d(width)
        self.conv3, self.bn3 = _conv(width, out_channels, 1), nn.BatchNorm2d(out_channels)
        self.relu = nn.ReLU(inplace=True)
        self.last_relu = last_relu
        around: list[nn.Module] = [nn.AvgPool2d(3, stride, 1)] if stride > 1 else []
        if in_channels != out_channels:
            around += [_conv(in_channels, out_channels, 1), nn.BatchNorm2d(out_channels)]
        self.shortcut = nn.Sequential(*around)

    def forward(self, x: Tensor) -> Tensor:
        """The block's output; see the class."""
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out)) + self.shortcut(x)
        return self.relu(out) if self.last_relu else out


def _blocks(in_channels: int, out_channels: int, count: int, stride: int = 1, last_relu: bool = True) -> nn.Sequential:
    first = Bottleneck(in_channels, out_channels, stride)
    more = [Bottleneck(out_channels, out_channels, last_relu=last_relu or i < count - 1) for i in range(1, count)]
    return nn.Sequential(first, *more)


class BigLittle(nn.Module):
    """One stage (paper, Section 3, Fig. 2): (B, in_channels, H, W) -> (B, out_channels, H / stride, W / stride).

    Args:
        in_channels: Channels that it reads.
        out_channels: Channels that it writes.
        blocks: Blocks in the ResNet's stage; the big branch has one less, for the fusion is the last.
        alpha: How much narrower the little branch is.
        beta: How much less deep it is.
        stride: Of the fusion.
    """

    def __init__(self, in_channels: int, out_channels: int, blocks: int, alpha: int, beta: int, stride: int) -> None:
        super().__init__()
        narrow = out_channels // alpha
        self.big = _blocks(in_channels, out_channels, blocks - 1, stride=2, last_relu=False)
        self.little = _blocks(in_channels, narrow, max(1, blocks // beta - 1))
        self.widen = nn.Sequential(_conv(narrow, out_channels, 1), nn.BatchNorm2d(out_channels))
        self.relu = nn.ReLU(inplace=True)
        self.fusion = Bottleneck(out_channels, out_channels, stride)

    def forward(self, x: Tensor) -> Tensor:
        """The stage's output; see the class."""
        little = self.widen(self.little(x))
        big = functional.interpolate(self.big(x), size=little.shape[-2:])
        return self.fusion(self.relu(big + little))


class Stem(nn.Module):
    """A big and a little branch in the place of a max-pool: (B, channels, H, W) -> (B, channels, H / 2, W / 2)."""

    def __init__(self, channels: int, alpha: int) -> None:
        super().__init__()
        narrow = channels // alpha
        self.big = nn.Sequential(_conv(channels, channels, 3, 2), nn.BatchNorm2d(channels))
        self.little = nn.Sequential(
            *(_conv(channels, narrow, 3), nn.BatchNorm2d(narrow), nn.ReLU(inplace=True)),
            *(_conv(narrow, narrow, 3, 2), nn.BatchNorm2d(narrow), nn.ReLU(inplace=True)),
            *(_conv(narrow, channels, 1), nn.BatchNorm2d(channels)),
        )
        self.relu = nn.ReLU(inplace=True)
        self.fusion = nn.Sequential(_conv(channels, channels, 1), nn.BatchNorm2d(channels), nn.ReLU(inplace=True))

    def forward(self, x: Tensor) -> Tensor:
        """The smaller map; see the class."""
        return self.fusion(self.relu(self.big(x) + self.little(x)))


class BLResNet(nn.Module):
    """(B, in_channels, H, W) -> (B, num_classes).

    Args:
        layers: Blocks in each of the four stages.
        alpha: How much narrower the little branches are.
        beta: How much less deep they are.
        num_classes: Width of the classifier.
        in_channels: Channels of the images.
    """

    def __init__(
        self, layers: Sequence[int], alpha: int = 2, beta: int = 4, num_classes: int = 1000, in_channels: int = 3
    ) -> None:
        super().__init__()
        self.conv1, self.bn1, self.relu = _conv(in_channels, 64, 7, 2), nn.BatchNorm2d(64), nn.ReLU(inplace=True)
        self.stem = Stem(64, alpha)
        self.layer1 = BigLittle(64, 256, layers[0], alpha, beta, stride=2)
        self.layer2 = BigLittle(256, 512, layers[1], alpha, beta, stride=2)
        self.layer3 = BigLittle(512, 1024, layers[2], alpha, beta, stride=1)
        self.layer4 = _blocks(1024, 2048, layers[3], stride=2)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(2048, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        """Class logits; see the class."""
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.stem(x)
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(torch.flatten(self.avgpool(x), 1))
