"""Compact convolution: the operation across channels, and its two kinds of host."""

import pytest
import torch
from torch import nn

from slimconv_lit import create_backbone
from slimconv_lit.analysis import macs, params
from slimconv_lit.ops import CompactConv2d, JoinChannels
from slimconv_lit.ops.compact_conv import JOINS
from tests.ops import reference
from tests.ops.test_slim_conv import randomised, relative


@pytest.mark.parametrize("layout", ["adjacent", "halves"])
@pytest.mark.parametrize("how", JOINS)
def test_joins_channels_group_by_group(how, layout):
    torch.manual_seed(0)
    x = torch.randn(2, 12, 3, 4, dtype=torch.float64)
    for size in (1, 2, 3, 4):
        joined = JoinChannels(how, size, layout)
        assert list(joined.parameters()) == []
        torch.testing.assert_close(joined(x), reference.join(x, how, size, layout))
        for kind in ("ordinary", "depthwise"):
            groups = 1 if kind == "ordinary" else 12
            operator = randomised(CompactConv2d(12, 12, 3, groups=groups, join=how, group_size=size, layout=layout))
            operator = operator.double().eval()
            wanted = reference.compact_conv(x, operator.state_dict(), how, size, layout, groups=groups)
            assert relative(operator(x), wanted) < 1e-10
            assert operator.out_channels == wanted.shape[1] == (12 if kind == "ordinary" else 12 // size)


def test_adjacent_pairs_are_those_of_the_figure():
    x = torch.tensor([1.0, 4, 3, 2]).reshape(1, 4, 1, 1)
    assert JoinChannels("max")(x).flatten().tolist() == [4, 3]
    assert JoinChannels("max", layout="halves")(x).flatten().tolist() == [3, 4]
    assert JoinChannels("difference")(x).flatten().tolist() == [-3, 1]


@pytest.mark.parametrize("size", [1, 2])
def test_the_host_may_activate_in_place(size):
    host = nn.Sequential(CompactConv2d(8, 8, groups=8, group_size=size), nn.ReLU(inplace=True))
    host(torch.randn(2, 8, 5, 5)).sum().backward()
    assert all(p.grad is not None for p in host.parameters())


# By hand: half, or three quarters, of MobileNet's pointwise weights go, and nothing else.
@pytest.mark.parametrize(
    ("size", "expected"),
    [(1, (4_231_976, 568_740_352)), (2, (2_662_184, 298_994_176)), (4, (1_877_288, 164_121_088))],
)
def test_a_depthwise_separable_pair_becomes_compact(size, expected):
    operator = {"class_path": "CompactConv2d", "init_args": {"group_size": size}}
    model = create_backbone("timm:mobilenetv1_100", operator, without_weights=True)
    report = model.substitution
    assert len(report.replaced) == 13
    assert list(report.left.values()) == ["reads 3 channels, fewer than min_channels=32"]
    narrowed = [row.why for row in report.rows if row.now]
    assert narrowed[0] == ("" if size == 1 else "narrowed blocks.0.0.conv_pw")
    assert (params(model), macs(model, 224)) == expected


@pytest.mark.parametrize(
    ("name", "replaced"), [("torchvision:resnet18", 16), ("torchvision:resnet50", 16), ("torchvision:mobilenet_v2", 17)]
)
def test_takes_the_place_of_both_kinds(name, replaced):
    plain = create_backbone(name, num_classes=3, without_weights=True)
    model = create_backbone(name, CompactConv2d, num_classes=3)
    assert len(model.substitution.replaced) == replaced
    assert list(model.substitution.left.values()) == ["reads 3 channels, fewer than min_channels=32"]
    assert params(model) < params(plain)
    model.train()(torch.randn(2, 3, 40, 40)).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_grouped_convolutions_are_left_with_the_reason():
    left = create_backbone("torchvision:resnext50_32x4d", "CompactConv2d", without_weights=True).substitution.left
    assert "groups=32: compact convolution takes" in left["layer1.0.conv2"]
