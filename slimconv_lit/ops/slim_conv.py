"""SlimConv: Reconstruct, Transform, Fuse.

Qiu et al., "SlimConv: Reducing Channel Redundancy in Convolutional Neural Networks by Features Recombining",
IEEE TIP 2021, https://doi.org/10.1109/TIP.2021.3093795

    B batch   C channels read   H W space   N folds (3k/2)   T = C // N top width   Q = C // 2N bottom width
    R gate width

Reconstruct: a gate weighs the C channels, once as they stand and once with the weights reversed; each weighted map
is folded N-fold to T channels. Transform: a KxK convolution T -> T above, a 1x1 convolution T -> Q and a KxK
convolution Q -> Q below. Fuse: the two are concatenated, T + Q = C / k channels.

Where C is not a multiple of N the paper is silent; the fold takes the first N * T channels, as the published counts
suggest (Fig. 8), and the gate still sees all C.
"""

import math
from fractions import Fraction
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from slimconv_lit.lookup import closest
from slimconv_lit.ops.base import (
    Operator,
    Size,
    check_whole,
    nearest_divisors,
    norm_of_pooled,
    padding_of,
    pair,
    reset_convolutions,
)
from slimconv_lit.ops.reconstruct import can_make_again, convolve_folds, convolve_normed, fold_paths, join

Arrangement = Literal["flip", "none", "only_flip", "shuffle", "shuffle_3b"]


def folds_of(k: float | str) -> int:
    """The number of folds N = 3k/2 of a compression k, given as a number or as text ("8/3").

    Raises:
        ValueError: If N is not a whole number of at least 2; the message gives the nearest k that work.
    """
    try:
        folds = float(Fraction(k.replace(" ", ""))) * 1.5 if isinstance(k, str) else k * 1.5
    except (ValueError, TypeError, ZeroDivisionError):
        raise ValueError(f"k={k!r} is neither a number nor a fraction such as '8/3'") from None
    # Two typed decimals (k=2.67) are as near to 8/3 as anyone means to be.
    if not math.isfinite(folds) or folds < 1.5 or abs(folds - round(folds)) > 0.02:
        below = int(folds) if math.isfinite(folds) else 0
        nearest = " or ".join(f"{Fraction(2 * n, 3)} (n={n})" for n in (below, below + 1) if n >= 2) or "4/3 (n=2)"
        raise ValueError(f"k={k}: n = 3k/2 = {folds:g} folds is not a whole number of at least 2; nearest: {nearest}")
    return round(folds)


def _check_groups(argument: str, groups: int, width: int, in_channels: int, folds: int) -> None:
    if groups < 1 or width % groups:
        raise ValueError(
            f"{argument}={groups} does not divide the folded widths "
            f"(in_channels={in_channels}, n={folds} folds: {in_channels // folds} and {in_channels // (2 * folds)}); "
            f"nearest: {nearest_divisors(groups, width)}"
        )


