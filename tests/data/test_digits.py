from collections import Counter

import pytest
import torch

from slimconv_lit.data import DigitsDataModule


def targets(data, split):
    return [target for _, target in data.dataset(split)]


def test_the_split_keeps_every_class_in_proportion():
    data = DigitsDataModule()
    sizes = {split: len(data.dataset(split)) for split in ("train", "val", "test")}
    assert sizes == {"train": 1257, "val": 180, "test": 360}
    whole = Counter(label for split in sizes for label in targets(data, split))
    for split, size in sizes.items():
        for label, count in Counter(targets(data, split)).items():
            assert abs(count - whole[label] * size / 1797) <= 1


def test_the_split_follows_its_own_seed_only():
    images = DigitsDataModule().dataset("test").images
    assert torch.equal(DigitsDataModule(seed=1).dataset("test").images, images)
    assert not torch.equal(DigitsDataModule(split_seed=1).dataset("test").images, images)


@pytest.mark.parametrize(("size", "channels"), [(8, 1), (16, 3), (32, 1)])
def test_size_and_channels(size, channels):
    data = DigitsDataModule(image_size=size, channels=channels)
    assert data.input_size == (channels, size, size)
    assert len(data.mean) == len(data.std) == channels
    images, _ = next(iter(data.train_dataloader()))
    assert images.shape == (64, channels, size, size)
    assert torch.equal(images, images[:, :1].expand_as(images))


def test_the_whole_set_is_normalised():
    data = DigitsDataModule()
    images = torch.cat([images for images, _ in (*data.val_dataloader(), *data.test_dataloader())])
    assert abs(images.mean()) < 0.03
    assert abs(images.std() - 1) < 0.03


def test_augmentation_moves_training_digits_a_little_and_no_others():
    data = DigitsDataModule()
    train, test = data.dataset("train"), data.dataset("test")
    stored = (train.images[0] - data.mean[0]) / data.std[0]
    moved = torch.stack([train[(0, seed)][0] for seed in range(50)])
    similarity = torch.nn.functional.cosine_similarity(moved.flatten(1), stored.flatten()[None])
    assert 0.5 < similarity.mean() < 0.98
    assert torch.equal(test[0][0], test[0][0])


def test_a_batch_is_augmented_as_its_images_are_one_by_one():
    train = DigitsDataModule().dataset("train")
    keys = [(5, 1), (2, 9), (7, 4)]
    for (image, target), key in zip(train.__getitems__(keys), keys, strict=True):
        torch.testing.assert_close(image, train[key][0])
        assert target == train[key][1]


@pytest.mark.parametrize(
    ("own", "said"), [({"channels": 2}, "channels=2 must be 1 or 3"), ({"image_size": 4}, "at least 8")]
)
def test_wrong_values_say_what_works(own, said):
    with pytest.raises(ValueError, match=said):
        DigitsDataModule(**own)
