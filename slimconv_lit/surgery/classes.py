"""Which channels must be pruned together, and which cannot be.

Channels that meet in a sum or a product, that a depthwise convolution or a norm maps onto each other, or that an
operator folds onto each other, stay or go as one: they make a class. For SlimConv these classes are what its folds and
its flip carry into each other; with two folds and C divisible by 4, {i, i + C/2, C/2 - 1 - i, C - 1 - i}.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase
from torchvision.ops import FrozenBatchNorm2d

from slimconv_lit.ops import CompactConv2d, Operator, SlimConv2d
from slimconv_lit.surgery.flow import ChannelSelection
from slimconv_lit.surgery.graph import ChannelGraph, Labels, Tie, Use
from slimconv_lit.surgery.resize import host_forward
from slimconv_lit.surgery.substitute import shared_layers

Streams: TypeAlias = Literal["keep", "coupled", "select"]

# They split by the live width, and what they fold together is one class, so the folds of what is kept meet as before.
FOLDING = (SlimConv2d, CompactConv2d)

# What pruning knows how to cut in a norm.
_NORM_TENSORS = ("weight", "bias", "running_mean", "running_var")


@dataclass(eq=False)
class Classes:
    """The classes of a network's channels.

    Attributes:
        of: The class of every channel of the graph.
        score: Mean |gamma| of the scales in a class; NaN where there are none.
        weight: How many scales there are in a class.
        reasons: Why a class cannot be pruned.
        own_reasons: The same for single channels; the others of their class go together with them.
        selected: Norms that read some channels of a stream whose width stays.
    """

    of: Labels
    score: NDArray[np.float64]
    weight: Labels
    reasons: dict[int, str]
    own_reasons: dict[int, str]
    selected: set[str]

    def reason(self, labels: Labels) -> str:
        """The first reason why one of `labels` cannot be pruned, or ""."""
        own = next((self.own_reasons[label] for label in labels.tolist() if label in self.own_reasons), "")
        shared = next((self.reasons[c] for c in self.of[labels].tolist() if c in self.reasons), "")
        return own or shared


def uses_of(graph: ChannelGraph) -> list[Use]:
    """Every use in the graph, once."""
    return list({id(use): use for space in graph.spaces.values() for use in space.uses.values()}.values())


def is_depthwise(module: nn.Module) -> bool:
    """Whether each channel that a convolution writes comes of one that it reads."""
    return isinstance(module, nn.Conv2d) and module.groups == module.in_channels > 1


class _Finder:
    def __init__(self, model: nn.Module, graph: ChannelGraph, scales: dict[str, NDArray[np.float64]]) -> None:
        self.model, self.graph, self.scales = model, graph, scales
        self.spaces = list(graph.spaces.values())
        self.size = max((space.start + space.size for space in self.spaces), default=0)
        self.owner = np.repeat(np.arange(len(self.spaces)), [space.size for space in self.spaces])
        self.uses = uses_of(graph)
        ties = {id(tie): tie for space in self.spaces for tie in space.ties.values()}
        self.ties: list[Tie] = list(ties.values())
        self.edges: list[tuple[Labels, Labels]] = []
        self.why: dict[int, str] = {}
        self.stream: dict[int, str] = {}
        self.operators = [name for name, module in model.named_modules() if isinstance(module, Operator)]
        self.once = {name for name, calls in graph.calls.items() if calls == 1} - shared_layers(model)

    def block(self, labels: Labels, why: str) -> None:
        for label in np.unique(labels[labels >= 0]).tolist():
            self.why.setdefault(label, why)

    def tie(self, mine: Labels, theirs: Labels) -> None:
        both = (mine >= 0) & (theirs >= 0)
        self.edges.append((mine[both], theirs[both]))

    def components(self) -> Labels:
        """The smallest channel that each channel is tied to, over any number of ties."""
        found = np.arange(self.size)
        if not self.edges:
            return found
        a, b = (np.concatenate(side) for side in zip(*self.edges, strict=True))
        while True:
            least = np.minimum(found[a], found[b])
            before = found.copy()
            np.minimum.at(found, found[a], least)
            np.minimum.at(found, found[b], least)
            found = found[found]
            if np.array_equal(found, before):
                return found

    # ---- what the graph says --------------------------------------------------------------------------------------

    def read_ties(self) -> None:
        for tie in self.ties:
            unwritten = (tie.mine < 0) | (tie.theirs < 0)
            both = np.concatenate([tie.mine[unwritten], tie.theirs[unwritten]])
            self.block(both, "it meets channels that no layer writes, such as a shortcut's zeros")
            self.tie(tie.mine, tie.theirs)
            inside = any(tie.where == name or tie.where.startswith(f"{name}.") for name in self.operators)
            apart = ~unwritten & (self.owner[tie.mine] != self.owner[tie.theirs])
            if tie.kind == "sum" and not inside:
                for mine, theirs in zip(tie.mine[apart].tolist(), tie.theirs[apart].tolist(), strict=True):
                    self.stream.setdefault(mine, f"it is added to what {self.writer(theirs)} writes")
                    self.stream.setdefault(theirs, f"it is added to what {self.writer(mine)} writes")
        for name, module in self.model.named_modules():
            if isinstance(module, SlimConv2d) and f"{name}.gate.excite" in self.graph.spaces:
                squeeze = next(use for use in self.uses if use.by == f"{name}.gate.squeeze")
                # Those that no fold takes are weighed in vain; with them the gate keeps the width of what it reads.
                self.tie(squeeze.labels, self.graph.spaces[f"{name}.gate.excite"].labels)

    def writer(self, label: int) -> str:
        return self.spaces[self.owner[label]].writer

    def read_layers(self) -> None:
        for space in self.spaces:
            layer = self.model.get_submodule(space.writer)
            if space.writer not in self.once:
                self.block(space.labels, f"{space.writer} is used more than once")
            elif problem := not_ordinary(layer):
                self.block(space.labels, f"{space.writer}: {problem}")
            elif isinstance(layer, _NormBase) and space.writer not in self.scales:
                self.block(space.labels, left_out(self.model, space.writer))
            elif isinstance(layer, nn.Conv2d) and is_depthwise(layer):
                read = next((u for u in self.uses if u.by == space.writer and u.kind == "conv"), None)
                if read is None:
                    self.block(space.labels, f"{space.writer} reads channels that no layer writes")
                else:
                    self.tie(np.repeat(read.labels, layer.out_channels // layer.in_channels), space.labels)
                    unread = np.repeat(read.labels < 0, len(space.labels) // len(read.labels))
                    self.block(space.labels[unread], f"{space.writer} reads channels that no layer writes")
        for use in self.uses:
            self.read_use(use)

    def read_use(self, use: Use) -> None:
        if use.kind == "output":
            self.block(use.labels, "the network returns it")
        elif use.kind == "opaque":
            self.block(use.labels, f"it goes into {use.by}")
        elif use.kind == "moved":
            inside = self.enclosing(use.where)
            # A random order has numbers of its own, which would have to be drawn anew.
            if not isinstance(inside, (*FOLDING, ChannelSelection)) or hasattr(inside, "order"):
                self.block(use.labels, f"it is split or reordered by {use.by}")
        elif use.by not in self.once:
            self.block(use.labels, f"{use.by} reads it, which is used more than once")
        else:
            layer = self.model.get_submodule(use.by)
            if use.kind == "norm" and not isinstance(layer, (_NormBase, FrozenBatchNorm2d)):
                self.block(use.labels, f"{use.by}, a {type(layer).__name__}, normalises it together with others")
            elif problem := not_ordinary(layer):
                self.block(use.labels, f"{use.by} reads it: {problem}")

    def enclosing(self, where: str) -> nn.Module:
        """The operator that the module `where` is in, or else that module."""
        inside = [name for name in self.operators if where == name or where.startswith(f"{name}.")]
        return self.model.get_submodule(inside[0] if inside else where)

    def read_streams(self) -> None:
        """Besides sums, what several norms read, or a norm and another layer, is a stream: dense connections."""
        norms, readers = np.zeros(self.size, int), np.zeros(self.size, int)
        for use in self.uses:
            seen = np.unique(use.labels[use.labels >= 0])
            norms[seen] += use.kind == "norm"
            readers[seen] += use.kind in ("conv", "linear")
        for label in np.flatnonzero((norms > 1) | ((norms > 0) & (readers > 0))).tolist():
            self.stream.setdefault(label, "several layers read it, of which one norms it")

    def follow_norms(self, streams: Streams) -> set[str]:
        """Ties what norms read to what they write, unless that is a stream; which norms must select."""
        components = self.components()
        in_stream = np.isin(components, components[sorted(self.stream)])
        selected: set[str] = set()
        for use in self.uses:
            if use.kind != "norm" or use.by not in self.graph.spaces:
                continue
            written = self.graph.spaces[use.by].labels
            reads_stream = (use.labels >= 0) & in_stream[use.labels]
            if streams == "select" and reads_stream.any():
                selected.add(use.by)
                continue
            self.block(written[use.labels < 0], "it norms channels that no layer writes")
            if streams == "coupled":
                reads_stream[:] = False
            self.block(written[reads_stream], "it reads a stream, which keeps its width")
            self.tie(use.labels[~reads_stream], written[~reads_stream])
        for space in self.spaces:
            layer = self.model.get_submodule(space.writer)
            if isinstance(layer, _NormBase) and not any(u.kind == "norm" and u.by == space.writer for u in self.uses):
                self.block(space.labels, "it norms what no layer writes")
        if streams != "coupled":
            for label, why in self.stream.items():
                self.why.setdefault(label, f"{why}, and streams keep their width")
        return selected

    # ---- scores ---------------------------------------------------------------------------------------------------

    def scored(self) -> tuple[Labels, NDArray[np.float64], Labels]:
        """Components, and for each the mean of its scales and their number."""
        components = self.components()
        total, count = np.zeros(self.size), np.zeros(self.size, int)
        for name, gammas in self.scales.items():
            if name in self.graph.spaces:
                found = components[self.graph.spaces[name].labels]
                np.add.at(total, found, gammas)
                np.add.at(count, found, 1)
        return components, np.where(count, total / np.maximum(count, 1), np.nan), count

    def align_groups(self) -> None:
        """Every group of a grouped convolution loses equally many: the least of each group go together, and so on."""
        components, score, _ = self.scored()
        for name, space in self.graph.spaces.items():
            layer = self.model.get_submodule(name)
            if not isinstance(layer, nn.Conv2d) or layer.groups == 1 or is_depthwise(layer):
                continue
            for labels in [space.labels, *(u.labels for u in self.uses if u.by == name and u.kind == "conv")]:
                if (labels < 0).any():
                    self.block(labels, f"{name} reads it in groups, together with channels that no layer writes")
                    continue
                grouped = labels.reshape(layer.groups, -1)
                order = np.argsort(score[components[grouped]], axis=1, kind="stable")
                rows = np.take_along_axis(grouped, order, axis=1)
                for other in rows[1:]:
                    self.tie(rows[0], other)


def not_ordinary(layer: nn.Module) -> str:
    """Why a layer is more than a convolution, a linear layer or a norm of its kind; "" if it is not."""
    if isinstance(layer, nn.Conv2d | nn.Linear):
        return host_forward(layer)
    if not isinstance(layer, _NormBase):
        return ""
    if hasattr(layer, "parametrizations") or not isinstance(layer.weight, nn.Parameter | None):
        return "its scales are computed from other parameters"
    tensors = (*layer.named_parameters(), *layer.named_buffers())
    more = [name for name, tensor in tensors if tensor.numel() > 1 and name not in _NORM_TENSORS]
    return f"it has a tensor of its own, {more[0]}" if more else ""


def left_out(model: nn.Module, norm: str) -> str:
    """Why the scales of a norm take no part in pruning."""
    layer = model.get_submodule(norm)
    if not isinstance(layer, _BatchNorm) or layer.weight is None:
        return f"{norm} has no scales"
    return f"the scales of {norm} are left out"


def find_classes(
    model: nn.Module, graph: ChannelGraph, scales: dict[str, NDArray[np.float64]], streams: Streams
) -> Classes:
    """The classes of all channels of `graph`.

    Args:
        model: The network that the graph is of.
        graph: From `channel_flow`.
        scales: |gamma| of every norm that takes part, by name.
        streams: As in `prune`.
    """
    finder = _Finder(model, graph, scales)
    finder.read_ties()
    finder.read_layers()
    finder.read_streams()
    selected = finder.follow_norms(streams)
    finder.align_groups()
    of, score, weight = finder.scored()
    reasons: dict[int, str] = {}
    for label, why in finder.why.items():
        reasons.setdefault(int(of[label]), why)
    for component in np.unique(of[~np.isin(of, list(reasons))]).tolist():
        if not weight[component]:
            reasons[component] = "no batch norm scales it"
    return Classes(of, score, weight, reasons, finder.why, selected)


def class_sizes(classes: Classes, layers: Iterable[Labels]) -> list[dict[int, int]]:
    """For each layer's channels, how many of each class are among them."""
    counted = (np.unique(classes.of[labels[labels >= 0]], return_counts=True) for labels in layers)
    return [dict(zip(found.tolist(), counts.tolist(), strict=True)) for found, counts in counted]
