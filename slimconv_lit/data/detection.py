"""What the data sets for detection share: annotations in few arrays, checked boxes, batches of images of any size."""

import difflib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, ClassVar, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from pytorch_lightning.utilities import rank_zero_warn
from torch.utils.data import Dataset
from torchvision import tv_tensors

from slimconv_lit.data.base import BaseDataModule, Split, Transformed
from slimconv_lit.data.files import DataError, read_pixels, some
from slimconv_lit.data.transforms import detection_eval, detection_train

Floats: TypeAlias = NDArray[np.floating[Any]]

# Sums of coordinates with two decimals may be off by this much, in pixels.
_ROUNDING = 0.01


@dataclass(frozen=True)
class Annotations:
    """N images and the M objects in them.

    In arrays, and not in lists of objects, because every worker that looks at a list ends up with a copy of it.

    Attributes:
        files: (N,) text, relative to the data set's folder.
        ids: (N,) int64, the data set's own.
        sizes: (N, 2) width and height in pixels.
        owners: (M,) rising: which image an object is in.
        boxes: (M, 4) float32: x0, y0, x1, y1 in pixels from the upper left corner; x1 and y1 are where a box ends.
        labels: (M,) int64 from 1.
        difficult: (M,) bool, of VOC.
        crowd: (M,) bool, of COCO.
        area: (M,) float32 in pixels.
    """

    files: NDArray[np.str_]
    ids: NDArray[np.int64]
    sizes: NDArray[np.int64]
    owners: NDArray[np.int64]
    boxes: Floats
    labels: NDArray[np.int64]
    difficult: NDArray[np.bool_]
    crowd: NDArray[np.bool_]
    area: Floats

    def images(self, chosen: NDArray[np.bool_]) -> "Annotations":
        """The chosen (N,) images with their objects."""
        rows = chosen[self.owners]
        numbers = np.cumsum(chosen) - 1
        of_images = {name: getattr(self, name)[chosen] for name in _OF_IMAGES}
        of_objects = {name: getattr(self, name)[rows] for name in _OF_OBJECTS}
        return Annotations(**of_images, **of_objects | {"owners": numbers[self.owners[rows]]})

    def objects(self, chosen: NDArray[np.bool_]) -> "Annotations":
        """All images with the chosen (M,) objects."""
        of_images = {name: getattr(self, name) for name in _OF_IMAGES}
        return Annotations(**of_images, **{name: getattr(self, name)[chosen] for name in _OF_OBJECTS})

    def __add__(self, other: "Annotations") -> "Annotations":
        joined = {f.name: np.concatenate([getattr(self, f.name), getattr(other, f.name)]) for f in fields(self)}
        joined["owners"] = np.concatenate([self.owners, other.owners + len(self.files)])
        return Annotations(**joined)


_OF_IMAGES = ("files", "ids", "sizes")
_OF_OBJECTS = ("owners", "boxes", "labels", "difficult", "crowd", "area")


def check_boxes(
    boxes: Floats, sizes: NDArray[np.int64], least: float, source: str, name: Callable[[int], str]
) -> tuple[Floats, NDArray[np.bool_]]:
    """Boxes clipped to their images, and which of them are left; one warning each for what is clipped and dropped.

    Args:
        boxes: (M, 4) x0, y0, x1, y1 in pixels.
        sizes: (M, 2) width and height of each one's image.
        least: A box is dropped unless both its sides are longer than this.
        source: What the warnings name first.
        name: What the warnings call a box, by its number.

    Raises:
        DataError: If a coordinate is not a number.
    """
    if not (finite := np.isfinite(boxes).all(1)).all():
        raise DataError(f"{source}: {name(int(np.argmin(finite)))} has a coordinate that is not a number")
    clipped = np.clip(boxes, 0, np.tile(sizes, 2))
    kept: NDArray[np.bool_] = np.all(clipped[:, 2:] - clipped[:, :2] > least, axis=1)
    for what, which in (
        ("reach out of their images and are clipped", (np.abs(clipped - boxes) > _ROUNDING).any(1) & kept),
        ("have no area in their images and are left out", ~kept),
    ):
        if which.any():
            places = some(map(name, np.flatnonzero(which).tolist()))
            rank_zero_warn(f"{source}: {which.sum():,} of {len(boxes):,} boxes {what}: {places}")
    return clipped.astype(np.float32), kept


