"""The networks of SlimConv's tables: their integers, what is in them, and that every slim one learns."""

import pytest
import torch
from torch import nn
from torch.nn import functional

from slimconv_lit.analysis import macs, params
from slimconv_lit.backbones import create_backbone, list_backbones
from slimconv_lit.backbones.oct_resnet import OctResNet
from slimconv_lit.backbones.presets import PRESETS
from slimconv_lit.backbones.registry import made_for, substitution_rule
from slimconv_lit.ops import GhostConv2d, HighLowConv2d, SKConv2d, SlimConv2d, SPConv2d
from tests.backbones.families import images, weightless

# (name, options, params, macs), at the size and with the classes that the network was made for.
ROWS = [
    # Tables I and X
    ("torchvision:resnet50", {}, 25_557_032, 4_089_184_256),
    ("timm:seresnet50", {}, 28_088_024, 4_091_699_200),
    ("sp_resnet50", {}, 18_345_448, 2_907_439_104),
    ("sp_resnet50_1_8", {}, 16_223_464, 2_560_622_592),
    ("ghost_resnet50", {}, 13_953_512, 2_151_023_360),
    ("sc_resnet50", {}, 16_758_740, 2_652_222_208),
    ("sc_resnet50_no_flip", {}, 16_758_740, 2_652_222_208),
    ("sc_resnet50_only_flip", {}, 16_758_740, 2_652_222_208),
    ("sc_resnet50_k8_3", {}, 12_098_388, 1_880_314_624),
    ("torchvision:resnet101", {}, 44_549_160, 7_801_405_440),
    ("torchvision:densenet161", {}, 28_681_000, 7_727_907_072),
    ("timm:seresnet101", {}, 49_326_872, 7_806_148_608),
    ("sc_resnet101", {}, 27_956_708, 4_822_303_488),
    ("torchvision:resnext50_32x4d", {}, 25_028_904, 4_230_479_872),
    ("timm:seresnext50_32x4d", {}, 27_559_896, 4_232_994_816),
    ("sc_resnext50_32x4d", {}, 22_492_512, 3_821_358_080),
    ("timm:resnext101_32x4d", {}, 44_177_704, 7_969_996_800),
    ("timm:seresnext101_32x4d", {}, 48_955_416, 7_974_739_968),
    ("sc_resnext101_32x3d", {}, 23_698_976, 4_580_553_984),
    # Table II
    ("bl_resnet50", {}, 26_694_568, 2_856_058_880),
    ("oct_resnet50", {}, 25_557_032, 2_367_143_936),
    ("sc_bl_resnet50", {}, 17_768_834, 2_163_933_504),
    # Table III
    ("torchvision:squeezenet1_1", {}, 1_235_496, 349_151_936),
    ("torchvision:squeezenet1_0", {}, 1_248_424, 818_924_576),
    ("dla46_c", {"unused_layers": True}, 1_309_848, 575_875_072),
    ("sc_dla46_c", {"unused_layers": True}, 970_584, 483_172_352),
    ("torchvision:shufflenet_v2_x1_0", {}, 2_278_604, 144_907_992),
    ("sc_shufflenet_v2", {}, 2_252_880, 141_513_872),
    ("torchvision:mobilenet_v2", {}, 3_504_872, 300_774_272),
    ("sc_mobilenet_v2", {}, 3_382_732, 239_113_936),
    # Table V
    ("cifar_shufflenet_v2", {}, 1_356_104, 45_094_272),
    ("sc_cifar_shufflenet_v2", {}, 1_335_686, 43_430_740),
    ("cifar_mobilenet_v2", {}, 2_412_212, 91_270_144),
    ("sc_cifar_mobilenet_v2", {}, 2_193_252, 71_847_296),
    ("cifar_resnet56", {}, 858_868, 125_491_456),
    ("sc_cifar_resnet56", {}, 459_916, 66_148_096),
    ("cifar_nasnet", {"unused_layers": True}, 5_221_624, 657_224_832),
    ("sc_cifar_nasnet", {"unused_layers": True}, 5_047_768, 613_792_960),
    # Tables VI and XI
    ("cifar_resnet50", {}, 23_705_252, 1_298_014_208),
    ("sc_cifar_resnet50", {}, 14_906_960, 828_855_040),
    ("sc_cifar_resnet50_sf", {}, 14_906_960, 828_855_040),
    ("sc_cifar_resnet50_3b_sf", {}, 17_032_720, 946_819_840),
    ("cifar_oct_resnet50", {}, 23_705_252, 927_211_520),
    ("cifar_oct_resnet50", {"alpha": 0.5}, 23_705_252, 659_431_424),
    ("sc_cifar_oct_resnet50", {}, 20_036_324, 867_999_744),
    ("cifar_sk_net50", {}, 28_157_444, 1_554_886_656),
    ("sc_cifar_resnext50_32x4d", {}, 20_640_732, 1_210_772_480),
    ("cifar_se_resnet50", {"stage4_width": 516}, 26_503_135, 1_304_171_936),
    ("sc_cifar_se_resnet50", {"stage4_width": 516}, 17_614_328, 833_643_856),
    ("cifar_se_resnet101", {"stage4_width": 516}, 47_768_095, 2_518_554_016),
    ("sc_cifar_se_resnet101", {"stage4_width": 516}, 31_080_776, 1_544_516_944),
]
# By default no layer is there in vain, and no stage is 516 wide.
BY_DEFAULT = [
    ("dla46_c", 1_309_848 - 8_448),
    ("sc_dla46_c", 970_584 - 8_448),
    ("cifar_nasnet", 5_221_624 - 887_568),
    ("sc_cifar_nasnet", 5_047_768 - 887_568),
    ("cifar_se_resnet50", 26_262_804),
    ("sc_cifar_se_resnet50", 17_460_736),
    ("cifar_se_resnet101", 47_527_764),
    ("sc_cifar_se_resnet101", 30_927_184),
]
FIGURE_8 = {
    "4/3": (14_906_960, 828_855_040),
    "2": (11_561_690, 645_713_072),
    "8/3": (10_246_608, 576_803_584),
    "10/3": (9_515_271, 534_980_464),
    "4": (9_079_622, 512_310_448),
    "14/3": (8_798_126, 497_907_248),
    "16/3": (8_609_024, 488_624_896),
}


