"""Reconstruct, and what of a path need not be kept for the backward pass.

    B batch   C channels   H W space   N folds   T = C // N   P paths

Autograd keeps what every layer reads. Two of SlimConv's layers read what is quickly made again: a folded map comes of
x, which whoever wrote it has kept already, and of the weights, which are small; a normed and rectified map comes of
the map before the norm. Both are made again here, and weighted copies of x are never made. The gradient of x is
written once, for all paths.

On a GPU, Triton kernels (reconstruct_triton.py) do both where `use_kernel` has chosen them.
"""

from collections.abc import Callable, Iterator, Sequence
from importlib import import_module
from typing import Any, Literal, TypeAlias, get_args

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn import functional

Geometry: TypeAlias = tuple[Any, Any, Any, int]
"""Stride, padding, dilation and groups of a convolution."""

Kernel = Literal["torch", "triton"]

# The module with the kernels, once it is chosen.
_kernels: Any = None


class use_kernel:
    """Chooses what folds SlimConv's maps on a GPU: from now on or, as `with use_kernel("triton"):`, in a block.

    It holds for all networks of the process; on the CPU it is always torch. The command line has it as `--kernel`.

    Args:
        name: "torch", which all begins with, or "triton", the kernels of ours.

    Raises:
        ValueError: If there is no kernel of that name, no package `triton`, or no GPU.
    """

    def __init__(self, name: Kernel) -> None:
        global _kernels
        if name not in get_args(Kernel):
            raise ValueError(f"there is no kernel {name!r}; there are {' and '.join(get_args(Kernel))}")
        self.before = _kernels
        _kernels = _import_kernels() if name == "triton" else None

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        global _kernels
        _kernels = self.before


def _import_kernels() -> Any:
    try:
        kernels = import_module("slimconv_lit.ops.reconstruct_triton")
    except ImportError as error:
        raise ValueError(
            f"kernel 'triton' needs the package triton, which comes with torch on Linux: {error}"
        ) from error
    if not (torch.cuda.is_available() or kernels.INTERPRETED):
        raise ValueError("kernel 'triton' needs a GPU, and torch sees none here; 'torch' runs everywhere")
    return kernels


def _takes_kernel(x: Tensor) -> bool:
    return _kernels is not None and not x.is_meta and (x.is_cuda or _kernels.INTERPRETED)


def fold(x: Tensor, w: Tensor, folds: int) -> Tensor:
    """Sums the N folds of w * x: (B, C, H, W) and (B, C, 1, 1) -> (B, T, H, W); channels behind N * T are left out."""
    width = x.shape[1] // folds
    folded = x[:, :width] * w[:, :width]
    # The channel graph is read from the form that changes nothing in place.
    add_product = torch.Tensor.addcmul if x.is_meta else torch.Tensor.addcmul_
    for start in range(width, width * folds, width):
        # One pass over each fold, instead of writing w * x out and reading it again.
        folded = add_product(folded, x[:, start : start + width], w[:, start : start + width])
    return folded


def fold_paths(x: Tensor, weights: Sequence[Tensor], folds: int) -> Iterator[Tensor]:
    """`fold` with the weights of each path, made as they are asked for; by a kernel, all at once."""
    if _takes_kernel(x):
        return iter(_kernels.fold_paths(x, weights, folds))
    return (fold(x, w, folds) for w in weights)


def can_make_again(x: Tensor, *modules: nn.Module) -> bool:
    """Whether what is below saves memory, and nobody notices that the modules are not called one by one.

    Not so where no gradient is wanted, where something watches the modules (hooks, the channel graph, a tracer) or has
    changed what they do, under `torch.compile` and `torch.export`, which plan what is kept by themselves, and under
    `torch.func` and forward-mode differentiation, which want rules of their own for what is below.
    """
    if not torch.is_grad_enabled() or x.is_meta or torch.compiler.is_compiling():
        return False
    if torch._C._functorch.peek_interpreter_stack() is not None or forward_ad._current_level >= 0:
        return False
    if torch._C._get_tracing_state() is not None or nn.modules.module._has_any_global_hook():  # type: ignore[no-untyped-call]
        return False
    return all(_is_plain(module) for module in modules)


def _is_plain(module: nn.Module) -> bool:
    if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks:
        return False
    if type(module) is nn.Conv2d and (module.bias is not None or module.padding_mode != "zeros"):
        return False
    return type(module) in (nn.Sequential, nn.Conv2d, nn.BatchNorm2d, nn.ReLU) and "forward" not in vars(module)


