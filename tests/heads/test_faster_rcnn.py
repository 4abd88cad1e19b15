import copy
import sys

import pytest
import torch
from torch.nn import functional
from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN

from slimconv_lit import SlimConv2d, create_backbone
from slimconv_lit.analysis.complexity import macs
from slimconv_lit.heads import WithoutProposals, faster_rcnn
from slimconv_lit.heads.faster_rcnn import C4RPNHead

SMALL = {"min_size": 64, "max_size": 96}
CASES = [
    ("torchvision:resnet18", "c4"),
    ("torchvision:resnet18", "fpn"),
    ("torchvision:mobilenet_v2", "c4"),
    ("torchvision:mobilenet_v2", "fpn"),
    ("cifar_resnet20", "fpn"),
    ("timm:regnety_002", "c4"),
]
NO_BOXES = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)}
TWO_BOXES = {"boxes": torch.tensor([[4.0, 5, 40, 50], [20, 10, 70, 58]]), "labels": torch.tensor([1, 3])}


def image(height=60, width=80, seed=0):
    return torch.rand(3, height, width, generator=torch.Generator().manual_seed(seed))


def detected(model, *images):
    with torch.no_grad():
        return model.eval()(list(images))


@pytest.fixture(scope="module")
def c4():
    return faster_rcnn("torchvision:resnet18", SlimConv2d, 3, "c4", **SMALL)


@pytest.mark.parametrize(("name", "form"), CASES)
def test_trains_on_one_image_and_detects(name, form):
    torch.manual_seed(0)
    model = faster_rcnn(name, SlimConv2d, 3, form, **SMALL)
    assert isinstance(model, GeneralizedRCNN)
    losses = model.train()([image()], [TWO_BOXES])
    assert set(losses) == {"loss_classifier", "loss_box_reg", "loss_objectness", "loss_rpn_box_reg"}
    sum(losses.values()).backward()
    assert [n for n, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()] == []
    first, second = detected(model, image(), image(33, 47))
    for found, (height, width) in ((first, (60, 80)), (second, (33, 47))):
        assert len(found["boxes"]) == len(found["labels"]) == len(found["scores"]) <= 100
        assert found["scores"].tolist() == sorted(found["scores"].tolist(), reverse=True)
        assert set(found["labels"].tolist()) <= {1, 2, 3}
        assert (found["boxes"] >= 0).all()
        assert (found["boxes"][:, 2] <= width + 1e-3).all()
        assert (found["boxes"][:, 3] <= height + 1e-3).all()


@pytest.mark.parametrize("form", ["c4", "fpn"])
def test_images_without_objects_train(form):
    model = faster_rcnn("cifar_resnet20" if form == "fpn" else "torchvision:resnet18", None, 3, form, **SMALL).train()
    for images, targets in (([image()], [NO_BOXES]), ([image(), image(40, 70)], [TWO_BOXES, NO_BOXES])):
        losses = model(images, targets)
        assert all(loss.isfinite() for loss in losses.values())
        assert (losses["loss_box_reg"] == 0) == (targets == [NO_BOXES])


def test_the_region_head_of_c4_has_the_operator_and_the_stage(c4):
    in_head = [name for name, m in c4.roi_heads.box_head.named_modules() if isinstance(m, SlimConv2d)]
    assert in_head == ["stage.layer4.0.conv1", "stage.layer4.1.conv1"]
    assert any(isinstance(m, SlimConv2d) for m in c4.backbone.modules())
    assert not any("layer4" in name for name, _ in c4.backbone.named_parameters())
    assert c4.roi_heads.box_head(torch.zeros(5, 256, 7, 7)).shape == (5, 512)
    assert c4.roi_heads.box_predictor.bbox_pred.out_features == 4 * (3 + 1)


