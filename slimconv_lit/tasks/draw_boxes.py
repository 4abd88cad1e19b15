"""Boxes with class and score on an image."""

import math
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

import matplotlib
import numpy as np
import torch
from matplotlib import colormaps
from matplotlib.colors import to_hex
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

# Pixels; in a smaller image a label would hide the object that it names. But no strip of an image becomes a wall.
_LEAST_SIDE = 320
_MOST_ENLARGED = 1280


class Box(NamedTuple):
    """One box to draw.

    Attributes:
        corners: x0, y0, x1, y1 in pixels of the image.
        label: What is written at it; nothing if empty.
        colour: As PIL reads it: "#1f77b4".
    """

    corners: Sequence[float]
    label: str
    colour: str


def class_colour(index: int) -> str:
    """The colour of a class: twenty that differ well, then again from the first."""
    return str(to_hex(colormaps["tab20"](index % 20)))


def draw_boxes(image: Tensor, found: Sequence[Box], truth: Sequence[Sequence[float]] = ()) -> Tensor:
    """`image` with the found boxes thick and labelled, and the true ones thin and dashed, white and black.

    An image whose shorter side has less than 320 pixels is enlarged by a whole number, so that labels can be read, as
    long as the longer side stays below 1280.

    Args:
        image: (3, H, W) uint8.
        found: Boxes to label; of two labels in one place, that of the first is on top.
        truth: Corners of the true boxes.

    Returns:
        (3, s * H, s * W) uint8, where s = 1 for a large image.
    """
    shorter, longer = sorted(image.shape[-2:])
    factor = max(1, min(math.ceil(_LEAST_SIDE / shorter), _MOST_ENLARGED // longer))
    canvas = Image.fromarray(image.permute(1, 2, 0).cpu().numpy())
    canvas = canvas.resize((canvas.width * factor, canvas.height * factor), Image.Resampling.BICUBIC)
    drawing = ImageDraw.Draw(canvas)
    # In proportion, for a sheet of pictures shows all of them at about the same size.
    unit = max(1, round(min(canvas.size) / 220))
    font = _font(max(11, round(min(canvas.size) / 26)))

    def scaled(corners: Sequence[float]) -> tuple[float, float, float, float]:
        x0, y0, x1, y1 = (factor * float(value) for value in corners)
        # PIL counts the last pixel in; a box ends where its last pixel does.
        return x0, y0, max(x0, x1 - 1), max(y0, y1 - 1)

    for box in reversed(found):
        drawing.rectangle(scaled(box.corners), outline=box.colour, width=2 * unit)
    for corners in truth:
        _dashed(drawing, scaled(corners), unit)
    for box in reversed(found):
        _write_label(drawing, canvas.size, scaled(box.corners), box, font)
    return torch.from_numpy(np.asarray(canvas).copy()).permute(2, 0, 1)


def _dashed(drawing: ImageDraw.ImageDraw, corners: tuple[float, float, float, float], width: int) -> None:
    """A rectangle that shows on any ground, and shows a thicker one below it too."""
    x0, y0, x1, y1 = corners
    drawing.rectangle(corners, outline="#000000", width=width)
    dash = 4 * width
    for x in np.arange(x0, x1, 2 * dash):
        for y in (y0, y1 - width + 1):
            drawing.rectangle((x, y, min(x + dash, x1), y + width - 1), fill="#ffffff")
    for y in np.arange(y0, y1, 2 * dash):
        for x in (x0, x1 - width + 1):
            drawing.rectangle((x, y, x + width - 1, min(y + dash, y1)), fill="#ffffff")


def _write_label(
    drawing: ImageDraw.ImageDraw,
    size: tuple[int, int],
    corners: tuple[float, float, float, float],
    box: Box,
    font: ImageFont.FreeTypeFont,
) -> None:
    """Writes the label on top of the box, or inside where there is no room above."""
    if not box.label:
        return
    width = drawing.textlength(box.label, font) + 6
    height = sum(font.getmetrics()) + 2
    x = max(0.0, min(corners[0], size[0] - width))
    y = corners[1] - height if corners[1] >= height else corners[1]
    drawing.rectangle((x, y, x + width, y + height), fill=box.colour)
    red, green, blue = (int(box.colour[i : i + 2], 16) for i in (1, 3, 5))
    dark = 0.299 * red + 0.587 * green + 0.114 * blue < 140
    drawing.text((x + 3, y + 1), box.label, fill="#ffffff" if dark else "#000000", font=font)


@cache
def _font(size: int) -> ImageFont.FreeTypeFont:
    # The one that matplotlib carries: every machine has it, with far more letters than PIL's own.
    return ImageFont.truetype(str(Path(matplotlib.get_data_path(), "fonts/ttf/DejaVuSans.ttf")), size)
