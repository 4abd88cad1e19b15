"""CIFAR-100: 50,000 training and 10,000 test images of 32x32 pixels in 100 classes.

A. Krizhevsky, "Learning Multiple Layers of Features from Tiny Images", 2009, https://www.cs.toronto.edu/~kriz/cifar.html
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset, Subset
from torchvision.datasets import CIFAR100
from torchvision.datasets.utils import check_integrity

from slimconv_lit.data import samples
from slimconv_lit.data.base import BaseDataModule, OnBadImage, Split, Transformed, hold_out
from slimconv_lit.data.batched import BatchAugment, InMemory, RawBatch
from slimconv_lit.data.files import Archive, DataError
from slimconv_lit.data.pickles import read_pickle
from slimconv_lit.data.transforms import CIFAR100_STATS, cifar100_train, resize_and_crop

_NAMES = """
apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus butterfly camel can castle
caterpillar cattle chair chimpanzee clock cloud cockroach couch crab crocodile cup dinosaur dolphin elephant
flatfish forest fox girl hamster house kangaroo keyboard lamp lawn_mower leopard lion lizard lobster man maple_tree
motorcycle mountain mouse mushroom oak_tree orange orchid otter palm_tree pear pickup_truck pine_tree plain plate
poppy porcupine possum rabbit raccoon ray road rocket rose sea seal shark shrew skunk skyscraper snail snake spider
squirrel streetcar sunflower sweet_pepper table tank telephone television tiger tractor train trout tulip turtle
wardrobe whale willow_tree wolf woman worm
"""
CLASS_NAMES = tuple(_NAMES.split())


_FOLDER = CIFAR100.base_folder
ARCHIVE = Archive(CIFAR100.url, CIFAR100.filename, CIFAR100.tgz_md5, f"{_FOLDER}/{CIFAR100.meta['filename']}")
SUMS = {name: md5 for name, md5 in (*CIFAR100.train_list, *CIFAR100.test_list)}
"""Of the official files."""


class CIFARImages(Dataset[tuple[Image.Image, int]]):
    """(PIL image, fine label) of each entry of one file of CIFAR-100's Python version.

    Args:
        path: The file.

    Attributes:
        data: (N, 32, 32, 3) uint8.
        targets: N labels, 0 to 99.

    Raises:
        DataError: If it is not a file of CIFAR-100's.
    """

    def __init__(self, path: Path) -> None:
        entry = read_pickle(path)
        pixels, labels = (entry.get(key) if isinstance(entry, dict) else None for key in ("data", "fine_labels"))
        # bool is an int, and no label.
        if not (
            isinstance(pixels, np.ndarray)
            and pixels.ndim == 2
            and pixels.shape[1] == 3 * 32 * 32
            and isinstance(labels, list)
            and len(labels) == len(pixels) > 0
            and all(type(label) is int and 0 <= label < 100 for label in labels)
        ):
            raise DataError(f"{path} is not a file of CIFAR-100: it needs N rows of 3,072 bytes, and N fine_labels")
        self.data = pixels.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
        self.targets: list[int] = labels

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return Image.fromarray(self.data[index]), self.targets[index]


class CIFAR100DataModule(BaseDataModule):
    """CIFAR-100 below `root`/cifar-100-python, with the fine labels.

    By default a tenth of the training images is held out to validate on, and the test images only test. The reference
    recipe trains on all of them and takes the best checkpoint on test: `val_on_test=True`, an optimistic figure.

    With `sample=True` the classes are the numbers 00 to 99, each written with two real handwritten digits.

    Args:
        root: Folder that holds cifar-100-python.
        batch_size: Images per training step on each device.
        eval_batch_size: Images per step elsewhere; None means `batch_size`.
        num_workers: Processes that load images; None means one per CPU core, at most 4.
        seed: Of the training order and the augmentation.
        split_seed: Of the held-out images; apart from `seed`, so that seeds are compared on the same images.
        val_fraction: Part of each class's training images that is held out.
        val_on_test: Train on all training images and validate on the test images; `val_fraction` is then unused.
        trivial_augment: Add TrivialAugmentWide to the training recipe, which then goes image by image.
        cutout: Side in pixels of a square that is cut out of each training image; 0 for none.
        download: Fetch the data set (169 MB) into `root` where it is missing.
        sample: Read a small data set in the same layout (3,000 and 1,000 images), built below `root`.
        predict_dir: Predict all images below this folder, resized to 32x32; None predicts the test images.
        pin_memory: Load into page-locked memory; None does so where CUDA is available.
        on_bad_image: "raise" stops at a picture that cannot be read and names it; "skip" goes on without it as long as
            no more than 1 % of them are missing, or any number in prediction.
    """

    def __init__(
        self,
        root: str = "data",
        batch_size: int = 128,
        eval_batch_size: int | None = None,
        num_workers: int | None = None,
        seed: int = 0,
        split_seed: int = 0,
        val_fraction: float = 0.1,
        val_on_test: bool = False,
        trivial_augment: bool = False,
        cutout: int = 0,
        download: bool = False,
        sample: bool = False,
        predict_dir: str | None = None,
        pin_memory: bool | None = None,
        on_bad_image: OnBadImage = "raise",
    ) -> None:
        super().__init__(
            root, batch_size, eval_batch_size, num_workers, seed, sample, predict_dir, pin_memory, on_bad_image
        )
        self.save_hyperparameters(logger=False)
        if not 0 <= split_seed < 2**32:
            raise ValueError(f"split_seed={split_seed} must be at least 0 and below 2**32")
        self.split_seed = split_seed
        self.val_fraction = val_fraction
        self.val_on_test = val_on_test
        if trivial_augment and cutout:
            raise ValueError("cutout is for the plain recipe; leave it at 0 with trivial_augment")
        self.trivial_augment = trivial_augment
        self.cutout = cutout
        self.download = download
        self.num_classes = 100
        self.class_names = samples.NUMBERS if sample else CLASS_NAMES
        self.input_size = (3, 32, 32)
        self.mean, self.std = CIFAR100_STATS
        self.eval_transform = resize_and_crop(32, 32, CIFAR100_STATS)

    def prepare_data(self) -> None:
        """Downloads, where asked to, or builds the sample; either only where it is missing."""
        if self.sample:
            samples.build_once(self.root, "cifar100", samples.write_cifar100)
        else:
            ARCHIVE.unpack(self.root, self.download)

    def make_dataset(self, split: Split) -> Dataset[tuple[Any, ...]]:
        """The images of a split.

        Raises:
            FileNotFoundError: If the data are not below `root`.
            DataError: If they are there but are not the official files.
        """
        data = self._read(train=split == "train" or (split == "val" and not self.val_on_test))
        if split == "test" or (split == "val" and self.val_on_test):
            return Transformed(data, self.eval_transform)
        kept: Sequence[int] = range(len(data))
        held: Sequence[int] = []
        if not self.val_on_test:
            kept, held = hold_out(data.targets, self.val_fraction, self.split_seed)
        if split == "val":
            return Transformed(Subset(data, held), self.eval_transform)
        if self.trivial_augment:
            return Transformed(Subset(data, kept), cifar100_train(trivial_augment=True))
        images = torch.from_numpy(data.data[list(kept)]).permute(0, 3, 1, 2).contiguous()
        targets = [data.targets[i] for i in kept]
        return InMemory(images, targets, CIFAR100_STATS, BatchAugment(cutout=self.cutout))

    @property
    def train_workers(self) -> int:
        """None for images in memory: a batch is put together faster than another process could hand it over."""
        return self.num_workers if self.trivial_augment else 0

    def train_dataloader(self) -> DataLoader[Any]:
        """Shuffled and augmented (images, targets); with a GPU they are augmented there."""
        data = self.dataset("train")
        if isinstance(data, InMemory):
            data.raw = self.trainer is not None and self.trainer.strategy.root_device.type != "cpu"
        return super().train_dataloader()

    @staticmethod
    def collate(items: Any) -> tuple[Any, ...]:
        """A batch that was put together at once needs no more."""
        return items if isinstance(items, tuple) else BaseDataModule.collate(items)

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Augments where the network is."""
        data = self.dataset("train") if isinstance(batch, RawBatch) else None
        return data.finish(batch) if isinstance(data, InMemory) else batch

    def _read(self, train: bool) -> CIFARImages:
        name = "train" if train else "test"
        if self.sample:
            return CIFARImages(samples.build_once(self.root, "cifar100", samples.write_cifar100) / _FOLDER / name)
        path = self.root / _FOLDER / name
        if not path.is_file():
            raise FileNotFoundError(
                f"no CIFAR-100 in root={str(self.root)!r}: {path} does not exist. Fetch it (or unpack a "
                f"{ARCHIVE.filename} that lies in root) with --data.download=true, name the folder that holds "
                f"{_FOLDER} with --data.root, or try a small sample with --data.sample=true"
            )
        if not check_integrity(path, SUMS[name]):
            raise DataError(
                f"{path} is incomplete or changed: it does not have the md5 sum {SUMS[name]}. Remove {path.parent}, "
                "then fetch it with --data.download=true"
            )
        return CIFARImages(path)
