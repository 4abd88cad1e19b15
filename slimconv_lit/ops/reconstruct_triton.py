"""The folds of Reconstruct as two Triton kernels: one pass over x for all paths, forward and backward.

    B batch   C channels   S = H * W pixels   N folds   T = C // N   P paths (1 to 3)

In passes over x: forward, it is read once and P maps of T channels are written, 1 + P / N. Backward, x and the P
gradients are read once and the gradient of x is written once, 2 + P / N; the weights' gradients are summed over tiles
of pixels first and over tiles afterwards, so that they come out the same each time. Sums are in float32, those of
float64 in float64.

The pooled mean stays torch's: all of it has to be known before the first weight is, so that a kernel of ours would read
x once more too, where compilers take the sum while they write x. So does the gate, on B * C numbers. The norm and ReLU
that wrote x are not taken over either: both the mean and the folds read x, in training its norm and its convolution
read it too, and reading twice what is not rectified yet saves one pass of three and no more.

Chosen by `slimconv_lit.ops.reconstruct.use_kernel`, which imports this file; nothing else does.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, type-arg"

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional

INTERPRETED = triton.knobs.runtime.interpret
"""Whether Triton was told to run kernels on the CPU (TRITON_INTERPRET=1 in the environment), for tests."""

# Numbers of one map in a program's tile, and its warps; how many lie side by side in memory, where there are enough.
FORWARD, BACKWARD, RUN = (2048, 4), (4096, 8), 64


@triton.jit
def _tile(S, T: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_T: tl.constexpr):
    """Which image, which tile of its pixels, which pixels and channels; the next program has the next channels."""
    across: tl.constexpr = (T + BLOCK_T - 1) // BLOCK_T
    tiles = tl.cdiv(S, BLOCK_S)
    image, tile = tl.program_id(0) // across // tiles, tl.program_id(0) // across % tiles
    pixels = tile * BLOCK_S + tl.arange(0, BLOCK_S)
    channels = tl.program_id(0) % across * BLOCK_T + tl.arange(0, BLOCK_T)
    # In 64 bits, for maps of more than 2^31 numbers.
    return image.to(tl.int64), tile, pixels.to(tl.int64), channels.to(tl.int64)


@triton.jit
def _place(image, c, s, C, S, LAST: tl.constexpr):
    """Where the numbers of a tile are in a map (B, C, S) without gaps, with pixels or channels last."""
    if LAST:
        return image * C * S + s[:, None] * C + c[None, :]
    else:
        return image * C * S + c[None, :] * S + s[:, None]


@triton.jit
def _forward(
    x, w, map0, map1, map2, x_b, x_c, x_s, B, C, S, N: tl.constexpr, T: tl.constexpr, P: tl.constexpr,
    BLOCK_S: tl.constexpr, BLOCK_T: tl.constexpr, LAST: tl.constexpr, SUM: tl.constexpr,
):  # fmt: skip
    image, _, s, t = _tile(S, T, BLOCK_S, BLOCK_T)
    known = t < T
    inside = (s < S)[:, None] & known[None, :]
    sum0 = tl.zeros([BLOCK_S, BLOCK_T], SUM)
    sum1 = sum0
    sum2 = sum0
    for fold in tl.static_range(N):
        c = fold * T + t
        value = tl.load(x + image * x_b + s[:, None] * x_s + c[None, :] * x_c, mask=inside, other=0).to(SUM)
        weight = w + image * C + c
        sum0 += value * tl.load(weight, mask=known, other=0).to(SUM)[None, :]
        if P > 1:
            sum1 += value * tl.load(weight + B * C, mask=known, other=0).to(SUM)[None, :]
        if P > 2:
            sum2 += value * tl.load(weight + 2 * B * C, mask=known, other=0).to(SUM)[None, :]
    place = _place(image, t, s, T, S, LAST)
    tl.store(map0 + place, sum0, mask=inside)
    if P > 1:
        tl.store(map1 + place, sum1, mask=inside)
    if P > 2:
        tl.store(map2 + place, sum2, mask=inside)


@triton.jit
def _backward(
    x, w, grad0, grad1, grad2, of_x, of_w, x_b, x_c, x_s, B, C, S, N: tl.constexpr, T: tl.constexpr, P: tl.constexpr,
    BLOCK_S: tl.constexpr, BLOCK_T: tl.constexpr, LAST: tl.constexpr, SUM: tl.constexpr,
):  # fmt: skip
    image, tile, s, t = _tile(S, T, BLOCK_S, BLOCK_T)
    known = t < T
    inside = (s < S)[:, None] & known[None, :]
    place = _place(image, t, s, T, S, LAST)
    of0 = tl.load(grad0 + place, mask=inside, other=0).to(SUM)
    if P > 1:
        of1 = tl.load(grad1 + place, mask=inside, other=0).to(SUM)
    if P > 2:
        of2 = tl.load(grad2 + place, mask=inside, other=0).to(SUM)
    # The sums over this tile's pixels, which are summed over tiles afterwards: (P, B, tiles, C).
    tiles = tl.cdiv(S, BLOCK_S)
    path = B * tiles * C
    for fold in tl.static_range(N):
        c = fold * T + t
        value = tl.load(x + image * x_b + s[:, None] * x_s + c[None, :] * x_c, mask=inside, other=0).to(SUM)
        weight, sums = w + image * C + c, of_w + (image * tiles + tile) * C + c
        total = of0 * tl.load(weight, mask=known, other=0).to(SUM)[None, :]
        tl.store(sums, tl.sum(value * of0, axis=0), mask=known)
        if P > 1:
            total += of1 * tl.load(weight + B * C, mask=known, other=0).to(SUM)[None, :]
            tl.store(sums + path, tl.sum(value * of1, axis=0), mask=known)
        if P > 2:
            total += of2 * tl.load(weight + 2 * B * C, mask=known, other=0).to(SUM)[None, :]
            tl.store(sums + 2 * path, tl.sum(value * of2, axis=0), mask=known)
        tl.store(of_x + _place(image, c, s, C, S, LAST), total, mask=inside)


@torch.library.custom_op("slimconv_lit::fold_paths", mutates_args=())
def fold_paths(x: Tensor, weights: Sequence[Tensor], folds: int) -> list[Tensor]:
    """`slimconv_lit.ops.reconstruct.fold` of x with each of 1 to 3 weights.

    Args:
        x: (B, C, H, W), of any strides; channels that lie side by side in memory do so in the maps.
        weights: (B, C, 1, 1) for each path.
        folds: N.

    Returns:
        The folded maps (B, T, H, W).
    """
    maps = _maps(x, weights, folds)
    _launch(_forward, _block(x, folds, FORWARD), FORWARD[1], x, weights, maps, (), folds)
    return maps


@torch.library.custom_op("slimconv_lit::fold_paths_backward", mutates_args=())
def fold_paths_backward(
    x: Tensor, weights: Sequence[Tensor], grads: Sequence[Tensor], folds: int
) -> tuple[Tensor, Tensor]:
    """The gradients of x, (B, C, H, W), and of the P weights, (P, B, C), by those of the folded maps."""
    (batch, channels), used, layout = x.shape[:2], x.shape[1] // folds * folds, _layout(x)
    of_x = torch.empty_like(x, memory_format=layout)
    block = _block(x, folds, BACKWARD)
    tiles = triton.cdiv(x.shape[2] * x.shape[3], block[0])
    of_weights = x.new_empty(len(weights), batch, tiles, channels, dtype=_summed_in(x, *weights))
    grads = [grad.contiguous(memory_format=layout) for grad in grads]
    _launch(_backward, block, BACKWARD[1], x, weights, grads, (of_x, of_weights), folds)
    of_x[:, used:] = 0
    of_weights[..., used:] = 0
    return of_x, of_weights.sum(2).to(weights[0].dtype)


def _maps(x: Tensor, weights: Sequence[Tensor], folds: int) -> list[Tensor]:
    shape, dtype = (x.shape[0], x.shape[1] // folds, *x.shape[2:]), torch.promote_types(x.dtype, weights[0].dtype)
    return [torch.empty(shape, dtype=dtype, device=x.device, memory_format=_layout(x)) for _ in weights]


def _layout(x: Tensor) -> torch.memory_format:
    return torch.channels_last if x.stride(1) == 1 else torch.contiguous_format


def _summed_in(*tensors: Tensor) -> torch.dtype:
    return torch.float64 if any(tensor.dtype == torch.float64 for tensor in tensors) else torch.float32


def _block(x: Tensor, folds: int, how: tuple[int, int]) -> tuple[int, int]:
    """Pixels and channels of a tile, which is long where memory runs."""
    sizes = [triton.next_power_of_2(size) for size in (x.shape[2] * x.shape[3], x.shape[1] // folds)]
    inner = 1 if _layout(x) == torch.channels_last else 0
    sizes[inner] = min(sizes[inner], max(RUN, how[0] // sizes[1 - inner]))
    sizes[1 - inner] = min(sizes[1 - inner], how[0] // sizes[inner])
    return sizes[0], sizes[1]


def _launch(
    kernel: Any, block: tuple[int, int], warps: int, x: Tensor, weights: Sequence[Tensor], maps: Sequence[Tensor],
    written: Sequence[Tensor], folds: int,
) -> None:  # fmt: skip
    # Where height and width do not lie as one, a copy does.
    flat, w = x.flatten(2), torch.stack([w.flatten(1) for w in weights])
    (batch, channels, pixels), width = flat.shape, x.shape[1] // folds
    programs = batch * triton.cdiv(pixels, block[0]) * triton.cdiv(width, block[1])
    # A kernel has arguments for three paths, of which it looks at P.
    three = (list(maps) * 3)[:3]
    sizes = {"N": folds, "T": width, "P": len(maps), "BLOCK_S": block[0], "BLOCK_T": block[1]}
    kinds = {"LAST": _layout(x) == torch.channels_last, "SUM": getattr(tl, str(_summed_in(x, w)).split(".")[1])}
    if not programs:
        return
    # Else the kernel would be started on the first GPU, wherever x is.
    with torch.cuda.device_of(x):  # type: ignore[no-untyped-call]
        kernel[(programs,)](
            flat, w, *three, *written, *flat.stride(), batch, channels, pixels, **sizes, **kinds, num_warps=warps
        )


@fold_paths.register_fake
def _(x: Tensor, weights: Sequence[Tensor], folds: int) -> list[Tensor]:
    return _maps(x, weights, folds)


@fold_paths_backward.register_fake
def _(x: Tensor, weights: Sequence[Tensor], grads: Sequence[Tensor], folds: int) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x, memory_format=_layout(x)), weights[0].new_empty(len(weights), *x.shape[:2])


def _keep(ctx: Any, inputs: tuple[Tensor, Sequence[Tensor], int], output: list[Tensor]) -> None:
    x, weights, ctx.folds = inputs
    ctx.save_for_backward(x, *weights)


def _differentiate(ctx: Any, grads: Sequence[Tensor]) -> tuple[Tensor, list[Tensor], None]:
    x, *weights = ctx.saved_tensors
    if torch.is_grad_enabled():
        # To be differentiated once more.
        used = x.shape[1] // ctx.folds * ctx.folds
        rest = (0, 0, 0, 0, 0, x.shape[1] - used)
        wide = [grad.repeat(1, ctx.folds, 1, 1) for grad in grads]
        of_x = torch.stack([grad * w[:, :used] for grad, w in zip(wide, weights, strict=True)]).sum(0)
        sums = [functional.pad((grad * x[:, :used]).sum((2, 3), keepdim=True), rest) for grad in wide]
        of_weights = [of.to(w.dtype) for of, w in zip(sums, weights, strict=True)]
        return functional.pad(of_x, rest).to(x.dtype), of_weights, None
    of_x, of_w = fold_paths_backward(x, weights, grads, ctx.folds)
    return of_x, [of.view_as(w) for of, w in zip(of_w, weights, strict=True)], None


fold_paths.register_autograd(_differentiate, setup_context=_keep)
