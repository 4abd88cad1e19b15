"""Wide ResNet for 32x32 images.

Zagoruyko and Komodakis, "Wide Residual Networks", BMVC 2016, https://arxiv.org/abs/1605.07146

The WRN-28-10 of SCConv's Table 2 has a bias in every convolution and the stride in a block's second one;
`biases=True, late_stride=True` brings its counts back.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional


class WideBlock(nn.Module):
    """Norm, ReLU, 3x3, twice, and a way around: (B, in_channels, H, W) -> (B, width, H / stride, W / stride)."""

    def __init__(
        self, in_channels: int, width: int, stride: int, dropout: float, biases: bool, late_stride: bool
    ) -> None:
        super().__init__()
        first, second = (1, stride) if late_stride else (stride, 1)
        self.bn1, self.conv1 = nn.BatchNorm2d(in_channels), nn.Conv2d(in_channels, width, 3, first, 1, bias=biases)
        self.bn2, self.conv2 = nn.BatchNorm2d(width), nn.Conv2d(width, width, 3, second, 1, bias=biases)
        self.dropout = nn.Dropout(dropout)
        same = stride == 1 and in_channels == width
        self.shortcut = nn.Identity() if same else nn.Conv2d(in_channels, width, 1, stride, bias=biases)

    def forward(self, x: Tensor) -> Tensor:
        """The block's output; see the class."""
        out = self.conv1(functional.relu(self.bn1(x)))
        out = self.conv2(self.dropout(functional.relu(self.bn2(out))))
        return out + self.shortcut(x)


class CifarWideResNet(nn.Module):
    """WRN-depth-widening (paper, Section 2 and Table 1): (B, in_channels, H, W) -> (B, num_classes).

    Args:
        depth: 6n + 4; n blocks in each of the three stages.
        widening: Factor of the widths 16, 32 and 64.
        num_classes: Width of the classifier.
        in_channels: Channels of the images.
        dropout: Between a block's two convolutions; 0.3 in the paper where it is used.
        biases: Whether convolutions have biases.
        late_stride: Put the stride in a block's second 3x3 instead of its first.

    Raises:
        ValueError: If `depth` is not 6n + 4.
    """

    def __init__(
        self,
        depth: int = 28,
        widening: int = 10,
        num_classes: int = 100,
        in_channels: int = 3,
        dropout: float = 0.0,
        biases: bool = False,
        late_stride: bool = False,
    ) -> None:
        super().__init__()
        if depth < 10 or depth % 6 != 4:
            below = max((depth - 4) // 6, 1) * 6 + 4
            raise ValueError(f"depth={depth} is not 6n + 4; nearest: {below} or {below + 6}")
        self.conv1 = nn.Conv2d(in_channels, 16, 3, 1, 1, bias=biases)
        channels, stages = 16, []
        for width, stride in ((16 * widening, 1), (32 * widening, 2), (64 * widening, 2)):
            blocks = []
            for i in range((depth - 4) // 6):
                blocks.append(WideBlock(channels, width, stride if i == 0 else 1, dropout, biases, late_stride))
                channels = width
            stages.append(nn.Sequential(*blocks))
        self.layer1, self.layer2, self.layer3 = stages
        self.bn, self.relu = nn.BatchNorm2d(channels), nn.ReLU()
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(channels, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Class logits; see the class."""
        x = self.layer3(self.layer2(self.layer1(self.conv1(x))))
        return self.fc(torch.flatten(self.avgpool(self.relu(self.bn(x))), 1))
