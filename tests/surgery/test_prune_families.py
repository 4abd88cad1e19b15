"""Masked and pruned networks agree: own backbones and torchvision's families, plain and slim, at 30, 50 and 70 %.

Neighbours differ in everything, so that all treatments are met without meeting all of them everywhere.
"""

import copy

import pytest
import torch
import torchvision

from slimconv_lit import create_backbone, prune, slimify
from tests.backbones.families import QUICK_OWN
from tests.surgery.masking import check_pruned, randomise

RATIOS, KS = (0.3, 0.5, 0.7), (None, "4/3", "2", "8/3")

# What SlimConv can be put into; DenseNet's and SqueezeNet's spatial convolutions are all concatenated.
TORCHVISION = (
    "resnet18", "resnext50_32x4d", "densenet121", "mobilenet_v2", "mobilenet_v3_small", "efficientnet_b0",
    "regnet_y_400mf", "shufflenet_v2_x0_5", "googlenet", "inception_v3", "mnasnet0_5", "wide_resnet50_2", "vgg11_bn",
)  # fmt: skip
STREAMS = ("keep", "coupled", "select")


def treatments(names, times=1):
    """Some treatments for each network."""
    for i, name in enumerate(names):
        for j in range(i, i + times):
            yield name, KS[j % 4], RATIOS[(i + j) % 3], STREAMS[(i + j + i // 3) % 3]


def prune_and_check(model, ratio, streams, x, min_channels=4):
    randomise(model)
    original = copy.deepcopy(model)
    report = prune(model, ratio, streams=streams, min_channels=min_channels, example_input=x)
    check_pruned(original, report, x)
    return report


@pytest.mark.parametrize(("name", "k", "ratio", "streams"), [*treatments(TORCHVISION, 2)])
def test_torchvision(name, k, ratio, streams):
    torch.manual_seed(0)
    quick = {"init_weights": False} if name in ("googlenet", "inception_v3", "vgg11_bn") else {}
    # Its second head trains on large images alone, and what it reads would be left.
    quick |= {"aux_logits": False} if name == "inception_v3" else {}
    model = torchvision.models.get_model(name, num_classes=10, **quick)
    size = 96 if name == "inception_v3" else 64
    if k:
        slimify(model, k=k)
    report = prune_and_check(model, ratio, streams, torch.randn(2, 3, size, size))
    # Orbits and groups are coarse, and limits keep what is left of narrow layers.
    assert 0.8 * ratio * report.scales < report.pruned <= ratio * report.scales, report


@pytest.mark.parametrize(("name", "k", "ratio", "streams"), [*treatments(QUICK_OWN)])
def test_own(name, k, ratio, streams):
    torch.manual_seed(0)
    operator = k and {"class_path": "SlimConv2d", "init_args": {"k": k}}
    model = create_backbone(name, operator, num_classes=10)
    report = prune_and_check(model, ratio, streams, torch.randn(2, 3, 32, 32), min_channels=1)
    if name == "cifar_densenet40" and streams == "keep":
        assert report.scales == 0
    else:
        assert 0.4 * ratio * report.scales < report.pruned <= ratio * report.scales, report
