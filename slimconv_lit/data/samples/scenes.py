"""Scenes of real handwritten digits, which all samples are made of, and the folder that a sample lies in.

The 1,797 digits are those that scikit-learn carries. Training and test scenes are made of different digits.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from sklearn.datasets import load_digits

from slimconv_lit.data.base import hold_out
from slimconv_lit.data.files import write_once

Box: TypeAlias = tuple[int, int, int, int]
"""x0, y0, x1, y1 in pixels; x1 and y1 are the first that lie outside."""

TINY = 20
"""Digits of fewer pixels in height are hard to read."""


@dataclass(frozen=True)
class Scene:
    """A picture and what is in it.

    Attributes:
        image: (H, W, 3) uint8, RGB.
        boxes: One for each object, around the pixels of it that can be seen.
        labels: One for each object, 0 to 9.
        instances: (H, W) uint8: 0 background, i + 1 object i.
    """

    image: NDArray[np.uint8]
    boxes: list[Box]
    labels: list[int]
    instances: NDArray[np.uint8]


class Pool:
    """The handwritten digits (8x8 and a margin of 1, ink 0 to 1) of one split, by class; four fifths of them train.

    Args:
        train: Which part.
    """

    def __init__(self, train: bool) -> None:
        pixels, labels = load_digits(return_X_y=True)
        part = hold_out(labels, 0.2, seed=0)[0 if train else 1]
        cells = np.pad(pixels[part].reshape(-1, 8, 8) / 16, ((0, 0), (1, 1), (1, 1))).astype(np.float32)
        self.glyphs = [cells[labels[part] == digit] for digit in range(10)]

    def draw(self, rng: np.random.Generator, label: int) -> NDArray[np.float32]:
        """A random handwritten digit of a class."""
        return rng.choice(self.glyphs[label])


def compose_scene(
    rng: np.random.Generator,
    pool: Pool,
    labels: Sequence[int],
    places: Sequence[Box],
    size: tuple[int, int],
    cards: bool = False,
) -> Scene:
    """Digits, each in one bright ink, on a darker, grainy ground whose colour changes softly.

    With bright and dark inks mixed, a small network learned next to nothing from the few images of a sample.

    Args:
        rng: What all is drawn from.
        pool: Where the digits come from.
        labels: The digits to write.
        places: Where to write each; its cell is stretched to the box. One that another covers is seen in part.
        size: Height and width of the scene in pixels.
        cards: Write each digit on a dark card with round corners, which then is the object. Strokes alone are so few
            pixels that a segmentation network needs many epochs to tell their classes apart.
    """
    height, width = size
    tint = rng.uniform(30, 110) + rng.normal(0, 35, 3) + rng.normal(0, 20, (3, 4, 3))
    ground = Image.fromarray(tint.clip(0, 255).astype(np.uint8)).resize((width, height), Image.Resampling.BICUBIC)
    image = np.asarray(ground, dtype=np.float32) + rng.normal(0, 3, (height, width, 1)).astype(np.float32)
    instances = np.zeros(size, dtype=np.uint8)
    for number, (label, (x0, y0, x1, y1)) in enumerate(zip(labels, places, strict=True), start=1):
        glyph = Image.fromarray(pool.draw(rng, label)).resize((x1 - x0, y1 - y0), Image.Resampling.BICUBIC)
        # So steep that the edge of a stroke is about a pixel wide, however far those few pixels are enlarged.
        cover = np.clip((np.asarray(glyph) - 0.4) * (y1 - y0) / 10 + 0.5, 0, 1)[..., None]
        part = image[y0:y1, x0:x1]
        seen = cover[..., 0] > 0.5
        if cards:
            seen = _card(y1 - y0, x1 - x0)
            part = np.where(seen[..., None], rng.uniform(0, 30, 3).astype(np.float32), part)
            cover = cover * seen[..., None]
        ink = rng.uniform(180, 255, 3)
        image[y0:y1, x0:x1] = part * (1 - cover) + ink.astype(np.float32) * cover
        instances[y0:y1, x0:x1][seen] = number
    boxes = [bounds(instances == number) for number in range(1, len(labels) + 1)]
    return Scene(np.clip(image, 0, 255).astype(np.uint8), boxes, list(labels), instances)


def _card(height: int, width: int) -> NDArray[np.bool_]:
    """A rectangle with round corners that fills (height, width)."""
    y, x = ((2 * np.arange(side) + 1) / side - 1 for side in (height, width))
    return y[:, None] ** 6 + x[None, :] ** 6 <= 1


def bounds(mask: NDArray[np.bool_]) -> Box:
    """The box around what is True; something has to be."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


def scatter(rng: np.random.Generator, heights: Sequence[int], size: tuple[int, int], overlap: float = 0.2) -> list[Box]:
    """Places at random in a scene, of which no two share more than a part of the smaller one.

    Args:
        rng: What all is drawn from.
        heights: Of each place in pixels; a place is about as wide. One that finds no room is left out.
        size: Height and width of the scene in pixels.
        overlap: The largest part.
    """
    places: list[Box] = []
    for tall in heights:
        for _ in range(30):
            wide = int(rng.uniform(0.75, 1) * tall)
            x, y = int(rng.integers(size[1] - wide + 1)), int(rng.integers(size[0] - tall + 1))
            place = (x, y, x + wide, y + tall)
            if all(_shared(place, other) <= overlap for other in places):
                places.append(place)
                break
    return places


def _shared(a: Box, b: Box) -> float:
    width, height = (min(a[i + 2], b[i + 2]) - max(a[i], b[i]) for i in (0, 1))
    smaller = min((box[2] - box[0]) * (box[3] - box[1]) for box in (a, b))
    return max(0, width) * max(0, height) / smaller


def object_scene(rng: np.random.Generator, pool: Pool, heights: Sequence[int], size: tuple[int, int]) -> Scene:
    """A scene of random digits at random places, about as many as there are heights."""
    places = scatter(rng, heights, size)
    return compose_scene(rng, pool, rng.integers(10, size=len(places)).tolist(), places, size, cards=True)


def build_once(root: Path, name: str, write: Callable[[Path], None]) -> Path:
    """The folder `root`/sample/`name`, written by `write` the first time, whole or not at all."""
    return write_once(root / "sample" / name, write)
