"""A backbone's feature maps in the place of its logits, by one rule for all families (`stages.stage_ends`)."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from torchvision.models.feature_extraction import create_feature_extractor

from slimconv_lit.backbones.dilation import DilatedPool2d, PaddedConv2d
from slimconv_lit.ops import operator_classes


class FeatureMaps(nn.Module):
    """Maps images (B, C, H, W) to a list of (B, channels[i], H / strides[i], W / strides[i]), the finest first.

    Args:
        net: The network without its head, from `without_head`. Its parameters have the names that they have in the
            whole network, so `maps.net.load_state_dict(weights, strict=False)` takes a classifier's weights.
        channels: Width of each map.
        strides: Image pixels per pixel of each map.
    """

    def __init__(self, net: nn.Module, channels: list[int], strides: list[int]) -> None:
        super().__init__()
        self.net = net
        self.channels = channels
        self.strides = strides

    def forward(self, x: Tensor) -> list[Tensor]:
        """The feature maps; see the class."""
        return list(self.net(x).values())


def without_head(model: nn.Module, ends: Sequence[str]) -> nn.Module:
    """The part of `model` that makes the outputs of the modules `ends`; it returns them in a dict under these names.

    Raises:
        ValueError: If torch.fx cannot follow the forward pass.
    """
    # Slow to import; only here is it needed by networks that are not timm's.
    import timm.layers

    fx: Any = timm.layers
    leaves = [PaddedConv2d, DilatedPool2d, *operator_classes().values(), *fx.get_notrace_modules()]
    tracer = {"leaf_modules": leaves, "autowrap_functions": fx.get_notrace_functions()}
    try:
        return create_feature_extractor(model, list(ends), tracer_kwargs=tracer, suppress_diff_warning=True)
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"features_only: the forward pass cannot be followed: {reason}") from error
