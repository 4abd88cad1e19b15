"""Output stride: finer feature maps from any network, by dilation in the place of stride.

One rule rewrites every convolution and every pooling, whatever the family. Let S be the stride of the map that a layer
reads, OS the one that is wanted, and f = max(1, S / OS). Its dilation and its padding are multiplied by f, and its
stride is cut to what is left of OS, 1 from there on. The rewritten network so computes what the original does and what
lies in between: every f-th pixel of its maps is the original's. (Not so with gates that pool over the whole map, and
next to a border at which the original drops pixels.) For a ResNet it is what torchvision's
`replace_stride_with_dilation` builds.

A layer whose stride is cut keeps the size of its input. Where its own padding does not do that (2x2 kernels, kernels
without padding) the missing pixels are added on the right and at the bottom, which leaves every f-th pixel as it was.
"""

from dataclasses import dataclass
from functools import reduce
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from slimconv_lit.backbones.stages import Call, stage_ends, watch
from slimconv_lit.ops import base
from slimconv_lit.surgery.trace import shadow_of

OUTPUT_STRIDES = (8, 16, 32)


def pair(size: Any) -> tuple[int, int]:
    """`ops.base.pair` for what torch's layers hold, which is typed more loosely."""
    return base.pair(size)


class PaddedConv2d(nn.Conv2d):
    """`conv` with its parameters shared, after `fill` = (bottom, right) more rows and columns of zeros."""

    def __init__(self, conv: nn.Conv2d, fill: tuple[int, int]) -> None:
        kernel, stride, padding, dilation = map(pair, (conv.kernel_size, conv.stride, conv.padding, conv.dilation))
        # On the meta device, for its own parameters are not needed and would cost random numbers.
        meta = torch.device("meta")
        super().__init__(
            conv.in_channels, conv.out_channels, kernel, stride, padding, dilation, conv.groups, False, device=meta
        )
        self.weight, self.bias = conv.weight, conv.bias
        self.fill = fill

    def forward(self, x: Tensor) -> Tensor:
        """Maps (B, in_channels, H, W) to (B, out_channels, H', W')."""
        return super().forward(functional.pad(x, (0, self.fill[1], 0, self.fill[0])))


class DilatedPool2d(nn.Module):
    """`pool` at another stride and dilation, which `nn.AvgPool2d` lacks, with padding that `nn.MaxPool2d` refuses.

    Shapes: (B, C, H, W) -> (B, C, H', W').

    Args:
        pool: The pooling whose kind, kernel and padding are taken over.
        stride: Its new stride.
        factor: What its dilation and its padding are multiplied by.
        fill: (bottom, right) pixels to add; they count in no maximum and in no average.
    """

    def __init__(
        self, pool: nn.MaxPool2d | nn.AvgPool2d, stride: tuple[int, int], factor: int, fill: tuple[int, int]
    ) -> None:
        super().__init__()
        self.is_max = isinstance(pool, nn.MaxPool2d)
        self.counts_padding = isinstance(pool, nn.AvgPool2d) and pool.count_include_pad
        self.kernel_size = pair(pool.kernel_size)
        self.stride = stride
        self.padding = factor * pair(pool.padding)[0], factor * pair(pool.padding)[1]
        dilation = pair(pool.dilation) if isinstance(pool, nn.MaxPool2d) else (1, 1)
        self.dilation = factor * dilation[0], factor * dilation[1]
        self.fill = fill

    def forward(self, x: Tensor) -> Tensor:
        """Maps (B, C, H, W) to (B, C, H', W')."""
        (high, wide), (bottom, right) = self.padding, self.fill
        pad = (wide, wide + right, high, high + bottom)
        if self.is_max:
            padded = functional.pad(x, pad, value=-torch.inf)
            return functional.max_pool2d(padded, self.kernel_size, self.stride, 0, self.dilation)
        counted = functional.pad(torch.ones_like(x[:1, :1]), (wide, wide, high, high), value=float(self.counts_padding))
        return self._sum(functional.pad(x, pad)) / self._sum(functional.pad(counted, (0, right, 0, bottom)))

    def _sum(self, x: Tensor) -> Tensor:
        for axis, kernel, stride, step in zip((2, 3), self.kernel_size, self.stride, self.dilation, strict=True):
            size = x.shape[axis] - step * (kernel - 1)
            x = reduce(torch.add, [x.narrow(axis, i * step, size) for i in range(kernel)])
            x = x[:, :, ::stride] if axis == 2 else x[:, :, :, ::stride]
        return x

    def extra_repr(self) -> str:
        """What the printed module shows."""
        kind = "max" if self.is_max else "average"
        return f"{kind}, kernel_size={self.kernel_size}, stride={self.stride}, dilation={self.dilation}"


