"""Pictures of a few validation images with what the model says of them, for every task that has a `draw` hook."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from pytorch_lightning.callbacks import Callback
from pytorch_lightning.loggers import TensorBoardLogger, WandbLogger
from torch.utils.data import DataLoader, default_collate

from slimconv_lit.callbacks.last_validation import is_last
from slimconv_lit.callbacks.loggers import tell
from slimconv_lit.callbacks.run_folder import pictures_of
from slimconv_lit.checks import at_least
from slimconv_lit.data.loading import Loader
from slimconv_lit.tables import narrow
from slimconv_lit.tasks import BaseTask, Picture

_COLOURS = {True: "#1b7f3b", False: "#c0262d", None: "#222222"}


def contact_sheet(pictures: Sequence[Picture]) -> Figure:
    """Lays pictures out in rows, each below its caption; right ones green, wrong ones red. Their legends are below all.

    Eight fit into a row, or four of those that are wider than 256 pixels, so that what is written in them can be read,
    or three of those that are about twice as wide as high, as several panels side by side are.
    """
    shapes = np.array([picture.image.shape[-2:] for picture in pictures])
    ratios = shapes[:, 0] / shapes[:, 1]
    if (1 / ratios).mean() > 1.9:
        columns, cell = 3, 4.6
    else:
        columns, cell = (4, 3.4) if shapes[:, 1].max() > 256 else (8, 1.7)
    columns = min(columns, len(pictures))
    rows = -(-len(pictures) // columns)
    # A row is as high as its highest picture, but no strip of an image makes it a tower.
    ratios = ratios.clip(0.1, 1.5 * max(0.1, float(np.median(ratios))))
    heights = [cell * float(ratios[i * columns : (i + 1) * columns].max()) for i in range(rows)]
    lines = 1 + max(picture.caption.count("\n") for picture in pictures)
    legend = {label: entry for picture in pictures for label, entry in picture.legend.items()}
    in_a_row = max(1, min(len(legend), int(cell * columns / 1.3)))
    below = 0.2 * -(-len(legend) // in_a_row) + 0.1 * bool(legend)
    size = (cell * columns, sum(heights) + (0.15 * lines + 0.1) * rows + below)
    figure = Figure(figsize=size, layout="constrained", dpi=110)
    cells = figure.subplots(rows, columns, squeeze=False, gridspec_kw={"height_ratios": heights})
    for axes, picture in zip(cells.flat, pictures, strict=False):
        axes.imshow(picture.image.permute(1, 2, 0).cpu().numpy(), interpolation="nearest")
        axes.set_anchor("N")
        axes.set_title(narrow(picture.caption, int(15 * cell)), fontsize=7.5, color=_COLOURS[picture.correct])
    for axes in figure.axes:
        axes.set_axis_off()
    if legend:
        # In the order of the labels, as every other list of the classes.
        entries = [legend[label] for label in sorted(legend)]
        patches = [Patch(facecolor=colour, edgecolor="#888888", label=name) for name, colour in entries]
        # Which goes on from column to column, where one reads from row to row.
        by_rows = [patch for column in range(in_a_row) for patch in patches[column::in_a_row]]
        figure.legend(handles=by_rows, loc="outside lower center", ncols=in_a_row, fontsize=8, frameon=False)
    return figure


def save_figure(figure: Figure, path: Path, trainer: pl.Trainer) -> None:
    """Writes `figure` to `path` and hands it to every logger that shows images, as `pictures/<stem>`."""
    canvas = FigureCanvasAgg(figure)
    # The layout settles only in the second drawing where axes keep their aspect ratio.
    figure.draw_without_rendering()
    canvas.print_png(path)  # type: ignore[no-untyped-call]
    pixels = np.asarray(canvas.buffer_rgba())[..., :3]  # type: ignore[no-untyped-call]
    for logger in trainer.loggers:
        if isinstance(logger, TensorBoardLogger):
            place = (f"pictures/{path.stem}", pixels, trainer.global_step)
            tell(logger, partial(logger.experiment.add_image, *place, dataformats="HWC"))
        elif isinstance(logger, WandbLogger):
            logger.log_image(f"pictures/{path.stem}", [pixels])


class Visualize(Callback):
    """Draws the same validation images every few epochs and at the end: pictures/validation.png and the loggers.

    The images are spread evenly over the validation set, so that one sorted by class shows many. The task draws
    them (`BaseTask.draw`); this callback only lays them out.

    Args:
        images: How many images.
        every_n_epochs: How many epochs lie between two drawings, at least: it draws in validations only, and those may
            be a matter of steps.
    """

    def __init__(self, images: int = 24, every_n_epochs: int = 10) -> None:
        at_least(0, images=images, every_n_epochs=every_n_epochs)
        self.images = images
        self.every_n_epochs = every_n_epochs
        self._batches: list[Any] = []
        self._drawn_in = -every_n_epochs

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Draws, if it is time to; the model is in evaluation mode, with averaged weights if there are such."""
        epoch = trainer.current_epoch
        due = is_last(trainer) or trainer.state.fn == "validate" or epoch >= self._drawn_in + self.every_n_epochs
        if trainer.sanity_checking or not due or not trainer.is_global_zero or not isinstance(pl_module, BaseTask):
            return
        self._drawn_in = epoch
        # Their own forward: the batches of the loop are not kept, and hold other images under other batch sizes.
        self._batches = self._batches or self._fixed_batches(trainer)
        pictures: list[Picture] = []
        for cpu_batch in self._batches:
            precision = trainer.precision_plugin
            batch = precision.convert_input(pl_module.transfer_batch_to_device(cpu_batch, pl_module.device, 0))
            with torch.no_grad(), precision.val_step_context():
                pictures += pl_module.draw(batch, pl_module(batch[0]))
        if pictures:
            save_figure(contact_sheet(pictures), pictures_of(trainer) / "validation.png", trainer)

    def _fixed_batches(self, trainer: pl.Trainer) -> list[Any]:
        loaders: Any = trainer.val_dataloaders
        loader = loaders if isinstance(loaders, DataLoader) else next(iter(loaders))
        size = len(loader.dataset)  # type: ignore[arg-type]
        indices = np.linspace(0, size - 1, min(self.images, size)).round().astype(int)
        # One by one, for not all tasks have images of one size.
        if isinstance(loader, Loader):
            return [batch for i in indices if (batch := loader.alone(int(i))) is not None]
        return [(loader.collate_fn or default_collate)([loader.dataset[int(i)]]) for i in indices]
