import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from slimconv_lit import SlimConv2d
from tests.ops import reference

ARRANGEMENTS = ["flip", "none", "only_flip", "shuffle", "shuffle_3b"]
FIG8 = [4 / 3, "2", "8/3", 10 / 3, 4, "14/3", 16 / 3]


def relative(got, wanted):
    return ((got.double() - wanted).norm() / wanted.norm().clamp_min(1e-30)).item()


def randomised(operator):
    """Norms away from one and zero, so that a test sees them."""
    for module in operator.modules():
        if isinstance(module, (nn.BatchNorm2d, nn.GroupNorm)):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias)
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 1.5)
    return operator


@pytest.mark.parametrize("folds", range(2, 9))
@pytest.mark.parametrize("arrangement", ARRANGEMENTS)
def test_equals_the_equations_forward_and_backward(arrangement, folds):
    torch.manual_seed(folds)
    for host in ("dense", "odd", "grouped", "depthwise"):
        channels = 4 * folds + (3 if host == "odd" else 0)
        groups = {"dense": 1, "odd": 1, "grouped": 2, "depthwise": channels}[host]
        for stride, dilation, training in ((1, 1, True), (2, 1, False), (1, 2, False), (2, 2, True)):
            operator = SlimConv2d(
                channels, stride=stride, dilation=dilation, groups=groups, k=2 * folds / 3, arrangement=arrangement,
                min_hidden=3, seed=folds,
            )  # fmt: skip
            randomised(operator).train(training)
            x = torch.randn(4, channels, 7, 6, dtype=torch.float64)
            weight = torch.randn(4, operator.out_channels, *((4, 3) if stride == 2 else (7, 6)), dtype=torch.float64)
            top, bottom = channels // folds, channels // (2 * folds)
            path_groups = (top, bottom) if host == "depthwise" else (groups, groups)

            state = {name: value.double() if value.is_floating_point() else value
                     for name, value in operator.state_dict().items()}  # fmt: skip
            learned = {name: state[name].clone().requires_grad_() for name, _ in operator.named_parameters()}
            wanted_x = x.clone().requires_grad_()
            wanted = reference.slim_conv(
                wanted_x, {**state, **learned}, folds, arrangement, stride, dilation, *path_groups, training
            )
            wanted_grads = torch.autograd.grad((wanted * weight).sum(), [wanted_x, *learned.values()])

            for dtype, tolerance in ((torch.float64, 1e-10), (torch.float32, 1e-5)):
                ours = copy.deepcopy(operator).to(dtype)
                our_x = x.to(dtype).requires_grad_()
                got = ours(our_x)
                assert got.shape == wanted.shape
                assert relative(got, wanted) < tolerance
                grads = torch.autograd.grad((got * weight.to(dtype)).sum(), [our_x, *ours.parameters()])
                # One norm over all gradients: some single ones cancel to zero in exact arithmetic.
                flat_got = torch.cat([g.double().flatten() for g in grads])
                flat_wanted = torch.cat([g.flatten() for g in wanted_grads])
                assert relative(flat_got, flat_wanted) < tolerance, (host, stride, dilation, dtype)


@settings(max_examples=60)
@given(
    folds=st.integers(2, 8),
    per_group=st.integers(1, 3),
    groups=st.sampled_from([1, 2, "depthwise"]),
    kernel=st.one_of(st.integers(1, 7), st.tuples(st.integers(1, 5), st.integers(1, 5))),
    stride=st.integers(1, 3),
    dilation=st.integers(1, 3),
    size=st.tuples(st.integers(5, 12), st.integers(5, 12)),
)
def test_writes_a_kth_at_the_size_of_its_host(folds, per_group, groups, kernel, stride, dilation, size):
    count = groups if isinstance(groups, int) else 1
    channels = 2 * folds * per_group * count
    host_groups = channels if groups == "depthwise" else count
    operator = SlimConv2d(channels, channels, kernel, stride, dilation, host_groups, k=2 * folds / 3).eval()
    pad = tuple(dilation * (n // 2) for n in ((kernel, kernel) if isinstance(kernel, int) else kernel))
    host = nn.Conv2d(channels, channels, kernel, stride, pad, dilation, host_groups)
    x = torch.randn(2, channels, *size)
    assert operator(x).shape == (2, operator.out_channels, *host(x).shape[2:])
    assert operator.out_channels == channels // folds + channels // (2 * folds)


@pytest.mark.parametrize("k", FIG8)
def test_k_as_number_or_text(k):
    number = eval(k) if isinstance(k, str) else k
    assert SlimConv2d(64, k=k).out_channels == 64 // round(number * 1.5) + 64 // (2 * round(number * 1.5))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"k": 1.5}, ["k=1.5", "4/3", "2 (n=3)"]),
        ({"k": "7/5"}, ["k=7/5", "4/3", "2"]),
        ({"k": 0.5}, ["k=0.5", "4/3"]),
        ({"k": -2}, ["k=-2", "4/3"]),
        ({"k": float("nan")}, ["k=nan", "4/3"]),
        ({"k": "thin"}, ["k='thin'", "8/3"]),
        ({"k": "1/0"}, ["k='1/0'", "8/3"]),
        ({"in_channels": 3}, ["in_channels=3", "k=4/3", "in_channels=4"]),
        ({"in_channels": 8, "k": 4}, ["in_channels=8", "in_channels=12", "k <= 8/3"]),
        ({"groups": 3}, ["groups=3", "2 or 4"]),
        ({"in_channels": 96, "groups": 32, "k": 2}, ["groups=32", "8 or 16"]),
        ({"arrangement": "flipped"}, ["arrangement='flipped'", "'flip'"]),
        ({"reduction": 0}, ["reduction=0", "at least 1"]),
        ({"reduction": 2.5}, ["reduction=2.5", "whole number of at least 1"]),
        ({"min_hidden": 0}, ["min_hidden=0", "whole number of at least 1"]),
        ({"bottom_groups": 0}, ["bottom_groups=0", "nearest: 1"]),
        ({"kernel_size": 0}, ["kernel_size=0", "whole number of at least 1"]),
    ],
)
def test_bad_arguments_are_named_with_a_way_out(arguments, words):
    with pytest.raises(ValueError) as error:  # noqa: PT011 - the words are checked one by one
        SlimConv2d(**{"in_channels": 64, **arguments})
    for word in words:
        assert word in str(error.value)


