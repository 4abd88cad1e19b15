import re
from itertools import pairwise

import numpy as np
import pytest
import pytorch_lightning as pl
import timm
import torch
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from pytorch_lightning.callbacks import Callback
from torch.utils.data import DataLoader, TensorDataset

from slimconv_lit.ops import SlimConv2d
from slimconv_lit.tasks import ClassificationTask, SegmentationTask
from slimconv_lit.tasks.segmentation import PixelCrossEntropy
from slimconv_lit.tasks.segmentation_metrics import class_iou, mean_iou, pixel_accuracy

SMALL = {
    "backbone": "cifar_resnet20",
    "num_classes": 5,
    "output_stride": 8,
    "head": {"width": 16, "low_level_width": 8, "dilations": [1, 2, 3]},
}
QUIET = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}


def trainer(**options):
    return pl.Trainer(**QUIET | {"enable_checkpointing": False} | options)


def scenes(count=8, batch_size=4, size=(16, 16), classes=5):
    """Images whose colour tells the class of each half, with a line of ignored pixels between."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(classes, (count, 1, 2), generator=generator).repeat_interleave(size[1] // 2, 2)
    labels = labels.expand(-1, size[0], -1).clone()
    images = torch.stack([torch.sin(labels * factor) for factor in (1.0, 2.0, 3.0)], dim=1)
    labels[..., size[1] // 2] = 255
    return DataLoader(TensorDataset(images, labels), batch_size)


def plain_scores(predicted, truth, classes, ignored=255):
    """IoU of each class (None if absent), their mean and the pixel accuracy, by sets of pixels."""
    kept = truth != ignored
    ious = []
    for label in range(classes):
        ours, theirs = kept & (predicted == label), kept & (truth == label)
        union = np.sum(ours | theirs)
        ious.append(np.sum(ours & theirs) / union if union else None)
    present = [iou for iou in ious if iou is not None]
    accuracy = np.sum(kept & (predicted == truth)) / kept.sum() if kept.any() else np.nan
    return ious, np.mean(present) if present else np.nan, accuracy


@pytest.fixture(scope="module")
def task():
    return SegmentationTask(**SMALL).eval()


@settings(max_examples=60)
@given(data=st.data(), seed=st.integers(0, 2**32 - 1))
def test_scores_are_those_of_a_plain_computation(task, data, seed):
    """With ignored pixels, classes that are absent on either side, and images of which no pixel counts."""
    rng = np.random.default_rng(seed)
    some = st.lists(st.integers(0, 4), min_size=1, max_size=5)
    true_classes, predicted_classes = data.draw(some), data.draw(some)
    task.val_counts.reset()
    all_predicted, all_truth = [], []
    for ignored_share in data.draw(st.lists(st.sampled_from([0, 0.3, 1.0]), min_size=1, max_size=4)):
        shape = data.draw(st.tuples(*[st.integers(1, 20)] * 2))
        truth = rng.choice(true_classes, shape)
        truth[rng.random(shape) < ignored_share] = 255
        predicted = np.where(rng.random(shape) < 0.5, truth % 5, rng.choice(predicted_classes, shape))
        task.val_counts.update(torch.from_numpy(predicted)[None], torch.from_numpy(truth)[None])
        all_predicted.append(predicted.ravel())
        all_truth.append(truth.ravel())
    counts = task.val_counts.compute()
    ious, mean, accuracy = plain_scores(np.concatenate(all_predicted), np.concatenate(all_truth), 5)
    close = {"rtol": 0, "atol": 1e-12, "equal_nan": True}
    np.testing.assert_allclose(class_iou(counts), [np.nan if iou is None else iou for iou in ious], **close)
    np.testing.assert_allclose(mean_iou(counts), mean, **close)
    np.testing.assert_allclose(pixel_accuracy(counts), accuracy, **close)
    task.val_counts.reset()


def test_counts_stay_exact_where_float32_would_not():
    """VOC2012's validation images have about 2.6e8 pixels."""
    counts = torch.tensor([[300_000_001, 1], [0, 3]])
    assert class_iou(counts).tolist() == [300_000_001 / 300_000_002, 3 / 4]
    assert pixel_accuracy(counts).item() == 300_000_004 / 300_000_005


