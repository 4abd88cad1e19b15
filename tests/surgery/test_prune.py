"""`prune`: what goes, what stays and why, and that nothing else changes."""

import copy
from functools import partial

import pytest
import torch
import torchvision
from torch import nn
from torch.nn.utils.parametrize import register_parametrization
from torch.nn.utils.prune import l1_unstructured

from slimconv_lit import SlimConv2d, apply_plan, create_backbone, plans_of, prune, slimify
from slimconv_lit.backbones.cifar_densenet import CifarDenseNet
from slimconv_lit.backbones.cifar_preresnet import CifarPreResNet
from slimconv_lit.ops import CompactConv2d, GhostConv2d, OctConv2d, SCConv2d, SEConv2d, SKConv2d, SPConv2d
from slimconv_lit.surgery import apply_plans, prunable_norms
from tests.surgery.masking import apart, check_pruned, masked_by, randomise

IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def chain(*layers):
    """Convolution, norm, `layers`, convolution, norm, pooling, linear; 24 channels at first."""
    torch.manual_seed(0)
    head = [nn.Conv2d(24, 8, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, 5)]
    return randomise(nn.Sequential(nn.Conv2d(3, 24, 3, padding=1), nn.BatchNorm2d(24), *layers, *head))


def tensors(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def unchanged(model, before, modules):
    after = model.state_dict()
    same = after.keys() == before.keys() and all(torch.equal(after[name], value) for name, value in before.items())
    return same and [type(m) for m in model.modules()] == modules


# ---- what goes ---------------------------------------------------------------------------------------------------


def test_the_smallest_scales_of_the_whole_network_go():
    model = chain(nn.ReLU())
    original, gammas = copy.deepcopy(model), torch.cat([model[1].weight, model[4].weight]).detach().abs()
    report = prune(model, 0.5, min_channels=1)
    assert (report.pruned, report.scales) == (16, 32)
    kept = torch.cat([model[1].weight, model[4].weight]).detach().abs()
    assert torch.equal(kept.sort().values, gammas.sort().values[16:])
    assert {row.layer: row.now for row in report.rows} == {
        "1": model[1].num_features, "4": model[4].num_features, "8": 5
    }  # fmt: skip
    assert report.left == {"8": "the network returns it"}
    assert model[0].weight.shape[0] == model[3].weight.shape[1] == model[1].num_features
    # A linear layer behind a flattened map reads each channel four times.
    assert model[8].in_features == 4 * model[4].num_features
    check_pruned(original, report, IMAGES)
    assert "16 of 32 scales pruned (50.0%), 50.0% asked for" in str(report)


def test_per_layer_limits_hold_and_are_said():
    model = chain(nn.ReLU())
    model[1].weight.data.mul_(0.01)
    report = prune(copy.deepcopy(model), 0.75, max_ratio_per_layer=0.5, min_channels=6)
    rows = {row.layer: row for row in report.rows}
    assert (rows["1"].now, rows["4"].now) == (12, 8)
    assert rows["1"].why == "min_channels=6 and max_ratio_per_layer=0.5 keep 12 of 24"
    # The paper's rule alone would empty the layer; one channel stays.
    report = prune(copy.deepcopy(model), 0.75, max_ratio_per_layer=1, min_channels=1)
    assert report.rows[0].now == 1
    assert "keep 1 of 24" in report.rows[0].why


def test_ratio_zero_changes_nothing():
    model = chain(nn.ReLU())
    before, modules = tensors(model), [type(m) for m in model.modules()]
    report = prune(model, 0)
    assert report.pruned == 0
    assert report.plan == {"kept": {}, "selected": {}, "operators": {}, "was": {}, "after": {}}
    assert unchanged(model, before, modules)


def test_include_exclude_and_gates():
    model = chain(nn.ReLU(), SlimConv2d(24), nn.ReLU(), nn.Conv2d(18, 24, 1), nn.BatchNorm2d(24), nn.ReLU())
    assert all(
        row.now == row.was for row in prune(copy.deepcopy(model), 0.5, exclude=["1", "3.top.*"]).rows
        if row.layer in ("1", "3.top.1", "3.gate.norm")
    )  # fmt: skip
    report = prune(copy.deepcopy(model), 0.5, include="6")
    assert [row.layer for row in report.rows if row.now < row.was] == ["6"]
    assert "left out" in report.left["1"]
    with pytest.raises(ValueError, match=r"include='bn\*' matches no batch norm"):
        prune(model, 0.5, include="bn*")


@pytest.mark.parametrize("n", [2, 3, 4, 5])
@pytest.mark.parametrize("channels", [24, 26, 31])
@pytest.mark.parametrize("arrangement", ["flip", "none", "only_flip"])
def test_slim_conv_inputs_go_by_orbits(n, channels, arrangement):
    torch.manual_seed(0)
    slim = SlimConv2d(channels, k=2 * n / 3, arrangement=arrangement)
    model = nn.Sequential(nn.Conv2d(3, channels, 1), nn.BatchNorm2d(channels), nn.ReLU(), slim, nn.ReLU())
    model.append(nn.Conv2d(slim.out_channels, 6, 1))
    randomise(model)
    original = copy.deepcopy(model)
    report = prune(model, 0.5, min_channels=1)
    check_pruned(original, report, IMAGES)
    kept = set(report.plan["kept"].get("1", {}).get("output", range(channels)))
    width = channels // n
    for i in kept:
        assert arrangement == "none" or channels - 1 - i in kept
        assert i >= n * width or all((i + f * width) % (n * width) in kept for f in range(n))
    if (n, channels, arrangement) in [(2, 24, "flip"), (3, 24, "flip"), (2, 26, "none"), (4, 31, "none")]:
        assert n * 1 <= len(kept) < channels
    assert (model[3].in_channels, model[3].out_channels) == (len(kept), model[5].in_channels)
    assert model[3].gate.squeeze.in_channels == model[3].gate.excite.out_channels == len(kept)
    # What it writes is the next layer's, and goes channel by channel.
    assert model[3].out_channels == model[3].top[1].num_features + model[3].bottom[4].num_features < slim_width(slim, n)


def slim_width(slim, n):
    return 31 // n + 31 // (2 * n) + 1


def test_depthwise_and_grouped_convolutions_stay_whole():
    model = chain(
        nn.ReLU(), nn.Conv2d(24, 48, 3, groups=24), nn.BatchNorm2d(48), nn.Hardswish(),
        nn.Conv2d(48, 24, 3, groups=4), nn.BatchNorm2d(24), nn.ReLU(),
    )  # fmt: skip
    original = copy.deepcopy(model)
    report = prune(model, 0.4)
    check_pruned(original, report, IMAGES)
    assert model[3].groups == model[3].in_channels == model[0].out_channels < 24
    assert model[3].out_channels == 2 * model[3].in_channels
    assert model[6].groups == 4
    assert model[6].out_channels % 4 == 0
    assert model[6].in_channels % 4 == 0


@pytest.mark.parametrize("activation", [nn.Sigmoid(), nn.Softplus()])
def test_an_activation_that_makes_no_zero_of_zero_is_refused(activation):
    report = prune(chain(activation), 0.5)
    assert report.left["1"] == "3 reads it past the norm, or through an activation that makes no zero of zero"
    assert report.pruned == 4


def test_what_is_not_followed_is_left_with_a_reason():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.bn = nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8)
            self.b, self.group = nn.Conv2d(8, 8, 1), nn.GroupNorm(2, 8)
            self.c, self.bn_c = nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8)
            self.d, self.bn_d, self.unused = nn.Conv2d(8, 4, 1), nn.BatchNorm2d(4), nn.BatchNorm2d(3)

        def forward(self, x):
            x = self.group(self.b(self.bn(self.a(x)).softmax(1)))
            for _ in range(2):
                x = self.bn_c(self.c(x))
            return self.bn_d(self.d(x))

    report = prune(randomise(Odd()), 0.5)
    assert report.pruned == 0
    assert report.left["bn"] == "it goes into softmax in the network"
    assert report.left["bn_c"] == "bn_c is used more than once"
    assert report.left["bn_d"] == "the network returns it"
    assert report.left["unused"] == "never ran in the traced forward pass"


