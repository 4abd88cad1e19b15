import csv
import io
import json
from contextlib import redirect_stdout

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from PIL import Image
from pycocotools.coco import COCO
from torch.utils.data import DataLoader

from slimconv_lit.callbacks import ClassReport, DetectionReport, DetectionWriter, PredictionWriter, RunFolder, Visualize
from slimconv_lit.callbacks.detection_report import draw_curves
from slimconv_lit.data.detection import DetectionDataModule
from slimconv_lit.tasks import DetectionTask

NAMES = ("plain", "round", "absent")


class Squares(pl.LightningDataModule):
    """Grey images of different sizes, each with two objects; the third class never occurs."""

    class_names = NAMES
    num_classes = len(NAMES)
    category_ids = (1, 17, 90)
    collate = staticmethod(DetectionDataModule.collate)

    def __init__(self, names=(), image_ids=None):
        super().__init__()
        self.names = names
        if image_ids:
            self.image_ids = image_ids

    def items(self):
        for number in range(4):
            boxes = torch.tensor([[4.0, 4, 24, 20], [10, 10, 40, 40.125]])
            yield (
                torch.full((3, 50 + 4 * number, 60), 0.5),
                {
                    "boxes": boxes,
                    "labels": torch.tensor([1, 2]),
                    "difficult": torch.zeros(2, dtype=torch.bool),
                    "crowd": torch.zeros(2, dtype=torch.bool),
                    "area": torch.tensor([320.0, 903.75]),
                    "image_id": torch.tensor(number),
                    "name": f"{number}.jpg",
                },
            )

    def test_dataloader(self):
        return DataLoader(list(self.items()), batch_size=2, collate_fn=self.collate)

    val_dataloader = test_dataloader

    def predict_dataloader(self):
        rows = [(image, name) for (image, _), name in zip(self.items(), self.names, strict=False)]
        return DataLoader(rows, batch_size=2, collate_fn=self.collate)


class Known(DetectionTask):
    """Finds every first object, and of the second ones a neighbour's only, with the surest score."""

    def forward(self, images):
        boxes = torch.tensor([[0.0, 30, 20, 50], [4, 4, 24, 20], [10, 10, 40, 40.125]])
        found = {"boxes": boxes, "labels": torch.tensor([2, 1, 2]), "scores": torch.tensor([0.95, 0.9, 0.4])}
        return [dict(found) for _ in images]


@pytest.fixture(scope="module")
def tasks():
    head = {"pyramid_width": 16, "head_width": 32}
    return {metric: Known("cifar_resnet20", 3, metric=metric, head=head) for metric in ("voc07", "coco")}


def trainer(folder, *callbacks):
    return pl.Trainer(
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        callbacks=[RunFolder(folder, {}), *callbacks],
    )


@pytest.mark.parametrize("metric", ["voc07", "coco"])
def test_the_report_has_every_class_and_the_mean_over_those_that_occur(metric, tasks, tmp_path):
    check = trainer(tmp_path, DetectionReport(), ClassReport())
    (found,) = check.test(tasks[metric], datamodule=Squares(), verbose=False)
    with (tmp_path / "per_class.csv").open() as file:
        rows = {row["class"]: row for row in csv.DictReader(file)}
    assert list(rows) == list(NAMES)
    assert {name: row["objects"] for name, row in rows.items()} == {"plain": "4", "round": "4", "absent": "0"}
    assert float(rows["plain"]["ap"]) == 1
    # The surest four of its eight detections are wrong, so that precision rises to a half at the end.
    assert float(rows["round"]["ap"]) == pytest.approx(0.5)
    assert rows["absent"]["ap"] in ("", None)
    assert rows["round"].get("ap50") == {"voc07": None, "coco": "0.5"}[metric]
    assert found["test/map"] == pytest.approx(0.75)
    assert (tmp_path / "pictures" / "precision_recall.png").stat().st_size > 5000


@pytest.mark.parametrize("count", [1, 3, 11])
def test_curves_of_any_number_of_classes(count, monkeypatch):
    monkeypatch.setattr("slimconv_lit.callbacks.detection_report._MOST_PANELS", 10)
    curve = np.array([[0.5, 1.0], [1.0, 0.5]])
    values = np.linspace(0, 1, count).tolist()
    figure = draw_curves([f"class {i}" for i in range(count)], values, [curve] * count, "title")
    titles = [axes.get_title() for axes in figure.axes if axes.lines]
    assert len(titles) == min(count, 10)
    # The best first.
    assert titles[0] == f"class {count - 1} {values[-1]:.2f}"


