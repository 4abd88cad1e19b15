"""Substitution: an operator in a spatial convolution's place, and its readers narrowed to what it writes.

Planned on the channel graph, tried on a copy on the meta device, and only then done, in one step that is taken back
whole if anything fails.
"""

from __future__ import annotations

import functools
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any, TypeAlias

import torch
from torch import nn
from torch.nn.parameter import is_lazy
from torch.utils._pytree import tree_iter, tree_map

from slimconv_lit.lookup import closest
from slimconv_lit.ops import Operator, OperatorFactory, OperatorLike, SlimConv2d, resolve_operator
from slimconv_lit.ops.base import check_arguments, own_arguments, pair, same_padding
from slimconv_lit.surgery.graph import ChannelGraph, NotPrivateError, Private
from slimconv_lit.surgery.resize import Edits, ResizeError, Role, check_resize, has_hooks, host_forward, without_norm
from slimconv_lit.surgery.trace import (
    Inputs,
    NothingDrawn,
    check_network,
    quiet_pass,
    shadow_of,
    skip_norms,
    trace_example,
)
from slimconv_lit.tables import format_table

Patterns: TypeAlias = str | Sequence[str] | None

# Wide, and a multiple of every group count and fold count in use.
PROBE_WIDTH = 2 * 32 * 5040


@dataclass(frozen=True)
class Row:
    """What became of one spatial convolution.

    Attributes:
        layer: Its name in the network.
        was: What stood there, as "Conv2d 64->64 3x3".
        now: What stands there now; empty where it was left alone.
        why: Why it was left alone, or which readers were narrowed.
    """

    layer: str
    was: str
    now: str
    why: str


@dataclass(frozen=True)
class Substitution:
    """What became of a network's spatial convolutions; prints as a table.

    Attributes:
        rows: One for each spatial convolution, in the order in which they run.
        operators: How many operators were in the network before.
        params: How many parameters the network had before and has now.
    """

    rows: tuple[Row, ...]
    operators: int
    params: tuple[int, int]

    @property
    def replaced(self) -> list[str]:
        """Names of the convolutions that an operator replaced."""
        return [row.layer for row in self.rows if row.now]

    @property
    def left(self) -> dict[str, str]:
        """Names of the convolutions that were left alone, and why."""
        return {row.layer: row.why for row in self.rows if not row.now}

    def __str__(self) -> str:
        head = f"{len(self.replaced)} of {len(self.rows)} spatial convolutions replaced"
        head += f"; {self.operators} operators were there already" if self.operators else ""
        before, now = self.params
        head += f"; params {before:,}" + (f" -> {now:,} ({now / before:.3f})" if now != before else "")
        if now > before:
            depthwise = any(row.now and row.was.endswith("depthwise") for row in self.rows)
            head += "\nit is larger than before" + (": depthwise convolutions have little to save" if depthwise else "")
        if not self.rows:
            return head
        rows = [{"layer": r.layer, "was": r.was, "now": r.now or "-", "why": r.why} for r in self.rows]
        return f"{format_table(rows)}\n{head}"


@dataclass(frozen=True)
class Report(Substitution):
    """What `substitute` did.

    Attributes:
        model: The network that was rewritten, in place.
    """

    model: nn.Module = field(repr=False)


@dataclass(frozen=True)
class _Change:
    """One substitution, decided but not done."""

    layer: str
    build: Callable[[], Operator]
    # Such an operator on the meta device, which told the width and which the trial runs; others may share it.
    trial: Operator
    absorbed: str | None
    follow: Private


class _LeaveError(Exception):
    """Leave this convolution as it is; the message says why."""


def slimify(
    model: nn.Module,
    k: float | str = 4 / 3,
    *,
    include: Patterns = None,
    exclude: Patterns = None,
    min_channels: int = 32,
    example_input: Any = None,
    **slim_conv: Any,
) -> Report:
    """Puts SlimConv into every private spatial convolution of `model`, in place.

    Args:
        model: Any network: torchvision's, timm's or your own.
        k: Compression; see `SlimConv2d`.
        include: As in `substitute`.
        exclude: As in `substitute`.
        min_channels: As in `substitute`.
        example_input: As in `substitute`.
        **slim_conv: More arguments of `SlimConv2d`, such as arrangement="none" or min_hidden=24.

    Returns:
        The report; `report.model` is `model`.

    Raises:
        ValueError, TypeError: As `substitute`.
    """
    check_arguments("slimify", slim_conv, own_arguments(SlimConv2d) | set(slimify.__kwdefaults__ or ()))
    operator = functools.partial(SlimConv2d, k=k, **slim_conv)
    return substitute(model, operator, include, exclude, min_channels=min_channels, example_input=example_input)