class ChannelGate(nn.Module):
    """The weights of Reconstruct: squeeze (C -> R), norm, ReLU, excite (R -> C), sigmoid on the pooled map.

    Trained on one image, it normalises with the running statistics of its norm (see `norm_of_pooled`).

    Args:
        channels: C, the channels that are weighed.
        hidden: R, the width in between.
    """

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.squeeze = nn.Conv2d(channels, hidden, 1, bias=False)
        self.norm = nn.BatchNorm2d(hidden)
        self.relu = nn.ReLU(inplace=True)
        self.excite = nn.Conv2d(hidden, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Maps (B, C, H, W) to weights (B, C, 1, 1) between 0 and 1."""
        z = norm_of_pooled(self.norm, self.squeeze(pool(x)))
        return torch.sigmoid(self.excite(self.relu(z)))


def pool(x: Tensor) -> Tensor:
    """The average of each channel: (B, C, H, W) -> (B, C, 1, 1).

    As a sum, whose gradient is not written out to the size of x, and which compilers fuse.
    """
    # Half precision would overflow.
    total = x.sum((2, 3), keepdim=True, dtype=torch.promote_types(x.dtype, torch.float32))
    return (total / (x.shape[2] * x.shape[3])).to(x.dtype)


class LinearGate(nn.Module):
    """What a `ChannelGate` is once its norm is folded into its squeeze: linear layers on the pooled vector.

    Args:
        squeeze: C -> R.
        excite: R -> C.
    """

    def __init__(self, squeeze: nn.Linear, excite: nn.Linear) -> None:
        super().__init__()
        self.squeeze = squeeze
        self.relu = nn.ReLU(inplace=True)
        self.excite = excite

    def forward(self, x: Tensor) -> Tensor:
        """Maps (B, C, H, W) to weights (B, C, 1, 1) between 0 and 1."""
        z = self.relu(_linear(self.squeeze, pool(x).flatten(1)))
        return torch.sigmoid(_linear(self.excite, z))[..., None, None]


def _linear(layer: nn.Linear, x: Tensor) -> Tensor:
    """A small linear layer on vectors (B, N)."""
    # Not for other runtimes: OpenVINO 2026 computes such sums wrongly where the batch is free.
    if torch.compiler.is_compiling() and not torch.compiler.is_exporting():
        return linear_as_sum(x, layer.weight, layer.bias)
    mapped: Tensor = layer(x)
    return mapped


def linear_as_sum(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`torch.nn.functional.linear` of vectors (B, N), as compilers are quick at: a loop that they join to others.

    To call a library takes them longer than the few products of a gate.
    """
    mapped = (x[:, None] * weight).sum(2)
    return mapped if bias is None else mapped + bias


class SlimConv2d(Operator):
    """SlimConv in the place of a spatial convolution and its norm (paper, Section III; Fig. 1 and Fig. 3).

    It reads C = in_channels and writes about C / k: T + Q channels, with T = C // N, Q = C // 2N and N = 3k/2
    (`arrangement="shuffle_3b"`: T + 2Q). Shapes: (B, C, H, W) -> (B, T + Q, H', W'), H' and W' as the host's.

    With one image per device the gate trains on its running statistics (see `ChannelGate`).

    Args:
        in_channels: C.
        out_channels: What the host convolution wrote. SlimConv's width follows from C alone; see `op.out_channels`.
        kernel_size: K of the two spatial convolutions.
        stride: Stride of the two spatial convolutions; the 1x1 of the bottom path runs at input resolution.
        dilation: Dilation of the two spatial convolutions.
        groups: Groups of the host. Equal to in_channels, both spatial convolutions are depthwise; else both have
            that many groups.
        padding: Padding of the two spatial convolutions; None keeps the size at stride 1.
        k: Compression; 4/3, 2, 8/3, 10/3, 4, 14/3, 16/3 in the paper's Fig. 8. A number, or text such as "8/3".
        arrangement: Which weights the bottom path takes: "flip" reversed (the paper), "none" the same as the top,
            "only_flip" reversed ones in both paths, "shuffle" in a fixed random order (Table XI, "sf"),
            "shuffle_3b" reversed, and a third path like the bottom one takes the random order ("3b-sf").
        reduction: The gate's squeeze, R = max(C // reduction, min_hidden).
        min_hidden: Least gate width R (L in the paper: 16 for DLA-46-C, 24 for MobileNetV2 on ImageNet).
        bottom_groups: Groups of the bottom path's spatial convolution, where they differ from `groups`
            (Sc-ResNeXt-101 32x3d: 16).
        seed: Seed of the random order, which is a buffer and so saved in checkpoints.

    Raises:
        ValueError: If k, in_channels, groups or arrangement cannot work; the message gives the nearest that do.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int | None = None,
        kernel_size: Size = 3,
        stride: Size = 1,
        dilation: Size = 1,
        groups: int = 1,
        padding: Size | None = None,
        *,
        k: float | str = 4 / 3,
        arrangement: Arrangement = "flip",
        reduction: int = 32,
        min_hidden: int = 1,
        bottom_groups: int | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if arrangement not in get_args(Arrangement):
            raise ValueError(f"arrangement={arrangement!r}; {closest(str(arrangement), get_args(Arrangement))}")
        check_whole(reduction=reduction, min_hidden=min_hidden)
        folds = folds_of(k)
        top, bottom = in_channels // folds, in_channels // (2 * folds)
        if bottom < 1:
            widest = Fraction(2 * (in_channels // 2), 3)
            advice = f", or k <= {widest} for {in_channels} channels" if in_channels >= 4 else ""
            raise ValueError(
                f"in_channels={in_channels} is too few for k={Fraction(2 * folds, 3)} (n={folds} folds); "
                f"the nearest that works is in_channels={2 * folds}{advice}"
            )
        depthwise = groups == in_channels
        top_groups = top if depthwise else groups
        low_groups = bottom_groups if bottom_groups is not None else bottom if depthwise else groups
        if bottom_groups is None:
            _check_groups("groups", top_groups, top if depthwise else math.gcd(top, bottom), in_channels, folds)
        else:
            _check_groups("groups", top_groups, top, in_channels, folds)
            _check_groups("bottom_groups", low_groups, bottom, in_channels, folds)

        self.in_channels = in_channels
        self.folds = folds
        self.arrangement = arrangement
        self.gate = ChannelGate(in_channels, max(in_channels // reduction, min_hidden))
        kernel, spread = pair(kernel_size), pair(dilation)
        pad = padding_of(kernel_size, dilation, padding)

        def spatial(width: int, groups: int) -> nn.Conv2d:
            return nn.Conv2d(width, width, kernel, pair(stride), pad, spread, groups, bias=False)

        def low_path() -> nn.Sequential:
            return nn.Sequential(
                nn.Conv2d(top, bottom, 1, bias=False),
                nn.BatchNorm2d(bottom),
                nn.ReLU(inplace=True),
                spatial(bottom, low_groups),
                nn.BatchNorm2d(bottom),
            )

        self.top = nn.Sequential(spatial(top, top_groups), nn.BatchNorm2d(top))
        self.bottom = low_path()
        self.third = low_path() if arrangement == "shuffle_3b" else None
        self.out_channels = top + bottom * (1 if self.third is None else 2)
        if arrangement.startswith("shuffle"):
            # Drawn on the CPU whatever the default device, so that a seed means one order everywhere.
            generator = torch.Generator(device="cpu").manual_seed(seed)
            self.register_buffer("order", torch.randperm(in_channels, generator=generator, device="cpu"))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws the convolutions as the paper's ResNets do (He, fan out); norms start at one and zero."""
        reset_convolutions(self)

    def reconstruct(self, x: Tensor) -> list[Tensor]:
        """The folded maps (B, T, H, W) that the paths read: top, bottom and, with a third branch, its own."""
        weights = self._weights(x)
        if self.arrangement in ("none", "only_flip"):
            return list(fold_paths(x, weights[:1], self.folds)) * 2
        return list(fold_paths(x, weights, self.folds))

    def _weights(self, x: Tensor) -> list[Tensor]:
        """The weights (B, C, 1, 1) that x is folded with for each path."""
        w = self.gate(x)
        if self.arrangement == "none":
            return [w, w]
        if self.arrangement == "flip":
            return [w, w.flip(1)]
        if self.arrangement == "only_flip":
            return [w.flip(1)] * 2
        shuffled = w.index_select(1, self.order)
        return [w, shuffled] if self.third is None else [w, w.flip(1), shuffled]

    def forward(self, x: Tensor) -> Tensor:
        """Maps (B, C, H, W) to (B, out_channels, H', W')."""
        paths = [self.top, self.bottom] if self.third is None else [self.top, self.bottom, self.third]
        if not can_make_again(x, *(module for path in paths for module in path.modules())):
            return torch.cat([path(folded) for path, folded in zip(paths, self.reconstruct(x), strict=True)], dim=1)
        layers: Any = [list(path) for path in paths]
        top, *low = convolve_folds(x, self._weights(x), self.folds, [path[0] for path in layers])
        maps = [self.top[1](top)]
        for (_, norm, _, spatial, last), written in zip(layers[1:], low, strict=True):
            maps.append(last(convolve_normed(written, norm, spatial)))
        return join(maps)

    def extra_repr(self) -> str:
        """What the printed module shows besides its children."""
        k = Fraction(2 * self.folds, 3)
        return f"{self.in_channels}, {self.out_channels}, k={k}, arrangement={self.arrangement!r}"
