"""What holds for every operator but SlimConv, which has a file of its own: equations, sizes, messages."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from slimconv_lit import ops, substitute
from slimconv_lit.ops import (
    CompactConv2d,
    GhostConv2d,
    HighLowConv2d,
    OctConv2d,
    SCConv2d,
    SEConv2d,
    SKConv2d,
    SPConv2d,
    describe_operator,
    resolve_operator,
)
from tests.ops import reference
from tests.ops.test_slim_conv import randomised, relative

# By name: the operator, what its reference takes besides, and the groups that the host may have.
OPERATORS = {
    "ghost": (GhostConv2d, {}, reference.ghost, {}, (1, 2)),
    "sp": (SPConv2d, {"ratio": "1/4"}, reference.sp_conv, {"heavy": 4}, (1,)),
    "sk": (SKConv2d, {"reduction": 4, "min_hidden": 2}, reference.select_kernel, {}, (1, 2, 16)),
    "se": (SEConv2d, {"reduction": 4}, reference.se_conv, {}, (1, 2, 16)),
    "oct": (OctConv2d, {"alpha": 0.25}, reference.oct_conv, {"low_width": 4}, (1, 2, 16)),
    "sc": (SCConv2d, {}, reference.sc_conv, {}, (1,)),
    "compact": (CompactConv2d, {}, reference.compact_conv, {}, (1, 16)),
}
CLASSES = [entry[0] for entry in OPERATORS.values()]


def doubles(operator):
    return {n: v.double() if v.is_floating_point() else v for n, v in operator.state_dict().items()}


@pytest.mark.parametrize("groups", [1, 2, 16])
@pytest.mark.parametrize("name", OPERATORS)
def test_equals_the_equations_forward_and_backward(name, groups):
    cls, own, equations, extra, host_groups = OPERATORS[name]
    if groups not in host_groups:
        with pytest.raises(ValueError, match=f"groups={groups}.*nearest"):
            cls(16, 16, groups=groups, **own)
        return
    torch.manual_seed(groups)
    for stride, dilation, training in ((1, 1, True), (2, 1, False), (1, 2, False), (2, 2, True)):
        operator = randomised(cls(16, 16, 3, stride, dilation, groups, **own)).train(training)
        arguments = {"stride": stride, "dilation": dilation, "training": training, **extra}
        if name not in ("sp", "sc"):
            arguments["groups"] = "depthwise" if name == "oct" and groups == 16 else groups
        x = torch.randn(3, 16, 7, 6, dtype=torch.float64, requires_grad=True)
        state = doubles(operator)
        learned = {n: state[n].clone().requires_grad_() for n, _ in operator.named_parameters()}
        wanted = equations(x, {**state, **learned}, **arguments)
        assert wanted.shape == (3, operator.out_channels, *((4, 3) if stride == 2 else (7, 6)))
        weight = torch.randn_like(wanted)
        wanted_grads = torch.autograd.grad((wanted * weight).sum(), [x, *learned.values()])

        for dtype, tolerance in ((torch.float64, 1e-10), (torch.float32, 2e-5)):
            ours, our_x = copy.deepcopy(operator).to(dtype), x.detach().to(dtype).requires_grad_()
            got = ours(our_x)
            assert relative(got, wanted) < tolerance
            grads = torch.autograd.grad((got * weight.to(dtype)).sum(), [our_x, *ours.parameters()])
            flat_got = torch.cat([g.double().flatten() for g in grads])
            flat_wanted = torch.cat([g.flatten() for g in wanted_grads])
            assert relative(flat_got, flat_wanted) < tolerance, (stride, dilation, dtype)


@settings(max_examples=60)
@given(
    cls=st.sampled_from(CLASSES),
    widths=st.tuples(st.sampled_from([8, 16, 24]), st.sampled_from([8, 16, 24])),
    kernel=st.one_of(st.sampled_from([1, 3, 5]), st.tuples(st.sampled_from([1, 3]), st.sampled_from([1, 5]))),
    stride=st.one_of(st.integers(1, 3), st.just((2, 1))),
    dilation=st.integers(1, 3),
    size=st.tuples(st.integers(5, 12), st.integers(5, 12)),
)
def test_stands_where_its_host_stood(cls, widths, kernel, stride, dilation, size):
    kernel_pair = (kernel, kernel) if isinstance(kernel, int) else kernel
    pad = tuple(dilation * (n // 2) for n in kernel_pair)
    host = nn.Conv2d(*widths, kernel, stride, pad, dilation)
    operator = cls(*widths, kernel, stride, dilation, 1, pad).eval()
    x = torch.randn(2, widths[0], *size)
    assert (operator.in_channels, operator.out_channels) == widths
    assert operator(x).shape == host(x).shape


@pytest.mark.parametrize("cls", [GhostConv2d, SKConv2d, SEConv2d, CompactConv2d])
def test_padding_and_even_kernels_are_as_the_host_has_them(cls):
    x = torch.randn(2, 8, 9, 9)
    for kernel, padding in ((3, 0), (2, 0), (4, (1, 2))):
        operator = cls(8, 8, kernel, padding=padding).eval()
        assert operator(x).shape == nn.Conv2d(8, 8, kernel, padding=padding)(x).shape


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: GhostConv2d(16, 15), ["s=2", "out_channels=15", "3 or 5"]),
        (lambda: GhostConv2d(16, 16, s=1), ["s=1", "2 or 4"]),
        (lambda: GhostConv2d(16, 7, s=3), ["s=3", "nearest: 7"]),
        (lambda: GhostConv2d(16, 16, groups=16), ["groups=16", "8 primary channels", "4 or 8"]),
        (lambda: SPConv2d(16, 16, groups=4), ["groups=4", "nearest: groups=1"]),
        (lambda: SPConv2d(16, 15), ["out_channels=15", "14 or 16"]),
        (lambda: SPConv2d(58, 58), ["ratio=0.5", "29 of in_channels=58", "14/29 or 15/29"]),
        (lambda: SPConv2d(16, 16, ratio=0), ["ratio=0", "1/8 or 1/4"]),
        (lambda: SPConv2d(16, 16, ratio=1), ["ratio=1", "3/4 or 7/8"]),
        (lambda: SPConv2d(2, 2), ["in_channels=2", "it takes 3 channels"]),
        (lambda: SPConv2d(16, 16, ratio="half"), ["ratio='half'", "'1/8'"]),
        (lambda: SPConv2d(16, 16, 2), ["kernel_size=2", "(1, 1) or (3, 3)"]),
        (lambda: SPConv2d(16, 16, padding=0), ["padding=0", "(1, 1)"]),
        (lambda: GhostConv2d(16, 16, 0), ["kernel_size=0", "whole number of at least 1"]),
        (lambda: CompactConv2d(16, 16, (3, 0)), ["kernel_size=(3, 0)", "whole number of at least 1"]),
        (lambda: OctConv2d(16, 16, 0), ["kernel_size=0", "whole number of at least 1"]),
        (lambda: SKConv2d(16, 16, reduction=2.5), ["reduction=2.5", "whole number of at least 1"]),
        (lambda: SKConv2d(16, 16, reduction=0), ["reduction=0", "at least 1"]),
        (lambda: SEConv2d(16, 16, reduction=0), ["reduction=0", "at least 1"]),
        (lambda: OctConv2d(16, 16, alpha=1), ["alpha=1", "below 1"]),
        (lambda: OctConv2d(16, 16, alpha="1/0"), ["alpha='1/0'", "'1/8'"]),
        (lambda: OctConv2d(4, 16, alpha=0.1), ["alpha=0.1", "low resolution", "1/4"]),
        (lambda: OctConv2d(1, 1), ["alpha=0.5", "it takes 2 channels"]),
        (lambda: OctConv2d(16, 16, groups=3), ["groups=3", "2 or 4"]),
        (lambda: OctConv2d(16, 16, (3, 4)), ["kernel_size=(3, 4)", "(3, 3) or (3, 5)"]),
        (lambda: OctConv2d(16, 16, dilation=2, padding=1), ["padding=1", "(2, 2)"]),
        (lambda: HighLowConv2d(16, 16, alpha_in=-0.5), ["alpha_in=-0.5", "nearest: 0"]),
        (lambda: SCConv2d(16, 16, order="S-C"), ["order='S-C'", "'S+C'"]),
        (lambda: SCConv2d(16, 16, gate="harder"), ["gate='harder'", "'hard'"]),
        (lambda: SCConv2d(16, 16, variant="table3"), ["variant='table3'", "'tables_1_3'"]),
        (lambda: SCConv2d(16, 16, threshold=1), ["threshold=1", "between 0 and 1"]),
        (lambda: SCConv2d(16, 16, groups=4), ["groups=4", "nearest: groups=1"]),
        (lambda: SCConv2d(16, 16, 4), ["kernel_size=4", "(3, 3) or (5, 5)"]),
        (lambda: SCConv2d(16, 16, padding=0), ["padding=0", "(1, 1)"]),
        (lambda: SCConv2d(15, 16, order="S"), ["channels=15", "14 or 16"]),
        (lambda: SCConv2d(16, 16, norm_groups=3), ["norm_groups=3", "2 or 4"]),
        (lambda: SCConv2d(16, 32, order="parallel"), ["order='parallel'", "out_channels=32", "'S+C'"]),
        (lambda: SCConv2d(12, 16), ["in_channels=12 to 3 upper", "alpha=1/3 or alpha=5/12"]),
        (lambda: SCConv2d(16, 16, alpha=0), ["alpha=0", "alpha=1/4"]),
        (lambda: SCConv2d(16, 16, alpha=1), ["alpha=1", "0 lower", "alpha=3/4"]),
        (lambda: SCConv2d(16, 16, reduction=0), ["reduction=0", "at least 1"]),
        (lambda: SCConv2d(4, 4, reduction=4), ["reduction=4", "nearest: none"]),
        (lambda: SCConv2d(64, 8), ["16 lower", "out_channels=8", "alpha=3/4 or alpha=49/64"]),
        (lambda: SCConv2d(16, 15), ["inner_groups=2", "out_channels=15", "nearest: 1"]),
        (lambda: CompactConv2d(16, 16, groups=4), ["groups=4", "nearest: groups=1 or groups=16"]),
        (lambda: CompactConv2d(15, 16), ["group_size=2", "in_channels=15", "1 or 3"]),
        (lambda: CompactConv2d(15, 15, groups=15), ["group_size=2", "out_channels=15", "1 or 3"]),
        (lambda: CompactConv2d(16, 16, join="maximum"), ["join='maximum'", "'max'"]),
        (lambda: CompactConv2d(16, 16, layout="half"), ["layout='half'", "'halves'"]),
        (lambda: CompactConv2d(16, 16, group_size=0), ["group_size=0", "at least 1"]),
    ],
)
def test_bad_arguments_are_named_with_a_way_out(build, words):
    with pytest.raises(ValueError) as error:  # noqa: PT011 - the words are checked one by one
        build()
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize("cls", CLASSES)
def test_an_image_alone_is_enough_to_train_on(cls):
    operator = cls(32, 32)
    operator(torch.randn(1, 32, 5, 5)).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in operator.parameters())


@pytest.mark.parametrize("cls", CLASSES)
def test_runs_in_low_precision_in_channels_last_and_exported(cls):
    torch.manual_seed(0)
    operator = randomised(cls(32, 32)).eval()
    x = torch.randn(3, 32, 9, 9)
    plain = operator(x)
    program = torch.export.export(operator, (x,), dynamic_shapes=({0: torch.export.Dim("b")},))
    torch.testing.assert_close(program.module()(x[:2]), plain[:2], rtol=1e-4, atol=1e-4)
    last = operator.to(memory_format=torch.channels_last)(x.to(memory_format=torch.channels_last))
    torch.testing.assert_close(last, plain, rtol=1e-4, atol=1e-4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert relative(operator(x), plain.double()) < 0.05


@pytest.mark.parametrize("cls", CLASSES)
def test_takes_the_place_of_convolutions_that_are_not_private(cls):
    class Residual(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.bn = nn.Conv2d(32, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32)

        def forward(self, x):
            return x + self.bn(self.conv(x))

    model = nn.Sequential(nn.Conv2d(3, 32, 1), Residual(), nn.Conv2d(32, 4, 1))
    assert substitute(model, cls).replaced == ["1.conv"]
    assert isinstance(model[1].conv, cls)
    assert isinstance(model[1].bn, nn.Identity)
    assert model(torch.randn(2, 3, 8, 8)).shape == (2, 4, 8, 8)


@pytest.mark.parametrize("unpooled", [False, True])
@pytest.mark.parametrize("alphas", [(0, 0.25), (0.25, 0), (0, 0), (0.5, 0.25)])
def test_a_pair_may_lack_its_low_map(alphas, unpooled):
    for stride in (1, 2):
        conv = HighLowConv2d(16, 8, 3, stride, alpha_in=alphas[0], alpha_out=alphas[1], unpooled_cross=unpooled)
        low_in, low_out = int(16 * alphas[0]), int(8 * alphas[1])
        low = torch.randn(2, low_in, 4, 5) if low_in else None
        high, low = conv(torch.randn(2, 16 - low_in, 7, 9), low)
        assert high.shape == (2, 8 - low_out, *((7, 9) if stride == 1 else (4, 5)))
        assert low is None if not low_out else low.shape == (2, low_out, *((4, 5) if stride == 1 else (2, 3)))
        (high.sum() + (0 if low is None else low.sum())).backward()
        assert all(p.grad is not None for p in conv.parameters())


def test_at_a_stride_the_unpooled_low_map_has_the_size_already():
    """It is convolved as it stands, neither averaged nor scaled up."""
    conv = HighLowConv2d(8, 8, 3, 2, unpooled_cross=True).eval()
    for name, parameter in conv.named_parameters():
        if name in ("high_to_high.weight", "high_to_low.weight", "low_to_low.weight"):
            nn.init.zeros_(parameter)
    low = torch.randn(2, 4, 5, 5)
    high, _ = conv(torch.randn(2, 4, 10, 10), low)
    torch.testing.assert_close(high, conv.high_norm(conv.low_to_high(low)))


def test_a_class_is_found_by_its_own_module_or_one_that_has_it_and_by_no_other():
    class SlimConv2d(GhostConv2d):
        """Of the same name as ours."""

    here = f"{SlimConv2d.__module__}.{SlimConv2d.__qualname__}"
    assert resolve_operator(here).func is SlimConv2d
    for path in ("slimconv_lit.SlimConv2d", "slimconv_lit.ops.SlimConv2d", "slimconv_lit.ops.slim_conv.SlimConv2d"):
        assert resolve_operator(path).func is ops.SlimConv2d
        assert describe_operator(path)["class_path"] == "slimconv_lit.ops.slim_conv.SlimConv2d"
    with pytest.raises(ValueError, match=r"'SlimConv2d' may be slimconv_lit\.ops.* or tests\.ops.*; give the one"):
        resolve_operator("SlimConv2d")
    with pytest.raises(
        ValueError, match=r"there is no 'nowhere\.at\.all\.GhostConv2d'; .*'?slimconv_lit\.ops\.ghost\."
    ):
        resolve_operator("nowhere.at.all.GhostConv2d")
    # Or other tests would find two.
    SlimConv2d.__name__ = "Other"
