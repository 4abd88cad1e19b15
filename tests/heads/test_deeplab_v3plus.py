import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torchvision.models.segmentation.deeplabv3 import ASPPPooling

from slimconv_lit import SlimConv2d, create_backbone
from slimconv_lit.heads import DeepLabV3Plus, deeplab_v3plus
from slimconv_lit.heads.deeplab_v3plus import ImagePooling

BACKBONES = ["cifar_resnet20", "cifar_resnet18", "torchvision:resnet18", "torchvision:mobilenet_v2", "timm:regnety_002"]


def rates(model):
    return [branch[0].dilation[0] for branch in list(model.aspp.convs)[1:4]]


@pytest.mark.parametrize("name", BACKBONES)
def test_trains_on_one_image_of_odd_size(name):
    model = deeplab_v3plus(name, SlimConv2d, num_classes=5).train()
    assert any(isinstance(module, SlimConv2d) for module in model.backbone.modules())
    logits = model(torch.randn(1, 3, 65, 71))
    assert logits.shape == (1, 5, 65, 71)
    logits.square().mean().backward()
    without = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    assert without == []


@pytest.fixture(scope="module")
def small():
    return deeplab_v3plus("cifar_resnet20", SlimConv2d, num_classes=3, width=16).eval()


@settings(max_examples=20)
@given(height=st.integers(1, 75), width=st.integers(1, 75))
@torch.no_grad()
def test_logits_have_the_size_of_the_image(small, height, width):
    logits = small(torch.randn(1, 3, height, width))
    assert logits.shape == (1, 3, height, width)
    assert logits.isfinite().all()


@pytest.mark.parametrize("size", [(1, 40), (37, 1), (1, 1), (33, 47)])
@torch.no_grad()
def test_networks_without_padding_take_small_images_too(size):
    model = deeplab_v3plus("torchvision:squeezenet1_1", num_classes=2, width=8).eval()
    assert model(torch.randn(2, 3, *size)).shape == (2, 2, *size)


@pytest.mark.parametrize(
    ("name", "output_stride", "expected"),
    [
        ("torchvision:resnet18", 32, [6, 12, 18]),
        ("torchvision:resnet18", 16, [6, 12, 18]),
        ("torchvision:resnet18", 8, [12, 24, 36]),
        # It ends at stride 8.
        ("cifar_resnet18", 16, [12, 24, 36]),
    ],
)
def test_rates_go_with_the_last_maps_stride(name, output_stride, expected):
    assert rates(deeplab_v3plus(name, output_stride=output_stride)) == expected


def test_settings_are_taken_over():
    model = deeplab_v3plus(
        "cifar_resnet20", num_classes=4, dilations=[2, 3, 4], width=24, low_level_width=6, dropout=0.3
    )
    assert rates(model) == [2, 3, 4]
    assert model.aspp.project[-1].p == 0.3
    assert model.low_level[0].out_channels == 6
    assert model.decoder[0].in_channels == 24 + 6
    assert model.classifier.weight.shape == (4, 24, 1, 1)


def test_the_fine_map_is_that_of_stride_4_or_the_one_before_the_last():
    resnet = deeplab_v3plus("torchvision:resnet18", output_stride=32)
    assert (resnet.backbone.strides[resnet.low_level_map], resnet.low_level[0].in_channels) == (4, 64)
    cifar = deeplab_v3plus("cifar_resnet20")
    assert (cifar.backbone.strides[cifar.low_level_map], cifar.low_level[0].in_channels) == (2, 32)


def test_a_backbone_without_a_fine_map_is_refused_with_its_strides():
    maps = create_backbone("torchvision:resnet18", features_only=True)
    maps.strides = [2, 8, 16, 32]
    with pytest.raises(ValueError, match="strides are 2, 8, 16, 32"):
        DeepLabV3Plus(maps, 3)


def test_both_spatial_convolutions_of_slimconv_dilate_and_the_1x1_does_not():
    model = deeplab_v3plus("torchvision:resnet18", SlimConv2d, output_stride=8)
    found = {
        name.removeprefix("backbone.net."): (m.top[0].dilation, m.bottom[3].dilation, m.bottom[0].dilation)
        for name, m in model.named_modules()
        if isinstance(m, SlimConv2d)
    }
    # The block whose stride is taken away still reads its map undilated.
    expected = {"layer2.1": 1, "layer3.0": 1, "layer3.1": 2, "layer4.0": 2, "layer4.1": 4}
    for block, d in expected.items():
        assert found[f"{block}.conv1"] == ((d, d), (d, d), (1, 1))


def test_image_pooling_is_torchvisions_and_trains_on_one_image():
    theirs, ours = ASPPPooling(6, 4), ImagePooling(6, 4)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(3, 6, 5, 7)
    torch.testing.assert_close(ours.train()(x), theirs.train()(x))
    torch.testing.assert_close(ours.eval()(x), theirs.eval()(x))
    torch.testing.assert_close(ours.train()(x[:1]), theirs(x[:1]))
    torch.testing.assert_close(ours.state_dict(), theirs.state_dict())


def test_weights_travel_in_the_state_dict(small):
    other = deeplab_v3plus("cifar_resnet20", SlimConv2d, num_classes=3, width=16).eval()
    x = torch.randn(1, 3, 40, 40)
    assert not torch.equal(other(x), small(x))
    other.load_state_dict(small.state_dict())
    assert torch.equal(other(x), small(x))


def test_a_few_steps_fit_one_image():
    torch.manual_seed(0)
    model = deeplab_v3plus("cifar_resnet20", SlimConv2d, num_classes=2, width=16)
    x, truth = torch.rand(1, 3, 32, 32), torch.zeros(1, 32, 32, dtype=torch.int64)
    x[:, :, 8:24, 4:16] += 1
    truth[:, 8:24, 4:16] = 1
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    losses = []
    for _ in range(10):
        loss = nn.functional.cross_entropy(model(x), truth)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.4 * losses[0]


def test_exports_with_a_dynamic_size():
    model = deeplab_v3plus("cifar_resnet20", SlimConv2d, num_classes=2, width=16).eval()
    auto = torch.export.Dim.AUTO
    program = torch.export.export(model, (torch.randn(2, 3, 64, 72),), dynamic_shapes=({0: auto, 2: auto, 3: auto},))
    x = torch.randn(3, 3, 41, 90)
    torch.testing.assert_close(program.module()(x), model(x))
