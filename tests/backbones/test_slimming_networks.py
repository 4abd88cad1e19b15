"""The networks of Network Slimming's and SCConv's tables: their integers, and that they learn."""

import pytest
import torch
from torch import nn
from torch.nn import functional

from slimconv_lit.analysis import macs, params
from slimconv_lit.backbones.cifar_densenet import CifarDenseNet
from slimconv_lit.backbones.cifar_preresnet import CifarPreResNet
from slimconv_lit.backbones.cifar_resnet import CifarResNet
from slimconv_lit.backbones.cifar_vgg import CifarVGG
from slimconv_lit.backbones.cifar_wide_resnet import CifarWideResNet
from tests.backbones.families import DENSE, images, weightless
from tests.backbones.test_paper_networks import coloured

TABLE_5 = [22, 62, 83, 119, 193, 168, 85, 40, *[32] * 7, 38]
OF_SCCONV = {"biases": True, "late_stride": True}


@pytest.mark.parametrize(
    ("name", "classes", "options", "parameters", "operations"),
    [
        # Network Slimming, Table 1
        ("cifar_vgg19", 10, {}, 20_035_018, 398_136_320),
        ("cifar_vgg19", 100, {}, 20_081_188, 398_182_400),
        ("cifar_preresnet164", 10, {}, 1_703_258, 247_646_720),
        ("cifar_preresnet164", 100, {}, 1_726_388, 247_669_760),
        ("cifar_densenet40", 10, {}, 1_019_722, 264_812_928),
        ("cifar_densenet40", 100, {}, 1_060_132, 264_853_248),
        # The PyTorch code of its authors, which is not the paper's network.
        ("cifar_densenet40", 10, {"first_channels": 24}, 1_059_298, 282_917_328),
        # SCConv, Table 2
        ("cifar_resnet56", 10, {"shortcut": "B"}, 855_770, 125_747_840),
        ("cifar_wrn28_10", 100, OF_SCCONV, 36_546_980, 5_951_175_168),
        ("cifar_wrn28_10", 100, {}, 36_536_884, 5_243_386_368),
        ("cifar_densenet121", 100, {}, 7_048_548, 888_442_880),
    ],
)
def test_integers(name, classes, options, parameters, operations):
    model = weightless(name, num_classes=classes, **options)
    assert (params(model), macs(model, 32)) == (parameters, operations)


@pytest.mark.parametrize(
    ("name", "scales"), [("cifar_vgg19", 5504), ("cifar_preresnet164", 12_112), ("cifar_densenet40", 9048)]
)
def test_how_many_scales_there_are(name, scales):
    model = weightless(name)
    assert sum(m.num_features for m in model.modules() if isinstance(m, nn.BatchNorm2d)) == scales


def test_the_compact_network_of_table_5_from_its_widths():
    plain, compact = (weightless("cifar_vgg19", num_classes=10, **more) for more in ({}, {"widths": TABLE_5}))
    assert [m.out_channels for m in compact.modules() if isinstance(m, nn.Conv2d)] == TABLE_5
    assert sum(m.num_features for m in compact.modules() if isinstance(m, nn.BatchNorm2d)) == 1034
    assert params(compact) == 885_934
    assert round(100 * (1 - params(compact) / params(plain)), 2) == 95.58
    assert round(100 * (1 - macs(compact, 32) / macs(plain, 32)), 2) == 77.23


# (network, classes, options of the network, options of the substitution, convolutions replaced, params)
SC_CONV = [
    ("cifar_resnet50", 100, {}, {}, 16, 14_686_996),
    ("cifar_resnet56", 100, {"shortcut": "B"}, {"include": "*.conv2"}, 27, 519_152),
    # In front of its norm the reference has 21,110,020; the norm that the operator brings along makes the 21.12 M.
    ("cifar_wrn28_10", 100, OF_SCCONV, {"include": "*.conv2"}, 12, 21_118_980),
    ("cifar_densenet121", 100, {}, {}, 58, 5_500_644),
]


@pytest.mark.parametrize(("name", "classes", "options", "rule", "replaced", "parameters"), SC_CONV)
def test_scconv_has_the_parameters_of_eq_11(name, classes, options, rule, replaced, parameters):
    model = weightless(name, "SCConv2d", classes, **options, **rule)
    assert len(model.substitution.replaced) == replaced
    assert params(model) == parameters


