"""DLA-46-C: timm's, and on request with the layer that the published one runs in vain.

Yu et al., "Deep Layer Aggregation", CVPR 2018, https://arxiv.org/abs/1707.06484
"""

from torch import nn


def dla46_c(num_classes: int = 1000, in_channels: int = 3, *, unused_layers: bool = False) -> nn.Module:
    """DLA-46-C: (B, in_channels, H, W) -> (B, num_classes).

    Args:
        num_classes: Width of the classifier.
        in_channels: Channels of the images.
        unused_layers: Also project what the fourth level reads, 8,448 parameters whose output nothing reads.
            SlimConv's Table III counts them; timm leaves them out.
    """
    # Slow to import; only here is it needed.
    import timm

    model = timm.create_model("dla46_c", num_classes=num_classes, in_chans=in_channels)
    if unused_layers:
        model.get_submodule("level4").project = nn.Sequential(nn.Conv2d(64, 128, 1, bias=False), nn.BatchNorm2d(128))
    return model
