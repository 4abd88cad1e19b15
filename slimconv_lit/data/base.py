"""What all datamodules share: loaders whose order and augmentation depend on the seed alone, and pictures to predict.

In training, the sampler deals a random seed with every image. So what an image looks like in an epoch depends on the
datamodule's seed, the epoch and the image, and neither on the number of workers nor on where a run was interrupted.
"""

import os
import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol, TypeAlias

import numpy as np
import pytorch_lightning as pl
import torch
from PIL import Image, ImageOps
from pytorch_lightning.overrides.distributed import UnrepeatedDistributedSampler
from pytorch_lightning.utilities.seed import isolate_rng
from sklearn.model_selection import train_test_split
from torch.utils.data import DataLoader, Dataset, DistributedSampler, default_collate
from torchvision.datasets.folder import IMG_EXTENSIONS

from slimconv_lit.data.files import DataError, read_image
from slimconv_lit.data.loading import LeftOut, Loader, skipping

Split: TypeAlias = Literal["train", "val", "test"]
OnBadImage: TypeAlias = Literal["raise", "skip"]
Key: TypeAlias = int | tuple[int, int]
"""An index, or an index and the random seed that was dealt with it."""


class Source(Protocol):
    """Anything with a length and items that are tuples: (image, target) or (image, name)."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> tuple[Any, ...]: ...


class EpochSampler(DistributedSampler[Key]):
    """Every image once in an order drawn from (seed, epoch), each with a random seed of its own.

    Lightning calls `set_epoch` before each epoch, after a resume too. Of several devices each takes its turn in the one
    order: together, the batches of a step are the batch that one device would have with as many images. So that all
    have the same number of images, the first few of the order are dealt once more where it does not divide.

    Args:
        length: The number of images.
        seed: Not negative.
        num_replicas: How many devices share the images.
        rank: Which of them this is, from 0.
    """

    # A `DistributedSampler`, for Lightning puts its own around any other, and does not hand `set_epoch` on to it: on
    # several devices, all epochs would be the first.
    def __init__(self, length: int, seed: int, num_replicas: int = 1, rank: int = 0) -> None:
        super().__init__(range(length), num_replicas, rank, seed=seed)  # type: ignore[arg-type]
        self.length = length

    def __iter__(self) -> Iterator[Key]:
        rng = np.random.default_rng((self.seed, self.epoch))
        order = rng.permutation(self.length)
        seeds = rng.integers(2**32, size=self.length)
        mine = np.arange(self.rank, self.total_size, self.num_replicas) % self.length
        return zip(order[mine].tolist(), seeds[mine].tolist(), strict=True)


class Transformed(Dataset[tuple[Any, ...]]):
    """A source behind a `torchvision.transforms.v2` transform, which is handed image and target together.

    The generators of torch (on the CPU), numpy and Python follow the dealt seed, and are afterwards where they were.

    Args:
        source: Images and targets as they are stored.
        transform: Called as `transform(image, target)`.
    """

    def __init__(self, source: Source, transform: Callable[..., tuple[Any, ...]]) -> None:
        self.source, self.transform = source, transform

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, key: Key) -> tuple[Any, ...]:
        if not isinstance(key, tuple):
            return self.transform(*self.source[key])
        index, seed = key
        with isolate_rng(include_cuda=False):
            # `torch.manual_seed` would reseed the GPU, and with it the dropout of the network, at every image.
            torch.default_generator.manual_seed(seed)
            np.random.seed(seed)
            random.seed(seed)
            return self.transform(*self.source[index])


class Named(Dataset[tuple[Any, str]]):
    """The images of a dataset with names ("test/00012") in the place of targets."""

    def __init__(self, dataset: Dataset[tuple[Any, ...]], prefix: str) -> None:
        self.dataset, self.prefix = dataset, prefix

    def __len__(self) -> int:
        return len(self.dataset)  # type: ignore[arg-type]

    def __getitem__(self, index: int) -> tuple[Any, str]:
        return self.dataset[index][0], f"{self.prefix}/{index:05d}"


class FolderImages:
    """(PIL image, path relative to `folder`) of every image below `folder`, sorted by path; hidden files are left out.

    Args:
        folder: Where to look, subfolders too.
        mode: PIL's colour mode that all images are converted to: "RGB" or "L".

    Raises:
        FileNotFoundError: If there is no such folder or no image in it; the message lists the accepted suffixes.
    """

    def __init__(self, folder: str | Path, mode: str) -> None:
        self.folder, self.mode = Path(folder), mode
        files = (p.relative_to(folder) for p in self.folder.rglob("*") if p.suffix.lower() in IMG_EXTENSIONS)
        self.names = sorted(p.as_posix() for p in files if not p.name.startswith("."))
        if not self.names:
            problem = "has no image" if self.folder.is_dir() else "is not a folder"
            raise FileNotFoundError(f"predict_dir={str(folder)!r} {problem}; accepted: {', '.join(IMG_EXTENSIONS)}")

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> tuple[Image.Image, str]:
        image = read_image(self.folder / self.names[index], mode=None)
        # A phone stores upright photos lying, with a note how to turn them.
        return ImageOps.exif_transpose(image).convert(self.mode), self.names[index]


def hold_out(targets: Sequence[int], fraction: float, seed: int) -> tuple[list[int], list[int]]:
    """Indices (kept, held out), both sorted; every class loses the same fraction of its images.

    Raises:
        ValueError: If `fraction` is not between 0 and 1 or leaves a side with fewer images than classes.
    """
    if not 0 < fraction < 1:
        raise ValueError(f"the held-out fraction must lie between 0 and 1, not {fraction}")
    kept, held = train_test_split(range(len(targets)), test_size=fraction, random_state=seed, stratify=targets)
    return sorted(kept), sorted(held)


def cpu_count() -> int:
    """The CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class BaseDataModule(pl.LightningDataModule):
    """Base of all datamodules. A subclass sets the attributes, `make_dataset` and, where needed, `prepare_data`.

    Batches of train, val and test are (images, targets): float32 (B, C, H, W), normalised, and int64 (B,). Batches of
    predict are (images, names), names a list of text. A subclass keeps its arguments with
    `save_hyperparameters(logger=False)`: then `load_from_checkpoint` rebuilds it from a checkpoint alone.

    Training drops its last batch when that would be a single image (on each device): BatchNorm has no variance to
    estimate on a 1x1 map of one image. Because the order changes with the epoch, no image is left out for good.

    Args:
        root: Folder that the data set lies in.
        batch_size: Images per training step on each device.
        eval_batch_size: Images per step elsewhere; None means `batch_size`.
        num_workers: Processes that load images; None means one per CPU core, at most `max_workers`.
        seed: Of the training order and the augmentation; not negative.
        sample: Read a small data set in the same layout, built below `root` from embedded images, not the real one.
        predict_dir: Predict all images below this folder; None predicts the test images.
        pin_memory: Load into page-locked memory; None does so where CUDA is available.
        on_bad_image: "raise" stops at a picture that cannot be read and names it; "skip" goes on without it as long as
            no more than 1 % of them are missing, or any number in prediction.

    Attributes:
        left_out: What "skip" passed over, one message for each picture.
        num_classes: Known right after construction, like all below, with no data on disk.
        class_names: Names in the order of the labels.
        input_size: (C, H, W) of an image as the network is tested on it.
        mean: Per channel, taken off the pixels (0 to 1) of an image; `images * std + mean` gives them back.
        std: Per channel, what they are then divided by.
        eval_transform: From a PIL image of any size to what the network is tested on.
        max_workers: See `num_workers`.
    """

    num_classes: int
    class_names: tuple[str, ...]
    input_size: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    eval_transform: Callable[..., tuple[Any, ...]]
    max_workers: ClassVar[int] = 4

    def __init__(
        self,
        root: str = "data",
        batch_size: int = 128,
        eval_batch_size: int | None = None,
        num_workers: int | None = None,
        seed: int = 0,
        sample: bool = False,
        predict_dir: str | None = None,
        pin_memory: bool | None = None,
        on_bad_image: OnBadImage = "raise",
    ) -> None:
        super().__init__()
        least_of = {"batch_size": 1, "eval_batch_size": 1, "num_workers": 0, "seed": 0}
        given = (batch_size, batch_size if eval_batch_size is None else eval_batch_size, num_workers or 0, seed)
        for (name, least), value in zip(least_of.items(), given, strict=True):
            if value < least:
                raise ValueError(f"{name}={value} must be at least {least}")
        self.root = Path(root)
        self.batch_size = batch_size
        self.eval_batch_size = eval_batch_size or batch_size
        self.num_workers = min(cpu_count(), self.max_workers) if num_workers is None else num_workers
        self.seed = seed
        self.sample = sample
        self.predict_dir = predict_dir
        self.pin_memory = torch.cuda.is_available() if pin_memory is None else pin_memory
        self.on_bad_image = on_bad_image
        self._datasets: dict[Split, Dataset[tuple[Any, ...]]] = {}
        self._left_out: list[LeftOut] = []

    def make_dataset(self, split: Split) -> Dataset[tuple[Any, ...]]:
        """The (image, target) pairs of a split, transformed; `train` also takes the keys of an `EpochSampler`.

        Raises:
            FileNotFoundError: If the data are not there; the message names what was looked for and the ways out.
        """
        raise NotImplementedError

    @staticmethod
    def collate(items: list[tuple[Any, ...]]) -> tuple[Any, ...]:
        """How (image, target) or (image, name) items become a batch; for another kind of batch, override it."""
        images, targets = default_collate(items)
        return images, list(targets) if isinstance(targets, tuple) else targets

    def dataset(self, split: Split) -> Dataset[tuple[Any, ...]]:
        """`make_dataset`, called once for each split."""
        if split not in self._datasets:
            self._datasets[split] = self.make_dataset(split)
        return self._datasets[split]

    def predict_dataset(self) -> Dataset[tuple[Any, ...]]:
        """The (image, name) pairs to predict: the images below `predict_dir`, or the test images."""
        if self.predict_dir is None:
            return Named(self.dataset("test"), "test")
        return Transformed(
            FolderImages(self.predict_dir, "L" if self.input_size[0] == 1 else "RGB"), self.eval_transform
        )

    def setup(self, stage: str) -> None:
        """Reads what a stage needs, so that missing data stop a run at its start."""
        splits: dict[str, tuple[Split, ...]] = {"fit": ("train", "val"), "validate": ("val",), "test": ("test",)}
        for split in splits.get(stage, ()):
            self.dataset(split)
        if stage == "predict":
            self.predict_dataset()

    def train_dataloader(self) -> DataLoader[Any]:
        """Shuffled and augmented (images, targets)."""
        sampler = EpochSampler(len(self.dataset("train")), self.seed, **self.replica)  # type: ignore[arg-type]
        drop_last = len(sampler) > self.batch_size and len(sampler) % self.batch_size == 1
        data, workers = self.dataset("train"), self.train_workers
        return self._loader(data, self.batch_size, workers, sampler=sampler, drop_last=drop_last, done=self._done)

    def _done(self) -> int:
        """Batches of this epoch that a resumed run has behind it."""
        trainer = self.trainer
        return trainer.fit_loop.epoch_loop.batch_progress.current.ready if trainer and trainer.training else 0

    @property
    def train_workers(self) -> int:
        """Processes that load training images."""
        return self.num_workers

    @property
    def replica(self) -> dict[str, int]:
        """How many devices share the images, and which of them this is: arguments of a `DistributedSampler`."""
        dealt: dict[str, int] | None = self.trainer.distributed_sampler_kwargs if self.trainer else None
        return dealt or {"num_replicas": 1, "rank": 0}

    def val_dataloader(self) -> DataLoader[Any]:
        """(images, targets) in their stored order."""
        return self._loader(self.dataset("val"), self.eval_batch_size)

    def test_dataloader(self) -> DataLoader[Any]:
        """(images, targets) in their stored order."""
        return self._loader(self.dataset("test"), self.eval_batch_size)

    def predict_dataloader(self) -> DataLoader[Any]:
        """(images, names) in the order of the names."""
        return self._loader(self.predict_dataset(), self.eval_batch_size, ceiling=None)

    @property
    def left_out(self) -> list[str]:
        """Messages of the pictures that could not be read, and were passed over."""
        return [message for part in self._left_out for message in part.messages]

    def _loader(
        self,
        dataset: Dataset[Any],
        batch_size: int,
        workers: int | None = None,
        ceiling: float | None = 0.01,
        **own: Any,
    ) -> DataLoader[Any]:
        workers = self.num_workers if workers is None else workers
        collate: Callable[..., Any] = self.collate
        # Images in memory come as whole batches, and have been read.
        if self.on_bad_image == "skip" and not hasattr(dataset, "__getitems__"):
            dataset, collate, own["left_out"] = skipping(dataset, collate, replace="sampler" in own, ceiling=ceiling)
            self._left_out.append(own["left_out"])
        if "sampler" not in own and self.replica["num_replicas"] > 1:
            own["sampler"] = self._unrepeated(dataset)
        return Loader(
            dataset,
            batch_size=batch_size,
            num_workers=workers,
            persistent_workers=workers > 0,
            pin_memory=self.pin_memory,
            collate_fn=collate,
            # Where workers take their seeds from. Without it, every iterator would draw from torch's own generator, and
            # a run that was resumed asks for more of them.
            generator=torch.Generator(),
            **own,
        )

    def _unrepeated(self, dataset: Dataset[Any]) -> UnrepeatedDistributedSampler:
        """Deals each image once, and none twice as Lightning's own choice does: metrics are those of the data set."""
        devices, images = self.replica["num_replicas"], len(dataset)  # type: ignore[arg-type]
        if images < devices:
            raise DataError(f"{images} images cannot be shared among {devices} devices: use at most {images} of them")
        return UnrepeatedDistributedSampler(dataset, **self.replica, shuffle=False)
