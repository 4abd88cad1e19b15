"""Object detection with Faster R-CNN."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch
from pytorch_lightning.utilities import rank_zero_info
from torch import Tensor, nn
from torchmetrics import Metric

from slimconv_lit.backbones import create_backbone
from slimconv_lit.backbones.features import FeatureMaps
from slimconv_lit.backbones.weights import load_backbone_weights
from slimconv_lit.checks import at_least, from_0_to_1
from slimconv_lit.heads import WithoutProposals, faster_rcnn
from slimconv_lit.ops import Operator, resolve_operator
from slimconv_lit.tasks.base import BaseTask, Picture
from slimconv_lit.tasks.detection_metrics import COCOMeanAveragePrecision, VOCMeanAveragePrecision
from slimconv_lit.tasks.draw_boxes import Box, class_colour, draw_boxes

Images: TypeAlias = Sequence[Tensor]
"""(3, H, W) each, 0 to 1, of their own sizes."""
Detections: TypeAlias = list[dict[str, Tensor]]
"""For each image boxes (n, 4) as x0, y0, x1, y1 in its pixels, labels (n,) from 1, scores (n,), the surest first."""


class SumOfLosses(nn.Module):
    """The sum of the parts that a detector returns in training."""

    def forward(self, parts: Mapping[str, Tensor]) -> Tensor:
        """Adds scalars up, in float32 whatever the precision of each."""
        return torch.stack([part.float() for part in parts.values()]).sum()


class DetectionTask(BaseTask):
    """Faster R-CNN on any backbone.

    Batches are (images, targets): a list of (3, H, W) between 0 and 1, each of its own size, and for each image a
    dictionary with boxes (n, 4) as x0, y0, x1, y1 in its pixels, labels (n,) from 1 to `num_classes`, difficult (n,),
    crowd (n,), area (n,), image_id and name; for prediction (images, names).

    It trains on all objects that it is given; datamodules leave crowds out, and difficult ones where asked to. The
    metrics treat both as the official evaluations do. Large gradients are cut by `--trainer.gradient_clip_val=10`.

    Args:
        backbone: A name that `create_backbone` knows.
        num_classes: How many classes of objects there are; the command line takes it from the datamodule.
        form: "fpn", a feature pyramid with two linear layers for each region, over any backbone; or "c4", the paper's:
            one map of stride 16, and the ResNet's last stage, with the operator in it, for each region.
        metric: What val/map and test/map are: "voc07" (11-point AP at IoU 0.5, as in VOC2007), "voc" (area below the
            curve at IoU 0.5, since VOC2010), "coco" (AP over IoU 0.5 to 0.95; eleven more numbers are logged).
        min_size: Pixels of the shorter side that images are resized to inside the network; of several, one is drawn
            for each image in training, and the last is taken elsewhere.
        max_size: Pixels that the longer side then has at most; None for no limit.
        anchor_scales: Sides of square anchors over the stride of their map; None for those of the form.
        freeze: What is not trained: "norms", all batch norms of the backbone; "stem", these and all behind its map of
            stride 4 (of a ResNet conv1 and layer1); "none". None for "stem" with weights that fill the whole backbone,
            and for "none" from scratch, or where operators are new.
        norm: "batch" leaves the backbone's norms as they are; "group" is for training from scratch with few images.
        head: More arguments of `faster_rcnn`, of the pyramid and torchvision's: {"rpn_post_nms_top_n_test": 300}.
        draw_score: Pictures show detections from this score on.
        base: What `BaseTask` takes. `weights` are a classifier's, which go into the backbone, and in the form "c4" into
            the region head.

    Raises:
        ValueError: If a size, scale or score is out of its range, or what is frozen would have to be trained.
    """

    monitor = "val/map"
    monitor_mode: Literal["min", "max"] = "max"
    tracked = ("loss", "loss_classifier", "loss_box_reg", "loss_objectness", "loss_rpn_box_reg")

    def __init__(
        self,
        backbone: str,
        num_classes: int,
        form: Literal["fpn", "c4"] = "fpn",
        metric: Literal["voc07", "voc", "coco"] = "voc07",
        min_size: int | list[int] = 600,
        max_size: int | None = 1000,
        anchor_scales: list[float] | None = None,
        freeze: Literal["stem", "norms", "none"] | None = None,
        norm: Literal["batch", "group"] = "batch",
        head: dict[str, Any] | None = None,
        draw_score: float = 0.5,
        **base: Any,
    ) -> None:
        at_least(1, num_classes=num_classes, max_size=max_size)
        from_0_to_1(draw_score=draw_score)
        sides = min_size if isinstance(min_size, list) else [min_size]
        if not sides or min(sides) < 1:
            raise ValueError(f"min_size={min_size} must be at least 1 pixel, or several such sizes")
        if anchor_scales is not None and (not anchor_scales or min(anchor_scales) <= 0):
            raise ValueError(f"anchor_scales={anchor_scales} must be factors above 0; null for those of the form")
        super().__init__(backbone, **base)

    def build_model(self) -> nn.Module:
        """The detector with the operator in its backbone, and in the form "c4" in its region head."""
        h = self.hparams
        operator = resolve_operator(h["operator"]) if h["operator"] else None
        options = h["backbone_options"] or {}
        plain = {key: value for key, value in options.items() if key not in ("weights", "pretrained")}
        maps = create_backbone(h["backbone"], operator, features_only=True, **options)
        assert isinstance(maps, FeatureMaps)
        has_weights = len(plain) < len(options)
        has_new = has_weights and any(isinstance(module, Operator) for module in maps.modules())
        if h["weights"]:
            classifier = create_backbone(h["backbone"], operator, without_weights=True, **plain)
            # Before anything is frozen: frozen norms have fewer tensors than the file.
            inside = nn.ModuleDict({"backbone": maps})
            exclude = h["weights_exclude"]
            report = load_backbone_weights(inside, h["weights"], classifier=classifier, exclude=exclude)
            rank_zero_info(report)
            has_weights, has_new = True, not all(name.endswith("num_batches_tracked") for name in report.missing)
        if has_new and h["freeze"] in ("stem", "norms"):
            raise ValueError(
                f"freeze={h['freeze']!r}: the weights do not fill the whole backbone, and what is new in it has to be "
                "trained; use freeze='none', or weights of the network with its operators"
            )
        # A checkpoint is read without weights, and must freeze the same.
        h["freeze"] = h["freeze"] or ("stem" if has_weights and not has_new else "none")
        return faster_rcnn(
            maps,
            num_classes=h["num_classes"],
            form=h["form"],
            min_size=h["min_size"],
            max_size=h["max_size"],
            anchor_scales=h["anchor_scales"],
            freeze=h["freeze"],
            norm=h["norm"],
            **(h["head"] or {}),
        )

    def build_loss(self) -> nn.Module:
        """The sum of what region proposals and regions lose, by class and by box."""
        return SumOfLosses()

    def build_metrics(self) -> None:
        """Mean average precision, as the benchmark defines it."""
        self.val_metric = self._metric()
        self.test_metric = self._metric()

    def _metric(self) -> Metric:
        classes = self.hparams["num_classes"]
        match self.hparams["metric"]:
            case "coco":
                return COCOMeanAveragePrecision(classes)
            case "voc07":
                return VOCMeanAveragePrecision(classes, "11point")
            case _:
                return VOCMeanAveragePrecision(classes, "area")

    def counted(self, input_size: tuple[int, int, int]) -> tuple[nn.Module, tuple[int, int, int]]:
        """The detector with as many regions as it looks at in a test, and the image as it resizes it."""
        model: Any = self.model
        channels, *sides = input_size
        resize = model.transform
        scale = min(resize.min_size[-1] / min(sides), resize.max_size / max(sides))
        height, width = (int(side * scale) for side in sides)
        return WithoutProposals(model, model.rpn._post_nms_top_n["testing"]), (channels, height, width)

    def parameter_groups(self) -> list[dict[str, Any]]:
        """All that is not frozen; weight decay is on weights, and not on biases, as in the reference."""
        trained = [(name, p) for name, p in self.named_parameters() if p.requires_grad]
        biases = [p for name, p in trained if name.endswith("bias")]
        weights = [p for name, p in trained if not name.endswith("bias")]
        return [{"params": weights}, {"params": biases, "weight_decay": 0.0}]

    def forward(self, images: Images) -> Detections:  # type: ignore[override]
        """What is found in each image; in evaluation mode only."""
        found: Detections = self.model(images)
        return found

    def training_step(self, batch: tuple[Images, Sequence[dict[str, Any]]], batch_idx: int) -> Tensor:
        """The loss of one batch.

        Raises:
            FloatingPointError: If it is not finite; the message names the images.
        """
        images, targets = batch
        parts: dict[str, Tensor] = self.model(images, targets)
        loss: Tensor = self.loss(parts)
        if not loss.isfinite():
            self._stop(parts, targets)
        self.track(batch_idx, len(images), loss=loss, **parts)
        return loss

    def _stop(self, parts: Mapping[str, Tensor], targets: Sequence[dict[str, Any]]) -> None:
        values = ", ".join(f"{name} {float(part.detach()):.4g}" for name, part in parts.items())
        names = ", ".join(target["name"] for target in targets)
        raise FloatingPointError(
            f"the loss is not finite in epoch {self.current_epoch}, step {self.global_step} ({values}); images of the "
            f"batch: {names}. A lower --model.lr, a longer --model.warmup_epochs or --trainer.gradient_clip_val=10 may "
            "help; if it is always the same images, look at their boxes"
        )

    def validation_step(self, batch: tuple[Images, Sequence[dict[str, Any]]], batch_idx: int) -> None:
        """Gathers what is found in one batch."""
        images, targets = batch
        self.val_metric.update(self(images), targets)

    def on_validation_epoch_end(self) -> None:
        """Logs val/map and, for COCO, eleven more."""
        super().on_validation_epoch_end()
        self._log_scalars("val", self.val_metric, prog_bar=True)

    def test_step(self, batch: tuple[Images, Sequence[dict[str, Any]]], batch_idx: int) -> None:
        """Gathers what is found in one batch."""
        images, targets = batch
        self.test_metric.update(self(images), targets)

    def on_test_epoch_end(self) -> None:
        """Logs test/map and, for COCO, eleven more."""
        self._log_scalars("test", self.test_metric)

    def _log_scalars(self, stage: str, metric: Metric, prog_bar: bool = False) -> None:
        scalars = {name: value for name, value in metric.compute().items() if isinstance(value, Tensor)}
        for name, value in scalars.items():
            shown = prog_bar and name == "map"
            # `compute` has put the processes' parts together, so all have the same; Lightning warns unless told to ask.
            self.log(f"{stage}/{name}", value.float().to(self.device), prog_bar=shown, sync_dist=True)
        metric.reset()

    def predict_step(self, batch: tuple[Images, Sequence[str]], batch_idx: int) -> list[dict[str, Any]]:
        """For each image its name, and boxes, labels and scores as `forward` returns them."""
        images, names = batch
        return [{"name": name, **found} for name, found in zip(names, self(images), strict=True)]

    def draw(self, batch: tuple[Images, Sequence[Any]], outputs: Sequence[Mapping[str, Any]]) -> list[Picture]:
        """The images with the boxes from `draw_score` on, in the colours of their classes; true ones are dashed."""
        pictures = []
        for image, target, found in zip(*batch, outputs, strict=True):
            shown = found["scores"] >= self.hparams["draw_score"]
            rows = zip(*(found[key][shown].tolist() for key in ("boxes", "labels", "scores")), strict=True)
            boxes = [
                Box(corners, f"{self.class_names[label - 1]} {score:.0%}", class_colour(label - 1))
                for corners, label, score in rows
            ]
            known = isinstance(target, Mapping)
            truth = target["boxes"].tolist() if known else []
            name = Path(target["name"]).name if known else target
            count = f"{len(boxes)} found" + (f", {len(truth)} true" if known else "")
            (pixels,) = self.pixels(image[None])
            pictures.append(Picture(draw_boxes(pixels, boxes, truth), f"{name}\n{count}"))
        return pictures
