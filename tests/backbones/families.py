"""Names that the tests of backbones run over, and networks that cost nothing."""

import torch
from torch import nn

from slimconv_lit.backbones import create_backbone
from slimconv_lit.backbones.registry import OWN
from slimconv_lit.backbones.stages import WithoutWeights
from slimconv_lit.surgery.trace import shadow_of

TORCHVISION = [
    f"torchvision:{name}"
    for name in (
        "resnet50", "resnext50_32x4d", "wide_resnet50_2", "densenet121", "mobilenet_v2", "mobilenet_v3_small",
        "efficientnet_b0", "regnet_y_400mf", "shufflenet_v2_x0_5", "squeezenet1_1", "googlenet", "vgg11_bn",
        "mnasnet0_5", "convnext_tiny",
    )
]  # fmt: skip
# The first three are those whose output stride timm itself cannot change.
TIMM = [f"timm:{name}" for name in ("dla46_c", "vgg11_bn", "densenet121", "resnet50d", "ghostnet_100", "convnext_atto")]
# They do nothing that their smaller siblings do not, and NASNet has ten convolutions in each of its cells.
SLOW = (
    "cifar_resnet32", "cifar_resnet44", "cifar_resnet110", "cifar_resnet34", "cifar_resnet101", "cifar_resnet152",
    "cifar_resnext101_32x8d", "cifar_se_resnet101", "oct_resnet50", "cifar_nasnet", "cifar_vgg19", "cifar_preresnet164",
)  # fmt: skip
QUICK_OWN = [name for name in OWN if name not in SLOW]
# A dense layer reads more than k times what it writes, and what it writes is concatenated: nothing for SlimConv.
DENSE = ("cifar_densenet40", "cifar_densenet121")


def weightless(name: str, *args: object, **options: object) -> nn.Module:
    """`create_backbone`, on the meta device and in eval mode."""
    with WithoutWeights():
        model = create_backbone(name, *args, **options)
    return shadow_of(model).eval()


def images(size: int, channels: int = 3, batch: int = 1) -> torch.Tensor:
    """Images that have a shape and nothing else."""
    return torch.empty(batch, channels, size, size, device="meta")
