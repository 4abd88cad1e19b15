"""Backbones by name: our own, `torchvision:NAME` and `timm:NAME`."""

import difflib
import re
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import cache, partial
from typing import Any, TypeAlias

import torchvision
from torch import nn

from slimconv_lit.backbones.bl_resnet import BLResNet
from slimconv_lit.backbones.cifar_densenet import CifarDenseNet, cifar_densenet121
from slimconv_lit.backbones.cifar_mobilenet_v2 import CifarMobileNetV2
from slimconv_lit.backbones.cifar_preresnet import CifarPreResNet
from slimconv_lit.backbones.cifar_resnet import CifarResNet, cifar_stem
from slimconv_lit.backbones.cifar_se_resnet import CifarSEResNet
from slimconv_lit.backbones.cifar_shufflenet_v2 import CifarShuffleNetV2
from slimconv_lit.backbones.cifar_vgg import CifarVGG
from slimconv_lit.backbones.cifar_wide_resnet import CifarWideResNet
from slimconv_lit.backbones.dilation import dilate
from slimconv_lit.backbones.dla import dla46_c
from slimconv_lit.backbones.features import FeatureMaps, without_head
from slimconv_lit.backbones.nasnet import CifarNASNet
from slimconv_lit.backbones.oct_resnet import OctResNet
from slimconv_lit.backbones.presets import PRESETS
from slimconv_lit.backbones.resnext import resnext101_32x3d
from slimconv_lit.backbones.stages import WithoutWeights, stage_ends, watch
from slimconv_lit.ops import OperatorLike
from slimconv_lit.surgery import Substitution, substitute

Patterns: TypeAlias = str | Sequence[str] | None


@dataclass(frozen=True)
class Backbone:
    """A network of our own.

    Attributes:
        build: Called as `build(num_classes=..., in_channels=..., **options)`.
        input_size: Height and width in pixels of the images that it was made for.
        num_classes: Classes of the data set that it was made for.
        substitution: What `substitute` is given with an operator, unless the caller says otherwise.
        no_dilation: Why the network has no other output stride than its own, if that is so.
    """

    build: Callable[..., nn.Module]
    input_size: int = 224
    num_classes: int = 1000
    substitution: dict[str, Any] = field(default_factory=dict)
    no_dilation: str = ""


LOW_MAPS = "its low maps have half the resolution of the high ones, at every stride"
CIFAR_STEM = ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152", "resnext50_32x4d", "resnext101_32x8d")

OWN: dict[str, Backbone] = {
    # Their first stage is 16 wide, below what `substitute` takes for a stem; the real stem reads the image.
    **{
        f"cifar_resnet{depth}": Backbone(partial(CifarResNet, depth), 32, 100, {"min_channels": 16})
        for depth in (20, 32, 44, 56, 110)
    },
    **{
        f"cifar_{name}": Backbone(partial(cifar_stem, getattr(torchvision.models, name)), 32, 100)
        for name in CIFAR_STEM
    },
    # What Network Slimming prunes.
    "cifar_vgg16": Backbone(partial(CifarVGG, 16), 32, 100),
    "cifar_vgg19": Backbone(partial(CifarVGG, 19), 32, 100),
    "cifar_preresnet20": Backbone(partial(CifarPreResNet, 20), 32, 100, {"min_channels": 16}),
    "cifar_preresnet164": Backbone(partial(CifarPreResNet, 164), 32, 100, {"min_channels": 16}),
    "cifar_densenet40": Backbone(partial(CifarDenseNet, 40), 32, 100),
    # SCConv's Table 2.
    "cifar_densenet121": Backbone(cifar_densenet121, 32, 100),
    "cifar_wrn28_10": Backbone(partial(CifarWideResNet, 28, 10), 32, 100),
    "cifar_mobilenet_v2": Backbone(CifarMobileNetV2, 32, 100),
    # Table V has SlimConv in the units without stride only.
    "cifar_shufflenet_v2": Backbone(CifarShuffleNetV2, 32, 100, {"exclude": "stage?.0.*"}),
    "cifar_nasnet": Backbone(CifarNASNet, 32, 100),
    "cifar_se_resnet50": Backbone(partial(CifarSEResNet, (3, 4, 6, 3)), 32, 100),
    "cifar_se_resnet101": Backbone(partial(CifarSEResNet, (3, 4, 23, 3)), 32, 100),
    # Table VI says alpha = 0.5; its counts are those of 0.25.
    "cifar_oct_resnet50": Backbone(
        partial(OctResNet, (3, 4, 6, 3), cifar=True, alpha=0.25), 32, 100, no_dilation=LOW_MAPS
    ),
    "oct_resnet50": Backbone(partial(OctResNet, (3, 4, 6, 3)), no_dilation=LOW_MAPS),
    # The stem's 3x3 convolutions stay as they are in Table II.
    "bl_resnet50": Backbone(
        partial(BLResNet, (3, 4, 6, 3)),
        substitution={"exclude": "stem.*"},
        no_dilation="what its big branches write is scaled up, so that finer ones would make another network",
    ),
    "dla46_c": Backbone(dla46_c),
    "resnext101_32x3d": Backbone(resnext101_32x3d),
}

