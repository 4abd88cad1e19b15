import hashlib
import re
import tarfile
import warnings
from collections import Counter
from xml.sax.saxutils import escape

import numpy as np
import pytest
import torch
from PIL import Image

from slimconv_lit.data import VOC2007DataModule, voc2007
from slimconv_lit.data.files import Archive, DataError

CAT, DOG = ("cat", (11, 21, 40, 60)), ("dog", (1, 1, 100, 80))


def write_xml(path, objects):
    rows = [
        f"<object><name>{escape(name)}</name><pose>Left</pose><difficult>{int(bool(rest))}</difficult><bndbox>"
        f"<xmin>{box[0]}</xmin><ymin>{box[1]}</ymin><xmax>{box[2]}</xmax><ymax>{box[3]}</ymax></bndbox>"
        # The parts of a person have boxes of their own, which are none of the object's.
        "<part><name>head</name><bndbox><xmin>1</xmin><ymin>1</ymin><xmax>2</xmax><ymax>2</ymax></bndbox></part>"
        "</object>"
        for name, box, *rest in objects
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"<annotation><filename>{path.stem}.jpg</filename>{''.join(rows)}</annotation>")


def write_tree(root, images, lists=None, size=(100, 80), mode="RGB"):
    """A tree in VOC2007's layout of black images, white where there are objects; all lists name all images."""
    tree = root / "VOCdevkit" / "VOC2007"
    (tree / "JPEGImages").mkdir(parents=True)
    (tree / "ImageSets" / "Main").mkdir(parents=True)
    for name, objects in images.items():
        write_xml(tree / "Annotations" / f"{name}.xml", objects)
        pixels = np.zeros((size[1], size[0]), np.uint8)
        for _, (x0, y0, x1, y1), *_ in objects:
            pixels[max(0, y0 - 1) : y1, max(0, x0 - 1) : x1] = 255
        Image.fromarray(pixels).convert(mode).save(tree / "JPEGImages" / f"{name}.jpg", quality=95)
    for name in ("train", "val", "trainval", "test"):
        chosen = (lists or {}).get(name, () if lists else images)
        if lists is None or name in lists:
            (tree / "ImageSets" / "Main" / f"{name}.txt").write_text("".join(f"{image}\n" for image in chosen))
    return tree


def make(root, **own):
    return VOC2007DataModule(root=str(root), num_workers=0, **own)


def only(data, split="test"):
    """The single image of a split and its target."""
    (item,) = data.dataset(split)
    return item


def test_everything_is_known_with_no_data(tmp_path):
    data = make(tmp_path / "nowhere")
    assert (data.num_classes, data.category_ids) == (20, tuple(range(1, 21)))
    assert (data.class_names[0], data.class_names[-1]) == ("aeroplane", "tvmonitor")
    assert (data.input_size, data.mean, data.std) == ((3, 600, 850), (0, 0, 0), (1, 1, 1))


def test_a_box_holds_exactly_the_pixels_that_voc_names(tmp_path):
    write_tree(tmp_path, {"a": [CAT]}, {"train": "", "val": "a", "test": "a"})
    image, target = make(tmp_path).read("val")[0]
    x0, y0, x1, y1 = target["boxes"][0].int().tolist()
    white = np.asarray(image).mean(0) > 128
    assert target["boxes"].tolist() == [[10, 20, 40, 60]]
    assert white[y0:y1, x0:x1].all()
    assert white.sum() == (x1 - x0) * (y1 - y0) == target["area"].item()


def test_flips_take_boxes_along(tmp_path):
    write_tree(tmp_path, {"a": [CAT], "b": []}, {"train": "a", "val": "b", "test": "b"})
    train = make(tmp_path).dataset("train")
    seen = set()
    for seed in range(20):
        image, target = train[(0, seed)]
        x0, y0, x1, y1 = target["boxes"][0].int().tolist()
        assert image[:, y0:y1, x0:x1].min() > 0.5
        assert (image > 0.5).sum() == 3 * (x1 - x0) * (y1 - y0)
        seen.add((x0, y0, x1, y1))
    assert seen == {(10, 20, 40, 60), (60, 20, 90, 60)}