def substitute(
    model: nn.Module,
    operator: OperatorLike,
    include: Patterns = None,
    exclude: Patterns = None,
    *,
    min_channels: int = 32,
    pointwise: bool = False,
    example_input: Any = None,
) -> Report:
    """Puts `operator` in the place of spatial convolutions (and of the norms behind them), in place.

    An operator that writes fewer channels than its host did (SlimConv) only takes the place of a private convolution,
    one that only convolutions and linear layers read, through norms, activations, pooling and dropout; these readers,
    and the gates of squeeze-excite blocks on the way, are narrowed. A reader of a slimmed space stays plain, because
    it is what restores the width. Convolutions that cannot be replaced are left as they are, each with its reason.

    Stride, dilation, groups, padding, device, dtype, memory format and train mode carry over, and every weight that
    need not change is kept. A narrowed reader keeps the leading part of its weights; a norm that was narrowed starts
    anew. If anything fails, `model` is exactly as it was.

    Args:
        model: Any network. Optimizers must be made after the substitution: there are new parameters.
        operator: An operator class, a `functools.partial` of one, its name, or {"class_path", "init_args"}.
        include: Name patterns (`fnmatch`: "layer[34].*", "*.conv2"); only convolutions that match one are replaced.
        exclude: Name patterns of convolutions to leave alone.
        min_channels: Convolutions that read fewer channels are left alone (stems, as a rule).
        pointwise: Take 1x1 convolutions for spatial ones; Ghost modules stand in their place too.
        example_input: A tensor, a tuple of positional or a dict of keyword arguments of the forward pass; only shapes
            and dtypes matter. By default images of common sizes are tried. Where training wants more (targets) and has
            layers of its own, give that too; else what they may read is not narrowed.

    Returns:
        The report; it prints as a table.

    Raises:
        ValueError: If `operator` names no operator or its arguments can fit no convolution (k=1.5), or an `include`
            pattern matches no spatial convolution.
        TypeError: If `model` is no network, or `operator` has an argument that its class has not.
    """
    check_network(model)
    factory = resolve_operator(operator)
    with torch.device("meta"):
        # Arguments that fail here fail everywhere; better one error than a report in which all rows say the same.
        factory(PROBE_WIDTH, PROBE_WIDTH, 3, 1, 1, 1, None)
    convs = {name: m for name, m in model.named_modules() if _is_spatial(m, pointwise)}
    inside = [name for name, m in model.named_modules() if isinstance(m, Operator)]
    inside = [name for name in inside if not any(name.startswith(f"{i}.") for i in inside)]
    convs = {n: m for n, m in convs.items() if not any(n.startswith(f"{i}.") for i in inside)}
    before = _params(model)
    for pattern in as_patterns(include):
        if convs and not any(fnmatchcase(name, pattern) for name in convs):
            raise ValueError(f"include={pattern!r} matches no spatial convolution; {closest(pattern, convs)}")

    try:
        graph, inputs = trace_example(model, example_input)
    except Exception as error:
        why = f"the network could not be traced: {one_line(error)}"
        # Who does not look at the report would train a plain network.
        warnings.warn(f"nothing was replaced: {why}; an example_input may help", stacklevel=3)
        rows = [Row(name, _describe(conv), "", why) for name, conv in convs.items()]
        return Report(tuple(rows), len(inside), (before, before), model)

    changes: dict[str, _Change] = {}
    reasons: dict[str, str] = {}
    shared = shared_layers(model)
    trials = _trials(factory)
    order = [name for name in graph.spaces if name in convs] + [name for name in convs if name not in graph.spaces]
    for name in order:
        try:
            _check_wanted(name, convs[name], include, exclude, min_channels)
            changes[name] = _plan(model, graph, factory, trials, name, changes, shared)
        except _LeaveError as leave:
            reasons[name] = str(leave)

    if _try_out(model, graph, inputs, list(changes.values())):
        planned, changes = changes, {}
        for name, change in planned.items():
            failure = _try_out(model, graph, inputs, [*changes.values(), change])
            if failure:
                reasons[name] = f"the network does not run with it replaced: {failure}"
            else:
                changes[name] = change

    if graph.unseen and any(graph.unseen in why for why in reasons.values()):
        warnings.warn(
            f"nothing was narrowed: it may go into {graph.unseen}; an example_input that training takes may help",
            stacklevel=3,
        )

    was = {name: _describe(conv) for name, conv in convs.items()}
    _apply(model, list(changes.values()))
    rows = []
    for name in order:
        if name in changes:
            built = model.get_submodule(name)
            now = f"{type(built).__name__} {built.in_channels}->{built.out_channels}"
            narrowed = [*changes[name].follow.readers, *changes[name].follow.gates]
            rows.append(Row(name, was[name], now, f"narrowed {', '.join(narrowed)}" if narrowed else ""))
        else:
            rows.append(Row(name, was[name], "", reasons[name]))
    return Report(tuple(rows), len(inside), (before, _params(model)), model)


