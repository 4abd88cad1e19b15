"""The batch way is torchvision's way: the same images for the same draws, and draws with the same distribution."""

import numpy as np
import pytest
import torch
from scipy import stats
from torchvision.transforms.v2 import functional as v2f

from slimconv_lit.data import CIFAR100DataModule
from slimconv_lit.data.batched import BatchAugment, InMemory, RawBatch, uniforms
from slimconv_lit.data.transforms import CIFAR100_STATS

SIDE = 32


def images(count):
    # No pixel is black, so that what came from outside can be told.
    return torch.randint(1, 256, (count, 3, SIDE, SIDE), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def test_moves_are_torchvisions_one_by_one():
    batch, augment = images(200), BatchAugment()
    draws = augment.draw(torch.arange(200), SIDE)
    moved = augment.move(batch, draws)
    differing = 0
    for i, image in enumerate(batch):
        wanted = v2f.crop(v2f.pad(image, [4]), int(draws.top[i]), int(draws.left[i]), SIDE, SIDE)
        wanted = v2f.horizontal_flip(wanted) if draws.mirrored[i] else wanted
        wanted = v2f.rotate(wanted, float(draws.angle[i]))
        differing += (wanted != moved[i]).any(0).sum().item()
    # Where a pixel falls between two, rounding decides.
    assert differing < 1e-4 * 200 * SIDE**2


def test_draws_are_uniform_and_independent():
    numbers = uniforms(torch.arange(20_000) * 7919 + 2**31, 6).double().numpy()
    assert ((numbers >= 0) & (numbers < 1)).all()
    for one in numbers:
        assert stats.kstest(one, "uniform").pvalue > 1e-4
    assert np.abs(np.corrcoef(numbers) - np.eye(6)).max() < 0.03
    # Seeds that are neighbours have nothing in common.
    assert abs(np.corrcoef(numbers[0][:-1], numbers[0][1:])[0, 1]) < 0.03


def test_draws_have_the_distribution_of_the_recipe():
    draws = BatchAugment(cutout=8).draw(torch.randint(2**32, (30_000,)), SIDE)
    for places in (draws.top, draws.left):
        counts = torch.bincount(places, minlength=9)
        assert len(counts) == 9
        assert stats.chisquare(counts.numpy()).pvalue > 1e-4
    assert draws.mirrored.float().mean().item() == pytest.approx(0.5, abs=0.02)
    assert stats.kstest(draws.angle.numpy() / 30 + 0.5, "uniform").pvalue > 1e-4
    assert (draws.hole.min().item(), draws.hole.max().item()) == (0, SIDE - 1)


def test_an_image_follows_from_its_own_seed_alone():
    batch, seeds, augment = images(6), torch.arange(6) + 2**31, BatchAugment(cutout=8)
    whole = augment(batch, seeds, CIFAR100_STATS)
    for i in range(6):
        assert torch.equal(augment(batch[i : i + 1], seeds[i : i + 1], CIFAR100_STATS)[0], whole[i])
    assert not torch.equal(whole, augment(batch, seeds + 1, CIFAR100_STATS))


def test_nothing_asked_for_is_the_image_itself():
    batch = images(4)
    still = BatchAugment(padding=0, flip=False, rotation=0)
    assert torch.equal(still.move(batch, still.draw(torch.arange(4), SIDE)), batch)


def test_what_is_cut_out_is_a_square_of_the_mean():
    batch = images(500)
    cut = BatchAugment(0, False, 0, cutout=8)(batch, torch.arange(500), CIFAR100_STATS)
    whole = BatchAugment(0, False, 0)(batch, torch.arange(500), CIFAR100_STATS)
    gone = (cut != whole).any(1)
    assert (cut[gone[:, None].expand_as(cut)] == 0).all()
    sizes = gone.sum((1, 2))
    assert sizes.max() == 64
    # At the edges a part of it lies outside.
    assert 0 < sizes.min() < 64
    assert (gone.any(2).sum(1) <= 8).all()


@pytest.mark.parametrize("cutout", [0, 8])
def test_raw_batches_become_what_the_loader_would_have_made(cutout, sample_root):
    data = CIFAR100DataModule(root=sample_root, sample=True, batch_size=16, cutout=cutout)
    dataset = data.dataset("train")
    assert isinstance(dataset, InMemory)
    keys = [(i, 1000 + i) for i in range(16)]
    wanted = dataset.__getitems__(keys)
    dataset.raw = True
    raw = dataset.__getitems__(keys)
    assert isinstance(raw, RawBatch)
    assert raw.images.dtype == torch.uint8
    found = data.on_after_batch_transfer(raw, 0)
    assert torch.equal(found[0], wanted[0])
    assert torch.equal(found[1], wanted[1])
    assert data.on_after_batch_transfer(wanted, 0) is wanted
    assert torch.equal(dataset[keys[3]][0], wanted[0][3])


def test_cutout_and_trivial_augment_do_not_go_together():
    with pytest.raises(ValueError, match="cutout is for the plain recipe"):
        CIFAR100DataModule(trivial_augment=True, cutout=8)