def test_targets_are_what_the_batch_promises(tmp_path):
    write_tree(tmp_path, {"a": [(*CAT, True), DOG], "b": []}, {"train": "ab", "val": "", "test": "ab"})
    images, targets = next(iter(make(tmp_path, batch_size=2).test_dataloader()))
    assert [type(images), type(targets)] == [list, list]
    assert [(image.shape, image.dtype) for image in images] == [((3, 80, 100), torch.float32)] * 2
    kinds = {key: (type(value), value.dtype) for key, value in targets[0].items() if key != "name"}
    assert kinds == {
        "boxes": (torch.Tensor, torch.float32),
        "labels": (torch.Tensor, torch.int64),
        "difficult": (torch.Tensor, torch.bool),
        "crowd": (torch.Tensor, torch.bool),
        "area": (torch.Tensor, torch.float32),
        "image_id": (torch.Tensor, torch.int64),
    }
    names = VOC2007DataModule().class_names
    assert [names[label - 1] for label in targets[0]["labels"]] == ["cat", "dog"]
    assert targets[0]["difficult"].tolist() == [True, False]
    assert [target["name"] for target in targets] == ["a.jpg", "b.jpg"]
    assert [int(target["image_id"]) for target in targets] == [1, 2]
    # An image without objects is an image.
    assert targets[1]["boxes"].shape == (0, 4)
    assert [len(targets[1][key]) for key in ("labels", "difficult", "crowd", "area")] == [0] * 4


@pytest.mark.parametrize("mode", ["L", "CMYK"])
def test_grey_and_cmyk_images_become_rgb(tmp_path, mode):
    write_tree(tmp_path, {"a": [CAT]}, {"train": "a", "val": "", "test": "a"}, mode=mode)
    image, _ = only(make(tmp_path))
    assert image.shape == (3, 80, 100)
    assert image[:, 40, 20].min() > 0.9 > 0.1 > image[:, 5, 5].max()


def test_the_official_lists_and_the_reference_recipes(tmp_path):
    images = {name: [] for name in "abcdefg"}
    write_tree(tmp_path, images, {"train": "ab", "val": "cd", "trainval": "abcd", "test": "efg"})

    def names(data):
        return ["".join(item[1]["name"][0] for item in data.dataset(split)) for split in ("train", "val", "test")]

    assert names(make(tmp_path)) == ["ab", "cd", "efg"]
    assert names(make(tmp_path, val_on_test=True)) == ["abcd", "efg", "efg"]
    (tmp_path / "VOCdevkit/VOC2007/ImageSets/Main/test.txt").unlink()
    assert names(make(tmp_path)) == ["ab", "cd", "cd"]
    (tmp_path / "VOCdevkit").rename(tmp_path / "my")
    assert names(make(tmp_path, folder="my/VOC2007")) == ["ab", "cd", "cd"]


def test_difficult_objects_are_trained_on_unless_asked_not_to(tmp_path):
    write_tree(tmp_path, {"a": [(*CAT, True), DOG], "b": [(*DOG, True)]}, {"train": "a", "val": "b", "test": "b"})
    assert only(make(tmp_path), "train")[1]["difficult"].tolist() == [True, False]
    data = make(tmp_path, train_on_difficult=False)
    assert only(data, "train")[1]["difficult"].tolist() == [False]
    assert only(data, "val")[1]["difficult"].tolist() == [True]


def warnings_of(data, stage="test"):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        data.setup(stage)
    return [str(warning.message) for warning in caught]


def test_boxes_outside_are_clipped_with_one_warning(tmp_path):
    odd = {"a": [("cat", (-5, 1, 40, 60)), DOG], "b": [("dog", (50, 50, 150, 90))], "c": [CAT]}
    write_tree(tmp_path, odd, {"train": "c", "val": "c", "test": "ab"})
    data = make(tmp_path)
    (said,) = warnings_of(data)
    assert "test.txt: 2 of 3 boxes reach out of their images and are clipped: a.xml, object 1, b.xml, obj" in said
    a, b = (target["boxes"].tolist() for _, target in data.dataset("test"))
    assert a == [[0, 0, 40, 60], [0, 0, 100, 80]]
    assert b == [[49, 49, 100, 80]]


