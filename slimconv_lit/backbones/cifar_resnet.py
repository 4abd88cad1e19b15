"""ResNets for 32x32 images.

He et al., "Deep Residual Learning for Image Recognition", CVPR 2016, https://arxiv.org/abs/1512.03385

Two families go by this name. `cifar_resnet(20|32|44|56|110)` is the paper's own, Section 4.2: widths 16, 32, 64 and
shortcuts without parameters (option A). `cifar_stem(...)` is an ImageNet network whose stem keeps the image size.
"""

from collections.abc import Callable
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional

Shortcut = Literal["A", "B"]


class ZeroPadShortcut(nn.Module):
    """Option A: every `stride`-th pixel, and new channels that are zero, half of them on either side.

    Shapes: (B, C, H, W) -> (B, C + 2 * extra, ceil(H / stride), ceil(W / stride)).

    Args:
        extra: How many channels to add on each side.
        stride: Step between the pixels that are kept.
    """

    def __init__(self, extra: int, stride: int) -> None:
        super().__init__()
        self.extra = extra
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        """Subsamples and pads; see the class."""
        return functional.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.extra, self.extra))


class Block(nn.Module):
    """Two 3x3 convolutions and a shortcut: (B, in_channels, H, W) -> (B, width, H / stride, W / stride)."""

    def __init__(self, in_channels: int, width: int, stride: int, shortcut: Shortcut) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, width, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.shortcut: nn.Module = nn.Identity()
        if stride > 1 or in_channels != width:
            self.shortcut = (
                ZeroPadShortcut((width - in_channels) // 2, stride)
                if shortcut == "A"
                else nn.Sequential(nn.Conv2d(in_channels, width, 1, stride, bias=False), nn.BatchNorm2d(width))
            )

    def forward(self, x: Tensor) -> Tensor:
        """The block's output; see the class."""
        out = functional.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        return functional.relu(out + self.shortcut(x))


class CifarResNet(nn.Module):
    """ResNet-20/32/44/56/110 (paper, Section 4.2): (B, in_channels, H, W) -> (B, num_classes).

    Args:
        depth: Layers with weights, 6n + 2; n blocks a stage.
        num_classes: Width of the classifier.
        in_channels: Channels of the images.
        shortcut: Where the width changes, "A" has no parameters, as the paper's networks for CIFAR, and "B" a 1x1
            convolution and a norm, as SCConv's Table 2 counts.

    Raises:
        ValueError: If `depth` is not 6n + 2, or there is no such shortcut.
    """

    def __init__(self, depth: int, num_classes: int = 100, in_channels: int = 3, shortcut: Shortcut = "A") -> None:
        super().__init__()
        if shortcut not in get_args(Shortcut):
            raise ValueError(f"shortcut={shortcut!r} is neither 'A' nor 'B'")
        if depth < 8 or depth % 6 != 2:
            below = max((depth - 2) // 6, 1) * 6 + 2
            raise ValueError(f"depth={depth} is not 6n + 2; nearest: {below} or {below + 6}")
        self.conv1 = nn.Conv2d(in_channels, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.relu = nn.ReLU(inplace=True)
        n = depth // 6
        self.layer1 = self._stage(n, 16, 16, 1, shortcut)
        self.layer2 = self._stage(n, 16, 32, 2, shortcut)
        self.layer3 = self._stage(n, 32, 64, 2, shortcut)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(64, num_classes)
        for module in self.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                nn.init.kaiming_normal_(module.weight)

    @staticmethod
    def _stage(blocks: int, in_channels: int, width: int, stride: int, shortcut: Shortcut) -> nn.Sequential:
        first = Block(in_channels, width, stride, shortcut)
        return nn.Sequential(first, *(Block(width, width, 1, shortcut) for _ in range(blocks - 1)))

    def forward(self, x: Tensor) -> Tensor:
        """Class logits; see the class."""
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.fc(torch.flatten(self.avgpool(x), 1))


def cifar_stem(
    resnet: Callable[..., nn.Module], num_classes: int = 100, in_channels: int = 3, **options: Any
) -> nn.Module:
    """One of torchvision's ResNets or ResNeXts with a 3x3 stem of stride 1 and no max-pool, as SlimConv's Table VI has.

    Args:
        resnet: The builder, such as `torchvision.models.resnet50`.
        num_classes: Width of the classifier.
        in_channels: Channels of the images.
        **options: More arguments of `resnet`.
    """
    model = resnet(num_classes=num_classes, **options)
    model.conv1 = nn.Conv2d(in_channels, 64, 3, 1, 1, bias=False)
    nn.init.kaiming_normal_(model.conv1.weight, mode="fan_out", nonlinearity="relu")
    model.maxpool = nn.Identity()
    return model
