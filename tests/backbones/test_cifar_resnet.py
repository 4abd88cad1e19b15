import pytest
import torch
from torch.nn import functional

from slimconv_lit.backbones import create_backbone
from slimconv_lit.backbones.cifar_resnet import CifarResNet, ZeroPadShortcut


@pytest.mark.parametrize("size", [8, 7])
def test_option_a_takes_every_second_pixel_and_pads_channels_with_zeros(size):
    x = torch.randn(2, 4, size, size)
    out = ZeroPadShortcut(2, stride=2)(x)
    # A strided 1x1 max-pool takes the same pixels by another route.
    assert torch.equal(out[:, 2:6], functional.max_pool2d(x, 1, 2))
    assert not out[:, :2].any()
    assert not out[:, 6:].any()


@pytest.mark.parametrize(("depth", "near"), [(57, "56 or 62"), (2, "8 or 14")])
def test_depth_is_6n_plus_2(depth, near):
    with pytest.raises(ValueError, match=near):
        CifarResNet(depth)


def test_the_names_of_its_parts():
    names = set(dict(CifarResNet(8).named_modules()))
    assert {"conv1", "bn1", "layer1", "layer3.0.conv1", "layer3.0.bn1", "layer3.0.conv2", "layer3.0.bn2", "fc"} <= names


def test_the_cifar_stem_keeps_the_image_size():
    model = create_backbone("cifar_resnet18", num_classes=10, in_channels=1)
    x = model.maxpool(model.conv1(torch.randn(1, 1, 9, 9)))
    assert x.shape == (1, 64, 9, 9)


def test_odd_sizes():
    assert CifarResNet(8, num_classes=3)(torch.randn(2, 3, 33, 27)).shape == (2, 3)
