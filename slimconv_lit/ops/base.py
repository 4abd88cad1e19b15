"""The contract that every convolution operator keeps, and the forms in which a caller may name one.

An operator stands where a spatial convolution *and its norm* stood: it contains its own norms, and the activation
after it belongs to the host. It writes `op.out_channels` channels, which may differ from what was asked for.
"""

from __future__ import annotations

import functools
import inspect
import math
import sys
from collections.abc import Callable, Collection, Mapping
from fractions import Fraction
from typing import Any, TypeAlias

from torch import Tensor, nn
from torch.nn import functional

from slimconv_lit.lookup import closest

_HOST_ARGUMENTS = ("in_channels", "out_channels", "kernel_size", "stride", "dilation", "groups", "padding")

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


def padding_of(kernel_size: Size, dilation: Size, padding: Size | None) -> tuple[int, int]:
    """What an operator pads by: `padding`, or the same padding where that is None.

    Raises:
        ValueError: If `kernel_size` or `dilation` is below 1.
    """
    check_whole(kernel_size=kernel_size, dilation=dilation)
    return same_padding(kernel_size, dilation) if padding is None else pair(padding)


def check_whole(**arguments: Any) -> None:
    """For arguments that are whole numbers from 1 on, or one of them for each axis.

    Raises:
        ValueError: If one is not.
    """
    for name, value in arguments.items():
        parts = value if isinstance(value, tuple | list) else (value,)
        if not all(isinstance(part, int) and part >= 1 for part in parts):
            raise ValueError(f"{name}={value!r} must be a whole number of at least 1")


def check_keeps_size(kernel_size: Size, dilation: Size, padding: Size | None) -> None:
    """For operators whose paths would not meet in size otherwise: at stride 1 the map must keep its size.

    Raises:
        ValueError: If the kernel is even or the padding another; the message gives what works.
    """
    check_whole(kernel_size=kernel_size, dilation=dilation)
    kernel, own = pair(kernel_size), same_padding(kernel_size, dilation)
    if not all(k % 2 for k in kernel):
        odd = " or ".join(str(tuple(k + step * (k % 2 == 0) for k in kernel)) for step in (-1, 1))
        raise ValueError(f"kernel_size={kernel_size} is even; nearest: {odd}")
    if padding is not None and pair(padding) != own:
        raise ValueError(f"padding={padding} changes the size of the map; nearest: {own} (or None)")


def nearest_divisors(value: int, *numbers: int, least: int = 1) -> str:
    """For an error message: the two numbers nearest to `value`, from `least` on, that divide all of `numbers`."""
    common = math.gcd(*numbers)
    fitting = [d for d in range(least, common + 1) if common % d == 0]
    nearest = sorted(sorted(fitting, key=lambda d: abs(d - value))[:2])
    return " or ".join(map(str, nearest)) or f"none, for {common} has no divisor from {least} on"


def fraction(argument: str, value: float | str) -> Fraction:
    """The value of `argument`, given as a number or as text ("1/8"), without the rounding of binary fractions.

    Raises:
        ValueError: If it is neither.
    """
    try:
        return Fraction(value).limit_denominator(10_000)
    except (ValueError, TypeError, ZeroDivisionError, OverflowError):
        raise ValueError(f"{argument}={value!r} is neither a number nor a fraction such as '1/8'") from None


def reset_convolutions(module: nn.Module) -> None:
    """Draws all convolutions in `module` as the papers' ResNets do (He, fan out); norms start at one and zero."""
    for layer in module.modules():
        # On the meta device there is nothing to draw, and going through it is slow.
        if not isinstance(layer, nn.Conv2d | nn.BatchNorm2d) or layer.weight.is_meta:
            continue
        if isinstance(layer, nn.BatchNorm2d):
            layer.reset_parameters()
            continue
        nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
        if layer.bias is not None:
            nn.init.zeros_(layer.bias)


def norm_of_pooled(norm: nn.Module, x: Tensor) -> Tensor:
    """`norm(x)` for a pooled map (B, C, 1, 1), also where one image is trained on.

    There BatchNorm has no variance and raises. It then normalises with its running statistics, which that step leaves
    unchanged.
    """
    if isinstance(norm, nn.BatchNorm2d) and norm.training and x.shape[0] == 1:
        return functional.batch_norm(x, norm.running_mean, norm.running_var, norm.weight, norm.bias, eps=norm.eps)
    return norm(x)


def own_arguments(make: Callable[..., Any]) -> set[str]:
    """The arguments of an operator class or function, less those that it takes from the convolution it replaces."""
    return set(inspect.signature(make).parameters) - set(_HOST_ARGUMENTS)


def check_arguments(what: str, given: Mapping[str, Any], known: Collection[str]) -> None:
    """Says of an argument that `what` has not got its value and the nearest names, where Python says the name alone.

    Raises:
        TypeError: If one of `given` is not among the `known`.
    """
    for name, value in given.items():
        if name not in known:
            raise TypeError(f"{what} takes no {name}={value!r}; {closest(name, known)}")


def operator_classes() -> dict[str, type[Operator]]:
    """Every operator class that has been imported, the user's own too, by module and class name."""
    found: dict[str, type[Operator]] = {}
    pending = Operator.__subclasses__()
    while pending:
        cls = pending.pop()
        found[_path(cls)] = cls
        pending.extend(cls.__subclasses__())
    return found


def _path(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def resolve_operator(operator: OperatorLike) -> OperatorFactory:
    """The factory that `operator` names.

    Raises:
        ValueError: If it names no known operator class; the message gives the nearest names.
        TypeError: If a partial or plain values have an argument that the class has not, or it is nothing of the kind.
    """
    if isinstance(operator, str):
        operator = {"class_path": operator}
    if isinstance(operator, Mapping):
        operator = _from_values(operator)
    if not callable(operator) or isinstance(operator, nn.Module):
        shown = repr(operator).partition("\n")[0]
        raise TypeError(f"operator={shown} is neither an operator class, nor a partial or the name of one")
    if isinstance(operator, functools.partial):
        make = operator.func
        # What has `**` hands its arguments on, who knows where.
        if all(p.kind != p.VAR_KEYWORD for p in inspect.signature(make).parameters.values()):
            check_arguments(getattr(make, "__name__", str(make)), operator.keywords, own_arguments(make))
    return operator


def _from_values(values: Mapping[str, Any]) -> OperatorFactory:
    given = str(values["class_path"])
    module, _, name = given.rpartition(".")
    named = {path: cls for path, cls in operator_classes().items() if cls.__name__ == name}
    # By any module that has the class, such as the package. None is imported: the name may come from a checkpoint.
    there = getattr(sys.modules.get(module), name, None)
    found = {path: cls for path, cls in named.items() if given in (name, path) or cls is there}
    if not found:
        known = named or {cls.__name__ for cls in operator_classes().values()}
        raise ValueError(f"operator: there is no {given!r}; {closest(given if named else name, known)}")
    if len(found) > 1:
        raise ValueError(f"operator: {given!r} may be {' or '.join(sorted(found))}; give the one that is meant in full")
    (cls,) = found.values()
    return functools.partial(cls, **values.get("init_args", {}))


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
    return {"class_path": _path(cls), "init_args": init_args}
