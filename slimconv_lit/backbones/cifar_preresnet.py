"""Pre-activation ResNet for 32x32 images: norm and activation come before each convolution.

He et al., "Identity Mappings in Deep Residual Networks", ECCV 2016, https://arxiv.org/abs/1603.05027

Nothing is on the residual stream but sums, so its width is fixed, and each block reads it through a norm of its own.
Network Slimming (ICCV 2017) prunes what a block reads: behind these norms, at `select`, a channel selection has its
place. In the plain network nothing stands there.
"""

import torch
from torch import Tensor, nn


class Bottleneck(nn.Module):
    """1x1, 3x3, 1x1 and a way around: (B, in_channels, H, W) -> (B, 4 * width, H / stride, W / stride).

    The way around starts before the norm.
    """

    def __init__(self, in_channels: int, width: int, stride: int) -> None:
        super().__init__()
        channels = 4 * width
        self.bn1, self.select = nn.BatchNorm2d(in_channels), nn.Identity()
        self.conv1, self.bn2 = nn.Conv2d(in_channels, width, 1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.bn3 = nn.Conv2d(width, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, channels, 1, bias=False)
        self.relu = nn.ReLU()
        same = stride == 1 and in_channels == channels
        self.shortcut = nn.Identity() if same else nn.Conv2d(in_channels, channels, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """The block's output; see the class."""
        out = self.conv1(self.relu(self.select(self.bn1(x))))
        out = self.conv2(self.relu(self.bn2(out)))
        out = self.conv3(self.relu(self.bn3(out)))
        return out + self.shortcut(x)


class CifarPreResNet(nn.Module):
    """ResNet-164 and its like (paper, Section 3 and Table 3): (B, in_channels, H, W) -> (B, num_classes).

    Args:
        depth: Layers with weights, 9n + 2; n blocks in each of the three stages.
        num_classes: Width of the classifier.
        in_channels: Channels of the images.

    Raises:
        ValueError: If `depth` is not 9n + 2.
    """

    def __init__(self, depth: int = 164, num_classes: int = 100, in_channels: int = 3) -> None:
        super().__init__()
        if depth < 11 or depth % 9 != 2:
            below = max((depth - 2) // 9, 1) * 9 + 2
            raise ValueError(f"depth={depth} is not 9n + 2; nearest: {below} or {below + 9}")
        n = depth // 9
        self.conv1 = nn.Conv2d(in_channels, 16, 3, 1, 1, bias=False)
        self.layer1 = self._stage(n, 16, 16, stride=1)
        self.layer2 = self._stage(n, 64, 32, stride=2)
        self.layer3 = self._stage(n, 128, 64, stride=2)
        self.bn, self.select, self.relu = nn.BatchNorm2d(256), nn.Identity(), nn.ReLU()
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(256, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    @staticmethod
    def _stage(blocks: int, in_channels: int, width: int, stride: int) -> nn.Sequential:
        first = Bottleneck(in_channels, width, stride)
        return nn.Sequential(first, *(Bottleneck(4 * width, width, 1) for _ in range(blocks - 1)))

    def forward(self, x: Tensor) -> Tensor:
        """Class logits; see the class."""
        x = self.layer3(self.layer2(self.layer1(self.conv1(x))))
        x = self.relu(self.select(self.bn(x)))
        return self.fc(torch.flatten(self.avgpool(x), 1))
