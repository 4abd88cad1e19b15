"""ShuffleNetV2 for 32x32 images.

Ma et al., "ShuffleNet V2: Practical Guidelines for Efficient CNN Architecture Design", ECCV 2018,
https://arxiv.org/abs/1807.11164

The stem keeps the image size, and there is no max-pool (SlimConv's Table V).
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional


def shuffle(x: Tensor) -> Tensor:
    """Interleaves the two halves of the channels: (B, C, H, W) -> (B, C, H, W)."""
    batch, channels, height, width = x.shape
    return x.reshape(batch, 2, channels // 2, height, width).transpose(1, 2).flatten(1, 2)


class Branch(nn.Module):
    """1x1, depthwise 3x3, 1x1: (B, in_channels, H, W) -> (B, width, H / stride, W / stride)."""

    def __init__(self, in_channels: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(in_channels, width, 1, bias=False), nn.BatchNorm2d(width)
        self.depthwise = nn.Conv2d(width, width, 3, stride, 1, groups=width, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv2, self.bn3 = nn.Conv2d(width, width, 1, bias=False), nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        """The branch's output; see the class."""
        out = functional.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.depthwise(out))
        return functional.relu(self.bn3(self.conv2(out)))


class Unit(nn.Module):
    """One half of the channels stays, the other goes through a branch: (B, C, H, W) -> (B, C, H, W)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.branch = Branch(channels // 2, channels // 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        """The unit's output (paper, Fig. 3c)."""
        still, moved = x.chunk(2, dim=1)
        return shuffle(torch.cat([still, self.branch(moved)], dim=1))


class DownUnit(nn.Module):
    """Two branches read all channels: (B, in_channels, H, W) -> (B, channels, H / 2, W / 2)."""

    def __init__(self, in_channels: int, channels: int) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(in_channels, in_channels, 3, 2, 1, groups=in_channels, bias=False)
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv, self.bn2 = nn.Conv2d(in_channels, channels // 2, 1, bias=False), nn.BatchNorm2d(channels // 2)
        self.branch = Branch(in_channels, channels // 2, 2)

    def forward(self, x: Tensor) -> Tensor:
        """The unit's output (paper, Fig. 3d)."""
        left = functional.relu(self.bn2(self.conv(self.bn1(self.depthwise(x)))))
        return shuffle(torch.cat([left, self.branch(x)], dim=1))


class CifarShuffleNetV2(nn.Module):
    """(B, in_channels, H, W) -> (B, num_classes).

    Args:
        widths: Channels of the three stages and of the last 1x1 convolution; by default those of width 1.0.
        num_classes: Width of the classifier.
        in_channels: Channels of the images.
    """

    def __init__(
        self, widths: Sequence[int] = (116, 232, 464, 1024), num_classes: int = 100, in_channels: int = 3
    ) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(in_channels, 24, 3, 1, 1, bias=False), nn.BatchNorm2d(24)
        self.stage2 = self._stage(24, widths[0], 4)
        self.stage3 = self._stage(widths[0], widths[1], 8)
        self.stage4 = self._stage(widths[1], widths[2], 4)
        self.conv5, self.bn5 = nn.Conv2d(widths[2], widths[3], 1, bias=False), nn.BatchNorm2d(widths[3])
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(widths[3], num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out")

    @staticmethod
    def _stage(in_channels: int, channels: int, units: int) -> nn.Sequential:
        return nn.Sequential(DownUnit(in_channels, channels), *(Unit(channels) for _ in range(units - 1)))

    def forward(self, x: Tensor) -> Tensor:
        """Class logits; see the class."""
        x = functional.relu(self.bn1(self.conv1(x)))
        x = self.stage4(self.stage3(self.stage2(x)))
        x = functional.relu(self.bn5(self.conv5(x)))
        return self.fc(torch.flatten(self.avgpool(x), 1))
