"""Passes on the meta device: what is quick about them must not show."""

import functools

import pytest
import torch
from torch import nn
from torch.nn import functional

from slimconv_lit import prune, slimify
from slimconv_lit.analysis import macs
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


class GatherHooks:
    """As timm has them, to collect feature maps."""

    def __init__(self):
        self.seen = []

    def note(self, name, module, args, output):
        self.seen.append((name, output))


def test_a_shadow_shares_nothing_but_what_it_shared():
    shared = nn.Linear(3, 3)
    model = nn.Sequential(shared, nn.BatchNorm1d(3), shared)
    model.notes = {"empty": {}, "of": model}
    model.gates = GatherHooks()
    model[0].register_forward_hook(functools.partial(model.gates.note, "first"))
    model[1].register_forward_hook(lambda *args: pytest.fail("a stranger's hook was called"))
    shadow = shadow_of(model)
    assert shadow[0] is shadow[2]
    assert shadow.notes["of"] is shadow
    assert not {id(m) for m in shadow.modules()} & {id(m) for m in model.modules()}
    assert all(tensor.is_meta for tensor in (*shadow.parameters(), *shadow.buffers()))
    shadow.notes["empty"]["new"] = 1
    assert not model.notes["empty"]
    shadow.eval()(torch.ones(2, 3, device="meta"))
    assert [name for name, _ in shadow.gates.seen] == ["first", "first"]
    assert not model.gates.seen
    assert [len(layer._forward_hooks) for layer in model] == [1, 1, 1]


def test_only_meta_tensors_are_left_undrawn():
    with NothingDrawn():
        torch.manual_seed(0)
        drawn = nn.Conv2d(4, 4, 3)
        assert nn.Conv2d(4, 4, 3, device="meta").weight.is_meta
        assert nn.init.kaiming_uniform_(torch.empty(3, 3, device="meta")).is_meta
    torch.manual_seed(0)
    assert torch.equal(drawn.weight, nn.Conv2d(4, 4, 3).weight)
    assert torch.equal(nn.BatchNorm2d(4).running_var, torch.ones(4))


SCALE = torch.ones(1, 3, 1, 1)


class Chain(nn.Module):
    """Three convolutions, something in front of them and something in front of the last."""

    def __init__(self, first=None, last=None, reads=3):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(reads, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU())
        self.conv, self.norm, self.relu = nn.Conv2d(32, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU()
        self.head, self.aux = nn.Conv2d(32, 5, 1), nn.Conv2d(32, 7, 1)
        self.first, self.last = first or nn.Identity(), last or nn.Identity()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            nn.init.uniform_(self.norm.weight)
            nn.init.uniform_(self.stem[1].weight)

    def forward(self, x):
        return self.head(self.last(self.relu(self.norm(self.conv(self.stem(self.first(x)))))))


class WithPlaces(nn.Module):
    """Constants that are no buffers, and maps made without naming a device."""

    def forward(self, x):
        places = torch.linspace(-1, 1, x.shape[3]).expand(x.shape[0], 1, x.shape[2], -1)
        return torch.cat([(x - SCALE) * SCALE, places, torch.zeros(x.shape[0], 1, *x.shape[2:])], 1)


class Swish(nn.Module):
    def forward(self, x):
        return x * torch.sigmoid(x)


class DropPath(nn.Module):
    def forward(self, x):
        return x * x.new_empty(x.shape[0], 1, 1, 1).bernoulli_(0.9).div_(0.9) if self.training else x


class ByKeyword(Chain):
    def forward(self, x):
        return self.head(self.relu(self.norm(input=self.conv(self.stem(x)))))


X = torch.ones(2, 3, 8, 8)
PASSED = {
    "tensors without a device": lambda: Chain(WithPlaces(), reads=5),
    "dropout of maps": lambda: Chain(last=nn.Dropout2d()),
    "dropout of maps, in place": lambda: Chain(last=nn.Dropout2d(inplace=True)),
    "dropout of paths": lambda: Chain(last=DropPath()),
    "swish": lambda: Chain(last=Swish()),
    "softsign": lambda: Chain(last=nn.Softsign()),
    "tanhshrink": lambda: Chain(last=nn.Tanhshrink()),
    "by keyword": ByKeyword,
}


@pytest.mark.parametrize("name", PASSED)
def test_what_slimming_and_pruning_pass_through(name):
    model = PASSED[name]()
    assert slimify(model, example_input=X).replaced == ["conv"]
    model(X)
    report = prune(PASSED[name](), 0.4, example_input=X)
    assert {row.layer: row.now < row.was for row in report.rows} | {"aux": False} == (
        {"stem.1": True, "norm": True, "head": False, "aux": False}
    )


def test_alpha_dropout_passes_channels_on():
    for dropout in (nn.AlphaDropout(), nn.FeatureAlphaDropout()):
        assert slimify(Chain(last=dropout), example_input=X).replaced == ["conv"]


def test_maps_made_without_a_device_are_counted():
    assert macs(Chain(WithPlaces(), reads=5), (3, 8, 8)) == macs(Chain(reads=5), (5, 8, 8))


def test_a_strangers_hooks_see_nothing_of_a_trace():
    seen = []
    model = Chain()
    model.stem.register_forward_hook(lambda module, args, output: seen.append(output.mean().item()))
    assert slimify(model, example_input=X).replaced == ["conv"]
    assert not seen


class Deep(Chain):
    """Trained, it needs targets, and has another head."""

    def forward(self, x, targets=None):
        y = self.relu(self.norm(self.conv(self.stem(x))))
        if not self.training:
            return self.head(y)
        return functional.cross_entropy(self.head(y), targets) + functional.cross_entropy(self.aux(y), targets)


TARGETS = torch.zeros(2, 8, 8, dtype=torch.long)


def test_what_a_layer_may_read_that_runs_only_in_training_is_left():
    model = Deep()
    with pytest.warns(UserWarning, match="nothing was narrowed: it may go into aux, perhaps: it did not run") as told:
        report = slimify(model, example_input=X)
    assert told[0].filename == __file__
    assert "training could not be traced: TypeError" in report.left["conv"]
    assert all("aux, perhaps" in row.why for row in prune(model, 0.4, example_input=X).rows if row.layer != "head")
    model.train()(X, TARGETS).backward()

    for rewrite in (slimify, lambda model, **given: prune(model, 0.4, **given)):
        model = Deep()
        assert "aux, perhaps" not in str(rewrite(model, example_input=(X, TARGETS)))
        assert model.aux.in_channels == model.head.in_channels < 32
        model.train()(X, TARGETS).backward()


def test_of_several_sizes_one_is_traced_that_can_be_trained_on():
    class LateHead(Deep):
        def forward(self, x):
            y = self.relu(self.norm(self.conv(self.stem(x))))
            return (self.head(y), self.aux(functional.avg_pool2d(y, 70))) if self.training else self.head(y)

    model = LateHead()
    report = prune(model, 0.4)
    assert model.aux.in_channels == model.head.in_channels < 32, report
