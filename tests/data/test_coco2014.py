import json
import lzma
import warnings
from collections import Counter
from pathlib import Path

import pytest
import torch
from PIL import Image
from torchvision.ops import box_convert

from slimconv_lit.data import COCO2014DataModule
from slimconv_lit.data.files import DataError
from tests.data.conftest import SHARED

CLASSES = [{"id": 17, "name": "cat"}, {"id": 3, "name": "car"}]


def entry(number, image_id, box=(10, 20, 30, 40), category=17, **own):
    plain = {"id": number, "image_id": image_id, "bbox": list(box), "category_id": category}
    return {**plain, "area": 500.0, "iscrowd": 0, "segmentation": [[1.0, 2.0, 3.0, 4.0, 5.0, 6.0]], **own}


def write_tree(root, train=(), val=(), images=None, minival=(5,), categories=CLASSES):
    """A tree in COCO's layout: images 1 and 2 in train2014, 4 and 5 in val2014, with these annotations."""
    images = images or {"train2014": [1, 2], "val2014": [4, 5]}
    (root / "annotations").mkdir(parents=True)
    for part, annotations in (("train2014", train), ("val2014", val)):
        (root / part).mkdir()
        listed = []
        for number in images[part]:
            name = f"COCO_{part}_{number:012d}.jpg"
            Image.new("RGB", (100, 80), "gray").save(root / part / name)
            listed.append({"id": number, "file_name": name, "width": 100, "height": 80, "license": 1})
        content = {"info": {}, "images": listed, "annotations": list(annotations), "categories": categories}
        (root / "annotations" / f"instances_{part}.json").write_text(json.dumps(content))
    if minival:
        chosen = {"images": [{"id": n, "file_name": "", "width": 1, "height": 1} for n in minival]}
        (root / "annotations" / "instances_minival2014.json").write_text(json.dumps(chosen))


def make(root, **own):
    return COCO2014DataModule(root=str(root), num_workers=0, **{"class_names": ["cat", "car"], **own})


def ids_of(data, split):
    return data.dataset(split).source.annotations.ids.tolist()


def target_of(data, split, index=0):
    return data.dataset(split).source[index][1]


def test_everything_is_known_with_no_data(tmp_path):
    data = COCO2014DataModule(str(tmp_path / "nowhere"))
    assert (data.num_classes, len(set(data.class_names))) == (80, 80)
    ids = dict(zip(data.class_names, data.category_ids, strict=True))
    assert (ids["person"], ids["stop sign"], ids["toothbrush"]) == (1, 13, 90)
    assert list(data.category_ids) == sorted(data.category_ids)
    assert (data.input_size, data.mean, data.std) == ((3, 600, 899), (0, 0, 0), (1, 1, 1))


def test_annotations_arrive_as_they_are_written(tmp_path):
    val = [
        entry(7, 5, (10, 20, 30, 40), category=3, area=77.5),
        entry(8, 4, (0, 0, 100, 80)),
        entry(9, 5, (1.5, 2.5, 10.25, 20), iscrowd=1, segmentation={"counts": [1, 2], "size": [80, 100]}),
    ]
    write_tree(tmp_path, val=val, minival=(4, 5))
    data = make(tmp_path)
    ((_, first), (_, second)) = data.dataset("test")
    assert first["boxes"].tolist() == [[0, 0, 100, 80]]
    assert second["boxes"].tolist() == [[10, 20, 40, 60], [1.5, 2.5, 11.75, 22.5]]
    assert (second["labels"].tolist(), data.category_ids) == ([2, 1], (17, 3))
    assert (second["crowd"].tolist(), second["difficult"].tolist()) == ([False, True], [False, False])
    assert second["area"].tolist() == [77.5, 500]
    assert (int(second["image_id"]), second["name"]) == (5, "COCO_val2014_000000000005.jpg")
    assert type(second["boxes"]) is torch.Tensor


def test_the_splits_are_those_of_2014_and_of_the_reference(tmp_path):
    write_tree(tmp_path, images={"train2014": [1, 2], "val2014": [4, 5, 6]}, minival=(5,))
    splits = ("train", "val", "test")
    assert [ids_of(make(tmp_path), split) for split in splits] == [[1, 2], [4, 6], [5]]
    data = make(tmp_path, val_on_test=True)
    assert [ids_of(data, split) for split in splits] == [[1, 2, 4, 6], [5], [5]]


