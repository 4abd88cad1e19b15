"""What a classifier confuses: per_class.csv and pictures/confusion.png, after a test."""

import csv
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import pytorch_lightning as pl
from matplotlib.figure import Figure
from pytorch_lightning.callbacks import Callback

from slimconv_lit.callbacks.run_folder import folder_of, pictures_of
from slimconv_lit.callbacks.visualize import save_figure
from slimconv_lit.tasks import ClassificationTask

# More class names than this cannot be read along an axis.
_MOST_NAMES = 40


def draw_confusion(counts: npt.NDArray[np.int64], names: Sequence[str]) -> Figure:
    """The share of each true class (a row) that went to each predicted class (a column)."""
    shares = counts / counts.sum(1, keepdims=True).clip(min=1)
    named = len(names) <= _MOST_NAMES
    side = max(4.5, 0.45 * len(names)) if named else 7.0
    figure = Figure(figsize=(side + 0.8, side), layout="constrained", dpi=110)
    # Without it the outer labels touch the edge.
    figure.get_layout_engine().set(w_pad=0.1, h_pad=0.1)  # type: ignore[call-arg, union-attr]
    axes = figure.subplots()
    image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1, interpolation="nearest")
    figure.colorbar(image, label="share of the true class", shrink=0.85)
    axes.set_xlabel("predicted class")
    axes.set_ylabel("true class")
    if named:
        upright = max(map(len, names)) <= 2
        axes.set_xticks(range(len(names)), names, rotation=0 if upright else 90)
        axes.set_yticks(range(len(names)), names)
        for row, column in zip(*np.nonzero(counts), strict=True):
            colour = "white" if shares[row, column] > 0.5 else "black"
            axes.text(column, row, str(counts[row, column]), ha="center", va="center", fontsize=7, color=colour)
    return figure


class ClassReport(Callback):
    """Writes the accuracy of each class and draws the confusion matrix of a `ClassificationTask`'s test."""

    def on_test_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Reads the matrix that the task gathered; all processes take part, the first one writes."""
        if not isinstance(pl_module, ClassificationTask):
            return
        counts = pl_module.test_confusion.compute().cpu().numpy()
        if not trainer.is_global_zero:
            return
        names = pl_module.class_names
        totals = counts.sum(1)
        with (folder_of(trainer) / "per_class.csv").open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["class", "images", "accuracy"])
            for i, name in enumerate(names):
                writer.writerow([name, totals[i], round(counts[i, i] / totals[i], 4) if totals[i] else ""])
        save_figure(draw_confusion(counts, names), pictures_of(trainer) / "confusion.png", trainer)