@pytest.mark.parametrize(
    ("name", "init_args", "parameters"),
    [
        ("torchvision:resnet50", {}, 16_538_776),
        ("torchvision:resnet50", {"variant": "tables_1_3"}, 16_777_384),
        ("torchvision:resnet50", {"variant": "tables_1_3", "alpha": "3/4"}, 17_681_192),
        ("torchvision:resnet101", {"variant": "tables_1_3"}, 27_996_840),
        ("cifar_resnet50", {"variant": "tables_1_3"}, 14_741_194 + 90 * 2049),
    ],
)
def test_what_scconvs_tables_1_and_3_count(name, init_args, parameters):
    model = weightless(name, {"class_path": "SCConv2d", "init_args": init_args}, 100 if "cifar" in name else 1000)
    assert params(model) == parameters


@pytest.mark.parametrize("name", DENSE)
def test_slimconv_leaves_dense_networks_alone_with_the_reason(name):
    report = weightless(name, "SlimConv2d").substitution
    assert report.replaced == []
    reasons = [why for why in report.left.values() if "min_channels" not in why]
    assert len(reasons) > 30
    assert all("would write" in why or "concatenated" in why for why in reasons)


@pytest.mark.parametrize("name", ["cifar_preresnet20", "cifar_densenet40"])
def test_a_selection_has_its_place_behind_every_norm_of_the_stream(name):
    """What it lets through is all that the convolution, or the classifier, behind it reads."""
    model = weightless(name, num_classes=10)
    places = {n: m for n, m in model.named_modules() if n.rpartition(".")[2] == "select"}
    seen = {}
    for place, module in places.items():
        module.register_forward_hook(lambda m, args, out, place=place: seen.update({place: out.shape[1]}))
    model(images(32))
    norms = {"cifar_preresnet20": "bn1", "cifar_densenet40": "bn"}
    for place, width in seen.items():
        parent = place.rpartition(".")[0]
        norm = model.get_submodule(f"{parent}.{norms[name]}" if parent else "bn")
        assert norm.num_features == width
    convolutions = [n for n, m in model.named_modules() if n.endswith(".conv" if "dense" in name else ".conv1")]
    assert len(seen) == len(places) == len(convolutions) + 1


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: CifarVGG(12), ["depth=12", "11, 13, 16, 19"]),
        (lambda: CifarVGG(11, widths=[64] * 7), ["64, 64", "VGG-11 takes 8 numbers"]),
        (lambda: CifarVGG(11, widths=[64] * 7 + [0]), ["at least 1"]),
        (lambda: CifarPreResNet(56 + 1), ["depth=57", "56 or 65"]),
        (lambda: CifarPreResNet(2), ["depth=2", "11 or 20"]),
        (lambda: CifarDenseNet(41), ["depth=41", "40 or 43"]),
        (lambda: CifarWideResNet(29), ["depth=29", "28 or 34"]),
        (lambda: CifarResNet(20, shortcut="C"), ["shortcut='C'", "'A'"]),
    ],
)
def test_bad_arguments_are_named_with_a_way_out(build, words):
    with pytest.raises(ValueError) as error:  # noqa: PT011 - the words are checked one by one
        build()
    for word in words:
        assert word in str(error.value)


SMALL = {
    "vgg": lambda: CifarVGG(11, 4, widths=[16, 16, *[32] * 6]),
    "preresnet": lambda: CifarPreResNet(11, 4),
    "densenet": lambda: CifarDenseNet(10, 4),
    "wide": lambda: CifarWideResNet(10, 2, 4, dropout=0.3, **OF_SCCONV),
    "resnet B": lambda: CifarResNet(8, 4, shortcut="B"),
}


@pytest.mark.parametrize("name", SMALL)
def test_one_epoch_lowers_the_loss(name):
    torch.manual_seed(0)
    model = SMALL[name]().train()
    x, labels = coloured(256, 16, seed=0)
    held_out, wanted = coloured(64, 16, seed=1)

    def loss():
        with torch.no_grad():
            return functional.cross_entropy(model(held_out), wanted).item()

    before = loss()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9, nesterov=True)
    for batch, targets in zip(x.split(32), labels.split(32), strict=True):
        optimizer.zero_grad()
        functional.cross_entropy(model(batch), targets).backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
        optimizer.step()
    assert loss() < 0.8 * before
