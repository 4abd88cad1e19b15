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
"""{"kept": {layer: {"input": numbers, "output": numbers}}, "selected": {norm: numbers}, "operators": {name: widths},
"was": {layer: {"input": width, "output": width}}, "after": {part: count}}.

Numbers are those of channels (for a linear layer, of features) before; widths are what an operator reads and writes;
`was` is how wide the layers in `kept` were; `after` says which parts of the network had been pruned on their own by
then, and how often. Older plans have no `was` and no `after`.
"""


def make_plan(graph: ChannelGraph, removed: Flags, selected: set[str]) -> Plan:
    """The plan that takes the channels flagged in `removed` out; `selected` norms get a selection in front of them."""
    kept: dict[str, dict[str, list[int]]] = {}
    was: dict[str, dict[str, int]] = {}

    def note(layer: str, side: str, gone: Flags) -> None:
        if gone.any():
            kept.setdefault(layer, {})[side] = np.flatnonzero(~gone).tolist()
            was.setdefault(layer, {})[side] = len(gone)

    for name, space in graph.spaces.items():
        note(name, "output", removed[space.labels])
    for use in uses_of(graph):
        # What a norm writes has been noted; those that write no space of their own have the channels that they read.
        if use.kind in ("conv", "linear") or (use.kind == "norm" and use.by not in graph.spaces):
            note(use.by, "output" if use.kind == "norm" else "input", (use.labels >= 0) & removed[use.labels])
    chosen = {name: kept[name]["output"] for name in sorted(selected) if name in kept}
    return {"kept": kept, "selected": chosen, "operators": {}, "was": was, "after": {}}


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

    def bring(name: str, count: int) -> None:
        """Does the first `count` prunings of one part; what its own parts had gone through before each comes first."""
        for plan in plans[name][len(_done(parts[name])) : count]:
            for inner, before in _entry(plan, "after").items():
                if (inside := f"{name}.{inner}".removeprefix(".")) in plans:
                    bring(inside, before)
            made.append(_carry_out(parts[name], plan))

    parts = dict(model.named_modules())
    try:
        for name, wanted in plans.items():
            if name not in parts:
                raise ValueError(f"the plan is another network's: there is no {name!r} to be pruned")
            done = _done(parts[name])
            if len(done) > len(wanted) or not all(_same(a, b) for a, b in zip(done, wanted, strict=False)):
                raise ValueError("the network has been pruned already, and otherwise")
        for name, wanted in plans.items():
            bring(name, len(wanted))
    except BaseException:
        take_back()
        raise
    return take_back


def note_plan(edits: Edits, plan: Plan) -> None:
    """Writes down on the network what was done with it."""
    edits.set("", {"pruning_plans": [*_done(edits.model), plan]})


def _done(model: nn.Module) -> list[Plan]:
    return getattr(model, "pruning_plans", [])


def _entry(plan: Plan, key: str) -> dict[str, Any]:
    """Of a plan from a file, of which nothing is known yet; {} where it is an older one or none."""
    value = plan.get(key) if isinstance(plan, Mapping) else None
    return dict(value) if isinstance(value, Mapping) else {}


def _same(a: Plan, b: Plan) -> bool:
    """Whether two plans do the same; an older one does not say how wide the layers were."""
    return all(_entry(a, key) == _entry(b, key) for key in ("kept", "selected", "operators"))


def _carry_out(model: nn.Module, plan: Plan) -> Edits:
    modules = dict(model.named_modules())
    edits = Edits(model)
    try:
        for name, sides in plan["kept"].items():
            for side, numbers in sides.items():
                width, was = _width(modules.get(name), side), _entry(plan, "was").get(name, {}).get(side)
                if width is None or not numbers or max(numbers) >= width or was not in (None, width):
                    has = "there is no such layer" if name not in modules else f"it has {width}"
                    wanted = was or f"{max(numbers, default=-1) + 1} or more"
                    raise ValueError(f"the plan is another network's: {name} should have {wanted} channels; {has}")
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
