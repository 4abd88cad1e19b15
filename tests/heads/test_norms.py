import pytest
import torch
from torch import nn
from torchvision.ops import FrozenBatchNorm2d

from slimconv_lit import SlimConv2d, create_backbone
from slimconv_lit.heads.norms import freeze_backbone, use_group_norms


def maps_of(name):
    torch.manual_seed(0)
    return create_backbone(name, SlimConv2d, features_only=True)


@pytest.mark.parametrize("name", ["cifar_resnet20", "torchvision:shufflenet_v2_x0_5", "timm:regnety_002"])
def test_with_group_norms_images_of_a_batch_do_not_meet(name):
    maps = maps_of(name)
    use_group_norms(maps)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in maps.modules())
    groups = [m for m in maps.modules() if isinstance(m, nn.GroupNorm)]
    assert all(m.num_channels % m.num_groups == 0 and m.num_groups in range(1, 33) for m in groups)
    assert all(m.num_channels > m.num_groups for m in groups)
    gates = [m.gate for m in maps.modules() if isinstance(m, SlimConv2d)]
    assert gates
    assert all(type(gate.norm) is nn.Identity for gate in gates)
    x = torch.randn(3, 3, 64, 64)
    together, alone = maps.train()(x), maps(x[1:2])
    for both, one in zip(together, alone, strict=True):
        torch.testing.assert_close(both[1:2], one, atol=1e-4, rtol=1e-4)
    sum(m.square().mean() for m in alone).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in maps.parameters())


def test_group_norms_start_as_the_batch_norms_did_and_keep_activations():
    maps = maps_of("timm:regnety_002")
    norm = maps.net.get_submodule("s1.b1.conv1.bn")
    norm.weight.data.fill_(0.5)
    use_group_norms(maps)
    group, *inside = maps.net.get_submodule("s1.b1.conv1.bn")
    assert group.weight is norm.weight
    assert any(isinstance(part, nn.ReLU) for part in inside)


def test_one_group_for_a_prime_number_of_channels():
    """SlimConv makes 43 of ShuffleNetV2's 58."""
    maps = maps_of("cifar_resnet20")
    maps.net.conv1, maps.net.bn1 = nn.Conv2d(3, 43, 3, 1, 1), nn.Sequential(nn.BatchNorm2d(43), nn.Conv2d(43, 16, 1))
    use_group_norms(maps)
    assert (maps.net.bn1[0].num_groups, maps.net.bn1[0].num_channels) == (1, 43)


@pytest.mark.parametrize("name", ["cifar_resnet20", "timm:regnety_002"])
def test_a_frozen_backbone_computes_what_it_does_in_evaluation(name):
    maps = maps_of(name)
    x = torch.randn(2, 3, 64, 64)
    maps.train()(x)
    expected = maps.eval()(x)
    names = set(maps.state_dict())
    freeze_backbone(maps, "norms")
    for frozen, plain in zip(maps.train()(x), expected, strict=True):
        torch.testing.assert_close(frozen, plain, atol=1e-4, rtol=1e-4)
    assert names - set(maps.state_dict()) == {name for name in names if name.endswith("num_batches_tracked")}
    if name == "cifar_resnet20":
        assert sum(isinstance(m, FrozenBatchNorm2d) for m in maps.modules()) == 19 + 9 * 3


def test_the_stem_is_all_before_the_map_of_stride_4():
    maps = create_backbone("torchvision:resnet18", features_only=True)
    freeze_backbone(maps, "stem")
    frozen = {name.split(".")[0] for name, p in maps.net.named_parameters() if not p.requires_grad}
    trained = {name.split(".")[0] for name, p in maps.net.named_parameters() if p.requires_grad}
    assert (frozen, trained) == ({"conv1", "layer1"}, {"layer2", "layer3", "layer4"})
    # Its layer norms are parameters in the traced pass.
    maps = create_backbone("timm:convnext_atto", features_only=True)
    freeze_backbone(maps, "stem")
    frozen = {name for name, p in maps.net.named_parameters() if not p.requires_grad}
    assert "stem.1.weight" in frozen
    assert all(name.startswith(("stem.", "stages.0.")) for name in frozen)
    assert frozen == {name for name, _ in maps.net.named_parameters() if name.startswith(("stem.", "stages.0."))}
