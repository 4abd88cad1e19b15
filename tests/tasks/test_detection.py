import math
import re

import pytest
import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader

from slimconv_lit.analysis.complexity import macs
from slimconv_lit.backbones import create_backbone
from slimconv_lit.data import VOC2007DataModule
from slimconv_lit.ops import SlimConv2d
from slimconv_lit.tasks import DetectionTask

HEAD = {
    "pyramid_width": 16,
    "head_width": 32,
    "rpn_pre_nms_top_n_train": 50,
    "rpn_post_nms_top_n_train": 20,
    "rpn_post_nms_top_n_test": 20,
    "box_batch_size_per_image": 16,
}
SMALL = {"backbone": "cifar_resnet20", "num_classes": 3, "min_size": 48, "max_size": 64, "head": HEAD, "lr": 0.01}
COCO_SCALARS = {"map", "map_50", "map_75", "map_small", "map_medium", "map_large"}
COCO_SCALARS |= {"mar_1", "mar_10", "mar_100", "mar_small", "mar_medium", "mar_large"}


def trainer(**options):
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    return pl.Trainer(**quiet | {"enable_checkpointing": False} | options)


def target(number, boxes, labels=None, difficult=None, crowd=None):
    boxes = torch.tensor(boxes, dtype=torch.float32).view(-1, 4)
    no = torch.zeros(len(boxes), dtype=torch.bool)
    return {
        "boxes": boxes,
        "labels": torch.arange(len(boxes)) % 3 + 1 if labels is None else torch.tensor(labels),
        "difficult": no if difficult is None else torch.tensor(difficult),
        "crowd": no if crowd is None else torch.tensor(crowd),
        "area": (boxes[:, 2:] - boxes[:, :2]).prod(1),
        "image_id": torch.tensor(number),
        "name": f"{number:06d}.jpg",
    }


def image(number, height=48, width=56):
    return torch.rand(3, height, width, generator=torch.Generator().manual_seed(number))


def loader(items, batch_size):
    def collate(batch):
        images, targets = zip(*batch, strict=True)
        return list(images), list(targets)

    return DataLoader(items, batch_size, collate_fn=collate)


WITH_OBJECTS = [(image(n, 40 + 4 * n), target(n, [[4, 4, 30, 30], [20, 8, 50, 36]])) for n in range(4)]


@pytest.mark.parametrize("form", ["fpn", "c4"])
def test_one_image_a_step_and_images_without_objects_train(form):
    """Batches of one image, one with objects and one with none; the gates' norms see one pooled pixel each."""
    backbone = {} if form == "fpn" else {"backbone": "torchvision:resnet18", "head": {"box_batch_size_per_image": 4}}
    task = DetectionTask(**SMALL | backbone, form=form, operator=SlimConv2d)
    before = {name: p.detach().clone() for name, p in task.named_parameters()}
    empty = (image(9), target(9, []))
    fit = trainer(max_epochs=1, limit_val_batches=0)
    fit.fit(task, loader([WITH_OBJECTS[0], empty], 1))
    logged = fit.callback_metrics
    parts = [value for name, value in logged.items() if re.fullmatch("train/loss_(?!step).*", name)]
    assert len(parts) == 4
    assert float(sum(parts)) == pytest.approx(float(logged["train/loss"]), rel=1e-5)
    still = [name for name, p in task.named_parameters() if torch.equal(p, before[name])]
    assert not [name for name in still if name.endswith("weight") and "conv" in name]


def test_nothing_but_images_without_objects():
    task = DetectionTask(**SMALL)
    trainer(max_epochs=1, limit_val_batches=0).fit(task, loader([(image(n), target(n, [])) for n in range(4)], 2))
    assert all(p.isfinite().all() for p in task.parameters())


def test_a_loss_that_is_not_finite_names_the_images():
    task = DetectionTask(**SMALL | {"lr": 1e30}, schedule="constant")
    with pytest.raises(FloatingPointError, match=r"000002\.jpg, 000003\.jpg.*gradient_clip_val"):
        trainer(max_epochs=1, limit_val_batches=0).fit(task, loader(WITH_OBJECTS, 2))
    assert task.global_step == 1


