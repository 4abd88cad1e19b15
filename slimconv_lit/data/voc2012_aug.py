"""Pascal VOC2012 with the masks of the Semantic Boundaries Dataset (SBD): "VOC2012 Aug", for semantic segmentation.

M. Everingham et al., "The Pascal Visual Object Classes (VOC) Challenge", IJCV 2010, http://host.robots.ox.ac.uk/pascal/VOC/
B. Hariharan et al., "Semantic Contours from Inverse Detectors", ICCV 2011 (SBD)
"""

import math
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset
from torchvision import tv_tensors
from torchvision.datasets.voc import DATASET_YEAR_DICT

from slimconv_lit.checks import at_least
from slimconv_lit.data import samples
from slimconv_lit.data.base import BaseDataModule, OnBadImage, Split, Transformed
from slimconv_lit.data.files import (
    Archive,
    DataError,
    inspect_image,
    names_in,
    read_image,
    read_list,
    read_pixels,
    some,
)
from slimconv_lit.data.sbd import SBD, find_sbd, write_sbd_masks
from slimconv_lit.data.transforms import IMAGENET_STATS, segmentation_crop, segmentation_eval, segmentation_train
from slimconv_lit.data.voc import OBJECT_NAMES, VOID, palette

_ARCHIVE = DATASET_YEAR_DICT["2012"]
VOC2012 = Archive(
    _ARCHIVE["url"], _ARCHIVE["filename"], _ARCHIVE["md5"], "VOCdevkit/VOC2012/ImageSets/Segmentation/val.txt"
)
COUNTS = {"train": 1_464, "val": 1_449}
"""How many images the official lists name; those of SBD make 10,582 to train on."""
AUG_COUNT = 10_582


class SegmentationPairs:
    """(image, mask) of a tree in the layout of VOC2012; a mask is a `tv_tensors.Mask` (H, W), uint8.

    Args:
        folder: With JPEGImages, and SegmentationClass or SegmentationClassAug.
        names: Of the images. A mask is read from SegmentationClass where there is one.
        num_classes: Labels are smaller than this, or 255.
    """

    def __init__(self, folder: Path, names: Sequence[str], num_classes: int) -> None:
        own = names_in(folder / "SegmentationClass", ".png")
        self.folder, self.num_classes = folder, num_classes
        self.images = [folder / "JPEGImages" / f"{name}.jpg" for name in names]
        self.masks = [
            folder / ("SegmentationClass" if name in own else "SegmentationClassAug") / f"{name}.png" for name in names
        ]

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[tv_tensors.Image, tv_tensors.Mask]:
        image, mask = read_pixels(self.images[index]), np.array(read_image(self.masks[index], mode=None))
        counts = np.bincount(mask.ravel(), minlength=VOID + 1)
        if counts[self.num_classes : VOID].any():
            wrong = self.num_classes + np.flatnonzero(counts[self.num_classes : VOID])
            raise DataError(
                f"{self.masks[index]} has the label {some(wrong)}; labels are 0 to {self.num_classes - 1}, and {VOID} "
                "for pixels that do not count"
            )
        return image, tv_tensors.Mask(torch.from_numpy(mask))

    def check(self) -> None:
        """Looks at all files without decoding them.

        Raises:
            FileNotFoundError: If some are missing.
            DataError: If some are truncated, are no pictures, or a mask has not its image's size or is no label mask.
        """
        for files in (self.images, self.masks):
            there = {folder: names_in(folder, files[0].suffix) for folder in {file.parent for file in files}}
            missing = [file for file in files if file.stem not in there[file.parent]]
            if missing:
                raise FileNotFoundError(
                    f"{len(missing):,} of {len(files):,} files that the lists of {self.folder} name are missing: "
                    f"{some(missing)}. Unpack or copy them again"
                )
        # Threads, because a folder on a network answers slowly.
        with ThreadPoolExecutor(8) as pool:
            problems = [p for p in pool.map(_problem, self.images, self.masks) if p]
        if problems:
            raise DataError(f"{len(problems):,} of {len(self):,} images cannot be used. " + "; ".join(problems[:5]))


def _problem(image: Path, mask: Path) -> str | None:
    try:
        (size, _), (mask_size, mode) = inspect_image(image), inspect_image(mask)
    except DataError as error:
        return str(error)
    if mask_size != size:
        return f"{mask} is {mask_size[0]}x{mask_size[1]} pixels, but {image} is {size[0]}x{size[1]}"
    return None if mode in ("P", "L") else f"{mask} has the colours of classes (mode {mode}), where labels are needed"


class NamedImages:
    """(image, file name)."""

    def __init__(self, files: Sequence[Path]) -> None:
        self.files = files

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[tv_tensors.Image, str]:
        return read_pixels(self.files[index]), self.files[index].name


def _write_sample(folder: Path) -> None:
    samples.write_voc2012(folder)
    samples.write_sbd(folder)


