"""Writes predicted masks image by image: palette PNGs, overlays and a contact sheet."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from numpy.typing import NDArray
from PIL import Image
from pytorch_lightning.callbacks import BasePredictionWriter

from slimconv_lit.callbacks.run_folder import folder_of, pictures_of
from slimconv_lit.callbacks.visualize import contact_sheet, save_figure
from slimconv_lit.checks import at_least
from slimconv_lit.tasks import Picture, SegmentationTask


def palette_image(labels: NDArray[np.uint8], palette: NDArray[np.uint8]) -> Image.Image:
    """The labels (H, W) as a picture that shows them in the colours of `palette` (256, 3), as VOC's masks are."""
    picture = Image.fromarray(labels)
    picture.putpalette(palette.ravel().tolist())
    return picture


def overlay(
    pixels: NDArray[np.uint8], labels: NDArray[np.uint8], palette: NDArray[np.uint8], strength: float = 0.5
) -> Image.Image:
    """The image (H, W, 3) tinted with its labels' colours; label 0, the background, leaves it as it is."""
    tinted = (1 - strength) * pixels + strength * palette[labels]
    return Image.fromarray(np.where(labels[..., None] > 0, tinted, pixels).round().astype(np.uint8))


class MaskWriter(BasePredictionWriter):
    """Writes what a `SegmentationTask` predicts; nothing but a few pictures is kept in memory.

    For an image a/b.jpg, predictions/masks/a/b.png has its labels, in its size and with the palette, and
    predictions/overlays/a/b.jpg shows them on the image. pictures/predictions.png shows the first images together.

    Args:
        images: How many images pictures/predictions.png shows.
    """

    def __init__(self, images: int = 24) -> None:
        super().__init__(write_interval="batch")
        at_least(0, images=images)
        self.images = images
        self._pictures: list[Picture] = []

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
        if not isinstance(pl_module, SegmentationTask):
            return
        folder, palette = folder_of(trainer) / "predictions", pl_module.palette
        for image, found in zip(pl_module.pixels(batch[0]), prediction, strict=True):
            pixels, labels = image.permute(1, 2, 0).cpu().numpy(), found["labels"].to(torch.uint8).cpu().numpy()
            mask = folder / "masks" / Path(found["name"]).with_suffix(".png")
            mask.parent.mkdir(parents=True, exist_ok=True)
            try:
                # Looking first would not do: another process may have the image of the same name.
                mask.touch(exist_ok=False)
            except FileExistsError:
                # Of a.jpg and a.png in one folder, the second keeps its whole name.
                mask = mask.with_name(f"{Path(found['name']).name}.png")
            over = (folder / "overlays" / mask.relative_to(folder / "masks")).with_suffix(".jpg")
            for path, picture in (
                (mask, palette_image(labels, palette)),
                (over, overlay(pixels, labels, palette)),
            ):
                path.parent.mkdir(parents=True, exist_ok=True)
                picture.save(path, quality=90)
        missing = self.images - len(self._pictures)
        if missing > 0 and trainer.is_global_zero:
            labels = torch.stack([found["labels"] for found in prediction])
            self._pictures += pl_module.draw(batch, labels)[:missing]

    def on_predict_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Draws the contact sheet."""
        if isinstance(pl_module, SegmentationTask) and trainer.is_global_zero and self._pictures:
            save_figure(contact_sheet(self._pictures), pictures_of(trainer) / "predictions.png", trainer)
