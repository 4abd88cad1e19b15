"""Watching one forward pass: how the channel graph of a network comes about.

The pass runs on the meta device, so any Python control flow can be followed and no arithmetic is done. Each tensor on
the way carries an array of channel numbers: one entry a channel, size 1 along axes on which all entries agree. What
moves channels (views, concatenation, slices, flips) moves the numbers (moves.py); what combines two tensors point by
point ties them; what is not understood is recorded as such.
"""

from __future__ import annotations

import copy
import functools
import itertools
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_iter, tree_map
from torchvision.ops import FrozenBatchNorm2d

from slimconv_lit.ops import Operator
from slimconv_lit.surgery.graph import ChannelGraph, Labels, Space, Tie, Use
from slimconv_lit.surgery.moves import FRESH, HANDLERS, POINTWISE, along

aten = torch.ops.aten

Inputs: TypeAlias = tuple[tuple[Any, ...], dict[str, Any]]

NORMS = (_NormBase, nn.GroupNorm, nn.LayerNorm, FrozenBatchNorm2d)
LEAVES = (nn.Conv2d, nn.Linear, Operator, *NORMS)

_DRAWS = {
    *(nn.init.uniform_, nn.init.normal_, nn.init.constant_, nn.init.kaiming_uniform_),
    *(Tensor.uniform_, Tensor.normal_, Tensor.fill_, Tensor.zero_),
}

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")

# Tried in turn where the caller gives no example: ImageNet first, then CIFAR and other common sizes.
SIZES = (224, 32, 256, 64, 128, 299, 28, 96, 384, 512)


def empty_tables(model: nn.Module) -> dict[int, Any]:
    """A memo for deepcopy. Tables of hooks are nearly always empty; made here, they need not be taken apart there."""
    tables = (v for module in model.modules() for v in vars(module).values() if type(v) in (dict, OrderedDict))
    return {id(table): type(table)() for table in tables if not table}


