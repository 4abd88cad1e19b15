"""ResNeXt-101 32x3d: torchvision's blocks, as many of them as SlimConv's largest network has.

Xie et al., "Aggregated Residual Transformations for Deep Neural Networks", CVPR 2017, https://arxiv.org/abs/1611.05431
"""

from torch import nn
from torchvision.models.resnet import Bottleneck, ResNet


def resnext101_32x3d(num_classes: int = 1000, in_channels: int = 3) -> nn.Module:
    """The plain network under Sc-ResNeXt-101 (32x3d, k=2): (B, in_channels, H, W) -> (B, num_classes).

    4, 8, 18 and 3 blocks where ResNeXt-101 32x4d has 3, 4, 23 and 3, which the counts of Table I show.

    Args:
        num_classes: Width of the classifier.
        in_channels: Channels of the images.
    """
    model = ResNet(Bottleneck, [4, 8, 18, 3], num_classes, groups=32, width_per_group=3)
    if in_channels != 3:
        model.conv1 = nn.Conv2d(in_channels, 64, 7, 2, 3, bias=False)
        nn.init.kaiming_normal_(model.conv1.weight, mode="fan_out", nonlinearity="relu")
    return model