@pytest.mark.parametrize(("name", "options", "parameters", "operations"), ROWS)
def test_integers(name, options, parameters, operations):
    size, classes = made_for(name)
    model = weightless(name, num_classes=classes, **options)
    assert (params(model), macs(model, size if ":" not in name else 224)) == (parameters, operations)


@pytest.mark.parametrize(("name", "parameters"), BY_DEFAULT)
def test_integers_by_default(name, parameters):
    assert params(weightless(name, num_classes=made_for(name)[1])) == parameters


@pytest.mark.parametrize("k", FIGURE_8)
def test_integers_of_figure_8(k):
    operator = {"class_path": "SlimConv2d", "init_args": {"k": k}}
    model = weightless("cifar_resnet50", operator, num_classes=100)
    assert (params(model), macs(model, 32)) == FIGURE_8[k]


def test_256_pixels_of_table_10():
    assert macs(weightless("torchvision:resnet50"), 256) == 5_340_348_416
    assert macs(weightless("sc_resnet50"), 256) == 3_463_475_968


@pytest.mark.parametrize(
    ("name", "replaced"),
    [
        ("sc_resnet50", 16),
        ("sc_resnet101", 33),
        ("sc_resnext101_32x3d", 33),
        ("sc_bl_resnet50", 19),
        ("sc_dla46_c", 12),
        ("sc_shufflenet_v2", 16),
        ("sc_mobilenet_v2", 17),
        ("sc_cifar_shufflenet_v2", 13),
        ("sc_cifar_mobilenet_v2", 17),
        ("sc_cifar_resnet56", 27),
        ("sc_cifar_nasnet", 140),
        ("sc_cifar_oct_resnet50", 2),
        ("ghost_resnet50", 52),
        ("sp_resnet50", 16),
        ("cifar_sk_net50", 16),
    ],
)
def test_how_many_operators_are_in_it(name, replaced):
    kind = {"ghost_resnet50": GhostConv2d, "sp_resnet50": SPConv2d, "cifar_sk_net50": SKConv2d}.get(name, SlimConv2d)
    model = weightless(name)
    assert len(model.substitution.replaced) == replaced
    assert sum(isinstance(m, kind) for m in model.modules()) == replaced


def test_another_operator_takes_the_place_of_a_presets():
    assert substitution_rule("ghost_resnet50") == {"pointwise": True}
    model = weightless("ghost_resnet50", "SPConv2d")
    assert params(model) == params(weightless("sp_resnet50"))
    assert not any(isinstance(m, GhostConv2d) for m in model.modules())
    # What belongs to the plain network stays in force.
    assert len(weightless("sc_bl_resnet50", "SlimConv2d").substitution.replaced) == 19


