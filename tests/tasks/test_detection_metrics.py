"""VOC's metric against a second, plain one; COCO's against pycocotools."""

import contextlib
import io
import json
import lzma
import multiprocessing
from fractions import Fraction
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import distributed

from slimconv_lit.data import COCO2014DataModule, samples
from slimconv_lit.tasks.detection_metrics import COCO_SCALARS, COCOMeanAveragePrecision, VOCMeanAveragePrecision


def image(image_id, boxes=(), labels=(), difficult=None, crowd=None, area=None):
    count = len(labels)
    boxes = torch.tensor(boxes, dtype=torch.float32).view(-1, 4)
    return {
        "boxes": boxes,
        "labels": torch.tensor(labels, dtype=torch.int64),
        "difficult": torch.tensor(difficult or [False] * count, dtype=torch.bool),
        "crowd": torch.tensor(crowd or [False] * count, dtype=torch.bool),
        "area": torch.tensor(area, dtype=torch.float32) if area else (boxes[:, 2:] - boxes[:, :2]).prod(1),
        "image_id": torch.tensor(image_id),
        "name": f"{image_id:06d}.jpg",
    }


def detections(boxes=(), scores=(), labels=()):
    return {
        "boxes": torch.tensor(boxes, dtype=torch.float32).view(-1, 4),
        "scores": torch.tensor(scores, dtype=torch.float64),
        "labels": torch.tensor(labels, dtype=torch.int64),
    }


def random_boxes(rng, count):
    corner = rng.integers(0, 60, (count, 2))
    return np.concatenate([corner, corner + rng.integers(1, 40, (count, 2))], 1).astype(float)


def random_set(rng, images, classes, objects=6, found=12, levels=8):
    """Detections that hit, repeat, miss or are of another class, with many equal scores, some images without any."""
    predictions, targets = [], []
    for number in range(images):
        truth = random_boxes(rng, rng.integers(0, objects + 1))
        labels = rng.integers(1, classes + 1, len(truth))
        flags = rng.random(len(truth)) < 0.25
        targets.append(image(10 * number + 3, truth, labels.tolist(), flags.tolist()))
        boxes, guesses = random_boxes(rng, rng.integers(0, found + 1)), []
        for i in range(len(boxes)):
            guess = int(rng.integers(1, classes + 1))
            if len(truth) and rng.random() < 0.8:
                which = rng.integers(len(truth))
                boxes[i] = truth[which] + rng.integers(-4, 5, 4) * (rng.random() < 0.7)
                boxes[i, 2:] = np.maximum(boxes[i, 2:], boxes[i, :2] + 1)
                guess = int(labels[which]) if rng.random() < 0.8 else guess
            guesses.append(guess)
        scores = rng.integers(levels, size=len(boxes)) / levels
        predictions.append(detections(boxes, scores, guesses))
    return predictions, targets


def devkit(predictions, targets, label, interpolation):
    """One class, in the devkit's own terms: boxes named by their first and last pixel, counted from 1."""

    def named(box):
        x0, y0, x1, y1 = (float(value) for value in box)
        return x0 + 1, y0 + 1, x1, y1

    truth, results, total = {}, [], 0
    for found, target in zip(predictions, targets, strict=True):
        which = [i for i, one in enumerate(target["labels"].tolist()) if one == label]
        objects = [
            {"box": named(target["boxes"][i]), "difficult": bool(target["difficult"][i]), "found": False} for i in which
        ]
        truth[int(target["image_id"])] = objects
        total += sum(not thing["difficult"] for thing in objects)
        for box, score, guess in zip(found["boxes"], found["scores"].tolist(), found["labels"].tolist(), strict=True):
            if guess == label:
                results.append((score, int(target["image_id"]), named(box)))
    if total == 0:
        return None
    # Python's sort is stable, and the images are handed over by rising id.
    results.sort(key=lambda result: -result[0])
    points, right, wrong = [], 0, 0
    for _, image_id, box in results:
        overlap, best = -1.0, None
        for thing in truth[image_id]:
            a, b = box, thing["box"]
            wide = min(a[2], b[2]) - max(a[0], b[0]) + 1
            tall = min(a[3], b[3]) - max(a[1], b[1]) + 1
            if wide > 0 and tall > 0:
                areas = [(c[2] - c[0] + 1) * (c[3] - c[1] + 1) for c in (a, b)]
                share = wide * tall / (sum(areas) - wide * tall)
                if share > overlap:
                    overlap, best = share, thing
        if overlap >= 0.5 and best["difficult"]:
            continue
        if overlap >= 0.5 and not best["found"]:
            best["found"] = True
            right += 1
        else:
            wrong += 1
        points.append((Fraction(right, total), right / (right + wrong)))
    if interpolation == "11point":
        return sum(max([p for r, p in points if r >= Fraction(t, 10)], default=0.0) for t in range(11)) / 11
    area, before = 0.0, Fraction(0)
    for number, (recall, _) in enumerate(points):
        if recall != before:
            area += float(recall - before) * max(p for _, p in points[number:])
            before = recall
    return area


