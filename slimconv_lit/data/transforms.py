"""What happens to an image before the network sees it, in torchvision.transforms.v2 only.

A transform is called as `transform(image, target)`, on a PIL image or a uint8 `tv_tensors.Image`, ImageNet's on an
`EncodedImage` too, and returns float32 (C, H, W), normalised, and the target. Evaluation transforms take an image of
any size; on one that has the right size their resizing does nothing. A target that is a `tv_tensors.Mask` (H, W),
uint8, goes the way of its image and becomes int64.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as v2f

from slimconv_lit.data.files import EncodedImage

Stats = tuple[tuple[float, ...], tuple[float, ...]]
"""Mean and standard deviation of each channel, for pixels between 0 and 1."""

CIFAR100_STATS: Stats = ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762))
IMAGENET_STATS: Stats = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def finish(stats: Stats) -> list[v2.Transform]:
    """The end of every recipe: PIL image or uint8 tensor to a normalised float32 tensor, and a mask to int64."""
    types = {tv_tensors.Image: torch.float32, tv_tensors.Mask: torch.int64, "others": None}
    # On pixels from 0 to 255: to bring them to 1 first is one pass more.
    mean, std = ([255 * value for value in values] for values in stats)
    return [v2.ToImage(), v2.ToDtype(types), v2.Normalize(mean, std, inplace=True), v2.ToPureTensor()]


class RandomPart(v2.RandomResizedCrop):
    """v2.RandomResizedCrop, which draws the same of an `EncodedImage` before that is decoded."""

    def forward(self, *inputs: Any) -> Any:
        """Takes (image, target)."""
        image, *rest = inputs
        if not isinstance(image, EncodedImage):
            return super().forward(*inputs)
        # It asks for the size alone.
        part = self.make_params([torch.empty(image.height, image.width, device="meta")])
        return image.part(**part, size=self.size), *rest


class ShorterSide(v2.Resize):
    """v2.Resize of the shorter side, which takes an `EncodedImage` too."""

    def forward(self, *inputs: Any) -> Any:
        """Takes (image, target)."""
        image, *rest = inputs
        if not isinstance(image, EncodedImage):
            return super().forward(*inputs)
        height, width = image.height, image.width
        size = [int(self.size[0] * side / min(height, width)) for side in (height, width)]
        return image.part(0, 0, height, width, size, reserve=2), *rest


def resize_and_crop(size: int, shorter: int, stats: Stats) -> v2.Compose:
    """The shorter side to `shorter` pixels (bilinear, antialiased), then the `size` x `size` pixels in the centre."""
    return v2.Compose([ShorterSide(shorter), v2.CenterCrop(size), *finish(stats)])


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
        [RandomPart(size), v2.RandomHorizontalFlip(), *extra, *finish(IMAGENET_STATS)],
    )


def imagenet_eval(size: int) -> v2.Compose:
    """The shorter side to `size / 0.875` pixels, then the centre: 256 for 224, 293 for the paper's "@256"."""
    return resize_and_crop(size, round(size / 0.875), IMAGENET_STATS)


class Resize(v2.Transform):
    """Image and mask to one size, by `scale` of both sides; the image bilinear and antialiased.

    Each pixel of a mask is the pixel below its centre. v2.Resize takes that to the left and above, so that mask and
    image part by half a pixel.

    Args:
        scale: The least and the greatest factor, between which one is drawn for each image.
        shorter: Instead of `scale`, the pixels of the shorter side.
    """

    def __init__(self, scale: tuple[float, float] = (1.0, 1.0), shorter: int | None = None) -> None:
        super().__init__()
        self.scale, self.shorter = scale, shorter

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        """Finds the factor, or draws it."""
        if self.shorter is None:
            return {"factor": float(torch.empty(()).uniform_(*self.scale))}
        return {"factor": self.shorter / min(v2f.get_size(flat_inputs[0]))}

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        """Resizes an image or a mask."""
        size = [max(1, round(side * params["factor"])) for side in v2f.get_size(inpt)]
        if not isinstance(inpt, tv_tensors.Mask):
            return v2f.resize(inpt, size, antialias=True)
        nearest = v2.InterpolationMode.NEAREST_EXACT
        return tv_tensors.Mask(v2f.resize(inpt.as_subclass(Tensor)[None], size, interpolation=nearest)[0])


def segmentation_train(size: int, flip: bool = True, scale: tuple[float, float] = (0.5, 2.0)) -> v2.Compose:
    """Resized by a random factor, `size` x `size` cropped at random, horizontal flip.

    The recipe of the reference repository (VainF). Where a crop reaches beyond its image, the image has the mean colour
    and the mask is 255.

    Args:
        size: Height and width in pixels.
        flip: Whether half of the images are mirrored.
        scale: The least and the greatest factor.
    """
    mean = tuple(round(255 * value) for value in IMAGENET_STATS[0])
    crop = v2.RandomCrop(size, pad_if_needed=True, fill={tv_tensors.Mask: 255, "others": mean})
    mirror = v2.RandomHorizontalFlip(0.5 if flip else 0.0)
    return v2.Compose([v2.ToImage(), Resize(scale), crop, mirror, *finish(IMAGENET_STATS)])


def segmentation_eval() -> v2.Compose:
    """The image as it is, normalised."""
    return v2.Compose(finish(IMAGENET_STATS))


def segmentation_crop(size: int) -> v2.Compose:
    """The shorter side to `size` pixels, then the `size` x `size` pixels in the centre."""
    return v2.Compose([v2.ToImage(), Resize(shorter=size), v2.CenterCrop(size), *finish(IMAGENET_STATS)])


def detection_train() -> v2.Compose:
    """Horizontal flip of image and boxes.

    Resizing and normalising are left to torchvision's detectors, which do both themselves.
    """
    return v2.Compose([v2.RandomHorizontalFlip(), *detection_eval().transforms])


def detection_eval() -> v2.Compose:
    """The image as it is, its pixels between 0 and 1."""
    types = {tv_tensors.Image: torch.float32, "others": None}
    return v2.Compose([v2.ToImage(), v2.ToDtype(types, scale=True), v2.ToPureTensor()])


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