def test_joined_files_keep_every_object_with_its_image(sample_root):
    data = COCO2014DataModule(sample_root, sample=True, val_on_test=True, num_workers=0)
    data.prepare_data()
    folder = Path(sample_root) / "sample" / "coco2014"
    written = {}
    for part in ("train", "val"):
        content = json.loads((folder / "annotations" / f"instances_{part}2014.json").read_text())
        for image in content["images"]:
            mine = [a for a in content["annotations"] if a["image_id"] == image["id"]]
            written[image["file_name"]] = [(a["category_id"], a["iscrowd"], a["bbox"], a["area"]) for a in mine]
    seen = Counter()
    for split in ("train", "test"):
        for _, target in data.dataset(split).source:
            expected = [row for row in written[target["name"]] if split == "test" or not row[1]]
            categories = [data.category_ids[label - 1] for label in target["labels"].tolist()]
            boxes = box_convert(target["boxes"], "xyxy", "xywh").tolist()
            found = zip(categories, target["crowd"].int().tolist(), boxes, target["area"].tolist(), strict=True)
            for row, wanted in zip(found, expected, strict=True):
                assert row[:3] == wanted[:3]
                assert row[3] == pytest.approx(wanted[3])
            seen[split] += 1
            seen["crowds"] += int(target["crowd"].sum())
            seen["crowd-only"] += not expected and bool(written[target["name"]])
    assert (seen["train"], seen["test"]) == (300, 100)
    assert min(seen["crowds"], seen["crowd-only"]) > 0


def test_crowds_are_not_trained_on_but_their_images_are(tmp_path):
    both = [entry(1, 1, iscrowd=1), entry(2, 2), entry(3, 2, iscrowd=1)]
    write_tree(tmp_path, both, [entry(4, 5, iscrowd=1)])
    data = make(tmp_path, batch_size=2)
    assert [len(target_of(data, "train", i)["boxes"]) for i in (0, 1)] == [0, 1]
    assert target_of(data, "test")["crowd"].tolist() == [True]
    images, targets = next(iter(data.train_dataloader()))
    assert [len(images), sorted(len(t["labels"]) for t in targets)] == [2, [0, 1]]


@pytest.mark.parametrize("name", ["ids.txt", "ids.json", "annotations/instances_val2017.json"])
def test_minival_may_be_given_in_several_files(tmp_path, name):
    write_tree(tmp_path, minival=())
    images = [{"id": 4, "file_name": "000000000004.jpg", "width": 100, "height": 80}]
    (tmp_path / name).write_text("4\n" if name.endswith("txt") else json.dumps({"images": images}))
    own = {} if "val2017" in name else {"minival": str(tmp_path / name)}
    data = make(tmp_path, **own)
    assert [ids_of(data, split) for split in ("train", "val", "test")] == [[1, 2], [5], [4]]


def test_a_missing_minival_says_how_to_get_it(tmp_path):
    write_tree(tmp_path, minival=())
    make(tmp_path).dataset("train")
    with pytest.raises(FileNotFoundError) as caught:
        make(tmp_path).setup("test")
    for said in (
        "instances_minival2014.json",
        "instances_val2017.json",
        "annotations_trainval2017.zip",
        "--data.minival",
    ):
        assert said in str(caught.value)
    with pytest.raises(FileNotFoundError, match=r"there is no mine\.txt"):
        make(tmp_path, minival="mine.txt").setup("test")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("4\n5 x\n", r"ids\.txt must have the id of an image on each line; it has x"),
        ("", r"ids\.txt names no image"),
        ("4\n1\n2\n", r"ids\.txt: 2 of its 3 ids are not in val2014: 1, 2"),
    ],
)
def test_a_bad_list_of_ids_is_named(tmp_path, text, said):
    write_tree(tmp_path)
    (tmp_path / "ids.txt").write_text(text)
    with pytest.raises(DataError, match=said):
        make(tmp_path, minival=str(tmp_path / "ids.txt")).setup("test")


def test_missing_data_say_where_they_were_looked_for_and_what_to_do(tmp_path):
    with pytest.raises(FileNotFoundError) as caught:
        make(tmp_path).setup("fit")
    for said in (
        str(tmp_path / "annotations" / "instances_train2014.json"),
        "http://images.cocodataset.org/zips/train2014.zip",
        "annotations_trainval2014.zip",
        "--data.root",
        "--data.sample=true",
    ):
        assert said in str(caught.value)


