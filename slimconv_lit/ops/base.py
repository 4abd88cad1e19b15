"""The contract that every convolution operator keeps, and the forms in which a caller may name one.

An operator stands where a spatial convolution *and its norm* stood: it contains its own norms, and the activation
after it belongs to the host. It writes `op.out_channels` channels, which may differ from what was asked for.
"""

from __future__ import annotations

import difflib
import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeAlias

from torch import Tensor, nn

Size: TypeAlias = int | tuple[int, int]
"""One number for both spatial axes, or one for each (height, width)."""


class Operator(nn.Module):
    """Base of all operators: `Op(in_channels, out_channels, kernel_size, stride, dilation, groups, padding, **own)`.

    `padding=None` means `dilation * (kernel_size // 2)`, which keeps the size at stride 1 for odd kernels.

    Attributes:
        in_channels: Channels that the operator reads.
        out_channels: Channels that it really writes.
    """

    in_channels: int
    out_channels: int

    def forward(self, x: Tensor) -> Tensor:
        """Maps (B, in_channels, H, W) to (B, out_channels, H', W')."""
        raise NotImplementedError


OperatorFactory: TypeAlias = Callable[[int, int, Size, Size, Size, int, Size | None], Operator]
"""What `substitute` calls, those seven arguments by position: an operator class or a `functools.partial` of one."""

OperatorLike: TypeAlias = OperatorFactory | str | Mapping[str, Any]
"""An `OperatorFactory`, a class name ("SlimConv2d"), or plain values: {"class_path": ..., "init_args": {...}}."""


def pair(size: Size) -> tuple[int, int]:
    """One number for each spatial axis."""
    return (size, size) if isinstance(size, int) else (size[0], size[1])


def same_padding(kernel_size: Size, dilation: Size) -> tuple[int, int]:
    """The padding that `padding=None` stands for: `dilation * (kernel_size // 2)` on each axis."""
    kernel, spread = pair(kernel_size), pair(dilation)
    return spread[0] * (kernel[0] // 2), spread[1] * (kernel[1] // 2)


def closest(name: str, names: Iterable[str]) -> str:
    """The end of an error message: the known names nearest to `name`, or all of them when none is near."""
    known = sorted(names)
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    return f"did you mean {' or '.join(repr(n) for n in near)}?" if near else f"known: {', '.join(known)}"


def operator_classes() -> dict[str, type[Operator]]:
    """Every operator class that has been imported, the user's own too, by class name."""
    found: dict[str, type[Operator]] = {}
    pending = Operator.__subclasses__()
    while pending:
        cls = pending.pop()
        found[cls.__name__] = cls
        pending.extend(cls.__subclasses__())
    return found


def resolve_operator(operator: OperatorLike) -> OperatorFactory:
    """The factory that `operator` names.

    Raises:
        ValueError: If it names no known operator class; the message gives the nearest names.
    """
    if isinstance(operator, str):
        operator = {"class_path": operator}
    if not isinstance(operator, Mapping):
        return operator
    name = str(operator["class_path"]).rpartition(".")[2]
    classes = operator_classes()
    if name not in classes:
        raise ValueError(f"operator: there is no {name!r}; {closest(name, classes)}")
    return functools.partial(classes[name], **operator.get("init_args", {}))


def describe_operator(operator: OperatorLike) -> dict[str, Any]:
    """`operator` as plain values, fit for a checkpoint or a config: {"class_path": ..., "init_args": {...}}.

    Raises:
        ValueError: If `operator` is a callable of unknown make (neither an operator class nor a partial of one).
    """
    factory = resolve_operator(operator)
    # jsonargparse hands over a partial of its own instantiator, with the class among the positional arguments.
    parts = (factory.func, *factory.args) if isinstance(factory, functools.partial) else (factory,)
    cls = next((part for part in parts if isinstance(part, type) and issubclass(part, Operator)), None)
    if cls is None:
        raise ValueError(f"operator: {factory!r} is neither an operator class nor a functools.partial of one")
    init_args = dict(factory.keywords) if isinstance(factory, functools.partial) else {}
    return {"class_path": f"{cls.__module__}.{cls.__qualname__}", "init_args": init_args}
