"""Small data sets in the official on-disk layouts, so that the real reading code runs with no download.

All are made of the 1,797 real handwritten digits that scikit-learn carries, composed into colour scenes. Training and
test scenes are made of different digits. `compose_scene` makes a scene, one `write_*` function writes each layout.
"""

import os
import pickle
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from sklearn.datasets import load_digits
from tqdm import tqdm  # type: ignore[import-untyped]

from slimconv_lit.data.base import hold_out

Box: TypeAlias = tuple[int, int, int, int]
"""x0, y0, x1, y1 in pixels; x1 and y1 are the first that lie outside."""

DIGITS = tuple("0123456789")
NUMBERS = tuple(f"{number:02d}" for number in range(100))


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
    rng: np.random.Generator, pool: Pool, labels: Sequence[int], places: Sequence[Box], size: tuple[int, int]
) -> Scene:
    """Digits, each in one bright ink, on a darker, grainy ground whose colour changes softly.

    With bright and dark inks mixed, a small network learned next to nothing from the few images of a sample.

    Args:
        rng: What all is drawn from.
        pool: Where the digits come from.
        labels: The digits to write.
        places: Where to write each; its cell is stretched to the box. One that another covers is seen in part.
        size: Height and width of the scene in pixels.
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
        ink = rng.uniform(180, 255, 3)
        image[y0:y1, x0:x1] = part * (1 - cover) + ink.astype(np.float32) * cover
        instances[y0:y1, x0:x1][cover[..., 0] > 0.5] = number
    boxes = [_bounds(instances == number) for number in range(1, len(labels) + 1)]
    return Scene(np.clip(image, 0, 255).astype(np.uint8), boxes, list(labels), instances)


def _bounds(mask: NDArray[np.bool_]) -> Box:
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


def build_once(root: Path, name: str, write: Callable[[Path], None]) -> Path:
    """The folder `root`/sample/`name`, written by `write` the first time.

    It is written under another name and then renamed, so an interrupted build is never taken for a finished one.
    """
    folder = root / "sample" / name
    if folder.is_dir():
        return folder
    partial = folder.with_name(f"{name}.{os.getpid()}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        write(partial)
        partial.rename(folder)
    except OSError:
        # Another process may have been faster, with the same files: the seed is fixed.
        if not folder.is_dir():
            raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return folder


def write_cifar100(folder: Path, per_class: tuple[int, int] = (30, 10), seed: int = 0) -> None:
    """The layout of CIFAR-100's Python version: 100 numbers, each of two digits; 32x32 pixels.

    Coarse labels go with the tens, halved: 00-04, 05-09 and so on, 20 of them.

    Args:
        folder: Where to write cifar-100-python.
        per_class: Images of each class, for training and for test.
        seed: Of all that is drawn.
    """
    target = folder / "cifar-100-python"
    target.mkdir()
    coarse = [f"{start:02d}-{start + 4:02d}" for start in range(0, 100, 5)]
    _dump(target / "meta", {"fine_label_names": list(NUMBERS), "coarse_label_names": coarse})
    for number, split in enumerate(("train", "test")):
        rng, pool = np.random.default_rng((seed, number)), Pool(train=split == "train")
        labels = rng.permutation(np.repeat(np.arange(100), per_class[number])).tolist()
        rows = []
        for label in tqdm(labels, desc=f"sample of CIFAR-100, {split}", delay=1, leave=False):
            places = []
            for left in (0, 16):
                width, height = rng.integers(14, 17), rng.integers(20, 29)
                x, y = left + rng.integers(17 - width), rng.integers(33 - height)
                places.append((int(x), int(y), int(x + width), int(y + height)))
            scene = compose_scene(rng, pool, divmod(label, 10), places, (32, 32))
            rows.append(scene.image.transpose(2, 0, 1).ravel())
        entry = {
            "data": np.stack(rows),
            "fine_labels": labels,
            "coarse_labels": [label // 5 for label in labels],
            "filenames": [f"{NUMBERS[label]}_{index:05d}.png" for index, label in enumerate(labels)],
            "batch_label": f"{split}ing batch 1 of 1",
        }
        _dump(target / split, entry)


def _dump(path: Path, value: dict[str, object]) -> None:
    path.write_bytes(pickle.dumps(value))


def write_imagenet(folder: Path, per_class: tuple[int, int] = (80, 20), seed: int = 0) -> None:
    """The layout of ImageNet once unpacked: train/CLASS/*.JPEG and val/CLASS/*.JPEG, ten digits, sizes of many kinds.

    Args:
        folder: Where to write train and val.
        per_class: Images of each class, for training and for validation.
        seed: Of all that is drawn.
    """
    for number, split in enumerate(("train", "val")):
        rng, pool = np.random.default_rng((seed, number)), Pool(train=split == "train")
        labels = np.repeat(np.arange(10), per_class[number]).tolist()
        for index, label in enumerate(tqdm(labels, desc=f"sample of ImageNet, {split}", delay=1, leave=False)):
            height, width = (int(side) for side in rng.integers(176, 257, 2))
            tall = int(rng.uniform(0.65, 0.95) * min(height, width))
            wide = int(rng.uniform(0.75, 1) * tall)
            # Near the centre, where the test crop does not cut it.
            x, y = (int(rng.uniform(0.35, 0.65) * slack) for slack in (width - wide, height - tall))
            scene = compose_scene(rng, pool, [label], [(x, y, x + wide, y + tall)], (height, width))
            path = folder / split / DIGITS[label] / f"{split}_{index:05d}.JPEG"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(scene.image).save(path, quality=90)