def convolve_folds(x: Tensor, weights: Sequence[Tensor], folds: int, convs: Sequence[nn.Conv2d]) -> list[Tensor]:
    """`conv(fold(x, w, folds))` for every path, of which x, the weights and the kernels are kept for backward.

    Args:
        x: (B, C, H, W).
        weights: (B, C, 1, 1) for each of the P paths.
        folds: N.
        convs: The paths' convolutions, from T channels to any width, without biases.

    Returns:
        What each convolution writes.
    """
    kernels = [_kernel(conv, x) for conv in convs]
    return list(_ConvolvedFolds.apply(x, folds, [_geometry(conv) for conv in convs], *weights, *kernels))


def convolve_normed(x: Tensor, norm: nn.BatchNorm2d, conv: nn.Conv2d) -> Tensor:
    """`conv(relu(norm(x)))`, of which x and the parameters are kept for backward.

    Args:
        x: (B, C, H, W).
        norm: Of C channels; in training it normalises with the batch and keeps account of its statistics.
        conv: From C channels to any width, without bias.
    """
    by_batch = norm.training or norm.running_mean is None
    statistics = () if by_batch else (norm.running_mean, norm.running_var)

    def first(x: Tensor, *_: Tensor | None) -> Tensor:
        # Only the first time counts for the running statistics.
        return functional.relu_(norm(x))

    def again(x: Tensor, scale: Tensor | None, shift: Tensor | None, *statistics: Tensor) -> Tensor:
        mean, variance = statistics or (None, None)
        return functional.relu_(functional.batch_norm(x, mean, variance, scale, shift, by_batch, eps=norm.eps))

    tensors = (x, norm.weight, norm.bias, *statistics)
    normed: Tensor = _Convolved.apply(first, again, _geometry(conv), _kernel(conv, x), *tensors)
    return normed


def join(maps: Sequence[Tensor]) -> Tensor:
    """`torch.cat(maps, dim=1)` of (B, C, H, W), whose gradients come apart as maps of their own.

    Slices of one gradient make the backward pass of a norm several times as slow on CPUs.
    """
    joined: Tensor = _Joined.apply(*maps)
    return joined


def _geometry(conv: nn.Conv2d) -> Geometry:
    return conv.stride, conv.padding, conv.dilation, conv.groups


def _kernel(conv: nn.Conv2d, x: Tensor) -> Tensor:
    # Autocast decides here: inside an autograd function it would cast without a way back to the parameter.
    device = x.device.type
    lower = torch.is_autocast_enabled(device) and conv.weight.dtype != torch.float64
    return conv.weight.to(torch.get_autocast_dtype(device)) if lower else conv.weight


def _convolve(x: Tensor, kernel: Tensor, geometry: Geometry) -> Tensor:
    return functional.conv2d(x.to(kernel.dtype), kernel, None, *geometry)


def _convolve_backward(
    grad: Tensor, x: Tensor, kernel: Tensor, geometry: Geometry, needed: tuple[bool, bool]
) -> tuple[Tensor | None, Tensor | None]:
    stride, padding, dilation, groups = geometry
    of_x, of_kernel, _ = torch.ops.aten.convolution_backward(
        *(grad, x.to(kernel.dtype), kernel, None, stride, padding, dilation, False, (0, 0), groups, (*needed, False))
    )
    return of_x, of_kernel


def _backward_for_more(
    function: Callable[..., Sequence[Tensor]],
    inputs: Sequence[Tensor | None],
    grads: Sequence[Tensor],
    needed: Sequence[bool],
) -> list[Tensor | None]:
    """Gradients of `inputs` that can be differentiated once more: by autograd, with all that it keeps."""
    # A tensor that comes in twice has two gradients.
    own = [None if tensor is None else tensor.view_as(tensor) for tensor in inputs]
    wanted = [tensor for tensor, need in zip(own, needed, strict=True) if need and tensor is not None]
    found = iter(torch.autograd.grad(function(*own), wanted, grads, create_graph=True))
    return [next(found) if need else None for need in needed]


