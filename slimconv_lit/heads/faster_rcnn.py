"""Faster R-CNN over any backbone, of torchvision's detection parts.

Ren et al., "Faster R-CNN: Towards Real-Time Object Detection with Region Proposal Networks", NeurIPS 2015,
https://arxiv.org/abs/1506.01497
Lin et al., "Feature Pyramid Networks for Object Detection", CVPR 2017, https://arxiv.org/abs/1612.03144

Two forms. "c4" is SlimConv's, in Tables VIII and IX: one map of stride 16, and the backbone's last stage for each
region. "fpn": a pyramid of maps, and two linear layers for each region.
"""

import inspect
import math
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FasterRCNN, FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN
from torchvision.models.detection.rpn import RPNHead
from torchvision.ops import Conv2dNormActivation, FeaturePyramidNetwork, MultiScaleRoIAlign
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool
from torchvision.ops.poolers import initLevelMapper

from slimconv_lit.backbones import create_backbone
from slimconv_lit.backbones.features import FeatureMaps
from slimconv_lit.heads.norms import Freeze, Norm, freeze_backbone, use_group_norms
from slimconv_lit.lookup import closest
from slimconv_lit.ops import Operator, OperatorLike
from slimconv_lit.surgery.trace import shadow_of

Form = Literal["fpn", "c4"]

CROP = 7
RATIOS = (0.5, 1.0, 2.0)
# Where the implementation behind SlimConv's tables differs from torchvision's defaults.
C4_SETTINGS: dict[str, Any] = {
    "rpn_pre_nms_top_n_train": 12000,
    "rpn_pre_nms_top_n_test": 6000,
    "rpn_post_nms_top_n_test": 300,
    "box_batch_size_per_image": 128,
    "box_nms_thresh": 0.3,
    # It keeps every score; below a thousandth there are a thousand boxes for each one that counts.
    "box_score_thresh": 0.001,
}


SETTINGS = [
    name
    for name in inspect.signature(FasterRCNN).parameters
    if name.startswith(("rpn_", "box_", "bbox_", "image_"))
    and name not in ("rpn_anchor_generator", "rpn_head", "box_roi_pool", "box_head", "box_predictor")
]