def test_an_argument_of_the_caller_beats_the_presets():
    model = weightless("ghost_resnet50", pointwise=False, include="layer4.*")
    assert model.substitution.replaced == [f"layer4.{i}.conv2" for i in range(3)]


def test_presets_are_listed_and_plain_networks_exist():
    assert set(list_backbones("sc_*")) == {name for name in PRESETS if name.startswith("sc_")}
    assert all(made_for(name) == made_for(preset.backbone) for name, preset in PRESETS.items())


@pytest.mark.parametrize(
    ("name", "channels", "strides"),
    [
        ("bl_resnet50", [64, 64, 256, 1024, 2048], [2, 4, 8, 16, 32]),
        ("oct_resnet50", [64, 128, 256, 512, 2048], [2, 4, 8, 16, 32]),
        ("sc_cifar_oct_resnet50", [384, 768, 2048], [2, 4, 8]),
        ("sc_dla46_c", [32, 64, 64, 128, 256], [2, 4, 8, 16, 32]),
        ("cifar_nasnet", [352 + 176, 704 + 352], [2, 4]),
        ("sc_cifar_mobilenet_v2", [32, 96, 320], [2, 4, 8]),
        ("ghost_resnet50", [64, 256, 512, 1024, 2048], [2, 4, 8, 16, 32]),
        ("cifar_sk_net50", [512, 1024, 2048], [2, 4, 8]),
    ],
)
def test_feature_maps(name, channels, strides):
    model = weightless(name, features_only=True)
    assert (model.channels, model.strides) == (channels, strides)
    assert [m.shape[1] for m in model(images(96))] == channels


@pytest.mark.parametrize("name", ["bl_resnet50", "sc_bl_resnet50", "oct_resnet50", "cifar_oct_resnet50"])
def test_output_stride_is_refused_where_it_would_make_another_network(name):
    with pytest.raises(ValueError, match=r"output_stride=16: \w+ has none but its own, 32: (its low|what its big)"):
        weightless(name, output_stride=16)


def test_the_low_maps_of_an_octave_network_matter():
    """They reach the logits, so that cutting one path changes them."""
    torch.manual_seed(0)
    model = OctResNet((1, 1, 1, 1), num_classes=3, cifar=True).eval()
    x = torch.randn(2, 3, 9, 9)
    before = model(x)
    last = [m for m in model.modules() if isinstance(m, HighLowConv2d) and m.low_to_high is not None][-1]
    nn.init.zeros_(last.low_to_high.weight)
    assert not torch.equal(model(x), before)


def coloured(count: int, size: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Images of four classes: a colour of its own for each, under noise."""
    generator = torch.Generator().manual_seed(seed)
    colours = torch.tensor([[1.0, 0, 0], [0, 1, 0], [0, 0, 1], [-1, -1, -1]])
    labels = torch.randint(4, (count,), generator=generator)
    noise = torch.randn(count, 3, size, size, generator=generator)
    return colours[labels][..., None, None] + 0.2 * noise, labels


# ImageNet's light networks take larger images and larger steps to learn as quickly as the others.
LIGHT = ("sc_dla46_c", "sc_mobilenet_v2", "sc_shufflenet_v2")
# One cell a stage instead of four.
SHORTER = {"sc_cifar_nasnet": {"cells": 1}}


@pytest.mark.parametrize("name", PRESETS)
def test_one_epoch_on_512_images_lowers_the_loss(name):
    """Whole networks at full width; it is the images that are small, down to maps of a single pixel."""
    torch.manual_seed(0)
    size, batch, rate = (
        (4, 64, 3e-3) if made_for(name)[0] == 32 else (32, 32, 1e-2) if name in LIGHT else (16, 32, 3e-3)
    )
    model = create_backbone(name, num_classes=4, **SHORTER.get(name, {})).train()
    batches = [part.split(batch) for part in coloured(512, size, seed=0)]
    held_out, labels = coloured(64, size, seed=1)

    def loss() -> float:
        with torch.no_grad():
            return functional.cross_entropy(model(held_out), labels).item()

    before = loss()
    optimizer = torch.optim.Adam(model.parameters(), lr=rate, fused=True)
    decay = torch.optim.lr_scheduler.LinearLR(optimizer, 1, 0, total_iters=len(batches[0]))
    for x, wanted in zip(*batches, strict=True):
        optimizer.zero_grad()
        functional.cross_entropy(model(x), wanted).backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
        optimizer.step()
        decay.step()
    assert loss() < before