def test_no_class_occurs(tasks, tmp_path):
    class Empty(Squares):
        def items(self):
            for image, target in super().items():
                none = {key: value[:0] for key, value in target.items() if key not in ("image_id", "name")}
                yield image, target | none

    trainer(tmp_path, DetectionReport()).test(tasks["voc07"], datamodule=Empty(), verbose=False)
    assert (tmp_path / "per_class.csv").read_text().splitlines()[1:] == ["plain,0", "round,0", "absent,0"]
    assert not (tmp_path / "pictures" / "precision_recall.png").exists()


def test_predictions_are_coco_s_and_pictures_keep_their_names(tasks, tmp_path):
    names = ["a/photo.jpg", "a/photo.png", "b/c/one.webp", "test/00003"]
    data = Squares(names, dict(zip(names, (11, 12, 13, 14), strict=True)))
    trainer(tmp_path, DetectionWriter(), PredictionWriter()).predict(tasks["coco"], datamodule=data)
    rows = json.loads((tmp_path / "predictions.json").read_text())
    assert len(rows) == 12
    assert {(row["image_id"], row["file_name"]) for row in rows} == set(zip((11, 12, 13, 14), names, strict=True))
    second = [row for row in rows if row["image_id"] == 12]
    assert [row["category_id"] for row in second] == [17, 1, 17]
    assert second[2]["bbox"] == [10, 10, 30, 30.12]
    assert second[2]["score"] == 0.4
    # COCO's own code reads it.
    truth = COCO()
    truth.dataset = {
        "images": [{"id": number} for number in (11, 12, 13, 14)],
        "categories": [{"id": number} for number in data.category_ids],
        "annotations": [],
    }
    with redirect_stdout(io.StringIO()):
        truth.createIndex()
        assert len(truth.loadRes(str(tmp_path / "predictions.json")).getAnnIds()) == 12
    boxes = tmp_path / "predictions" / "boxes"
    drawn = {path.relative_to(boxes).as_posix(): Image.open(path) for path in boxes.rglob("*") if path.is_file()}
    assert set(drawn) == {*names[:3], "test/00003.jpg"}
    assert {(name, picture.format) for name, picture in drawn.items()} >= {("a/photo.png", "PNG"), (names[2], "WEBP")}
    # Enlarged by a whole number, so that the labels can be read.
    assert drawn["a/photo.jpg"].size == (7 * 60, 7 * 50)
    assert (tmp_path / "pictures" / "predictions.png").is_file()
    assert not list(tmp_path.glob("*.jsonl"))
    assert not (tmp_path / "predictions.csv").exists()


def test_without_a_datamodule_s_numbers_images_count_from_one(tasks, tmp_path):
    data = Squares(["x.jpg", "y.jpg", "z.jpg"])
    for _ in range(2):
        # A second time into the same folder: nothing is left of the first.
        trainer(tmp_path, DetectionWriter()).predict(tasks["coco"], datamodule=data)
    rows = json.loads((tmp_path / "predictions.json").read_text())
    assert [row["image_id"] for row in rows] == [1] * 3 + [2] * 3 + [3] * 3


def test_nothing_found_is_an_empty_list(tmp_path):
    class Blind(DetectionTask):
        def forward(self, images):
            none = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64), "scores": torch.zeros(0)}
            return [dict(none) for _ in images]

    task = Blind("cifar_resnet20", 3, head={"pyramid_width": 16, "head_width": 32})
    trainer(tmp_path, DetectionWriter()).predict(task, datamodule=Squares(["x.jpg"]))
    assert json.loads((tmp_path / "predictions.json").read_text()) == []
    assert (tmp_path / "predictions" / "boxes" / "x.jpg").is_file()


def test_validation_images_are_drawn_though_no_two_have_one_size(tasks, tmp_path):
    trainer(tmp_path, Visualize(images=3)).validate(tasks["voc07"], datamodule=Squares(), verbose=False)
    picture = Image.open(tmp_path / "pictures" / "validation.png")
    assert picture.width > 900
