"""What to do with a backbone's batch norms where batches are too small for them: freeze them, or put others in."""

from typing import Any, Literal, get_args

from torch import nn

from slimconv_lit.backbones.features import FeatureMaps
from slimconv_lit.backbones.stages import IMAGE, watch
from slimconv_lit.lookup import closest

Freeze = Literal["stem", "norms", "none"]
Norm = Literal["batch", "group"]


def freeze_backbone(maps: FeatureMaps, what: Freeze) -> None:
    """Takes parts of a backbone out of training, in place.

    Frozen norms are torchvision's `FrozenBatchNorm2d` (timm's, where a norm brings its activation along): affine maps
    without parameters, with the names that batch norms have in state dicts.

    Args:
        maps: The backbone.
        what: "norms": all batch norms, those of operators too. "stem": also every parameter behind the map of stride 4
            (of a ResNet conv1 and layer1), or behind the first map if that is coarser. "none": nothing.

    Raises:
        ValueError: If `what` is none of these.
    """
    if what not in get_args(Freeze):
        raise ValueError(f"freeze={what!r}; {closest(str(what), get_args(Freeze))}")
    if what == "none":
        return
    if what == "stem":
        for parameter in maps.parameters_before(4 if 4 in maps.strides else maps.strides[0]):
            parameter.requires_grad_(False)
    # Slow to import; only here is it needed.
    import timm.layers

    layers: Any = timm.layers
    layers.freeze_batch_norm_2d(maps)


def use_group_norms(maps: FeatureMaps) -> None:
    """Puts group norms (Wu and He, ECCV 2018) in the place of a backbone's batch norms, those of operators too.

    There are as many groups, up to 32, as divide the channels and have at least two each; for 43 channels that is one.
    A norm on a pooled map goes without: group norm would take away all that a few numbers say, and gates such as
    squeeze-and-excitation's have none. It is for training from scratch: weights are made for the norms they had.
    """
    pooled = {call.name for call in watch(maps) if call.input_stride == IMAGE}
    norms = [(name, module) for name, module in maps.named_modules() if isinstance(module, nn.BatchNorm2d)]
    for name, norm in norms:
        other: nn.Module = nn.Identity()
        if name not in pooled:
            width = norm.num_features
            groups = max(g for g in range(1, 33) if width % g == 0 and (g == 1 or g < width))
            other = nn.GroupNorm(groups, width, norm.eps, affine=False)
            # As the network drew them: the last norms of a residual block often start at zero.
            other.weight, other.bias = norm.weight, norm.bias
        # timm's norms have dropout and activation inside.
        inside = [part for part in (getattr(norm, "drop", None), getattr(norm, "act", None)) if part is not None]
        maps.set_submodule(name, nn.Sequential(other, *inside) if inside else other)
