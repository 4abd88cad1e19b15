"""Semantic segmentation with DeepLabv3+."""

from collections.abc import Sequence
from inspect import signature
from itertools import product
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pytorch_lightning.utilities import rank_zero_info
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm
from torchmetrics import Metric
from torchmetrics.classification import MulticlassConfusionMatrix
from torchmetrics.functional.classification import multiclass_confusion_matrix

from slimconv_lit.backbones import create_backbone
from slimconv_lit.backbones.weights import load_backbone_weights
from slimconv_lit.checks import at_least, from_0_to_1
from slimconv_lit.heads import DeepLabV3Plus
from slimconv_lit.lookup import closest
from slimconv_lit.ops import resolve_operator
from slimconv_lit.tasks.base import BaseTask, Picture
from slimconv_lit.tasks.segmentation_metrics import mean_iou, pixel_accuracy

# Of a picture: pixels between its panels, and their largest side.
_GAP = 4
_PANEL = 512


class PixelCrossEntropy(nn.Module):
    """Cross-entropy of logits (B, C, H, W) and labels (B, H, W), the mean over all pixels that count.

    Where no pixel counts it is 0, with gradients of 0; torch's own is NaN there.

    Args:
        ignore_index: The label of pixels that do not count.
    """

    def __init__(self, ignore_index: int) -> None:
        super().__init__()
        self.ignore_index = ignore_index

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        """A scalar, float32 whatever the precision of the logits: half precision cannot hold the sum."""
        total = functional.cross_entropy(logits.float(), labels, ignore_index=self.ignore_index, reduction="sum")
        return total / (labels != self.ignore_index).sum().clamp(min=1)