# As `Backbone.substitution`, for the networks of libraries.
LIBRARY_SUBSTITUTION: dict[str, dict[str, Any]] = {
    # SlimConv's Table III leaves the shortcut branch of the units with stride alone.
    "torchvision:shufflenet_v2_*": {"exclude": "*.branch1.*"},
}

# Classifiers beside the network's own would make its output in training a tuple.
TORCHVISION_OPTIONS: dict[str, dict[str, Any]] = {
    "googlenet": {"aux_logits": False, "init_weights": True},
    "inception_v3": {"aux_logits": False, "init_weights": True},
}


def create_backbone(
    name: str,
    operator: OperatorLike | None = None,
    num_classes: int = 1000,
    in_channels: int = 3,
    *,
    features_only: bool = False,
    output_stride: int = 32,
    include: Patterns = None,
    exclude: Patterns = None,
    min_channels: int | None = None,
    pointwise: bool | None = None,
    without_weights: bool = False,
    **options: Any,
) -> nn.Module:
    """A network by name, with an operator in the place of its spatial convolutions.

    Args:
        name: One of `list_backbones()`: a network of our own ("cifar_resnet56"), "torchvision:resnet50" or
            "timm:resnet50d". Some names have an operator in them ("sc_resnet50", see `PRESETS`).
        operator: What `substitute` takes; None leaves the network plain, or with the operator that its name has in it,
            in the place of which any other is put. What was done is in `model.substitution`.
        num_classes: Width of the classifier. With `features_only` there is none.
        in_channels: Channels of the images. A network of torchvision's gets a new first convolution if it is not 3.
        features_only: Return the network without its head: it maps images to the list of its feature maps, the last
            one at each stride, and has `channels` and `strides`; see `FeatureMaps`.
        output_stride: The largest stride of a map before the head: 8, 16, or 32 for the network as it is; see `dilate`.
        include: As in `substitute`; None for the network's own rule.
        exclude: As in `substitute`; None for the network's own rule.
        min_channels: As in `substitute`; None for the network's own rule.
        pointwise: As in `substitute`; None for the network's own rule.
        without_weights: Build on the meta device, in no time and no memory: enough to count and to look at shapes.
        **options: More arguments of the network's builder, such as weights="DEFAULT" (torchvision) or
            pretrained=True (timm). Pre-trained weights go with the builder's own num_classes.

    Returns:
        A module that maps (B, in_channels, H, W) to (B, num_classes), or to a list of feature maps.

    Raises:
        ValueError: If there is no such network (the message gives the nearest names), if it cannot be rewritten to
            `output_stride` or cut before its head (the message says why), and as `substitute`.
    """
    rule = substitution_rule(name)
    if name in PRESETS:
        preset, name = PRESETS[name], PRESETS[name].backbone
        # The rule of a preset is its operator's.
        rule = rule if operator is None else substitution_rule(name)
        operator = operator or preset.operator
    if name in OWN and OWN[name].no_dilation and output_stride < 32:
        raise ValueError(f"output_stride={output_stride}: {name} has none but its own, 32: {OWN[name].no_dilation}")
    classes = {} if features_only else {"num_classes": num_classes}
    with WithoutWeights() if without_weights else nullcontext():
        model = _build(name, in_channels, **classes, **options)
    ends = stage_ends(watch(model)) if features_only else {}
    dilate(model, output_stride)
    # Of the stages that now share a stride, the last.
    kept = {min(stride, output_stride): end for stride, end in ends.items()}
    if features_only:
        model = without_head(model, [end.name for end in kept.values()])
    report = None
    if operator is not None:
        asked = {"include": include, "exclude": exclude, "min_channels": min_channels, "pointwise": pointwise}
        rule = rule | {key: value for key, value in asked.items() if value is not None}
        # After the cut, so that the maps that a head will read are outputs, and keep their width.
        report = substitute(model, operator, **rule)
    if features_only:
        model = FeatureMaps(model, [end.output[1] for end in kept.values()], list(kept))
    if report is not None:
        # Not the report itself: the network and it would keep each other in memory.
        model.substitution = Substitution(report.rows, report.operators, report.params)  # type: ignore[assignment]
    return model


