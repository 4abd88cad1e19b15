import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from PIL import Image
from pytorch_lightning.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from slimconv_lit.callbacks import ClassReport, DetectionWriter, MaskWriter, PredictionWriter, RunFolder, Visualize
from slimconv_lit.callbacks.class_report import draw_confusion
from slimconv_lit.callbacks.visualize import contact_sheet
from slimconv_lit.data import DigitsDataModule
from slimconv_lit.tasks import ClassificationTask, Picture


def quiet_trainer(folder, **options):
    return pl.Trainer(
        accelerator="cpu",
        logger=TensorBoardLogger(folder, name="", version=""),
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        limit_train_batches=1,
        **options,
    )


def test_the_same_images_in_a_file_and_in_tensorboard(tmp_path):
    seen = []

    class Task(ClassificationTask):
        def draw(self, batch, outputs):
            seen.append(batch[0].clone())
            assert not self.training
            return super().draw(batch, outputs)

    callbacks = [RunFolder(tmp_path, {"a": {"b": 1}}), Visualize(images=12, every_n_epochs=2)]
    trainer = quiet_trainer(tmp_path, max_epochs=4, callbacks=callbacks)
    trainer.fit(Task("cifar_resnet20", 10, 1), datamodule=DigitsDataModule(batch_size=8))
    # Epochs 0, 2 and the last, image by image.
    assert len(seen) == 3 * 12
    first, _, last = (torch.cat(seen[start : start + 12]) for start in (0, 12, 24))
    assert torch.equal(first, last)
    assert len(first.unique(dim=0)) == 12
    picture = np.asarray(Image.open(tmp_path / "pictures" / "validation.png"))
    events = EventAccumulator(str(tmp_path), size_guidance={"images": 0}).Reload()
    logged = events.Images("pictures/validation")
    assert len(logged) == 3
    assert (logged[-1].height, logged[-1].width) == picture.shape[:2]


def test_the_averaged_weights_are_drawn(tmp_path):
    task = ClassificationTask("cifar_resnet20", 10, 1, ema_decay=0.5)
    weights = []

    class Spy(Visualize):
        def on_validation_epoch_end(self, trainer, pl_module):
            if not trainer.sanity_checking:
                weights.append(pl_module.model.fc.weight.clone())

    trainer = quiet_trainer(tmp_path, max_epochs=1, callbacks=[Spy()])
    trainer.fit(task, datamodule=DigitsDataModule(batch_size=8))
    # The average is also what is in place when the fit is over.
    assert torch.equal(weights[-1], task.model.fc.weight)


@pytest.mark.parametrize("count", [1, 7, 8, 9])
@pytest.mark.parametrize(("size", "columns"), [((8, 12), 8), ((300, 400), 4), ((8, 40), 3)])
def test_any_number_of_pictures(count, size, columns):
    picture = Picture(torch.zeros(3, *size, dtype=torch.uint8), "two\nlines", correct=False)
    figure = contact_sheet([picture] * count)
    assert sum(bool(axes.images) for axes in figure.axes) == count
    assert figure.axes[0].get_gridspec().ncols == min(columns, count)


def test_a_sheet_of_very_different_pictures_keeps_its_proportions():
    sizes = [(500, 1), (1, 500), (30, 40), (40, 30)]
    figure = contact_sheet([Picture(torch.zeros(3, *size, dtype=torch.uint8), "x") for size in sizes])
    width, height = figure.get_size_inches()
    assert 0.2 < height / width < 2


def test_the_legends_of_all_pictures_are_one_in_the_order_of_the_labels():
    image = torch.zeros(3, 8, 8, dtype=torch.uint8)
    named = {label: (name, f"#{label:06x}") for label, name in enumerate(["rest", "zebra", "dog", "cat"])}
    legends = [{3: named[3], 0: named[0]}, {1: named[1], 2: named[2], 0: named[0]}, {}]
    figure = contact_sheet([Picture(image, "x", legend=legend) for legend in legends])
    (legend,) = figure.legends
    figure.draw_without_rendering()
    boxes = {text.get_text(): text.get_window_extent() for text in legend.get_texts()}
    # As they are read: row by row, from the left.
    assert sorted(boxes, key=lambda name: (-boxes[name].y0, boxes[name].x0)) == ["rest", "zebra", "dog", "cat"]
    assert len({round(box.y0) for box in boxes.values()}) == 2
    assert not contact_sheet([Picture(image, "x")]).legends


def test_the_class_report_counts_what_the_test_saw(tmp_path):
    data = DigitsDataModule()
    trainer = quiet_trainer(tmp_path, callbacks=[RunFolder(tmp_path, {}), ClassReport()])
    (metrics,) = trainer.test(ClassificationTask("cifar_resnet20", 10, 1), datamodule=data, verbose=False)
    rows = [line.split(",") for line in (tmp_path / "per_class.csv").read_text().splitlines()[1:]]
    assert sum(int(images) for _, images, _ in rows) == len(data.dataset("test"))
    right = sum(int(images) * float(accuracy) for _, images, accuracy in rows)
    assert right / len(data.dataset("test")) == pytest.approx(metrics["test/top1"], abs=1e-3)
    assert (tmp_path / "pictures" / "confusion.png").is_file()


def test_a_class_without_images_and_very_many_classes():
    counts = np.eye(200, dtype=np.int64)
    counts[3] = 0
    figure = draw_confusion(counts, [f"class {i}" for i in range(200)])
    assert np.isfinite(np.asarray(figure.axes[0].images[0].get_array())).all()


@pytest.mark.parametrize("cls", [Visualize, PredictionWriter, MaskWriter, DetectionWriter])
def test_fewer_pictures_than_none_are_refused(cls):
    with pytest.raises(ValueError, match="images=-1 must be at least 0"):
        cls(images=-1)
