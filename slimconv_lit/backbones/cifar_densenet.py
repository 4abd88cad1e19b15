"""DenseNets for 32x32 images.

Huang et al., "Densely Connected Convolutional Networks", CVPR 2017, https://arxiv.org/abs/1608.06993

`CifarDenseNet` is the paper's own without bottlenecks and compression (Section 4.2), which Network Slimming (ICCV
2017) prunes: a layer reads all that was written before it, so what it does not need is left out behind its norm, at
`select`, where a channel selection has its place. In the plain network nothing stands there.
`cifar_densenet121` is the ImageNet network with a stem that keeps the image size.
"""

import torch
import torchvision
from torch import Tensor, nn


class DenseLayer(nn.Module):
    """Norm, activation, 3x3, put behind what was read: (B, C, H, W) -> (B, C + growth, H, W)."""

    def __init__(self, in_channels: int, growth: int) -> None:
        super().__init__()
        self.bn, self.select, self.relu = nn.BatchNorm2d(in_channels), nn.Identity(), nn.ReLU()
        self.conv = nn.Conv2d(in_channels, growth, 3, 1, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """The longer map; see the class."""
        return torch.cat([x, self.conv(self.relu(self.select(self.bn(x))))], dim=1)


class Transition(nn.Module):
    """Norm, activation, 1x1 and an average over 2x2: (B, C, H, W) -> (B, C, H / 2, W / 2)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.bn, self.select, self.relu = nn.BatchNorm2d(channels), nn.Identity(), nn.ReLU()
        self.conv, self.pool = nn.Conv2d(channels, channels, 1, bias=False), nn.AvgPool2d(2)

    def forward(self, x: Tensor) -> Tensor:
        """The smaller map; see the class."""
        return self.pool(self.conv(self.relu(self.select(self.bn(x)))))


class CifarDenseNet(nn.Module):
    """DenseNet-40 and its like (paper, Section 4.2): (B, in_channels, H, W) -> (B, num_classes).

    Args:
        depth: Layers with weights, 3n + 4; n in each of the three dense blocks.
        num_classes: Width of the classifier.
        in_channels: Channels of the images.
        growth: Channels that each layer adds.
        first_channels: Channels that the stem writes; 16 in the paper and in Network Slimming's tables, while the
            PyTorch code of Network Slimming has 24.

    Raises:
        ValueError: If `depth` is not 3n + 4.
    """

    def __init__(
        self,
        depth: int = 40,
        num_classes: int = 100,
        in_channels: int = 3,
        growth: int = 12,
        first_channels: int = 16,
    ) -> None:
        super().__init__()
        if depth < 7 or depth % 3 != 1:
            below = max((depth - 4) // 3, 1) * 3 + 4
            raise ValueError(f"depth={depth} is not 3n + 4; nearest: {below} or {below + 3}")
        channels = first_channels
        self.conv1 = nn.Conv2d(in_channels, channels, 3, 1, 1, bias=False)
        stages: list[nn.Module] = []
        for stage in range(3):
            stages += [Transition(channels)] if stage else []
            for _ in range((depth - 4) // 3):
                stages.append(DenseLayer(channels, growth))
                channels += growth
        self.features = nn.Sequential(*stages)
        self.bn, self.select, self.relu = nn.BatchNorm2d(channels), nn.Identity(), nn.ReLU()
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(channels, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        """Class logits; see the class."""
        x = self.relu(self.select(self.bn(self.features(self.conv1(x)))))
        return self.fc(torch.flatten(self.avgpool(x), 1))


def cifar_densenet121(num_classes: int = 100, in_channels: int = 3) -> nn.Module:
    """DenseNet-121, torchvision's, behind a single 3x3 of stride 1, as SCConv's Table 2 counts it.

    Args:
        num_classes: Width of the classifier.
        in_channels: Channels of the images.
    """
    model = torchvision.models.densenet121(num_classes=num_classes)
    model.features.conv0 = nn.Conv2d(in_channels, 64, 3, 1, 1, bias=False)
    nn.init.kaiming_normal_(model.features.conv0.weight)
    # The first layer of the first block norms and activates what the stem writes.
    for name in ("norm0", "relu0", "pool0"):
        setattr(model.features, name, nn.Identity())
    return model
