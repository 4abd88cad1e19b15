"""Passes on the meta device: what is quick about them must not show."""

import pytest
import torch
from torch import nn
from torch.nn import functional

from slimconv_lit.surgery.trace import NothingDrawn, quiet_pass, shadow_of

OPERATIONS = {
    "sum": lambda x, v: x + v,
    "spread from a gate": lambda x, v: v * x,
    "scalar": lambda x, v: 2 * x - 0.5,
    "complex": lambda x, v: x * 1j,
    "quotient of integers": lambda x, v: x.long() / 2,
    "two types": lambda x, v: x * v.double(),
    "a step of the fold": lambda x, v: torch.addcmul(x[:, :3], x[:, 3:], v[:3]),
    "in place": lambda x, v: x.clone().add_(v).mul_(3),
    "in place, too large": lambda x, v: v.clone().add_(x),
    "widths that do not meet": lambda x, v: x[:, :5] + v,
    "activations": lambda x, v: functional.gelu(functional.silu(x.relu_().flip(1).sigmoid()), approximate="tanh"),
    "norm": lambda x, v: functional.batch_norm(x, v.flatten(), v.flatten(), training=False),
    "pooled": lambda x, v: functional.adaptive_avg_pool2d(x, (None, 2)),
    "mean": lambda x, v: x.mean(),
    "mean over space": lambda x, v: x.mean((2, -1)),
    "mean that keeps an axis": lambda x, v: x.mean(1, keepdim=True),
    "mean of another type": lambda x, v: x.mean(1, dtype=torch.float64),
    "linear": lambda x, v: functional.linear(x, x.new_zeros(4, 7), x.new_zeros(4)),
    "linear, of another width": lambda x, v: functional.linear(x, x.new_zeros(4, 6)),
    "half": lambda x, v: functional.relu(x.half() + v.half()),
}


def result(run, device):
    """Shape and type of what `run` returns, or None if it raises."""
    try:
        with torch.inference_mode():
            out = run(torch.ones(2, 6, 5, 7, device=device), torch.ones(6, 1, 1, device=device))
    except (RuntimeError, ValueError):
        return None
    return tuple(out.shape), out.dtype


@pytest.mark.parametrize("name", OPERATIONS)
def test_a_quiet_pass_gives_the_shapes_and_types_of_a_real_one(name):
    real = result(OPERATIONS[name], "cpu")
    with quiet_pass():
        assert result(OPERATIONS[name], "meta") == real
    assert (real is None) == (name in ("in place, too large", "widths that do not meet", "linear, of another width"))


def test_a_shadow_shares_nothing_but_what_it_shared():
    shared = nn.Linear(3, 3)
    model = nn.Sequential(shared, nn.BatchNorm1d(3), shared)
    model.notes = {"empty": {}, "of": model}
    model[0].register_forward_hook(lambda *args: None)
    shadow = shadow_of(model)
    assert shadow[0] is shadow[2]
    assert shadow.notes["of"] is shadow
    assert not {id(m) for m in shadow.modules()} & {id(m) for m in model.modules()}
    assert all(tensor.is_meta for tensor in (*shadow.parameters(), *shadow.buffers()))
    shadow[1].register_forward_hook(lambda *args: None)
    shadow.notes["empty"]["new"] = 1
    assert len(shadow[0]._forward_hooks) == 1
    assert not model[1]._forward_hooks
    assert not model.notes["empty"]


def test_only_meta_tensors_are_left_undrawn():
    with NothingDrawn():
        torch.manual_seed(0)
        drawn = nn.Conv2d(4, 4, 3)
        assert nn.Conv2d(4, 4, 3, device="meta").weight.is_meta
        assert nn.init.kaiming_uniform_(torch.empty(3, 3, device="meta")).is_meta
    torch.manual_seed(0)
    assert torch.equal(drawn.weight, nn.Conv2d(4, 4, 3).weight)
    assert torch.equal(nn.BatchNorm2d(4).running_var, torch.ones(4))
