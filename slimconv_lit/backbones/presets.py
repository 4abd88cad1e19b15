"""Networks of SlimConv's and SCConv's tables that are another one with an operator in it: data, no code."""

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Preset:
    """A network by a name of its own.

    Attributes:
        backbone: The plain network, as in `create_backbone`.
        operator: The operator in it, as plain values.
        substitution: What `substitute` is given besides, over what the plain network has by default.
    """

    backbone: str
    operator: dict[str, Any]
    substitution: dict[str, Any] = field(default_factory=dict)


def _op(name: str, **init_args: Any) -> dict[str, Any]:
    return {"class_path": f"slimconv_lit.ops.{name}", "init_args": init_args}


def _slim(backbone: str, **init_args: Any) -> Preset:
    return Preset(backbone, _op("SlimConv2d", **init_args))


PRESETS: dict[str, Preset] = {
    # Table I. The ratio of SPConv-ResNet-50 is alpha in the table.
    "sp_resnet50": Preset("torchvision:resnet50", _op("SPConv2d", ratio="1/2")),
    "sp_resnet50_1_8": Preset("torchvision:resnet50", _op("SPConv2d", ratio="1/8")),
    "ghost_resnet50": Preset("torchvision:resnet50", _op("GhostConv2d", s=2), {"pointwise": True}),
    "sc_resnet50": _slim("torchvision:resnet50"),
    "sc_resnet50_k8_3": _slim("torchvision:resnet50", k="8/3"),
    "sc_resnet101": _slim("torchvision:resnet101"),
    "sc_resnext50_32x4d": _slim("torchvision:resnext50_32x4d"),
    "sc_resnext101_32x3d": _slim("resnext101_32x3d", k="2", bottom_groups=16),
    # Table II. The gate's width here and in Table III is what the counts show, and not the only one that fits them.
    "sc_bl_resnet50": _slim("bl_resnet50", reduction=24),
    # Table III.
    "sc_dla46_c": _slim("dla46_c", min_hidden=16),
    "sc_shufflenet_v2": _slim("torchvision:shufflenet_v2_x1_0"),
    "sc_mobilenet_v2": _slim("torchvision:mobilenet_v2", k="8/3", reduction=24, min_hidden=8),
    # Table V. The paper does not say that MobileNetV2's k is 8/3; at 4/3 it would grow.
    "sc_cifar_shufflenet_v2": _slim("cifar_shufflenet_v2"),
    "sc_cifar_mobilenet_v2": _slim("cifar_mobilenet_v2", k="8/3"),
    "sc_cifar_resnet56": _slim("cifar_resnet56", min_hidden=4),
    "sc_cifar_nasnet": _slim("cifar_nasnet"),
    # Table VI.
    "cifar_sk_net50": Preset("cifar_resnext50_32x4d", _op("SKConv2d")),
    "sc_cifar_resnet50": _slim("cifar_resnet50"),
    "sc_cifar_resnext50_32x4d": _slim("cifar_resnext50_32x4d"),
    "sc_cifar_oct_resnet50": _slim("cifar_oct_resnet50"),
    "sc_cifar_se_resnet50": _slim("cifar_se_resnet50"),
    "sc_cifar_se_resnet101": _slim("cifar_se_resnet101"),
    # Table X.
    "sc_resnet50_no_flip": _slim("torchvision:resnet50", arrangement="none"),
    "sc_resnet50_only_flip": _slim("torchvision:resnet50", arrangement="only_flip"),
    # Table XI.
    "sc_cifar_resnet50_sf": _slim("cifar_resnet50", arrangement="shuffle"),
    "sc_cifar_resnet50_3b_sf": _slim("cifar_resnet50", arrangement="shuffle_3b"),
    # SCConv's Tables 2 and 3.
    "scconv_cifar_resnet50": Preset("cifar_resnet50", _op("SCConv2d")),
    "scconv_resnet50": Preset("torchvision:resnet50", _op("SCConv2d")),
}