def test_validation_and_test_log_the_plain_scores(task):
    loader = scenes()
    predicted = np.concatenate([task(images).argmax(1).numpy() for images, _ in loader])
    truth = np.concatenate([labels.numpy() for _, labels in loader])
    _, mean, accuracy = plain_scores(predicted, truth, 5)
    fit = trainer()
    for stage, verb in (("val", fit.validate), ("test", fit.test)):
        (found,) = verb(task, loader, verbose=False)
        assert found[f"{stage}/miou"] == pytest.approx(mean, abs=1e-6)
        assert found[f"{stage}/pixel_accuracy"] == pytest.approx(accuracy, abs=1e-6)
    assert set(found) == {"test/miou", "test/pixel_accuracy"}


def test_whole_images_and_crops_are_named_apart(task):
    whole, crops = scenes(), scenes(count=4, size=(8, 8))
    both = trainer().validate(task, [whole, crops], verbose=False)
    found = {key: value for of_loader in both for key, value in of_loader.items()}
    assert set(found) == {"val/loss", "val/miou", "val/pixel_accuracy", "val/miou_crop", "val/pixel_accuracy_crop"}
    for suffix, loader in (("", whole), ("_crop", crops)):
        (alone,) = trainer().validate(task, loader, verbose=False)
        assert found[f"val/miou{suffix}"] == pytest.approx(alone["val/miou"])
        if not suffix:
            assert found["val/loss"] == pytest.approx(alone["val/loss"])


def test_loss_is_torch_s_where_pixels_count():
    logits, labels = torch.randn(2, 5, 6, 7, requires_grad=True), torch.randint(5, (2, 6, 7))
    labels[0, :3] = 255
    ours = PixelCrossEntropy(255)(logits, labels)
    torch.testing.assert_close(ours, torch.nn.functional.cross_entropy(logits, labels, ignore_index=255))
    # The sum over so many pixels would not fit into half precision.
    half = PixelCrossEntropy(255)(torch.zeros(1, 5, 300, 300, dtype=torch.float16), torch.zeros(1, 300, 300).long())
    assert half.item() == pytest.approx(np.log(5), abs=1e-5)


def test_a_batch_of_ignored_pixels_changes_nothing():
    images = torch.randn(4, 3, 16, 16)
    loader = DataLoader(TensorDataset(images, torch.full((4, 16, 16), 255)), 2)
    task = SegmentationTask(**SMALL, weight_decay=0.0, lr=1.0)
    before = [parameter.clone() for parameter in task.parameters()]
    fit = trainer(max_epochs=1)
    fit.fit(task, loader, loader)
    assert fit.callback_metrics["train/loss"] == fit.callback_metrics["val/loss"] == 0
    assert fit.callback_metrics["val/miou"].isnan()
    assert all(torch.equal(old, new) for old, new in zip(before, task.parameters(), strict=True))


@pytest.mark.parametrize("operator", [None, SlimConv2d])
def test_trains_on_single_images(operator):
    task = SegmentationTask(**SMALL, operator=operator, lr=0.01)
    fit = trainer(max_epochs=1)
    fit.fit(task, scenes(batch_size=1), scenes(count=1))
    assert fit.callback_metrics["train/loss"].isfinite()
    assert all(value.isfinite().all() for value in task.state_dict().values())


def test_learns_to_tell_colours():
    pl.seed_everything(0)
    task = SegmentationTask(**SMALL, lr=0.2, backbone_lr_factor=1.0, backbone_bn_momentum=None, schedule="poly")
    fit = trainer(max_epochs=12)
    fit.fit(task, scenes(count=32), scenes(count=8))
    assert fit.callback_metrics["val/miou"] > 0.6