def test_boxes_without_area_are_left_out_with_one_warning_and_a_count(tmp_path):
    odd = [("cat", (30, 10, 20, 40)), CAT, ("dog", (7, 7, 7, 7)), ("dog", (200, 10, 300, 40)), ("dog", (5, 9, 9, 9))]
    write_tree(tmp_path, {"a": odd, "b": [("cat", (9, 9, 9, 20))], "c": [CAT]}, {"train": "c", "val": "", "test": "ab"})
    data = make(tmp_path)
    (said,) = warnings_of(data)
    assert "5 of 6 boxes have no area in their images and are left out: a.xml, object 1, a.xml, object 3" in said
    assert [target["boxes"].tolist() for _, target in data.dataset("test")] == [[[10, 20, 40, 60]], []]


def test_good_boxes_are_no_reason_to_warn(tmp_path):
    write_tree(tmp_path, {"a": [CAT, DOG]}, {"train": "", "val": "", "test": "a"})
    assert warnings_of(make(tmp_path)) == []


def test_the_same_list_is_read_once(tmp_path):
    odd = {"a": [("cat", (-5, 1, 40, 60))], "b": [CAT]}
    write_tree(tmp_path, odd, {"trainval": "b", "train": "b", "val": "", "test": "a"})
    data = make(tmp_path, val_on_test=True)
    assert len(warnings_of(data, "fit")) == 1
    assert warnings_of(data, "test") == []


def test_an_unknown_class_is_named_with_the_closest_and_all_there_are(tmp_path):
    write_tree(tmp_path, {"a": [CAT], "b": [CAT, ("hoarse", (1, 2, 3, 4))]}, {"train": "", "val": "", "test": "ab"})
    with pytest.raises(DataError) as caught:
        make(tmp_path).setup("test")
    for said in ("b.xml, object 2", "'hoarse'", "did you mean 'horse'?", "--data.class_names=[cat,hoarse]"):
        assert said in str(caught.value)
    data = make(tmp_path, class_names=["hoarse", "cat"])
    assert (data.num_classes, data.category_ids) == (2, (1, 2))
    assert data.dataset("test")[1][1]["labels"].tolist() == [2, 1]


@pytest.mark.parametrize(("kind", "suffix"), [("Annotations", ".xml"), ("JPEGImages", ".jpg")])
def test_missing_files_are_named_and_counted(tmp_path, kind, suffix):
    tree = write_tree(tmp_path, {str(number): [] for number in range(9)})
    for number in range(1, 8):
        (tree / kind / f"{number}{suffix}").unlink()
    names = ", ".join(f"{number}{suffix}" for number in range(1, 6))
    with pytest.raises(FileNotFoundError, match=rf"7 of the 9 images .*test\.txt .*/{kind}: {names}, \.\.\. \(7 in"):
        make(tmp_path).setup("test")


def test_an_empty_list_is_named(tmp_path):
    write_tree(tmp_path, {"a": []}, {"train": "a", "val": "", "test": "a"})
    with pytest.raises(DataError, match=r"val\.txt names 0 images"):
        make(tmp_path).setup("validate")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("<annotation><object><name>cat</na", r"a\.xml is truncated or no XML"),
        ("<html>404</html>", r"a\.xml is no annotation of VOC"),
        ("<annotation>foo</annotation>", r"a\.xml is no annotation of VOC: .*foo"),
        (
            "<annotation><object><name>cat</name><name>dog</name><bndbox><xmin>1</xmin><ymin>1</ymin><xmax>5</xmax>"
            "<ymax>9</ymax></bndbox></object></annotation>",
            r"a\.xml, object 1: .*needs a name .*\['cat', 'dog'\]",
        ),
        ('<!DOCTYPE a [<!ENTITY b "x"><!ENTITY c "&b;&b;">]><a>&c;</a>', r"a\.xml defines entities"),
        ('<!DOCTYPE a [<!ENTITY b SYSTEM "file:///etc/passwd">]><a>&b;</a>', r"a\.xml defines entities"),
        ('<!DOCTYPE a SYSTEM "http://localhost/a.dtd"><a/>', r"a\.xml defines entities"),
        ("<a>" * 5000 + "</a>" * 5000, r"a\.xml is truncated or no XML"),
        ('<?xml version="1.0" encoding="klingon"?><annotation/>', r"a\.xml is truncated or no XML"),
        (
            "<annotation><object><name>cat</name></object></annotation>",
            r"a\.xml, object 1: .*needs a name and a bndbox",
        ),
        ("<annotation><object>cat</object></annotation>", r"a\.xml, object 1"),
        ("<annotation><object><bndbox/></object></annotation>", r"a\.xml, object 1"),
        (
            "<annotation><object><name>cat</name><bndbox><xmin>1</xmin><ymin>1</ymin><xmax>wide</xmax><ymax>9</ymax>"
            "</bndbox></object></annotation>",
            r"a\.xml, object 1: .*'wide'",
        ),
        (
            "<annotation><object><name>cat</name><bndbox><xmin>1</xmin><ymin>nan</ymin><xmax>5</xmax><ymax>9</ymax>"
            "</bndbox></object></annotation>",
            r"a\.xml, object 1 has a coordinate that is not a number",
        ),
    ],
)
def test_a_broken_annotation_is_named(tmp_path, text, said):
    tree = write_tree(tmp_path, {"a": [], "b": []}, {"train": "b", "val": "b", "test": "a"})
    (tree / "Annotations" / "a.xml").write_text(text)
    with pytest.raises(DataError, match=said):
        make(tmp_path).setup("test")