class Gain(nn.BatchNorm2d):
    def __init__(self, channels):
        super().__init__(channels)
        self.gain = nn.Parameter(torch.linspace(0.5, 1, channels))

    def forward(self, x):
        return super().forward(x) * self.gain[:, None, None]


def masked_norm(channels):
    # With a gradient, what it computes could not be copied by this test either.
    return l1_unstructured(nn.BatchNorm2d(channels).requires_grad_(False), "weight", 0.3)


def positive_norm(channels):
    norm = nn.BatchNorm2d(channels)
    register_parametrization(norm, "weight", nn.Softplus())
    return norm


@pytest.mark.parametrize(
    ("part", "why"),
    [
        (lambda: nn.Sequential(nn.BatchNorm2d(24), nn.PReLU(24)), "with values of its own for each channel"),
        (lambda: Gain(24), "it has a tensor of its own, gain"),
        (lambda: masked_norm(24), "its scales are computed from other parameters"),
        (lambda: positive_norm(24), "its scales are computed from other parameters"),
    ],
)
def test_what_has_tensors_of_its_own_is_left_alone(part, why):
    model = chain(nn.ReLU(), nn.Conv2d(24, 24, 1), part(), nn.ReLU())
    original = copy.deepcopy(model)
    report = prune(model, 0.3)
    assert any(why in left for name, left in report.left.items() if name.startswith("4")), report
    assert model[0].out_channels < 24
    with torch.no_grad():
        assert apart(masked_by(original, report.plan)(IMAGES), model(IMAGES)) <= 1e-5


