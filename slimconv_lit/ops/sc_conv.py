"""SCConv: a spatial unit that gathers what is informative, and a channel unit that computes less.

Li, Wen and He, "SCConv: Spatial and Channel Reconstruction Convolution for Feature Redundancy", CVPR 2023,
https://openaccess.thecvf.com/content/CVPR2023/html/Li_SCConv_Spatial_and_Channel_Reconstruction_Convolution_for_Feature_Redundancy_CVPR_2023_paper.html

    B batch   C channels read   O channels written   U = alpha * C upper, L = C - U lower channels   H W space

Of what the paper leaves open, biases on all five convolutions are what its Table 2 counts. Ours are: four groups of the
group norm; below the threshold the soft gate keeps the sigmoid on both sides, the literal reading of Eq. 3; the stride
is the grouped convolution's, and the 1x1 ones behind it and the lower channels read averages over strides; the norm at
the end is the one of the host.
"""

import math
from fractions import Fraction
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional

from slimconv_lit.lookup import closest
from slimconv_lit.ops.base import (
    Operator,
    Size,
    check_keeps_size,
    check_whole,
    fraction,
    nearest_divisors,
    padding_of,
    pair,
    reset_convolutions,
    same_padding,
)

Gate = Literal["soft", "hard"]
Order = Literal["S+C", "C+S", "parallel", "S", "C"]
Variant = Literal["eq11", "tables_1_3"]

# The least |sum of the scales| that the spatial unit divides by; it bounds the gradient where all scales vanish.
LEAST_SUM = 1e-3


class SRU(nn.Module):
    """The spatial reconstruction unit (paper, Section 3.1, Eq. 1 to 4): (B, C, H, W) -> (B, C, H, W).

    A group norm's scales say how informative its channels are; where their share times the normed map is above the
    threshold, x is informative. The informative part of one half of the channels is added to the rest of the other.

    The gate is decided in float32 (float64 for such inputs) and before the sigmoid: the shares are about 1 / C, so
    that in bfloat16 nearly every sigmoid is exactly one half. The sum of the scales keeps its sign, and with it the
    decision, but counts as no smaller than the mean magnitude of one scale: training may take it through zero.

    Args:
        channels: C; even.
        norm_groups: Of the group norm.
        gate: "soft" has 1 and 0 above the threshold, and below it the sigmoid on both sides; "hard" has 1 and 0
            everywhere, and the gradient of the sigmoid passes straight through.
        threshold: Between 0 and 1; 0.5 in the paper.

    Raises:
        ValueError: If channels are odd, norm_groups do not divide them, or gate or threshold is none; the message
            gives the nearest that work.
    """

    def __init__(self, channels: int, norm_groups: int = 4, gate: Gate = "soft", threshold: float = 0.5) -> None:
        super().__init__()
        if gate not in get_args(Gate):
            raise ValueError(f"gate={gate!r}; {closest(str(gate), get_args(Gate))}")
        if not 0 < threshold < 1:
            raise ValueError(f"threshold={threshold} is not between 0 and 1; the paper has 0.5")
        if channels < 2 or channels % 2:
            nearest = f"{channels - 1} or {channels + 1}" if channels > 2 else "2"
            raise ValueError(f"channels={channels} do not fall into two halves; nearest: {nearest}")
        if norm_groups < 1 or channels % norm_groups:
            nearest = nearest_divisors(norm_groups, channels)
            raise ValueError(f"norm_groups={norm_groups} does not divide channels={channels}; nearest: {nearest}")
        self.norm = nn.GroupNorm(norm_groups, channels)
        self.gate = gate
        self.cut = math.log(threshold / (1 - threshold))

    def shares(self) -> Tensor:
        """Each channel's share (C,) of the sum of the norm's scales (Eq. 2), in float32 or more."""
        scales = self.norm.weight.to(torch.promote_types(self.norm.weight.dtype, torch.float32))
        total, least = scales.sum(), scales.abs().mean().clamp_min(LEAST_SUM)
        return scales / torch.where(total < 0, torch.minimum(total, -least), torch.maximum(total, least))

    def logits(self, x: Tensor) -> Tensor:
        """The map (B, C, H, W) before the sigmoid of Eq. 3, in float32 or more; informative is what is above `cut`."""
        norm, dtype = self.norm, torch.promote_types(x.dtype, torch.float32)
        normed = functional.group_norm(
            x.to(dtype), norm.num_groups, norm.weight.to(dtype), norm.bias.to(dtype), norm.eps
        )
        return self.shares().to(dtype)[:, None, None] * normed

    def forward(self, x: Tensor) -> Tensor:
        """Separates and reconstructs; see the class."""
        logits = self.logits(x)
        informative, soft = logits > self.cut, logits.sigmoid()
        if self.gate == "soft":
            more, less = soft.masked_fill(informative, 1), soft.masked_fill(informative, 0)
        else:
            # Exactly zero, but with the sigmoid's gradient.
            through = soft - soft.detach()
            more = informative.to(soft.dtype) + through
            less = 1 - more
        rich, poor = more.to(x.dtype) * x, less.to(x.dtype) * x
        half = x.shape[1] // 2
        return torch.cat([rich[:, :half] + poor[:, half:], poor[:, :half] + rich[:, half:]], dim=1)

    def extra_repr(self) -> str:
        """What the printed module shows besides its children."""
        return f"gate={self.gate!r}"


