"""SCConv: its units alone and in every order against the equations, Eq. 11, and the decisions of its gate."""

import copy
from fractions import Fraction

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn

from slimconv_lit import create_backbone, substitute
from slimconv_lit.analysis import params
from slimconv_lit.ops import CRU, SRU, SCConv2d
from tests.ops import reference
from tests.ops.test_slim_conv import randomised, relative

ORDERS = ["S+C", "C+S", "parallel", "S", "C"]


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("gate", ["soft", "hard"])
def test_equals_the_equations_forward_and_backward(gate, order):
    torch.manual_seed(0)
    for alpha, variant, writes, stride, dilation, training in (
        ("1/2", "eq11", 16, 1, 1, True),
        ("3/4", "eq11", 24, 2, 1, False),
        ("1/2", "tables_1_3", 8, 1, 2, False),
        ("1/4", "tables_1_3", 16, 2, 2, True),
    ):
        writes = 16 if order == "parallel" else writes
        operator = SCConv2d(
            16, writes, stride=stride, dilation=dilation, order=order, gate=gate, alpha=alpha, variant=variant
        )
        randomised(operator).train(training)
        x = torch.randn(3, 16, 7, 6, dtype=torch.float64, requires_grad=True)
        state = {n: v.double() if v.is_floating_point() else v for n, v in operator.state_dict().items()}
        learned = {n: state[n].clone().requires_grad_() for n, _ in operator.named_parameters()}
        upper = int(16 * Fraction(alpha))
        wanted = reference.sc_conv(x, {**state, **learned}, order, upper, gate, stride, dilation, training)
        assert wanted.shape == (3, writes, *((4, 3) if stride == 2 else (7, 6)))
        weight = torch.randn_like(wanted)
        wanted_grads = torch.autograd.grad((wanted * weight).sum(), [x, *learned.values()])
        for dtype, tolerance in ((torch.float64, 1e-10), (torch.float32, 2e-5)):
            ours, our_x = copy.deepcopy(operator).to(dtype), x.detach().to(dtype).requires_grad_()
            got = ours(our_x)
            assert relative(got, wanted) < tolerance
            grads = torch.autograd.grad((got * weight.to(dtype)).sum(), [our_x, *ours.parameters()])
            flat_got = torch.cat([g.double().flatten() for g in grads])
            flat_wanted = torch.cat([g.flatten() for g in wanted_grads])
            assert relative(flat_got, flat_wanted) < tolerance, (alpha, variant, dtype)


@settings(max_examples=60)
@given(
    widths=st.tuples(st.sampled_from([16, 32, 64, 128]), st.sampled_from([16, 32, 64, 128])),
    alpha=st.sampled_from(["1/8", "1/4", "3/8", "1/2", "5/8", "3/4", "7/8"]),
    reduction=st.sampled_from([1, 2, 4]),
    groups=st.sampled_from([1, 2]),
    kernel=st.sampled_from([1, 3, 5]),
)
def test_weights_are_those_of_eq_11(widths, alpha, reduction, groups, kernel):
    c1, c2 = widths
    a, r, g, k = Fraction(alpha), reduction, groups, kernel
    low = (1 - a) * c1 / r
    assume((a * c1 / r) % g == 0 and low.denominator == 1 and low <= c2)
    unit = CRU(c1, c2, kernel, alpha=alpha, reduction=reduction, inner_groups=groups)
    eq11 = (a * c1) ** 2 / r + k**2 * a * c1 * c2 / (g * r) + a * c1 * c2 / r + ((1 - a) * c1) ** 2 / r
    assert sum(m.weight.numel() for m in unit.children()) == eq11 + low * (c2 - low)


def test_its_cost_at_the_defaults_and_of_the_variant():
    def weights(**own):
        return sum(m.weight.numel() for m in CRU(64, 64, **own).children())

    assert weights() == 1.8125 * 64**2
    assert weights(alpha="3/4") == 2.484375 * 64**2
    assert weights(variant="tables_1_3") == (1.8125 + 0.1875) * 64**2


def test_a_dense_block_may_write_the_lower_channels_alone():
    unit = CRU(128, 32)
    assert unit.pointwise_lower is None
    assert unit(torch.randn(2, 128, 5, 5)).shape == (2, 32, 5, 5)
    assert params(CRU(128, 32, variant="tables_1_3")) == params(unit)


def test_what_the_hard_gate_takes_from_one_half_it_gives_to_the_other():
    """Eq. 4: the two parts of x add up to x, whatever the gate decides."""
    torch.manual_seed(0)
    unit = randomised(SRU(16, gate="hard"))
    x = torch.randn(2, 16, 5, 5)
    rebuilt = unit(x)
    torch.testing.assert_close(rebuilt[:, :8] + rebuilt[:, 8:], x[:, :8] + x[:, 8:])
    informative = unit.logits(x) > unit.cut
    kept = torch.where(informative, x, 0)
    torch.testing.assert_close(rebuilt[:, :8], kept[:, :8] + (x - kept)[:, 8:])


@pytest.mark.parametrize("gate", ["soft", "hard"])
def test_the_scales_learn_whatever_the_gate(gate):
    unit = SRU(16, gate=gate)
    unit(torch.randn(2, 16, 5, 5)).square().sum().backward()
    assert unit.norm.weight.grad.abs().min() > 0
    assert unit.norm.bias.grad.abs().min() > 0