def test_what_it_announces_about_a_width_works():
    with pytest.raises(ValueError, match="in_channels=12"):
        SlimConv2d(8, k=4)
    assert SlimConv2d(12, k=4).out_channels == 3
    assert SlimConv2d(8, k="8/3").out_channels == 3


def test_groups_differ_between_the_paths_of_the_32x3d_network():
    operator = SlimConv2d(96, groups=32, k=2, bottom_groups=16)
    assert (operator.top[0].groups, operator.bottom[3].groups) == (32, 16)
    assert operator(torch.randn(2, 96, 5, 5)).shape == (2, 48, 5, 5)


@pytest.mark.parametrize("arrangement", ARRANGEMENTS)
def test_trains_on_one_image_and_leaves_the_gate_statistics_alone(arrangement):
    operator = randomised(SlimConv2d(64, arrangement=arrangement)).train()
    before = operator.gate.norm.running_mean.clone()
    operator(torch.randn(1, 64, 5, 5)).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in operator.parameters())
    assert torch.equal(operator.gate.norm.running_mean, before)
    operator(torch.randn(2, 64, 5, 5))
    assert not torch.equal(operator.gate.norm.running_mean, before)


def test_one_image_sees_the_same_gate_in_training_as_in_evaluation():
    gate = randomised(SlimConv2d(64)).gate
    x = torch.randn(1, 64, 5, 5)
    torch.testing.assert_close(gate.train()(x), gate.eval()(x))


def test_random_order_comes_from_the_seed_and_travels_in_the_state_dict():
    first, second = SlimConv2d(64, arrangement="shuffle", seed=1), SlimConv2d(64, arrangement="shuffle", seed=2)
    assert torch.equal(first.order, SlimConv2d(64, arrangement="shuffle", seed=1).order)
    assert sorted(first.order.tolist()) == list(range(64))
    assert not torch.equal(first.order, second.order)
    second.load_state_dict(first.state_dict())
    x = torch.randn(2, 64, 5, 5)
    assert torch.equal(first.eval()(x), second.eval()(x))


def test_flipping_is_what_tells_the_arrangements_apart():
    """Table X: with w reversed throughout, the plain and the only-flipped network trade places."""
    flipped = SlimConv2d(32, arrangement="only_flip").eval()
    plain = SlimConv2d(32, arrangement="none").eval()
    state = flipped.state_dict()
    state["gate.excite.weight"] = state["gate.excite.weight"].flip(0)
    state["gate.excite.bias"] = state["gate.excite.bias"].flip(0)
    plain.load_state_dict(state)
    x = torch.randn(2, 32, 6, 6)
    torch.testing.assert_close(flipped(x), plain(x))


def test_runs_under_autocast_and_in_channels_last():
    operator = SlimConv2d(64, k="8/3").eval()
    x = torch.randn(2, 64, 9, 9)
    plain = operator(x)
    last = operator.to(memory_format=torch.channels_last)(x.to(memory_format=torch.channels_last))
    torch.testing.assert_close(last, plain, rtol=1e-4, atol=1e-5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = operator(x)
    assert (low.float() - plain).norm() / plain.norm() < 0.05


def test_exports_with_a_dynamic_batch():
    operator = randomised(SlimConv2d(32, k=2)).eval()
    program = torch.export.export(
        operator, (torch.randn(3, 32, 8, 8),), dynamic_shapes=({0: torch.export.Dim("b"), 2: torch.export.Dim("h")},)
    )
    x = torch.randn(5, 32, 10, 8)
    torch.testing.assert_close(program.module()(x), operator(x))