def test_settings_of_c4_are_the_references_and_can_be_changed(c4):
    assert c4.rpn.anchor_generator.sizes == ((128, 256, 512),)
    assert c4.rpn.anchor_generator.num_anchors_per_location() == [9]
    assert (c4.rpn.pre_nms_top_n(), c4.rpn.post_nms_top_n()) == ((12000, 2000) if c4.rpn.training else (6000, 300))
    assert (c4.rpn.nms_thresh, c4.rpn.fg_bg_sampler.batch_size_per_image) == (0.7, 256)
    assert (c4.roi_heads.nms_thresh, c4.roi_heads.detections_per_img) == (0.3, 100)
    assert c4.roi_heads.fg_bg_sampler.batch_size_per_image == 128
    assert c4.roi_heads.box_coder.weights == (10.0, 10.0, 5.0, 5.0)
    other = faster_rcnn(
        "torchvision:resnet18", None, 80, "c4", anchor_scales=(4, 8, 16, 32), rpn_post_nms_top_n_test=50, max_size=None
    )
    assert other.rpn.anchor_generator.num_anchors_per_location() == [12]
    assert other.rpn._post_nms_top_n == {"training": 2000, "testing": 50}
    assert other.transform([image(10, 200)])[0].image_sizes == [(600, 12000)]


def test_two_scores_for_each_anchor_are_one_logit():
    """The loss of their difference is the softmax cross-entropy of the two."""
    torch.manual_seed(0)
    head = C4RPNHead(8, 16, num_anchors=3)
    assert sum(p.numel() for p in head.parameters()) == (9 * 8 + 1) * 16 + (16 + 1) * 6 + (16 + 1) * 12
    x = torch.randn(2, 8, 4, 5)
    (logits,), (boxes,) = head([x])
    assert (logits.shape, boxes.shape) == ((2, 3, 4, 5), (2, 12, 4, 5))
    pairs = head.cls_logits(head.conv(x)).view(2, 2, 3, 4, 5)
    is_object = torch.rand(2, 3, 4, 5) < 0.5
    torch.testing.assert_close(
        functional.binary_cross_entropy_with_logits(logits, is_object.float()),
        functional.cross_entropy(pairs, is_object.long()),
    )


@pytest.mark.parametrize("form", ["c4", "fpn"])
def test_a_narrow_image_first_changes_nothing_for_the_next(form):
    torch.manual_seed(0)
    model = faster_rcnn("torchvision:resnet18", None, 3, form, **SMALL)
    twin = copy.deepcopy(model)
    detected(model, image(4, 90))
    (after,), (fresh,) = detected(model, image()), detected(twin, image())
    assert torch.equal(after["boxes"], fresh["boxes"])


def test_weights_travel_in_the_state_dict_frozen_or_not(c4):
    torch.manual_seed(1)
    frozen = faster_rcnn("torchvision:resnet18", SlimConv2d, 3, "c4", freeze="stem", **SMALL)
    thawed = faster_rcnn("torchvision:resnet18", SlimConv2d, 3, "c4", **SMALL)
    expected = detected(c4, image())[0]["boxes"]
    frozen.load_state_dict(c4.state_dict())
    thawed.load_state_dict(frozen.state_dict())
    for model in (frozen, thawed):
        torch.testing.assert_close(detected(model, image())[0]["boxes"], expected, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize(("freeze", "form"), [("stem", "c4"), ("stem", "fpn"), ("norms", "c4"), ("none", "c4")])
def test_what_is_frozen_stays(freeze, form):
    torch.manual_seed(0)
    model = faster_rcnn("torchvision:resnet18", SlimConv2d, 3, form, freeze=freeze, **SMALL).train()
    before = copy.deepcopy(model.state_dict())
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.01, weight_decay=0.1)
    sum(model([image()], [TWO_BOXES]).values()).backward()
    optimizer.step()
    after = model.state_dict()
    same = {name for name in after if torch.equal(before[name], after[name])}
    norms = {name.rpartition(".")[0] for name in after if name.endswith("running_mean")}
    gates = {name for name in norms if name.endswith("gate.norm")}
    of_norms = {name for name in after if name.rpartition(".")[0] in norms}
    stem = {name for name in after if name.split(".")[-1] != "num_batches_tracked" and ".layer1." in name}
    stem |= {name for name in after if name.endswith("conv1.weight") and "layer" not in name}
    assert len(stem) > 10
    match freeze:
        case "stem":
            assert same == stem | of_norms
        case "norms":
            assert same == of_norms
        case _:
            # The gates of one image leave their statistics alone; see `norm_of_pooled`.
            assert {name.rpartition(".")[0] for name in same} <= gates


