"""What must hold for any network: `prune` takes away what it says, and the rest is what it was."""

import copy

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from slimconv_lit import apply_plan, prune, slimify
from tests.surgery.masking import apart, check_pruned, randomise
from tests.surgery.test_random_networks import WIDTH, blocks

ACTIVATIONS = {"relu": nn.ReLU, "silu": nn.SiLU, "hardswish": nn.Hardswish, "sigmoid": nn.Sigmoid, "none": nn.Identity}


class Joined(nn.Module):
    """Two ways through, which meet in one of the ways in which they do in networks; a norm and an activation after."""

    def __init__(self, join, first, second, activation):
        super().__init__()
        self.join = join
        self.ways = nn.ModuleList(nn.Sequential(way, nn.BatchNorm2d(WIDTH)) for way in (first, second))
        self.reduce = nn.Conv2d(2 * WIDTH if join == "cat" else WIDTH, WIDTH, 1, groups=2 if join == "grouped" else 1)
        self.norm, self.activation = nn.BatchNorm2d(WIDTH), ACTIVATIONS[activation]()

    def forward(self, x):
        a, b = (way(x) for way in self.ways)
        smaller = min(a.shape[-1], b.shape[-1])
        a, b = (nn.functional.adaptive_avg_pool2d(v, smaller).relu() for v in (a, b))
        joined = {"sum": a + b, "grouped": a + b, "product": a * b, "cat": torch.cat([a, b], 1), "max": a.maximum(b)}
        return self.activation(self.norm(self.reduce(joined[self.join])))


joins = st.builds(
    Joined,
    st.sampled_from(["sum", "grouped", "product", "cat", "max"]),
    blocks,
    blocks,
    st.sampled_from([*ACTIVATIONS]),
)


@settings(max_examples=25)
@given(
    st.lists(joins, min_size=1, max_size=2),
    st.sampled_from([None, "4/3", "2", "8/3"]),
    st.sampled_from(["keep", "coupled", "select"]),
    st.sampled_from([0.2, 0.5, 0.8]),
    st.sampled_from([1, 4, 16]),
)
def test_prune_keeps_its_promises(parts, k, streams, ratio, least):
    stem = [nn.Conv2d(3, WIDTH, 3, padding=1), nn.BatchNorm2d(WIDTH), nn.ReLU()]
    model = nn.Sequential(*stem, *parts, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(WIDTH, 3))
    x = torch.randn(2, 3, 19, 17, generator=torch.Generator().manual_seed(0))
    if k:
        slimify(model, k=k, example_input=x)
    randomise(model)
    original = copy.deepcopy(model)

    report = prune(model, ratio, streams=streams, min_channels=least, example_input=x)

    # Products of small numbers may leave nothing that masking could change.
    check_pruned(original, report, x, matters=0)
    assert report.pruned <= ratio * report.scales
    assert {row.layer for row in report.rows} >= {n for n, m in original.named_modules() if isinstance(m, _BatchNorm)}
    before, after, kept = original.state_dict(), model.state_dict(), report.plan["kept"]
    for row in report.rows:
        if row.now < row.was and isinstance(original.get_submodule(row.layer), _BatchNorm):
            assert row.now >= min(least, row.was)
    for name, value in after.items():
        layer, _, leaf = name.rpartition(".")
        layer = layer.removesuffix(".norm") if layer.removesuffix(".norm") in report.plan["selected"] else layer
        if leaf == "index":
            assert value.tolist() == report.plan["selected"][layer.removesuffix(".select")]
            continue
        wanted = before[f"{layer}.{leaf}"]
        sides = kept.get(layer, {})
        if "output" in sides and wanted.ndim:
            wanted = wanted[sides["output"]]
        module = original.get_submodule(layer)
        if "input" in sides and leaf == "weight" and getattr(module, "groups", 1) == 1:
            wanted = wanted[:, sides["input"]]
        assert value.shape == wanted.shape or getattr(module, "groups", 1) > 1
        assert value.shape != wanted.shape or torch.equal(value, wanted) or getattr(module, "groups", 1) > 1, name

    again = copy.deepcopy(original)
    apply_plan(again, report.plan)
    with torch.no_grad():
        assert apart(model.eval()(x), again(x)) == 0
    second = prune(model, ratio, streams=streams, min_channels=least, example_input=x)
    assert second.scales <= report.scales - report.pruned
    assert second.difference <= 1e-5
    model.train()(x).square().mean().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
