"""How redundant the channels of feature maps are: before Reconstruct, and after it (paper, Fig. 1)."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor, nn

from slimconv_lit.ops import Operator, SlimConv2d

# A map whose largest magnitude is below this part of the layer's largest shows nothing.
NEAR_EMPTY = 0.01


class ChannelStatistics:
    """Gathers what the measures need from maps (B, C, H, W), batch by batch, in C x C numbers."""

    def __init__(self) -> None:
        self.count = 0
        self.total = self.products = self.peak = torch.zeros((), dtype=torch.float64)

    def update(self, maps: Tensor) -> None:
        """Adds a batch."""
        pixels = maps.detach().transpose(0, 1).flatten(1).double().cpu()
        self.count += pixels.shape[1]
        self.total = self.total + pixels.sum(1)
        self.products = self.products + pixels @ pixels.T
        self.peak = torch.maximum(self.peak, pixels.abs().amax(1))

    def covariance(self) -> Tensor:
        """(C, C), over all pixels of all images.

        Raises:
            ValueError: If no map was given.
        """
        if not self.count:
            raise ValueError("redundancy: there is no image to look at")
        mean = self.total / self.count
        return self.products / self.count - mean.outer(mean)


@dataclass(frozen=True)
class Redundancy:
    """The measures of one set of maps.

    Attributes:
        channels: C.
        correlation: Mean magnitude of Pearson's correlation between two channels, 0 to 1; constant ones left out.
        effective_rank: exp of the entropy of the covariance's normalised eigenvalues (O. Roy and M. Vetterli, "The
            effective rank", EUSIPCO 2007), as a part of C: 1 where all directions carry the same variance.
        near_empty: Part of the channels that never exceed 1 % of the layer's largest magnitude.
    """

    channels: int
    correlation: float
    effective_rank: float
    near_empty: float


def measure(statistics: ChannelStatistics) -> Redundancy:
    """The measures of all maps that `statistics` was given."""
    covariance = statistics.covariance()
    variance = covariance.diagonal().clamp(min=0)
    # What rounding leaves of a constant channel is no variance.
    alive = variance > 1e-12 * variance.max().clamp(min=1e-300)
    living = covariance[alive][:, alive]
    scale = living.diagonal().sqrt()
    r = (living / scale.outer(scale)).abs()
    pairs = len(r) * (len(r) - 1)
    correlation = float((r.sum() - r.diagonal().sum()) / pairs) if pairs else 0.0
    shares = torch.linalg.eigvalsh(covariance).clamp(min=0)
    shares = shares / shares.sum() if shares.sum() > 0 else shares
    entropy = -torch.special.xlogy(shares, shares).sum()
    rank = float(entropy.exp()) / len(shares) if shares.sum() > 0 else 0.0
    empty = (statistics.peak <= NEAR_EMPTY * statistics.peak.max()).double().mean()
    return Redundancy(len(shares), correlation, rank, float(empty))


@dataclass(frozen=True)
class LayerRedundancy:
    """One layer: the maps that it reads and, for a SlimConv2d, what Reconstruct makes of them.

    Attributes:
        name: The layer's name in the network.
        before: Of the maps that the layer reads.
        after: Of the folded maps of all paths together; None for another kind of layer.
    """

    name: str
    before: Redundancy
    after: Redundancy | None


def spatial_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The operators of a network and the spatial convolutions that are in none of them, by name."""
    operators = {name: m for name, m in model.named_modules() if isinstance(m, Operator)}
    inside = tuple(f"{name}." for name in operators)
    return {
        name: m
        for name, m in model.named_modules()
        if name in operators or (isinstance(m, nn.Conv2d) and max(m.kernel_size) > 1 and not name.startswith(inside))
    }


def reads_map(layer: nn.Module) -> bool:
    """Whether a spatial layer reads a feature map; the image itself is none."""
    return not isinstance(layer, nn.Conv2d) or layer.in_channels > 4


def redundancy(model: nn.Module, batches: Iterable[Tensor]) -> list[LayerRedundancy]:
    """Measures what every operator and spatial convolution reads, in the order of the network.

    Args:
        model: Any network, in evaluation mode, on the device of the images.
        batches: Images (B, C, H, W).

    Raises:
        ValueError: If there is no image, or no layer to look at.
    """
    layers = spatial_layers(model)
    before = {name: ChannelStatistics() for name in layers}
    after = {name: ChannelStatistics() for name, layer in layers.items() if isinstance(layer, SlimConv2d)}

    def record(name: str, layer: nn.Module, x: Tensor) -> None:
        before[name].update(x)
        if isinstance(layer, SlimConv2d):
            after[name].update(torch.cat(layer.reconstruct(x), dim=1))

    hooks = [
        layer.register_forward_pre_hook(lambda m, args, name=name: record(name, m, args[0]))
        for name, layer in layers.items()
        if reads_map(layer)
    ]
    try:
        with torch.no_grad():
            for images in batches:
                model(images)
    finally:
        for hook in hooks:
            hook.remove()
    # What a pass leaves out has nothing to measure.
    seen = [name for name, statistics in before.items() if statistics.count]
    if not seen:
        raise ValueError("redundancy: there is no image to look at, or no layer read one")
    return [LayerRedundancy(n, measure(before[n]), measure(after[n]) if n in after else None) for n in seen]


def redundancy_rows(layers: Sequence[LayerRedundancy]) -> list[dict[str, object]]:
    """One row for each layer, for a table."""
    rows: list[dict[str, object]] = []
    for layer in layers:
        row: dict[str, object] = {"layer": layer.name}
        for when, found in (("read", layer.before), ("folded", layer.after)):
            if found is not None:
                row |= {
                    f"channels {when}": found.channels,
                    f"correlation {when}": round(found.correlation, 4),
                    f"effective rank {when}": round(found.effective_rank, 4),
                    f"near-empty {when}": round(found.near_empty, 4),
                }
        rows.append(row)
    return rows


def draw_redundancy(layers: Sequence[LayerRedundancy]) -> Figure:
    """One panel for each measure, over the depth of the network: of the maps read, and of the folded ones."""
    figure = Figure(figsize=(12, 3.8), layout="constrained", dpi=110)
    panels = {
        "correlation": "mean |correlation| between two channels",
        "effective_rank": "effective rank / channels",
        "near_empty": "part of near-empty channels",
    }
    before = [(i, layer.before) for i, layer in enumerate(layers) if layer.after]
    after = [(i, layer.after) for i, layer in enumerate(layers) if layer.after]
    others = [(i, layer.before) for i, layer in enumerate(layers) if not layer.after]
    series: list[tuple[str, str, list[tuple[int, Redundancy]]]] = [
        ("read by SlimConv", "o-", before),
        ("after Reconstruct", "s-", after),
        ("read by other spatial layers", "^:" if after else "^-", others),
    ]
    for axes, (key, title) in zip(figure.subplots(1, 3), panels.items(), strict=True):
        for label, style, found in series:
            if found:
                depths, values = [i + 1 for i, _ in found], [getattr(value, key) for _, value in found]
                axes.plot(depths, values, style, markersize=4, label=label)
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("spatial layer, from the image on")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_ylim(-0.02, 1.02)
        axes.grid(alpha=0.3)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False)
    return figure