class Rates(Callback):
    """The learning rates of both groups in each optimizer step."""

    def __init__(self):
        self.rows = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.rows.append([group["lr"] for group in trainer.optimizers[0].param_groups])


@pytest.mark.parametrize(
    "length", [{"max_steps": 10}, {"max_steps": 10, "check_val_every_n_epoch": None, "val_check_interval": 3}]
)
def test_poly_over_iterations_with_the_backbone_at_a_tenth(length):
    rates = Rates()
    # Four steps make an epoch.
    fit = trainer(callbacks=[rates], **length)
    fit.fit(SegmentationTask(**SMALL, lr=0.01, schedule="poly"), scenes(count=8, batch_size=2), scenes(count=2))
    assert len(rates.rows) == fit.global_step == 10
    for step, (backbone, head) in enumerate(rates.rows):
        assert head == pytest.approx(0.01 * (1 - step / 10) ** 0.9)
        assert backbone == pytest.approx(head / 10)
    assert [group["lr"] for group in fit.optimizers[0].param_groups] == pytest.approx([1e-6, 1e-6])


def test_poly_never_rises_and_never_ends_below_its_floor():
    rates = Rates()
    task = SegmentationTask(**SMALL, lr=2e-6, backbone_lr_factor=0.1, schedule="poly")
    trainer(max_steps=8, callbacks=[rates]).fit(task, scenes(count=8, batch_size=2))
    backbone, head = zip(*rates.rows, strict=True)
    # The backbone's rate begins below the floor and stays; that of the head falls to it.
    assert backbone == pytest.approx([2e-7] * 8)
    assert head[-1] == pytest.approx(1e-6)
    assert all(later <= sooner for sooner, later in pairwise(head))


def test_each_parameter_is_in_one_group(task):
    groups = task.parameter_groups()
    backbone, head = ({id(parameter) for parameter in group["params"]} for group in groups)
    assert not backbone & head
    assert backbone | head == {id(parameter) for parameter in task.parameters()}
    assert backbone == {id(parameter) for name, parameter in task.named_parameters() if ".backbone." in name}


@pytest.mark.parametrize(("momentum", "expected"), [(0.01, 0.01), (None, 0.1)])
def test_momentum_of_the_backbone_s_batch_norms_alone(momentum, expected):
    task = SegmentationTask(**SMALL, operator="SlimConv2d", backbone_bn_momentum=momentum)
    norms = {n: m.momentum for n, m in task.named_modules() if isinstance(m, torch.nn.BatchNorm2d)}
    assert {value for name, value in norms.items() if ".backbone." in name} == {expected}
    assert {value for name, value in norms.items() if ".backbone." not in name} == {0.1}
    assert any("gate" in name for name in norms)


def test_scales_and_flips_are_averaged(task):
    several = SegmentationTask(**SMALL, tta_scales=[0.5, 1.0, 1.5], tta_flip=True).eval()
    several.load_state_dict(task.state_dict())
    images = torch.randn(2, 3, 17, 22)
    with torch.no_grad():
        averaged = several.averaged(images)
        assert averaged.shape == (2, 5, 17, 22)
        torch.testing.assert_close(averaged.sum(1), torch.ones(2, 17, 22))
        # Seen in a mirror, the image has the mirrored answer.
        torch.testing.assert_close(several.averaged(images.flip(-1)).flip(-1), averaged)
        several.hparams.update({"tta_scales": [1.0], "tta_flip": True})
        plain = (task(images).softmax(1) + task(images.flip(-1)).softmax(1).flip(-1)) / 2
        torch.testing.assert_close(several.averaged(images), plain)
        several.hparams["tta_flip"] = False
        torch.testing.assert_close(several.averaged(images), task(images))


@pytest.mark.parametrize("scales", [[], [0.0], [1.0, -0.5]])
def test_impossible_scales_are_refused(scales):
    with pytest.raises(ValueError, match=r"tta_scales=.*above 0"):
        SegmentationTask(**SMALL, tta_scales=scales)


