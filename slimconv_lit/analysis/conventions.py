"""The ways in which the papers count operations, by name. No table mixes them without saying so.

All of them are sums over the same list, `operations`: what ran in one forward pass, and how large it was. Our own
convention is `complexity.macs`: convolutions and linear layers, nothing else. All rows with SlimConv in Tables I to
III and X count so.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from slimconv_lit.analysis.complexity import InputSize, image_shape
from slimconv_lit.ops import Operator
from slimconv_lit.surgery.trace import quiet_pass, shadow_of

Kind = Literal["conv", "linear", "norm", "relu", "pool", "global_pool", "upsample"]
Place = Literal["operator", "behind operator", "module", "function"]
Activations = Literal["all", "modules", "operators", "behind operators", "modules but behind operators"]

_aten = torch.ops.aten
_KINDS: dict[Any, Kind] = {
    _aten.convolution: "conv",
    _aten.linear: "linear",
    _aten.batch_norm: "norm",
    _aten.native_batch_norm: "norm",
    _aten._native_batch_norm_legit_no_training: "norm",
    _aten.cudnn_batch_norm: "norm",
    _aten.relu: "relu",
    _aten.relu_: "relu",
    # ReLU6.
    _aten.hardtanh: "relu",
    _aten.hardtanh_: "relu",
    _aten.max_pool2d_with_indices: "pool",
    _aten.avg_pool2d: "pool",
    _aten._adaptive_avg_pool2d: "global_pool",
    _aten.upsample_nearest2d: "upsample",
    _aten.upsample_bilinear2d: "upsample",
}
_RELUS = (nn.ReLU, nn.ReLU6)


@dataclass(frozen=True)
class Operation:
    """One operation of a forward pass on one image.

    Attributes:
        kind: What it is.
        place: Whether it is a function, or a module, or inside an operator or right behind one. It tells activations
            apart, and global pooling inside operators from all other.
        macs: Multiply-accumulates without the bias; 0 for all but convolutions and linear layers.
        biases: Outputs to which a bias is added.
        inputs: Elements of its input.
        outputs: Elements of its output.
    """

    kind: Kind
    place: Place
    macs: int
    biases: int
    inputs: int
    outputs: int


def operations(model: nn.Module, input_size: InputSize) -> list[Operation]:
    """What runs when `model` sees one image in eval mode; see `macs` for the arguments.

    Activations and pooling count wherever they run, as modules or as functions.
    """
    shadow = shadow_of(model).eval()
    watcher = _Watcher()
    image = torch.empty(1, *image_shape(model, input_size), device="meta")
    with quiet_pass(), watcher.following(shadow), watcher:
        shadow(image)
    return watcher.found


def macs(ran: Sequence[Operation]) -> int:
    """Convolutions and linear layers without biases, as `complexity.macs` counts them."""
    return sum(op.macs for op in ran)


def convolutions(ran: Sequence[Operation]) -> int:
    """Convolutions alone, without biases: bL-ResNet-50 in Table II."""
    return sum(op.macs for op in ran if op.kind == "conv")


def ptflops_2018(
    ran: Sequence[Operation],
    relus: Activations = "all",
    upsampling: bool = True,
    global_pools: bool = False,
    linear_biases: bool = False,
) -> int:
    """The counter behind Tables V, VI, VII and XI: sovrasov's flops-counter of 2018-10 to 2019-01.

    Convolutions with their biases, linear layers without, two for each element of a batch norm, one for each element
    of an activation, for each input of a pooling window and for each output of an upsampling. Global pooling, sigmoid,
    softmax, sums and products count nothing.

    That counter saw modules only. The networks that it was used on call some of their activations as functions, and
    not always the same that ours do; so which ones count is said here.

    Args:
        ran: From `operations`.
        relus: The activations that count: "all"; those that are "modules"; of these only those in "operators"; these
            and what comes right "behind operators"; or "modules but behind operators".
        upsampling: Whether upsampling counts.
        global_pools: Whether the inputs of a global pooling count, as they did where it was a window of that size.
        linear_biases: Whether the biases of linear layers count.
    """
    counted = {
        "modules": ("operator", "behind operator", "module"),
        "operators": ("operator",),
        "behind operators": ("operator", "behind operator"),
        "modules but behind operators": ("operator", "module"),
        "all": ("operator", "behind operator", "module", "function"),
    }[relus]
    total = 0
    for op in ran:
        match op.kind:
            case "conv":
                total += op.macs + op.biases
            case "linear":
                total += op.macs + (op.biases if linear_biases else 0)
            case "norm":
                total += 2 * op.outputs
            case "relu" if op.place in counted:
                total += op.outputs
            case "pool":
                total += op.inputs
            case "global_pool" if global_pools:
                total += op.inputs
            case "upsample" if upsampling:
                total += op.outputs
    return total


def ptflops_baseline(ran: Sequence[Operation], relus: Activations = "all", global_pools: bool = False) -> int:
    """As `ptflops_2018`, with the biases of linear layers and without upsampling: some baselines of Tables I to III."""
    return ptflops_2018(ran, relus, upsampling=False, global_pools=global_pools, linear_biases=True)


def thop_2020(ran: Sequence[Operation], host_pooling: bool = True) -> int:
    """The counter behind Tables VIII and IX: pytorch-OpCounter of early 2020; the tables divide it by 2^30.

    Convolutions with biases, two for each product of a linear layer and each element of a batch norm, and a global
    pooling's inputs and outputs. Activations and pooling windows count nothing.

    Args:
        ran: From `operations`.
        host_pooling: Whether global pooling outside of operators counts. That counter saw modules only, and the
            detectors average their regions by a function.
    """
    total = 0
    for op in ran:
        match op.kind:
            case "conv":
                total += op.macs + op.biases
            case "linear":
                total += 2 * op.macs
            case "norm":
                total += 2 * op.outputs
            case "global_pool" if host_pooling or op.place == "operator":
                total += op.inputs + op.outputs
    return total


def thop_mid_2020(ran: Sequence[Operation]) -> int:
    """The counter behind the tables of SCConv: as `thop_2020`, with one for each product of a linear layer.

    Pooling windows count like global pooling, which for windows side by side is what that counter says. Group norms
    count nothing.
    """
    linear = sum(op.macs for op in ran if op.kind == "linear")
    return thop_2020(ran) - linear + sum(op.inputs + op.outputs for op in ran if op.kind == "pool")


def twice_macs(ran: Sequence[Operation], norms: bool = False) -> int:
    """Multiplications and additions apart, as Network Slimming has them.

    Args:
        ran: From `operations`.
        norms: Whether the two for each element of a batch norm count.
    """
    return 2 * macs(ran) + sum(2 * op.outputs for op in ran if norms and op.kind == "norm")


class _Watcher(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes every operation that some convention counts."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.found: list[Operation] = []
        # The operators and activations that run.
        self.inside: list[nn.Module] = []
        # What operators wrote; kept, so that no id is used twice.
        self.written: list[Tensor] = []

    @contextmanager
    def following(self, model: nn.Module) -> Iterator[None]:
        handles = []
        for module in (m for m in model.modules() if isinstance(m, (Operator, *_RELUS))):
            handles.append(module.register_forward_pre_hook(lambda m, args: self.inside.append(m)))
            handles.append(module.register_forward_hook(self._leave))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        self.inside.pop()
        if isinstance(module, Operator):
            self.written += [leaf for leaf in tree_iter(output) if isinstance(leaf, Tensor)]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        kind = _KINDS.get(func.overloadpacket)
        # SlimConv's gate pools by a sum, which it scales afterwards.
        whole = func.overloadpacket in (_aten.mean, _aten.sum) and len(args) > 1 and args[0].ndim == 4
        if whole and sorted(d % 4 for d in args[1]) == [2, 3]:
            kind = "global_pool"
        if kind is None:
            with self:
                parts = func.decompose(*args, **kwargs)
            if parts is not NotImplemented:
                return parts
        output = func(*args, **kwargs)
        if kind is not None:
            self._note(kind, args, output[0] if isinstance(output, tuple) else output)
        return output

    def _note(self, kind: Kind, args: Any, output: Tensor) -> None:
        macs = biases = 0
        if kind in ("conv", "linear"):
            weight = args[1]
            # A transposed convolution spreads every input, an ordinary one gathers every output.
            each = args[0] if kind == "conv" and args[6] else output
            macs = each.numel() * (weight.numel() // weight.shape[0])
            biases = output.numel() if len(args) > 2 and args[2] is not None else 0
        self.found.append(Operation(kind, self._place(kind, args[0]), macs, biases, args[0].numel(), output.numel()))

    def _place(self, kind: Kind, x: Tensor) -> Place:
        is_module = bool(self.inside) and isinstance(self.inside[-1], _RELUS)
        if (is_module or kind == "global_pool") and any(isinstance(module, Operator) for module in self.inside):
            return "operator"
        if not is_module:
            return "function"
        return "behind operator" if any(x is tensor for tensor in self.written) else "module"
