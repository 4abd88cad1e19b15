"""ImageNet (ILSVRC 2012), and any tree of folders that is laid out like it.

O. Russakovsky et al., "ImageNet Large Scale Visual Recognition Challenge", IJCV 2015, https://www.image-net.org
"""

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

from pytorch_lightning.utilities import rank_zero_info
from torch.utils.data import Dataset, Subset
from torchvision.datasets import ImageFolder
from torchvision.datasets.folder import find_classes
from torchvision.datasets.imagenet import (
    ARCHIVE_META,
    META_FILE,
    parse_devkit_archive,
    parse_train_archive,
    parse_val_archive,
)
from torchvision.models import ResNet18_Weights

from slimconv_lit.checks import at_least
from slimconv_lit.data import samples
from slimconv_lit.data.base import BaseDataModule, OnBadImage, Split, Transformed, check_split, hold_out
from slimconv_lit.data.files import DataError, EncodedImage, check_archive
from slimconv_lit.data.shards import ShardedImages, is_sharded, read_manifest
from slimconv_lit.data.transforms import IMAGENET_STATS, imagenet_eval, imagenet_train


class ImageNetDataModule(BaseDataModule):
    """Images in `root`/train/CLASS/*.JPEG and `root`/val/CLASS/*.JPEG, of 1,000 or any number of classes.

    `root` may instead hold the official archives ILSVRC2012_img_train.tar, ILSVRC2012_img_val.tar and
    ILSVRC2012_devkit_t12.tar.gz, which are unpacked there once, or the shards that `prepare` writes; these stand
    for the folder that they are of. `validation` is accepted for `val`. Where there is no `test` folder with class
    folders, the validation images also test, as is usual for ImageNet; to choose a checkpoint on other images than it
    is reported on, hold some out of train with `val_fraction`. Where there is nothing but train, those also test.

    Training takes a random part of the image at `image_size`; testing resizes the shorter side to `eval_size / 0.875`
    pixels (bilinear, antialiased) and crops `eval_size` from the centre: 256 and 224, or 293 and 256 for the paper's
    "@256", of which the paper says no more than the network's input size.

    Args:
        root: Folder that holds train and val, or the archives, or shards.
        batch_size: Images per training step on each device.
        eval_batch_size: Images per step elsewhere; None means `batch_size`.
        num_workers: Processes that load images; None means one per CPU core, at most 16.
        seed: Of the training order and the augmentation.
        split_seed: Of the held-out images; apart from `seed`, so that seeds are compared on the same images.
        val_fraction: Part of each class's training images to validate on, in the place of the val folder; 0 is none.
        num_classes: None counts the folders in `root`/train; without that folder it means 1000.
        image_size: Height and width of training images in pixels.
        eval_size: Height and width of all other images; None means `image_size`.
        trivial_augment: Add TrivialAugmentWide to the training recipe.
        sample: Read a small data set of ten classes in the same layout (800 and 200 images), built below `root`.
        predict_dir: Predict all images below this folder; None predicts the test images.
        pin_memory: Load into page-locked memory; None does so where CUDA is available.
        on_bad_image: "raise" stops at a picture that cannot be read and names it; "skip" goes on without it as long as
            no more than 1 % of them are missing, or any number in prediction.

    Raises:
        ValueError: If `num_classes` is not the number of class folders, or an argument is out of its range.
    """

    max_workers: ClassVar[int] = 16

    def __init__(
        self,
        root: str = "data/imagenet",
        batch_size: int = 256,
        eval_batch_size: int | None = None,
        num_workers: int | None = None,
        seed: int = 0,
        split_seed: int = 0,
        val_fraction: float = 0.0,
        num_classes: int | None = None,
        image_size: int = 224,
        eval_size: int | None = None,
        trivial_augment: bool = False,
        sample: bool = False,
        predict_dir: str | None = None,
        pin_memory: bool | None = None,
        on_bad_image: OnBadImage = "raise",
    ) -> None:
        super().__init__(
            root, batch_size, eval_batch_size, num_workers, seed, sample, predict_dir, pin_memory, on_bad_image
        )
        at_least(1, num_classes=num_classes, image_size=image_size, eval_size=eval_size)
        check_split(split_seed, val_fraction or None)
        self.save_hyperparameters(logger=False)
        self.split_seed = split_seed
        self.val_fraction = val_fraction
        self.image_size = image_size
        self.trivial_augment = trivial_augment
        self.class_names = self._class_names(num_classes)
        self.num_classes = len(self.class_names)
        # A checkpoint has to know it where the images are not.
        self.hparams["num_classes"] = self.num_classes
        size = eval_size or image_size
        self.input_size = (3, size, size)
        self.mean, self.std = IMAGENET_STATS
        self.eval_transform = imagenet_eval(size)

    def _class_names(self, num_classes: int | None) -> tuple[str, ...]:
        official = tuple(ResNet18_Weights.IMAGENET1K_V1.meta["categories"])
        train = self._folder(self.root, "train")
        if self.sample:
            found = samples.DIGITS
        elif is_sharded(self.root):
            found = tuple(read_manifest(self.root)["classes"])
        elif train is not None:
            found = tuple(find_classes(train)[0])
        elif num_classes in (None, len(official)):
            return official
        else:
            return tuple(f"class {number}" for number in range(num_classes or 0))
        if num_classes not in (None, len(found)):
            where = "the sample" if self.sample else train or self.root
            raise ValueError(
                f"num_classes={num_classes}, but {where} has {len(found)} classes; "
                f"leave num_classes out or set it to {len(found)}"
            )
        wnids = len(found) == len(official) and all(re.fullmatch(r"n\d{8}", name) for name in found)
        return official if wnids else found

    def state_dict(self) -> dict[str, Any]:
        """The class names, so that a checkpoint can name its predictions where the images are not."""
        return {"class_names": list(self.class_names)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes the class names over where no folders tell them."""
        unknown = not self.sample and self._folder(self.root, "train") is None and not is_sharded(self.root)
        names = state_dict.get("class_names")
        if unknown and isinstance(names, list) and len(names) == self.num_classes:
            self.class_names = tuple(map(str, names))

    def prepare_data(self) -> None:
        """Unpacks the archives that lie in `root`, or builds the sample; either only where it is missing.

        Raises:
            DataError: If an archive is missing or is not the official one.
        """
        if self.sample:
            samples.build_once(self.root, "imagenet", samples.write_imagenet)
            return
        if is_sharded(self.root):
            return
        for split, parse in (("train", parse_train_archive), ("val", parse_val_archive)):
            if self._folder(self.root, split) is None and (self.root / ARCHIVE_META[split][0]).is_file():
                try:
                    self._unpack(split, parse)
                except RuntimeError as error:
                    # torchvision names the archive that is missing or has another md5 sum than the official one.
                    raise DataError(
                        f"{error} It is to be had, with an account, at https://www.image-net.org"
                    ) from error

    def _unpack(self, split: str, parse: Callable[..., None]) -> None:
        check_archive(self.root / ARCHIVE_META[split][0])
        if split == "val" and not (self.root / META_FILE).is_file():
            if (devkit := self.root / ARCHIVE_META["devkit"][0]).is_file():
                check_archive(devkit)
            parse_devkit_archive(self.root)
        # Renamed when complete: unpacking takes long enough to be interrupted.
        partial = self.root / f"{split}.unpacking"
        shutil.rmtree(partial, ignore_errors=True)
        parse(self.root, folder=partial.name)
        partial.rename(self.root / split)

    def make_dataset(self, split: Split) -> Dataset[tuple[Any, ...]]:
        """The images of a split.

        Raises:
            FileNotFoundError: If its folder is not below `root`.
            DataError: If its class folders are not those of train.
        """
        root = samples.build_once(self.root, "imagenet", samples.write_imagenet) if self.sample else self.root
        transform = imagenet_train(self.image_size, self.trivial_augment) if split == "train" else self.eval_transform
        if split == "test" and not self._has(root, "test"):
            if self._has(root, "val"):
                return Transformed(self._read(root, "val"), transform)
            if self.val_fraction > 0:
                rank_zero_info(f"{root} has neither test nor val: the images that were held out of train also test")
                return self.dataset("val")
        held_out = self.val_fraction > 0 and split != "test"
        data = self._read(root, "train" if held_out else split)
        if not held_out:
            return Transformed(data, transform)
        kept, held = hold_out(data.targets, self.val_fraction, self.split_seed)
        return Transformed(Subset(data, kept if split == "train" else held), transform)

    def folders(self) -> dict[str, ImageFolder]:
        """Each split that has a folder, as it is read from there.

        Raises:
            FileNotFoundError: If there is none for training.
        """
        root = samples.build_once(self.root, "imagenet", samples.write_imagenet) if self.sample else self.root
        splits = [split for split in ("train", "val", "test") if split == "train" or self._folder(root, split)]
        return {split: self._read_folder(root, split) for split in splits}

    @staticmethod
    def _folder(root: Path, split: str) -> Path | None:
        """Where a split lies. The official test images have no class folders, so they do not count."""
        folders = (root / name for name in ((split, "validation") if split == "val" else (split,)))
        return next((f for f in folders if f.is_dir() and any(entry.is_dir() for entry in f.iterdir())), None)

    def _has(self, root: Path, split: str) -> bool:
        if is_sharded(root):
            return split in read_manifest(root)["splits"]
        return self._folder(root, split) is not None

    def _read(self, root: Path, split: str) -> ImageFolder | ShardedImages:
        return ShardedImages(root, split) if is_sharded(root) else self._read_folder(root, split)

    def _read_folder(self, root: Path, split: str) -> ImageFolder:
        folder = self._folder(root, split)
        if folder is None:
            other = ARCHIVE_META[split][0] if split in ARCHIVE_META else "val"
            hold = ", hold validation images out of train with --data.val_fraction=0.1"
            hold = hold if split == "val" and self._folder(root, "train") else ""
            raise FileNotFoundError(
                f"no {split} images in root={str(root)!r}: there is neither {root / split} with a folder for each class"
                f" nor {root / other}. Name the folder that holds them with --data.root{hold}, or try a small sample "
                "with --data.sample=true. ImageNet itself is to be had, with an account, at https://www.image-net.org"
            )
        data = ImageFolder(folder, loader=EncodedImage)
        train = self._folder(root, "train")
        if train is not None and (differing := sorted(set(data.classes) ^ set(find_classes(train)[0]))):
            raise DataError(
                f"{folder} and {train} must have the same class folders; only one has {', '.join(differing[:5])}"
            )
        if len(data.classes) != self.num_classes:
            raise DataError(f"num_classes={self.num_classes}, but {folder} has {len(data.classes)} class folders")
        return data
