"""The digits that scikit-learn carries: 1,797 real handwritten digits, 8x8 pixels, never a download.

Source: E. Alpaydin and C. Kaynak, "Optical Recognition of Handwritten Digits", https://doi.org/10.24432/C50P49
(its test part), bright ink on black. They are the default data set of quick starts and tests.
"""

from collections.abc import Sequence
from typing import Any

import torch
from sklearn.datasets import load_digits
from torch import Tensor
from torch.nn import functional
from torch.utils.data import Dataset

from slimconv_lit.data.base import BaseDataModule, Key, OnBadImage, Split, hold_out
from slimconv_lit.data.transforms import Stats, digits_eval, random_affine

# Of all 1,797 digits at 16x16; at 32x32 the deviation is 0.3236.
DIGITS_STATS: Stats = ((0.3053,), (0.3189,))


class DigitsDataset(Dataset[tuple[Tensor, int]]):
    """Digits in memory, normalised and, in training, moved a little, a whole batch at once.

    Args:
        images: (N, C, H, W) with pixels between 0 and 1.
        targets: N labels.
        stats: Mean and deviation of each channel.
        augment: Apply `random_affine`.
    """

    def __init__(self, images: Tensor, targets: Tensor, stats: Stats, augment: bool) -> None:
        self.images, self.targets, self.augment = images, targets.tolist(), augment
        self.mean, self.std = (torch.tensor(values).view(-1, 1, 1) for values in stats)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, key: Key) -> tuple[Tensor, int]:
        return self.__getitems__([key])[0]

    def __getitems__(self, keys: Sequence[Key]) -> list[tuple[Tensor, int]]:
        """What DataLoader calls, where it is there, for all items of a batch."""
        indices = [key[0] if isinstance(key, tuple) else key for key in keys]
        images = self.images[indices]
        if self.augment:
            seeds = [key[1] if isinstance(key, tuple) else int(torch.randint(2**32, ())) for key in keys]
            images = random_affine(images, seeds)
        images = (images - self.mean) / self.std
        return [(image, self.targets[index]) for image, index in zip(images, indices, strict=True)]


class DigitsDataModule(BaseDataModule):
    """Handwritten digits: about 1,257 to train, 180 to validate and 360 to test, every class in the same proportion.

    `predict_dir` takes gray or colour images, best bright ink on black like the digits themselves.

    Args:
        batch_size: Images per training step on each device.
        eval_batch_size: Images per step elsewhere; None means `batch_size`.
        num_workers: Processes that load images; none are needed, the digits lie in memory.
        seed: Of the training order and the augmentation.
        split_seed: Of the split; apart from `seed`, so that runs with different seeds are tested on the same digits.
        image_size: Height and width in pixels that the digits are enlarged to (bilinear); at least 8.
        channels: 1, or 3 for networks that read colour images (the same gray three times).
        predict_dir: Predict all images below this folder; None predicts the test digits.
        pin_memory: Load into page-locked memory; None does so where CUDA is available.
        on_bad_image: "raise" stops at a picture that cannot be read and names it; "skip" goes on without it as long as
            no more than 1 % of them are missing, or any number in prediction.

    Raises:
        ValueError: If `image_size` or `channels` has another value.
    """

    def __init__(
        self,
        batch_size: int = 64,
        eval_batch_size: int | None = 256,
        num_workers: int = 0,
        seed: int = 0,
        split_seed: int = 0,
        image_size: int = 16,
        channels: int = 1,
        predict_dir: str | None = None,
        pin_memory: bool | None = None,
        on_bad_image: OnBadImage = "raise",
    ) -> None:
        super().__init__(
            batch_size=batch_size,
            eval_batch_size=eval_batch_size,
            num_workers=num_workers,
            seed=seed,
            predict_dir=predict_dir,
            pin_memory=pin_memory,
            on_bad_image=on_bad_image,
        )
        if channels not in (1, 3):
            raise ValueError(f"channels={channels} must be 1 or 3")
        if image_size < 8:
            raise ValueError(f"image_size={image_size} must be at least 8, the size of the stored digits")
        self.save_hyperparameters(logger=False)
        if not 0 <= split_seed < 2**32:
            raise ValueError(f"split_seed={split_seed} must be at least 0 and below 2**32")
        self.split_seed = split_seed
        self.num_classes = 10
        self.class_names = tuple("0123456789")
        self.input_size = (channels, image_size, image_size)
        self.mean, self.std = (values * channels for values in DIGITS_STATS)
        self.eval_transform = digits_eval(image_size, (self.mean, self.std))

    def make_dataset(self, split: Split) -> Dataset[tuple[Any, ...]]:
        """The digits of a split."""
        pixels, labels = load_digits(return_X_y=True)
        targets = torch.from_numpy(labels)
        rest, test = hold_out(labels, 0.2, self.split_seed)
        train, val = hold_out(labels[rest], 0.125, self.split_seed)
        indices = {"train": [rest[i] for i in train], "val": [rest[i] for i in val], "test": test}[split]
        channels, size, _ = self.input_size
        images = torch.from_numpy(pixels).float().view(-1, 1, 8, 8)[indices] / 16
        images = functional.interpolate(images, size=(size, size), mode="bilinear").repeat(1, channels, 1, 1)
        return DigitsDataset(images, targets[indices], (self.mean, self.std), augment=split == "train")
