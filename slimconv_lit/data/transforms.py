"""What happens to an image before the network sees it, in torchvision.transforms.v2 only.

A transform is called as `transform(image, target)` on a PIL image and returns float32 (C, H, W), normalised, and the
target. Evaluation transforms take an image of any size; on one that has the right size their resizing does nothing.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional
from torchvision.transforms import v2

Stats = tuple[tuple[float, ...], tuple[float, ...]]
"""Mean and standard deviation of each channel, for pixels between 0 and 1."""

CIFAR100_STATS: Stats = ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762))
IMAGENET_STATS: Stats = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def finish(stats: Stats) -> list[v2.Transform]:
    """The end of every recipe: PIL image or tensor to a normalised float32 tensor."""
    return [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(*stats), v2.ToPureTensor()]


def resize_and_crop(size: int, shorter: int, stats: Stats) -> v2.Compose:
    """The shorter side to `shorter` pixels (bilinear, antialiased), then the `size` x `size` pixels in the centre."""
    return v2.Compose([v2.Resize(shorter), v2.CenterCrop(size), *finish(stats)])


def cifar100_train(trivial_augment: bool = False) -> v2.Compose:
    """Crop 32 out of 40 padded pixels, horizontal flip, rotation up to 15 degrees either way.

    The recipe of the reference CIFAR-100 repository (weiaicunzai), whose networks the paper compares with.

    Args:
        trivial_augment: Add TrivialAugmentWide (https://arxiv.org/abs/2103.10158), which no paper here used.
    """
    extra = [v2.TrivialAugmentWide()] if trivial_augment else []
    plain = [v2.RandomCrop(32, padding=4), v2.RandomHorizontalFlip(), v2.RandomRotation(15)]
    return v2.Compose([*plain, *extra, *finish(CIFAR100_STATS)])


def imagenet_train(size: int, trivial_augment: bool = False) -> v2.Compose:
    """A random part of the image (8 to 100 % of its area) resized to `size` x `size`, and horizontal flip.

    Args:
        size: Height and width in pixels.
        trivial_augment: Add TrivialAugmentWide (https://arxiv.org/abs/2103.10158), which no paper here used.
    """
    extra = [v2.TrivialAugmentWide()] if trivial_augment else []
    return v2.Compose(
        [v2.RandomResizedCrop(size), v2.RandomHorizontalFlip(), *extra, *finish(IMAGENET_STATS)],
    )


def imagenet_eval(size: int) -> v2.Compose:
    """The shorter side to `size / 0.875` pixels, then the centre: 256 for 224, 293 for the paper's "@256"."""
    return resize_and_crop(size, round(size / 0.875), IMAGENET_STATS)


def digits_eval(size: int, stats: Stats) -> v2.Compose:
    """Resized to `size` x `size` pixels (bilinear, antialiased), whatever the shape was."""
    return v2.Compose([v2.Resize((size, size)), *finish(stats)])


def random_affine(images: Tensor, seeds: Sequence[int]) -> Tensor:
    """Turns each image by up to 10 degrees, moves it and scales it by up to 10 %; bilinear, black outside.

    A whole batch at once: image by image, v2.RandomAffine takes longer than a small network's training step.

    Args:
        images: (B, C, H, W), square.
        seeds: One for each image; an image's change follows from its own seed alone.
    """
    draws = [torch.rand(4, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    turn, right, down, zoom = (torch.stack(draws, dim=1) * 2 - 1).unbind()
    # affine_grid's unit is half an image, so a tenth of the image is 0.2.
    angle, scale = turn * math.radians(10), 1 + 0.1 * zoom
    cos, sin = angle.cos() * scale, angle.sin() * scale
    theta = torch.stack([cos, -sin, 0.2 * right, sin, cos, 0.2 * down], dim=1).view(-1, 2, 3)
    grid = functional.affine_grid(theta, list(images.shape), align_corners=False)
    return functional.grid_sample(images, grid, align_corners=False)
