"""The channel graph as pruning needs it: finer than the one that substitution needs.

Norms write spaces of their own, so that what is read in front of a norm can be told from what is read behind it;
operators are looked into; and where channels are split, reordered or padded, that is noted.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.utils._pytree import tree_iter

from slimconv_lit.surgery.graph import ChannelGraph, Labels, Tie
from slimconv_lit.surgery.trace import NORMS, Inputs, _Recorder, trace

aten = torch.ops.aten

# They put tensors behind each other; what they write is in no other order than what they read.
_JOINING = {aten.cat, aten.stack}


class ChannelSelection(nn.Module):
    """Some of the channels that it reads, in order: (B, C, H, W) -> (B, len(kept), H, W).

    Network Slimming (ICCV 2017, Section 3.4) puts it where many layers read a stream whose width is fixed. The
    numbers are a buffer, so that they are in checkpoints and are no parameters.

    Args:
        kept: Numbers of the channels that it hands on.
    """

    index: Tensor

    def __init__(self, kept: list[int]) -> None:
        super().__init__()
        self.register_buffer("index", torch.tensor(kept))

    def forward(self, x: Tensor) -> Tensor:
        """Selects; see the class."""
        return x.index_select(1, self.index)

    def extra_repr(self) -> str:
        """What the printed module shows."""
        return f"{len(self.index)} channels"


def channel_flow(model: nn.Module, inputs: Inputs) -> ChannelGraph:
    """The fine channel graph of `model`, as `trace` makes it.

    Raises:
        Exception: Whatever the forward pass in eval mode raises.
    """
    indices = {
        f"{name}.{key}": value.tolist()
        for name, module in model.named_modules()
        for key, value in module.named_buffers(recurse=False)
        if value.dtype == torch.int64 and value.ndim == 1
    }
    return trace(model, inputs, functools.partial(_FlowRecorder, indices=indices))


class _FlowRecorder(_Recorder):  # type: ignore[no-untyped-call]
    leaves = (nn.Conv2d, nn.Linear, *NORMS)

    def __init__(self, graph: ChannelGraph, model: nn.Module, indices: dict[str, list[int]]) -> None:
        super().__init__(graph, model)
        buffers = dict(model.named_buffers())
        # On the meta device the numbers themselves are gone.
        self.stacked: dict[int, int] = {}
        self.indices = {id(buffers[name]): np.array(values) for name, values in indices.items()}

    def layer(self, name: str, module: nn.Module, x: Tensor, output: Tensor) -> None:
        super().layer(name, module, x, output)
        if isinstance(module, _NormBase):
            self.write(name, output, axis=1)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        operation, kwargs = func.overloadpacket, kwargs or {}
        if self.inside:
            return func(*args, **kwargs)
        if operation is aten.addcmul:
            # A sum and a product in one; which of the two ties which makes a difference.
            with self:
                return args[0] + args[1] * args[2]
        if operation is aten._softmax and self.known(args[0]) is not None:
            return self.softmax(func, args)
        if operation is aten.index_select and id(args[2]) in self.indices and self.known(args[0]) is not None:
            return self.index_select(func, args)
        output = super().__torch_dispatch__(func, types, args, kwargs)
        if operation is aten.stack:
            self.stacked[id(output)] = (args[1] if len(args) > 1 else kwargs.get("dim", 0)) % output.ndim
        if operation is aten.unbind and self.stacked.get(id(args[0])) == (args[1] if len(args) > 1 else 0):
            # What was stacked comes apart again, however wide it is.
            return output
        pointwise = torch.Tag.pointwise in func.tags
        known = [labels for value in tree_iter((args, kwargs)) if (labels := self.known(value)) is not None]
        if len(known) == 1 and operation not in _JOINING and not pointwise:
            for leaf in tree_iter(output):
                self.note_moved(operation.__name__, known[0], self.known(leaf))
        return output

    def note_moved(self, what: str, before: Labels, after: Labels | None) -> None:
        if after is not None and not np.array_equal(_sequence(before), _sequence(after)):
            self.use("moved", f"{what} in {self.where[-1] or 'the network'}", _sequence(before))

    def softmax(self, func: Any, args: Any) -> Tensor:
        """Over another axis than the channels' it mixes what lies above each other, which is tied."""
        labels, output = self.known(args[0]), func(*args)
        assert labels is not None
        along = np.moveaxis(labels, args[1], 0)
        if len(along) > 1 and along[0].size == 1:
            self.use("opaque", f"softmax in {self.where[-1] or 'the network'}", labels)
            return output
        for other in along[1:]:
            tie = Tie("product", along[0].ravel(), other.ravel(), self.where[-1])
            for space in self.graph.spaces_of(np.concatenate([tie.mine, tie.theirs])):
                space.ties["product", tie.mine.tobytes(), tie.theirs.tobytes()] = tie
        self.mark(output, labels)
        if id(args[0]) in self.stacked:
            self.stacked[id(output)] = self.stacked[id(args[0])]
        return output

    def index_select(self, func: Any, args: Any) -> Tensor:
        labels, output = self.known(args[0]), func(*args)
        assert labels is not None
        self.consume([args[0]], f"index_select in {self.where[-1]} #{next(self.tick)}")
        chosen = labels if labels.shape[args[1]] == 1 else labels.take(self.indices[id(args[2])], axis=args[1])
        self.note_moved("index_select", labels, chosen)
        self.mark(output, chosen)
        return output


def _sequence(labels: Labels) -> Labels:
    """Labels in order, without repetitions side by side (of which a flattened map has many)."""
    flat = labels.ravel()
    return flat[np.concatenate([[True], flat[1:] != flat[:-1]])] if len(flat) else flat