class C4RPNHead(RPNHead):
    """A region proposal head that scores object and background apart, as the one behind SlimConv's Tables VIII and IX.

    Their difference is the logit that torchvision's proposal network wants: its binary cross-entropy is the softmax
    cross-entropy of the two.

    Args:
        in_channels: Width of the map.
        width: Channels of the 3x3 convolution.
        num_anchors: A, anchors at each pixel.
    """

    def __init__(self, in_channels: int, width: int, num_anchors: int) -> None:
        super().__init__(width, 2 * num_anchors)
        self.conv = nn.Sequential(Conv2dNormActivation(in_channels, width, 3, norm_layer=None))
        self.bbox_pred = nn.Conv2d(width, 4 * num_anchors, 1)
        for name, parameter in self.named_parameters():
            if name.endswith("weight"):
                nn.init.normal_(parameter, std=0.01)
            else:
                nn.init.zeros_(parameter)

    def forward(self, x: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """For each map (B, in_channels, H, W) the logits (B, A, H, W) of objects and their boxes (B, 4A, H, W)."""
        pairs, boxes = super().forward(x)
        halves = [pair.chunk(2, dim=1) for pair in pairs]
        return [objects - background for background, objects in halves], boxes


class C4Trunk(nn.Module):
    """Images (B, 3, H, W) to the map of stride 16, (B, out_channels, H / 16, W / 16)."""

    def __init__(self, body: nn.Module, out_channels: int) -> None:
        super().__init__()
        self.body = body
        self.out_channels = out_channels

    def forward(self, x: Tensor) -> Tensor:
        """The map; see the class."""
        return self.body(x)


class C4Head(nn.Module):
    """Regions (R, C, 7, 7) to vectors (R, width): the backbone's last stage, averaged over its pixels."""

    def __init__(self, stage: nn.Module) -> None:
        super().__init__()
        self.stage = stage

    def forward(self, x: Tensor) -> Tensor:
        """The vectors; see the class."""
        return self.stage(x).mean(dim=(2, 3))


class Pyramid(nn.Module):
    """Images to a dictionary of maps, all of `out_channels`: one at each stride from 4 on, and one of twice the last.

    Args:
        body: The backbone.
        out_channels: Width of all maps.

    Attributes:
        strides: Image pixels per pixel of each map.
    """

    def __init__(self, body: FeatureMaps, out_channels: int = 256) -> None:
        super().__init__()
        strides = [stride for stride in body.strides if stride >= 4]
        self.body = body
        self.fpn = FeaturePyramidNetwork(body.channels[-len(strides) :], out_channels, LastLevelMaxPool())
        self.out_channels = out_channels
        self.strides = [*strides, 2 * strides[-1]]

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """The maps "0", "1", ..., the finest first, and "pool"; see the class."""
        maps = self.body(x)[-(len(self.strides) - 1) :]
        return self.fpn(OrderedDict((str(i), m) for i, m in enumerate(maps)))


class WithoutProposals(nn.Module):
    """What a detector computes for one batch of images, but for the choice of its regions; to count it with.

    Which regions there are depends on values, so that on the meta device a whole detector does not run. This does: the
    backbone and the proposal head on the images, and the region head on as many empty regions as are said.

    Args:
        detector: From `faster_rcnn`.
        regions: How many; 300 in SlimConv's Tables VIII and IX.
    """

    def __init__(self, detector: GeneralizedRCNN, regions: int = 300) -> None:
        super().__init__()
        self.detector = detector
        self.regions = regions

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Normalised images (B, 3, H, W) to class logits and boxes of the regions."""
        heads = self.detector.roi_heads
        features = self.detector.backbone(x)
        maps = [features] if isinstance(features, Tensor) else list(features.values())
        self.detector.rpn.head(maps)
        crops = maps[0].new_empty(self.regions, maps[0].shape[1], *heads.box_roi_pool.output_size)
        return heads.box_predictor(heads.box_head(crops))


def faster_rcnn(
    backbone: str | FeatureMaps,
    operator: OperatorLike | None = None,
    num_classes: int = 20,
    form: Form = "fpn",
    *,
    min_size: int | Sequence[int] = 600,
    max_size: int | None = 1000,
    anchor_scales: Sequence[float] | None = None,
    freeze: Freeze | None = None,
    norm: Norm = "batch",
    pyramid_width: int = 256,
    head_width: int = 1024,
    backbone_options: Mapping[str, Any] | None = None,
    **settings: Any,
) -> FasterRCNN:
    """A detector with torchvision's interface.

    In training it maps a list of images (3, H, W) between 0 and 1, and for each a dictionary with boxes (n, 4) as x0,
    y0, x1, y1 in pixels and labels (n,) from 1 to `num_classes`, to a dictionary of losses; in evaluation the images
    to dictionaries of boxes, labels and scores. Images without objects have n = 0. It normalises and resizes by itself.

    Args:
        backbone: A name as in `create_backbone`, or feature maps that were made by it, with the weights that they are
            to start from.
        operator: As in `create_backbone`. In the form "c4" it is in the region head too.
        num_classes: Classes of objects; the background, 0, is not one of them.
        form: "c4" or "fpn"; see the module.
        min_size: Pixels of the shorter side after resizing; of several, one is drawn for each image in training, and
            the last is taken in evaluation.
        max_size: Pixels that the longer side then has at most; None for no limit.
        anchor_scales: Sides of square anchors over the stride of their map; each comes in three shapes. None for 8, 16
            and 32 in the form "c4" (for COCO the paper's has 4 too) and for 8 in the form "fpn".
        freeze: What is not trained; see `freeze_backbone`. None for "stem" where the backbone's options bring weights,
            else "none". Whoever loads weights into feature maps says it here.
        norm: "batch" leaves the backbone's norms as they are; "group" is for training from scratch, see
            `use_group_norms`.
        pyramid_width: In the form "fpn", channels of the pyramid's maps.
        head_width: In the form "fpn", channels of the region head's two linear layers.
        backbone_options: More arguments of `create_backbone`.
        **settings: Those of torchvision's `FasterRCNN` that are numbers, such as rpn_post_nms_top_n_test; the form
            "c4" has the defaults of `C4_SETTINGS`, the form "fpn" torchvision's.

    Raises:
        ValueError: If an argument is unknown or does not go with another, or, in the form "c4", the backbone has no
            map of stride 16 with a stage after it that runs on regions. The message gives the way out.
    """
    if form not in get_args(Form):
        raise ValueError(f"form={form!r}; {closest(str(form), get_args(Form))}")
    if norm not in get_args(Norm):
        raise ValueError(f"norm={norm!r}; {closest(str(norm), get_args(Norm))}")
    if num_classes < 1:
        raise ValueError(f"num_classes={num_classes}: at least one class of objects, the background not counted")
    for name in settings:
        if name not in SETTINGS:
            raise ValueError(f"there is no setting {name!r}; {closest(name, SETTINGS)}")
    options = dict(backbone_options or {})
    if isinstance(backbone, str):
        made = create_backbone(backbone, operator, features_only=True, **options)
        assert isinstance(made, FeatureMaps)
        backbone = made
    elif operator is not None or options:
        raise ValueError("operator and backbone_options go with a backbone's name; these feature maps are made already")
    has_weights = bool(options.get("weights") or options.get("pretrained"))
    has_new_operators = has_weights and any(isinstance(module, Operator) for module in backbone.modules())
    freeze = freeze or ("stem" if has_weights and not has_new_operators else "none")
    if has_new_operators and freeze != "none":
        raise ValueError(
            f"freeze={freeze!r}: the weights are the plain network's, so its operators are new and have to be trained; "
            "use freeze='none', or load weights of the network with operators into feature maps"
        )
    if norm == "group" and freeze != "none":
        raise ValueError(f"norm='group' is for training from scratch, and freeze={freeze!r} is not; use freeze='none'")
    freeze_backbone(backbone, freeze)
    if norm == "group":
        use_group_norms(backbone)
    if form == "c4":
        parts = _c4(backbone, num_classes, anchor_scales)
    else:
        parts = _fpn(backbone, num_classes, anchor_scales, pyramid_width, head_width)
    sizes = {"min_size": min_size, "max_size": math.inf if max_size is None else max_size}
    return FasterRCNN(**{**parts, **sizes, **settings})


def _c4(maps: FeatureMaps, num_classes: int, scales: Sequence[float] | None) -> dict[str, Any]:
    try:
        body, stage = maps.cut_at(16)
        width = maps.channels[maps.strides.index(16)]
        with torch.no_grad():
            shadow_of(stage).eval()(torch.empty(2, width, CROP, CROP, device="meta"))
    except (ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(
            f"form='c4': {type(maps.net).__name__} cannot be cut in two at stride 16: {reason}; form='fpn' does without"
        ) from error
    anchors = _anchors([16], scales or (8, 16, 32))
    return C4_SETTINGS | {
        "backbone": C4Trunk(body, width),
        "rpn_anchor_generator": anchors,
        "rpn_head": C4RPNHead(width, 512, anchors.num_anchors_per_location()[0]),
        # Regions are large on this map: as many samples as they have pixels.
        "box_roi_pool": _pooler([16], sampling_ratio=0),
        "box_head": C4Head(stage),
        "box_predictor": FastRCNNPredictor(maps.channels[-1], num_classes + 1),
    }


def _fpn(
    maps: FeatureMaps, num_classes: int, scales: Sequence[float] | None, width: int, head_width: int
) -> dict[str, Any]:
    if maps.strides[-1] < 4:
        raise ValueError(f"form='fpn': the backbone has no map of stride 4 or more, but {maps.strides}")
    pyramid = Pyramid(maps, width)
    return {
        "backbone": pyramid,
        "box_head": TwoMLPHead(width * CROP**2, head_width),
        "box_predictor": FastRCNNPredictor(head_width, num_classes + 1),
        "rpn_anchor_generator": _anchors(pyramid.strides, scales or (8,)),
        "box_roi_pool": _pooler(pyramid.strides[:-1], sampling_ratio=2),
    }


def _anchors(strides: Sequence[int], scales: Sequence[float]) -> AnchorGenerator:
    sizes = tuple(tuple(stride * scale for scale in scales) for stride in strides)
    return AnchorGenerator(sizes, (RATIOS,) * len(strides))


def _pooler(strides: Sequence[int], sampling_ratio: int) -> MultiScaleRoIAlign:
    pooler = MultiScaleRoIAlign([str(i) for i in range(len(strides))], CROP, sampling_ratio)
    # It would guess the strides from the first batch, and wrongly where padding is much of a narrow image.
    pooler.scales = [1 / stride for stride in strides]
    pooler.map_levels = initLevelMapper(int(math.log2(strides[0])), int(math.log2(strides[-1])))
    return pooler