@pytest.mark.parametrize("interpolation", ["11point", "area"])
def test_voc_is_the_devkits_definition(interpolation):
    difficult = duplicates = undefined = 0
    for seed in range(150):
        rng = np.random.default_rng(seed)
        classes = int(rng.integers(1, 5))
        predictions, targets = random_set(rng, int(rng.integers(1, 7)), classes, objects=int(rng.integers(0, 7)))
        expected = [devkit(predictions, targets, label, interpolation) for label in range(1, classes + 1)]
        metric = VOCMeanAveragePrecision(classes, interpolation)
        for number in range(0, len(targets), 2):
            metric.update(predictions[number : number + 2], targets[number : number + 2])
        difficult += sum(int((outcomes == -1).sum()) for outcomes in metric.outcomes)
        result = metric.compute()
        known = [value for value in expected if value is not None]
        undefined += len(expected) - len(known)
        for value, wanted in zip(result["map_per_class"], expected, strict=True):
            assert np.isnan(value) if wanted is None else abs(value - wanted) < 1e-12
        mean = result["map"].item()
        assert abs(mean - sum(known) / len(known)) < 1e-12 if known else np.isnan(mean)
        for label, (recall, precision) in enumerate(result["curves"], start=1):
            of_class = [int((p["labels"] == label).sum()) for p in predictions]
            assert len(recall) == len(precision) <= sum(of_class)
            duplicates += int((np.diff(recall) == 0).sum())
    # The cases that make it hard did occur.
    assert min(difficult, duplicates, undefined) > 30


def test_voc_on_cases_that_can_be_done_by_hand():
    square, apart = [10, 10, 20, 20], [50, 50, 60, 60]
    metric = VOCMeanAveragePrecision(2)
    # Found twice, and a wrong one in front: precision 1/2 at recall 1/2, and no more.
    metric.update(
        [detections([apart, square, square], [0.9, 0.8, 0.7], [1, 1, 1])],
        [image(1, [square, [80, 80, 90, 90]], [1, 1])],
    )
    result = metric.compute()
    assert result["map_per_class"][0] == pytest.approx(6 * 0.5 / 11)
    assert np.isnan(result["map_per_class"][1])
    assert result["map"] == result["map_per_class"][0]
    np.testing.assert_allclose(result["curves"][0], [[0, 0.5, 0.5], [0, 0.5, 1 / 3]])
    # An IoU of exactly one half is enough; a difficult object neither helps nor harms.
    metric.reset()
    metric.update(
        [detections([[10, 10, 20, 15], apart], [0.5, 0.9], [1, 1])],
        [image(1, [square, apart], [1, 1], [False, True])],
    )
    assert metric.compute()["map"] == 1


def test_voc_reaches_recalls_that_floats_would_miss():
    boxes = [[20.0 * i, 0, 20 * i + 10, 10] for i in range(10)]
    metric = VOCMeanAveragePrecision(1)
    metric.update([detections(boxes[:3], [0.9, 0.8, 0.7], [1] * 3)], [image(1, boxes, [1] * 10)])
    assert metric.compute()["map"] == pytest.approx(4 / 11)


