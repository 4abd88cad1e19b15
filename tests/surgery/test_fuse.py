"""`fuse`: what goes, what stays and why, and that the network computes what it did."""

import copy
from dataclasses import dataclass
from functools import partial

import pytest
import torch
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.prune import l1_unstructured
from torchvision.ops import FrozenBatchNorm2d

from slimconv_lit import SlimConv2d, create_backbone, fuse, slimify
from slimconv_lit.heads import deeplab_v3plus, faster_rcnn
from slimconv_lit.ops import CompactConv2d, GhostConv2d, OctConv2d, SCConv2d, SEConv2d, SKConv2d, SPConv2d
from slimconv_lit.ops.slim_conv import ChannelGate, LinearGate
from tests.backbones.families import QUICK_OWN
from tests.surgery.masking import apart, randomise
from tests.surgery.test_random_networks import WIDTH, blocks

KS = (None, "4/3", "2", "8/3")
TORCHVISION = (
    "resnext50_32x4d", "densenet121", "mobilenet_v3_small", "efficientnet_b0", "regnet_y_400mf",
    "shufflenet_v2_x0_5", "googlenet", "mnasnet0_5", "convnext_tiny",
)  # fmt: skip
# As wide as they are, they do nothing else than their siblings.
WIDE = ("cifar_wrn28_10", "cifar_resnext50_32x4d", "cifar_resnet50", "cifar_se_resnet50", "cifar_resnet56")
OWN = [name for name in QUICK_OWN if name not in WIDE]
TIMM = ("timm:resnet18d", "timm:mobilenetv3_small_050", "timm:dla46_c", "timm:ghostnet_050")


def fuse_and_check(model, x, **arguments):
    """Fuses, and compares on other images and other sizes than `fuse` itself does."""
    randomise(model)
    original = copy.deepcopy(model).eval()
    report = fuse(model, **arguments)
    assert report.model is model
    with torch.no_grad():
        wanted, found = original(x), model(x)
    for a, b in zip(*([out] if isinstance(out, torch.Tensor) else out for out in (wanted, found)), strict=True):
        assert a.isfinite().all()
        assert apart(a, b) <= 1e-5
    norms = {n for n, m in model.named_modules() if isinstance(m, (_BatchNorm, FrozenBatchNorm2d))}
    gates = {n for n, m in model.named_modules() if isinstance(m, ChannelGate)}
    assert set(report.left) == norms | gates
    assert all(report.left.values()), report
    return report


# ---- what goes -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "k"), [(name, KS[i % 4]) for i, name in enumerate(TORCHVISION)])
def test_torchvision(name, k):
    torch.manual_seed(0)
    quick = {"init_weights": False} if name == "googlenet" else {}
    model = torchvision.models.get_model(name, num_classes=10, **quick)
    if k:
        slimify(model, k=k)
    report = fuse_and_check(model, torch.randn(1, 3, 71, 64))
    if name not in ("densenet121", "convnext_tiny", "googlenet"):
        assert not report.left, report


@pytest.mark.parametrize(("name", "k"), [(name, KS[i % 4]) for i, name in enumerate(OWN)])
def test_own_networks(name, k):
    torch.manual_seed(0)
    operator = k and {"class_path": "SlimConv2d", "init_args": {"k": k}}
    fuse_and_check(create_backbone(name, operator, num_classes=10), torch.randn(1, 3, 32, 32))


@pytest.mark.parametrize("name", TIMM)
def test_norms_that_bring_their_activation(name):
    torch.manual_seed(0)
    model = create_backbone(name, {"class_path": "SlimConv2d", "init_args": {}}, num_classes=10)
    report = fuse_and_check(model, torch.randn(1, 3, 64, 64))
    assert not report.left, report


@pytest.mark.parametrize(
    ("operator", "left"),
    [
        (SlimConv2d, 0),
        (partial(SlimConv2d, k=4, arrangement="shuffle_3b"), 0),
        (CompactConv2d, 0),
        (GhostConv2d, 0),
        (SEConv2d, 0),
        (SKConv2d, 0),
        # Their norms read sums and products of what convolutions write.
        (SPConv2d, 2),
        (OctConv2d, 2),
        (SCConv2d, 1),
    ],
    ids=str,
)
def test_operators(operator, left):
    torch.manual_seed(0)
    built = operator(32, 32)
    model = nn.Sequential(nn.Conv2d(3, 32, 1), built, nn.ReLU(), nn.Conv2d(built.out_channels, 5, 1))
    report = fuse_and_check(model, torch.randn(2, 3, 9, 11))
    assert len(report.left) == left, report


