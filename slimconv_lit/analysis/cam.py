"""Where a classifier looks: Grad-CAM (Selvaraju et al., ICCV 2017), as in the paper's Fig. 5."""

from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
import torch
from matplotlib.figure import Figure
from numpy.typing import NDArray
from torch import Tensor, nn

from slimconv_lit.backbones.stages import stage_ends, watch
from slimconv_lit.tables import narrow

Heat: TypeAlias = NDArray[np.float32]


def last_map(model: nn.Module) -> str:
    """The name of the module that writes the last feature map before the head.

    Raises:
        ValueError: If the network has none at a stride that a head can tell; the message asks for a name.
    """
    ends = stage_ends(watch(model))
    if not ends:
        raise ValueError("Grad-CAM: the network's last feature map cannot be told; name a layer")
    return list(ends.values())[-1].name


def grad_cam(model: nn.Module, images: Tensor, classes: Tensor | None = None, layer: str | None = None) -> Heat:
    """Heat maps (B, H, W) between 0 and 1: how much each place of `layer`'s map speaks for a class.

    Args:
        model: A classifier, in evaluation mode, on the device of the images.
        images: (B, C, H, W), normalised as the network wants them.
        classes: (B,), the class to explain of each image; None for the one that the network predicts.
        layer: Name of the module whose map is looked at; None for the last before the head.

    Raises:
        ImportError: If the library grad-cam is not installed.
        AttributeError: If there is no such layer.
    """
    try:
        from pytorch_grad_cam import GradCAM
        from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget
    except ImportError as error:
        raise ImportError('Grad-CAM needs the library grad-cam: pip install "slimconv_lit[analysis]"') from error
    target = model.get_submodule(layer or last_map(model))
    targets = None if classes is None else [ClassifierOutputTarget(int(index)) for index in classes]
    # Gradients must reach the map even where the network is frozen.
    with torch.enable_grad(), GradCAM(model=model, target_layers=[target]) as cam:
        return cam(input_tensor=images.clone().requires_grad_(), targets=targets)


def overlay(pixels: Tensor, heat: Heat) -> NDArray[np.uint8]:
    """An image (3, H, W), uint8, with its heat map (H, W) over it, as (H, W, 3) uint8."""
    from matplotlib import colormaps

    colours = colormaps["jet"](heat)[..., :3]
    image = pixels.permute(1, 2, 0).cpu().numpy() / 255
    return ((0.5 * image + 0.5 * colours) * 255).round().astype(np.uint8)


def draw_cams(pixels: Tensor, heats: dict[str, Heat], captions: Sequence[str]) -> Figure:
    """One column for each image: the image, and below it the heat map of each network.

    Args:
        pixels: (B, 3, H, W), uint8.
        heats: (B, H, W) of each network, by its title.
        captions: What is printed above each image.
    """
    figure = Figure(figsize=(1.9 * len(pixels) + 0.4, 2 * (1 + len(heats)) + 0.3), layout="constrained", dpi=110)
    rows = figure.subplots(1 + len(heats), len(pixels), squeeze=False)
    for i, image in enumerate(pixels):
        rows[0][i].imshow(image.permute(1, 2, 0).cpu().numpy())
        rows[0][i].set_title(narrow(captions[i], 22), fontsize=8)
        for row, heat in zip(rows[1:], heats.values(), strict=True):
            row[i].imshow(overlay(image, heat[i]))
    for row, title in zip(rows, ["image", *heats], strict=True):
        row[0].set_ylabel(title, fontsize=9)
        for axes in row:
            axes.set_xticks([])
            axes.set_yticks([])
    return figure