def test_gradients_are_cut_by_the_trainer():
    task = DetectionTask(**SMALL | {"lr": 1e3}, schedule="constant", momentum=0.0, weight_decay=0.0)
    before = [p.detach().clone() for p in task.parameters()]
    trainer(max_epochs=1, limit_val_batches=0, gradient_clip_val=1e-6).fit(task, loader(WITH_OBJECTS, 4))
    pairs = zip(task.parameters(), before, strict=True)
    moved = math.sqrt(sum(float((p.detach() - old).square().sum()) for p, old in pairs))
    assert 0 < moved <= 1.01e-3


def test_weight_decay_is_not_on_biases_and_what_is_frozen_is_not_trained():
    task = DetectionTask(**SMALL, freeze="stem", operator="SlimConv2d")
    weights, biases = task.parameter_groups()
    assert biases["weight_decay"] == 0.0
    names = {id(p): name for name, p in task.named_parameters()}
    assert all(names[id(p)].endswith("bias") for p in biases["params"])
    assert not any(names[id(p)].endswith("bias") for p in weights["params"])
    trained = [*weights["params"], *biases["params"]]
    frozen = {name for name, p in task.named_parameters() if not p.requires_grad}
    assert frozen
    assert len(trained) + len(frozen) == len(names)


@pytest.mark.parametrize(("metric", "passed_over"), [("voc07", "difficult"), ("voc", "difficult"), ("coco", "crowd")])
def test_metrics_are_logged_and_what_they_pass_over_is_handed_on(metric, passed_over, monkeypatch):
    task = DetectionTask(**SMALL, metric=metric)
    plain, other = [4.0, 4, 30, 30], [8.0, 8, 40, 40]
    truth = target(1, [plain, other], [1, 1], **{passed_over: [False, True]})
    # Two on the object that does not count would be a mistake, and the surest one, if it counted.
    found = {
        "boxes": torch.tensor([other, other, plain]),
        "labels": torch.tensor([1, 1, 1]),
        "scores": torch.tensor([0.9, 0.8, 0.7]),
    }
    monkeypatch.setattr(task, "forward", lambda images: [found])
    check, data = trainer(), loader([(image(1), truth)], 1)
    (validated,) = check.validate(task, data, verbose=False)
    (tested,) = check.test(task, data, verbose=False)
    scalars = COCO_SCALARS if metric == "coco" else {"map"}
    assert set(validated) == {f"val/{name}" for name in scalars}
    assert set(tested) == {f"test/{name}" for name in scalars}
    assert tested["test/map"] == validated["val/map"] == pytest.approx(1.0)


def test_a_checkpoint_alone_rebuilds_the_detector_and_what_is_frozen(tmp_path):
    donor = create_backbone("cifar_resnet20", num_classes=7)
    torch.save(donor.state_dict(), tmp_path / "donor.pth")
    task = DetectionTask(**SMALL, weights=str(tmp_path / "donor.pth"))
    # Weights that fill the backbone freeze its beginning and its norms.
    assert task.hparams["freeze"] == "stem"
    assert task.hparams["weights"] is None
    stem = task.model.backbone.body.net.get_submodule("conv1").weight
    assert torch.equal(stem, donor.conv1.weight)
    fit = trainer(max_epochs=1, limit_val_batches=0)
    fit.fit(task, loader(WITH_OBJECTS, 2))
    assert torch.equal(stem, donor.conv1.weight)
    fit.save_checkpoint(tmp_path / "x.ckpt")
    (tmp_path / "donor.pth").unlink()
    again = DetectionTask.load_from_checkpoint(tmp_path / "x.ckpt", weights_only=True).eval()
    assert again.hparams["freeze"] == "stem"
    assert not again.model.backbone.body.net.get_submodule("conv1").weight.requires_grad
    images = [image(1), image(2, 60)]
    for first, second in zip(task.eval()(images), again(images), strict=True):
        for key, value in first.items():
            torch.testing.assert_close(second[key], value, rtol=0, atol=0)


def test_a_plain_network_s_weights_in_a_slim_one_leave_all_to_be_trained(tmp_path):
    torch.save(create_backbone("cifar_resnet20").state_dict(), tmp_path / "plain.pth")
    slim = {"operator": "SlimConv2d", "weights": str(tmp_path / "plain.pth")}
    assert DetectionTask(**SMALL, **slim).hparams["freeze"] == "none"
    with pytest.raises(ValueError, match=r"freeze='norms'.*has to be trained"):
        DetectionTask(**SMALL, **slim, freeze="norms")


