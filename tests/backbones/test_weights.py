import re

import pytest
import timm
import torch
import torchvision
from torch import nn

from slimconv_lit import fuse, load_weights, prune, slimify

OURS_TO_PUBLISHED = (
    (r"\.top\.([01])\.", r".conv2_1.\1."),
    (r"\.bottom\.([0134])\.", r".conv2_2.\1."),
    (r"\.gate\.squeeze\.", ".fc.0."),
    (r"\.gate\.norm\.", ".fc.1."),
    (r"\.gate\.excite\.", ".fc.3."),
)


def publish(state, path):
    """Writes a state dict as the SlimConv authors wrote theirs."""
    renamed = {}
    for name, value in state.items():
        for pattern, replacement in OURS_TO_PUBLISHED:
            name = re.sub(pattern, replacement, name)
        renamed[f"module.{name}"] = value
    torch.save({"epoch": 99, "state_dict": renamed, "best_prec1": torch.tensor(76.7), "arch": "sc_resnet50"}, path)


def small(k="4/3", **options):
    torch.manual_seed(0)
    model = torchvision.models.resnet50(num_classes=10, **options)
    if k:
        slimify(model, k=k)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.uniform_(-1, 1)
    return model


def equal(first, second):
    return all(torch.equal(a, b) for a, b in zip(first.values(), second.values(), strict=True))


@pytest.mark.parametrize("k", ["4/3", "8/3"])
def test_published_checkpoints_are_read_whole(k, tmp_path):
    source = small(k)
    publish(source.state_dict(), tmp_path / "sc.pth.tar")
    assert "module.layer1.0.conv2.conv2_2.3.weight" in torch.load(tmp_path / "sc.pth.tar")["state_dict"]
    target = small(k)
    for parameter in target.parameters():
        nn.init.zeros_(parameter)
    report = load_weights(target, tmp_path / "sc.pth.tar")
    assert equal(target.state_dict(), source.state_dict())
    assert report.missing == report.left_over == ()
    assert report.converted["layer1.0.conv2.gate.excite.bias"] == "module.layer1.0.conv2.fc.3.bias"
    assert f"loaded {len(source.state_dict())} tensors" in str(report)


def test_a_norm_that_the_operator_made_needless_may_be_in_the_file(tmp_path):
    source = small()
    publish(source.state_dict() | {"layer1.0.bn2.weight": torch.ones(64)}, tmp_path / "sc.pth")
    assert load_weights(small(), tmp_path / "sc.pth").left_over == ("module.layer1.0.bn2.weight",)


def test_another_k_is_refused_with_name_and_shapes_and_nothing_is_loaded(tmp_path):
    publish(small("8/3").state_dict(), tmp_path / "sc.pth")
    target = small("4/3")
    before = {name: value.clone() for name, value in target.state_dict().items()}
    with pytest.raises(ValueError, match=r"layer1.0.conv2.top.0.weight is \(16, 16, 3, 3\).*\(32, 32, 3, 3\)"):
        load_weights(target, tmp_path / "sc.pth")
    assert equal(target.state_dict(), before)


def test_plain_weights_go_into_all_that_substitution_left_unchanged(tmp_path):
    source = small(k=None)
    torch.save(source.state_dict(), tmp_path / "resnet50.pth")
    target = small()
    for parameter in target.parameters():
        nn.init.zeros_(parameter)
    report = load_weights(target, tmp_path / "resnet50.pth")
    state = source.state_dict()
    for name, value in target.state_dict().items():
        if name in report.loaded:
            assert torch.equal(value, state[name])
        else:
            assert ".conv2." in name or ".conv3." in name, name
    assert "layer1.0.conv1.weight" in report.loaded
    assert "layer1.0.conv3.weight" in report.missing
    assert {"layer1.0.conv2.weight", "layer1.0.bn2.weight", "layer1.0.conv3.weight"} <= set(report.left_over)
    assert len(report.left_over) == 16 * (1 + 5 + 1)