class SegmentationTask(BaseTask):
    """Cross-entropy on one label per pixel, with DeepLabv3+ on any backbone.

    Batches are (images (B, 3, H, W), labels (B, H, W)), int64; for prediction (images, B names). Validation and test
    may have a second loader, of crops; its figures are val/miou_crop and val/pixel_accuracy_crop.

    Batch norms look at each device's images alone, unless `--trainer.sync_batchnorm=true`.

    Args:
        backbone: A name that `create_backbone` knows.
        num_classes: How many classes there are, background too; the command line takes it from the datamodule.
        output_stride: The backbone's last stride, 8, 16 or 32, made by dilation.
        head: More arguments of `DeepLabV3Plus`: {"width": 64}.
        backbone_lr_factor: The backbone's learning rate is this part of `lr`.
        backbone_bn_momentum: Momentum of the backbone's batch norms: how much of a batch goes into the running
            statistics. None for torch's 0.1.
        tta_scales: Test and predict at these sizes of the image and average the probabilities.
        tta_flip: Also average with those of the mirrored image.
        ignore_index: The label of pixels that do not count.
        base: What `BaseTask` takes. `weights` are a classifier's, which go into the backbone, or a whole network's; one
            with other classes needs `weights_exclude=["classifier.*"]`.

    Raises:
        ValueError: If a number is out of its range, or the head takes no such argument.
    """

    monitor = "val/miou"
    monitor_mode: Literal["min", "max"] = "max"

    def __init__(
        self,
        backbone: str,
        num_classes: int,
        output_stride: int = 16,
        head: dict[str, Any] | None = None,
        backbone_lr_factor: float = 0.1,
        backbone_bn_momentum: float | None = 0.01,
        tta_scales: Sequence[float] = (1.0,),
        tta_flip: bool = False,
        ignore_index: int = 255,
        **base: Any,
    ) -> None:
        if not tta_scales or min(tta_scales) <= 0:
            raise ValueError(f"tta_scales={list(tta_scales)} must be factors above 0; [1.0] for the image as it is")
        if num_classes > 256:
            raise ValueError(f"num_classes={num_classes}: a mask has room for 256 labels")
        at_least(1, num_classes=num_classes)
        at_least(0, backbone_lr_factor=backbone_lr_factor)
        from_0_to_1(backbone_bn_momentum=backbone_bn_momentum)
        super().__init__(backbone, **base)
        self.hparams["tta_scales"] = list(tta_scales)

    def build_model(self) -> nn.Module:
        """DeepLabv3+ with the operator in its backbone."""
        h = self.hparams
        operator = resolve_operator(h["operator"]) if h["operator"] else None
        head, options = h["head"] or {}, h["backbone_options"] or {}
        known = list(signature(DeepLabV3Plus).parameters)[2:]
        if unknown := [name for name in head if name not in known]:
            raise ValueError(f"head: DeepLabV3Plus takes no {unknown[0]!r}; {closest(unknown[0], known)}")
        stride = h["output_stride"]
        maps = create_backbone(h["backbone"], operator, features_only=True, output_stride=stride, **options)
        network = DeepLabV3Plus(maps, h["num_classes"], **head)
        if h["weights"]:
            plain = {key: value for key, value in options.items() if key not in ("weights", "pretrained")}
            classifier = create_backbone(h["backbone"], operator, without_weights=True, **plain)
            exclude = h["weights_exclude"]
            rank_zero_info(load_backbone_weights(network, h["weights"], classifier=classifier, exclude=exclude))
        for module in network.backbone.modules():
            if isinstance(module, _BatchNorm) and h["backbone_bn_momentum"] is not None:
                module.momentum = h["backbone_bn_momentum"]
        return network

    def build_loss(self) -> nn.Module:
        """Cross-entropy over the pixels that count."""
        return PixelCrossEntropy(self.hparams["ignore_index"])

    def build_metrics(self) -> None:
        """Counts of pixels, of whole images and of crops; the test's stay until the next test."""
        self.val_counts, self.val_crop_counts = self._counts(), self._counts()
        self.test_counts, self.test_crop_counts = self._counts(), self._counts()

    def _counts(self) -> MulticlassConfusionMatrix:
        # Validating looks for strange labels pixel by pixel, which the loss does too.
        classes, ignored = self.hparams["num_classes"], self.hparams["ignore_index"]
        return MulticlassConfusionMatrix(classes, ignore_index=ignored, validate_args=False)

    def parameter_groups(self) -> list[dict[str, Any]]:
        """The backbone at its own learning rate, and the head."""
        backbone = self.model.get_submodule("backbone")
        own = set(backbone.parameters())
        rate = self.hparams["lr"] * self.hparams["backbone_lr_factor"]
        return [
            {"params": list(backbone.parameters()), "lr": rate, "name": "backbone"},
            {"params": [p for p in self.parameters() if p not in own], "name": "head"},
        ]

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """The loss of one batch."""
        images, labels = batch
        loss: Tensor = self.loss(self(images), labels)
        self.track(batch_idx, len(images), loss=loss)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int, dataloader_idx: int = 0) -> None:
        """Counts one batch; the loss is that of whole images."""
        images, labels = batch
        logits = self(images)
        if dataloader_idx == 0:
            self.val_means.update(len(images), loss=self.loss(logits, labels))
        (self.val_counts, self.val_crop_counts)[dataloader_idx].update(logits.argmax(1), labels)

    def on_validation_epoch_end(self) -> None:
        """Logs loss, mean IoU and pixel accuracy."""
        super().on_validation_epoch_end()
        self._log_scores("val", self.val_counts, self.val_crop_counts)
        self.val_counts.reset()
        self.val_crop_counts.reset()

    def on_test_epoch_start(self) -> None:
        """Forgets an earlier test; the counts are not reset at the end, for callbacks read them then."""
        self.test_counts.reset()
        self.test_crop_counts.reset()

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int, dataloader_idx: int = 0) -> None:
        """Counts one batch."""
        images, labels = batch
        (self.test_counts, self.test_crop_counts)[dataloader_idx].update(self.averaged(images).argmax(1), labels)

    def on_test_epoch_end(self) -> None:
        """Logs mean IoU and pixel accuracy."""
        self._log_scores("test", self.test_counts, self.test_crop_counts)

    def _log_scores(self, stage: str, whole: Metric, crops: Metric) -> None:
        for suffix, counts in (("", whole), ("_crop", crops)):
            if not counts.update_called:
                continue
            pixels = counts.compute()
            for name, score in (("miou", mean_iou(pixels)), ("pixel_accuracy", pixel_accuracy(pixels))):
                self.log(f"{stage}/{name}{suffix}", score.float().to(self.device), prog_bar=stage == "val")

    def averaged(self, images: Tensor) -> Tensor:
        """What test and prediction take the largest of: (B, num_classes, H, W).

        Logits, or probabilities averaged over `tta_scales` and `tta_flip`.
        """
        scales, flips = self.hparams["tta_scales"], (False, True) if self.hparams["tta_flip"] else (False,)
        if scales == [1.0] and len(flips) == 1:
            logits: Tensor = self(images)
            return logits
        size = images.shape[-2:]
        total = images.new_zeros(())
        for scale, flip in product(scales, flips):
            view = _resize(images, [max(1, round(side * scale)) for side in size])
            probabilities = self(view.flip(-1) if flip else view).softmax(1)
            total = total + _resize(probabilities.flip(-1) if flip else probabilities, size)
        return total / (len(scales) * len(flips))

    def predict_step(self, batch: tuple[Tensor, Sequence[str]], batch_idx: int) -> list[dict[str, Any]]:
        """For each image its name and its labels (H, W)."""
        images, names = batch
        return [
            {"name": name, "labels": labels}
            for name, labels in zip(names, self.averaged(images).argmax(1), strict=True)
        ]

    @property
    def palette(self) -> NDArray[np.uint8]:
        """The colour of each label, (256, 3): the datamodule's, or Pascal VOC's."""
        found: NDArray[np.uint8] | None = getattr(getattr(self._trainer, "datamodule", None), "palette", None)
        if found is None:
            from slimconv_lit.data.voc import palette

            found = palette()
        return found

    def draw(self, batch: tuple[Tensor, Tensor | Sequence[str]], outputs: Tensor) -> list[Picture]:
        """Image, true labels where they are known, and predicted labels, side by side.

        Args:
            batch: (images, labels), or (images, names).
            outputs: Logits (B, C, H, W), or labels (B, H, W).
        """
        images, truth = batch
        predicted = outputs.argmax(1) if outputs.ndim == 4 else outputs
        return [
            self._picture(image, labels, of_one)
            for image, labels, of_one in zip(self.pixels(images), predicted, truth, strict=True)
        ]

    def _picture(self, image: Tensor, predicted: Tensor, truth: Tensor | str) -> Picture:
        classes, ignored = self.hparams["num_classes"], self.hparams["ignore_index"]
        maps = [predicted] if isinstance(truth, str) else [truth, predicted]
        colours = torch.from_numpy(self.palette).to(image.device)
        # Pixels that do not count have the last colour, a cream, whatever their label is.
        panels = [image, *(colours[labels.where(labels != ignored, 255)].permute(2, 0, 1) for labels in maps)]
        step = -(-max(image.shape) // _PANEL)
        panels = [panel[:, step // 2 :: step, step // 2 :: step] for panel in panels]
        gap = image.new_full((3, panels[0].shape[1], _GAP), 255)
        joined = torch.cat([part for panel in panels for part in (gap, panel)][1:], dim=2)
        if isinstance(truth, str):
            caption = truth
        else:
            counts = multiclass_confusion_matrix(predicted, truth, classes, ignore_index=ignored, validate_args=False)
            caption = f"image, truth, prediction: mean IoU {mean_iou(counts):.2f}"
        shown = np.unique(torch.stack(maps).cpu().numpy()).tolist()
        legend = {label: (self.class_names[label], self._hex(label)) for label in shown if label < classes}
        if ignored in shown:
            legend = {k: v for k, v in legend.items() if k != ignored} | {255: ("does not count", self._hex(255))}
        return Picture(joined, caption, legend=legend)

    def _hex(self, label: int) -> str:
        return "#" + self.palette[label].tobytes().hex()


def _resize(x: Tensor, size: Sequence[int]) -> Tensor:
    if x.shape[-2:] == torch.Size(size):
        return x
    # Without antialiasing a smaller image loses what lies between its pixels.
    smaller = size[0] < x.shape[-2]
    return functional.interpolate(x, size=list(size), mode="bilinear", align_corners=False, antialias=smaller)
