"""DeepLabv3+: an atrous pyramid on the last map, and a decoder that brings in a fine one.

Chen et al., "Encoder-Decoder with Atrous Separable Convolution for Semantic Image Segmentation", ECCV 2018,
https://arxiv.org/abs/1802.02611

The decoder is the one that SlimConv's Table VII counts: a single ordinary 3x3 convolution.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torchvision.models.segmentation.deeplabv3 import ASPP, ASPPPooling

from slimconv_lit.backbones import create_backbone
from slimconv_lit.ops import OperatorLike
from slimconv_lit.ops.base import norm_of_pooled, reset_convolutions

# Backbones without padding refuse images of a few pixels.
LEAST = 32


class ImagePooling(ASPPPooling):
    """torchvision's image pooling, which also trains on one image (see `norm_of_pooled`).

    Shapes: (B, in_channels, H, W) -> (B, out_channels, H, W), the same at every pixel.
    """

    def forward(self, x: Tensor) -> Tensor:
        """The pooled and projected map, at the size of `x`."""
        pool, project, norm, relu = self
        pooled = relu(norm_of_pooled(norm, project(pool(x))))
        return pooled.expand(-1, -1, *x.shape[-2:])


class DeepLabV3Plus(nn.Module):
    """Maps images (B, 3, H, W) of any size to logits (B, num_classes, H, W).

    Sides below 32 pixels are filled up with zeros on the right and at the bottom, and the logits cut to size again.

    Args:
        backbone: A network that returns feature maps, with `channels` and `strides`: `FeatureMaps`. The pyramid reads
            the last map, the decoder the one of stride 4. A network that ends at stride 4 (ResNet-56 for CIFAR) gives
            the decoder the map before.
        num_classes: Channels of the logits.
        dilations: Rates of the pyramid's three 3x3 convolutions; None for 6, 12, 18 where the last map's stride is
            16 or more, twice as much at 8 (paper, Section 4), and so on.
        width: Channels of the pyramid and of the decoder.
        low_level_width: Channels that the decoder makes of the fine map.
        dropout: Share of the pyramid's outputs that is dropped in training.

    Raises:
        ValueError: If the backbone has no map of stride 4, or no other; the message gives its strides.
    """

    def __init__(
        self,
        backbone: nn.Module,
        num_classes: int,
        dilations: Sequence[int] | None = None,
        width: int = 256,
        low_level_width: int = 48,
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        channels: list[int] = backbone.channels  # type: ignore[assignment]
        strides: list[int] = backbone.strides  # type: ignore[assignment]
        if 4 not in strides or len(strides) < 2:
            raise ValueError(
                "backbone: DeepLabv3+ reads a map of stride 4 and another; this one's strides are "
                f"{', '.join(map(str, strides))}"
            )
        self.low_level_map = min(strides.index(4), len(strides) - 2)
        low = channels[self.low_level_map]
        rates = dilations or [rate * max(1, 16 // strides[-1]) for rate in (6, 12, 18)]
        self.backbone = backbone
        self.low_level = _conv_norm_relu(low, low_level_width, 1)
        self.aspp = ASPP(channels[-1], rates, width)
        self.aspp.convs[-1] = ImagePooling(channels[-1], width)
        self.aspp.project[-1] = nn.Dropout(dropout)
        self.decoder = _conv_norm_relu(width + low_level_width, width, 3)
        self.classifier = nn.Conv2d(width, num_classes, 1)
        for part in (self.low_level, self.aspp, self.decoder):
            reset_convolutions(part)

    def forward(self, x: Tensor) -> Tensor:
        """Logits at the size of the images; see the class."""
        height, width = x.shape[-2:]
        if min(height, width) < LEAST:
            x = functional.pad(x, (0, max(0, LEAST - width), 0, max(0, LEAST - height)))
        maps = self.backbone(x)
        fine = self.low_level(maps[self.low_level_map])
        coarse = _resize(self.aspp(maps[-1]), fine)
        logits = _resize(self.classifier(self.decoder(torch.cat([fine, coarse], dim=1))), x)
        return logits[:, :, :height, :width]


def deeplab_v3plus(
    backbone: str,
    operator: OperatorLike | None = None,
    num_classes: int = 21,
    output_stride: int = 16,
    *,
    dilations: Sequence[int] | None = None,
    width: int = 256,
    low_level_width: int = 48,
    dropout: float = 0.1,
    **backbone_options: Any,
) -> DeepLabV3Plus:
    """DeepLabv3+ by the name of its backbone.

    Args:
        backbone: As in `create_backbone`.
        operator: As in `create_backbone`.
        num_classes: Channels of the logits.
        output_stride: The stride of the backbone's last map; see `dilate`.
        dilations: As in `DeepLabV3Plus`, like the next three.
        width: As in `DeepLabV3Plus`.
        low_level_width: As in `DeepLabV3Plus`.
        dropout: As in `DeepLabV3Plus`.
        **backbone_options: More arguments of `create_backbone`.

    Raises:
        ValueError: As `create_backbone` and `DeepLabV3Plus`.
    """
    maps = create_backbone(backbone, operator, features_only=True, output_stride=output_stride, **backbone_options)
    return DeepLabV3Plus(maps, num_classes, dilations, width, low_level_width, dropout)


def _conv_norm_relu(in_channels: int, width: int, kernel_size: int) -> nn.Sequential:
    conv = nn.Conv2d(in_channels, width, kernel_size, padding=kernel_size // 2, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(width), nn.ReLU(inplace=True))


def _resize(x: Tensor, like: Tensor) -> Tensor:
    return functional.interpolate(x, size=like.shape[-2:], mode="bilinear", align_corners=False)
