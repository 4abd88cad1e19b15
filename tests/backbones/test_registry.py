import functools
import gc
import weakref

import pytest
import torch
from torch import nn

from slimconv_lit.analysis import macs, params
from slimconv_lit.backbones import create_backbone, list_backbones
from slimconv_lit.backbones.registry import OWN, made_for, substitution_rule
from slimconv_lit.ops import SlimConv2d
from tests.backbones.families import DENSE, QUICK_OWN, TIMM, TORCHVISION, images, weightless

EVERY = [*OWN, *TORCHVISION, *TIMM]


@pytest.mark.parametrize("name", EVERY)
def test_maps_images_of_any_channels_to_logits(name):
    size, _ = made_for(name)
    model = weightless(name, num_classes=7, in_channels=1)
    assert model(images(size, channels=1)).shape == (1, 7)


@pytest.mark.parametrize("name", OWN)
def test_own_networks_take_other_sizes_and_train(name):
    size, classes = made_for(name)
    model = weightless(name, num_classes=classes).train()
    model(images(size + 32, batch=2)).sum().backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("name", [name for name in QUICK_OWN if name not in DENSE])
def test_an_operator_makes_own_networks_smaller(name):
    size, classes = made_for(name)
    plain = weightless(name, num_classes=classes)
    # With k = 4/3 the depthwise convolutions of light networks grow.
    smaller = weightless(name, slim(k="8/3"), num_classes=classes)
    assert smaller(images(size)).shape == (1, classes)
    assert smaller.substitution.replaced
    assert macs(smaller, size) < macs(plain, size)


def slim(**options):
    return functools.partial(SlimConv2d, **options)


# Integers of the networks behind SlimConv's tables (Tables I, III, V, VI, X; CIFAR-100 at 32x32, ImageNet at 224x224).
@pytest.mark.parametrize(
    ("name", "operator", "num_classes", "expected"),
    [
        ("cifar_resnet56", None, 100, (858_868, 125_491_456)),
        ("cifar_resnet56", slim(min_hidden=4), 100, (459_916, 66_148_096)),
        ("cifar_resnet50", None, 100, (23_705_252, 1_298_014_208)),
        ("cifar_resnet50", slim(), 100, (14_906_960, 828_855_040)),
        ("cifar_resnext50_32x4d", slim(), 100, (20_640_732, 1_210_772_480)),
        ("torchvision:resnet50", slim(k="8/3"), 1000, (12_098_388, 1_880_314_624)),
        ("torchvision:shufflenet_v2_x1_0", slim(), 1000, (2_252_880, 141_513_872)),
        ("torchvision:mobilenet_v2", slim(k="8/3", reduction=24, min_hidden=8), 1000, (3_382_732, 239_113_936)),
    ],
)
def test_integers(name, operator, num_classes, expected):
    model = weightless(name, operator, num_classes)
    assert (params(model), macs(model, made_for(name)[0])) == expected


def test_the_callers_patterns_beat_the_networks_own():
    name = "torchvision:shufflenet_v2_x1_0"
    assert substitution_rule(name) == {"exclude": "*.branch1.*"}
    assert any("branch1" in layer for layer in weightless(name, SlimConv2d, exclude=[]).substitution.replaced)
    only = weightless("cifar_resnet20", SlimConv2d, include="layer3.*", min_channels=64).substitution
    assert only.replaced == ["layer3.1.conv1", "layer3.2.conv1"]


def test_the_first_convolution_of_a_torchvision_network_reads_the_images_channels():
    model = create_backbone("torchvision:mobilenet_v2", in_channels=1, num_classes=3)
    first = next(m for m in model.modules() if isinstance(m, nn.Conv2d))
    assert first.weight.shape == (32, 1, 3, 3)
    assert (first.stride, first.padding, first.bias) == ((2, 2), (1, 1), None)


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("resnet50", "did you mean 'torchvision:resnet50' or 'timm:resnet50'?"),
        ("dla34", "did you mean 'timm:dla34'?"),
        ("cifar_resnet55", "'cifar_resnet56'"),
        ("torchvision:resnet51", "'torchvision:resnet50'"),
        ("torchvision:resnest50d", "'torchvision:resnet50'"),
        ("timm:reznet50", "'timm:resnet50'"),
        ("tv:resnet50", "before the colon goes torchvision or timm"),
        ("xyzzyq", "python -m slimconv_lit models"),
        ("", "python -m slimconv_lit models"),
    ],
)
def test_unknown_names_are_answered_with_the_nearest(name, hint):
    with pytest.raises(ValueError, match="there is no") as error:
        create_backbone(name)
    assert hint in str(error.value)
    with pytest.raises(ValueError, match="there is no"):
        made_for(name)


def test_lists_names_by_pattern():
    every = list_backbones()
    own = [name for name in every if ":" not in name]
    assert every[: len(own)] == own
    assert set(OWN) <= set(own)
    assert every.index("cifar_resnet20") < every.index("cifar_resnet110")
    assert not any(n.startswith("timm:") for n in every)
    assert "torchvision:resnet50" in list_backbones("*resnet50*")
    assert "timm:resnet50" in list_backbones("timm:resnet*")
    assert list_backbones("nothing*") == []


def test_the_same_seed_gives_the_same_weights_at_every_output_stride():
    weights = []
    for output_stride in (32, 8):
        torch.manual_seed(0)
        weights.append(create_backbone("torchvision:squeezenet1_1", output_stride=output_stride).state_dict())
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])


def test_a_rewritten_network_is_freed_with_its_last_name():
    """A cycle would keep its weights until the garbage collector comes by."""
    collects = gc.isenabled()
    gc.disable()
    try:
        model = create_backbone("cifar_resnet20", SlimConv2d, without_weights=True)
        weight = weakref.ref(model.conv1.weight)
        assert model.substitution.replaced
        del model
        assert weight() is None
    finally:
        if collects:
            gc.enable()
