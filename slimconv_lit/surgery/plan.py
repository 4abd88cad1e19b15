"""What pruning does, as plain values: a checkpoint can say it, and a fresh network can be given the same shape."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
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
    _carry_out(model, plan)


def plans_of(model: nn.Module) -> dict[str, list[Plan]]:
    """All prunings of `model` and of the networks in it that were pruned on their own, by name; its own under "".

    Saved beside the weights under "pruned", they let `load_weights` shape a fresh network before it reads them.
    """
    return {
        name: list(plans) for name, module in model.named_modules() if (plans := getattr(module, "pruning_plans", None))
    }


def apply_plans(model: nn.Module, plans: Mapping[str, Sequence[Plan]]) -> Callable[[], None]:
    """Does with `model` what `plans_of` says of another; what has been done to it already is not done again.

    Returns:
        What takes all of it back.

    Raises:
        ValueError: If `model` has been pruned otherwise, or a plan is another network's. It is unchanged then.
    """
    made: list[Edits] = []

    def take_back() -> None:
        while made:
            made.pop().take_back()

    try:
        for name, wanted in plans.items():
            part = dict(model.named_modules()).get(name)
            if part is None:
                raise ValueError(f"the plan is another network's: there is no {name!r} to be pruned")
            done = getattr(part, "pruning_plans", [])
            if done != list(wanted[: len(done)]):
                raise ValueError("the network has been pruned already, and otherwise")
            made.extend(_carry_out(part, plan) for plan in wanted[len(done) :])
    except BaseException:
        take_back()
        raise
    return take_back


def note_plan(edits: Edits, plan: Plan) -> None:
    """Writes down on the network what was done with it."""
    edits.set("", {"pruning_plans": [*getattr(edits.model, "pruning_plans", []), plan]})


def _carry_out(model: nn.Module, plan: Plan) -> Edits:
    modules = dict(model.named_modules())
    edits = Edits(model)
    try:
        for name, sides in plan["kept"].items():
            for side, numbers in sides.items():
                width = _width(modules.get(name), side)
                if width is None or not numbers or max(numbers) >= width:
                    has = "there is no such layer" if name not in modules else f"it has {width}"
                    most = max(numbers, default=-1) + 1
                    raise ValueError(
                        f"the plan is another network's: {name} should have {most} or more channels; {has}"
                    )
        follow_plan(edits, plan)
        note_plan(edits, plan)
    except (AttributeError, IndexError, KeyError, TypeError) as error:
        edits.take_back()
        raise ValueError(f"this is no plan of a pruning of the network: {error!r}") from error
    except BaseException:
        edits.take_back()
        raise
    return edits


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