def test_a_random_order_stays_whole():
    # In this order some channels hang together, but not all.
    slim = SlimConv2d(8, arrangement="shuffle", seed=22)
    model = chain(
        nn.ReLU(), nn.Conv2d(24, 8, 1), nn.BatchNorm2d(8), nn.ReLU(), slim, nn.Conv2d(slim.out_channels, 24, 1)
    )
    original = copy.deepcopy(model)
    report = prune(model, 0.5, min_channels=1, max_ratio_per_layer=1)
    assert "reordered" in report.left["4"]
    check_pruned(original, report, IMAGES)


# ---- streams -----------------------------------------------------------------------------------------------------


def test_coupled_streams_narrow_the_whole_network():
    model = randomise(torchvision.models.resnet18(num_classes=10))
    original = copy.deepcopy(model)
    report = prune(model, 0.5, streams="coupled")
    assert report.pruned == pytest.approx(report.scales / 2, abs=8)
    assert list(report.left) == ["fc"]
    first = model.layer1
    assert model.conv1.out_channels == first[0].conv2.out_channels == first[1].conv2.out_channels < 64
    check_pruned(original, report, torch.randn(2, 3, 64, 64))


@pytest.mark.parametrize(("name", "count"), [("vgg19", 5_504), ("preresnet164", 12_112), ("densenet40", 9_048)])
def test_scales_of_the_papers_networks(name, count):
    model = create_backbone(f"cifar_{name}", num_classes=10, without_weights=True)
    assert sum(norm.weight.numel() for norm in prunable_norms(model).values()) == count


