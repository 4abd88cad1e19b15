"""Small images that are decoded once and augmented a whole batch at a time, on the device that trains.

    B batch   N images   C channels   S side

Image by image, torchvision's transforms take longer than a small network's training step. Here crop, flip and rotation
are one gather over the batch. What an image looks like follows from its own seed alone, on every device.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.data import Dataset

from slimconv_lit.data.base import Key
from slimconv_lit.data.transforms import Stats


class RawBatch(NamedTuple):
    """A batch before it is augmented.

    Attributes:
        images: (B, C, S, S), uint8.
        targets: (B,), int64.
        seeds: (B,), int64.
    """

    images: Tensor
    targets: Tensor
    seeds: Tensor


class Draws(NamedTuple):
    """What is done to each image of a batch.

    Attributes:
        top: (B,), int64: the first row of the crop, in the padded image.
        left: (B,), int64: its first column.
        mirrored: (B,), bool.
        angle: (B,), degrees counter-clockwise.
        hole: (2, B), int64: row and column of the centre of what is cut out.
    """

    top: Tensor
    left: Tensor
    mirrored: Tensor
    angle: Tensor
    hole: Tensor


def uniforms(seeds: Tensor, count: int) -> Tensor:
    """(count, B) numbers from 0 on and below 1, drawn from (B,) seeds: the generator SplitMix64 (Steele et al., 2014).

    torch's own generators have one seed for a whole batch, and give other numbers on other devices.
    """

    def shifted(z: Tensor, bits: int) -> Tensor:
        # torch shifts the sign in; SplitMix64 has none.
        return (z >> bits) & ((1 << (64 - bits)) - 1)

    def signed(value: int) -> int:
        return value - (1 << 64) if value >= 1 << 63 else value

    steps = torch.arange(1, count + 1, device=seeds.device)[:, None]
    z = seeds * signed(0xD1342543DE82EF95) + steps * signed(0x9E3779B97F4A7C15)
    z = (z ^ shifted(z, 30)) * signed(0xBF58476D1CE4E5B9)
    z = (z ^ shifted(z, 27)) * signed(0x94D049BB133111EB)
    return shifted(z ^ shifted(z, 31), 40).float() / (1 << 24)


@dataclass(frozen=True)
class BatchAugment:
    """Random crop of the padded image, horizontal flip, rotation (nearest pixel), and a square that is cut out.

    Attributes:
        padding: Black pixels on each side before the crop.
        flip: Whether half of the images are mirrored.
        rotation: The largest angle either way, in degrees.
        cutout: Side of the square in pixels (DeVries & Taylor, 2017, https://arxiv.org/abs/1708.04552); it may lie
            partly outside, and has the mean colour. 0 for none.
    """

    padding: int = 4
    flip: bool = True
    rotation: float = 15.0
    cutout: int = 0

    def draw(self, seeds: Tensor, side: int) -> Draws:
        """What happens to images of `side` pixels with these seeds."""
        top, left, coin, angle, *hole = uniforms(seeds, 6)
        places = 2 * self.padding + 1
        return Draws(
            (top * places).long(),
            (left * places).long(),
            (coin < 0.5) if self.flip else torch.zeros_like(coin, dtype=torch.bool),
            (2 * angle - 1) * self.rotation,
            (torch.stack(hole) * side).long(),
        )

    def move(self, images: Tensor, draws: Draws) -> Tensor:
        """Crops, mirrors, then turns (B, C, S, S)."""
        side = images.shape[-1]
        padded = functional.pad(images, [self.padding] * 4)
        centre, wide = (side - 1) / 2, side + 2 * self.padding
        line = torch.arange(side, device=images.device) - centre
        cos, sin = draws.angle.deg2rad().cos(), draws.angle.deg2rad().sin()

        # For each pixel, the one that the rotation brings there: (B, S, S).
        def turned(of_row: Tensor, of_column: Tensor) -> Tensor:
            rows, columns = of_row[:, None] * line, of_column[:, None] * line
            return (rows[:, :, None] + columns[:, None, :]).add_(centre).round_().to(torch.int32)

        row, column = turned(cos, sin), turned(-sin, cos)
        inside = (row >= 0) & (row < side) & (column >= 0) & (column < side)
        # A mirrored image is read from its other end.
        way = torch.where(draws.mirrored, -1, 1).int()
        start = torch.where(draws.mirrored, side - 1, 0) + draws.left
        row.add_(draws.top.int()[:, None, None]).mul_(wide)
        column.mul_(way[:, None, None]).add_(start.int()[:, None, None])
        # What lies outside reads the padded image's first pixel, and is blackened.
        index = torch.where(inside, row + column, 0).flatten(1).long()
        flat = padded.flatten(2).gather(2, index[:, None].expand(-1, images.shape[1], -1))
        return flat.view_as(images) * inside[:, None]

    def __call__(self, images: Tensor, seeds: Tensor, stats: Stats) -> Tensor:
        """(B, C, S, S) uint8 with (B,) seeds to float32, normalised."""
        side = images.shape[-1]
        draws = self.draw(seeds, side)
        finished = normalise(self.move(images, draws), stats)
        if self.cutout:
            line = torch.arange(side, device=images.device)
            first = draws.hole - self.cutout // 2
            row, column = ((line >= f[:, None]) & (line < f[:, None] + self.cutout) for f in first)
            finished.masked_fill_((row[:, :, None] & column[:, None, :])[:, None], 0.0)
        return finished


def normalise(images: Tensor, stats: Stats) -> Tensor:
    """(B, C, H, W) uint8 to float32, less the mean and divided by the deviation of each channel."""
    mean, deviation = (torch.tensor(values, device=images.device).view(-1, 1, 1) * 255 for values in stats)
    return images.float().sub_(mean).div_(deviation)


class InMemory(Dataset[tuple[Any, ...]]):
    """Images in memory as they are stored, augmented as they are asked for.

    Args:
        images: (N, C, S, S), uint8.
        targets: N labels.
        stats: Mean and deviation of each channel.
        augment: What is done to them.

    Attributes:
        raw: Hand batches on as they are, for `finish` to be called on the device that trains.
    """

    def __init__(self, images: Tensor, targets: Sequence[int], stats: Stats, augment: BatchAugment) -> None:
        self.images, self.targets, self.stats, self.augment = images, torch.tensor(targets), stats, augment
        self.raw = False

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, key: Key) -> tuple[Tensor, int]:
        images, targets = self.finish(self._batch([key]))
        return images[0], int(targets[0])

    def __getitems__(self, keys: Sequence[Key]) -> RawBatch | tuple[Tensor, Tensor]:
        """What DataLoader calls, where it is there: a whole batch."""
        batch = self._batch(keys)
        return batch if self.raw else self.finish(batch)

    def _batch(self, keys: Sequence[Key]) -> RawBatch:
        """The batch of these keys; without one dealt with it, an image gets a new seed."""
        pairs = [key if isinstance(key, tuple) else (key, int(torch.randint(2**32, ()))) for key in keys]
        indices, seeds = torch.tensor(pairs).unbind(1)
        return RawBatch(self.images[indices], self.targets[indices], seeds)

    def finish(self, batch: RawBatch) -> tuple[Tensor, Tensor]:
        """(images (B, C, S, S) float32, normalised, targets (B,)), on the device that the batch is on."""
        return self.augment(batch.images, batch.seeds, self.stats), batch.targets