def test_heads():
    torch.manual_seed(0)
    report = fuse_and_check(deeplab_v3plus("torchvision:resnet18", SlimConv2d, 5), torch.randn(1, 3, 65, 71))
    assert not report.left
    detector = randomise(faster_rcnn("torchvision:resnet18", SlimConv2d, 3, "c4", min_size=64, max_size=96))
    assert not fuse(detector).left
    frozen = faster_rcnn("torchvision:resnet18", SlimConv2d, 3, "fpn", freeze="norms", min_size=64, max_size=96)
    assert not fuse(frozen.eval().backbone).left


def test_every_weight_has_its_place():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 6), nn.BatchNorm1d(6))
    model = nn.Sequential(*model[:2], nn.AdaptiveAvgPool2d(1), *model[2:])
    randomise(model)
    original = copy.deepcopy(model)
    report = fuse(model)
    assert {row.layer: row.into for row in report.rows} == {"1": "0", "5": "4"}
    scale = original[1].weight / (original[1].running_var + original[1].eps).sqrt()
    torch.testing.assert_close(model[0].weight, original[0].weight * scale[:, None, None, None])
    torch.testing.assert_close(
        model[0].bias, original[1].bias + (original[0].bias - original[1].running_mean) * scale
    )  # fmt: skip
    assert "2 of 2 batch norms and gates fused; outputs differ by" in str(report)


def test_gates_are_linear_layers_and_everything_stays_where_it_was():
    torch.manual_seed(0)
    model = torchvision.models.resnet18().to(memory_format=torch.channels_last)
    slimify(model)
    randomise(model).requires_grad_(False)
    fuse(model)
    gates = [m for m in model.modules() if isinstance(m, (ChannelGate, LinearGate))]
    assert len(gates) == 8
    assert all(isinstance(gate, LinearGate) for gate in gates)
    assert not any(p.requires_grad for p in model.parameters())
    assert not any(isinstance(m, _BatchNorm) for m in model.modules())
    assert model.layer2[0].conv1.top[0].weight.is_contiguous(memory_format=torch.channels_last)
    x = torch.randn(1, 3, 64, 64).to(memory_format=torch.channels_last)
    assert model.layer1(model.conv1(x)).is_contiguous(memory_format=torch.channels_last)


def test_fused_networks_load_export_and_fuse_again():
    torch.manual_seed(0)
    build = partial(create_backbone, "cifar_resnet20", SlimConv2d, num_classes=10)
    first, second = randomise(build()), build().eval()
    fuse(first)
    fuse(second)
    second.load_state_dict(first.state_dict())
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(first(x), second(x))
        program = torch.export.export(first, (x,))
        torch.testing.assert_close(program.module()(x), first(x))
    assert fuse(first).rows == ()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_types(dtype):
    torch.manual_seed(0)
    model = randomise(create_backbone("torchvision:resnet18", SlimConv2d, num_classes=10)).to(dtype)
    original = copy.deepcopy(model)
    report = fuse(model)
    assert {p.dtype for p in model.parameters()} == {dtype}
    x = torch.randn(1, 3, 64, 64, dtype=dtype)
    with torch.no_grad():
        assert apart(original(x).double(), model(x).double()) < 84 * torch.finfo(dtype).eps
    assert not report.left


# ---- what stays ----------------------------------------------------------------------------------------------------