@pytest.mark.parametrize(
    ("build", "scales"), [(partial(CifarPreResNet, 20), 1360), (partial(CifarDenseNet, 13), 840)], ids=["pre", "dense"]
)
def test_selection_is_the_papers_way_and_can_be_repeated(build, scales):
    torch.manual_seed(0)
    model = randomise(build(num_classes=10))
    original = copy.deepcopy(model)
    report = prune(model, 0.4, streams="select", min_channels=1)
    assert (report.scales, report.pruned) == (scales, int(0.4 * scales))
    check_pruned(original, report, IMAGES)
    # The stream keeps its width.
    assert model.fc.in_features < original.fc.in_features
    again = prune(model, 0.3, streams="select", min_channels=1)
    assert again.scales == scales - report.pruned
    assert sum(type(m).__name__ == "ChannelSelection" for m in model.modules()) == len(
        set(report.plan["selected"]) | {n.removesuffix(".norm") for n in again.plan["selected"]}
    )
    follower = copy.deepcopy(original)
    for plan in (report.plan, again.plan):
        apply_plan(follower, plan)
    with torch.no_grad():
        assert torch.equal(follower(IMAGES), model.eval()(IMAGES))
    model.train()(IMAGES).square().mean().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_names_from_before_a_selection_are_understood():
    model = randomise(CifarDenseNet(13))
    assert prune(model, 0.2, streams="select", include="features.*.bn").pruned
    again = prune(model, 0.2, streams="select", include="features.*.bn", exclude="features.0.bn")
    assert again.pruned
    assert "left out" in again.left["features.0.bn.norm"]
    with pytest.raises(ValueError, match=r"include='zzz' matches no batch norm; known: .* and \d+ more$"):
        prune(chain(*(nn.BatchNorm2d(24) for _ in range(20))), 0.2, include="zzz")


def test_keeping_streams_says_so():
    report = prune(randomise(CifarDenseNet(13)), 0.5)
    assert report.pruned == 0
    assert report.left["features.0.bn"] == "it reads a stream, which keeps its width"


# ---- operators ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("operator", "inputs", "outputs"),
    [
        (SlimConv2d, True, True),
        (partial(SlimConv2d, arrangement="shuffle"), "split or reordered by slice", True),
        (CompactConv2d, True, True),
        (partial(CompactConv2d, layout="halves", join="difference"), True, True),
        (GhostConv2d, True, True),
        (SEConv2d, True, True),
        (SKConv2d, True, True),
        (SPConv2d, "split or reordered by slice", True),
        (OctConv2d, "split or reordered by slice", True),
        (SCConv2d, "goes into native_group_norm", True),
        (partial(SCConv2d, order="C"), "split or reordered by slice", True),
    ],
    ids=str,
)
def test_operators_are_exact_or_refused(operator, inputs, outputs):
    torch.manual_seed(0)
    built = operator(24, 24, 3)
    model = chain(nn.ReLU(), built, nn.ReLU(), nn.Conv2d(built.out_channels, 24, 1), nn.BatchNorm2d(24), nn.ReLU())
    original = copy.deepcopy(model)
    report = prune(model, 0.5, min_channels=1)
    check_pruned(original, report, IMAGES)
    if inputs is True:
        assert model[0].out_channels < 24
    else:
        assert inputs in report.left["1"]
    assert (model[5].in_channels < built.out_channels or model[3].out_channels < original[3].out_channels) is outputs
    assert model[3].in_channels == model[0].out_channels
    assert model[3].out_channels == model[5].in_channels


# ---- all or nothing ----------------------------------------------------------------------------------------------


def test_a_failed_proof_leaves_the_network_as_it_was_and_names_the_layer(monkeypatch):
    model = chain(nn.ReLU(), nn.Conv2d(24, 24, 3), nn.BatchNorm2d(24), nn.ReLU())
    randomise(slimify(model, min_channels=8).model)
    before, modules = tensors(model), [type(m) for m in model.modules()]
    real = prune.__globals__["make_plan"]

    def wrong(*args):
        plan = real(*args)
        read = plan["kept"]["6"]["input"]
        plan["kept"]["6"]["input"] = [(i + 1) % 18 for i in read]
        return plan

    monkeypatch.setitem(prune.__globals__, "make_plan", wrong)
    with pytest.raises(ValueError, match=r"first at 6; the network is unchanged"):
        prune(model, 0.5)
    assert unchanged(model, before, modules)

    def lossy(*args):
        plan = real(*args)
        plan["kept"]["6"]["input"].pop()
        return plan

    monkeypatch.setitem(prune.__globals__, "make_plan", lossy)
    with pytest.raises(ValueError, match=r"the pruned network is not the masked one.*RuntimeError"):
        prune(model, 0.5)
    assert unchanged(model, before, modules)


