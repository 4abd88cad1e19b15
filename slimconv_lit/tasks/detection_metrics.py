"""Average precision of detections, as the official evaluations of Pascal VOC and MS COCO define it.

Both metrics are used alike. `update(predictions, targets)` takes, for each image, what torchvision's detectors return
(`boxes` (n, 4) as x0, y0, x1, y1, `scores` (n,), `labels` (n,) from 1) and the datamodules' targets (`boxes`, `labels`,
`difficult`, `crowd`, `area`, `image_id`). `compute()` returns a dictionary:

- "map" and, for COCO, eleven more scalars: tensors without axes;
- "map_per_class": a number for each class in the order of the labels, NaN for a class that has no object to be found;
- "objects": how many each class has to be found, difficult ones and crowds not among them;
- "curves": for each class recall and precision at IoU 0.5, an array (2, P).

Of images with one `image_id` only one counts: torch's distributed sampler repeats some to fill its last round.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, distributed
from torchmetrics import Metric
from torchmetrics.detection import MeanAveragePrecision
from torchmetrics.utilities import dim_zero_cat
from torchvision.ops import box_iou

Detections: TypeAlias = Mapping[str, Tensor]
Target: TypeAlias = Mapping[str, Any]

_NAMES = "map map_50 map_75 map_small map_medium map_large mar_1 mar_10 mar_100 mar_small mar_medium mar_large"
COCO_SCALARS = tuple(_NAMES.split())
"""COCO's twelve numbers in their official order."""

_IGNORED = -1


