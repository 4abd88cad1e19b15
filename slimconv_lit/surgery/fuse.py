"""Fusing for inference: batch norms go into the convolutions in front of them, and gates become linear layers.

A batch norm in evaluation mode is one scale and one shift a channel, which the convolution or linear layer that writes
those channels can bring along, provided that nobody else reads them. Who reads what is watched in one pass over random
images. A copy is fused first and proved to compute what the network did; only then is the network itself.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from math import isnan
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.fusion import fuse_conv_bn_weights, fuse_linear_bn_weights
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torchvision.ops import FrozenBatchNorm2d

from slimconv_lit.ops.slim_conv import ChannelGate, LinearGate
from slimconv_lit.surgery.masks import apart, difference, hooked, proof_inputs, replica, run, written
from slimconv_lit.surgery.prune import SIZES
from slimconv_lit.surgery.resize import Edits, has_hooks, host_forward, without_norm
from slimconv_lit.surgery.substitute import one_line, shared_layers
from slimconv_lit.surgery.trace import NORMS, Inputs, check_network, example_inputs, leaves_of
from slimconv_lit.tables import format_table

# How far the outputs may be apart, relative to the largest, in roundings: 1e-5 in float32.
TOLERANCE = 84

_WRITERS = (nn.Conv2d, nn.Linear)
_PLAIN = (nn.BatchNorm1d, nn.BatchNorm2d, nn.SyncBatchNorm, FrozenBatchNorm2d)


@dataclass(frozen=True)
class FusedRow:
    """What became of one batch norm or gate.

    Attributes:
        layer: Its name in the network.
        into: The layer that computes it now; for a gate, what it is now. Empty where it was left.
        why: Why it was left.
    """

    layer: str
    into: str
    why: str


@dataclass(frozen=True)
class FuseReport:
    """What `fuse` did; prints as a table.

    Attributes:
        model: The network that was fused, in place.
        rows: One for every batch norm, and for every gate of a SlimConv.
        difference: The largest difference to the original network, relative to the largest output; of half precision
            networks, before the new weights are rounded.
    """

    model: nn.Module = field(repr=False)
    rows: tuple[FusedRow, ...]
    difference: float

    @property
    def left(self) -> dict[str, str]:
        """Names of what was left as it is, and why."""
        return {row.layer: row.why for row in self.rows if not row.into}

    def __str__(self) -> str:
        rows = [{"layer": r.layer, "into": r.into or "-", "why": r.why} for r in self.rows]
        head = f"{len(self.rows) - len(self.left)} of {len(self.rows)} batch norms and gates fused"
        return "\n".join([format_table(rows)] * bool(rows) + [f"{head}; outputs differ by {self.difference:.1e}"])


def fuse(model: nn.Module, example_input: Any = None) -> FuseReport:
    """Folds the batch norms of `model` into the layers that precede them, in place, for inference.

    A norm is folded if it reads what one convolution or linear layer writes, and nobody else reads that; norms inside
    operators too. SlimConv's gates become linear layers on the pooled vector. The rest stays as it is, each norm with
    the reason in the report. The network has other parameters afterwards and is not for training.

    Before it returns, `fuse` shows on random images that a fused copy computes what the network did, to 1e-5 of the
    largest output (84 roundings, in float64 too; half precision is proved in float32 and rounded afterwards). Integers
    may differ where no layer does. If anything fails, `model` is exactly as it was.

    Args:
        model: Any network, in evaluation mode. Where the last digit decides what a network does next, as it can
            with a detector's boxes, the proof fails: fuse its parts then, `fuse(detector.backbone)`.
        example_input: A tensor, a tuple of positional or a dict of keyword arguments of the forward pass; its values
            matter only where the network makes nothing finite of random ones. By default images of common sizes are
            tried, small ones first.

    Returns:
        The report; it prints as a table.

    Raises:
        ValueError: If `model` or a part of it is in training mode, it does not run, or the proof fails; the message
            names the first layer that differs.
        TypeError: If `model` is no network, or returns tensors inside an object that cannot be looked into.
    """
    check_network(model)
    for name, module in model.named_modules():
        if module.training:
            which = f"the network's {name}" if name else "the network"
            raise ValueError(f"{which} is in training mode, where norms follow the batch; call model.eval() first")
    inputs, reads = _watch(model, example_input)
    shared = shared_layers(model)
    into: dict[str, str] = {}
    rows: dict[str, FusedRow] = {}
    for name, norm in model.named_modules():
        if isinstance(norm, (_BatchNorm, FrozenBatchNorm2d)):
            why = _why_not(model, name, norm, reads, shared)
            if not why:
                into[name] = reads.source[name]
            rows[name] = FusedRow(name, into.get(name, ""), why)

    fused = replica(model)
    _rewrite(Edits(fused), into, shared)
    found = _prove(replica(model), fused, inputs, into)
    edits = Edits(model)
    try:
        rows |= _rewrite(edits, into, shared)
    except BaseException:
        edits.take_back()
        raise
    return FuseReport(model, tuple(rows.values()), found)


# ---- watching ------------------------------------------------------------------------------------------------------


class _Readers(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes in a forward pass who reads what convolutions and linear layers write.

    Attributes:
        source: For each norm, the layer whose output it reads, where it reads one as it was written.
        by: For each layer, everything that reads its output.
        calls: How often a layer or norm ran.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.source: dict[str, str] = {}
        self.by: dict[str, set[str]] = {}
        self.calls: Counter[str] = Counter()
        # By identity, so no tensor may be freed and its id reused.
        self.written: dict[int, tuple[str, Tensor]] = {}
        self.inside = 0

    def read(self, values: Any, reader: str) -> None:
        for value in tree_iter(values):
            if id(value) in self.written:
                self.by[self.written[id(value)][0]].add(reader)

    def before(self, name: str, layer: nn.Module, args: Any) -> None:
        self.read(args, name)
        self.calls[name] += 1
        self.inside += 1
        if isinstance(layer, NORMS) and args and id(args[0]) in self.written:
            self.source[name] = self.written[id(args[0])][0]

    def after(self, name: str, layer: nn.Module, output: Any) -> None:
        self.inside -= 1
        # A norm's channels are on axis 1; a linear layer writes on the last.
        if isinstance(layer, _WRITERS) and output.ndim == (4 if isinstance(layer, nn.Conv2d) else 2):
            self.written[id(output)] = (name, output)
            self.by.setdefault(name, set())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not self.inside:
            self.read((args, kwargs), func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def _watch(model: nn.Module, example_input: Any) -> tuple[Inputs, _Readers]:
    first: Exception | None = None
    for shapes in example_inputs(model, example_input, SIZES):
        # A copy, because running may change a network: averages, counters.
        inputs, readers, watched = proof_inputs(model, shapes), _Readers(), replica(model)
        try:
            with hooked(watched, readers.before, readers.after), readers:
                output = run(watched, inputs)
        except Exception as error:
            first = first or error
            continue
        readers.read(leaves_of(output), "the network's output")
        for name, module in watched.named_modules():
            readers.read(list(vars(module).values()), f"{name or 'the network'}, which keeps it")
        return inputs, readers
    assert first is not None
    raise ValueError(f"the network does not run: {one_line(first)}; give an example_input") from first


# ---- deciding ------------------------------------------------------------------------------------------------------


def _why_not(model: nn.Module, name: str, norm: nn.Module, reads: _Readers, shared: set[str]) -> str:
    """Why a norm cannot be folded; "" if it can."""
    if name not in reads.calls:
        return "never ran on random images"
    if name not in reads.source:
        return "what it reads is not what one convolution or linear layer writes"
    layer = reads.source[name]
    for each in (layer, name):
        if reads.calls[each] > 1 or each in shared:
            return f"{each} is used more than once"
        if has_hooks(model.get_submodule(each)):
            return f"{each} carries hooks, which would see something else"
    if others := reads.by[layer] - {name}:
        return f"what {layer} writes goes into {sorted(others)[0]} too"
    if problem := host_forward(model.get_submodule(layer)):
        return f"{layer}: {problem}"
    if _behind(norm) is None:
        return f"a {type(norm).__name__} may compute more than a batch norm"
    if norm.running_mean is None:
        return "it normalises with the batch, in evaluation too"
    return ""


def _behind(norm: nn.Module) -> nn.Module | None:
    """What is left where a norm was; None where that cannot be told."""
    if type(norm) in _PLAIN:
        return nn.Identity()
    # timm's norms carry the dropout and the activation behind them.
    return without_norm(norm) if hasattr(norm, "act") else None


# ---- doing ---------------------------------------------------------------------------------------------------------


def _rewrite(edits: Edits, into: Mapping[str, str], shared: set[str]) -> dict[str, FusedRow]:
    """Folds every norm into its layer, and says what becomes of the gates."""
    for name, layer in into.items():
        _fold(edits, name, layer)
    rows = {}
    for name, gate in list(edits.model.named_modules()):
        if isinstance(gate, ChannelGate):
            why = _straighten(edits, name, gate, shared)
            rows[name] = FusedRow(name, "" if why else "two linear layers", why)
    return rows


def _fold(edits: Edits, name: str, layer_name: str) -> None:
    norm, layer = edits.model.get_submodule(name), edits.model.get_submodule(layer_name)
    fold = fuse_conv_bn_weights if isinstance(layer, nn.Conv2d) else fuse_linear_bn_weights
    weight, bias = layer.get_parameter("weight"), layer.bias
    # In float64, so that the one rounding left is that of the result.
    tensors = (weight, bias, norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias)
    parts = fold(*(t.detach().double() if isinstance(t, Tensor) else t for t in tensors))  # type: ignore[arg-type]
    new = [nn.Parameter(part.detach().to(weight.dtype), weight.requires_grad) for part in parts]
    if weight.dtype == torch.float16 and any(p.isinf().any() for p in new):
        raise ValueError(f"{layer_name} with {name} in it is too large for {weight.dtype}")
    edits.set(layer_name, {"weight": new[0], "bias": new[1]})
    rest = _behind(norm)
    assert rest is not None
    edits.replace(name, rest.train(norm.training))


def _straighten(edits: Edits, name: str, gate: ChannelGate, shared: set[str]) -> str:
    """Puts linear layers in a gate's place, or says why not."""
    if not isinstance(gate.norm, nn.Identity):
        return "its norm stays"
    for part in (gate.squeeze, gate.excite):
        if host_forward(part) or has_hooks(part):
            return "its layers carry hooks or compute more than a convolution"
    if has_hooks(gate) or shared & {name, f"{name}.squeeze", f"{name}.excite"}:
        return "it is used more than once, or carries hooks"
    edits.replace(name, LinearGate(_linear(gate.squeeze), _linear(gate.excite)).train(gate.training))
    return ""


