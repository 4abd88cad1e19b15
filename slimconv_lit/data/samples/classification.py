"""Samples in the layouts of CIFAR-100 and ImageNet."""

import pickle
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm  # type: ignore[import-untyped]

from slimconv_lit.data.samples.scenes import Pool, compose_scene

DIGITS = tuple("0123456789")
NUMBERS = tuple(f"{number:02d}" for number in range(100))


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
        for label in tqdm(labels, desc=f"sample of CIFAR-100, {split}", delay=1, leave=False, disable=None):
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
    # As the official files are; a later protocol pickles arrays in other ways.
    path.write_bytes(pickle.dumps(value, protocol=2))


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
        for index, label in enumerate(
            tqdm(labels, desc=f"sample of ImageNet, {split}", delay=1, leave=False, disable=None)
        ):
            height, width = (int(side) for side in rng.integers(176, 257, 2))
            tall = int(rng.uniform(0.65, 0.95) * min(height, width))
            wide = int(rng.uniform(0.75, 1) * tall)
            # Near the centre, where the test crop does not cut it.
            x, y = (int(rng.uniform(0.35, 0.65) * slack) for slack in (width - wide, height - tall))
            scene = compose_scene(rng, pool, [label], [(x, y, x + wide, y + tall)], (height, width))
            path = folder / split / DIGITS[label] / f"{split}_{index:05d}.JPEG"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(scene.image).save(path, quality=90)