def test_c4_takes_the_region_head_from_the_classifier_too(tmp_path):
    donor = create_backbone("torchvision:resnet18", "SlimConv2d", num_classes=5)
    torch.save(donor.state_dict(), tmp_path / "slim.pth")
    weights = {"weights": str(tmp_path / "slim.pth"), "operator": "SlimConv2d"}
    task = DetectionTask("torchvision:resnet18", 3, form="c4", **weights)
    of_head = dict(task.model.roi_heads.box_head.named_parameters())
    (name,) = (name for name in of_head if name.endswith("layer4.1.conv2.weight"))
    assert torch.equal(of_head[name], donor.layer4[1].conv2.weight)
    assert task.hparams["freeze"] == "stem"


def test_boxes_are_drawn_on_images_of_any_size():
    task = DetectionTask(**SMALL, draw_score=0.6)
    images = [torch.full((3, 40, 60), 0.5), torch.full((3, 400, 700), 0.5), torch.full((3, 30, 30), 0.5)]
    found = [
        {"boxes": torch.tensor([[5.0, 5, 55, 35], [0, 0, 60, 40]]), "labels": torch.tensor([1, 2])},
        {"boxes": torch.tensor([[690.0, 390, 700, 400]]), "labels": torch.tensor([3])},
        {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)},
    ]
    scores = [[0.9, 0.5], [0.7], []]
    found = [f | {"scores": torch.tensor(s)} for f, s in zip(found, scores, strict=True)]
    targets = [target(1, [[6, 6, 50, 30]]), target(2, []), target(3, [])]
    trainer().validate(task, loader(WITH_OBJECTS, 2), verbose=False)
    first, large, none = task.draw((images, targets), found)
    assert first.caption == "000001.jpg\n1 found, 1 true"
    # Small images are enlarged so that labels can be read, by whole numbers.
    assert first.image.shape == (3, 320, 480)
    assert large.image.shape == (3, 400, 700)
    grey = torch.full_like(none.image, 128)
    assert torch.equal(none.image, grey)
    assert (large.image[:, 360:, 560:] != 128).any(), "the label of a box in the corner stays in the picture"
    assert (first.image == 255).all(0).any(), "the true box is white"
    (named,) = task.draw((images[:1], ["a/b.jpg"]), found[:1])
    assert named.caption == "a/b.jpg\n1 found"


def test_what_a_detector_costs_is_counted_at_the_size_that_it_sees():
    """Table VIII's count, in the project's own convention: 158 G instead of thop's 160 G; see tests of `paper`."""
    task = DetectionTask("torchvision:resnet101", 20, form="c4", backbone_options={"without_weights": True})
    network, size = task.counted((3, 300, 425))
    assert size == (3, 600, 850)
    assert macs(network, size) == 159_406_475_520


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"form": "c5"}, "did you mean|c4"),
        ({"head": {"rpn_nms": 1}}, "rpn_nms"),
        ({"norm": "group", "freeze": "norms"}, "from scratch"),
        ({"num_classes": 0}, "num_classes=0 must be at least 1"),
        ({"min_size": 0}, "min_size=0 must be at least 1 pixel"),
        ({"min_size": []}, r"min_size=\[\] must be at least 1 pixel"),
        ({"max_size": -1}, "max_size=-1 must be at least 1"),
        ({"anchor_scales": [8.0, -1.0]}, r"anchor_scales=\[8\.0, -1\.0\] must be factors above 0"),
        ({"draw_score": 50}, "draw_score=50 must be from 0 to 1"),
    ],
)
def test_mistakes_are_named(wrong, message):
    with pytest.raises(ValueError, match=message):
        DetectionTask(**SMALL | wrong)


def test_learns_digits_a_little(tmp_path):
    """The sample in VOC's layout, through datamodule and task: the loss falls."""
    pl.seed_everything(0)
    data = VOC2007DataModule(str(tmp_path), sample=True, batch_size=4, num_workers=0)
    task = DetectionTask(**SMALL | {"num_classes": 20, "lr": 0.02, "min_size": 64, "max_size": 96}, warmup_epochs=0.5)
    losses = []

    class Recorder(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            losses.append(float(outputs["loss"]))

    fit = trainer(max_epochs=1, limit_train_batches=20, limit_val_batches=1, callbacks=[Recorder()])
    fit.fit(task, datamodule=data)
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])
    rows = fit.predict(task, datamodule=data)[0]
    assert set(rows[0]) == {"name", "boxes", "labels", "scores"}