def _linear(conv: nn.Conv2d) -> nn.Linear:
    """The linear layer that does to a vector what a 1x1 convolution does to a map of one pixel."""
    layer = nn.Linear(conv.in_channels, conv.out_channels, device="meta")
    layer.weight = nn.Parameter(conv.weight.detach().flatten(1).contiguous(), conv.weight.requires_grad)
    layer.bias = conv.bias  # type: ignore[assignment]
    return layer


# ---- proving -------------------------------------------------------------------------------------------------------


def _prove(original: nn.Module, fused: nn.Module, inputs: Inputs, into: Mapping[str, str]) -> float:
    """How far the outputs are apart.

    Raises:
        ValueError: If that is too far; the message names the first layer that differs.
    """
    tolerance = TOLERANCE * torch.finfo(_type_of(fused)).eps
    try:
        (found, tells_all), problem = difference(original, fused, inputs), ""
    except Exception as error:
        found, tells_all, problem = float("inf"), False, f" ({one_line(error)})"
    if isnan(found):
        raise ValueError(
            "the network's output is not finite, or there is none, so that fusing cannot be proved right; "
            "if it needs values of some kind, give them as example_input"
        )
    fine = found <= tolerance
    layer = "" if fine and tells_all else _first_difference(original, fused, inputs, into, tolerance)
    if layer or not fine:
        raise ValueError(
            f"the fused network does not compute what the network did (they differ by {found:.1e}{problem}); "
            f"the first layer that differs is {layer or 'no single layer'}. Nothing was changed"
        )
    return found


def _type_of(model: nn.Module) -> torch.dtype:
    kinds = [p.dtype for p in model.parameters() if p.is_floating_point()]
    return max(kinds, key=lambda kind: torch.finfo(kind).eps, default=torch.float32)


def _first_difference(
    original: nn.Module, fused: nn.Module, inputs: Inputs, into: Mapping[str, str], tolerance: float
) -> str:
    wanted, found = written(original, inputs), written(fused, inputs)
    folded = set(into.values())
    for name, there in wanted.items():
        # A layer writes now what its norm wrote; where an activation is part of the norm, the next layer tells.
        if name in folded or hasattr(original.get_submodule(name), "act"):
            continue
        here = found.get(into.get(name, name))
        # What a gate's convolution writes has two axes of size one more than what its linear layer does.
        if here is None or not apart(there, here.reshape(there.shape) if here.ndim < there.ndim else here) <= tolerance:
            return name
    return ""