class Odd(nn.Module):
    """Every way in which a norm cannot be folded."""

    def __init__(self):
        super().__init__()
        for name in "abcdefghi":
            setattr(self, name, nn.Conv2d(4, 4, 1))
        self.n = nn.ModuleDict({name: nn.BatchNorm2d(4) for name in "abcdefhi"})
        self.n["e"] = nn.BatchNorm2d(4, affine=False, track_running_stats=False)
        self.first, self.stem, self.unused = nn.BatchNorm2d(3), nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)
        self.n["h"].register_forward_hook(lambda *_: None)
        self.tokens, self.over_tokens = nn.Linear(4, 4), nn.BatchNorm1d(4)
        nn.utils.parametrizations.weight_norm(self.i)
        self.g.weight = self.f.weight

    def forward(self, x):
        x = self.stem(self.first(x))
        y = self.a(x)
        x = self.n["a"](y) + y
        x = self.n["b"](self.b(x).relu())
        x = self.n["c"](self.c(x) + self.d(x))
        for _ in range(2):
            x = self.n["d"](self.d(x))
        x = self.n["e"](self.e(x))
        x = self.n["f"](self.f(x)) + self.g(x)
        x = self.n["i"](self.i(self.n["h"](self.h(x))))
        tokens = self.over_tokens(self.tokens(x.mean(3).transpose(1, 2)[:, :4]))
        last = self.b(x)
        return tokens, last


def test_what_stays_has_its_reason():
    torch.manual_seed(0)
    x = torch.randn(2, 3, 8, 8)
    report = fuse_and_check(Odd(), x, example_input=x)
    no_layer = "what it reads is not what one convolution or linear layer writes"
    assert report.left == {
        "first": no_layer,
        "n.a": "what a writes goes into add too",
        "n.b": no_layer,
        "n.c": no_layer,
        "n.d": "d is used more than once",
        "n.e": "it normalises with the batch, in evaluation too",
        "n.f": "f is used more than once",
        "n.h": "n.h carries hooks, which would see something else",
        "n.i": "i: its weight is computed from other parameters",
        "unused": "never ran on random images",
        "over_tokens": no_layer,
    }


def test_training_mode_is_refused():
    with pytest.raises(ValueError, match=r"the network is in training mode.*model.eval\(\)"):
        fuse(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)))
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)).eval()
    model[1].train()
    with pytest.raises(ValueError, match="the network's 1 is in training mode"):
        fuse(model)


def test_what_does_not_run_says_so():
    with pytest.raises(ValueError, match=r"the network does not run: .*; give an example_input"):
        fuse(nn.Sequential(nn.Conv2d(3, 4, 1), nn.Linear(1000, 3)).eval())
    report = fuse(nn.Sequential(nn.Linear(7, 4), nn.BatchNorm1d(4)).eval(), torch.empty(3, 7, device="meta"))
    assert report.rows[0].into == "0"


@pytest.mark.parametrize("broken", ["differs", "raises", "nan"])
def test_what_cannot_be_proved_is_taken_back_whole(broken, monkeypatch):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8), SlimConv2d(8), nn.ReLU()
    )  # fmt: skip
    randomise(model)
    if broken == "differs":
        real = LinearGate.forward
        monkeypatch.setattr(LinearGate, "forward", lambda self, x: 0.9 * real(self, x))
        words = r"does not compute.*differ by .*the first layer that differs is 4\.top\.1\. Nothing was changed"
    elif broken == "raises":
        monkeypatch.setattr(LinearGate, "forward", lambda self, x: x @ x.flatten())
        words = "RuntimeError"
    else:
        model[0].bias.data[0] = float("nan")
        words = "not finite"
    before, kinds = {n: v.clone() for n, v in model.state_dict().items()}, [type(m) for m in model.modules()]
    with pytest.raises(ValueError, match=words):
        fuse(model)
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[n], v) or broken == "nan" for n, v in before.items())
    assert [type(m) for m in model.modules()] == kinds


# ---- what proves it ------------------------------------------------------------------------------------------------


class Returns(nn.Module):
    """Two convolutions with norms, and whatever `after(network, raw, map)` makes of what they write."""

    def __init__(self, after, before=lambda x: x):
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.bn, self.before, self.after = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), before, after
        self.last, self.last_bn = nn.Conv2d(8, 5, 1), nn.BatchNorm2d(5)
        self.register_buffer("steps", torch.zeros(()))
        randomise(self)

    def forward(self, x):
        self.steps += 1
        raw = self.conv(self.before(x))
        return self.after(self, raw, self.last_bn(self.last(self.bn(raw).relu())))


@dataclass
class Maps:
    raw: torch.Tensor
    last: torch.Tensor


