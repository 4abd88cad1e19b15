"""Seeing what shapes run through a network, at no cost: one pass of a copy on the meta device."""

import math
from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from slimconv_lit.surgery.trace import NothingDrawn, quiet_pass, shadow_of

# Large enough that no head (global pooling, VGG's 7x7 map) can pass for a stage of stride 32 or less.
IMAGE = 512
STRIDES = (2, 4, 8, 16, 32)


class WithoutWeights(NothingDrawn):
    """Inside `with WithoutWeights():` a network is built in no time and no memory: its weights are meta tensors.

    `torch.device("meta")` does the same to every tensor, also to those from which some networks (RegNet) compute their
    widths and depths; layers make their weights by `torch.empty`, and computations do not.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.empty:
            kwargs = (kwargs or {}) | {"device": "meta"}
        return super().__torch_function__(func, types, args, kwargs)


@dataclass(frozen=True)
class Call:
    """One run of one module inside a forward pass.

    Attributes:
        name: The module's name in the network.
        module: The module, in the watched copy.
        input_stride: Image pixels per input pixel; 0 if the input is not a map.
        output: Shape of its output; empty if that is not a tensor.
        on_trunk: Whether it runs on the network's top level: inside nothing but plain sequences of modules.
    """

    name: str
    module: nn.Module
    input_stride: int
    output: tuple[int, ...]
    on_trunk: bool

    @property
    def output_stride(self) -> int:
        """Image pixels per output pixel; 0 if the output is not a map."""
        return _stride_of(self.output)


def _stride_of(shape: tuple[int, ...]) -> int:
    # Without padding a map is a little smaller than the image's size over the stride: take the nearest power of two.
    return 2 ** round(math.log2(IMAGE / shape[-2])) if len(shape) == 4 else 0


def is_sequence(module: nn.Module) -> bool:
    """Whether `module` does nothing but run its children one after the other."""
    return isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward


def image_channels(model: nn.Module) -> int:
    """Channels of the images that `model` reads: what its first convolution reads."""
    return next((m.in_channels for m in model.modules() if isinstance(m, nn.Conv2d)), 3)


def watch(model: nn.Module) -> list[Call]:
    """Every module's runs in one forward pass in eval mode on one 512x512 image, in the order in which they end.

    Args:
        model: Any network. It is neither run nor changed: a copy on the meta device is.

    Raises:
        ValueError: If the network does not run on such an image.
    """
    shadow = shadow_of(model).eval()
    calls: list[Call] = []
    enclosing: list[nn.Module] = []

    def before(module: nn.Module, args: Any) -> None:
        enclosing.append(module)

    def after(name: str, module: nn.Module, args: Any, output: Any) -> None:
        enclosing.pop()
        read = tuple(args[0].shape) if args and isinstance(args[0], Tensor) else ()
        written = tuple(output.shape) if isinstance(output, Tensor) else ()
        calls.append(Call(name, module, _stride_of(read), written, all(map(is_sequence, enclosing))))

    for name, module in shadow.named_modules():
        if name:
            module.register_forward_pre_hook(before)
            module.register_forward_hook(lambda m, args, output, name=name: after(name, m, args, output))
    try:
        with quiet_pass():
            shadow(torch.empty(1, image_channels(model), IMAGE, IMAGE, device="meta"))
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"the network does not run on a {IMAGE}x{IMAGE} image: {reason}") from error
    return calls


def stage_ends(calls: list[Call]) -> dict[int, Call]:
    """The run that makes the last map at each stride (2 to 32, as the network has them), the finest first.

    One rule for all families. To the head, which makes no stage, belong the classifier with all that stands in the
    same child of the network, and, after the last spatial convolution, what only mixes channels: the 1x1 convolution
    before a MobileNet's pooling, which segmentation and detection networks leave out.
    """
    layers = [call.name for call in calls if isinstance(call.module, (nn.Conv2d, nn.Linear))]
    head = layers[-1].split(".")[0] if layers else ""
    trunk = [call for call in calls if call.on_trunk and call.name.split(".")[0] != head]
    kernels = [
        max((max(m.kernel_size) for m in c.module.modules() if isinstance(m, nn.Conv2d)), default=0) for c in trunk
    ]
    spatial = [i for i, call in enumerate(trunk) if kernels[i] > 1 and not is_sequence(call.module)]
    runs = Counter(call.name for call in calls)
    ends: dict[int, Call] = {}
    for i, call in enumerate(trunk):
        if spatial and i > spatial[-1] and kernels[i] == 1:
            break
        empty = isinstance(call.module, nn.Sequential) and not len(call.module)
        if call.output_stride in STRIDES and not empty and runs[call.name] == 1:
            ends[call.output_stride] = call
    return dict(sorted(ends.items()))