def test_unknown_arguments_of_the_head_are_refused():
    with pytest.raises(ValueError, match=r"head: DeepLabV3Plus takes no 'widht'; did you mean 'width'"):
        SegmentationTask(**SMALL | {"head": {"widht": 16}})


@pytest.mark.parametrize(
    ("own", "said"),
    [
        ({"num_classes": 257}, "num_classes=257: a mask has room for 256"),
        ({"num_classes": -1}, "num_classes=-1 must be at least 1"),
        ({"backbone_bn_momentum": 3.0}, r"backbone_bn_momentum=3\.0 must be from 0 to 1"),
    ],
    ids=str,
)
def test_values_that_cannot_work_are_named(own, said):
    with pytest.raises(ValueError, match=said):
        SegmentationTask(**SMALL | own)


def test_pictures_show_image_truth_and_prediction(task):
    images, truth = torch.rand(1, 3, 10, 12), torch.zeros(1, 10, 12, dtype=torch.long)
    truth[:, :5], truth[:, 5] = 2, 255
    fit = trainer()
    fit.validate(task, scenes(), verbose=False)
    (picture,) = task.draw((images, truth), torch.eye(5)[truth % 5].permute(0, 3, 1, 2))
    assert picture.image.shape == (3, 10, 3 * 12 + 2 * 4)
    assert picture.image.dtype == torch.uint8
    torch.testing.assert_close(picture.image[:, :, :12].float() / 255, images[0], atol=0.003, rtol=0)
    # VOC's colours: background black, 2 green, void cream.
    assert picture.image[:, 0, 16].tolist() == [0, 128, 0]
    assert picture.image[:, 5, 16].tolist() == [224, 224, 192]
    assert picture.image[:, 9, 16].tolist() == [0, 0, 0]
    assert (picture.image[:, :, 12:16] == 255).all()
    assert (picture.image[:, :5, 32:] == picture.image[:, :5, 16:28]).all()
    assert "mean IoU 1.00" in picture.caption
    assert picture.legend == {0: ("0", "#000000"), 2: ("2", "#008000"), 255: ("does not count", "#e0e0c0")}
    (unknown,) = task.draw((images, ["a.jpg"]), truth % 5)
    assert unknown.image.shape == (3, 10, 2 * 12 + 4)
    assert unknown.caption == "a.jpg"


def test_a_large_image_makes_a_small_picture(task):
    (picture,) = task.draw((torch.rand(1, 3, 40, 2000), ["a.jpg"]), torch.zeros(1, 40, 2000).long())
    assert picture.image.shape == (3, 10, 2 * 500 + 4)


def test_a_checkpoint_reloads_without_unpickling_classes(tmp_path):
    task = SegmentationTask(**SMALL, operator=SlimConv2d(32, 32, k=2).__class__, tta_scales=(0.5, 1.0))
    fit = trainer(max_epochs=1)
    fit.fit(task, scenes())
    fit.save_checkpoint(tmp_path / "x.ckpt")
    again = SegmentationTask.load_from_checkpoint(tmp_path / "x.ckpt", weights_only=True, map_location="cpu").eval()
    images = torch.randn(1, 3, 16, 16)
    assert torch.equal(again(images), task.eval()(images))
    assert again.hparams["tta_scales"] == [0.5, 1.0]


def shuffled(network):
    """`network` with running statistics that tell whether they were read."""
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.uniform_(-1, 1)
    return network


def assert_taken(task, source):
    state = task.model.backbone.net.state_dict()
    assert state
    for name, value in state.items():
        assert torch.equal(value, source[name]), name


def test_a_classifier_of_ours_goes_into_the_backbone(tmp_path, capsys):
    donor = ClassificationTask("cifar_resnet20", 10, operator=SlimConv2d)
    shuffled(donor.model)
    fit = trainer(max_epochs=1, limit_train_batches=1)
    fit.fit(donor, DataLoader(TensorDataset(torch.randn(4, 3, 8, 8), torch.arange(4)), 4))
    fit.save_checkpoint(tmp_path / "donor.ckpt")
    task = SegmentationTask(**SMALL, operator=SlimConv2d, weights=str(tmp_path / "donor.ckpt"))
    assert_taken(task, donor.model.state_dict())
    # Reading this task's own checkpoint does not ask for the file again.
    assert task.hparams["weights"] is None


