import hashlib
import tarfile
from collections import Counter

import pytest
import torch
from torchvision.datasets import CIFAR100

from slimconv_lit.data import CIFAR100DataModule, cifar100, files
from slimconv_lit.data.batched import InMemory
from slimconv_lit.data.files import DataError


@pytest.fixture
def sample(sample_root):
    return lambda **own: CIFAR100DataModule(root=sample_root, sample=True, num_workers=0, **own)


def labels(dataset):
    return dataset.targets.tolist() if isinstance(dataset, InMemory) else [target for _, target in dataset.source]


def test_everything_is_known_with_no_data():
    data = CIFAR100DataModule(root="nowhere")
    assert (data.num_classes, data.input_size) == (100, (3, 32, 32))
    assert len(set(data.class_names)) == 100
    assert list(data.class_names) == sorted(data.class_names)
    assert data.class_names[:2] + data.class_names[-1:] == ("apple", "aquarium_fish", "worm")
    assert data.mean == (0.5071, 0.4865, 0.4409)
    assert data.std == (0.2673, 0.2564, 0.2762)


def test_validation_images_are_held_out_of_train_by_class(sample):
    data = sample(val_fraction=0.2)
    assert Counter(labels(data.dataset("train"))) == {label: 24 for label in range(100)}
    assert Counter(labels(data.dataset("val"))) == {label: 6 for label in range(100)}
    assert len(data.dataset("test")) == 1000
    same, other = sample(val_fraction=0.2, seed=1), sample(val_fraction=0.2, split_seed=1)
    assert same.dataset("val").source.indices == data.dataset("val").source.indices
    assert other.dataset("val").source.indices != data.dataset("val").source.indices


def test_the_reference_recipe_validates_on_test(sample):
    data = sample(val_on_test=True)
    assert [len(data.dataset(split)) for split in ("train", "val", "test")] == [3000, 1000, 1000]
    val, test = next(iter(data.val_dataloader())), next(iter(data.test_dataloader()))
    assert torch.equal(val[0], test[0])
    assert torch.equal(val[1], test[1])


def test_evaluation_shows_the_stored_pixels(sample):
    data = sample()
    stored, label = data.dataset("test").source[0]
    image, target = data.dataset("test")[0]
    pixels = image * torch.tensor(data.std).view(-1, 1, 1) + torch.tensor(data.mean).view(-1, 1, 1)
    assert target == label
    assert (pixels * 255).round().byte().permute(1, 2, 0).tolist() == [[list(p) for p in row] for row in rows(stored)]


def rows(image):
    return [[image.getpixel((x, y)) for x in range(image.width)] for y in range(image.height)]


def test_trivial_augment_adds_to_the_recipe(sample):
    plain, more = (sample(trivial_augment=flag).dataset("train") for flag in (False, True))
    differing = sum(not torch.equal(plain[(0, seed)][0], more[(0, seed)][0]) for seed in range(20))
    assert differing > 10


def test_missing_data_say_where_they_were_looked_for_and_what_to_do(tmp_path):
    data = CIFAR100DataModule(root=str(tmp_path))
    with pytest.raises(FileNotFoundError) as caught:
        data.setup("fit")
    for said in (
        str(tmp_path / "cifar-100-python" / "train"),
        "--data.download=true",
        "--data.sample=true",
        "--data.root",
    ):
        assert said in str(caught.value)


def test_files_that_are_not_the_official_ones_are_not_called_missing(sample, sample_root, tmp_path):
    sample().prepare_data()
    (tmp_path / "cifar-100-python").symlink_to(f"{sample_root}/sample/cifar100/cifar-100-python")
    with pytest.raises(DataError, match="test is incomplete or changed"):
        CIFAR100DataModule(root=str(tmp_path)).setup("test")


def test_the_archive_is_unpacked_where_it_lies_and_fetched_only_when_asked(sample, sample_root, tmp_path, monkeypatch):
    sample().prepare_data()
    with tarfile.open(tmp_path / "cifar-100-python.tar.gz", "w:gz") as tar:
        tar.add(f"{sample_root}/sample/cifar100/cifar-100-python", "cifar-100-python")
    md5 = hashlib.md5((tmp_path / "cifar-100-python.tar.gz").read_bytes()).hexdigest()
    monkeypatch.setattr(cifar100, "ARCHIVE", cifar100.ARCHIVE._replace(md5=md5))
    asked = []
    monkeypatch.setattr(files, "download_url", lambda url, *_: asked.append(url))
    CIFAR100DataModule(root=str(tmp_path / "empty")).prepare_data()
    assert not (tmp_path / "empty").exists()
    CIFAR100DataModule(root=str(tmp_path)).prepare_data()
    assert {path.name for path in (tmp_path / "cifar-100-python").iterdir()} == {"train", "test", "meta"}
    assert asked == []
    (tmp_path / "cifar-100-python" / "meta").unlink()
    CIFAR100DataModule(root=str(tmp_path), download=True).prepare_data()
    assert asked == [CIFAR100.url]


def test_holding_out_nothing_is_refused(sample):
    with pytest.raises(ValueError, match=r"val_fraction=0\.0 must lie between 0 and 1"):
        sample(val_fraction=0.0)
