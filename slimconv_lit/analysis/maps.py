"""Feature maps to look at: what an operator reads, what Reconstruct makes of it, what it writes (paper, Fig. 1, 3)."""

import math

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from slimconv_lit.ops import SlimConv2d


def maps_of(model: nn.Module, layer: str, image: Tensor) -> dict[str, Tensor]:
    """The maps around one layer, each (channels, H, W), for one image.

    Args:
        model: Any network, in evaluation mode.
        layer: Name of an operator or convolution in it.
        image: (1, C, H, W).

    Returns:
        "read" and "written"; for a SlimConv2d between them "weighted" (w * x), "weighted, flipped" and "folded, top"
        and "folded, bottom".

    Raises:
        AttributeError: If there is no such layer.
        ValueError: If the layer does not run.
    """
    module = model.get_submodule(layer)
    seen: dict[str, Tensor] = {}

    def record(m: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        seen["read"] = args[0][0]
        if isinstance(m, SlimConv2d):
            w = m.gate(args[0])[0]
            seen["weighted"], seen["weighted, flipped"] = args[0][0] * w, args[0][0] * w.flip(0)
            folded = m.reconstruct(args[0])
            seen["folded, top"], seen["folded, bottom"] = folded[0][0], folded[1][0]
        seen["written"] = output[0]

    hook = module.register_forward_hook(record)
    try:
        with torch.no_grad():
            model(image)
    finally:
        hook.remove()
    if not seen:
        raise ValueError(f"maps: {layer} does not run when the network reads an image")
    return {name: maps.cpu() for name, maps in seen.items()}


MOST_MAPS = 64


def tile(maps: Tensor, columns: int) -> Tensor:
    """At most 64 maps (C, H, W) side by side in one (rows * H', columns * W') picture, each from its own 0 to 1.

    Gaps and missing tiles are NaN, which matplotlib leaves white.
    """
    shown = maps[:MOST_MAPS].float()
    low, high = shown.amin((1, 2), keepdim=True), shown.amax((1, 2), keepdim=True)
    # A constant map is drawn dark, not as amplified rounding.
    scaled = (shown - low) / (high - low).clamp(min=1e-6 * float(shown.abs().max()) + 1e-30)
    rows = math.ceil(len(scaled) / columns)
    padded = torch.nn.functional.pad(scaled, (0, 1, 0, 1), value=math.nan)
    blank = padded.new_full((rows * columns - len(padded), *padded.shape[1:]), math.nan)
    grid = torch.cat([padded, blank]).reshape(rows, columns, *padded.shape[1:])
    return grid.permute(0, 2, 1, 3).flatten(2).flatten(0, 1)


def draw_maps(maps: dict[str, Tensor], title: str, columns: int = 8) -> Figure:
    """One panel for each set of maps, in their order; each map is scaled by itself, so that faint ones are seen too."""
    panels = 3 if len(maps) > 2 else len(maps)
    tiles = [tile(found, columns) for found in maps.values()]
    # Each row as high as its highest panel needs, so that few channels leave no empty page.
    rows = [tiles[start : start + panels] for start in range(0, len(tiles), panels)]
    heights = [max(len(t) / t.shape[1] for t in row) * 4 + 0.35 for row in rows]
    figure = Figure(figsize=(4 * panels, sum(heights) + 0.4), layout="constrained", dpi=110)
    figure.suptitle(title, fontsize=11)
    cells = list(figure.subplots(len(rows), panels, squeeze=False, height_ratios=heights).flat)
    for axes, picture, (name, found) in zip(cells, tiles, maps.items(), strict=False):
        axes.imshow(picture.numpy(), cmap="magma", interpolation="nearest")
        part = f", first {MOST_MAPS} drawn" if len(found) > MOST_MAPS else ""
        axes.set_title(f"{name}: {len(found)} channels{part}", fontsize=9)
        axes.set_anchor("N")
    for axes in cells:
        axes.set_axis_off()
    return figure
