"""Pruning: channels that their batch norms hardly scale are taken out of the network, with all that reads them.

Liu et al., "Learning Efficient Convolutional Networks through Network Slimming", ICCV 2017,
https://arxiv.org/abs/1708.06519

Decided on the channel graph, done in one step, and proved: the pruned network computes what the masked one does (see
`masks.py`), or it is taken back whole.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from math import floor, isnan
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase

from slimconv_lit.lookup import closest
from slimconv_lit.ops import Operator
from slimconv_lit.ops.slim_conv import ChannelGate
from slimconv_lit.surgery.classes import Classes, Streams, class_sizes, find_classes, uses_of
from slimconv_lit.surgery.flow import ChannelSelection, channel_flow
from slimconv_lit.surgery.graph import ChannelGraph, Labels
from slimconv_lit.surgery.masks import Flags, difference, first_difference, mask, proof_inputs, read_alive, replica
from slimconv_lit.surgery.plan import Plan, follow_plan, make_plan, note_plan, plans_of
from slimconv_lit.surgery.resize import Edits
from slimconv_lit.surgery.substitute import Patterns, as_patterns, one_line
from slimconv_lit.surgery.trace import Inputs, check_network, trace_example
from slimconv_lit.tables import format_table

# Small, for the network really runs on them; larger ones for networks that need them.
SIZES = (64, 32, 96, 128, 224, 299, 256, 384, 512, 28)

TOLERANCE = 1e-5


@dataclass(frozen=True)
class PrunedRow:
    """What became of one norm, or of one convolution or linear layer that no norm follows.

    Attributes:
        layer: Its name in the network.
        was: How many channels it wrote.
        now: How many it writes.
        why: Why no channel, or not every channel below the threshold, was pruned.
    """

    layer: str
    was: int
    now: int
    why: str


@dataclass(frozen=True)
class PruneReport:
    """What `prune` did; prints as a table.

    Attributes:
        model: The network that was pruned, in place.
        rows: One for every norm, and for every convolution and linear layer whose channels no norm scales.
        ratio: The part of the scales that was asked for.
        pruned: How many scales went.
        scales: How many there were that could go.
        difference: The largest difference between pruned and masked network, relative to the largest output.
        plan: What `apply_plan` does the same with to a fresh network; plain values. The network keeps it too, see
            `plans_of`.
    """

    model: nn.Module = field(repr=False)
    rows: tuple[PrunedRow, ...]
    ratio: float
    pruned: int
    scales: int
    difference: float
    plan: Plan = field(repr=False)

    @property
    def left(self) -> dict[str, str]:
        """Names of the layers that keep all channels, and why."""
        return {row.layer: row.why for row in self.rows if row.now == row.was}

    def __str__(self) -> str:
        rows = [{"layer": r.layer, "was": r.was, "now": r.now, "why": r.why} for r in self.rows]
        share = f" ({self.pruned / self.scales:.1%})" if self.scales else ""
        head = f"{self.pruned:,} of {self.scales:,} scales pruned{share}, {self.ratio:.1%} asked for"
        return f"{format_table(rows)}\n{head}; pruned and masked network differ by {self.difference:.1e}"


def prunable_norms(model: nn.Module, include: Patterns = None, exclude: Patterns = None) -> dict[str, nn.Module]:
    """The batch norms whose scales say which channels matter, by name.

    Those in SlimConv's gates are left out: what they scale are no channels of the network.

    Args:
        model: Any network.
        include: Name patterns (`fnmatch`); only norms that match one. A norm that `streams="select"` put behind a
            selection goes by its name before that, too.
        exclude: Name patterns of norms to leave out.

    Raises:
        ValueError: If there is none, or an `include` pattern matches none.
    """
    gates = [name for name, module in model.named_modules() if isinstance(module, ChannelGate)]
    found = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, _BatchNorm) and module.weight is not None
        if not any(name.startswith(f"{gate}.") for gate in gates)
    }
    if not found:
        raise ValueError("the network has no batch norm with scales, by which pruning tells the channels that matter")

    def match(name: str, patterns: Sequence[str]) -> bool:
        parent, _, child = name.rpartition(".")
        behind = child == "norm" and isinstance(getattr(model.get_submodule(parent), "select", None), ChannelSelection)
        return any(fnmatchcase(known, p) for known in ([name, parent] if behind else [name]) for p in patterns)

    for pattern in as_patterns(include):
        if not any(match(name, [pattern]) for name in found):
            raise ValueError(f"include={pattern!r} matches no batch norm; {closest(pattern, found)}")
    wanted = as_patterns(include) or ["*"]
    return {n: module for n, module in found.items() if match(n, wanted) and not match(n, as_patterns(exclude))}


def prune(
    model: nn.Module,
    ratio: float,
    *,
    min_channels: int = 4,
    max_ratio_per_layer: float = 0.9,
    streams: Streams = "keep",
    include: Patterns = None,
    exclude: Patterns = None,
    example_input: Any = None,
) -> PruneReport:
    """Takes the channels with the smallest batch norm scales |gamma| out of `model`, in place (paper, Section 3).

    The part `ratio` of all scales that can go is below one threshold for the whole network; where channels must go
    together (depthwise convolutions, squeeze-excite, the orbits of SlimConv's folds and flip, equally many in every
    group of a grouped convolution, coupled streams), the mean of their scales counts. The authors' code takes one
    scale more. Gates' norms are left out.

    Before it returns, `prune` shows on random images that the network computes what it did with the pruned channels
    masked: their scales and shifts, and their biases in depthwise convolutions, zero. Integers may differ where no
    layer does. If anything fails, `model` is exactly as it was.

    Args:
        model: Any network. Optimizers and averages must be made after pruning: there are new parameters.
        ratio: From 0 on and below 1.
        min_channels: No norm keeps fewer channels than that by pruning.
        max_ratio_per_layer: No norm loses a larger part of its channels (0.5 in the paper's multi-pass scheme).
        streams: What happens where blocks are joined by sums or dense connections. "keep" leaves those channels;
            "coupled" prunes a channel in all that write or read it; "select" puts a selection in front of each norm
            that reads a stream of fixed width, the paper's way with pre-activation ResNets and DenseNets.
        include: Name patterns (`fnmatch`) of norms; only these are pruned.
        exclude: Name patterns of norms to leave alone.
        example_input: A tensor, a tuple of positional or a dict of keyword arguments of the forward pass; its values
            matter only where the network makes nothing finite of random ones. By default images of common sizes are
            tried, small ones first.

    Returns:
        The report; it prints as a table, with the reason for every layer that was left.

    Raises:
        ValueError: If `ratio`, `min_channels` or `max_ratio_per_layer` is out of range, the network has no batch norm
            with scales or cannot be traced, or the proof fails; the message names the first layer that differs.
        TypeError: If `model` is no network.
    """
    check_network(model)
    if not 0 <= ratio < 1:
        raise ValueError(f"ratio={ratio} is not at least 0 and below 1")
    if min_channels < 1:
        raise ValueError(f"min_channels={min_channels} must be at least 1")
    if not 0 <= max_ratio_per_layer <= 1:
        raise ValueError(f"max_ratio_per_layer={max_ratio_per_layer} is not between 0 and 1")
    norms = prunable_norms(model, include, exclude)
    scales = {
        # With a parametrization it is no parameter.
        name: torch.as_tensor(norm.weight).detach().abs().double().numpy(force=True)
        for name, norm in norms.items()
    }
    graph, inputs = _trace(model, example_input)
    classes = find_classes(model, graph, scales, streams)
    _refuse_what_is_read(model, graph, classes, inputs)
    removed, held = _choose(classes, graph, scales, ratio, min_channels, max_ratio_per_layer)
    rows = _rows(model, graph, classes, scales, removed, held)
    plan = make_plan(graph, removed, classes.selected)
    plan["after"] = {name: len(plans) for name, plans in plans_of(model).items() if name}

    edits = Edits(model)
    masked = replica(model)
    mask(masked, graph, removed)
    try:
        follow_plan(edits, plan)
        found, widths = _prove(masked, replica(model), inputs, plan)
        plan["operators"] = widths
        follow_plan(edits, {"kept": {}, "selected": {}, "operators": widths})
        note_plan(edits, plan)
    except BaseException:
        edits.take_back()
        raise
    own = np.concatenate([graph.spaces[name].labels for name in scales if name in graph.spaces])
    free = ~np.isin(classes.of[own], list(classes.reasons))
    return PruneReport(model, rows, ratio, int(removed[own].sum()), int(free.sum()), found, plan)


def _trace(model: nn.Module, example_input: Any) -> tuple[ChannelGraph, Inputs]:
    try:
        graph, inputs = trace_example(model, example_input, SIZES, channel_flow)
    except Exception as error:
        raise ValueError(f"the network could not be traced: {one_line(error)}; give an example_input") from error
    return graph, proof_inputs(model, inputs)


# ---- deciding ----------------------------------------------------------------------------------------------------


def _refuse_what_is_read(model: nn.Module, graph: ChannelGraph, classes: Classes, inputs: Inputs) -> None:
    """Adds to `classes.reasons` those that some layer would still read as something else than zero."""
    candidates = ~np.isin(classes.of, list(classes.reasons))
    alive = read_alive(model, inputs, graph, candidates)
    for use in uses_of(graph):
        if use.kind in ("conv", "linear"):
            free = (use.labels >= 0) & candidates[use.labels]
            # A layer that did not run proves nothing.
            read = use.labels[free & alive.get(use.by, np.ones(len(use.labels), bool))]
            for found in np.unique(classes.of[read]).tolist():
                classes.reasons.setdefault(
                    found, f"{use.by} reads it past the norm, or through an activation that makes no zero of zero"
                )


def _choose(
    classes: Classes, graph: ChannelGraph, scales: Mapping[str, Any], ratio: float, least: int, most: float
) -> tuple[Flags, dict[str, str]]:
    """Which channels go, and for each norm that keeps some of them only because of a limit, which limit."""
    # Every layer's channels by class, and how many of them may go.
    layers: list[tuple[str, Labels, int]] = []
    for name, space in graph.spaces.items():
        limit = min(space.size - least, floor(most * space.size + 1e-9)) if name in scales else space.size - 1
        layers.append((name, space.labels, max(0, limit)))
    layers += [("", use.labels, len(use.labels) - 1) for use in uses_of(graph) if use.kind in ("conv", "linear")]
    left = [limit for _, _, limit in layers]
    limits = f"min_channels={least} and max_ratio_per_layer={most}"
    inside: dict[int, list[tuple[int, int]]] = {}
    for i, sizes in enumerate(class_sizes(classes, [labels for _, labels, _ in layers])):
        for found, size in sizes.items():
            inside.setdefault(found, []).append((i, size))
            width = len(layers[i][1])
            if size > left[i] and found not in classes.reasons:
                kept = f"{limits} keep {width - left[i]} of {width}"
                together = f"{size} of its {width} channels hang together, and {kept}" if size > 1 else kept
                classes.reasons[found] = "all its channels hang together" if size == width > 1 else together

    free = [c for c in np.unique(classes.of).tolist() if c not in classes.reasons]
    order = sorted(free, key=lambda c: (classes.score[c], c))
    budget = floor(ratio * sum(int(classes.weight[c]) for c in order))

    gone: list[int] = []
    held: dict[str, str] = {}
    for found in order:
        budget -= int(classes.weight[found])
        if budget < 0:
            break
        full = [i for i, size in inside[found] if size > left[i]]
        for i in full:
            name, labels, limit = layers[i]
            held.setdefault(name, f"{limits} keep {len(labels) - limit} of {len(labels)}")
        if full:
            for i, _ in inside[found]:
                held.setdefault(layers[i][0], "some go together with what a limit keeps elsewhere")
            continue
        for i, size in inside[found]:
            left[i] -= size
        gone.append(found)
    return np.isin(classes.of, gone), held


def _rows(
    model: nn.Module,
    graph: ChannelGraph,
    classes: Classes,
    scales: Mapping[str, Any],
    removed: Flags,
    held: Mapping[str, str],
) -> tuple[PrunedRow, ...]:
    normed = {label for use in uses_of(graph) if use.kind == "norm" for label in use.labels.tolist()}
    rows = []
    for name, space in graph.spaces.items():
        is_norm = isinstance(model.get_submodule(name), _NormBase)
        if not is_norm and not normed.isdisjoint(space.labels.tolist()):
            continue
        gone = int(removed[space.labels].sum())
        why = held.get(name, "")
        if not gone:
            above = "none of its scales is below the threshold"
            why = classes.reason(space.labels) or why or above
        elif name in classes.selected:
            why = "; ".join(filter(None, ["selects from a stream", why]))
        rows.append(PrunedRow(name, space.size, space.size - gone, why))
    unseen = [name for name in scales if name not in graph.spaces]
    rows += [PrunedRow(name, n := len(scales[name]), n, "never ran in the traced forward pass") for name in unseen]
    return tuple(rows)


# ---- proving -----------------------------------------------------------------------------------------------------


def _prove(masked: nn.Module, pruned: nn.Module, inputs: Inputs, plan: Plan) -> tuple[float, dict[str, list[int]]]:
    """How far the two networks' outputs are apart, and what each operator in the pruned one reads and writes."""
    widths: dict[str, list[int]] = {}
    for name, module in pruned.named_modules():
        if isinstance(module, Operator):

            def note(m: nn.Module, args: Any, output: Any, name: str = name) -> None:
                widths[name] = [args[0].shape[1], output.shape[1]]

            module.register_forward_hook(note)
    try:
        (found, tells_all), problem = difference(masked, pruned, inputs), ""
    except Exception as error:
        found, tells_all, problem = float("inf"), False, f" ({one_line(error)})"
    if isnan(found):
        raise ValueError(
            "the masked network's output is not finite, or there is none, so that pruning cannot be proved right; "
            "if it needs values of some kind, give them as example_input"
        )
    fine = found <= TOLERANCE
    kept = {name: np.array(sides["output"]) for name, sides in plan["kept"].items() if "output" in sides}
    layer = "" if fine and tells_all else first_difference(masked, pruned, inputs, kept, TOLERANCE)
    if layer or not fine:
        raise ValueError(
            f"the pruned network is not the masked one: outputs differ by {found:.1e}{problem}, relative to the "
            f"largest, first at {layer or 'no single layer'}; the network is unchanged; leave it alone with exclude"
        )
    return found, widths
