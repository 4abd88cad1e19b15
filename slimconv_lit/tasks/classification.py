"""Image classification."""

from collections.abc import Sequence
from typing import Any, Literal

from torch import Tensor, nn
from torchmetrics import Metric, MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassConfusionMatrix
from torchvision.transforms import v2

from slimconv_lit.backbones import create_backbone
from slimconv_lit.checks import at_least, from_0_to_1
from slimconv_lit.ops import resolve_operator
from slimconv_lit.tasks.base import BaseTask, Picture


class ClassificationTask(BaseTask):
    """Cross-entropy on one label per image.

    Batches are (images (B, C, H, W), labels (B,)); for prediction (images, B names).

    Args:
        backbone: A name that `create_backbone` knows.
        num_classes: How many classes there are; the command line takes it from the datamodule.
        in_channels: Channels of the images; the command line takes it from the datamodule.
        label_smoothing: Share of each label that is spread over all classes.
        mixup_alpha: Parameter of MixUp's Beta distribution; 0 for no MixUp. With both, each batch draws one.
        cutmix_alpha: Parameter of CutMix's Beta distribution; 0 for no CutMix.
        base: What `BaseTask` takes.

    Raises:
        ValueError: If a number is out of its range.
    """

    monitor = "val/top1"
    monitor_mode: Literal["min", "max"] = "max"
    tracked = ("loss", "top1")

    def __init__(
        self,
        backbone: str,
        num_classes: int,
        in_channels: int = 3,
        label_smoothing: float = 0.0,
        mixup_alpha: float = 0.0,
        cutmix_alpha: float = 0.0,
        **base: Any,
    ) -> None:
        at_least(1, num_classes=num_classes, in_channels=in_channels)
        from_0_to_1(label_smoothing=label_smoothing)
        at_least(0, mixup_alpha=mixup_alpha, cutmix_alpha=cutmix_alpha)
        super().__init__(backbone, **base)
        mixes: list[v2.Transform] = []
        if mixup_alpha:
            mixes.append(v2.MixUp(alpha=mixup_alpha, num_classes=num_classes))
        if cutmix_alpha:
            mixes.append(v2.CutMix(alpha=cutmix_alpha, num_classes=num_classes))
        self.mix = v2.RandomChoice(mixes) if mixes else None

    def build_model(self) -> nn.Module:
        """The backbone with the operator in it."""
        h = self.hparams
        operator = resolve_operator(h["operator"]) if h["operator"] else None
        options = h["backbone_options"] or {}
        network = create_backbone(h["backbone"], operator, h["num_classes"], h["in_channels"], **options)
        return self.start_from_weights(network)

    def build_loss(self) -> nn.Module:
        """Cross-entropy."""
        return nn.CrossEntropyLoss(label_smoothing=self.hparams["label_smoothing"])

    def build_metrics(self) -> None:
        """Top-1, top-5 where that says something, and the test's confusion matrix."""
        classes = self.hparams["num_classes"]
        ranks = {"top1": 1, "top5": 5} if classes > 5 else {"top1": 1}
        # Checking labels would make a GPU wait for the CPU at each step; the loss refuses wrong ones too.
        way: dict[str, Any] = {"average": "micro", "validate_args": False}
        accuracies: dict[str, Metric | MetricCollection] = {
            name: MulticlassAccuracy(classes, top_k=k, **way) for name, k in ranks.items()
        }
        self.val_metrics = MetricCollection(accuracies, prefix="val/")
        self.test_metrics = self.val_metrics.clone(prefix="test/")
        self.test_confusion = MulticlassConfusionMatrix(classes, validate_args=False)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """The loss of one batch; of mixed images, train/top1 counts the label of the first."""
        images, labels = batch
        mixed, targets = self.mix(images, labels) if self.mix else (images, labels)
        logits = self(mixed)
        loss: Tensor = self.loss(logits, targets)
        self.track(batch_idx, len(images), loss=loss, top1=(logits.argmax(1) == labels).float().mean())
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Loss and accuracies of one batch."""
        images, labels = batch
        logits = self(images)
        self.val_means.update(len(images), loss=self.loss(logits, labels))
        self.val_metrics.update(logits, labels)

    def on_validation_epoch_end(self) -> None:
        """Logs loss and accuracies."""
        super().on_validation_epoch_end()
        self.log_dict(self.val_metrics, prog_bar=True)

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Accuracies and confusions of one batch."""
        images, labels = batch
        logits = self(images)
        self.test_metrics.update(logits, labels)
        self.test_confusion.update(logits, labels)

    def on_test_epoch_end(self) -> None:
        """Logs accuracies."""
        self.log_dict(self.test_metrics)

    def on_test_epoch_start(self) -> None:
        """Forgets an earlier test; the matrix is not reset at the end, for callbacks read it then."""
        self.test_confusion.reset()

    def predict_step(self, batch: tuple[Tensor, Sequence[str]], batch_idx: int) -> list[dict[str, Any]]:
        """One row (name, class, probability) for each image."""
        images, names = batch
        probabilities, classes = self(images).softmax(1).max(1)
        return [
            {"name": name, "class": self.class_names[index], "probability": round(probability, 6)}
            for name, index, probability in zip(names, classes.tolist(), probabilities.tolist(), strict=True)
        ]

    def draw(self, batch: tuple[Tensor, Tensor | Sequence[str]], outputs: Tensor) -> list[Picture]:
        """The images, each with its predicted class and, where it is known, its true one."""
        images, labels = batch
        probabilities, classes = outputs.detach().softmax(1).max(1)
        pictures = []
        for i, (image, index, probability) in enumerate(zip(self.pixels(images), classes, probabilities, strict=True)):
            caption = f"{self.class_names[int(index)]} ({float(probability):.0%})"
            if not isinstance(labels, Tensor):
                pictures.append(Picture(image, f"{labels[i]}\n{caption}"))
                continue
            correct = bool(index == labels[i])
            truth = "" if correct else f"\nis {self.class_names[int(labels[i])]}"
            pictures.append(Picture(image, caption + truth, correct))
        return pictures
