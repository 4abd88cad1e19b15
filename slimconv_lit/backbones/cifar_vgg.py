"""VGG for 32x32 images, with a batch norm behind every convolution: the network that Network Slimming prunes.

Simonyan and Zisserman, "Very Deep Convolutional Networks for Large-Scale Image Recognition", ICLR 2015,
https://arxiv.org/abs/1409.1556
Liu et al., "Learning Efficient Convolutional Networks through Network Slimming", ICCV 2017,
https://arxiv.org/abs/1708.06519

All but the last of the original's fully connected layers are gone, and so are the biases in front of norms.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

STAGE_WIDTHS = (64, 128, 256, 512, 512)
# Convolutions in each of the five stages, between which a max-pool halves the map.
CONVOLUTIONS = {11: (1, 1, 2, 2, 2), 13: (2, 2, 2, 2, 2), 16: (2, 2, 3, 3, 3), 19: (2, 2, 4, 4, 4)}


class CifarVGG(nn.Module):
    """VGG-11/13/16/19 (Network Slimming, Section 4.2): (B, in_channels, H, W) -> (B, num_classes); H, W from 16 on.

    Args:
        depth: 11, 13, 16 or 19.
        num_classes: Width of the classifier.
        in_channels: Channels of the images.
        widths: Channels that each convolution writes, one number for each, as pruning leaves them; None for VGG's own.

    Raises:
        ValueError: If there is no VGG of that depth, or `widths` are not as many as its convolutions.
    """

    def __init__(
        self, depth: int = 19, num_classes: int = 100, in_channels: int = 3, widths: Sequence[int] | None = None
    ) -> None:
        super().__init__()
        if depth not in CONVOLUTIONS:
            raise ValueError(f"depth={depth}: there is none but {', '.join(map(str, CONVOLUTIONS))}")
        counts = CONVOLUTIONS[depth]
        own = [width for width, count in zip(STAGE_WIDTHS, counts, strict=True) for _ in range(count)]
        chosen = own if widths is None else list(widths)
        if len(chosen) != len(own) or min(chosen) < 1:
            raise ValueError(f"widths={chosen}: a VGG-{depth} takes {len(own)} numbers of at least 1")
        layers: list[nn.Module] = []
        channels, left = in_channels, iter(chosen)
        for stage, count in enumerate(counts):
            layers += [nn.MaxPool2d(2)] if stage else []
            for _ in range(count):
                width = next(left)
                # The norms' eps is that of the paper's code.
                layers += [nn.Conv2d(channels, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width, eps=1e-3), nn.ReLU()]
                channels = width
        self.features = nn.Sequential(*layers)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(channels, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        """Class logits; see the class."""
        return self.fc(torch.flatten(self.avgpool(self.features(x)), 1))