def _params(model: nn.Module) -> int:
    # Those of lazy layers have no size yet.
    return sum(p.numel() for p in model.parameters() if not is_lazy(p))


# ---- deciding ----------------------------------------------------------------------------------------------------


def _is_spatial(module: nn.Module, pointwise: bool) -> bool:
    return isinstance(module, nn.Conv2d) and (pointwise or max(module.kernel_size) > 1)


def as_patterns(patterns: Patterns) -> Sequence[str]:
    """One pattern, several or none, as a sequence."""
    return [patterns] if isinstance(patterns, str) else patterns or []


def _describe(conv: nn.Module) -> str:
    assert isinstance(conv, nn.Conv2d)
    kernel = "x".join(map(str, conv.kernel_size))
    more = [f"stride {conv.stride[0]}"] if max(conv.stride) > 1 else []
    more += [f"dilation {conv.dilation[0]}"] if max(conv.dilation) > 1 else []
    more += ["depthwise" if conv.groups == conv.in_channels else f"groups {conv.groups}"] if conv.groups > 1 else []
    return " ".join([f"{type(conv).__name__} {conv.in_channels}->{conv.out_channels}", kernel, *more])


def one_line(error: BaseException) -> str:
    """An error's type and message, shortened to one line."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:160]}{'...' if len(text) > 160 else ''}"


def _check_wanted(name: str, conv: nn.Module, include: Patterns, exclude: Patterns, min_channels: int) -> None:
    assert isinstance(conv, nn.Conv2d)
    if as_patterns(include) and not any(fnmatchcase(name, p) for p in as_patterns(include)):
        raise _LeaveError("not named by include")
    for pattern in as_patterns(exclude):
        if fnmatchcase(name, pattern):
            raise _LeaveError(f"excluded by {pattern!r}")
    if conv.in_channels < min_channels:
        raise _LeaveError(f"reads {conv.in_channels} channels, fewer than min_channels={min_channels}")


def _trials(factory: OperatorFactory) -> Callable[..., Operator]:
    """Builds on the meta device, where the arguments (and the type of the weights) repeat only once."""

    @functools.cache
    def build(dtype: torch.dtype, *arguments: Any) -> Operator:
        with torch.device("meta"), NothingDrawn(), torch.random.fork_rng(devices=[]):
            return factory(*arguments).to(dtype)

    return build


def _plan(
    model: nn.Module,
    graph: ChannelGraph,
    factory: OperatorFactory,
    trials: Callable[..., Operator],
    name: str,
    changes: dict[str, _Change],
    shared: set[str],
) -> _Change:
    conv = model.get_submodule(name)
    assert isinstance(conv, nn.Conv2d)
    if not name:
        raise _LeaveError("is the whole network, which has no place to put another layer in")
    if name not in graph.spaces:
        raise _LeaveError("never ran in the traced forward pass")
    if graph.calls[name] > 1 or name in shared:
        raise _LeaveError("is used more than once")
    if problem := host_forward(conv):
        raise _LeaveError(problem)
    if has_hooks(conv):
        raise _LeaveError("carries hooks, which would be lost")
    if conv.padding_mode != "zeros":
        raise _LeaveError(f"has padding_mode={conv.padding_mode!r}")

    for layer, change in changes.items():
        # Replaced, it would not have the width that it is narrowed to.
        if name in change.follow.readers:
            raise _LeaveError(f"reads {layer}, which is slimmed, and restores the width")
        if name in change.follow.gates:
            raise _LeaveError(f"writes the gate of {layer}, which is slimmed")

    kernel, stride, dilation = (_simple(size) for size in (conv.kernel_size, conv.stride, conv.dilation))
    arguments = (conv.in_channels, conv.out_channels, kernel, stride, dilation, conv.groups, _own_padding(conv))
    build = functools.partial(factory, *arguments)
    try:
        trial = trials(conv.weight.dtype, *arguments)
    except ValueError as error:
        raise _LeaveError(str(error)) from None
    width = trial.out_channels

    consumers = graph.spaces[name].consumers
    norm = next(iter(consumers)) if len(consumers) == 1 else None
    absorbed = norm if norm and graph.calls[norm] == 1 and without_norm(model.get_submodule(norm)) is not None else None
    if absorbed and has_hooks(model.get_submodule(absorbed)):
        raise _LeaveError(f"its norm {absorbed} carries hooks, which would be lost")
    if width == conv.out_channels:
        return _Change(name, build, trial, absorbed, Private())
    if width > conv.out_channels:
        raise _LeaveError(f"would write {width} channels where the convolution writes {conv.out_channels}")
    # Those of an earlier call too: a second one changes nothing.
    slim = [
        layer
        for layer, space in graph.spaces.items()
        if isinstance(built := model.get_submodule(layer), type(trial)) and built.out_channels < built.in_channels
        if any(use.by == name for use in space.uses.values())
    ]
    if slim:
        raise _LeaveError(f"reads {slim[0]}, which is slimmed, and restores the width")
    try:
        follow = graph.private(name)
    except NotPrivateError as error:
        raise _LeaveError(f"not private: {error}") from None
    follow.norms = [n for n in follow.norms if n != absorbed]
    for layer in (*follow.readers, *follow.norms, *follow.gates):
        role: Role = "output" if layer in follow.gates else "input"
        if layer in shared:
            raise _LeaveError(f"is read by {layer}, which is used more than once")
        if layer in changes:
            raise _LeaveError(f"is multiplied by what {layer} writes, which is replaced")
        try:
            check_resize(model.get_submodule(layer), width, role)
        except ResizeError as error:
            raise _LeaveError(f"is read by {layer}, which cannot be narrowed: {error}") from None
    return _Change(name, build, trial, absorbed, follow)


def _simple(size: tuple[int, ...]) -> int | tuple[int, int]:
    return size[0] if size[0] == size[1] else (size[0], size[1])


def _own_padding(conv: nn.Conv2d) -> int | tuple[int, int] | None:
    """The padding to hand on, or None where it is the operators' own default."""
    # timm's Conv2dSame pads as it runs, to ceil(size / stride), which is what the default gives for odd kernels.
    if conv.padding == "same" or type(conv).__name__ == "Conv2dSame":
        return None
    padding = (0, 0) if conv.padding == "valid" else pair(conv.padding)  # type: ignore[arg-type]
    return None if padding == same_padding(pair(conv.kernel_size), pair(conv.dilation)) else padding  # type: ignore[arg-type]