class VOCMeanAveragePrecision(Metric):
    """The mean over classes of the average precision of Pascal VOC's devkit.

    M. Everingham et al., "The Pascal Visual Object Classes (VOC) Challenge", IJCV 2010, section 4.2.

    Detections of a class are taken by falling score. One belongs to that object of its class and image that it overlaps
    most (of equal ones the first), if the IoU is `iou_threshold` or more: then it is right, unless the object has been
    found already, which makes it wrong. A detection that belongs to a `difficult` object is not counted at all, and
    `difficult` objects need not be found. Of equal scores, images of smaller `image_id` come first, and then what came
    first within the image.

    The devkit names a box by its first and last pixel and so adds 1 to every width. Here x1 and y1 are where the last
    pixel ends: widths are the same without it. Recall levels are compared as fractions, so 3 of 10 does reach 0.3.

    Args:
        num_classes: Without background.
        interpolation: "11point", that of VOC2007: the mean over the recalls 0, 0.1, ... 1 of the best precision at that
            recall or a higher one; or "area", since VOC2010: the area below that curve.
        iou_threshold: How much a detection has to overlap its object.
        metric: Arguments of torchmetrics' `Metric`.

    Raises:
        ValueError: If `interpolation` is neither.
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False

    scores: list[Tensor]
    labels: list[Tensor]
    outcomes: list[Tensor]
    counts: list[Tensor]
    image_ids: list[Tensor]
    objects: list[Tensor]

    def __init__(
        self,
        num_classes: int,
        interpolation: Literal["11point", "area"] = "11point",
        iou_threshold: float = 0.5,
        **metric: Any,
    ) -> None:
        super().__init__(**metric)
        if interpolation not in ("11point", "area"):
            raise ValueError(f"interpolation={interpolation!r} must be '11point' or 'area'")
        self.num_classes, self.interpolation, self.iou_threshold = num_classes, interpolation, iou_threshold
        # Of each detection, then of each image: what is right can be told within the image.
        for name in ("scores", "labels", "outcomes", "counts", "image_ids", "objects"):
            self.add_state(name, [], dist_reduce_fx="cat")

    def update(self, predictions: Sequence[Detections], targets: Sequence[Target]) -> None:
        """Takes in the detections in some images."""
        for found, target in zip(predictions, targets, strict=True):
            wanted = target["labels"][~target["difficult"]] - 1
            self.scores.append(found["scores"].detach())
            self.labels.append(found["labels"])
            self.outcomes.append(self._judge(found, target).to(self.device))
            self.counts.append(torch.tensor([len(found["scores"])], device=self.device))
            self.image_ids.append(target["image_id"].view(1))
            self.objects.append(torch.bincount(wanted, minlength=self.num_classes)[None])

    def _judge(self, found: Detections, target: Target) -> Tensor:
        """(n,): 1 right, 0 wrong, -1 not counted."""
        outcomes = torch.zeros(len(found["scores"]), dtype=torch.int64)
        if len(outcomes) == 0 or len(target["labels"]) == 0:
            return outcomes
        overlaps = box_iou(found["boxes"].cpu().double(), target["boxes"].cpu().double())
        overlaps[found["labels"][:, None].cpu() != target["labels"].cpu()] = -1
        # NumPy's argmax, and not torch's, promises the first of equal ones.
        best = overlaps.numpy().argmax(1)
        reached = overlaps.numpy().max(1) >= self.iou_threshold
        difficult, taken = target["difficult"].tolist(), set()
        for i in torch.argsort(found["scores"].cpu(), descending=True, stable=True).tolist():
            if reached[i] and difficult[best[i]]:
                outcomes[i] = _IGNORED
            elif reached[i] and best[i] not in taken:
                outcomes[i] = 1
                taken.add(best[i])
        return outcomes

    def compute(self) -> dict[str, Any]:
        """The values of all images so far, in double precision: see the head of this file."""
        if len(self.image_ids) == 0:
            nothing = [np.zeros((2, 0))] * self.num_classes
            return _results(np.full(self.num_classes, np.nan), [0] * self.num_classes, nothing)
        state = {name: dim_zero_cat(getattr(self, name)).cpu() for name in self._defaults}
        _, first = np.unique(state["image_ids"].numpy(), return_index=True)
        rank = np.full(len(state["image_ids"]), -1)
        rank[first] = np.arange(len(first))
        image = np.repeat(rank, state["counts"].numpy())
        scores, labels, outcomes = (state[name].double().numpy() for name in ("scores", "labels", "outcomes"))
        # The last key is the first one to sort by.
        order = np.lexsort((image, -scores))
        order = order[(image[order] >= 0) & (outcomes[order] != _IGNORED)]
        labels, outcomes = labels[order], outcomes[order]
        objects = state["objects"].numpy()[first].sum(0).tolist()
        hits = [np.cumsum(outcomes[labels == label]) for label in range(1, self.num_classes + 1)]
        pairs = list(zip(hits, objects, strict=True))
        average = self._eleven_points if self.interpolation == "11point" else self._area
        per_class = np.array([average(hit, total) if total else np.nan for hit, total in pairs])
        curves = [np.stack([hit / max(total, 1), _precision(hit)]) for hit, total in pairs]
        return _results(per_class, objects, curves)

    @staticmethod
    def _eleven_points(hits: NDArray[np.float64], total: int) -> float:
        best = _best_from_here(_precision(hits))
        where = np.searchsorted(10 * hits, np.arange(11) * total)
        return float(best[where[where < len(best)]].sum() / 11)

    @staticmethod
    def _area(hits: NDArray[np.float64], total: int) -> float:
        widths = np.diff(hits / total, prepend=0)
        return float((widths * _best_from_here(_precision(hits))).sum())


class COCOMeanAveragePrecision(MeanAveragePrecision):
    """The twelve numbers of COCO's evaluation of boxes, and the average precision of each class.

    T.-Y. Lin et al., "Microsoft COCO: Common Objects in Context", ECCV 2014; https://cocodataset.org/#detection-eval.
    The work is torchmetrics' and faster-coco-eval's, at exactly the thresholds of the official code: torchmetrics' own
    are rounded to single precision, so that a recall of exactly 0.1 does not reach 0.1.

    Of the twelve, `COCO_SCALARS`, one that means nothing (there is no small object) is -1, as in the official code.

    Args:
        num_classes: Without background.
        metric: Arguments of torchmetrics' `Metric`.
    """

    image_ids: list[Tensor]

    def __init__(self, num_classes: int, **metric: Any) -> None:
        super().__init__(
            iou_thresholds=np.linspace(0.5, 0.95, 10).tolist(),
            rec_thresholds=np.linspace(0, 1, 101).tolist(),
            # Gives every class's precisions in one evaluation; class_metrics=True does one more for each class.
            extended_summary=True,
            backend="faster_coco_eval",
            **metric,
        )
        # That only the best 100 detections of an image count is part of the definition.
        self.warn_on_many_detections = False
        self.num_classes = num_classes
        self.add_state("image_ids", [], dist_reduce_fx=None)

    def update(self, predictions: Sequence[Detections], targets: Sequence[Target]) -> None:
        """Takes in the detections in some images."""
        renamed = [
            {"boxes": t["boxes"], "labels": t["labels"], "area": t["area"], "iscrowd": t["crowd"].long()}
            for t in targets
        ]
        super().update([dict(found) for found in predictions], renamed)
        self.image_ids.extend(t["image_id"].view(1) for t in targets)

    def compute(self) -> dict[str, Any]:
        """The values of all images so far: see the head of this file."""
        states = {name: getattr(self, name) for name in self._defaults}
        _, once = np.unique([int(image) for image in self.image_ids], return_index=True)
        try:
            for name, values in states.items():
                # There are no masks.
                setattr(self, name, [values[i] for i in once] if values else [])
            found, objects = super().compute(), self._count_objects()
        finally:
            for name, values in states.items():
                setattr(self, name, values)
        per_class = np.full(self.num_classes, np.nan)
        curves = [np.zeros((2, 0))] * self.num_classes
        if "precision" in found:
            # (IoU thresholds, recalls, classes that occur, all sizes of objects, 100 detections)
            precision = found["precision"].numpy()[:, :, :, 0, -1]
            for index, label in enumerate(found["classes"].view(-1).tolist()):
                if precision[..., index].max() > -1:
                    per_class[label - 1] = precision[..., index].mean()
                    curves[label - 1] = np.stack([np.array(self.rec_thresholds), precision[0, :, index]])
        scalars = {name: found[name].view(()) for name in COCO_SCALARS}
        return scalars | {"map_per_class": per_class.tolist(), "objects": objects, "curves": curves}

    def _sync_dist(self, dist_sync_fn: Any = None, process_group: Any = None) -> None:
        """Puts all processes' images together; torchmetrics waits for ever where one process has an image more."""
        mine = {name: [value.cpu() for value in getattr(self, name)] for name in self._defaults}
        parts: list[Any] = [None] * distributed.get_world_size(process_group)
        distributed.all_gather_object(parts, mine, process_group)
        for name in self._defaults:
            setattr(self, name, [value.to(self.device) for part in parts for value in part[name]])

    def _count_objects(self) -> list[int]:
        pairs = zip(self.groundtruth_labels, self.groundtruth_crowds, strict=True)
        counts = [torch.bincount(labels[crowds == 0] - 1, minlength=self.num_classes) for labels, crowds in pairs]
        return torch.stack(counts).sum(0).tolist() if counts else [0] * self.num_classes


def _precision(hits: NDArray[np.float64]) -> NDArray[np.float64]:
    return hits / np.arange(1, len(hits) + 1)


def _best_from_here(values: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.maximum.accumulate(values[::-1])[::-1]


def _results(per_class: NDArray[np.float64], objects: list[int], curves: list[NDArray[np.float64]]) -> dict[str, Any]:
    known = per_class[~np.isnan(per_class)]
    mean = torch.tensor(known.mean() if len(known) else torch.nan, dtype=torch.float64)
    return {"map": mean, "map_per_class": per_class.tolist(), "objects": objects, "curves": curves}