def test_the_default_is_to_freeze_where_weights_come_along(monkeypatch):
    # Nothing is downloaded: the builder only thinks that it was given weights.
    build = create_backbone

    def without_download(*args, **options):
        return build(*args, **{k: v for k, v in options.items() if k != "weights"})

    # The package has a function of the module's name.
    monkeypatch.setattr(sys.modules[faster_rcnn.__module__], "create_backbone", without_download)
    given = {"backbone_options": {"weights": "DEFAULT"}}
    plain = faster_rcnn("torchvision:resnet18", None, 3, **given)
    trained = {name for name, p in plain.named_parameters() if p.requires_grad}
    assert "backbone.body.net.conv1.weight" not in trained
    assert {"backbone.body.net.layer2.0.conv1.weight", "rpn.head.cls_logits.weight"} <= trained
    slim = faster_rcnn("torchvision:resnet18", SlimConv2d, 3, **given)
    assert all(p.requires_grad for p in slim.parameters())
    assert all(p.requires_grad for p in faster_rcnn("torchvision:resnet18", None, 3).parameters())
    with pytest.raises(ValueError, match=r"freeze='stem'.*use freeze='none'"):
        faster_rcnn("torchvision:resnet18", SlimConv2d, 3, freeze="stem", **given)
    # The name has the operator in it.
    with pytest.raises(ValueError, match=r"freeze='norms'.*use freeze='none'"):
        faster_rcnn("sc_cifar_resnet56", None, 3, freeze="norms", **given)


def test_takes_feature_maps_with_their_weights():
    maps = create_backbone("torchvision:resnet18", SlimConv2d, features_only=True)
    model = faster_rcnn(maps, num_classes=3, form="c4", **SMALL)
    ours = dict(maps.net.named_parameters())
    theirs = dict(model.named_parameters())
    assert theirs["backbone.body.conv1.weight"] is ours["conv1.weight"]
    assert theirs["roi_heads.box_head.stage.layer4.1.conv2.weight"] is ours["layer4.1.conv2.weight"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"form": "c5"}, "form='c5'; known: c4, fpn"),
        ({"norm": "batches"}, "norm='batches'; did you mean 'batch'"),
        ({"freeze": "stems"}, "freeze='stems'; did you mean 'stem'"),
        ({"norm": "group", "freeze": "stem"}, "norm='group' is for training from scratch"),
        ({"num_classes": 0}, "num_classes=0: at least one"),
        ({"rpn_nms_tresh": 0.5}, "no setting 'rpn_nms_tresh'; did you mean 'rpn_nms_thresh'"),
        ({"backbone": "cifar_resnet18", "form": "c4"}, "strides are 2, 4, 8; form='fpn' does without"),
        ({"backbone": "dla46_c", "form": "c4"}, "form='c4': DLA cannot be cut.*form='fpn' does without"),
        ({"backbone": "oct_resnet50", "form": "c4"}, "does not read that alone; form='fpn' does without"),
    ],
)
def test_bad_arguments_are_named_with_a_way_out(arguments, message):
    with pytest.raises(ValueError, match=message):
        faster_rcnn(**{"backbone": "cifar_resnet20", "operator": None, "num_classes": 3, **arguments})


def test_feature_maps_do_not_go_with_an_operator():
    maps = create_backbone("cifar_resnet20", features_only=True)
    with pytest.raises(ValueError, match="operator and backbone_options go with a backbone's name"):
        faster_rcnn(maps, SlimConv2d, 3)


def test_each_region_costs_its_head(c4):
    size = (64, 96)
    ten, eleven = (macs(WithoutProposals(c4, regions), size) for regions in (10, 11))
    predictor = c4.roi_heads.box_predictor
    linear = predictor.cls_score.weight.numel() + predictor.bbox_pred.weight.numel()
    assert eleven - ten == macs(c4.roi_heads.box_head, (256, 7, 7)) + linear
    on_image = macs(c4.backbone, size) + macs(C4RPNHead(256, 512, 9).conv, (256, 4, 6)) + 512 * (18 + 36) * 4 * 6
    assert ten - 10 * (eleven - ten) == on_image


@pytest.mark.parametrize(("name", "form"), [("cifar_resnet20", "fpn"), ("torchvision:resnet18", "c4")])
def test_a_few_steps_fit_one_image(name, form):
    torch.manual_seed(0)
    model = faster_rcnn(name, SlimConv2d, 3, form, box_batch_size_per_image=32, **SMALL).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.005, momentum=0.9)
    losses = []
    for _ in range(12):
        loss = sum(model([image()], [TWO_BOXES]).values())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 10.0)
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-3:]) / 3 < 0.75 * losses[0]