@pytest.mark.parametrize("damage", ["truncated", "text", "empty"])
def test_a_broken_image_is_named_before_training_starts(tmp_path, damage):
    tree = write_tree(tmp_path, {"a": [CAT], "b": [CAT]}, {"train": "a", "val": "b", "test": "b"})
    path = tree / "JPEGImages" / "a.jpg"
    whole = path.read_bytes()
    path.write_bytes({"truncated": whole[: len(whole) // 2], "text": b"404 not found", "empty": b""}[damage])
    with pytest.raises(DataError, match=r"JPEGImages/a\.jpg cannot be decoded"):
        make(tmp_path).setup("fit")


def test_an_image_that_changes_its_size_is_named(tmp_path):
    tree = write_tree(tmp_path, {"a": [CAT]}, {"train": "", "val": "", "test": "a"})
    data = make(tmp_path)
    data.setup("test")
    Image.new("RGB", (10, 20)).save(tree / "JPEGImages" / "a.jpg")
    with pytest.raises(DataError, match=r"a\.jpg is 10x20 pixels, but it was annotated as 100x80"):
        only(data)


@pytest.mark.parametrize(
    ("lists", "list_name"), [({"val": "bc", "test": "d"}, "val"), ({"val": "c", "test": "bd"}, "test")]
)
def test_images_that_are_trained_on_and_evaluated_are_refused(tmp_path, lists, list_name):
    write_tree(tmp_path, {name: [] for name in "abcd"}, {"train": "ab", **lists})
    with pytest.raises(DataError, match=rf"1 images of .*{list_name}\.txt are in .*train\.txt too: b\."):
        make(tmp_path).setup("fit")


def test_missing_data_say_where_they_were_looked_for_and_what_to_do(tmp_path):
    with pytest.raises(FileNotFoundError) as caught:
        make(tmp_path).setup("fit")
    for said in (
        str(tmp_path / "VOCdevkit" / "VOC2007" / "ImageSets" / "Main"),
        "VOCtrainval_06-Nov-2007.tar",
        "VOCtest_06-Nov-2007.tar",
        "--data.download=true",
        "--data.root",
        "--data.sample=true",
    ):
        assert said in str(caught.value)
    with pytest.raises(ValueError, match="folder='mine' cannot be downloaded"):
        make(tmp_path, folder="mine", download=True)


def test_the_official_archives_are_unpacked_once_and_fetched_only_when_asked(tmp_path, monkeypatch):
    images = {name: [CAT] for name in "abc"}
    tree = write_tree(tmp_path / "source", images, {"train": "a", "val": "b", "trainval": "ab", "test": "c"})
    root = tmp_path / "root"
    root.mkdir()
    archives = []
    for official, names, lists in zip(
        voc2007.ARCHIVES, ("ab", "c"), (("train", "val", "trainval"), ("test",)), strict=True
    ):
        with tarfile.open(root / official.filename, "w") as tar:
            files = [f"ImageSets/Main/{name}.txt" for name in lists]
            files += [f for name in names for f in (f"Annotations/{name}.xml", f"JPEGImages/{name}.jpg")]
            for file in files:
                tar.add(tree / file, f"VOCdevkit/VOC2007/{file}")
        md5 = hashlib.md5((root / official.filename).read_bytes()).hexdigest()
        archives.append(Archive(official.url, official.filename, md5, official.marker))
    assert [archive.filename for archive in archives] == ["VOCtrainval_06-Nov-2007.tar", "VOCtest_06-Nov-2007.tar"]
    monkeypatch.setattr(voc2007, "ARCHIVES", tuple(archives))
    asked = []
    unpack = Archive.unpack
    monkeypatch.setattr(Archive, "unpack", lambda self, at, download: (asked.append(download), unpack(self, at, False)))
    for download in (False, True):
        data = make(root, download=download)
        data.prepare_data()
        assert [len(data.dataset(split)) for split in ("train", "val", "test")] == [1, 1, 1]
    assert asked == [False, False, True, True]


def test_prediction_names_the_test_images_and_numbers_them(tmp_path):
    write_tree(tmp_path, {"a": [CAT], "b": []}, {"train": "", "val": "", "test": "ba"})
    data = make(tmp_path, batch_size=2)
    ((images, names),) = data.predict_dataloader()
    assert (names, [image.shape for image in images]) == (["b.jpg", "a.jpg"], [(3, 80, 100)] * 2)
    assert data.image_ids == {"b.jpg": 1, "a.jpg": 2}
    pictures = make(tmp_path, predict_dir=str(tmp_path / "VOCdevkit"))
    assert pictures.image_ids == {"VOC2007/JPEGImages/a.jpg": 1, "VOC2007/JPEGImages/b.jpg": 2}


def test_the_sample_has_what_makes_detection_hard(sample_root):
    data = make(sample_root, sample=True)
    data.prepare_data()
    assert [len(data.dataset(split)) for split in ("train", "val", "test")] == [150, 150, 100]
    targets = [data.dataset("test").source[i][1] for i in range(100)]
    assert any(target["difficult"].any() for target in targets)
    assert any(len(target["labels"]) == 0 for target in targets)
    assert {int(label) for target in targets for label in target["labels"]} == set(range(1, 11))
    assert len(make(sample_root, sample=True, val_on_test=True).dataset("train")) == 300


def test_real_blood_cells(unpack):
    root = unpack("bccd_voc.tar", lambda name: True)
    data = make(root, folder="bccd/VOC2007", class_names=["RBC", "WBC", "Platelets"])
    said = [warning.rpartition("/")[2] for warning in warnings_of(data, "fit")]
    assert [re.sub(r"of \d,\d+", "of N", warning) for warning in said] == [
        "train.txt: 1 of N boxes have no area in their images and are left out: BloodImage_00343.xml, object 4",
        "val.txt: 1 of N boxes have no area in their images and are left out: BloodImage_00338.xml, object 13",
    ]
    assert warnings_of(data, "test") == []
    splits = [data.dataset(split).source for split in ("train", "val", "test")]
    assert [len(images) for images in splits] == [205, 87, 72]
    labels = Counter(label for images in splits for label in images.annotations.labels.tolist())
    assert labels == {1: 4155 - 2, 2: 372, 3: 361}
    images, targets = next(iter(data.train_dataloader()))
    assert [image.shape for image in images] == [(3, 480, 640)] * 4
    assert all(target["boxes"].min() >= 0 and len(target["boxes"]) for target in targets)


def test_real_photos_some_with_nothing_to_find(unpack):
    root = unpack("voc_from_coco.tar", lambda name: "Segmentation" not in name)
    data = make(root, folder="VOCdevkit/VOC2012")
    assert warnings_of(data, "fit") == []
    splits = [data.dataset(split).source for split in ("train", "val")]
    assert [len(images) for images in splits] == [128, 128]
    assert sum(len(images.annotations.boxes) for images in splits) == 967
    assert any(len(images[i][1]["boxes"]) == 0 for images in splits for i in range(20))
