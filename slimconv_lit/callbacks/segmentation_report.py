"""How well each class is segmented: per_class.csv and pictures/per_class.png, after a test."""

import csv
from collections.abc import Sequence

import numpy as np
import pytorch_lightning as pl
from matplotlib.figure import Figure
from numpy.typing import NDArray
from pytorch_lightning.callbacks import Callback

from slimconv_lit.callbacks.run_folder import folder_of, pictures_of
from slimconv_lit.callbacks.visualize import save_figure
from slimconv_lit.tasks import SegmentationTask
from slimconv_lit.tasks.segmentation_metrics import class_iou, mean_iou, pixel_accuracy


def draw_iou(names: Sequence[str], values: Sequence[float], colours: NDArray[np.uint8], title: str) -> Figure:
    """A bar for each class, from the best to the worst, and a line at their mean.

    Args:
        names: Of the classes.
        values: Their IoUs.
        colours: (C, 3), as the pictures of masks show them.
        title: Written above all.
    """
    order = sorted(range(len(names)), key=lambda i: values[i])
    figure = Figure(figsize=(7, 0.24 * len(names) + 1.2), layout="constrained", dpi=110)
    axes = figure.subplots()
    shown = [values[i] for i in order]
    bars = axes.barh([names[i] for i in order], shown, color=[colours[i] / 255 for i in order], edgecolor="#888888")
    axes.bar_label(bars, [f"{value:.3f}" for value in shown], padding=4, fontsize=8)
    mean = sum(values) / len(values)
    axes.axvline(mean, color="#444444", linestyle="--", linewidth=1, label=f"mean {mean:.3f}", zorder=0)
    # Room for the numbers behind full bars.
    axes.set(xlim=(0, 1.09), ylim=(-0.7, len(names) - 0.3), xlabel="intersection over union", title=title)
    axes.title.set_fontsize(10)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(axis="y", labelsize=9)
    return figure


class SegmentationReport(Callback):
    """Writes what became of each class's pixels in a `SegmentationTask`'s test, and draws the IoUs.

    A class that is neither in the truth nor predicted has no figures; it is not in the mean either.
    """

    def on_test_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Reads the counts that the task gathered; all processes take part, the first one writes."""
        if not isinstance(pl_module, SegmentationTask):
            return
        counts = pl_module.test_counts.compute().cpu()
        if not trainer.is_global_zero:
            return
        names, values = pl_module.class_names, class_iou(counts).tolist()
        right, true, predicted = (part.tolist() for part in (counts.diag(), counts.sum(1), counts.sum(0)))
        with (folder_of(trainer) / "per_class.csv").open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["class", "pixels", "predicted_pixels", "right_pixels", "iou", "recall", "precision"])
            for name, here, said, both, value in zip(names, true, predicted, right, values, strict=True):
                shares = [value, both / here if here else None, both / said if said else None]
                shown = ["" if share is None or not here + said else round(share, 4) for share in shares]
                writer.writerow([name, here, said, both, *shown])
        kept = [i for i, (here, said) in enumerate(zip(true, predicted, strict=True)) if here + said]
        if kept:
            # The counts of whole images, whatever else was tested.
            scores = f"mean IoU {mean_iou(counts):.3f}, pixel accuracy {pixel_accuracy(counts):.3f}"
            absent = len(names) - len(kept)
            title = f"{scores}; {absent} of {len(names)} classes do not occur" if absent else scores
            figure = draw_iou([names[i] for i in kept], [values[i] for i in kept], pl_module.palette[kept], title)
            save_figure(figure, pictures_of(trainer) / "per_class.png", trainer)