def test_what_is_read_out_of_sight_is_refused_or_left():
    with pytest.raises(TypeError, match="the network returns a Maps, which the channel graph cannot look into"):
        fuse(Returns(lambda _, raw, last: Maps(raw, last)))
    with pytest.raises(ValueError, match="not finite, or there is none"):
        fuse(Returns(lambda *_: None))
    keeping = Returns(lambda network, raw, last: [setattr(network, "seen", raw), last][1])
    assert fuse(keeping).left == {"bn": "what conv writes goes into the network, which keeps it too"}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_wrong_fold_is_seen_in_any_type(dtype, monkeypatch):
    real = fuse.__globals__["_fold"]

    def wrong(edits, name, layer):
        real(edits, name, layer)
        edits.model.get_submodule(layer).bias.data.mul_(0.99)

    monkeypatch.setitem(fuse.__globals__, "_fold", wrong)
    model = Returns(lambda _, raw, last: last).to(dtype)
    before = {n: v.clone() for n, v in model.state_dict().items()}
    with pytest.raises(ValueError, match="does not compute"):
        fuse(model)
    assert all(torch.equal(model.state_dict()[n], v) for n, v in before.items())


def test_what_is_too_large_for_its_type_is_taken_back():
    model = Returns(lambda _, raw, last: last)
    model.bn.running_var.fill_(1e-4)
    model.conv.weight.data.mul_(1e4)
    model.half()
    with pytest.raises(ValueError, match=r"conv with bn in it is too large for torch\.float16"):
        fuse(model)
    assert isinstance(model.bn, nn.BatchNorm2d)


@pytest.mark.parametrize(
    "after",
    [
        lambda _, raw, last: {"logits": last, "classes": last.argmax(1), "more": last > 0},
        lambda _, raw, last: {"logits": last, "boxes": last.new_zeros(0, 4)},
        lambda _, raw, last: last.argmax(1),
        # The last digit decides.
        lambda _, raw, last: (last, (last * 1e9).sin() > 0),
    ],
)
def test_integers_and_empty_tensors_do_not_stand_in_the_way(after):
    model = Returns(after)
    assert not fuse(model).left


def test_integers_alone_prove_nothing(monkeypatch):
    real = fuse.__globals__["_fold"]

    def wrong(edits, name, layer):
        real(edits, name, layer)
        edits.model.get_submodule(layer).bias.data.mul_(0.999)

    model = Returns(lambda _, raw, last: (last.amax((2, 3)) > -100).long())
    model.last_bn = nn.Identity().eval()
    monkeypatch.setitem(fuse.__globals__, "_fold", wrong)
    with pytest.raises(ValueError, match="the first layer that differs is bn"):
        fuse(model)


def test_the_network_itself_is_not_run():
    compiled = []
    model = Returns(lambda _, raw, last: last)
    state = torch.get_rng_state()
    fuse(torch.compile(model, backend=lambda *_: compiled.append(1)))
    assert model.steps == 0
    assert torch.equal(torch.get_rng_state(), state)
    assert compiled == []


def test_values_are_the_callers_where_random_ones_will_not_do():
    with pytest.raises(ValueError, match=r"not finite.*give them as example_input"):
        fuse(Returns(lambda _, raw, last: last, before=torch.log))
    assert not fuse(Returns(lambda _, raw, last: last, before=torch.log), torch.rand(1, 3, 8, 8) + 0.1).left


def test_computed_weights_are_no_obstacle():
    model = Returns(lambda _, raw, last: last)
    l1_unstructured(model.conv, "weight", 0.5)
    assert "hooks" in fuse(model).left["bn"]


def test_nothing_to_fuse_and_no_parameters():
    assert fuse(nn.ReLU().eval()).rows == ()


# ---- any network ---------------------------------------------------------------------------------------------------


@settings(max_examples=20)
@given(st.lists(blocks, min_size=1, max_size=3), st.sampled_from(KS), st.booleans())
def test_fuse_keeps_its_promises(parts, k, last):
    stem = [nn.Conv2d(3, WIDTH, 3, padding=1), nn.BatchNorm2d(WIDTH), nn.ReLU()]
    model = nn.Sequential(*stem, *parts, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(WIDTH, 3), nn.BatchNorm1d(3))
    x = torch.randn(2, 3, 19, 17, generator=torch.Generator().manual_seed(0))
    if k:
        slimify(model, k=k, example_input=x)
    if last:
        model = model.to(memory_format=torch.channels_last)
    report = fuse_and_check(model, x, example_input=x)
    assert not report.left, report