@pytest.mark.parametrize("ratio", [-0.1, 1, 1.5])
def test_bad_ratio(ratio):
    with pytest.raises(ValueError, match=f"ratio={ratio} is not at least 0 and below 1"):
        prune(chain(), ratio)


def test_bad_input():
    with pytest.raises(ValueError, match="no batch norm with scales"):
        prune(torchvision.models.squeezenet1_1(num_classes=3), 0.5)
    with pytest.raises(ValueError, match="min_channels=0"):
        prune(chain(), 0.5, min_channels=0)
    with pytest.raises(ValueError, match=r"max_ratio_per_layer=1\.5"):
        prune(chain(), 0.5, max_ratio_per_layer=1.5)
    with pytest.raises(ValueError, match=r"could not be traced.*give an example_input"):
        prune(nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(7, 2)), 0.5)
    sick = chain()
    sick[1].running_var.fill_(float("nan"))
    with pytest.raises(ValueError, match="not finite"):
        prune(sick, 0.5)


@pytest.mark.parametrize(
    "head",
    [
        lambda y: {"logits": y, "classes": y.argmax(1), "sure": y > 0},
        lambda y: (y, y.new_zeros(0, 4)),
        lambda y: y.argmax(1),
        # The last digit decides.
        lambda y: (y, (y * 1e9).sin() > 0),
    ],
)
def test_integers_and_empty_tensors_do_not_stand_in_the_way(head):
    class Head(nn.Module):
        def forward(self, x):
            return head(x)

    # Behind a sum over many channels, a pruned network rounds otherwise than a masked one.
    model = chain(nn.ReLU(), nn.Conv2d(24, 24, 3), nn.BatchNorm2d(24), nn.ReLU())
    model.append(Head())
    assert prune(model, 0.5).pruned


def test_integers_alone_prove_nothing(monkeypatch):
    class Above(nn.Module):
        def forward(self, x):
            return x > -1000

    model, real = chain(nn.ReLU()).append(Above()), prune.__globals__["make_plan"]

    def wrong(*args):
        plan = real(*args)
        plan["kept"]["3"]["input"] = [(i + 1) % 24 for i in plan["kept"]["3"]["input"]]
        return plan

    monkeypatch.setitem(prune.__globals__, "make_plan", wrong)
    with pytest.raises(ValueError, match="first at 3;"):
        prune(model, 0.5)


def test_a_compiled_network_is_proved_without_compiling():
    compiled = []
    model = chain(nn.ReLU())
    prune(torch.compile(model, backend=lambda *_: compiled.append(1)), 0.5)
    assert model[0].out_channels < 24
    assert compiled == []


def test_values_are_the_callers_where_random_ones_will_not_do():
    class Log(nn.Module):
        def forward(self, x):
            return x.log()

    model = nn.Sequential(Log(), *chain(nn.ReLU())).eval()
    with pytest.raises(ValueError, match=r"not finite.*give them as example_input"):
        prune(model, 0.5)
    assert prune(model, 0.5, example_input=IMAGES.abs() + 0.1).pruned


# ---- afterwards --------------------------------------------------------------------------------------------------