def test_equal_scores_go_by_image_and_then_by_order_within_it():
    square, apart = [10, 10, 20, 20], [50, 50, 60, 60]
    right, wrong = detections([square], [0.5], [1]), detections([apart], [0.5], [1])
    for order, first in (([0, 1], 1.0), ([1, 0], 1.0)):
        batches = [(right, image(1, [square], [1])), (wrong, image(2))]
        metric = VOCMeanAveragePrecision(1)
        for i in order:
            metric.update([batches[i][0]], [batches[i][1]])
        assert metric.compute()["map"] == first
    metric = VOCMeanAveragePrecision(1)
    metric.update([detections([apart, square], [0.5, 0.5], [1, 1])], [image(1, [square], [1])])
    assert metric.compute()["map"] == 0.5


def test_an_interpolation_that_is_not_there():
    with pytest.raises(ValueError, match="'12point' must be '11point' or 'area'"):
        VOCMeanAveragePrecision(1, "12point")


def official(content, results, chosen=None):
    """pycocotools' twelve numbers, and its AP of each class, for a JSON file's content (and some of its images)."""
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO()
        truth.dataset = {"info": {}, **content}
        truth.createIndex()
        run = COCOeval(truth, truth.loadRes(results), "bbox")
        run.params.imgIds = chosen or run.params.imgIds
        run.evaluate()
        run.accumulate()
        run.summarize()
    precision = run.eval["precision"][:, :, :, 0, -1]
    return run.stats, [p.mean() if p.max() > -1 else np.nan for p in np.moveaxis(precision, 2, 0)]


def results_of(predictions, targets, category_ids):
    """Detections as COCO's official code reads them."""
    rows = []
    for found, target in zip(predictions, targets, strict=True):
        columns = (found[key].tolist() for key in ("boxes", "labels", "scores"))
        for (x0, y0, x1, y1), label, score in zip(*columns, strict=True):
            box = [x0, y0, x1 - x0, y1 - y0]
            kind = {"category_id": category_ids[label - 1], "image_id": int(target["image_id"])}
            rows.append({**kind, "bbox": box, "score": score})
    return rows


def content_of(targets, classes):
    """What a JSON file of COCO says of these images."""
    annotations = []
    for target in targets:
        columns = (target[key].tolist() for key in ("boxes", "labels", "crowd", "area"))
        for (x0, y0, x1, y1), label, crowd, area in zip(*columns, strict=True):
            annotation = {"bbox": [x0, y0, x1 - x0, y1 - y0], "category_id": label, "iscrowd": int(crowd), "area": area}
            annotations.append({**annotation, "image_id": int(target["image_id"]), "id": len(annotations) + 1})
    categories = [{"id": number, "name": str(number)} for number in range(1, classes + 1)]
    return {
        "images": [{"id": int(t["image_id"])} for t in targets],
        "annotations": annotations,
        "categories": categories,
    }


def assert_equal(result, stats, per_class):
    assert len(COCO_SCALARS) == len(stats) == 12
    for name, wanted in zip(COCO_SCALARS, stats, strict=True):
        # torchmetrics hands single precision out.
        assert result[name].item() == pytest.approx(wanted, abs=1e-7), name
    np.testing.assert_allclose(result["map_per_class"], per_class, atol=1e-12)


