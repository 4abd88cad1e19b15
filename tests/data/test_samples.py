import pickle
from collections import Counter

import numpy as np
import pytest
from PIL import Image
from torchvision.datasets import CIFAR10, ImageFolder

from slimconv_lit.data import CIFAR100DataModule, ImageNetDataModule, samples
from slimconv_lit.data.cifar100 import SampleCIFAR100


def test_a_scene_tells_where_its_digits_are():
    rng = np.random.default_rng(1)
    places = [(5, 8, 45, 60), (60, 10, 90, 50), (50, 60, 70, 90)]
    scene = samples.compose_scene(rng, samples.Pool(train=True), [3, 0, 7], places, (96, 100))
    assert scene.image.shape == (96, 100, 3)
    assert scene.image.dtype == scene.instances.dtype == np.uint8
    assert scene.labels == [3, 0, 7]
    assert set(np.unique(scene.instances)) == {0, 1, 2, 3}
    for number, (box, place) in enumerate(zip(scene.boxes, places, strict=True), start=1):
        x0, y0, x1, y1 = box
        assert place[0] <= x0 < x1 <= place[2]
        assert place[1] <= y0 < y1 <= place[3]
        inside = scene.instances[y0:y1, x0:x1] == number
        assert inside.sum() == (scene.instances == number).sum() > 0
        assert inside[0].any()
        assert inside[-1].any()
        assert inside[:, 0].any()
        assert inside[:, -1].any()
        # A digit differs from the ground around it by far more than the grain.
        pixels = scene.image[y0:y1, x0:x1].mean(-1)
        assert abs(pixels[inside].mean() - pixels[~inside].mean()) > 25


def test_training_and_test_digits_are_different_ones():
    train, test = samples.Pool(train=True), samples.Pool(train=False)
    for label in range(10):
        seen = {glyph.tobytes() for glyph in train.glyphs[label]}
        assert len(train.glyphs[label]) > 100
        assert seen.isdisjoint(glyph.tobytes() for glyph in test.glyphs[label])


def test_the_cifar100_sample_is_read_by_torchvision(tmp_path):
    samples.write_cifar100(tmp_path, per_class=(2, 1))
    train, test = SampleCIFAR100(tmp_path, train=True), SampleCIFAR100(tmp_path, train=False)
    assert isinstance(train, CIFAR10)
    assert train.classes == [f"{number:02d}" for number in range(100)]
    assert Counter(train.targets) == {label: 2 for label in range(100)}
    assert Counter(test.targets) == {label: 1 for label in range(100)}
    assert train.targets != sorted(train.targets)
    assert train[0][0].size == (32, 32)
    assert np.asarray(train[0][0]).std() > 10
    stored = pickle.loads((tmp_path / "cifar-100-python" / "train").read_bytes())
    assert stored["data"].shape == (200, 3072)
    assert set(stored["coarse_labels"]) == set(range(20))


def test_the_imagenet_sample_is_read_by_torchvision(tmp_path):
    samples.write_imagenet(tmp_path, per_class=(2, 1))
    train, val = ImageFolder(tmp_path / "train"), ImageFolder(tmp_path / "val")
    assert train.classes == val.classes == list("0123456789")
    assert (len(train), len(val)) == (20, 10)
    assert len({image.size for image, _ in train}) > 5


@pytest.mark.parametrize("write", [samples.write_cifar100, samples.write_imagenet])
def test_a_seed_means_one_sample(tmp_path, write):
    def files(name, seed):
        folder = tmp_path / name
        folder.mkdir()
        write(folder, per_class=(1, 1), seed=seed)
        return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}

    assert files("a", 0) == files("b", 0) != files("c", 1)


def test_a_sample_is_built_once_and_never_half(tmp_path):
    def interrupted(folder):
        (folder / "half").touch()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        samples.build_once(tmp_path, "it", interrupted)
    assert list((tmp_path / "sample").iterdir()) == []

    calls = []
    for _ in range(2):
        folder = samples.build_once(tmp_path, "it", lambda f: (calls.append(f), (f / "whole").touch()))
        assert folder == tmp_path / "sample" / "it"
        assert [p.name for p in folder.iterdir()] == ["whole"]
    assert len(calls) == 1


def test_a_build_that_another_process_finished_first_is_taken(tmp_path):
    def beaten(folder):
        (tmp_path / "sample" / "it").mkdir()
        (tmp_path / "sample" / "it" / "theirs").touch()
        (folder / "ours").touch()

    folder = samples.build_once(tmp_path, "it", beaten)
    assert [p.name for p in folder.iterdir()] == ["theirs"]
    assert [p.name for p in folder.parent.iterdir()] == ["it"]


def test_the_classes_are_known_before_anything_is_built(tmp_path):
    cifar, imagenet = CIFAR100DataModule(str(tmp_path), sample=True), ImageNetDataModule(str(tmp_path), sample=True)
    assert (cifar.num_classes, cifar.class_names[42]) == (100, "42")
    assert (imagenet.num_classes, imagenet.class_names[7]) == (10, "7")
    assert list(tmp_path.iterdir()) == []


def test_the_sample_lies_below_the_root_and_is_found_again(tmp_path):
    data = ImageNetDataModule(str(tmp_path), sample=True, image_size=32)
    data.prepare_data()
    image = tmp_path / "sample" / "imagenet" / "train" / "3" / "train_00240.JPEG"
    assert Image.open(image).format == "JPEG"
    before = image.stat().st_mtime_ns
    data.prepare_data()
    data.setup("fit")
    assert image.stat().st_mtime_ns == before
    assert [len(data.dataset(split)) for split in ("train", "val", "test")] == [800, 200, 200]
