"""The channel graph: who writes a channel space, who reads it, and which spaces are tied to each other.

Every channel that a convolution or linear layer writes has a number. `trace.py` finds out where the numbers go; what it
does not understand it records as an opaque use, and the channels that went into it are never touched.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

Labels: TypeAlias = NDArray[np.int64]


class NotPrivateError(Exception):
    """A space cannot change its width; the message says why."""


@dataclass(frozen=True, eq=False)
class Use:
    """One place where channels are read: `labels` is what the reader saw along its channel axis, in order.

    `where` is the module in whose forward pass it is. "moved" are channels that are split, reordered or padded there,
    which only pruning asks for (`flow.py`).
    """

    kind: Literal["conv", "linear", "norm", "operator", "opaque", "output", "moved"]
    by: str
    labels: Labels
    where: str = ""


@dataclass(frozen=True, eq=False)
class Tie:
    """Channels that meet point by point in a sum or a product, so they keep or lose their place together."""

    kind: Literal["sum", "product"]
    mine: Labels
    theirs: Labels
    where: str = ""


@dataclass(eq=False)
class Space:
    """The channels that one layer writes, and all that happens to them."""

    writer: str
    start: int
    size: int
    uses: dict[tuple[str, str], Use] = field(default_factory=dict)
    ties: dict[tuple[str, bytes, bytes], Tie] = field(default_factory=dict)
    consumers: set[str] = field(default_factory=set)

    @property
    def labels(self) -> Labels:
        """The numbers of this space's channels, in order."""
        return np.arange(self.start, self.start + self.size)


@dataclass(eq=False)
class ChannelGraph:
    """Every channel space of a network, in the order in which the layers first ran.

    Attributes:
        spaces: By the writing layer's name.
        calls: How often a layer ran in one forward pass.
        outputs: Shapes of the network's outputs, per mode ("eval", "train").
        unseen: A layer that did not run in a pass that could be traced, and why; any space may be read there. Else "".
    """

    spaces: dict[str, Space] = field(default_factory=dict)
    calls: Counter[str] = field(default_factory=Counter)
    outputs: dict[str, list[tuple[int, ...]]] = field(default_factory=dict)
    unseen: str = ""

    def spaces_of(self, labels: Labels) -> list[Space]:
        """The distinct spaces that appear in `labels`, in the order in which the network first wrote them."""
        known = list(self.spaces.values())
        starts = [space.start for space in known]
        return [known[i] for i in np.unique(np.searchsorted(starts, labels[labels >= 0], "right") - 1)]

    def private(self, name: str) -> Private:
        """Who must follow when the space that layer `name` writes changes its width.

        A space is private when only convolutions and linear layers read it, through norms, activations, pooling and
        dropout, and when the only products it takes part in are with the gate of a squeeze-excite block.

        Raises:
            NotPrivateError: If it is not; the message says what else happens to these channels.
        """
        space = self.spaces[name]
        found = Private()
        self._follow(space, found)
        for tie in space.ties.values():
            other = next((s for s in self.spaces_of(np.concatenate([tie.mine, tie.theirs])) if s is not space), space)
            pair = {tie.mine.tobytes(), tie.theirs.tobytes()}
            if tie.kind == "sum" or pair != {space.labels.tobytes(), other.labels.tobytes()} or other is space:
                verb = "added to" if tie.kind == "sum" else "multiplied by"
                raise NotPrivateError(
                    f"it is {verb} what {other.writer} writes" if other is not space else f"it is {verb} itself"
                )
            if len(other.ties) > 1:
                raise NotPrivateError(f"it is multiplied by what {other.writer} writes, which is used elsewhere too")
            gate = Private()
            self._follow(other, gate)
            if gate.readers:
                raise NotPrivateError(
                    f"it is multiplied by what {other.writer} writes, which {gate.readers[0]} reads too"
                )
            found.gates.append(other.writer)
            found.norms += gate.norms
        if not found.readers:
            raise NotPrivateError("no layer reads what it writes")
        return found

    def _follow(self, space: Space, found: Private) -> None:
        for use in space.uses.values():
            if use.kind == "output":
                raise NotPrivateError("the network returns what it writes")
            if use.kind in ("opaque", "operator"):
                raise NotPrivateError(f"it goes into {use.by}")
            if len(use.labels) % space.size or not np.array_equal(
                use.labels, np.repeat(space.labels, len(use.labels) // space.size)
            ):
                others = [s.writer for s in self.spaces_of(use.labels) if s is not space]
                if others or (use.labels < 0).any():
                    more = f" and {len(others) - 1} more" if len(others) > 1 else ""
                    joined = f"what {others[0]}{more} writes" if others else "other channels"
                    raise NotPrivateError(f"it is concatenated with {joined} before {use.by} reads it")
                raise NotPrivateError(f"it is split or reordered before {use.by} reads it")
            if self.calls[use.by] > 1:
                raise NotPrivateError(f"it is read by {use.by}, which runs more than once")
            (found.norms if use.kind == "norm" else found.readers).append(use.by)


@dataclass(eq=False)
class Private:
    """The layers that a private space's width binds.

    Attributes:
        readers: Convolutions and linear layers whose input is this space.
        norms: Norms on the way.
        gates: Layers that write a gate (squeeze-excite) which multiplies this space.
    """

    readers: list[str] = field(default_factory=list)
    norms: list[str] = field(default_factory=list)
    gates: list[str] = field(default_factory=list)
