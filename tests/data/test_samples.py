import pickle
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from pycocotools.coco import COCO
from scipy.io import loadmat
from torchvision.datasets import ImageFolder, SBDataset, VOCDetection, VOCSegmentation
from torchvision.models.detection import FasterRCNN_ResNet50_FPN_Weights

from slimconv_lit.data import CIFAR100DataModule, ImageNetDataModule, samples
from slimconv_lit.data.cifar100 import CIFARImages
from slimconv_lit.data.voc import OBJECT_NAMES, palette


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


def test_the_cifar100_sample_is_laid_out_as_the_original(tmp_path):
    samples.write_cifar100(tmp_path, per_class=(2, 1))
    folder = tmp_path / "cifar-100-python"
    train, test = CIFARImages(folder / "train"), CIFARImages(folder / "test")
    names = pickle.loads((folder / "meta").read_bytes())["fine_label_names"]
    assert names == [f"{number:02d}" for number in range(100)]
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


@settings(max_examples=30)
@given(seed=st.integers(0, 2**31), count=st.integers(0, 12), overlap=st.floats(0, 0.5), size=st.integers(70, 200))
def test_scattered_places_lie_inside_and_overlap_no_more_than_asked(seed, count, overlap, size):
    rng = np.random.default_rng(seed)
    heights = rng.integers(10, 70, count).tolist()
    places = samples.scatter(rng, heights, (size, 200), overlap)
    assert len(places) <= count
    assert len(places) >= min(count, 1)
    for number, (x0, y0, x1, y1) in enumerate(places):
        assert 0 <= x0 < x1 <= 200
        assert 0 <= y0 < y1 <= size
        assert y1 - y0 in heights
        for other in places[:number]:
            covered = np.zeros((size, 200), int)
            covered[y0:y1, x0:x1] += 1
            covered[other[1] : other[3], other[0] : other[2]] += 1
            smaller = min((x1 - x0) * (y1 - y0), (other[2] - other[0]) * (other[3] - other[1]))
            assert (covered == 2).sum() <= overlap * smaller + 1e-9


def test_the_voc2012_sample_is_read_by_torchvision(tmp_path):
    samples.write_voc2012(tmp_path, (3, 2, 2))
    folder = tmp_path / "VOCdevkit" / "VOC2012"
    train, val = (VOCSegmentation(tmp_path, image_set=split) for split in ("train", "val"))
    assert (len(train), len(val), len(VOCSegmentation(tmp_path, image_set="trainval"))) == (3, 2, 5)
    boxes = VOCDetection(tmp_path, image_set="train")
    assert len(boxes) == 5
    assert len(list((folder / "SegmentationClass").iterdir())) == 5
    for index, (image, mask) in enumerate(train):
        objects = Image.open(folder / "SegmentationObject" / Path(train.masks[index]).name)
        classes, numbers = np.array(mask), np.array(objects)
        assert (mask.mode, objects.mode, mask.size) == ("P", "P", image.size)
        assert np.array_equal(np.array(mask.getpalette()).reshape(-1, 3), palette())
        assert np.array_equal(classes == 255, numbers == 255)
        assert np.array_equal(classes == 0, numbers == 0)
        tree = boxes[index][1]["annotation"]
        assert {key: int(value) for key, value in tree["size"].items()} == {
            "width": image.width,
            "height": image.height,
            "depth": 3,
        }
        assert tree["segmented"] == "1"
        assert set(np.unique(numbers)) - {0, 255} == set(range(1, len(tree["object"]) + 1))
        for number, entry in enumerate(tree["object"], start=1):
            assert {"name", "pose", "truncated", "difficult", "bndbox"} <= entry.keys()
            assert set(np.unique(classes[numbers == number])) == {1 + OBJECT_NAMES.index(entry["name"])}
            ys, xs = np.nonzero(numbers == number)
            x0, y0, x1, y1 = (int(entry["bndbox"][side]) - 1 for side in ("xmin", "ymin", "xmax", "ymax"))
            # The border that does not count hides at most the outermost pixels of an object.
            assert 0 <= x0 <= xs.min() <= x0 + 4
            assert 0 <= y0 <= ys.min() <= y0 + 4
            assert x1 - 4 <= xs.max() <= x1 < image.width
            assert y1 - 4 <= ys.max() <= y1 < image.height


