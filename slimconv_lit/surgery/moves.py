"""How operations move channels: what becomes of the channel numbers that `trace` has put on their inputs.

Each handler gets (known, args, kwargs, output), where known(tensor) is what a tensor carries, and returns labels for
each output, or None where it does not understand.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from slimconv_lit.surgery.graph import Labels

aten = torch.ops.aten


def along(labels: Labels, axis: int, shape: Sequence[int]) -> Labels | None:
    """The labels along one axis, or None where they vary on another."""
    if labels.size != labels.shape[axis]:
        return None
    return np.broadcast_to(labels.ravel(), (shape[axis],)).copy()


def _full(labels: Labels, axis: int, size: int) -> Labels:
    shape = list(labels.shape)
    shape[axis] = size
    return np.broadcast_to(labels, shape)


def _same(known: Any, args: Any, kwargs: Any, output: Any) -> Any:
    labels = known(args[0])
    return labels if isinstance(output, Tensor) else [labels] + [None] * (len(output) - 1)


def _space_only(known: Any, args: Any, kwargs: Any, output: Any) -> Any:
    """Pooling and resizing: the channels pass, provided that no label varies over the last two axes."""
    return None if known(args[0]).shape[-2:] != (1, 1) else _same(known, args, kwargs, output)


def _view(known: Any, args: Any, kwargs: Any, output: Tensor) -> Labels | None:
    labels, old, new = known(args[0]), list(args[0].shape), list(output.shape)
    if 0 in old:
        return None
    pieces: list[int] = []
    full: list[int] = []
    i = j = 0
    # Old and new axes fall into groups of equally many elements; a group is spread out only if labels vary in it.
    while i < len(old) or j < len(new):
        a, b = i + 1, j + 1
        while a < len(old) and np.prod(old[i:a]) < np.prod(new[j:b]):
            a += 1
        while np.prod(old[i:a]) != np.prod(new[j:b]):
            if np.prod(old[i:a]) < np.prod(new[j:b]):
                a += 1
            else:
                b += 1
        varies = any(n > 1 for n in labels.shape[i:a])
        full += old[i:a] if varies else [1] * len(old[i:a])
        pieces += new[j:b] if varies else [1] * len(new[j:b])
        i, j = a, b
    return np.broadcast_to(labels, full).reshape(pieces)


def _by_numpy(move: Callable[[Labels, Any, Any], Any]) -> Callable[..., Labels]:
    return lambda known, args, kwargs, output: move(known(args[0]), args, output)


def _slice(known: Any, args: Any, kwargs: Any, output: Any) -> Labels:
    labels: Labels = known(args[0])
    dim, *bounds = args[1:] or (0,)
    if labels.shape[dim] == 1:
        return labels
    index = [slice(None)] * labels.ndim
    index[dim] = slice(*bounds) if bounds else slice(None)
    return labels[tuple(index)]


def _split(known: Any, args: Any, kwargs: Any, output: Sequence[Tensor]) -> list[Labels]:
    labels, dim = known(args[0]), args[2] if len(args) > 2 else kwargs.get("dim", 0)
    if labels.shape[dim] == 1:
        return [labels] * len(output)
    return np.split(labels, np.cumsum([o.shape[dim] for o in output])[:-1], axis=dim)


def _unbind(known: Any, args: Any, kwargs: Any, output: Sequence[Tensor]) -> list[Labels]:
    labels, dim = known(args[0]), args[1] if len(args) > 1 else 0
    return [labels.take(min(i, labels.shape[dim] - 1), axis=dim) for i in range(len(output))]


def _cat(known: Any, args: Any, kwargs: Any, output: Tensor) -> Labels:
    dim = args[1] if len(args) > 1 else kwargs.get("dim", 0)
    # A tensor that no layer wrote joins as channels without a number.
    parts = [known(t) if known(t) is not None else np.full((1,) * t.ndim, -1) for t in args[0]]
    parts = [_full(p, dim, t.shape[dim]) for p, t in zip(parts, args[0], strict=True)]
    axes = [max(p.shape[i] for p in parts) for i in range(output.ndim)]
    return np.concatenate([np.broadcast_to(p, [*axes[:dim], p.shape[dim], *axes[dim:][1:]]) for p in parts], axis=dim)


def _stack(known: Any, args: Any, kwargs: Any, output: Tensor) -> Labels:
    dim = args[1] if len(args) > 1 else kwargs.get("dim", 0)
    parts = [known(t) if known(t) is not None else np.full((1,) * t.ndim, -1) for t in args[0]]
    return np.stack(np.broadcast_arrays(*parts), axis=dim)


def _reduce(known: Any, args: Any, kwargs: Any, output: Any) -> Any:
    labels = known(args[0])
    dims = args[1] if len(args) > 1 else kwargs.get("dim")
    dims = [dims] if isinstance(dims, int) else list(dims or range(labels.ndim))
    if any(labels.shape[d] > 1 for d in dims):
        return None
    kept = args[2] if len(args) > 2 else kwargs.get("keepdim", False)
    reduced = labels if kept else labels.squeeze(tuple(d % labels.ndim for d in dims))
    return reduced if isinstance(output, Tensor) else [reduced] * len(output)


def _pad(known: Any, args: Any, kwargs: Any, output: Tensor) -> Labels | None:
    labels, amounts = known(args[0]), args[1]
    for i in range(len(amounts) // 2):
        axis = labels.ndim - 1 - i
        before, after = amounts[2 * i : 2 * i + 2]
        if labels.shape[axis] > 1 and (before or after):
            if min(before, after) < 0:
                return None
            labels = np.pad(
                labels, [(before, after) if d == axis else (0, 0) for d in range(labels.ndim)], constant_values=-1
            )
    return labels


# What torch does not tag as pointwise, although it is.
POINTWISE = {
    *(aten.hardswish, aten.hardswish_, aten.mish_, aten.threshold_, aten._prelu_kernel, aten.rsub),
    *(aten.bernoulli, aten.bernoulli_, aten._to_copy, aten.clone),
}

# They take no values from what they read.
FRESH = {aten.new_empty, aten.new_zeros, aten.new_ones, aten.new_full}

HANDLERS: dict[Any, Callable[..., Any]] = {
    **dict.fromkeys(
        [
            *(aten.detach, aten.alias, aten.lift_fresh, aten.contiguous, aten.native_dropout),
            *(aten.feature_dropout, aten.feature_dropout_, aten.alpha_dropout, aten.alpha_dropout_),
            *(aten.feature_alpha_dropout, aten.feature_alpha_dropout_),
        ],
        _same,
    ),
    **dict.fromkeys(
        [
            aten.avg_pool2d,
            aten.max_pool2d_with_indices,
            aten.max_pool2d,
            aten._adaptive_avg_pool2d,
            aten.adaptive_avg_pool2d,
            aten.adaptive_max_pool2d,
            aten.upsample_nearest2d,
            aten.upsample_bilinear2d,
            aten.upsample_bicubic2d,
            aten._upsample_bilinear2d_aa,
            aten.reflection_pad2d,
            aten.replication_pad2d,
        ],
        _space_only,
    ),
    **dict.fromkeys([aten.view, aten._unsafe_view, aten._reshape_alias], _view),
    **dict.fromkeys([aten.mean, aten.sum, aten.amax, aten.amin, aten.var, aten.std, aten.max, aten.min], _reduce),
    aten.permute: _by_numpy(lambda v, args, out: v.transpose(args[1])),
    aten.transpose: _by_numpy(lambda v, args, out: v.swapaxes(args[1], args[2])),
    aten.t: _by_numpy(lambda v, args, out: v.T),
    aten.unsqueeze: _by_numpy(lambda v, args, out: np.expand_dims(v, args[1])),
    aten.squeeze: _view,
    aten.expand: _by_numpy(lambda v, args, out: v.reshape((1,) * (out.ndim - v.ndim) + v.shape)),
    aten.select: _by_numpy(lambda v, args, out: v.take(0 if v.shape[args[1]] == 1 else args[2], axis=args[1])),
    aten.flip: _by_numpy(lambda v, args, out: np.flip(v, args[1])),
    aten.slice: _slice,
    aten.split: _split,
    aten.split_with_sizes: _split,
    aten.unbind: _unbind,
    aten.cat: _cat,
    aten.stack: _stack,
    aten.constant_pad_nd: _pad,
}