@pytest.mark.parametrize("seed", range(6))
def test_coco_is_pycocotools_to_the_last_of_twelve_numbers(seed):
    rng = np.random.default_rng(seed)
    classes = 5
    # Half of the sets of few objects: there a recall often equals one of the 101 levels.
    predictions, targets = random_set(rng, 20, classes, objects=(2, 8)[seed % 2], found=130 if seed == 5 else 12)
    for found, target in zip(predictions, targets, strict=True):
        factor = float(rng.choice([0.5, 1, 3]))
        found["boxes"] *= factor
        target["boxes"] *= factor
        target["crowd"] = torch.from_numpy(rng.random(len(target["labels"])) < 0.15)
        target["area"] = (target["boxes"][:, 2:] - target["boxes"][:, :2]).prod(1) * 0.75
    content, results = content_of(targets, classes + 1), results_of(predictions, targets, range(1, classes + 1))
    metric = COCOMeanAveragePrecision(classes + 1)
    metric.update(predictions, targets)
    result = metric.compute()
    assert_equal(result, *official(content, results))
    assert 0.02 < result["map"] < 0.98
    for value, (recall, precision) in zip(result["map_per_class"], result["curves"], strict=True):
        assert len(recall) == len(precision) == (0 if np.isnan(value) else 101)


def jittered(targets, classes, seed):
    """Most of the true boxes, moved a little, some twice or of another class, and some out of nowhere."""
    rng = np.random.default_rng(seed)
    predictions = []
    for target in targets:
        truth, labels = target["boxes"].double().numpy(), target["labels"].numpy()
        which = rng.integers(len(truth), size=2 * len(truth)) if len(truth) else np.zeros(0, int)
        sides = np.tile(truth[:, 2:] - truth[:, :2], 2)[which]
        boxes = np.concatenate([truth[which] + sides * rng.normal(0, 0.07, sides.shape), random_boxes(rng, 3)])
        boxes[:, 2:] = np.maximum(boxes[:, 2:], boxes[:, :2] + 1)
        guesses = np.concatenate([labels[which], rng.integers(1, classes + 1, 3)])
        wrong = rng.random(len(guesses)) < 0.2
        guesses[wrong] = rng.integers(1, classes + 1, wrong.sum())
        predictions.append(detections(boxes, rng.integers(1, 50, len(boxes)) / 50, guesses))
    return predictions


def test_coco_through_the_datamodule_is_pycocotools_on_the_files(tmp_path):
    samples.write_coco2014(tmp_path, counts=(1, 40, 60))
    data = COCO2014DataModule(str(tmp_path), num_workers=0)
    targets = [target for _, target in data.read("test")]
    predictions = jittered(targets, 80, seed=1)
    metric = COCOMeanAveragePrecision(data.num_classes)
    metric.update(predictions, targets)
    files = tmp_path / "annotations"
    content = json.loads((files / "instances_val2014.json").read_text())
    minival = [image["id"] for image in json.loads((files / "instances_minival2014.json").read_text())["images"]]
    stats, per_class = official(content, results_of(predictions, targets, data.category_ids), minival)
    assert_equal(metric.compute(), stats, per_class)
    # All twelve say something: there are objects of all sizes but the largest.
    assert sum(number > 0 for number in stats) >= 10


def test_coco_on_real_annotations_is_pycocotools_on_the_file(tmp_path):
    path = Path(__file__).parents[2] / "../shared/data/coco128_instances.json.xz"
    if not path.is_file():
        pytest.skip("needs ../shared/data/coco128_instances.json.xz, which only development machines have")
    content = json.loads(lzma.decompress(path.read_bytes()))
    for part in ("annotations", "val2014"):
        (tmp_path / part).mkdir()
    (tmp_path / "annotations" / "instances_val2014.json").write_text(json.dumps(content))
    (tmp_path / "ids.txt").write_text("\n".join(str(image["id"]) for image in content["images"]))
    for image_ in content["images"]:
        Image.new("RGB", (image_["width"], image_["height"])).save(tmp_path / "val2014" / image_["file_name"])
    data = COCO2014DataModule(str(tmp_path), num_workers=0, minival=str(tmp_path / "ids.txt"))
    targets = [target for _, target in data.read("test")]
    predictions = jittered(targets, 80, seed=2)
    metric = COCOMeanAveragePrecision(80)
    metric.update(predictions, targets)
    stats, per_class = official(content, results_of(predictions, targets, data.category_ids))
    assert_equal(metric.compute(), stats, per_class)
    assert min(stats) > 0.1


