"""SE-ResNet for 32x32 images.

Hu et al., "Squeeze-and-Excitation Networks", CVPR 2018, https://arxiv.org/abs/1709.01507

SlimConv's Table VI took a network in which every convolution has a bias, the residual ends in a ReLU before its gate,
and, by a slip that was mended later, the last stage is 516 wide instead of 512. `stage4_width=516` brings the printed
counts back.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional


class Gate(nn.Module):
    """Squeeze-excite (paper, Section 3): weights (B, C, 1, 1) for a map (B, C, H, W)."""

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.fc1, self.relu, self.fc2 = nn.Linear(channels, hidden), nn.ReLU(inplace=True), nn.Linear(hidden, channels)

    def forward(self, x: Tensor) -> Tensor:
        """The weights; see the class."""
        return torch.sigmoid(self.fc2(self.relu(self.fc1(x.mean((2, 3))))))[..., None, None]


class SEBottleneck(nn.Module):
    """1x1, 3x3, 1x1, gate, and a way around: (B, in_channels, H, W) -> (B, 4 * width, H / stride, W / stride)."""

    def __init__(self, in_channels: int, width: int, stride: int, reduction: int = 16) -> None:
        super().__init__()
        channels = 4 * width
        self.conv1, self.bn1 = nn.Conv2d(in_channels, width, 1), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, stride, 1), nn.BatchNorm2d(width)
        self.conv3, self.bn3 = nn.Conv2d(width, channels, 1), nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)
        self.gate = Gate(channels, channels // reduction)
        self.shortcut: nn.Module = nn.Identity()
        if stride > 1 or in_channels != channels:
            self.shortcut = nn.Sequential(nn.Conv2d(in_channels, channels, 1, stride), nn.BatchNorm2d(channels))

    def forward(self, x: Tensor) -> Tensor:
        """The block's output; see the class."""
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        out = self.relu(self.bn3(self.conv3(out)))
        return functional.relu(out * self.gate(out) + self.shortcut(x))


class CifarSEResNet(nn.Module):
    """(B, in_channels, H, W) -> (B, num_classes).

    Args:
        layers: Blocks in each of the four stages.
        num_classes: Width of the classifier.
        in_channels: Channels of the images.
        stage4_width: Width of the last stage's 3x3 convolutions; 516 for the counts of SlimConv's Table VI.
    """

    def __init__(
        self, layers: Sequence[int], num_classes: int = 100, in_channels: int = 3, stage4_width: int = 512
    ) -> None:
        super().__init__()
        self.conv1, self.bn1, self.relu = nn.Conv2d(in_channels, 64, 3, 1, 1), nn.BatchNorm2d(64), nn.ReLU(inplace=True)
        self.layer1 = self._stage(64, 64, layers[0], stride=1)
        self.layer2 = self._stage(256, 128, layers[1], stride=2)
        self.layer3 = self._stage(512, 256, layers[2], stride=2)
        self.layer4 = self._stage(1024, stage4_width, layers[3], stride=2)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(4 * stage4_width, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    @staticmethod
    def _stage(in_channels: int, width: int, blocks: int, stride: int) -> nn.Sequential:
        first = SEBottleneck(in_channels, width, stride)
        return nn.Sequential(first, *(SEBottleneck(4 * width, width, 1) for _ in range(blocks - 1)))

    def forward(self, x: Tensor) -> Tensor:
        """Class logits; see the class."""
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(torch.flatten(self.avgpool(x), 1))