def test_what_was_taken_is_listed(tmp_path, caplog):
    torch.save(torchvision.models.resnet18(num_classes=7).state_dict(), tmp_path / "r18.pth")
    with caplog.at_level("INFO", logger="pytorch_lightning.utilities.rank_zero"):
        SegmentationTask("torchvision:resnet18", 5, weights=str(tmp_path / "r18.pth"))
    (text,) = (record.getMessage() for record in caplog.records)
    assert re.search(r"loaded 120 tensors: conv1 \(1\), bn1 \(5\), layer1\.0\.conv1 \(1\)", text)
    assert "in the file, not used: 2: fc.weight, fc.bias" in text


@pytest.mark.parametrize("operator", [None, SlimConv2d])
@pytest.mark.parametrize("name", ["torchvision:resnet18", "torchvision:mobilenet_v2", "timm:mobilenetv2_050"])
def test_classifiers_of_libraries_go_into_the_backbone(name, operator, tmp_path):
    library, _, bare = name.partition(":")
    source = shuffled(torchvision.models.get_model(bare) if library == "torchvision" else timm.create_model(bare))
    torch.save({"model": source.state_dict()}, tmp_path / "x.pth")
    task = SegmentationTask(name, 5, operator=operator, weights=str(tmp_path / "x.pth"))
    if operator is None:
        assert_taken(task, source.state_dict())
    else:
        stem = next(n for n, m in source.named_modules() if isinstance(m, torch.nn.BatchNorm2d))
        state = task.model.backbone.net.state_dict()
        assert torch.equal(state[f"{stem}.running_mean"], source.state_dict()[f"{stem}.running_mean"])


def test_another_classifier_is_refused_with_the_first_name(tmp_path):
    """ResNet-34 has every tensor of ResNet-18 in the same shape, and more."""
    torch.save(torchvision.models.resnet34().state_dict(), tmp_path / "r34.pth")
    with pytest.raises(ValueError, match=r"r34\.pth.*layer1\.2\.conv1\.weight .* the network has no"):
        SegmentationTask("torchvision:resnet18", 5, weights=str(tmp_path / "r34.pth"))
    incomplete = torchvision.models.resnet18().state_dict()
    del incomplete["layer4.1.bn2.bias"]
    torch.save(incomplete, tmp_path / "r18.pth")
    with pytest.raises(ValueError, match=r"layer4\.1\.bn2\.bias .* is in the network and not in the file"):
        SegmentationTask("torchvision:resnet18", 5, weights=str(tmp_path / "r18.pth"))
    exclude = {"weights_exclude": ["layer4.1.bn2.*"]}
    SegmentationTask("torchvision:resnet18", 5, weights=str(tmp_path / "r18.pth"), **exclude)


def test_a_segmentation_checkpoint_starts_one_with_other_classes(tmp_path):
    donor = SegmentationTask(**SMALL)
    shuffled(donor.model)
    fit = trainer(max_epochs=1, limit_train_batches=1)
    fit.fit(donor, scenes())
    fit.save_checkpoint(tmp_path / "donor.ckpt")
    other = SMALL | {"num_classes": 3, "weights": str(tmp_path / "donor.ckpt")}
    with pytest.raises(ValueError, match=r"classifier\.weight is \(5, 16, 1, 1\) in the file and \(3, 16, 1, 1\)"):
        SegmentationTask(**other)
    task = SegmentationTask(**other, weights_exclude=["classifier.*"])
    theirs = donor.model.state_dict()
    for name, value in task.model.state_dict().items():
        assert name.startswith("classifier.") or torch.equal(value, theirs[name]), name
