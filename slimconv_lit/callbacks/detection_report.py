"""How well each class is detected: per_class.csv and pictures/precision_recall.png, after a test."""

import csv
import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import pytorch_lightning as pl
from matplotlib.figure import Figure
from pytorch_lightning.callbacks import Callback

from slimconv_lit.callbacks.run_folder import folder_of, pictures_of
from slimconv_lit.callbacks.visualize import save_figure
from slimconv_lit.tasks import DetectionTask

# More panels than COCO's 80 cannot be read in one picture.
_MOST_PANELS = 100
_MEANING = {
    "voc07": "the number is VOC2007's 11-point AP",
    "voc": "the number is the area below the curve, VOC's AP",
    "coco": "the number is COCO's AP, over IoU 0.5 to 0.95",
}


def draw_curves(
    names: Sequence[str], values: Sequence[float], curves: Sequence[npt.NDArray[np.float64]], title: str
) -> Figure:
    """Precision over recall, a panel for each class, from the best AP to the worst.

    Args:
        names: Of the classes.
        values: Their average precisions, at least one.
        curves: (2, P) recall and precision of each.
        title: Written above all.
    """
    order = sorted(range(len(names)), key=lambda i: -values[i])[:_MOST_PANELS]
    columns = min(len(order), max(5, math.ceil(math.sqrt(len(order)))))
    rows = math.ceil(len(order) / columns)
    figure = Figure(figsize=(max(5.0, 1.45 * columns), 1.5 * rows + 0.9), layout="constrained", dpi=110)
    panels = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).ravel()
    for axes in panels[len(order) :]:
        axes.set_axis_off()
    for axes, i in zip(panels, order, strict=False):
        recall, precision = curves[i]
        axes.fill_between(recall, precision, alpha=0.25, linewidth=0)
        axes.plot(recall, precision, linewidth=1)
        axes.set(xlim=(0, 1.02), ylim=(0, 1.05), xticks=(0, 0.5, 1), yticks=(0, 0.5, 1))
        axes.set_xticklabels(("0", ".5", "1"))
        axes.set_yticklabels(("0", ".5", "1"))
        axes.tick_params(labelsize=7)
        axes.grid(alpha=0.3)
        axes.set_title(f"{names[i]} {values[i]:.2f}", fontsize=8)
    for axes in panels[max(0, len(order) - columns) : len(order)]:
        # Those that have nothing below them.
        axes.tick_params(labelbottom=True)
    figure.suptitle(title, fontsize=8.5)
    figure.supxlabel("recall", fontsize=9)
    figure.supylabel("precision", fontsize=9)
    return figure


class DetectionReport(Callback):
    """Writes the average precision of each class of a `DetectionTask`'s test, and draws precision over recall."""

    def on_test_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Reads the metric that the task gathered; all processes take part, the first one writes."""
        if not isinstance(pl_module, DetectionTask):
            return
        found = pl_module.test_metric.compute()
        if not trainer.is_global_zero:
            return
        names, kind = pl_module.class_names, pl_module.hparams["metric"]
        values, objects, curves = (found[key] for key in ("map_per_class", "objects", "curves"))
        with (folder_of(trainer) / "per_class.csv").open("w", newline="") as file:
            writer = csv.writer(file)
            # At IoU 0.5 COCO's precisions, at 101 recalls, average to AP50.
            writer.writerow(["class", "objects", "ap", *(["ap50"] if kind == "coco" else [])])
            for name, count, value, curve in zip(names, objects, values, curves, strict=True):
                shown = [] if math.isnan(value) else [value, *([curve[1].mean()] if kind == "coco" else [])]
                writer.writerow([name, count, *(round(float(number), 4) for number in shown)])
        kept = [i for i, value in enumerate(values) if not math.isnan(value)]
        if kept:
            mean = float(found["map"])
            title = f"Precision over recall at IoU 0.5\n{_MEANING[kind]} (mean of {len(kept)} classes: {mean:.3f})"
            of_kept = [names[i] for i in kept], [values[i] for i in kept], [curves[i] for i in kept]
            save_figure(draw_curves(*of_kept, title), pictures_of(trainer) / "precision_recall.png", trainer)
