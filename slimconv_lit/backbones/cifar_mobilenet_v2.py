"""MobileNetV2 for 32x32 images.

Sandler et al., "MobileNetV2: Inverted Residuals and Linear Bottlenecks", CVPR 2018, https://arxiv.org/abs/1801.04381

The network of SlimConv's Table V is not the paper's at stride 1: blocks that keep the size always have a way around, by
a 1x1 convolution where the width changes; the first block has its 1x1 too although it does not widen; and the
activation is ReLU.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

# (widening, channels, blocks, stride of the first), as in the paper's Table 2 but for the strides.
STAGES = (
    (1, 16, 1, 1),
    (6, 24, 2, 1),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)


class InvertedResidual(nn.Module):
    """1x1 that widens, depthwise 3x3, 1x1: (B, in_channels, H, W) -> (B, out_channels, H / stride, W / stride)."""

    def __init__(self, in_channels: int, out_channels: int, widening: int, stride: int) -> None:
        super().__init__()
        hidden = widening * in_channels
        self.expand, self.bn1 = nn.Conv2d(in_channels, hidden, 1, bias=False), nn.BatchNorm2d(hidden)
        self.depthwise = nn.Conv2d(hidden, hidden, 3, stride, 1, groups=hidden, bias=False)
        self.bn2 = nn.BatchNorm2d(hidden)
        self.project, self.bn3 = nn.Conv2d(hidden, out_channels, 1, bias=False), nn.BatchNorm2d(out_channels)
        self.adds = stride == 1
        self.shortcut: nn.Module = nn.Identity()
        if self.adds and in_channels != out_channels:
            self.shortcut = nn.Sequential(
                nn.Conv2d(in_channels, out_channels, 1, bias=False), nn.BatchNorm2d(out_channels)
            )

    def forward(self, x: Tensor) -> Tensor:
        """The block's output; see the class."""
        out = functional.relu(self.bn1(self.expand(x)))
        out = functional.relu(self.bn2(self.depthwise(out)))
        out = self.bn3(self.project(out))
        return out + self.shortcut(x) if self.adds else out


class CifarMobileNetV2(nn.Module):
    """(B, in_channels, H, W) -> (B, num_classes).

    Args:
        num_classes: Width of the classifier.
        in_channels: Channels of the images.
    """

    def __init__(self, num_classes: int = 100, in_channels: int = 3) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(in_channels, 32, 3, 1, 1, bias=False), nn.BatchNorm2d(32)
        channels, blocks = 32, []
        for widening, width, count, stride in STAGES:
            for i in range(count):
                blocks.append(InvertedResidual(channels, width, widening, stride if i == 0 else 1))
                channels = width
        self.blocks = nn.Sequential(*blocks)
        self.conv2, self.bn2 = nn.Conv2d(channels, 1280, 1, bias=False), nn.BatchNorm2d(1280)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(1280, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out")

    def forward(self, x: Tensor) -> Tensor:
        """Class logits; see the class."""
        x = self.blocks(functional.relu(self.bn1(self.conv1(x))))
        x = functional.relu(self.bn2(self.conv2(x)))
        return self.fc(torch.flatten(self.avgpool(x), 1))