@dataclass(frozen=True)
class _Edit:
    """A new stride for one layer, and what its dilation and its padding are multiplied by."""

    stride: tuple[int, int]
    factor: int


def dilate(model: nn.Module, output_stride: int) -> None:
    """Rewrites `model`, in place, so that no map before its head has a stride above `output_stride`.

    Parameters and their names stay as they are. See the module's docstring for the rule.

    Args:
        model: Any convolutional network whose strides are those of convolutions and poolings that are modules.
        output_stride: 8, 16 or 32 image pixels per pixel of the last map; 32 changes nothing.

    Raises:
        ValueError: If `output_stride` is none of these, or the network cannot be rewritten; the message says why, and
            the network is as it was.
    """
    if output_stride not in OUTPUT_STRIDES:
        raise ValueError(f"output_stride={output_stride} is none of {', '.join(map(str, OUTPUT_STRIDES))}")
    if output_stride == max(OUTPUT_STRIDES):
        return
    calls = watch(model)
    edits: dict[str, _Edit | None] = {}
    for call in calls:
        edit = _plan(call, output_stride)
        if edits.setdefault(call.name, edit) != edit:
            raise ValueError(f"output_stride={output_stride}: {call.name} runs on maps of different strides")
    attempt = shadow_of(model)
    _apply(attempt, edits)
    try:
        after = {call.name: call.output_stride for call in watch(attempt)}
    except ValueError as error:
        raise ValueError(f"output_stride={output_stride}: rewritten, {error}") from error
    for stride, end in stage_ends(calls).items():
        if after[end.name] != min(stride, output_stride):
            raise ValueError(
                f"output_stride={output_stride}: {end.name} still writes maps of stride {after[end.name]}, because "
                "a stride on the way to it is not that of a Conv2d, MaxPool2d or AvgPool2d module"
            )
    _apply(model, edits)


def _plan(call: Call, output_stride: int) -> _Edit | None:
    layer, before = call.module, call.input_stride
    if not isinstance(layer, (nn.Conv2d, nn.MaxPool2d, nn.AvgPool2d)) or not before:
        return None
    old = pair(layer.stride)
    left = max(1, output_stride // before)
    # The dilation of a 1x1 kernel means nothing.
    factor = max(1, before // output_stride) if max(pair(layer.kernel_size)) > 1 else 1
    edit = _Edit((min(old[0], left), min(old[1], left)), factor)
    return None if edit == _Edit(old, 1) else edit


def _apply(model: nn.Module, edits: dict[str, _Edit | None]) -> None:
    for name, edit in edits.items():
        if edit is None:
            continue
        layer = model.get_submodule(name)
        rewritten = _rewrite(layer, edit)
        if rewritten is not layer:
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, rewritten.train(layer.training))


def _rewrite(layer: nn.Module, edit: _Edit) -> nn.Module:
    assert isinstance(layer, (nn.Conv2d, nn.MaxPool2d, nn.AvgPool2d))
    f = edit.factor
    kernel, stride = pair(layer.kernel_size), pair(layer.stride)
    padding = (0, 0) if isinstance(layer.padding, str) else pair(layer.padding)
    dilation = (1, 1) if isinstance(layer, nn.AvgPool2d) else pair(layer.dilation)
    short = [d * (k - 1) - 2 * p for d, k, p in zip(dilation, kernel, padding, strict=True)]
    bottom, right = (f * missing * (new < old) for missing, new, old in zip(short, edit.stride, stride, strict=True))
    if not isinstance(layer, nn.Conv2d) and type(layer) in (nn.MaxPool2d, nn.AvgPool2d):
        return DilatedPool2d(layer, edit.stride, f, (bottom, right))
    layer.stride = edit.stride
    if not isinstance(layer, nn.AvgPool2d):
        layer.dilation = f * dilation[0], f * dilation[1]
    if not isinstance(layer.padding, str):
        layer.padding = f * padding[0], f * padding[1]
    # timm's "same" layers have a forward pass of their own, which pads by stride and dilation as it runs.
    if isinstance(layer, nn.Conv2d) and type(layer).forward is nn.Conv2d.forward and (bottom or right):
        return PaddedConv2d(layer, (bottom, right))
    return layer
