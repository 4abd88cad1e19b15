import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch.nn import functional
from torchvision import tv_tensors

from slimconv_lit.data.transforms import (
    IMAGENET_STATS,
    Resize,
    segmentation_crop,
    segmentation_eval,
    segmentation_train,
)

MEAN, STD = (torch.tensor(values).view(-1, 1, 1) for values in IMAGENET_STATS)


def painted(rng, height, width):
    """An image of large flat patches, and the labels (0 to 20) that it is painted by."""
    labels = rng.integers(0, 21, (1 + height // 24, 1 + width // 24)).astype(np.uint8).repeat(24, 0).repeat(24, 1)
    labels = labels[:height, :width]
    return Image.fromarray(np.stack([labels * 12] * 3, -1)), tv_tensors.Mask(torch.from_numpy(labels.copy()))


def grey(image):
    return (image * STD + MEAN)[0] * 255


def run(transform, seed, *items):
    torch.manual_seed(seed)
    return transform(*items)


sides = st.integers(1, 150)


@settings(max_examples=30)
@given(height=sides, width=sides, size=st.integers(16, 96), seed=st.integers(0, 2**31))
@pytest.mark.parametrize("make", [segmentation_train, segmentation_crop])
def test_image_and_mask_stay_together(make, height, width, size, seed):
    image, mask = run(make(size), seed, *painted(np.random.default_rng(seed), height, width))
    assert image.shape == (3, size, size)
    assert (image.dtype, mask.dtype, mask.shape) == (torch.float32, torch.int64, (size, size))
    assert set(mask.unique().tolist()) <= {*range(21), 255}
    beyond = mask == 255
    # Close to zero, not zero: the mean colour is rounded to whole pixel values.
    assert (image[:, beyond].abs() < 0.01).all()
    # Where patches meet, colours mix over as many pixels as the resizing smears; there, labels say nothing.
    smear = 3 + math.ceil(max(2, size / min(height, width)))
    inside = even(mask, smear) & ~beyond
    assert ((grey(image) - 12 * mask)[inside].abs() < 1).all()


def even(mask, radius):
    """Where all pixels as near as `radius` are in the crop and, if in the image at all, have one label."""

    def highest(values):
        room = functional.pad(values[None], [radius] * 4, value=50.0)
        return functional.max_pool2d(room, 2 * radius + 1, stride=1)[0]

    known = mask.float()
    return highest(known.where(mask != 255, -1.0)) == -highest((-known).where(mask != 255, -99.0))


@settings(max_examples=25)
@given(height=sides, width=sides)
def test_whole_images_keep_size_pixels_and_labels(height, width):
    stored, labels = painted(np.random.default_rng(0), height, width)
    image, mask = segmentation_eval()(stored, labels)
    assert torch.equal(mask, labels.long())
    assert torch.equal(grey(image).round().to(torch.uint8), torch.from_numpy(np.array(stored))[..., 0])


def test_what_comes_out_depends_on_the_seed_alone():
    pair = painted(np.random.default_rng(0), 90, 120)
    transform = segmentation_train(64)
    first, again, other = (run(transform, seed, *pair) for seed in (1, 1, 2))
    np.random.seed(5)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0], other[0])


def test_the_training_recipe_scales_flips_and_moves():
    """A dot shows where it went, and how large."""
    image, mask = Image.new("RGB", (64, 64)), torch.zeros(64, 64, dtype=torch.uint8)
    mask[28:36, 12:20] = 1
    transform = segmentation_train(64)
    areas, columns = [], []
    for seed in range(200):
        _, out = run(transform, seed, image, tv_tensors.Mask(mask))
        ys, xs = torch.nonzero(out == 1, as_tuple=True)
        if len(ys) and min(ys.min(), xs.min()) > 0 and max(ys.max(), xs.max()) < 63:
            areas.append((len(ys) / 64) ** 0.5)
            columns.append(float(xs.float().mean()))
    assert 0.5 <= min(areas) < 0.65
    assert 1.8 < max(areas) <= 2.01
    assert min(columns) < 12
    assert max(columns) > 52
    assert sum(column > 32 for column in columns) > 50


@pytest.mark.parametrize(("factor", "size"), [(0.5, (20, 15)), (2.0, (80, 60)), (0.01, (1, 1))])
def test_a_resized_mask_lies_where_its_image_does(factor, size):
    ramp = torch.arange(30).repeat(40, 1).to(torch.uint8) * 8
    image, mask = Resize((factor, factor))(tv_tensors.Image(ramp[None]), tv_tensors.Mask(ramp))
    assert image.shape[1:] == mask.shape == size
    if factor > 0.1:
        # Each is the ramp, up to rounding; v2.Resize leaves the mask 2 darker at 0.5.
        inner = (image[0].float() - mask.float())[4:-4, 4:-4]
        assert inner.mean().abs() <= 0.5 if factor > 1 else inner.abs().max() <= 4