class CRU(nn.Module):
    """The channel reconstruction unit (paper, Section 3.2, Eq. 5 to 9).

    The upper and the lower channels are squeezed by a 1x1 each. The upper ones go through a KxK convolution in groups
    and a 1x1 one, which are added; the lower ones stay, behind a 1x1 of them. The two maps are weighed, channel by
    channel, by the softmax over their averages. With K = 3 and the defaults that is 1.8125 C^2 weights instead of 9.
    Shapes: (B, C, H, W) -> (B, O, ceil(H / stride), ceil(W / stride)).

    Args:
        in_channels: C.
        out_channels: O.
        kernel_size: K; odd.
        stride: Of the KxK convolution and of the averages.
        dilation: Of the KxK convolution.
        alpha: The upper part of C, as a number or as text ("3/4").
        reduction: r, how much narrower the squeezed channels are.
        inner_groups: g, groups of the KxK convolution.
        variant: "eq11" has the parameters of Eq. 11. "tables_1_3" adds what Tables 1 and 3 count over that and the
            text does not mention: a 1x1 from (alpha / r) C to O - (alpha / r) C channels. That is inferred from the
            counts alone; we let it stand before the squeezed upper channels, as the other stands before the lower.

    Raises:
        ValueError: If alpha or reduction leaves no channel for a side, the lower channels alone are more than O,
            inner_groups do not divide the widths, or the kernel is even; the message gives the nearest that work.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Size = 3,
        stride: Size = 1,
        dilation: Size = 1,
        *,
        alpha: float | str = 0.5,
        reduction: int = 2,
        inner_groups: int = 2,
        variant: Variant = "eq11",
    ) -> None:
        super().__init__()
        if variant not in get_args(Variant):
            raise ValueError(f"variant={variant!r}; {closest(str(variant), get_args(Variant))}")
        check_keeps_size(kernel_size, dilation, None)
        check_whole(reduction=reduction)
        part = fraction("alpha", alpha)
        upper = in_channels * part.numerator // part.denominator
        if inner_groups < 1 or out_channels % inner_groups:
            nearest = nearest_divisors(inner_groups, out_channels, max(upper // reduction, 1))
            raise ValueError(
                f"inner_groups={inner_groups} does not divide out_channels={out_channels}; nearest: {nearest}"
            )

        def works(upper: int) -> bool:
            rich, poor = upper // reduction, (in_channels - upper) // reduction
            widest = max(poor, rich) if variant == "tables_1_3" else poor
            return min(rich, poor) > 0 and rich % inner_groups == 0 and widest <= out_channels

        if not works(upper):
            near = sorted(filter(works, range(1, in_channels)), key=lambda n: abs(n - part * in_channels))[:2]
            nearest = " or ".join(f"alpha={Fraction(n, in_channels)}" for n in sorted(near)) or "none"
            raise ValueError(
                f"alpha={alpha} and reduction={reduction} squeeze in_channels={in_channels} to {upper // reduction} "
                f"upper and {(in_channels - upper) // reduction} lower channels; the upper ones must divide into "
                f"inner_groups={inner_groups}, and all must fit into out_channels={out_channels}; nearest: {nearest}"
            )
        rich, poor = upper // reduction, (in_channels - upper) // reduction
        self.stride = pair(stride)
        pad = same_padding(kernel_size, dilation)
        self.squeeze_upper = nn.Conv2d(upper, rich, 1)
        self.squeeze_lower = nn.Conv2d(in_channels - upper, poor, 1)
        self.spatial = nn.Conv2d(rich, out_channels, pair(kernel_size), self.stride, pad, pair(dilation), inner_groups)
        self.pointwise_upper = nn.Conv2d(rich, out_channels, 1)
        # In a dense block the lower channels alone may be all that is written.
        self.pointwise_lower = nn.Conv2d(poor, out_channels - poor, 1) if out_channels > poor else None
        extra = variant == "tables_1_3"
        self.extra = nn.Conv2d(rich, out_channels - rich, 1) if extra and out_channels > rich else None
        reset_convolutions(self)

    def forward(self, x: Tensor) -> Tensor:
        """Splits, transforms and fuses; see the class."""
        split = self.squeeze_upper.in_channels
        upper, lower = self.squeeze_upper(x[:, :split]), self.squeeze_lower(average(x[:, split:], self.stride))
        averaged = average(upper, self.stride)
        rich = self.spatial(upper) + self.pointwise_upper(averaged)
        if self.extra is not None:
            rich = rich + torch.cat([self.extra(averaged), averaged], dim=1)
        poor = lower if self.pointwise_lower is None else torch.cat([self.pointwise_lower(lower), lower], dim=1)
        means = torch.stack([rich.mean((2, 3), keepdim=True), poor.mean((2, 3), keepdim=True)])
        of_rich, of_poor = means.softmax(dim=0).unbind()
        return of_rich * rich + of_poor * poor


class SCConv2d(Operator):
    """SCConv in the place of a spatial convolution and its norm (paper, Section 3 and Fig. 1).

    Shapes: (B, in_channels, H, W) -> (B, out_channels, H', W'), H' and W' as the host's.

    Args:
        in_channels: Channels that it reads.
        out_channels: Channels that it writes.
        kernel_size: Of the host; odd, where there is a channel unit.
        stride: Of the host.
        dilation: Of the host.
        groups: Of the host, which must be an ordinary convolution (1) where there is a channel unit.
        padding: Of the host; must be what keeps the size at stride 1, which None stands for, where there is a channel
            unit.
        order: Which units there are (Table 1): "S+C" first the spatial one, "C+S" first the channel one, "parallel"
            both of the input and their sum (how they join is our choice; with a stride the spatial one is averaged),
            "C" the channel one alone, "S" the spatial one in front of the host's own convolution.
        gate: As in `SRU`.
        threshold: As in `SRU`.
        norm_groups: As in `SRU`.
        alpha: As in `CRU`.
        reduction: As in `CRU`.
        inner_groups: As in `CRU`.
        variant: As in `CRU`.

    Raises:
        ValueError: As `SRU` and `CRU`; if groups or padding is another; or if the units stand in parallel and
            in_channels is not out_channels.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Size = 3,
        stride: Size = 1,
        dilation: Size = 1,
        groups: int = 1,
        padding: Size | None = None,
        *,
        order: Order = "S+C",
        gate: Gate = "soft",
        threshold: float = 0.5,
        norm_groups: int = 4,
        alpha: float | str = 0.5,
        reduction: int = 2,
        inner_groups: int = 2,
        variant: Variant = "eq11",
    ) -> None:
        super().__init__()
        if order not in get_args(Order):
            raise ValueError(f"order={order!r}; {closest(str(order), get_args(Order))}")
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.order = order
        self.stride = pair(stride)
        self.sru = self.cru = self.conv = None
        if order == "S":
            pad = padding_of(kernel_size, dilation, padding)
            self.conv = nn.Conv2d(
                in_channels, out_channels, pair(kernel_size), self.stride, pad, pair(dilation), groups, bias=False
            )
        else:
            if groups != 1:
                raise ValueError(f"groups={groups}: a channel unit is an ordinary convolution's; nearest: groups=1")
            check_keeps_size(kernel_size, dilation, padding)
            own = {"alpha": alpha, "reduction": reduction, "inner_groups": inner_groups, "variant": variant}
            self.cru = CRU(in_channels, out_channels, kernel_size, stride, dilation, **own)  # type: ignore[arg-type]
        if order == "parallel" and in_channels != out_channels:
            raise ValueError(
                f"order='parallel': the spatial unit writes in_channels={in_channels} channels, "
                f"not out_channels={out_channels}; nearest: order='S+C'"
            )
        if order != "C":
            self.sru = SRU(out_channels if order == "C+S" else in_channels, norm_groups, gate, threshold)
        self.norm = nn.BatchNorm2d(out_channels)
        reset_convolutions(self)

    def forward(self, x: Tensor) -> Tensor:
        """Maps (B, in_channels, H, W) to (B, out_channels, H', W')."""
        if self.order == "parallel":
            assert self.sru is not None
            assert self.cru is not None
            return self.norm(average(self.sru(x), self.stride) + self.cru(x))
        parts = (self.cru, self.sru) if self.order == "C+S" else (self.sru, self.cru, self.conv)
        for part in parts:
            x = x if part is None else part(x)
        return self.norm(x)

    def extra_repr(self) -> str:
        """What the printed module shows besides its children."""
        return f"{self.in_channels}, {self.out_channels}, order={self.order!r}"


def average(x: Tensor, stride: tuple[int, int]) -> Tensor:
    """Averages (B, C, H, W) over strides; windows that the border cuts average over what they hold."""
    return functional.avg_pool2d(x, stride, ceil_mode=True) if max(stride) > 1 else x
