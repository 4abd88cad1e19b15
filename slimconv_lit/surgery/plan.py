"""What pruning does, as plain values: a checkpoint can say it, and a fresh network can be given the same shape."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any, TypeAlias

import numpy as np
from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from slimconv_lit.surgery.classes import uses_of
from slimconv_lit.surgery.flow import ChannelSelection
from slimconv_lit.surgery.graph import ChannelGraph
from slimconv_lit.surgery.masks import Flags
from slimconv_lit.surgery.resize import Edits

Plan: TypeAlias = dict[str, Any]
"""{"kept": {layer: {"input": numbers, "output": numbers}}, "selected": {norm: numbers}, "operators": {name: widths}}.

Numbers are those of channels (for a linear layer, of features) before; widths are what an operator reads and writes.
"""


def make_plan(graph: ChannelGraph, removed: Flags, selected: set[str]) -> Plan:
    """The plan that takes the channels flagged in `removed` out; `selected` norms get a selection in front of them."""
    kept: dict[str, dict[str, list[int]]] = {}

    def note(layer: str, side: str, gone: Flags) -> None:
        if gone.any():
            kept.setdefault(layer, {})[side] = np.flatnonzero(~gone).tolist()

    for name, space in graph.spaces.items():
        note(name, "output", removed[space.labels])
    for use in uses_of(graph):
        # What a norm writes has been noted; those that write no space of their own have the channels that they read.
        if use.kind in ("conv", "linear") or (use.kind == "norm" and use.by not in graph.spaces):
            note(use.by, "output" if use.kind == "norm" else "input", (use.labels >= 0) & removed[use.labels])
    chosen = {name: kept[name]["output"] for name in sorted(selected) if name in kept}
    return {"kept": kept, "selected": chosen, "operators": {}}


def apply_plan(model: nn.Module, plan: Plan) -> None:
    """Does with `model` what `prune` did with another of the same make, in place: each layer keeps the same channels.

    A checkpoint of the pruned network can then be loaded into it. Several prunings are several plans, in their order.

    Args:
        model: A network as it was before pruning.
        plan: `PruneReport.plan`.

    Raises:
        ValueError: If the plan is another network's; the message names the layer. `model` is unchanged then.
    """
    modules = dict(model.named_modules())
    for name, sides in plan["kept"].items():
        for side, numbers in sides.items():
            width = _width(modules.get(name), side)
            if width is None or not numbers or max(numbers) >= width:
                has = "there is no such layer" if name not in modules else f"it has {width}"
                most = max(numbers, default=-1) + 1
                raise ValueError(f"the plan is another network's: {name} should have {most} or more channels; {has}")
    edits = Edits(model)
    try:
        follow_plan(edits, plan)
    except BaseException:
        edits.take_back()
        raise


def follow_plan(edits: Edits, plan: Plan) -> None:
    """Makes the edits of a plan; whoever made `edits` takes them back if anything fails."""
    for name, sides in plan["kept"].items():
        for side, numbers in sides.items():
            edits.keep(name, numbers, "input" if side == "input" else "output")
    for name, numbers in plan["selected"].items():
        parent, _, child = name.rpartition(".")
        front = getattr(edits.model.get_submodule(parent), "select", None)
        if child == "norm" and isinstance(front, ChannelSelection):
            edits.set(f"{parent}.select", {"index": front.get_buffer("index")[numbers]})
            continue
        norm = edits.model.get_submodule(name)
        selection = ChannelSelection(numbers).to(next(norm.parameters()).device)
        edits.replace(name, nn.Sequential(OrderedDict(select=selection, norm=norm)).train(norm.training))
    for name, (reads, writes) in plan["operators"].items():
        edits.set(name, {"in_channels": reads, "out_channels": writes})


def _width(layer: nn.Module | None, side: str) -> int | None:
    if isinstance(layer, nn.Conv2d):
        return layer.in_channels if side == "input" else layer.out_channels
    if isinstance(layer, nn.Linear):
        return layer.in_features if side == "input" else layer.out_features
    if isinstance(layer, _NormBase):
        return layer.num_features
    return len(layer.weight) if hasattr(layer, "weight") else None  # type: ignore[union-attr, arg-type]