@pytest.mark.parametrize("metric", [VOCMeanAveragePrecision(3), COCOMeanAveragePrecision(3)], ids=["voc", "coco"])
def test_nothing_to_find_nothing_found_and_only_crowds(metric):
    metric.update([detections()], [image(1)])
    metric.update([detections([[0, 0, 5, 5]], [0.5], [2])], [image(2)])
    result = metric.compute()
    assert result["map"] == -1 or result["map"].isnan()
    assert np.isnan(result["map_per_class"]).all()
    # A crowd, or a difficult object, is not to be found, and what finds it is not wrong.
    square = [[10, 10, 40, 40]]
    metric.update([detections(square, [0.9], [1])], [image(3, square, [1], [True], [True])])
    metric.update([detections(square, [0.8], [1])], [image(4, square, [1])])
    result = metric.compute()
    assert result["map_per_class"][0] == pytest.approx(1)
    assert np.isnan(result["map_per_class"][1:]).all()
    assert result["objects"] == [1, 0, 0]
    metric.reset()


@pytest.mark.filterwarnings("ignore:The ``compute`` method")
@pytest.mark.parametrize("kind", [VOCMeanAveragePrecision, COCOMeanAveragePrecision])
def test_no_image_at_all(kind):
    result = kind(3).compute()
    assert result["map"] == -1 or result["map"].isnan()
    assert (result["objects"], np.isnan(result["map_per_class"]).all()) == ([0, 0, 0], True)


@pytest.mark.parametrize("kind", [VOCMeanAveragePrecision, COCOMeanAveragePrecision])
def test_an_image_that_comes_twice_counts_once(kind):
    predictions, targets = random_set(np.random.default_rng(3), 8, 3)
    once, twice = kind(3), kind(3)
    once.update(predictions, targets)
    for part in (slice(4, 8), slice(0, 4), slice(2, 5)):
        twice.update(predictions[part], targets[part])
    same(once.compute(), twice.compute())
    # Reading the values changes nothing.
    same(once.compute(), twice.compute())
    twice.update(predictions[:1], targets[:1])
    same(once.compute(), twice.compute())


def same(a, b):
    assert a.keys() == b.keys()
    np.testing.assert_array_equal(a["map_per_class"], b["map_per_class"])
    for one, other in zip(a["curves"], b["curves"], strict=True):
        np.testing.assert_array_equal(one, other)
    assert a["objects"] == b["objects"]
    for key in set(a) - {"map_per_class", "objects", "curves"}:
        assert float(a[key]) == float(b[key]), key


KINDS = [VOCMeanAveragePrecision, COCOMeanAveragePrecision]


def _one_of_two(rank, address, queue):
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=address, rank=rank, world_size=2)
    predictions, targets = random_set(np.random.default_rng(5), 7, 3)
    # As our own sampler deals them, one more to the first; and as torch's does, the first image again at the end.
    for kind, *dealt in product(KINDS, [[0, 2, 4, 6]], ([1, 3, 5], [1, 3, 5, 0])):
        metric = kind(3)
        metric.update([predictions[i] for i in dealt[rank]], [targets[i] for i in dealt[rank]])
        result = metric.compute()
        # Without tensors: those are handed over as open files, which end with their process.
        plain = {key: value.item() if torch.is_tensor(value) else value for key, value in result.items()}
        queue.put((KINDS.index(kind), plain))
    distributed.destroy_process_group()


def test_two_processes_say_what_one_says(tmp_path):
    # Not forked: by then this process has threads of other libraries.
    context = multiprocessing.get_context("forkserver")
    queue = context.SimpleQueue()
    workers = [context.Process(target=_one_of_two, args=(rank, f"file://{tmp_path}/meet", queue)) for rank in (0, 1)]
    for worker in workers:
        worker.start()
    results = [queue.get() for _ in range(8)]
    for worker in workers:
        worker.join(60)
    predictions, targets = random_set(np.random.default_rng(5), 7, 3)
    for number, kind in enumerate(KINDS):
        alone = kind(3)
        alone.update(predictions, targets)
        found = [result for which, result in results if which == number]
        assert len(found) == 4
        for result in found:
            same(result, alone.compute())