def test_a_plan_is_another_networks():
    report = prune(chain(nn.ReLU()), 0.5)
    other = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    before, modules = tensors(other), [type(m) for m in other.modules()]
    with pytest.raises(ValueError, match=r"plan is another network's: 0 should have .* it has 4"):
        apply_plan(other, report.plan)
    with pytest.raises(ValueError, match="there is no such layer"):
        apply_plan(nn.Sequential(), report.plan)
    assert unchanged(other, before, modules)
    wider = chain(nn.ReLU())
    wider[3] = nn.Conv2d(28, 8, 1)
    with pytest.raises(ValueError, match=r"3 should have 24 channels; it has 28"):
        apply_plan(wider, report.plan)
    # A plan from before that was noted.
    older = {key: report.plan[key] for key in ("kept", "selected", "operators")}
    fresh = chain(nn.ReLU())
    apply_plan(fresh, older)
    assert fresh[0].out_channels == len(older["kept"]["0"]["output"])


def test_parts_and_the_whole_may_be_pruned_in_turn():
    def build():
        part = nn.Sequential(*chain(nn.ReLU())[:6])
        last = [nn.Conv2d(8, 12, 1), nn.BatchNorm2d(12), nn.ReLU(), nn.Conv2d(12, 5, 1)]
        return randomise(nn.Sequential(part, *last))

    model = build()
    for what in (model[0], model, model[0], model):
        assert prune(what, 0.3, min_channels=1).pruned
    plans = plans_of(model)
    assert {name: len(plan) for name, plan in plans.items()} == {"": 2, "0": 2}
    fresh = build()
    take_back = apply_plans(fresh, plans)
    fresh.load_state_dict(model.state_dict())
    with torch.no_grad():
        assert torch.equal(fresh(IMAGES), model(IMAGES))
    assert plans_of(fresh) == plans
    # What has been done is not done again, and all of it can be taken back.
    apply_plans(fresh, plans)
    assert plans_of(fresh) == plans
    take_back()
    assert plans_of(fresh) == {}
    assert fresh[0][0].out_channels == 24


def test_a_plan_and_weights_are_enough_to_go_on(tmp_path):
    torch.manual_seed(0)
    model = randomise(create_backbone("cifar_preresnet20", "SlimConv2d", num_classes=10))
    report = prune(model, 0.5, streams="select")
    torch.save({"plan": report.plan, "weights": model.state_dict()}, tmp_path / "pruned.pt")
    saved = torch.load(tmp_path / "pruned.pt", weights_only=True)
    fresh = create_backbone("cifar_preresnet20", "SlimConv2d", num_classes=10).eval()
    apply_plan(fresh, saved["plan"])
    fresh.load_state_dict(saved["weights"])
    with torch.no_grad():
        wanted = model.eval()(IMAGES)
        assert torch.equal(fresh(IMAGES), wanted)
        torch.testing.assert_close(torch.export.export(fresh, (IMAGES,)).module()(IMAGES), wanted)


def test_dtype_memory_format_and_mode_carry_over():
    model = chain(nn.ReLU()).to(torch.bfloat16).to(memory_format=torch.channels_last).train()
    model[0].weight.requires_grad_(False)
    prune(model, 0.5)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert all(module.training for module in model.modules())
    assert model[3].weight.is_contiguous(memory_format=torch.channels_last)
    assert not model[0].weight.requires_grad
    assert model(IMAGES.bfloat16()).shape == (2, 5)
    double = chain(nn.ReLU()).double()
    assert prune(double, 0.5).difference < 1e-12


def test_randomness_is_left_as_it_was():
    model = chain(nn.ReLU(), nn.Dropout())
    torch.manual_seed(3)
    wanted = torch.rand(4)
    torch.manual_seed(3)
    prune(model, 0.5)
    assert torch.equal(torch.rand(4), wanted)


def test_masked_by_is_no_copy_of_the_pruned_network():
    """The reference of these tests tells a wrongly pruned network from a right one."""
    model = chain(nn.ReLU())
    original = copy.deepcopy(model)
    plan = prune(model, 0.5).plan
    model[3].weight.data = model[3].weight.data.flip(1)
    with torch.no_grad():
        assert apart(masked_by(original, plan)(IMAGES), model(IMAGES)) > 1e-3