def warnings_of(data, stage):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        data.setup(stage)
    return [str(warning.message) for warning in caught]


def test_bad_boxes_are_clipped_and_left_out_with_one_warning_each(tmp_path):
    odd = [
        entry(21, 1, (-5, 10, 30, 20)),
        entry(22, 2, (90, 70, 30, 30)),
        entry(23, 1, (5, 5, 0, 20)),
        entry(24, 2, (5, 5, 10, -3)),
        entry(25, 2, (100, 5, 10, 10)),
        # 100.00000000000001, as sums of decimals are.
        entry(26, 1, (64.1, 0, 35.900000000000006, 80)),
    ]
    write_tree(tmp_path, odd)
    data = make(tmp_path)
    clipped, dropped = warnings_of(data, "fit")
    assert "instances_train2014.json: 2 of 6 boxes reach out" in clipped
    assert "annotation 21 (COCO_train2014_000000000001.jpg), annotation 22 (COCO_train2014" in clipped
    assert "instances_train2014.json: 3 of 6 boxes have no area" in dropped
    assert dropped.count("annotation") == 4
    boxes = [target_of(data, "train", i)["boxes"] for i in (0, 1)]
    torch.testing.assert_close(boxes[0], torch.tensor([[0, 10, 25, 30], [64.1, 0, 100, 80]]))
    torch.testing.assert_close(boxes[1], torch.tensor([[90.0, 70, 100, 80]]))
    assert warnings_of(data, "test") == []


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        (entry(9, 77), r"1 annotations have an image_id that is not in the file: annotation 9 \(image_id 77\)"),
        (entry(9, 4, category=44), r"1 annotations have an category_id .* annotation 9 \(category_id 44\)"),
        (entry(9, 4, (1, 2, 3)), r"annotations\[1\] lacks something or is misspelt .*'bbox': \[1, 2, 3\]"),
        (entry(9, 4, ("a", 2, 3, 4)), r"annotations\[1\] lacks something or is misspelt"),
        ({"id": 9, "image_id": 4}, r"annotations\[1\] lacks something .*KeyError: 'bbox'.*'image_id': 4"),
        ("text", r"annotations\[1\] lacks something"),
        (entry(9, 4, (1, 2, float("nan"), 4)), r"annotation 9 \(COCO_val2014_000000000004\.jpg\) has a coordinate"),
    ],
)
def test_a_bad_annotation_is_named_with_its_file(tmp_path, bad, said):
    write_tree(tmp_path, val=[entry(8, 4), bad])
    with pytest.raises(DataError, match=rf"instances_val2014\.json.*{said}"):
        make(tmp_path).setup("test")


def test_other_categories_are_named_with_the_closest(tmp_path):
    write_tree(tmp_path, categories=[*CLASSES, {"id": 5, "name": "hoarse"}])
    with pytest.raises(DataError) as caught:
        COCO2014DataModule(str(tmp_path)).setup("fit")
    for said in (
        "instances_train2014.json",
        "no 'hoarse'",
        "did you mean 'horse'?",
        "--data.class_names=[cat,car,hoarse]",
    ):
        assert said in str(caught.value)
    with pytest.raises(DataError, match="its categories lack dog, which class_names has"):
        make(tmp_path, class_names=["cat", "car", "hoarse", "dog"]).setup("fit")
    data = make(tmp_path, class_names=["hoarse", "car", "cat"])
    data.setup("fit")
    assert (data.num_classes, data.category_ids) == (3, (5, 3, 17))
    elsewhere = COCO2014DataModule(**{**data.hparams, "root": "nowhere"})
    assert elsewhere.category_ids == (1, 3, 17)
    elsewhere.load_state_dict(data.state_dict())
    assert elsewhere.category_ids == (5, 3, 17)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda text: text[: len(text) // 2], r"instances_val2014\.json is truncated or no JSON"),
        (lambda text: "[1, 2]", r"instances_val2014\.json is not in COCO's format"),
        (lambda text: text.replace('"annotations"', '"notes"'), r"not in COCO's format: it has no annotations"),
        (lambda text: text.replace('"images"', '"pictures"'), r"not in COCO's format: it has no images"),
        (lambda text: text.replace('"id": 5,', '"id": 4,'), r"instances_val2014\.json has two images with one id: 4"),
        (lambda text: '{"images": [], "annotations": [], "categories": ' + json.dumps(CLASSES) + "}", "has no images"),
    ],
)
def test_a_file_that_is_not_right_is_named(tmp_path, change, said):
    write_tree(tmp_path)
    path = tmp_path / "annotations" / "instances_val2014.json"
    path.write_text(change(path.read_text()))
    with pytest.raises(DataError, match=said):
        make(tmp_path).setup("test")