def unknown_class(name: str, class_names: Sequence[str]) -> str:
    """What to say of a name that is not among `class_names`."""
    near = difflib.get_close_matches(name, class_names, n=1)
    return f"class_names has no {name!r}" + (f"; did you mean {near[0]!r}?" if near else "")


class DetectionImages:
    """(image, target) of each annotated image.

    A target is a dictionary: boxes (n, 4) float32 as `tv_tensors.BoundingBoxes`, labels (n,) int64 from 1, difficult
    and crowd (n,) bool, area (n,) float32, image_id (), name (the file's, without folders).

    Args:
        folder: That the files' paths start from.
        annotations: Of the images.
    """

    def __init__(self, folder: Path, annotations: Annotations) -> None:
        self.folder, self.annotations = folder, annotations

    def __len__(self) -> int:
        return len(self.annotations.files)

    def __getitem__(self, index: int) -> tuple[tv_tensors.Image, dict[str, Any]]:
        all_of = self.annotations
        path = self.folder / all_of.files[index]
        image, size = read_pixels(path), tuple(all_of.sizes[index].tolist())
        height, width = image.shape[-2:]
        if (width, height) != size:
            raise DataError(f"{path} is {width}x{height} pixels, but it was annotated as {size[0]}x{size[1]}")
        rows = slice(*np.searchsorted(all_of.owners, (index, index + 1)).tolist())
        target = {name: torch.tensor(getattr(all_of, name)[rows]) for name in _OF_OBJECTS if name != "owners"}
        target["boxes"] = tv_tensors.BoundingBoxes(
            target["boxes"], format=tv_tensors.BoundingBoxFormat.XYXY, canvas_size=(height, width)
        )
        return image, {**target, "image_id": torch.tensor(all_of.ids[index]), "name": path.name}


class NamedImages:
    """(image, file name) of each annotated image."""

    def __init__(self, images: DetectionImages) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[tv_tensors.Image, str]:
        image, target = self.images[index]
        return image, target["name"]


class DetectionDataModule(BaseDataModule):
    """Base of the datamodules for detection. A subclass sets the attributes and `read`, and `prepare_data`.

    Batches of train, val and test are (images, targets), two lists: float32 (3, H, W), each of its own size, between 0
    and 1 and not normalised, for torchvision's detectors resize and normalise themselves; and a dictionary for each as
    `DetectionImages` has it. Batches of predict are (images, names). Training flips images and boxes at random.

    Attributes:
        num_classes: Without background.
        category_ids: The data set's own number of each class, in the order of the labels, for files of results.
    """

    max_workers: ClassVar[int] = 8
    category_ids: tuple[int, ...]

    def __init__(self, *base: Any) -> None:
        super().__init__(*base)
        self.mean, self.std = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
        self.eval_transform = detection_eval()

    def read(self, split: Split) -> DetectionImages:
        """The images of a split, with the objects that it trains or is judged on.

        Raises:
            FileNotFoundError: If something is missing.
            DataError: If a file cannot be used; the message names it, and the object.
        """
        raise NotImplementedError

    def make_dataset(self, split: Split) -> Dataset[tuple[Any, ...]]:
        """`read`, transformed."""
        return Transformed(self.read(split), detection_train() if split == "train" else self.eval_transform)

    @staticmethod
    def collate(items: list[tuple[Any, ...]]) -> tuple[Any, ...]:
        """Two lists, for images of different sizes do not stack."""
        images, targets = zip(*items, strict=True)
        return list(images), list(targets)

    def predict_dataset(self) -> Dataset[tuple[Any, ...]]:
        """The (image, name) pairs to predict: the images below `predict_dir`, or the test images."""
        if self.predict_dir is not None:
            return super().predict_dataset()
        return Transformed(NamedImages(self._test_images), self.eval_transform)

    @property
    def _test_images(self) -> DetectionImages:
        images: DetectionImages = self.dataset("test").source  # type: ignore[attr-defined]
        return images

    @property
    def image_ids(self) -> dict[str, int]:
        """The number of each image to predict, by its name: the data set's own, or from 1 in `predict_dir`."""
        if self.predict_dir is not None:
            names = self.predict_dataset().source.names  # type: ignore[attr-defined]
            return {name: number for number, name in enumerate(names, start=1)}
        test = self._test_images.annotations
        return {Path(file).name: number for file, number in zip(test.files, test.ids.tolist(), strict=True)}