def test_the_sbd_sample_is_read_by_torchvision_and_shows_the_images_of_voc2012(tmp_path):
    samples.write_voc2012(tmp_path, (4, 3, 2))
    samples.write_sbd(tmp_path, (4, 3, 2))
    folder, voc = tmp_path / "benchmark_RELEASE" / "dataset", tmp_path / "VOCdevkit" / "VOC2012"
    read = {split: SBDataset(folder, image_set=split, mode="segmentation") for split in ("train", "val")}
    names = {split: [Path(path).stem for path in data.images] for split, data in read.items()}
    assert not set(names["train"]) & set(names["val"])
    assert sorted(names["train"] + names["val"]) == [f"2012_{number:06d}" for number in (0, 2, 4, 5, 6, 8)]
    edges = SBDataset(folder, image_set="train", mode="boundaries")
    for index, (image, mask) in enumerate(read["train"]):
        name = names["train"][index]
        assert (folder / "img" / f"{name}.jpg").read_bytes() == (voc / "JPEGImages" / f"{name}.jpg").read_bytes()
        labels, boundaries = np.array(mask), edges[index][1]
        assert labels.shape == image.size[::-1]
        assert boundaries.shape == (20, *labels.shape)
        present = loadmat(folder / "cls" / f"{name}.mat")["GTcls"]["CategoriesPresent"][0, 0].ravel().tolist()
        assert (
            present
            == [label for label in np.unique(labels) if label]
            == (np.flatnonzero(boundaries.any((1, 2))) + 1).tolist()
        )
        for label in present:
            assert (labels[boundaries[label - 1] == 1] == label).all()
        objects = loadmat(folder / "inst" / f"{name}.mat")["GTinst"][0, 0]
        kinds = np.array([0, *objects["Categories"].ravel()])
        assert np.array_equal(kinds[objects["Segmentation"]], labels)
        assert objects["Boundaries"].shape == (len(kinds) - 1, 1)
        own = voc / "SegmentationClass" / f"{name}.png"
        if own.is_file():
            theirs = np.array(Image.open(own))
            assert np.array_equal(theirs[theirs != 255], labels[theirs != 255])


def test_the_voc2007_sample_is_read_by_torchvision(tmp_path):
    samples.write_voc2007(tmp_path, (40, 20))
    lists = tmp_path / "VOCdevkit" / "VOC2007" / "ImageSets" / "Main"
    splits = {split: VOCDetection(tmp_path, "2007", split) for split in ("train", "val", "trainval", "test")}
    assert {split: len(data) for split, data in splits.items()} == {"train": 20, "val": 20, "trainval": 40, "test": 20}
    objects = [[o for o in tree["annotation"]["object"]] for _, tree in splits["trainval"]]
    hard = [o for entry in objects for o in entry if o["difficult"] == "1"]
    assert any(not entry for entry in objects)
    assert 3 < len(hard) < sum(map(len, objects)) / 5
    assert all(int(o["bndbox"]["ymax"]) - int(o["bndbox"]["ymin"]) < 20 for o in hard)
    rows = [line.split() for line in (lists / "bird_trainval.txt").read_text().splitlines()]
    expected = []
    for entry in objects:
        birds = [o["difficult"] for o in entry if o["name"] == "bird"]
        expected.append("-1" if not birds else "1" if "0" in birds else "0")
    assert [flag for _, flag in rows] == expected
    assert {flag for _, flag in rows} >= {"1", "-1"}


def test_the_coco_sample_is_read_by_pycocotools(tmp_path, capsys):
    samples.write_coco2014(tmp_path, (24, 20, 20))
    read = {
        name: COCO(tmp_path / "annotations" / f"instances_{name}2014.json")
        for name in ("train", "val", "minival", "valminusminival")
    }
    assert capsys.readouterr()
    ids = {name: set(coco.imgs) for name, coco in read.items()}
    assert {name: len(found) for name, found in ids.items()} == {
        "train": 24,
        "val": 40,
        "minival": 20,
        "valminusminival": 20,
    }
    assert ids["val"] == ids["minival"] | ids["valminusminival"]
    assert not ids["train"] & ids["val"]
    official = [name for name in FasterRCNN_ResNet50_FPN_Weights.COCO_V1.meta["categories"][1:] if name != "N/A"]
    for name, coco in read.items():
        assert [category["name"] for category in coco.loadCats(coco.getCatIds())] == official
        for number, image in coco.imgs.items():
            path = tmp_path / f"{'train' if name == 'train' else 'val'}2014" / image["file_name"]
            assert path.name.endswith(f"_{number:012d}.jpg")
            assert Image.open(path).size == (image["width"], image["height"])
        for annotation in coco.anns.values():
            ys, xs = np.nonzero(coco.annToMask(annotation))
            x, y, width, height = annotation["bbox"]
            assert (xs.min(), ys.min(), xs.max() + 1, ys.max() + 1) == (x, y, x + width, y + height)
            assert abs(len(xs) - annotation["area"]) <= 3
    for name in ("train", "val"):
        kinds = [{a["iscrowd"] for a in read[name].imgToAnns[number]} for number in ids[name]]
        assert all(kind in kinds for kind in (set(), {0}, {1}, {0, 1})) or name == "train"


DENSE = {"counts": (2, 2, 2)}


@pytest.mark.parametrize(
    ("write", "own"),
    [
        (samples.write_cifar100, {"per_class": (1, 1)}),
        (samples.write_imagenet, {"per_class": (1, 1)}),
        (samples.write_voc2012, DENSE),
        (samples.write_sbd, DENSE),
        (samples.write_voc2007, {"counts": (2, 2)}),
        (samples.write_coco2014, DENSE),
    ],
)
def test_a_seed_means_one_sample(tmp_path, write, own):
    def content(path):
        # The head of a .mat file says when it was written.
        return path.read_bytes()[116 if path.suffix == ".mat" else 0 :]

    def files(name, seed):
        folder = tmp_path / name
        folder.mkdir()
        write(folder, **own, seed=seed)
        return {p.relative_to(folder).as_posix(): content(p) for p in folder.rglob("*") if p.is_file()}

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