class _ConvolvedFolds(torch.autograd.Function):
    """See `convolve_folds`."""

    @staticmethod
    def forward(x: Tensor, folds: int, geometries: list[Geometry], *tensors: Tensor) -> tuple[Tensor, ...]:
        maps = fold_paths(x, tensors[: len(geometries)], folds)
        every = zip(tensors[len(geometries) :], geometries, strict=True)
        return tuple(_convolve(next(maps), kernel, geometry) for kernel, geometry in every)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        x, ctx.folds, ctx.geometries, *tensors = inputs
        ctx.save_for_backward(x, *tensors)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        x, *tensors = ctx.saved_tensors
        folds, geometries, paths = ctx.folds, ctx.geometries, len(ctx.geometries)
        x_needed, _, _, *needed = ctx.needs_input_grad
        if torch.is_grad_enabled():

            def function(x: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
                return _ConvolvedFolds.forward(x, folds, geometries, *tensors)

            of_x, *rest = _backward_for_more(function, (x, *tensors), grads, (x_needed, *needed))
            return of_x, None, None, *rest
        if _takes_kernel(x):
            return _ConvolvedFolds._backward_by_kernel(ctx, grads)

        width = x.shape[1] // folds
        parts = [slice(start, start + width) for start in range(0, width * folds, width)]
        of_x = torch.empty_like(x) if x_needed else None
        of_tensors: list[Tensor | None] = [None] * len(tensors)
        for i, (grad, geometry) in enumerate(zip(grads, geometries, strict=True)):
            w, kernel, w_needed = tensors[i], tensors[paths + i], needed[i]
            folded = fold(x, w, folds)
            of_folded, of_tensors[paths + i] = _convolve_backward(
                grad, folded, kernel, geometry, (x_needed or w_needed, needed[paths + i])
            )
            if of_folded is None:
                continue
            if of_x is not None:
                for part in parts:
                    if i == 0:
                        torch.mul(of_folded, w[:, part], out=of_x[:, part])
                    else:
                        of_x[:, part].addcmul_(of_folded, w[:, part])
            if w_needed:
                # The folded map is done with, and new memory is slow.
                sums = [torch.mul(x[:, part], of_folded, out=folded).sum((2, 3), keepdim=True) for part in parts]
                of_w = torch.cat(sums, dim=1)
                of_tensors[i] = functional.pad(of_w, (0, 0, 0, 0, 0, w.shape[1] - of_w.shape[1]))
        if of_x is not None:
            of_x[:, width * folds :] = 0
        return of_x, None, None, *of_tensors

    @staticmethod
    def _backward_by_kernel(ctx: Any, grads: Sequence[Tensor]) -> tuple[Any, ...]:
        x, *tensors = ctx.saved_tensors
        weights, kernels = tensors[: len(grads)], tensors[len(grads) :]
        x_needed, _, _, *needed = ctx.needs_input_grad
        maps_needed = x_needed or any(needed[: len(grads)])
        maps = fold_paths(x, weights, ctx.folds)
        every = zip(grads, kernels, ctx.geometries, needed[len(grads) :], strict=True)
        found = [_convolve_backward(g, next(maps), kernel, geo, (maps_needed, need)) for g, kernel, geo, need in every]
        of_maps, of_kernels = zip(*found, strict=True)
        if not maps_needed:
            return None, None, None, *[None] * len(weights), *of_kernels
        of_x, of_weights = _kernels.fold_paths_backward(x, weights, of_maps, ctx.folds)
        return of_x, None, None, *(of_w.view_as(w) for of_w, w in zip(of_weights, weights, strict=True)), *of_kernels


class _Convolved(torch.autograd.Function):
    """The convolution of what `first` makes of tensors, and in the backward pass `again`."""

    @staticmethod
    def forward(
        first: Callable[..., Tensor],
        again: Callable[..., Tensor],
        geometry: Geometry,
        kernel: Tensor,
        *tensors: Tensor | None,
    ) -> Tensor:
        return _convolve(first(*tensors), kernel, geometry)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, ctx.again, ctx.geometry, *tensors = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        kernel, *tensors = ctx.saved_tensors
        kernel_needed, *needed = ctx.needs_input_grad[3:]
        if torch.is_grad_enabled():

            def function(kernel: Tensor, *tensors: Tensor) -> tuple[Tensor]:
                return (_convolve(ctx.again(*tensors), kernel, ctx.geometry),)

            return (
                None,
                None,
                None,
                *_backward_for_more(function, (kernel, *tensors), (grad,), (kernel_needed, *needed)),
            )

        with torch.enable_grad():
            own = [None if t is None else t.detach().requires_grad_(n) for t, n in zip(tensors, needed, strict=True)]
            made = ctx.again(*own)
        of_made, of_kernel = _convolve_backward(grad, made.detach(), kernel, ctx.geometry, (any(needed), kernel_needed))
        wanted = [tensor for tensor in own if tensor is not None and tensor.requires_grad]
        of_wanted = iter(torch.autograd.grad(made, wanted, of_made) if wanted else ())
        return None, None, None, of_kernel, *(next(of_wanted) if need else None for need in needed)


class _Joined(torch.autograd.Function):
    """See `join`."""

    @staticmethod
    def forward(*maps: Tensor) -> Tensor:
        return torch.cat(maps, dim=1)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        last = inputs[0].is_contiguous(memory_format=torch.channels_last)
        ctx.layout = torch.channels_last if last else torch.contiguous_format
        ctx.widths = [part.shape[1] for part in inputs]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        return tuple(part.contiguous(memory_format=ctx.layout) for part in torch.split(grad, ctx.widths, dim=1))