def shared_layers(model: nn.Module) -> set[str]:
    """Names of layers that are registered in more than one place, or that share a parameter with another layer."""
    modules = dict(model.named_modules())
    places = Counter(id(child) for parent in modules.values() for child in parent.children())
    owners = Counter(id(p) for module in modules.values() for p in module.parameters(recurse=False))
    return {
        name
        for name, module in modules.items()
        if places[id(module)] > 1 or any(owners[id(p)] > 1 for p in module.parameters(recurse=False))
    }


# ---- doing -------------------------------------------------------------------------------------------------------


def _try_out(model: nn.Module, graph: ChannelGraph, inputs: Inputs, changes: list[_Change]) -> str:
    """Why the rewritten network does not run as before, or "" if it does."""
    if not changes:
        return ""
    shadow = shadow_of(model)
    try:
        _apply(shadow, changes, trial=True)
        skip_norms(shadow)
        with quiet_pass():
            for mode, expected in graph.outputs.items():
                shadow.train(mode == "train")
                args, kwargs = tree_map(lambda v: v.to("meta") if isinstance(v, torch.Tensor) else v, inputs)
                shapes = [tuple(v.shape) for v in tree_iter(shadow(*args, **kwargs)) if isinstance(v, torch.Tensor)]
                if shapes != expected:
                    return f"its outputs change from {expected} to {shapes}"
    except Exception as error:
        return one_line(error)
    return ""


def _apply(model: nn.Module, changes: list[_Change], trial: bool = False) -> None:
    channels_last = any(_is_channels_last(p) for p in model.parameters())
    edits = Edits(model)
    try:
        for change in changes:
            host = model.get_submodule(change.layer)
            assert isinstance(host, nn.Conv2d)
            if trial:
                built = change.trial
            else:
                with torch.device(host.weight.device), NothingDrawn():
                    built = change.build()
            built = built.to(dtype=host.weight.dtype).train(host.training)
            edits.replace(change.layer, built.to(memory_format=torch.channels_last) if channels_last else built)
            edits.set(change.layer, {"rewritten": True})
            if change.absorbed:
                norm = model.get_submodule(change.absorbed)
                rest = without_norm(norm)
                assert rest is not None
                edits.replace(change.absorbed, rest.train(norm.training))
                edits.set(change.absorbed, {"rewritten": True})
            for layer in (*change.follow.readers, *change.follow.norms):
                edits.resize(layer, host.out_channels, built.out_channels, "input")
            for layer in change.follow.gates:
                edits.resize(layer, host.out_channels, built.out_channels, "output")
    except BaseException:
        edits.take_back()
        raise


def _is_channels_last(tensor: torch.Tensor) -> bool:
    return tensor.ndim == 4 and not tensor.is_contiguous() and tensor.is_contiguous(memory_format=torch.channels_last)