def test_an_empty_split_is_named(tmp_path):
    write_tree(tmp_path, minival=(4, 5))
    with pytest.raises(DataError, match=r"instances_val2014\.json has no image for val: minival has all of them"):
        make(tmp_path).setup("validate")
    make(tmp_path).setup("test")


def test_images_that_are_annotated_but_not_there_are_named_and_counted(tmp_path):
    write_tree(tmp_path, images={"train2014": list(range(10, 20)), "val2014": [4, 5]})
    for number in range(11, 18):
        (tmp_path / "train2014" / f"COCO_train2014_{number:012d}.jpg").unlink()
    said = (
        r"7 of 10 annotated images .*: train2014/COCO_train2014_000000000011\.jpg, .*\(7 in all\).*zips/train2014\.zip"
    )
    with pytest.raises(FileNotFoundError, match=said):
        make(tmp_path).setup("fit")
    # What is not asked for may be missing.
    make(tmp_path).setup("test")


@pytest.mark.parametrize("damage", ["truncated", "size"])
def test_a_broken_image_is_named(tmp_path, damage):
    write_tree(tmp_path)
    path = tmp_path / "val2014" / "COCO_val2014_000000000005.jpg"
    data = make(tmp_path)
    data.setup("test")
    if damage == "size":
        Image.new("RGB", (10, 20)).save(path)
    else:
        path.write_bytes(path.read_bytes()[:300])
    said = "is 10x20 pixels, but it was annotated as 100x80" if damage == "size" else "cannot be decoded"
    with pytest.raises(DataError, match=rf"COCO_val2014_000000000005\.jpg {said}"):
        data.dataset("test")[0]


def test_prediction_has_the_ids_that_results_need(tmp_path):
    write_tree(tmp_path)
    data = make(tmp_path)
    ((images, names),) = data.predict_dataloader()
    assert (names, images[0].shape) == (["COCO_val2014_000000000005.jpg"], (3, 80, 100))
    assert data.image_ids == {"COCO_val2014_000000000005.jpg": 5}


def test_real_annotations(unpack):
    path = SHARED / "coco128_instances.json.xz"
    if not path.is_file():
        pytest.skip("needs ../shared/data/coco128_instances.json.xz, which only development machines have")
    tree = unpack("voc_from_coco.tar", lambda name: "JPEGImages" in name) / "coco"
    content = json.loads(lzma.decompress(path.read_bytes()))
    (tree / "annotations").mkdir(parents=True)
    (tree.parent / "VOCdevkit/VOC2012/JPEGImages").rename(tree / "train2014")
    (tree / "val2014").symlink_to(tree / "train2014")
    for part, images in (("train2014", content["images"][:100]), ("val2014", content["images"][100:])):
        ids = {image["id"] for image in images}
        annotations = [a for a in content["annotations"] if a["image_id"] in ids]
        whole = {**content, "images": images, "annotations": annotations}
        (tree / "annotations" / f"instances_{part}.json").write_text(json.dumps(whole))
    (tree / "minival.txt").write_text("".join(f"{image['id']}\n" for image in content["images"][110:]))
    data = COCO2014DataModule(str(tree), num_workers=0, minival=str(tree / "minival.txt"))
    assert warnings_of(data, "fit") + warnings_of(data, "test") == []
    sources = [data.dataset(split).source for split in ("train", "val", "test")]
    assert [len(source) for source in sources] == [100, 10, 18]
    crowds = sum(a["iscrowd"] for a in content["annotations"])
    kept = sum(len(source.annotations.boxes) for source in sources)
    assert 939 - crowds <= kept < 939
    images, targets = next(iter(data.train_dataloader()))
    assert len(images) == len(targets) == 4
    for image, target in zip(images, targets, strict=True):
        if len(target["boxes"]):
            assert (target["boxes"].amax(0)[2:] <= torch.tensor([image.shape[2], image.shape[1]])).all()
