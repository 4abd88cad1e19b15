import csv

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from PIL import Image
from torch.utils.data import DataLoader, TensorDataset

from slimconv_lit.callbacks import ClassReport, MaskWriter, PredictionWriter, RunFolder, SegmentationReport, Visualize
from slimconv_lit.callbacks.segmentation_masks import overlay
from slimconv_lit.callbacks.segmentation_report import draw_iou
from slimconv_lit.data.voc import palette
from slimconv_lit.tasks import SegmentationTask

NAMES = ("background", "bird", "boat", "bottle", "bus")


class Scenes(pl.LightningDataModule):
    """Three labels on 12x16 pixels: the third of five never occurs, nor does the last."""

    class_names = NAMES
    num_classes = len(NAMES)

    def __init__(self, names=()):
        super().__init__()
        self.names = names
        self.labels = torch.tensor([0, 1, 3])[torch.arange(16) * 3 // 16].expand(4, 12, 16).clone()
        self.labels[:, :2] = 255
        self.images = self.labels[:, None].expand(-1, 3, -1, -1) / 255.0

    def train_dataloader(self):
        return DataLoader(TensorDataset(self.images, self.labels), 2)

    val_dataloader = test_dataloader = train_dataloader

    def predict_dataloader(self):
        rows = [(self.images[i], name) for i, name in enumerate(self.names)]
        return DataLoader(rows, batch_size=1, collate_fn=lambda items: (items[0][0][None], [items[0][1]]))


class Known(SegmentationTask):
    """Says what its images show, apart from the columns that it gets wrong."""

    def forward(self, images):
        labels = (images[:, 0] * 255).round().long().clamp(max=3)
        labels[:, :, :4] = 1
        return torch.eye(5)[labels].permute(0, 3, 1, 2) + 0 * sum(p.sum() for p in self.parameters())


@pytest.fixture(scope="module")
def task():
    return Known("cifar_resnet20", 5, output_stride=8, head={"width": 16, "dilations": [1, 2, 3]})


def trainer(folder, *callbacks, **options):
    return pl.Trainer(
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        callbacks=[RunFolder(folder, {}), *callbacks],
        **options,
    )


def test_the_report_has_every_class_and_the_mean_over_those_that_occur(task, tmp_path):
    fit = trainer(tmp_path, SegmentationReport(), ClassReport())
    (found,) = fit.test(task, datamodule=Scenes(), verbose=False)
    with (tmp_path / "per_class.csv").open() as file:
        rows = {row["class"]: row for row in csv.DictReader(file)}
    assert list(rows) == list(NAMES)
    # Ten rows count in each of four images; of six columns of background the first four are taken for birds.
    assert rows["background"] == {
        "class": "background",
        "pixels": "240",
        "predicted_pixels": "80",
        "right_pixels": "80",
        "iou": "0.3333",
        "recall": "0.3333",
        "precision": "1.0",
    }
    assert (rows["bird"]["iou"], rows["bottle"]["iou"]) == ("0.5556", "1.0")
    assert rows["boat"] == rows["bus"] | {"class": "boat"}
    assert [rows["bus"][key] for key in ("pixels", "iou", "recall", "precision")] == ["0", "", "", ""]
    assert found["test/miou"] == pytest.approx((1 / 3 + 5 / 9 + 1) / 3)
    assert (tmp_path / "pictures" / "per_class.png").stat().st_size > 5000


def test_a_class_that_is_only_predicted_counts_with_nothing_right(task, tmp_path):
    data = Scenes()
    data.labels[data.labels == 1] = 0
    fit = trainer(tmp_path, SegmentationReport())
    (found,) = fit.test(task, datamodule=data, verbose=False)
    bird = (tmp_path / "per_class.csv").read_text().splitlines()[2].split(",")
    assert bird[1:] == ["0", "360", "0", "0.0", "", "0.0"]
    assert found["test/miou"] == pytest.approx((80 / 440 + 0 + 1) / 3)


def test_nothing_to_report_where_no_pixel_counts(task, tmp_path):
    data = Scenes()
    data.labels[:] = 255
    fit = trainer(tmp_path, SegmentationReport())
    (found,) = fit.test(task, datamodule=data, verbose=False)
    assert np.isnan(found["test/miou"])
    assert len((tmp_path / "per_class.csv").read_text().splitlines()) == 6
    assert not (tmp_path / "pictures" / "per_class.png").exists()


def test_bars_from_best_to_worst():
    figure = draw_iou(["a", "b", "c"], [0.2, 0.9, 0.4], palette()[:3], "title")
    (axes,) = figure.axes
    assert [label.get_text() for label in axes.get_yticklabels()] == ["a", "c", "b"]
    assert [patch.get_width() for patch in axes.patches] == [0.2, 0.4, 0.9]
    assert axes.lines[0].get_xdata()[0] == pytest.approx(0.5)


def test_masks_and_overlays_have_the_names_and_sizes_of_their_images(task, tmp_path):
    names = ["a.jpg", "sub/deep/b.JPEG", "sub/a.png", "a.png"]
    data = Scenes(names)
    fit = trainer(tmp_path, MaskWriter(images=3), PredictionWriter())
    fit.predict(task, datamodule=data, return_predictions=False)
    written = {p.relative_to(tmp_path / "predictions").as_posix() for p in tmp_path.rglob("predictions/*/**/*.*")}
    # Of two images that differ in nothing but the ending, neither is lost.
    stems = ("a", "sub/deep/b", "sub/a", "a.png")
    assert written == {f"masks/{stem}.png" for stem in stems} | {f"overlays/{stem}.jpg" for stem in stems}
    with Image.open(tmp_path / "predictions" / "masks" / "sub" / "deep" / "b.png") as mask:
        assert (mask.mode, mask.size) == ("P", (16, 12))
        assert mask.getpalette()[:6] == [0, 0, 0, 128, 0, 0]
        labels = np.asarray(mask)
    assert (labels[2:] == task(data.images[:1]).argmax(1)[0, 2:].numpy()).all()
    with Image.open(tmp_path / "predictions" / "overlays" / "a.jpg") as over:
        assert over.size == (16, 12)
    assert (tmp_path / "pictures" / "predictions.png").is_file()
    assert not (tmp_path / "predictions.csv").exists()


def test_an_overlay_leaves_the_background_as_it_is():
    pixels = np.full((2, 2, 3), 100, dtype=np.uint8)
    labels = np.array([[0, 1], [2, 255]], dtype=np.uint8)
    shown = np.asarray(overlay(pixels, labels, palette(), strength=0.5))
    assert shown.tolist() == [[[100, 100, 100], [114, 50, 50]], [[50, 114, 50], [162, 162, 146]]]


def test_the_validation_picture_shows_several_panels_an_image(task, tmp_path):
    fit = trainer(tmp_path, Visualize(images=4))
    fit.validate(task, datamodule=Scenes(), verbose=False)
    with Image.open(tmp_path / "pictures" / "validation.png") as picture:
        # Three to a row, so two rows, and the legend.
        assert picture.width > 1.2 * picture.height