def shadow_of(model: nn.Module) -> nn.Module:
    """A copy of `model` on the meta device; no weight is copied.

    Of hooks it has those that are the network's own, such as timm's that collect features. A stranger's would be
    called with tensors that have no values, and note them down.
    """
    memo = empty_tables(model)
    memo |= {id(vars(m)[table]): OrderedDict() for m in model.modules() for table in _HOOKS}
    loose = (v for module in model.modules() for v in vars(module).values() if isinstance(v, Tensor))
    for tensor in itertools.chain(model.parameters(), model.buffers(), loose):
        empty = torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
        memo[id(tensor)] = nn.Parameter(empty, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty
    shadow = copy.deepcopy(model, memo)
    for module, made in zip(model.modules(), shadow.modules(), strict=True):
        for table in _HOOKS:
            own = {key: hook for key, hook in vars(module)[table].items() if id(_owner(hook)) in memo}
            vars(made)[table].update(copy.deepcopy(own, memo))
    return shadow


def _owner(hook: Any) -> Any:
    while isinstance(hook, functools.partial):
        hook = hook.func
    return getattr(hook, "__self__", hook)


class NothingDrawn(TorchFunctionMode):
    """Inside `with NothingDrawn():` meta tensors are not initialised: they have no values, and it is slow."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _DRAWS:
            tensor = args[0] if args else kwargs["tensor"]
            if tensor.is_meta:
                return tensor
        return func(*args, **(kwargs or {}))


def skip_norms(shadow: nn.Module) -> None:
    """Lets the batch norms of a copy on the meta device check their width and nothing else.

    What they compute is not there to be seen, and going through it takes more than half of a pass.
    """
    for module in shadow.modules():
        if type(module) is nn.BatchNorm2d:
            module.forward = functools.partial(_like, module.num_features)  # type: ignore[method-assign]


def _like(channels: int, input: Tensor) -> Tensor:
    # As nn.BatchNorm2d calls it, for those who call it by keyword.
    if input.ndim != 4 or input.shape[1] != channels:
        raise ValueError(f"a norm of {channels} channels reads a map of shape {tuple(input.shape)}")
    return input.new_empty(input.shape)


def check_network(model: object) -> None:
    """What every door asks first.

    Raises:
        TypeError: If `model` is no network; the message says what makes one.
    """
    if not isinstance(model, nn.Module):
        hint = "create_backbone(name) or torchvision.models.get_model(name) makes one"
        # A class, or a function such as torchvision.models.resnet50.
        hint = "call it first, and hand over what it returns" if callable(model) else hint
        raise TypeError(f"model={repr(model)[:80]} is not a network (torch.nn.Module); {hint}")


def example_inputs(model: nn.Module, example: Any = None, sizes: Sequence[int] = SIZES) -> Iterator[Inputs]:
    """The inputs to trace `model` with: the caller's, or images of common sizes, the likeliest first.

    Args:
        model: A network whose first convolution tells the number of image channels.
        example: A tensor, a tuple of positional or a dict of keyword arguments; None to guess.
        sizes: Heights and widths to guess, behind the size that the network itself says it is made for.
    """
    if example is not None:
        if isinstance(example, dict):
            yield (), example
        else:
            yield (example if isinstance(example, tuple) else (example,)), {}
        return
    first = next((m for m in model.modules() if isinstance(m, nn.Conv2d)), None)
    channels, dtype = (3, torch.float32) if first is None else (first.in_channels, first.weight.dtype)
    config = getattr(model, "pretrained_cfg", None) or {}
    own = [tuple(config.get("input_size") or ())[-2:]] if isinstance(config, dict) else []
    for height, width in dict.fromkeys([*(s for s in own if len(s) == 2), *((n, n) for n in sizes)]):
        # Two images: a norm on a 1x1 map cannot train on one.
        yield (torch.empty(2, channels, height, width, dtype=dtype, device="meta"),), {}


class ConstantsOnMeta(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Lets what is on the meta device meet what is not.

    A network may hold constants that are no buffers, and make others without naming a device.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        try:
            return func(*args, **kwargs)
        except RuntimeError:
            if len({v.is_meta for v in tree_iter((args, kwargs)) if isinstance(v, Tensor)}) < 2:
                raise
        args, kwargs = tree_map(lambda v: v.to("meta") if isinstance(v, Tensor) else v, (args, kwargs))
        return func(*args, **kwargs)


class _ShapesOnly(ConstantsOnMeta):  # type: ignore[no-untyped-call]
    """On meta tensors, hands out a result of the right shape where torch would take milliseconds to work it out."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        rule = _SHAPES.get(func.overloadpacket)
        # A keyword may ask for another type, or for a result in a given place.
        shape = rule(*args) if rule and not kwargs and _same_type(args) else None
        if shape is None:
            return super().__torch_dispatch__(func, types, args, kwargs)
        in_place = func.overloadpacket.__name__.endswith("_")
        return args[0] if in_place else args[0].new_empty(shape)


def _same_type(args: Sequence[Any]) -> bool:
    """Whether `args[0]` is a floating tensor and what comes of it with the others is of its type, all on meta."""
    if not isinstance(args[0], Tensor) or not args[0].is_floating_point():
        return False
    return all(
        arg.is_meta and arg.dtype == args[0].dtype if isinstance(arg, Tensor) else not isinstance(arg, complex)
        for arg in args
    )


@contextmanager
def quiet_pass() -> Iterator[None]:
    """For a pass on the meta device: quick, eager where the network is compiled, random numbers left as they are."""
    stance, shapes = torch.compiler.set_stance("force_eager"), _ShapesOnly()  # type: ignore[no-untyped-call]
    with stance, torch.random.fork_rng(devices=[]), torch.inference_mode(), shapes:
        yield


def leaves_of(output: Any) -> list[Any]:
    """The tensors and plain values in what a network returns.

    Raises:
        TypeError: If some are inside an object that cannot be looked into.
    """
    leaves = tree_flatten(output)[0]
    for leaf in leaves:
        if leaf is not None and not isinstance(leaf, Tensor | int | float | str):
            raise TypeError(f"the network returns a {type(leaf).__name__}, which the channel graph cannot look into")
    return leaves


def trace(
    model: nn.Module, inputs: Inputs, recorder: Callable[[ChannelGraph, nn.Module], _Recorder] | None = None
) -> ChannelGraph:
    """The channel graph of `model`, from one pass in eval and one in train mode (auxiliary heads run only in training).

    Args:
        model: Any network. It is neither run nor changed: a copy on the meta device is.
        inputs: Positional and keyword arguments of its forward pass.
        recorder: What watches the passes, if not the ordinary recorder.

    Raises:
        Exception: Whatever the forward pass in eval mode raises.
    """
    shadow = shadow_of(model)
    skip_norms(shadow)
    meta_inputs = tree_map(lambda v: v.to("meta") if isinstance(v, Tensor) else v, inputs)
    graph = ChannelGraph()
    unseen = [name for name, module in shadow.named_modules() if isinstance(module, LEAVES)]
    for mode in ("eval", "train"):
        shadow.train(mode == "train")
        watching = (recorder or _Recorder)(graph, shadow)
        try:
            with quiet_pass(), watching.watching(), watching:
                output = shadow(*meta_inputs[0], **meta_inputs[1])
        except Exception as error:
            if mode == "eval":
                raise
            # Some networks cannot train on this input (they want targets); what runs in eval mode is known already.
            unseen = [name for name in unseen if name not in watching.ran]
            if unseen:
                graph.unseen = f"{unseen[0]}, perhaps: it did not run, and training could not be traced: {error!r:.160}"
            continue
        unseen = [name for name in unseen if name not in watching.ran]
        watching.finish(output)
        graph.outputs[mode] = [tuple(leaf.shape) for leaf in tree_iter(output) if isinstance(leaf, Tensor)]
        graph.calls |= watching.calls
    if graph.unseen:
        for space in graph.spaces.values():
            space.uses["opaque", graph.unseen] = Use("opaque", graph.unseen, space.labels)
    return graph


def trace_example(
    model: nn.Module,
    example: Any = None,
    sizes: Sequence[int] = SIZES,
    tracing: Callable[[nn.Module, Inputs], ChannelGraph] = trace,
) -> tuple[ChannelGraph, Inputs]:
    """The channel graph of `model` and the inputs it was traced with: the first on which it runs, best in training too.

    Args:
        model: As in `trace`.
        example: As in `example_inputs`.
        sizes: As in `example_inputs`.
        tracing: `trace`, or a finer one.

    Raises:
        Exception: What the forward pass raised on the first of the inputs, if it runs on none.
    """
    first: Exception | None = None
    found: tuple[ChannelGraph, Inputs] | None = None
    for inputs in example_inputs(model, example, sizes):
        try:
            graph = tracing(model, inputs)
        except Exception as error:
            first = first or error
            continue
        if not graph.unseen:
            return graph, inputs
        found = found or (graph, inputs)
    if found is None:
        assert first is not None
        raise first
    return found


class _Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Watches one forward pass and writes what it sees into a graph."""

    leaves: tuple[type[nn.Module], ...] = LEAVES
    """Layers that are not looked into."""

    def __init__(self, graph: ChannelGraph, model: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.graph = graph
        self.model = model
        self.calls: Counter[str] = Counter()
        self.labels: dict[int, Labels] = {}
        self.writer: dict[int, str] = {}
        # Tensors are known by identity, so none may be freed and its id reused.
        self.alive: list[Tensor] = []
        self.inside = 0
        self.where: list[str] = [""]
        self.ran: set[str] = set()
        self.tick = itertools.count()

    # ---- what the graph holds -------------------------------------------------------------------------------------

    def mark(self, tensor: Any, labels: Labels | None) -> None:
        if isinstance(tensor, Tensor):
            self.alive.append(tensor)
            self.writer.pop(id(tensor), None)
            if labels is None:
                self.labels.pop(id(tensor), None)
            else:
                self.labels[id(tensor)] = labels

    def known(self, value: Any) -> Labels | None:
        return self.labels.get(id(value)) if isinstance(value, Tensor) else None

    def use(self, kind: Any, by: str, labels: Labels) -> None:
        flat = labels.ravel()
        for space in self.graph.spaces_of(flat):
            space.uses[kind, by] = Use(kind, by, flat, self.where[-1])

    def consume(self, values: Sequence[Any], by: str) -> None:
        for value in values:
            if isinstance(value, Tensor) and id(value) in self.writer:
                self.graph.spaces[self.writer[id(value)]].consumers.add(by)

    def write(self, name: str, tensor: Tensor, axis: int) -> None:
        size = tensor.shape[axis]
        space = self.graph.spaces.get(name)
        if space is None:
            start = max((s.start + s.size for s in self.graph.spaces.values()), default=0)
            space = self.graph.spaces[name] = Space(name, start, size)
        shape = [1] * tensor.ndim
        shape[axis] = size
        self.mark(tensor, space.labels.reshape(shape))
        self.writer[id(tensor)] = name

    # ---- layers that are understood as a whole --------------------------------------------------------------------

    @contextmanager
    def watching(self) -> Iterator[None]:
        with ExitStack() as stack:
            for name, module in self.model.named_modules():
                leaf = isinstance(module, self.leaves)
                stack.enter_context(
                    _removing(module.register_forward_pre_hook(self.entering(name, leaf), prepend=True))
                )
                stack.enter_context(
                    _removing(
                        module.register_forward_hook(self.leaving(name, leaf), with_kwargs=True, always_call=False)
                    )
                )
            yield

    def entering(self, name: str, leaf: bool) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any) -> None:
            self.where.append(name)
            self.ran.add(name)
            self.inside += leaf

        return hook

    def leaving(self, name: str, leaf: bool) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            self.where.pop()
            self.inside -= leaf
            if leaf and not self.inside:
                self.layer(name, module, next(iter(tree_iter((args, kwargs)))), output)

        return hook

    def layer(self, name: str, module: nn.Module, x: Tensor, output: Tensor) -> None:
        self.calls[name] += 1
        labels = self.known(x)
        self.consume([x], name)
        if isinstance(module, NORMS):
            if labels is not None:
                self.use("norm", name, labels)
            self.mark(output, labels)
            return
        axis = x.ndim - 1 if isinstance(module, nn.Linear) else x.ndim - 3
        seen = None if labels is None else along(labels, axis, x.shape)
        if labels is not None:
            kind = {nn.Linear: "linear", nn.Conv2d: "conv"}
            found = next((k for cls, k in kind.items() if isinstance(module, cls)), "operator")
            self.use(found if seen is not None else "opaque", name, labels if seen is None else seen)
        self.write(name, output, axis)

    def finish(self, output: Any) -> None:
        for leaf in leaves_of(output):
            labels = self.known(leaf)
            if labels is not None:
                self.use("output", "the network's output", labels)

    # ---- everything else, operation by operation --------------------------------------------------------------------

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.inside:
            return func(*args, **kwargs)
        handler = HANDLERS.get(func.overloadpacket)
        pointwise = torch.Tag.pointwise in func.tags or func.overloadpacket in POINTWISE
        if handler is None and not pointwise:
            with self:
                parts = func.decompose(*args, **kwargs)
            if parts is not NotImplemented:
                return parts
        output = func(*args, **kwargs)
        tensors = [v for v in tree_iter((args, kwargs)) if isinstance(v, Tensor)]
        name = func.overloadpacket.__name__
        place = f"{name} in {self.where[-1] or 'the network'}"
        if func.overloadpacket in FRESH and _spreads(output, self.known(args[0])):
            self.mark(output, None)
            return output
        self.consume(tensors, f"{place} #{next(self.tick)}")
        if all(self.known(t) is None for t in tensors):
            for leaf in tree_iter(output):
                self.mark(leaf, None)
            return output
        results: Any = None
        if handler is not None:
            results = handler(self.known, args, kwargs, output)
        elif pointwise and isinstance(output, Tensor):
            results = self.meet(name, place, tensors, output)
        if results is None:
            for tensor in tensors:
                labels = self.known(tensor)
                if labels is not None:
                    self.use("opaque", place, labels)
            results = itertools.repeat(None)
        elif isinstance(output, Tensor):
            results = [results]
        for leaf, labels in zip(tree_iter(output), results, strict=False):
            self.mark(leaf, labels)
        return output

    def meet(self, name: str, place: str, tensors: list[Tensor], output: Tensor) -> Labels | None:
        """Point by point: what two tensors write in the same place is tied, unless one is spread over the other."""
        rank = output.ndim
        found = [(t, self.known(t)) for t in tensors if self.known(t) is not None]
        # The widest tensor carries the names on: in x * gate(x) that is x, whatever the order of the factors.
        main, main_labels = max(found, key=lambda pair: pair[0].numel())
        carried, main_shape = _to_rank(main_labels, rank), _to_rank_shape(main, rank)
        for tensor, labels in found:
            if tensor is main:
                continue
            other, shape = _to_rank(labels, rank), _to_rank_shape(tensor, rank)
            if _covers(shape, carried.shape) and _covers(main_shape, other.shape):
                mine, theirs = (v.ravel() for v in np.broadcast_arrays(carried, other))
                if np.array_equal(mine, theirs):
                    # x * sigmoid(x): each channel with itself.
                    continue
                kind: Literal["sum", "product"] = "product" if name.startswith("mul") else "sum"
                tie = Tie(kind, mine, theirs, self.where[-1])
                for space in self.graph.spaces_of(np.concatenate([mine, theirs])):
                    space.ties[kind, mine.tobytes(), theirs.tobytes()] = tie
                carried = np.broadcast_to(carried, np.broadcast_shapes(carried.shape, other.shape))
            elif other.size == 1:
                self.use("opaque", f"{place}, spread over other channels", other)
            else:
                return None
        for tensor in tensors:
            shape = _to_rank_shape(tensor, rank)
            if self.known(tensor) is None and any(n > 1 and shape[i] > 1 for i, n in enumerate(carried.shape)):
                # A learned scale, a mask or another tensor that no layer wrote has a value for each channel.
                self.use("opaque", f"{place}, with values of its own for each channel", carried)
        return carried


def _spreads(output: Tensor, labels: Labels | None) -> bool:
    """Whether a tensor has one value for all channels, so that it stays as it is when they become fewer."""
    return labels is None or (
        output.ndim == labels.ndim and all(1 in pair for pair in zip(output.shape, labels.shape, strict=True))
    )


def _to_rank(labels: Any, rank: int) -> Labels:
    return labels.reshape((1,) * (rank - labels.ndim) + labels.shape)


def _to_rank_shape(tensor: Tensor, rank: int) -> tuple[int, ...]:
    return (1,) * (rank - tensor.ndim) + tuple(tensor.shape)


def _covers(shape: Sequence[int], labels_shape: Sequence[int]) -> bool:
    """Whether a tensor of that shape has a channel of its own for every label."""
    return all(n in (1, size) for size, n in zip(shape, labels_shape, strict=True))


@contextmanager
def _removing(handle: Any) -> Iterator[None]:
    try:
        yield
    finally:
        handle.remove()


# ---- shapes of results, for floating tensors of one type, by the arguments; None: ask torch --------------------------


def _first(x: Tensor, *rest: Any) -> Sequence[int]:
    return x.shape


def _broadcast(*values: Any) -> Sequence[int]:
    return np.broadcast_shapes(*(value.shape for value in values if isinstance(value, Tensor)))


def _broadcast_in_place(x: Tensor, *others: Any) -> Sequence[int] | None:
    shape = _broadcast(x, *others)
    return shape if shape == x.shape else None


def _pooled(x: Tensor, size: Sequence[int]) -> Sequence[int]:
    return *x.shape[:-2], *size


def _mean(x: Tensor, dims: Sequence[int] = (), keepdim: bool = False) -> Sequence[int]:
    gone = {d % x.ndim for d in dims or range(x.ndim)}
    return [1 if i in gone else n for i, n in enumerate(x.shape) if keepdim or i not in gone]


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Sequence[int] | None:
    return (*x.shape[:-1], weight.shape[0]) if x.shape[-1] == weight.shape[1] else None


_SHAPES: dict[Any, Callable[..., Sequence[int] | None]] = {
    **dict.fromkeys(
        [
            *(aten.batch_norm, aten.relu, aten.relu_, aten.hardtanh, aten.hardtanh_, aten.silu, aten.silu_),
            *(aten.sigmoid, aten.hardswish, aten.hardswish_, aten.gelu, aten.flip),
        ],
        _first,
    ),
    **dict.fromkeys([aten.add, aten.sub, aten.mul, aten.div, aten.addcmul], _broadcast),
    **dict.fromkeys([aten.add_, aten.mul_], _broadcast_in_place),
    aten.adaptive_avg_pool2d: _pooled,
    aten.mean: _mean,
    aten.linear: _linear,
}
