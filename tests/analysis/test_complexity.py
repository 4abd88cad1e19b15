import pytest
import torch
import torchvision
from fvcore.nn import FlopCountAnalysis
from torch import nn

from slimconv_lit.analysis import conventions, macs, macs_by_layer, params
from slimconv_lit.backbones import create_backbone
from slimconv_lit.backbones.stages import WithoutWeights
from slimconv_lit.ops import SlimConv2d


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("resnet50", (25_557_032, 4_089_184_256)),
        ("resnet101", (44_549_160, 7_801_405_440)),
        ("densenet161", (28_681_000, 7_727_907_072)),
        ("mobilenet_v2", (3_504_872, 300_774_272)),
        ("shufflenet_v2_x1_0", (2_278_604, 144_907_992)),
    ],
)
def test_integers_of_torchvisions_networks(name, expected):
    with WithoutWeights():
        model = torchvision.models.get_model(name)
    assert (params(model), macs(model, 224)) == expected


def test_size_of_the_image_matters():
    with WithoutWeights():
        model = torchvision.models.resnet50()
    assert macs(model, 256) == macs(model, (256, 256)) == macs(model, (3, 256, 256)) == 5_340_348_416


@pytest.mark.parametrize(
    ("name", "operator"),
    [
        ("cifar_resnet20", None),
        ("cifar_resnet20", SlimConv2d),
        ("torchvision:squeezenet1_1", None),
        ("torchvision:shufflenet_v2_x0_5", SlimConv2d),
        ("torchvision:regnet_y_400mf", SlimConv2d),
        ("torchvision:densenet121", None),
    ],
)
def test_fvcore_counts_the_same(name, operator):
    model = create_backbone(name, operator, num_classes=10).eval()
    # Two images, for fvcore counts what it sees, and ours is for one.
    analysis = FlopCountAnalysis(model, torch.zeros(2, 3, 64, 64))
    by_operation = analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False).by_operator()
    assert macs(model, 64) == (by_operation["conv"] + by_operation["linear"]) // 2


def test_layers_add_up_to_the_total():
    model = create_backbone("cifar_resnet20", SlimConv2d, num_classes=10)
    total, *rest = macs_by_layer(model, 32)
    leaves = [cost for cost in rest if not any(other.name.startswith(f"{cost.name}.") for other in rest)]
    assert (total.name, total.type, total.output) == ("", "CifarResNet", (10,))
    assert total.params == sum(cost.params for cost in leaves) == params(model)
    assert total.macs == sum(cost.macs for cost in leaves) == macs(model, 32)
    by_name = {cost.name: cost for cost in rest}
    assert by_name["conv1"].macs == 3 * 16 * 9 * 32 * 32
    assert by_name["layer2"].output == (32, 16, 16)


class Odd(nn.Module):
    """Layers that share weights, run twice, are grouped, transposed, biased, or read a sequence."""

    def __init__(self):
        super().__init__()
        self.grouped = nn.Conv2d(4, 8, (3, 1), stride=2, groups=2)
        self.transposed = nn.ConvTranspose2d(8, 4, 2, 2)
        self.twice = nn.Conv2d(4, 4, 1)
        self.tokens = nn.Linear(4, 5)
        self.tied = nn.Linear(4, 5)
        self.tied.weight = self.tokens.weight

    def forward(self, x):
        x = self.twice(self.twice(self.transposed(self.grouped(x))))
        tokens = x.flatten(2).transpose(1, 2)
        return self.tokens(tokens), self.tied(tokens)


def test_every_kind_of_layer():
    model = Odd()
    costs = {cost.name: cost for cost in macs_by_layer(model, (4, 9, 8))}
    # 9x8 -> 4x4 -> 8x8
    assert costs["grouped"].macs == 4 * 4 * 8 * 2 * 3
    assert costs["transposed"].macs == 4 * 4 * 8 * 4 * 4
    assert costs["twice"].macs == 2 * 8 * 8 * 4 * 4
    assert costs["tokens"].macs == costs["tied"].macs == 64 * 4 * 5
    assert costs[""].macs == sum(cost.macs for name, cost in costs.items() if name)
    assert costs[""].output == ()
    assert params(model) == sum(p.numel() for p in model.parameters())
    assert costs["tokens"].output == (64, 5)
    assert conventions.macs(conventions.operations(model, (4, 9, 8))) == costs[""].macs


def test_the_model_is_left_alone():
    model = create_backbone("cifar_resnet20").train()
    norm = model.bn1.running_mean.clone()
    state = torch.get_rng_state()
    macs(model, 32)
    assert model.training
    assert torch.equal(model.bn1.running_mean, norm)
    assert torch.equal(state, torch.get_rng_state())
    assert not model.layer1._forward_hooks
    assert model.fc.weight.device.type == "cpu"


def test_half_precision():
    model = create_backbone("cifar_resnet20", num_classes=10)
    expected = macs(model, 32)
    assert macs(model.to(torch.bfloat16), 32) == expected
