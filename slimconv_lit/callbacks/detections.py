"""Writes detections batch by batch: predictions.json in COCO's format of results, and annotated pictures."""

import contextlib
import heapq
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from PIL import Image
from pytorch_lightning.callbacks import BasePredictionWriter
from torchvision.datasets.folder import IMG_EXTENSIONS
from torchvision.transforms.functional import pil_to_tensor

from slimconv_lit.callbacks.run_folder import folder_of, pictures_of
from slimconv_lit.callbacks.visualize import contact_sheet, save_figure
from slimconv_lit.checks import at_least
from slimconv_lit.tasks import DetectionTask, Picture

_THUMBNAIL = 512


def coco_results(
    found: Mapping[str, Any], image_id: int, file_name: str, category_ids: Sequence[int]
) -> list[dict[str, Any]]:
    """The detections of one image as COCO's official code reads them.

    Args:
        found: boxes (n, 4) as x0, y0, x1, y1 in pixels, labels (n,) from 1, scores (n,).
        image_id: Of the image.
        file_name: Of the image; COCO's code passes over it.
        category_ids: The data set's id of each class.

    Returns:
        One entry for each detection: the box as x, y, width, height, rounded to hundredths of a pixel.
    """
    rows = zip(*(found[key].tolist() for key in ("boxes", "labels", "scores")), strict=True)
    return [
        {
            "image_id": image_id,
            "file_name": file_name,
            "category_id": category_ids[label - 1],
            "bbox": [round(value, 2) for value in (x0, y0, x1 - x0, y1 - y0)],
            "score": round(score, 5),
        }
        for (x0, y0, x1, y1), label, score in rows
    ]


class DetectionWriter(BasePredictionWriter):
    """Writes what a `DetectionTask` predicts; nothing but a few pictures is kept in memory.

    predictions.json is a list for COCO's official code. predictions/boxes/ holds every image with its boxes, under
    its own name and in its own subfolder; pictures/predictions.png shows the first ones together.

    Args:
        images: How many images pictures/predictions.png shows.
    """

    def __init__(self, images: int = 24) -> None:
        super().__init__(write_interval="batch")
        at_least(0, images=images)
        self.images = images
        self._pictures: list[Picture] = []
        self._image_ids: Mapping[str, int] = {}

    def on_predict_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Begins anew, and asks the datamodule by which numbers its data set knows the images."""
        if isinstance(pl_module, DetectionTask):
            self._part(trainer, trainer.global_rank).unlink(missing_ok=True)
            self._image_ids = getattr(getattr(trainer, "datamodule", None), "image_ids", {})

    def _part(self, trainer: pl.Trainer, rank: int) -> Path:
        return folder_of(trainer) / f"predictions.{rank}.jsonl"

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
        if not isinstance(pl_module, DetectionTask):
            return
        data = getattr(trainer, "datamodule", None)
        classes = pl_module.hparams["num_classes"]
        category_ids = getattr(data, "category_ids", None) or range(1, classes + 1)
        with self._part(trainer, trainer.global_rank).open("a") as file:
            for i, found in enumerate(prediction):
                # Where a picture was left out, the indices are more than the predictions; the data set's numbers hold.
                index = (batch_indices or ())[i]
                number = self._image_ids.get(found["name"], index + 1)
                for row in coco_results(found, number, found["name"], category_ids):
                    file.write(f"{index}\t{json.dumps(row)}\n")
        for found, picture in zip(prediction, pl_module.draw(batch, prediction), strict=True):
            path = folder_of(trainer) / "predictions" / "boxes" / found["name"]
            if path.suffix.lower() not in IMG_EXTENSIONS:
                path = path.with_name(f"{path.name}.jpg")
            path.parent.mkdir(parents=True, exist_ok=True)
            drawn = Image.fromarray(picture.image.permute(1, 2, 0).numpy())
            drawn.save(path, quality=90)
            if len(self._pictures) < self.images:
                # As small as it will be shown: these are kept, and photos are large.
                drawn.thumbnail((_THUMBNAIL, _THUMBNAIL))
                self._pictures.append(picture._replace(image=pil_to_tensor(drawn)))

    def on_predict_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Puts the processes' parts together and draws the contact sheet."""
        if not isinstance(pl_module, DetectionTask):
            return
        trainer.strategy.barrier()
        if not trainer.is_global_zero:
            return
        parts = [self._part(trainer, rank) for rank in range(trainer.world_size)]
        with contextlib.ExitStack() as opened, (folder_of(trainer) / "predictions.json").open("w") as file:
            lines = [opened.enter_context(part.open()) for part in parts if part.exists()]
            # In the order of the images, however many processes have shared them.
            merged = heapq.merge(*lines, key=lambda line: int(line.partition("\t")[0]))
            rows = (line.partition("\t")[2].rstrip() for line in merged)
            file.write("[" + next(rows, ""))
            for row in rows:
                file.write(",\n" + row)
            file.write("]\n")
        for part in parts:
            part.unlink(missing_ok=True)
        if self._pictures:
            save_figure(contact_sheet(self._pictures), pictures_of(trainer) / "predictions.png", trainer)
