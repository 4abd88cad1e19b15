"""A part of a JPEG, decoded at a half, a quarter or an eighth, is the part of the whole picture."""

import io

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_sample_image
from torchvision.transforms import v2

from slimconv_lit.data import ImageNetDataModule
from slimconv_lit.data.files import DataError, EncodedImage, read_pixels
from slimconv_lit.data.transforms import IMAGENET_STATS, imagenet_eval, imagenet_train

PHOTO = Image.fromarray(load_sample_image("china.jpg"))
STD = 255 * torch.tensor(IMAGENET_STATS[1]).view(-1, 1, 1)


def stored(width, height, mode="RGB", kind="JPEG", **options):
    file = io.BytesIO()
    PHOTO.resize((width, height), Image.Resampling.LANCZOS).convert(mode).save(file, kind, **options)
    return file.getvalue()


def levels(transform, image, seed):
    """What a transform makes of an image, in grey levels, and what the generator draws next."""
    torch.manual_seed(seed)
    shown, _ = transform(image, 0)
    return shown * STD, torch.rand(())


def apart(split, content, seed):
    transform = imagenet_train(64) if split == "train" else imagenet_eval(64)
    ours, drawn = levels(transform, EncodedImage("photo.jpg", content), seed)
    whole, drawn_then = levels(transform, read_pixels("photo.jpg", content), seed)
    assert ours.shape == (3, 64, 64)
    assert drawn == drawn_then
    return (ours - whole).abs()


@pytest.mark.parametrize("split", ["train", "eval"])
def test_small_pictures_are_the_same_pixel_by_pixel(split):
    content = stored(100, 75)
    assert all(apart(split, content, seed).max() < 1e-3 for seed in range(5))


# 1283 and 961 are prime to 8, so that the last block of a scaled picture is a part of one.
KINDS = [{}, {"progressive": True}, {"subsampling": 0}, {"mode": "L"}]


@pytest.mark.parametrize("kind", KINDS, ids=["plain", "progressive", "4:4:4", "grey"])
@pytest.mark.parametrize(("split", "most"), [("train", 2.0), ("eval", 0.7)])
@pytest.mark.parametrize(("width", "height"), [(1283, 961), (961, 1283)])
def test_large_ones_differ_by_a_grey_level(split, most, width, height, kind):
    content = stored(width, height, **kind)
    differ = [apart(split, content, seed) for seed in range(4)]
    assert all(pixels.mean() < most for pixels in differ)
    # Else the whole picture was decoded.
    assert max(pixels.mean() for pixels in differ) > 0


@pytest.mark.parametrize("shrink", [2, 4, 8])
def test_where_a_part_lies_to_a_fraction_of_a_pixel(shrink):
    """A ramp from left to right tells where its part begins and ends."""
    ramp = np.tile(np.linspace(0, 255, 1283)[None, :, None], (300, 1, 3)).round().astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(ramp).save(file, "JPEG", quality=100, subsampling=0)
    left, size = 301, (30, 100)
    columns = EncodedImage("ramp.jpg", file.getvalue()).part(5, left, 280, shrink * 101, size).float().mean((0, 1))
    places = left + (torch.arange(100) + 0.5) * shrink * 1.01 - 0.5
    # One grey level is five pixels here, and half a pixel of the scaled picture a tenth of a level for each `shrink`.
    # Single columns are rounded, their mean is not.
    off = columns - 255 * places / 1282
    assert off.abs().max() < 1
    assert abs(float(off[5:-5].mean())) < 0.02 * shrink


@pytest.mark.parametrize(("mode", "kind"), [("CMYK", "JPEG"), ("RGB", "PNG"), ("P", "PNG"), ("L", "PNG")])
def test_other_kinds_are_decoded_whole(mode, kind):
    content = stored(400, 300, mode, kind)
    for split in ("train", "eval"):
        assert apart(split, content, 3).max() < 1e-3


def test_a_picture_can_be_asked_twice():
    picture = EncodedImage("photo.jpg", stored(640, 480))
    first = picture.part(0, 0, 480, 640, (48, 64))
    assert torch.equal(picture.part(0, 0, 480, 640, (48, 64)), first)
    assert picture.pixels().shape == (3, 480, 640)


def test_the_training_pipeline_against_torchvision_on_pil_images():
    """The parts that torchvision draws from a PIL image under the same seed, with what PIL makes of them."""
    content = stored(1000, 750)
    transform = imagenet_train(64)
    for seed in range(4):
        ours, _ = levels(transform, EncodedImage("photo.jpg", content), seed)
        torch.manual_seed(seed)
        pil = v2.Compose([v2.RandomResizedCrop(64), v2.RandomHorizontalFlip(), v2.ToImage()])(
            Image.open(io.BytesIO(content))
        )
        pil = pil.float() - 255 * torch.tensor(IMAGENET_STATS[0]).view(-1, 1, 1)
        assert (ours - pil).abs().mean() < 3


@pytest.mark.parametrize("damage", ["truncated", "no picture"])
def test_broken_ones_are_named(tmp_path, damage):
    content = stored(1000, 750)
    for split in ("train", "val"):
        (tmp_path / split / "cat").mkdir(parents=True)
        (tmp_path / split / "cat" / "half.JPEG").write_bytes(content[:20_000] if damage == "truncated" else b"none")
    data = ImageNetDataModule(root=str(tmp_path), image_size=64)
    for split, key in (("train", (0, 1)), ("val", 0)):
        with pytest.raises(DataError, match=r"half\.JPEG cannot be decoded: .*Copy or fetch it again"):
            data.dataset(split)[key]