class VOC2012AugDataModule(BaseDataModule):
    """Pascal VOC2012 below `root`/VOCdevkit/VOC2012: 20 classes and background, 10,582 and 1,449 images.

    Trains on VOC2012's train list and on all that SBD labels, less VOC2012's val list, on which it validates and tests
    (the labels of the test images are not public). Both official archives are wanted: below `root`, unpacked or not,
    or fetched with `download`. SBD may lie in benchmark_RELEASE/dataset or, as torchvision leaves it, in sbd. Its masks
    are turned into pictures once, in VOCdevkit/VOC2012/SegmentationClassAug.

    A tree that has SegmentationClassAug needs no SBD: then all its masks train, or those that
    ImageSets/Segmentation/train_aug.txt names. An image's mask is VOC2012's own (SegmentationClass) where there is one.
    With `train_list`, any tree in this layout with these classes will do.

    Training resizes both sides by a factor from `scale`, crops at random and flips. Evaluation takes images whole, at
    their own size; in batches of several they are padded to the largest, which changes the figures a little. Batches
    are images and masks: int64 (B, H, W), 0 to 20, and 255 where a pixel does not count. Predict batches are single
    images.

    With `sample=True` the first ten classes are handwritten digits, and the other ten never occur.

    Args:
        root: Folder that holds VOCdevkit, or the archives.
        batch_size: Images per training step on each device.
        eval_batch_size: Images per step elsewhere.
        num_workers: Processes that load images; None means one per CPU core, at most 16.
        seed: Of the training order and the augmentation.
        crop_size: Height and width of training images, and of `crop_eval`, in pixels.
        flip: Mirror half of the training images; not where left and right differ, as in digits.
        scale: The least and the greatest factor of both sides of training images.
        train_list: A list in ImageSets/Segmentation to train on, such as "train" (VOC2012's own 1,464 images). None
            means the 10,582 images of VOC2012 Aug, or those of the sample.
        crop_eval: Validate and test on two loaders: the images whole, and their centres (the shorter side resized to
            `crop_size`, then the square in the middle), which is what the reference repository (VainF) reports.
        download: Fetch the archives (2.0 and 1.4 GB) into `root` where they are missing.
        sample: Read a small data set in the same layout (300 and 60 images), built below `root`.
        predict_dir: Predict all images below this folder; None predicts the validation images.
        pin_memory: Load into page-locked memory; None does so where CUDA is available.
        on_bad_image: "raise" stops at a picture that cannot be read and names it; "skip" goes on without it as long as
            no more than 1 % of them are missing, or any number in prediction.

    Attributes:
        ignore_index: 255.
        palette: The colour of each label, (256, 3) uint8.
    """

    max_workers: ClassVar[int] = 16
    ignore_index: ClassVar[int] = VOID

    def __init__(
        self,
        root: str = "data/voc",
        batch_size: int = 16,
        eval_batch_size: int | None = 1,
        num_workers: int | None = None,
        seed: int = 0,
        crop_size: int = 513,
        flip: bool = True,
        scale: tuple[float, float] = (0.5, 2.0),
        train_list: str | None = None,
        crop_eval: bool = False,
        download: bool = False,
        sample: bool = False,
        predict_dir: str | None = None,
        pin_memory: bool | None = None,
        on_bad_image: OnBadImage = "raise",
    ) -> None:
        super().__init__(
            root, batch_size, eval_batch_size, num_workers, seed, sample, predict_dir, pin_memory, on_bad_image
        )
        at_least(1, crop_size=crop_size)
        if not 0 < scale[0] <= scale[1] < math.inf:
            raise ValueError(f"scale={list(scale)} must be a least and a greatest factor, both above 0")
        self.save_hyperparameters(logger=False)
        self.crop_size = crop_size
        self.flip = flip
        self.scale = (scale[0], scale[1])
        # Plain values: a tuple would come back from a checkpoint's configuration as a list.
        self.hparams["scale"] = list(scale)
        self.train_list = train_list
        self.crop_eval = crop_eval
        self.download = download
        self.class_names = ("background", *OBJECT_NAMES)
        self.num_classes = len(self.class_names)
        self.palette = palette()
        self.input_size = (3, crop_size, crop_size)
        self.mean, self.std = IMAGENET_STATS
        self.eval_transform = segmentation_eval()

    def prepare_data(self) -> None:
        """Unpacks the archives or builds the sample, and turns SBD's masks into pictures; each only once."""
        if self.trainer and self.trainer.predicting and self.predict_dir is not None:
            return
        if not self.sample:
            VOC2012.unpack(self.root, self.download)
            if self.train_list is None and not self._masks.is_dir() and find_sbd(self.root) is None:
                SBD.unpack(self.root, self.download)
        # Without SBD one can still validate; whoever trains is told that it is missing.
        if self.train_list is None and find_sbd(self._tree) is not None:
            self._write_masks()

    def make_dataset(self, split: Split) -> Dataset[tuple[Any, ...]]:
        """The images and masks of a split; all files are looked at, though not decoded.

        Raises:
            FileNotFoundError: If files are missing.
            DataError: If files are truncated, a mask has not its image's size, or a list is not as it should be.
        """
        if split == "test":
            return self.dataset("val")
        train = split == "train"
        data = SegmentationPairs(self._folder, self._train_names() if train else self._list("val"), self.num_classes)
        data.check()
        recipe = segmentation_train(self.crop_size, self.flip, self.scale)
        return Transformed(data, recipe if train else self.eval_transform)

    @staticmethod
    def collate(items: list[tuple[Any, ...]]) -> tuple[Any, ...]:
        """Stacks; smaller images are filled up on the right and below, with the mean colour (0), masks with 255."""
        height, width = (max(image.shape[axis] for image, _ in items) for axis in (-2, -1))

        def stack(tensors: Iterable[Tensor], value: int) -> Tensor:
            room = [(0, width - tensor.shape[-1], 0, height - tensor.shape[-2]) for tensor in tensors]
            return torch.stack([functional.pad(t, r, value=value) for t, r in zip(tensors, room, strict=True)])

        images, targets = zip(*items, strict=True)
        return stack(images, 0), list(targets) if isinstance(targets[0], str) else stack(targets, VOID)

    def val_dataloader(self) -> Any:
        """(images, masks) of the whole images; with `crop_eval` a list of two loaders, the second of their centres."""
        whole = self._loader(self.dataset("val"), self.eval_batch_size)
        if not self.crop_eval:
            return whole
        centres = Transformed(self.dataset("val").source, segmentation_crop(self.crop_size))  # type: ignore[attr-defined]
        return [whole, self._loader(centres, self.eval_batch_size)]

    def test_dataloader(self) -> Any:
        """The same as for validation."""
        return self.val_dataloader()

    def predict_dataset(self) -> Dataset[tuple[Any, ...]]:
        """The (image, name) pairs to predict: the images below `predict_dir`, or the validation images."""
        if self.predict_dir is not None:
            return super().predict_dataset()
        return Transformed(NamedImages(self.dataset("val").source.images), self.eval_transform)  # type: ignore[attr-defined]

    def predict_dataloader(self) -> DataLoader[Any]:
        """(image, name) one by one, so that each keeps its size."""
        return self._loader(self.predict_dataset(), 1, ceiling=None)

    @property
    def _tree(self) -> Path:
        return samples.build_once(self.root, "voc2012", _write_sample) if self.sample else self.root

    @property
    def _folder(self) -> Path:
        return self._tree / "VOCdevkit" / "VOC2012"

    @property
    def _masks(self) -> Path:
        return self._folder / "SegmentationClassAug"

    @property
    def _official(self) -> bool:
        return self.train_list is None and not self.sample

    def _list(self, name: str) -> list[str]:
        path = self._folder / "ImageSets" / "Segmentation" / f"{name}.txt"
        if not path.is_file():
            raise FileNotFoundError(
                f"no VOC2012 in root={str(self.root)!r}: {path if self._folder.is_dir() else self._folder} does not "
                f"exist. Fetch it (or unpack {VOC2012.filename} and {SBD.filename} that lie in root) with "
                "--data.download=true, name the folder that holds VOCdevkit with --data.root, or try a small sample "
                "with --data.sample=true"
            )
        return read_list(path, COUNTS.get(name) if self._official else None)

    def _train_names(self) -> list[str]:
        """VOC's train list and all that SBD labels, less VOC's val list; or a given list.

        Raises:
            DataError: If a validation image is among them, or it is not the official number of images.
        """
        lists, val = self._folder / "ImageSets" / "Segmentation", set(self._list("val"))
        given = self.train_list or ("train_aug" if (lists / "train_aug.txt").is_file() else None)
        if given:
            source, names = lists / f"{given}.txt", self._list(given)
            if leaked := [name for name in names if name in val]:
                raise DataError(
                    f"{len(leaked):,} validation images are in {source} too: {some(leaked)}. Take them out: who trains "
                    "on them measures nothing"
                )
        else:
            self._write_masks()
            source, names = self._masks, sorted({*self._list("train"), *names_in(self._masks, ".png")} - val)
        if self._official and len(names) != AUG_COUNT:
            raise DataError(
                f"VOC2012 Aug trains on {AUG_COUNT:,} images, but with {source} they are {len(names):,}. Remove it "
                "to start anew from SBD, or train on a list of your own with --data.train_list"
            )
        return names

    def _write_masks(self) -> None:
        if self._masks.is_dir() or not self._folder.is_dir():
            return
        sbd = find_sbd(self._tree)
        if sbd is None:
            raise FileNotFoundError(
                f"no SBD in root={str(self.root)!r}: neither {SBD.marker} nor {self._masks} exists. Fetch it (or "
                f"unpack a {SBD.filename} that lies in root) with --data.download=true, or train on VOC2012's own "
                "1,464 images with --data.train_list=train"
            )
        own = names_in(self._folder / "SegmentationClass", ".png")
        write_sbd_masks(sbd, self._masks, own, self._official, self.num_workers)
