import copy

import pytest
import torch
import torchvision
from torch import nn
from torch.nn import functional

from slimconv_lit.backbones import create_backbone
from slimconv_lit.backbones.dilation import DilatedPool2d, dilate
from tests.backbones.families import images, weightless


@pytest.mark.parametrize(("output_stride", "replace"), [(16, [False, False, True]), (8, [False, True, True])])
def test_is_what_torchvision_builds_for_its_resnets(output_stride, replace):
    theirs = torchvision.models.resnet50(replace_stride_with_dilation=replace).eval()
    ours = torchvision.models.resnet50().eval()
    ours.load_state_dict(theirs.state_dict())
    dilate(ours, output_stride)
    x = torch.randn(1, 3, 65, 49)
    with torch.no_grad():
        torch.testing.assert_close(ours(x), theirs(x), rtol=1e-4, atol=1e-3)
    convs = [[m for m in net.modules() if isinstance(m, nn.Conv2d)] for net in (ours, theirs)]
    assert list(map(str, convs[0])) == list(map(str, convs[1]))


# Without gates, whose pooling sees the new pixels; with every kind of stride: convolution, maximum, average, 2x2, ceil.
@pytest.mark.parametrize(
    "name",
    [
        "torchvision:resnet18", "torchvision:mobilenet_v2", "torchvision:densenet121", "torchvision:shufflenet_v2_x0_5",
        "torchvision:googlenet", "torchvision:mnasnet0_5", "timm:convnext_atto", "timm:resnet26d", "timm:dla46_c",
    ],
)  # fmt: skip
def test_computes_what_the_plain_network_does_and_what_lies_in_between(name):
    torch.manual_seed(0)
    plain = create_backbone(name, features_only=True).eval()
    for output_stride in (16, 8):
        dilated = create_backbone(name, features_only=True, output_stride=output_stride).eval()
        dilated.load_state_dict(plain.state_dict())
        x = torch.randn(1, 3, 64, 96)
        step = plain.strides[-1] // dilated.strides[-1]
        with torch.no_grad():
            expected, found = plain(x)[-1], dilated(x)[-1]
        assert found.shape[2:] == (64 // output_stride, 96 // output_stride)
        close = 1e-5 * expected.abs().max().item()
        torch.testing.assert_close(found[:, :, ::step, ::step], expected, rtol=1e-4, atol=close)


@pytest.mark.parametrize("name", ["torchvision:vgg11_bn", "torchvision:mobilenet_v2", "timm:vgg11_bn", "timm:dla46_c"])
def test_whole_networks_still_classify(name):
    assert weightless(name, output_stride=8)(images(224)).shape == (1, 1000)


@pytest.mark.parametrize("size", [(12, 12), (13, 10)])
@pytest.mark.parametrize("factor", [1, 2, 3])
@pytest.mark.parametrize(
    "pool",
    [
        nn.MaxPool2d(3, 1, 1), nn.AvgPool2d(3, 1, 1), nn.AvgPool2d(3, 1, 1, count_include_pad=False),
        nn.AvgPool2d((2, 3), 1), nn.MaxPool2d(2, 1),
    ],
    ids=str,
)  # fmt: skip
def test_a_dilated_pool_is_the_pool_on_every_phase(pool, factor, size):
    x = torch.randn(2, 3, factor * size[0], factor * size[1])
    out = DilatedPool2d(pool, (1, 1), factor, (0, 0))(x)
    for i in range(factor):
        for j in range(factor):
            torch.testing.assert_close(out[:, :, i::factor, j::factor], pool(x[:, :, i::factor, j::factor]))


def test_pixels_that_are_filled_in_count_in_no_average():
    x = torch.ones(1, 1, 4, 4)
    assert torch.equal(DilatedPool2d(nn.AvgPool2d(2), (1, 1), 1, (1, 1))(x), x)
    assert torch.equal(DilatedPool2d(nn.MaxPool2d(2), (1, 1), 1, (1, 1))(-x), -x)


class FunctionalStride(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, 8, 1)
        self.body = nn.Conv2d(8, 8, 3, padding=1)
        self.fc = nn.Linear(8, 2)

    def forward(self, x):
        x = self.body(functional.avg_pool2d(self.stem(x), 2))
        return self.fc(x.mean((2, 3)))


def inception():
    # Its poolings with stride are functions, not modules.
    return torchvision.models.inception_v3(aux_logits=False, init_weights=False)


class Twice(FunctionalStride):
    def forward(self, x):
        return self.fc(self.body(functional.max_pool2d(self.body(self.stem(x)), 4)).mean((2, 3)))


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (FunctionalStride, "body still writes maps of stride 16, because a stride on the way to it"),
        (Twice, "body runs on maps of different strides"),
        (
            lambda: torchvision.models.inception_v3(aux_logits=False, init_weights=False),
            "rewritten, the network does not run",
        ),
    ],
)
def test_what_cannot_be_rewritten_is_refused_and_left_as_it_was(make, reason):
    model = make()
    before = str(model), copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=reason):
        dilate(model, 8)
    assert str(model) == before[0]
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), before[1].values(), strict=True))


def test_only_8_16_and_32():
    with pytest.raises(ValueError, match="none of 8, 16, 32"):
        create_backbone("cifar_resnet20", output_stride=4)
