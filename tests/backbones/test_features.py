import copy
import pickle

import pytest
import torch

from slimconv_lit.backbones import create_backbone
from slimconv_lit.ops import SlimConv2d
from tests.backbones.families import QUICK_OWN, TIMM, TORCHVISION, images, weightless

CASES = [*((name, 32) for name in QUICK_OWN), *((name, 8) for name in [*TORCHVISION, *TIMM])]


@pytest.mark.parametrize(("name", "output_stride"), CASES)
def test_maps_are_what_channels_and_strides_say(name, output_stride):
    model = weightless(name, features_only=True, output_stride=output_stride)
    maps = model(images(256))
    assert model.channels == [m.shape[1] for m in maps]
    assert model.strides == sorted(set(model.strides))
    assert max(model.strides) <= output_stride
    for stride, m in zip(model.strides, maps, strict=True):
        # Networks without padding (SqueezeNet) lose a pixel at the border.
        assert m.shape[-1] in (256 // stride, 256 // stride - 1)


@pytest.mark.parametrize(
    ("name", "channels"),
    [
        ("torchvision:resnet50", [64, 256, 512, 1024, 2048]),
        ("torchvision:mobilenet_v2", [16, 24, 32, 96, 320]),
        ("torchvision:vgg11_bn", [128, 256, 512, 512, 512]),
        ("torchvision:shufflenet_v2_x1_0", [24, 24, 116, 232, 464]),
        ("timm:dla46_c", [32, 64, 64, 128, 256]),
        ("timm:ghostnet_100", [16, 24, 40, 112, 160]),
        ("timm:tf_efficientnet_b0", [16, 24, 40, 112, 320]),
    ],
)
def test_the_last_map_at_each_stride(name, channels):
    assert weightless(name, features_only=True).channels == channels


def test_at_output_stride_8_the_last_stage_is_the_map_of_stride_8():
    model = weightless("torchvision:resnet50", features_only=True, output_stride=8)
    assert (model.channels, model.strides) == ([64, 256, 2048], [2, 4, 8])


@pytest.mark.parametrize(
    "name",
    ["cifar_resnet20", "torchvision:resnet18", "torchvision:vgg11_bn", "torchvision:mnasnet0_5", "timm:dla46_c"],
)
def test_an_operator_leaves_the_widths_of_the_maps_alone(name):
    plain = weightless(name, features_only=True, output_stride=16)
    slim = weightless(name, SlimConv2d, features_only=True, output_stride=16)
    assert slim.substitution.replaced
    assert slim.channels == plain.channels
    assert [m.shape for m in slim(images(128))] == [m.shape for m in plain(images(128))]


def test_maps_are_those_of_the_whole_network_and_so_are_the_names():
    whole = create_backbone("torchvision:resnet18").eval()
    maps = create_backbone("torchvision:resnet18", features_only=True).eval()
    missing, unexpected = maps.net.load_state_dict(whole.state_dict(), strict=False)
    assert missing == []
    assert unexpected == ["fc.weight", "fc.bias"]
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        pooled = maps(x)[-1].mean((2, 3))
        assert torch.allclose(whole.fc(pooled), whole(x), atol=1e-5)


@pytest.mark.parametrize(
    "name", ["cifar_resnet20", "torchvision:mobilenet_v2", "torchvision:densenet121", "torchvision:googlenet"]
)
def test_every_parameter_is_used(name):
    # Distributed training stops at parameters that get no gradient.
    model = weightless(name, features_only=True).train()
    sum(m.sum() for m in model(images(64, batch=2))).backward()
    assert [n for n, p in model.named_parameters() if p.grad is None] == []


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_can_be_copied(duplicate):
    model = create_backbone("torchvision:squeezenet1_1", SlimConv2d, features_only=True, output_stride=8)
    twin = duplicate(model).eval()
    model.eval()
    x = torch.randn(1, 3, 48, 48)
    assert twin.channels == model.channels
    assert all(torch.equal(a, b) for a, b in zip(model(x), twin(x), strict=True))
    assert len(twin.train()(x)) == len(model.channels)


def test_a_transformer_is_refused_with_the_reason():
    with pytest.raises(ValueError, match="the network does not run on a 512x512 image"):
        create_backbone("timm:vit_tiny_patch16_224", features_only=True)


@pytest.mark.parametrize("name", ["torchvision:resnet18", "torchvision:densenet121", "timm:efficientnet_b0"])
def test_cut_in_two_it_computes_the_same(name):
    maps = create_backbone(name, SlimConv2d, features_only=True).eval()
    first, second = (part.eval() for part in maps.cut_at(16))
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        whole = maps(x)
        assert torch.equal(first(x), whole[-2])
        assert torch.equal(second(first(x)), whole[-1])
    halves = [dict(part.named_parameters()) for part in (first, second)]
    assert halves[0].keys() | halves[1].keys() == dict(maps.net.named_parameters()).keys()
    assert not halves[0].keys() & halves[1].keys()
    before = {id(p) for p in maps.parameters_before(16)}
    assert before == {id(p) for p in halves[0].values()}


def test_what_cannot_be_cut_is_refused():
    maps = weightless("oct_resnet50", features_only=True)
    with pytest.raises(ValueError, match="does not read that alone"):
        maps.cut_at(16)
    with pytest.raises(ValueError, match="no map of stride 32 with a stage after it; the maps' strides are 2, 4, 8"):
        weightless("cifar_resnet18", features_only=True).cut_at(32)