def list_backbones(pattern: str = "*") -> list[str]:
    """Names of backbones that match a pattern (`fnmatch`), sorted, our own first.

    timm has more than a thousand: they are listed only if the pattern begins with "timm:". torchvision's transformers
    are left out, for they have no convolutions to rewrite.
    """
    names = _timm_names() if pattern.startswith("timm:") else [*_own_names(), *_torchvision_names()]
    return [name for name in names if fnmatchcase(name, pattern)]


def substitution_rule(name: str) -> dict[str, Any]:
    """What `substitute` gets for the network `name` by default: include, exclude, min_channels, pointwise."""
    if name in PRESETS:
        return substitution_rule(PRESETS[name].backbone) | PRESETS[name].substitution
    if name in OWN:
        return OWN[name].substitution
    return next((rule for pattern, rule in LIBRARY_SUBSTITUTION.items() if fnmatchcase(name, pattern)), {})


def made_for(name: str) -> tuple[int, int]:
    """The images that the network `name` was made for: their height and width in pixels, and their classes.

    For a library's network that is the size of its default weights, and ImageNet's 1,000 classes.

    Raises:
        ValueError: If there is no such network; the message gives the nearest names.
    """
    if name in PRESETS:
        return made_for(PRESETS[name].backbone)
    if name in OWN:
        return OWN[name].input_size, OWN[name].num_classes
    library, _, bare = name.rpartition(":")
    if library == "torchvision" and bare in _torchvision_models():
        # `transforms` is a partial; no other attribute of the weights tells the size.
        transforms: Any = torchvision.models.get_model_weights(bare).DEFAULT.transforms
        return int(transforms.keywords["crop_size"]), 1000
    if library == "timm":
        import timm

        if timm.is_model(bare):
            config = timm.get_pretrained_cfg(bare)
            return int(config.input_size[-1]) if config else 224, 1000
    raise ValueError(unknown_backbone(name))


def unknown_backbone(name: str) -> str:
    """The message of an error about a network that does not exist, with the nearest names, of every library."""
    library, _, bare = name.rpartition(":")
    known = [full for full in [*_own_names(), *_torchvision_names(), *_timm_names()] if full.startswith(library)]
    bares = {full.rpartition(":")[2] for full in known}
    near = [bare] if bare in bares else difflib.get_close_matches(bare, sorted(bares), n=3, cutoff=0.6)
    found = [full for close in near for full in known if full.rpartition(":")[2] == close]
    if library not in ("", "torchvision", "timm"):
        hint = "before the colon goes torchvision or timm"
    elif found:
        hint = f"did you mean {' or '.join(map(repr, found))}?"
    else:
        hint = "`python -m slimconv_lit models` lists them"
    return f"backbone: there is no {name!r}; {hint}"


def _build(name: str, in_channels: int, **options: Any) -> nn.Module:
    library, _, bare = name.rpartition(":")
    if name in OWN:
        return OWN[name].build(in_channels=in_channels, **options)
    if library == "torchvision" and bare in _torchvision_models():
        # Weights bring their own settings for these.
        defaults = {} if options.get("weights") else TORCHVISION_OPTIONS.get(bare, {})
        model = torchvision.models.get_model(bare, **(defaults | options))
        if in_channels != 3:
            _read_channels(model, in_channels)
        return model
    if library == "timm":
        import timm

        if timm.is_model(bare):
            return timm.create_model(bare, in_chans=in_channels, **options)
    raise ValueError(unknown_backbone(name))


def _read_channels(model: nn.Module, in_channels: int) -> None:
    name, old = next((name, m) for name, m in model.named_modules() if isinstance(m, nn.Conv2d))
    arguments = (old.kernel_size, old.stride, old.padding, old.dilation, old.groups, old.bias is not None)
    new = nn.Conv2d(in_channels, old.out_channels, *arguments)  # type: ignore[arg-type]
    nn.init.kaiming_normal_(new.weight, mode="fan_out", nonlinearity="relu")
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, new)


def _natural(names: Iterable[str]) -> list[str]:
    """Sorted with numbers as numbers: resnet18 before resnet101."""
    return sorted(names, key=lambda name: re.sub(r"\d+", lambda number: number[0].zfill(9), name))


def _own_names() -> list[str]:
    return _natural([*OWN, *PRESETS])


@cache
def _torchvision_models() -> frozenset[str]:
    return frozenset(torchvision.models.list_models(module=torchvision.models))


@cache
def _torchvision_names() -> list[str]:
    transformers = ("vit_", "swin_", "maxvit")
    return _natural(f"torchvision:{name}" for name in _torchvision_models() if not name.startswith(transformers))


@cache
def _timm_names() -> list[str]:
    import timm

    return _natural(f"timm:{name}" for name in timm.list_models())
