"""What pruning may take away, and the proof that it took nothing else.

The *masked* network is the original in which, for every pruned channel, the scale and the shift of its norms are zero,
and so is its bias in a depthwise convolution. Where its activation keeps zero, such a channel is zero for whoever reads
it, and the pruned network computes what the masked one does.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.utils._pytree import tree_iter, tree_map
from torchvision.ops import FrozenBatchNorm2d

from slimconv_lit.surgery.classes import is_depthwise
from slimconv_lit.surgery.graph import ChannelGraph, Labels
from slimconv_lit.surgery.trace import NORMS, Inputs, empty_tables, leaves_of

Flags = NDArray[np.bool_]


def proof_inputs(model: nn.Module, inputs: Inputs) -> Inputs:
    """`inputs` with every floating tensor drawn anew, of the type and in the place that `replica` computes in.

    Where the network makes nothing finite of random numbers (a logarithm, say) and the caller gave values, those.
    """
    tensors = itertools.chain(model.parameters(), model.buffers())
    device = next(tensors, torch.empty(0)).device
    dtype = torch.float64 if _is_double(model) else torch.float32
    generator = torch.Generator().manual_seed(0)

    def fill(value: Any, anew: bool) -> Any:
        if not isinstance(value, Tensor):
            return value
        if not value.is_floating_point():
            return torch.zeros(value.shape, dtype=value.dtype, device=device) if value.is_meta else value.to(device)
        if anew or value.is_meta:
            return torch.randn(value.shape, generator=generator, dtype=dtype).to(device)
        return value.detach().to(device, dtype)

    drawn: Inputs = tree_map(lambda value: fill(value, True), inputs)
    if any(isinstance(v, Tensor) and v.is_floating_point() and not v.is_meta for v in tree_iter(inputs)):
        with suppress(Exception):
            if all(t.isfinite().all() for t in _tensors(run(replica(model), drawn))):
                return drawn
        own: Inputs = tree_map(lambda value: fill(value, False), inputs)
        return own
    return drawn


def run(network: nn.Module, inputs: Inputs) -> Any:
    """What a network makes of `inputs`: without gradients, eager where it is compiled, on the CPU with the same noise.

    The CPU's random numbers are left as they were.
    """
    stance = torch.compiler.set_stance("force_eager")
    with stance, torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        return network(*inputs[0], **inputs[1])


def replica(model: nn.Module) -> nn.Module:
    """A copy in evaluation mode whose half precision parameters are in float32, so that rounding hides nothing."""
    # What a hook has computed from parameters, torch does not copy; on the copy, the hook computes it again.
    loose = (v for m in model.modules() for v in vars(m).values() if isinstance(v, Tensor) and not v.is_leaf)
    made = copy.deepcopy(model, empty_tables(model) | {id(v): v.detach().clone() for v in loose}).eval()
    return made if _is_double(model) else made.float()


def _is_double(model: nn.Module) -> bool:
    return any(p.dtype == torch.float64 for p in model.parameters())


def mask(model: nn.Module, graph: ChannelGraph, removed: Flags) -> None:
    """Masks the channels that `removed` flags, in place."""
    with torch.no_grad():
        for name, space in graph.spaces.items():
            layer, gone = model.get_submodule(name), torch.from_numpy(removed[space.labels])
            masked = ("weight", "bias") if isinstance(layer, _NormBase) else ("bias",) if is_depthwise(layer) else ()
            for parameter in (getattr(layer, key) for key in masked):
                if isinstance(parameter, Tensor):
                    parameter[gone.to(parameter.device)] = 0


@contextmanager
def hooked(model: nn.Module, before: Callable[..., Any], after: Callable[..., Any]) -> Iterator[None]:
    """Calls `before(name, layer, args)` and `after(name, layer, output)` at each convolution, linear layer and norm."""
    layers = [(n, m) for n, m in model.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear, *NORMS))]

    def hook(name: str) -> Callable[..., Any]:
        # Some call a layer by keyword; it reads one tensor either way.
        return lambda m, args, kwargs: before(name, m, args or tuple(kwargs.values()))

    handles = [m.register_forward_pre_hook(hook(n), with_kwargs=True) for n, m in layers]
    handles += [m.register_forward_hook(lambda m, args, out, name=n: after(name, m, out)) for n, m in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def read_alive(model: nn.Module, inputs: Inputs, graph: ChannelGraph, removed: Flags) -> dict[str, Flags]:
    """Which channels convolutions and linear layers read as something else than zero once `removed` are masked.

    The structure alone decides: what the layers write is replaced by numbers between 1 and 2, but where masked norms
    write and where depthwise convolutions read zeros only; so no activation hides a channel by chance.

    Args:
        model: The network; it is copied.
        inputs: From `proof_inputs`.
        graph: Its channel flow.
        removed: For every channel of the graph.

    Returns:
        Flags for each layer's input, by name.
    """
    probe = replica(model)
    mask(probe, graph, removed)
    alive: dict[str, Flags] = {}
    last: dict[str, Flags] = {}

    def axis_of(layer: nn.Module, x: Tensor) -> int:
        return 1 if isinstance(layer, NORMS) else x.ndim - (1 if isinstance(layer, nn.Linear) else 3)

    def before(name: str, layer: nn.Module, args: tuple[Tensor, ...]) -> None:
        x = args[0]
        others = tuple(d for d in range(x.ndim) if d != axis_of(layer, x))
        last[name] = (x != 0).any(dim=others).numpy(force=True)
        alive[name] = alive.get(name, last[name]) | last[name]

    def after(name: str, layer: nn.Module, output: Tensor) -> Tensor:
        made_up = 1 + torch.rand_like(output)
        if isinstance(layer, _NormBase):
            real = removed[graph.spaces[name].labels] if name in graph.spaces else np.zeros(output.shape[1], bool)
        elif isinstance(layer, FrozenBatchNorm2d):
            real = ~last[name]
        elif isinstance(layer, nn.Conv2d) and is_depthwise(layer):
            real = np.repeat(~last[name], layer.out_channels // layer.in_channels)
        else:
            return made_up
        shape = [1] * output.ndim
        shape[axis_of(layer, output)] = -1
        return torch.where(torch.from_numpy(real).to(output.device).view(shape), output, made_up)

    with hooked(probe, before, after):
        run(probe, inputs)
        with suppress(Exception):
            # Auxiliary heads run only in training, which some inputs are too small for.
            run(probe.train(), inputs)
    return alive


def difference(wanted: nn.Module, found: nn.Module, inputs: Inputs) -> tuple[float, bool]:
    """How far two networks' outputs are apart, and whether that tells all.

    It does not where integers differ, because an argmax may follow the last digit, and where there are no numbers with
    a fraction at all.

    Returns:
        The largest difference relative to the largest value, NaN where one is not finite or there is none; and
        whether it tells all.
    """
    pairs = list(zip(*(_tensors(run(network, inputs)) for network in (wanted, found)), strict=True))
    if not pairs:
        return float("nan"), False
    exact = [(a, b) for a, b in pairs if not a.is_floating_point() and a.shape == b.shape]
    others = [apart(a, b) for a, b in pairs if a.is_floating_point() or a.shape != b.shape]
    fractions = any(a.is_floating_point() and a.numel() for a, _ in pairs)
    return float(np.max([0.0, *others])), fractions and all(torch.equal(a, b) for a, b in exact)


def first_difference(
    masked: nn.Module, pruned: nn.Module, inputs: Inputs, kept: Mapping[str, Labels], tolerance: float
) -> str:
    """The first layer that writes something else in the pruned network than, in the same channels, in the masked one.

    Args:
        masked: The original, masked.
        pruned: The pruned network.
        inputs: For both.
        kept: The channels that each layer keeps of what it writes, where that is not all.
        tolerance: What `difference` may be.

    Returns:
        Its name; "" if there is none.
    """
    wanted, found = written(masked, inputs), written(pruned, inputs)
    for name in wanted:
        # A norm with a selection in front of it is one level down.
        there, here = wanted[name], found.get(name, found.get(f"{name}.norm"))
        if name in kept:
            axis = there.ndim - 1 if isinstance(masked.get_submodule(name), nn.Linear) else 1
            there = there.index_select(axis, torch.from_numpy(kept[name]).to(there.device))
        if here is None or not apart(there, here) <= tolerance:
            return name
    return ""


def written(network: nn.Module, inputs: Inputs) -> dict[str, Tensor]:
    """What each layer writes, by name, as far as the network runs."""
    seen: dict[str, Tensor] = {}

    def note(name: str, layer: nn.Module, output: Tensor) -> None:
        seen.setdefault(name, output.clone())

    with suppress(Exception), hooked(network, lambda *_: None, note):
        run(network, inputs)
    return seen


def _tensors(output: Any) -> list[Tensor]:
    return [leaf for leaf in leaves_of(output) if isinstance(leaf, Tensor)]


def apart(wanted: Tensor, found: Tensor) -> float:
    """The largest difference, relative to the largest value; infinite where the shapes differ."""
    if wanted.shape != found.shape:
        return float("inf")
    if not wanted.numel():
        return 0.0
    largest = wanted.abs().max().clamp_min(torch.finfo(wanted.dtype).tiny)
    return float((wanted - found).abs().max() / largest)