def test_timm_weights_go_into_a_slim_timm_network(tmp_path):
    torch.save(timm.create_model("mobilenetv2_050", num_classes=10).state_dict(), tmp_path / "timm.pth")
    target = timm.create_model("mobilenetv2_050", num_classes=10)
    slimify(target, k="8/3")
    report = load_weights(target, tmp_path / "timm.pth")
    assert "classifier.weight" in report.loaded
    assert all(".conv_dw" in n or ".bn1" in n or ".bn2" in n or ".conv_pwl" in n for n in report.left_over)


def test_other_numbers_of_classes_are_refused_unless_excluded(tmp_path):
    torch.save(torchvision.models.resnet18(num_classes=1000).state_dict(), tmp_path / "r18.pth")
    model = torchvision.models.resnet18(num_classes=10)
    with pytest.raises(ValueError, match=r"fc.weight is \(1000, 512\) in the file and \(10, 512\).*2 differences"):
        load_weights(model, tmp_path / "r18.pth")
    report = load_weights(model, tmp_path / "r18.pth", exclude="fc.*")
    assert report.missing == ("fc.weight", "fc.bias")


def test_another_network_is_refused_with_the_first_name(tmp_path):
    torch.save(torchvision.models.resnet34(num_classes=10).state_dict(), tmp_path / "r34.pth")
    with pytest.raises(ValueError, match=r"layer1.2.conv1.weight \(64, 64, 3, 3\) is in the file, and the network has"):
        load_weights(torchvision.models.resnet18(num_classes=10), tmp_path / "r34.pth")
    torch.save(torchvision.models.resnet18(num_classes=10).state_dict(), tmp_path / "r18.pth")
    with pytest.raises(ValueError, match=r"layer1.2.conv1.weight \(64, 64, 3, 3\) is in the network and not in the"):
        load_weights(torchvision.models.resnet34(num_classes=10), tmp_path / "r18.pth")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"epoch": 3}, "no state dict in it; it holds epoch"),
        ({"state_dict": {"a.weight": torch.ones(2)}}, "another network"),
        (["x"], "not a state dict"),
        (nn.Linear(2, 2), "weights_only"),
    ],
)
def test_files_without_fitting_weights_are_refused(content, words, tmp_path):
    torch.save(content, tmp_path / "x.pth")
    with pytest.raises(ValueError, match=words):
        load_weights(nn.Sequential(nn.Conv2d(3, 4, 3)), tmp_path / "x.pth")


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nothing\.pth"):
        load_weights(nn.Linear(2, 2), tmp_path / "nothing.pth")


def chain(seed):
    torch.manual_seed(seed)
    model = nn.Sequential(*(block(3 if i == 0 else 16, 16) for i in range(3)), nn.Conv2d(16, 5, 1)).eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight)
    return model


def block(reads, writes):
    return nn.Sequential(nn.Conv2d(reads, writes, 3, padding=1), nn.BatchNorm2d(writes), nn.ReLU())


def test_a_network_that_was_pruned_otherwise_is_refused(tmp_path):
    def pruned(seed, ratio):
        return prune(chain(seed), ratio, example_input=torch.ones(1, 3, 8, 8)).model

    torch.save(pruned(1, 0.5).state_dict(), tmp_path / "other.pth")
    target = pruned(0, 0.3)
    before = {name: value.clone() for name, value in target.state_dict().items()}
    with pytest.raises(ValueError, match=r"another network's weights: .* differences.*nothing was loaded"):
        load_weights(target, tmp_path / "other.pth")
    assert equal(target.state_dict(), before)
    torch.save(before, tmp_path / "own.pth")
    assert load_weights(pruned(0, 0.3), tmp_path / "own.pth").missing == ()


def test_plain_weights_do_not_go_into_a_fused_network(tmp_path):
    torch.save(chain(0).state_dict(), tmp_path / "plain.pth")
    target = chain(0)
    fuse(target, torch.ones(1, 3, 8, 8))
    with pytest.raises(ValueError, match=r"0\.1\.weight .* is in the file, and the network has no 0\.1\.weight"):
        load_weights(target, tmp_path / "plain.pth")
