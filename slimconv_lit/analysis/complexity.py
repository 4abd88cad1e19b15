"""Parameters and multiply-accumulates, counted exactly.

`macs` is the project's own convention: one multiply-accumulate (MAC) is one operation, and only convolutions and
linear layers are counted, without their biases. Norms, activations, pooling, sums, products of gates and the batched
matrix products of attention count nothing. SlimConv's Tables I, III and X count so.

A linear layer is what torch makes one of: the product of two plain matrices. Few networks have such products besides,
where attention multiplies by a learned table of positions: 6.0 M of timm's halonet26t, 74.3 M of its lambda_resnet26t.
"""

from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from slimconv_lit.backbones.stages import image_channels
from slimconv_lit.surgery.trace import ConstantsOnMeta, shadow_of

InputSize: TypeAlias = int | tuple[int, int] | tuple[int, int, int]
"""Of one image, in pixels: its side, or (height, width), or (channels, height, width)."""

_aten = torch.ops.aten
COUNTED = (_aten.convolution, _aten._convolution, _aten.cudnn_convolution, _aten.mm, _aten.addmm)


@dataclass(frozen=True)
class LayerCost:
    """What one module costs, with all that is inside it.

    Attributes:
        name: Its name in the network; "" is the network.
        type: Its class.
        params: Parameters; those that are shared count where they come first.
        macs: Multiply-accumulates for one image.
        output: Shape of its output for one image, without the batch axis; empty if that is not a tensor or never ran.
    """

    name: str
    type: str
    params: int
    macs: int
    output: tuple[int, ...]


def params(model: nn.Module) -> int:
    """Parameters of `model`; shared ones count once, buffers do not."""
    return sum(parameter.numel() for parameter in model.parameters())


def macs(model: nn.Module, input_size: InputSize) -> int:
    """Multiply-accumulates of all convolutions and linear layers for one image, in eval mode.

    Args:
        model: Any network of images. It is neither run nor changed: a copy on the meta device is.
        input_size: Of the image, in pixels: its side, (height, width) or (channels, height, width); without the
            channels it has as many as the network's first convolution reads.
    """
    return next(cost.macs for cost in macs_by_layer(model, input_size) if not cost.name)


def macs_by_layer(model: nn.Module, input_size: InputSize) -> list[LayerCost]:
    """What every module of `model` costs for one image, in the order of `model.named_modules()`, the network first.

    Args:
        model: As in `macs`.
        input_size: As in `macs`.
    """
    shadow = shadow_of(model).eval()
    outputs: dict[str, tuple[int, ...]] = {}

    def note(name: str, output: Any) -> None:
        outputs[name] = tuple(output.shape[1:]) if isinstance(output, Tensor) else ()

    for name, module in shadow.named_modules():
        module.register_forward_hook(lambda m, args, output, name=name: note(name, output))
    dtype = next((p.dtype for p in shadow.parameters() if p.is_floating_point()), torch.float32)
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), ConstantsOnMeta(), counter:  # type: ignore[no-untyped-call]
        shadow(torch.empty(1, *image_shape(model, input_size), dtype=dtype, device="meta"))
    counts = counter.get_flop_counts()
    root = type(shadow).__name__
    costs = []
    for name, module in shadow.named_modules():
        by_operation = counts.get(f"{root}.{name}" if name else "Global", {})
        # The counter has a multiplication and an addition as two.
        multiply_adds = sum(flops for operation, flops in by_operation.items() if operation in COUNTED) // 2
        costs.append(LayerCost(name, type(module).__name__, params(module), multiply_adds, outputs.get(name, ())))
    return costs


def image_shape(model: nn.Module, input_size: InputSize) -> tuple[int, ...]:
    """The (channels, height, width) that `input_size` stands for, in pixels."""
    size = (input_size, input_size) if isinstance(input_size, int) else tuple(input_size)
    return size if len(size) == 3 else (image_channels(model), *size)