@pytest.mark.parametrize("channels", [64, 256, 2048])
def test_bfloat16_decides_as_float32_does(channels):
    torch.manual_seed(0)
    low = randomised(SRU(channels)).bfloat16()
    full = copy.deepcopy(low).float()
    x = torch.randn(2, channels, 8, 8, dtype=torch.bfloat16)
    mask = low.logits(x) > low.cut
    assert torch.equal(mask, full.logits(x.float()) > full.cut)
    assert 0.4 < mask.float().mean() < 0.6
    if channels >= 256:
        # What comparing sigmoids in bfloat16 would give.
        assert (low.logits(x).bfloat16().sigmoid() > 0.5).float().mean() < 0.2
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(mask, full.logits(x) > full.cut)
    # The maps differ by no more than the rounding of their values.
    assert low(x).dtype == torch.bfloat16
    torch.testing.assert_close(low(x).float(), full(x.float()), rtol=0.02, atol=0.02)


def test_another_threshold_is_that_of_the_sigmoid():
    torch.manual_seed(0)
    unit = randomised(SRU(8, threshold=0.6)).double()
    x = torch.randn(2, 8, 6, 6, dtype=torch.float64)
    logits = unit.logits(x)
    assert torch.equal(logits > unit.cut, logits.sigmoid() > 0.6)
    assert 0 < (logits > unit.cut).sum() < (logits > 0).sum()


scales = st.lists(
    st.one_of(st.sampled_from([0.0, 1.0, -1.0, 1e-20, -1e-20, 1e-6]), st.floats(-3, 3, width=32)),
    min_size=8, max_size=8,
)  # fmt: skip


@settings(max_examples=150)
@given(scales=scales, gate=st.sampled_from(["soft", "hard"]), shift=st.sampled_from([0.0, 0.5]))
def test_any_scales_leave_values_and_gradients_finite(scales, gate, shift):
    unit = SRU(8, norm_groups=2, gate=gate)
    with torch.no_grad():
        unit.norm.weight.copy_(torch.tensor(scales))
        unit.norm.bias.fill_(shift)
    x = torch.randn(2, 8, 5, 5, generator=torch.Generator().manual_seed(0), requires_grad=True)
    out = unit(x)
    out.square().sum().backward()
    # Either part of x is at most x.
    assert out.abs().max() <= 2 * x.abs().max()
    for grad in (x.grad, unit.norm.weight.grad, unit.norm.bias.grad):
        assert grad.isfinite().all()
    assert unit.norm.weight.grad.abs().max() < 1e6

    total, largest = sum(map(float, torch.tensor(scales).double())), max(map(abs, scales))
    if abs(total) > 1e-3 * max(largest, 1e-3):
        # The paper's rule: the sign of scale * normed / sum, as far as float32 can tell.
        normed = unit.norm(x).detach()
        share = torch.tensor(scales)[:, None, None].sign() * (1 if total > 0 else -1)
        clear = (normed.abs() > 1e-4) & (share.abs() * torch.tensor(scales)[:, None, None].abs() > 1e-4)
        assert torch.equal((unit.logits(x) > 0)[clear], (share * normed > 0)[clear])


@pytest.mark.parametrize("sign", [1, -1])
def test_shares_are_the_papers_unless_the_sum_vanishes(sign):
    unit = SRU(8)
    with torch.no_grad():
        unit.norm.weight.copy_(sign * torch.tensor([3.0, 1, -1, 2, 0.5, 1, 1, 0.5]))
    torch.testing.assert_close(unit.shares(), unit.norm.weight / unit.norm.weight.sum())
    with torch.no_grad():
        unit.norm.weight.copy_(sign * torch.tensor([1.0, -1, 1, -1, 1, -1, 1, -1 + 1e-6]))
    # No share is larger than one scale against their mean.
    assert unit.shares().abs().max() < 1.01
    assert torch.equal(unit.shares().sign(), unit.norm.weight.sign() * unit.norm.weight.sum().sign())


@pytest.mark.parametrize(("name", "replaced"), [("torchvision:resnet18", 16), ("torchvision:resnet50", 16)])
@pytest.mark.parametrize("order", ["S+C", "S"])
def test_takes_the_place_of_ordinary_convolutions(name, replaced, order):
    model = create_backbone(name, {"class_path": "SCConv2d", "init_args": {"order": order}}, num_classes=3)
    report = model.substitution
    assert len(report.replaced) == replaced
    assert report.left == {"conv1": "reads 3 channels, fewer than min_channels=32"}
    assert all(not row.why and row.now.startswith("SCConv2d") for row in report.rows if row.now)
    assert model(torch.randn(2, 3, 40, 40)).shape == (2, 3)


def test_leaves_depthwise_convolutions_with_the_reason():
    left = create_backbone("torchvision:mobilenet_v2", "SCConv2d", without_weights=True).substitution.left
    assert len(left) == 18
    assert left["features.1.conv.0.0"] == "groups=32: a channel unit is an ordinary convolution's; nearest: groups=1"
    # The spatial unit alone stands in front of any convolution.
    spatial = {"class_path": "SCConv2d", "init_args": {"order": "S"}}
    report = create_backbone("torchvision:mobilenet_v2", spatial, without_weights=True).substitution
    assert len(report.replaced) == 17


def test_what_does_not_divide_is_left_with_the_reason():
    model = nn.Sequential(nn.Conv2d(3, 36, 1), nn.Conv2d(36, 36, 3, padding=1), nn.Conv2d(36, 4, 1))
    report = substitute(model, SCConv2d)
    assert report.replaced == []
    assert "squeeze in_channels=36 to 9 upper and 9 lower" in report.left["1"]
    assert substitute(model, {"class_path": "SCConv2d", "init_args": {"alpha": "4/9"}}).replaced == ["1"]
