"""Writes the classes of images batch by batch: predictions.csv and a contact sheet."""

import contextlib
import csv
from collections.abc import Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import BasePredictionWriter

from slimconv_lit.callbacks.run_folder import folder_of, pictures_of
from slimconv_lit.callbacks.visualize import contact_sheet, save_figure
from slimconv_lit.checks import at_least
from slimconv_lit.tasks import ClassificationTask, Picture


class PredictionWriter(BasePredictionWriter):
    """Appends the rows that a `ClassificationTask` predicts to predictions.csv; nothing is kept in memory.

    Args:
        images: How many images pictures/predictions.png shows.
    """

    def __init__(self, images: int = 40) -> None:
        super().__init__(write_interval="batch")
        at_least(0, images=images)
        self.images = images
        self._pictures: list[Picture] = []

    def _part(self, trainer: pl.Trainer, rank: int) -> Path:
        name = "predictions.csv" if trainer.world_size == 1 else f"predictions.{rank}.csv"
        return folder_of(trainer) / name

    def write_on_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        prediction: Sequence[dict[str, Any]],
        batch_indices: Sequence[int] | None,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int,
    ) -> None:
        """Writes one batch."""
        if not isinstance(pl_module, ClassificationTask):
            return
        path = self._part(trainer, trainer.global_rank)
        with path.open("a", newline="") as file:
            writer = csv.DictWriter(file, list(prediction[0]))
            if batch_idx == 0 and trainer.global_rank == 0:
                writer.writeheader()
            writer.writerows(prediction)
        missing = self.images - len(self._pictures)
        if missing > 0 and trainer.is_global_zero:
            images, names = batch[0][:missing], batch[1][:missing]
            with torch.no_grad(), trainer.precision_plugin.predict_step_context():
                self._pictures += pl_module.draw((images, names), pl_module(images))

    def on_predict_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Puts the processes' parts together and draws the contact sheet."""
        if not isinstance(pl_module, ClassificationTask):
            return
        trainer.strategy.barrier()
        if not trainer.is_global_zero:
            return
        if trainer.world_size > 1:
            parts = [self._part(trainer, rank) for rank in range(trainer.world_size)]
            path = folder_of(trainer) / "predictions.csv"
            with contextlib.ExitStack() as opened, path.open("w", newline="") as whole:
                first, *others = [opened.enter_context(part.open(newline="")) for part in parts]
                whole.write(next(first))
                # The images were dealt out in turn, and so are their rows.
                for rows in zip_longest(first, *others, fillvalue=""):
                    whole.writelines(rows)
            for part in parts:
                part.unlink()
        if self._pictures:
            save_figure(contact_sheet(self._pictures), pictures_of(trainer) / "predictions.png", trainer)
