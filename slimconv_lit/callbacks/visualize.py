"""Pictures of a few validation images with what the model says of them, for every task that has a `draw` hook."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from pytorch_lightning.callbacks import Callback
from pytorch_lightning.loggers import TensorBoardLogger, WandbLogger
from torch.utils.data import DataLoader, default_collate

from slimconv_lit.callbacks.run_folder import pictures_of
from slimconv_lit.tasks import BaseTask, Picture

_COLOURS = {True: "#1b7f3b", False: "#c0262d", None: "#222222"}


def contact_sheet(pictures: Sequence[Picture], columns: int = 8) -> Figure:
    """Lays pictures out in rows, each below its caption; right ones green, wrong ones red."""
    columns = min(columns, len(pictures))
    rows = -(-len(pictures) // columns)
    height, width = pictures[0].image.shape[-2:]
    lines = 1 + max(picture.caption.count("\n") for picture in pictures)
    row_height = 1.7 * height / width + 0.15 * lines + 0.1
    figure = Figure(figsize=(1.7 * columns, row_height * rows), layout="constrained", dpi=110)
    for axes, picture in zip(figure.subplots(rows, columns, squeeze=False).flat, pictures, strict=False):
        axes.imshow(picture.image.permute(1, 2, 0).cpu().numpy(), interpolation="nearest")
        axes.set_title(_narrow(picture.caption), fontsize=7.5, color=_COLOURS[picture.correct])
    for axes in figure.axes:
        axes.set_axis_off()
    return figure


def _narrow(caption: str, width: int = 26) -> str:
    # Of a long line, such as a path, the beginning and the end say most.
    half = width // 2
    return "\n".join(s if len(s) <= width else f"{s[: half - 1]}…{s[-half:]}" for s in caption.split("\n"))


def save_figure(figure: Figure, path: Path, trainer: pl.Trainer) -> None:
    """Writes `figure` to `path` and hands it to every logger that shows images, as `pictures/<stem>`."""
    canvas = FigureCanvasAgg(figure)
    # The layout settles only in the second drawing where axes keep their aspect ratio.
    figure.draw_without_rendering()
    canvas.print_png(path)  # type: ignore[no-untyped-call]
    pixels = np.asarray(canvas.buffer_rgba())[..., :3]  # type: ignore[no-untyped-call]
    for logger in trainer.loggers:
        if isinstance(logger, TensorBoardLogger):
            logger.experiment.add_image(f"pictures/{path.stem}", pixels, trainer.global_step, dataformats="HWC")
        elif isinstance(logger, WandbLogger):
            logger.log_image(f"pictures/{path.stem}", [pixels])


class Visualize(Callback):
    """Draws the same validation images every few epochs and after the last: pictures/validation.png and the loggers.

    The images are spread evenly over the validation set, so that one sorted by class shows many. The task draws
    them (`BaseTask.draw`); this callback only lays them out.

    Args:
        images: How many images.
        every_n_epochs: How often.
    """

    def __init__(self, images: int = 24, every_n_epochs: int = 10) -> None:
        self.images = images
        self.every_n_epochs = every_n_epochs
        self._batches: list[Any] = []

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Draws, if it is time to; the model is in evaluation mode, with averaged weights if there are such."""
        last = trainer.current_epoch + 1 == trainer.max_epochs
        due = last or trainer.state.fn == "validate" or trainer.current_epoch % self.every_n_epochs == 0
        if trainer.sanity_checking or not due or not trainer.is_global_zero or not isinstance(pl_module, BaseTask):
            return
        # Their own forward: the batches of the loop are not kept, and hold other images under other batch sizes.
        self._batches = self._batches or self._fixed_batches(trainer)
        pictures: list[Picture] = []
        for cpu_batch in self._batches:
            batch = pl_module.transfer_batch_to_device(cpu_batch, pl_module.device, 0)
            with torch.no_grad():
                pictures += pl_module.draw(batch, pl_module(batch[0]))
        if pictures:
            save_figure(contact_sheet(pictures), pictures_of(trainer) / "validation.png", trainer)

    def _fixed_batches(self, trainer: pl.Trainer) -> list[Any]:
        loaders: Any = trainer.val_dataloaders
        loader = loaders if isinstance(loaders, DataLoader) else next(iter(loaders))
        size = len(loader.dataset)  # type: ignore[arg-type]
        indices = np.linspace(0, size - 1, min(self.images, size)).round().astype(int)
        # One by one, for not all tasks have images of one size.
        return [(loader.collate_fn or default_collate)([loader.dataset[int(i)]]) for i in indices]
