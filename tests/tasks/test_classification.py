import csv
from itertools import pairwise

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.loggers import CSVLogger
from torch.utils.data import DataLoader, TensorDataset

from slimconv_lit.data import DigitsDataModule
from slimconv_lit.faults import RunError
from slimconv_lit.ops import SlimConv2d
from slimconv_lit.tasks import ClassificationTask
from slimconv_lit.tasks.base import BatchMeans

SMALL = {"backbone": "cifar_resnet20", "num_classes": 10, "in_channels": 1}


def trainer(**options):
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    return pl.Trainer(**quiet | {"enable_checkpointing": False} | options)


def few(batch_size=4, batches=4):
    images = torch.randn(batch_size * batches, 1, 8, 8)
    return DataLoader(TensorDataset(images, torch.arange(len(images)) % 10), batch_size)


def learning_rates(epochs, batches=4, **options):
    """The learning rate of each optimizer step."""

    class Recorder(pl.Callback):
        def __init__(self):
            self.rates = []

        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            self.rates.append(trainer.optimizers[0].param_groups[0]["lr"])

    recorder = Recorder()
    task = ClassificationTask(**SMALL, **options)
    task.model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10))
    trainer(max_epochs=epochs, callbacks=[recorder], limit_val_batches=0).fit(task, few(batches=batches))
    return recorder.rates


@pytest.mark.parametrize(
    "operator",
    [
        SlimConv2d,
        "SlimConv2d",
        {"class_path": "SlimConv2d", "init_args": {"k": "8/3"}},
    ],
    ids=["class", "name", "plain"],
)
def test_a_checkpoint_made_in_python_reloads_without_unpickling_classes(operator, tmp_path):
    task = ClassificationTask(**SMALL, operator=operator)
    fit = trainer(max_epochs=1, limit_train_batches=1, limit_val_batches=0)
    fit.fit(task, few())
    path = tmp_path / "x.ckpt"
    fit.save_checkpoint(path)
    content = torch.load(path, weights_only=True)
    assert content["hyper_parameters"]["operator"]["class_path"] == "slimconv_lit.ops.slim_conv.SlimConv2d"
    again = ClassificationTask.load_from_checkpoint(path, weights_only=True, map_location="cpu").eval()
    x = torch.randn(2, 1, 8, 8)
    assert torch.equal(again(x), task.eval()(x))


def test_weights_to_start_from_are_not_asked_for_again(tmp_path):
    donor = ClassificationTask(**SMALL)
    torch.save(donor.model.state_dict(), tmp_path / "donor.pth")
    start = {"weights": str(tmp_path / "donor.pth"), "weights_exclude": ["fc.*"]}
    task = ClassificationTask(**SMALL | {"num_classes": 7}, **start)
    assert torch.equal(task.model.conv1.weight, donor.model.conv1.weight)
    fit = trainer(max_epochs=1, limit_train_batches=1, limit_val_batches=0)
    fit.fit(task, DataLoader(TensorDataset(torch.randn(4, 1, 8, 8), torch.arange(4)), 4))
    fit.save_checkpoint(tmp_path / "x.ckpt")
    (tmp_path / "donor.pth").unlink()
    again = ClassificationTask.load_from_checkpoint(tmp_path / "x.ckpt", weights_only=True)
    assert torch.equal(again.model.conv1.weight, task.model.conv1.weight)


def test_all_hyperparameters_are_plain_and_complete():
    task = ClassificationTask(**SMALL, milestones=(1, 2), label_smoothing=0.1)
    assert task.hparams["milestones"] == [1, 2]
    assert task.hparams["label_smoothing"] == 0.1
    assert task.hparams["operator"] is None
    assert {"lr", "schedule", "ema_decay", "mixup_alpha", "num_classes", "in_channels"} <= set(task.hparams)


def test_multistep_with_warmup():
    rates = learning_rates(5, schedule="multistep", milestones=[2, 4], gamma=0.1, warmup_epochs=1, lr=1.0)
    assert rates[0] == pytest.approx(0.01)
    assert rates[:4] == sorted(rates[:4])
    assert rates[4:8] == pytest.approx([1.0] * 4)
    assert rates[8:16] == pytest.approx([0.1] * 8)
    assert rates[16:] == pytest.approx([0.01] * 4)


@pytest.mark.parametrize("warmup", [0, 1])
@pytest.mark.parametrize("schedule", ["cosine", "poly"])
def test_falling_schedules_step_with_the_optimizer_and_end_near_zero(schedule, warmup):
    rates = learning_rates(6, schedule=schedule, warmup_epochs=warmup, lr=0.5)
    falling = rates[4 * warmup :]
    assert falling[0] == pytest.approx(0.5)
    assert all(later < sooner for sooner, later in pairwise(falling))
    assert falling[-1] < 0.05


def test_constant():
    assert learning_rates(2, schedule="constant", lr=0.2) == pytest.approx([0.2] * 8)


@pytest.mark.parametrize(
    ("own", "said"),
    [
        ({"milestones": [2, 1]}, r"milestones=\[2, 1\] must rise"),
        ({"lr": -1.0}, r"lr=-1\.0 must be at least 0"),
        ({"ema_decay": 2.0}, r"ema_decay=2\.0 must be from 0 to 1"),
        ({"nesterov": True, "momentum": 0.0}, "nesterov=True needs a momentum"),
        ({"label_smoothing": 1.5}, r"label_smoothing=1\.5 must be from 0 to 1"),
        ({"mixup_alpha": -1.0}, r"mixup_alpha=-1\.0 must be at least 0"),
        ({"in_channels": 0}, "in_channels=0 must be at least 1"),
        ({"num_classes": -2}, "num_classes=-2 must be at least 1"),
    ],
    ids=str,
)
def test_values_that_cannot_work_are_named(own, said):
    with pytest.raises(ValueError, match=said):
        ClassificationTask(**SMALL | own)


def test_a_schedule_without_an_end_is_told():
    with pytest.raises(RunError, match=r"set trainer\.max_epochs or trainer\.max_steps"):
        trainer(max_epochs=-1).fit(ClassificationTask(**SMALL), few())


def saver(folder):
    # While the fit is on: after it, the average is in the place of the raw weights.
    return ModelCheckpoint(folder, save_last=True, save_on_train_epoch_end=True)


def test_ema_is_what_is_saved_and_the_raw_weights_go_on(tmp_path):
    task = ClassificationTask(**SMALL, ema_decay=0.5, schedule="constant")
    fit = trainer(max_epochs=1, limit_val_batches=0, enable_checkpointing=True, callbacks=[saver(tmp_path)])
    fit.fit(task, few())
    path = tmp_path / "last.ckpt"
    content = torch.load(path, weights_only=True)
    assert "current_model_state" in content
    average, raw = (content[key]["model.fc.weight"] for key in ("state_dict", "current_model_state"))
    assert not torch.equal(average, raw)
    again = ClassificationTask.load_from_checkpoint(path, weights_only=True)
    assert torch.equal(again.model.fc.weight, average)
    # In the trainer that did the fit, too, where Lightning's own callback restores the raw weights.
    for verb in (fit.test, fit.validate):
        torch.nn.init.zeros_(task.model.fc.weight)
        verb(task, few(batches=1), ckpt_path=path, verbose=False)
        assert torch.equal(task.model.fc.weight, average)


def test_a_fit_with_ema_goes_on_where_it_was(tmp_path):
    def run(name, epochs, ckpt_path=None):
        pl.seed_everything(0)
        task = ClassificationTask(**SMALL, ema_decay=0.9, schedule="constant", lr=0.01)
        keep = {"enable_checkpointing": True, "callbacks": [saver(tmp_path / name)]}
        trainer(max_epochs=epochs, limit_val_batches=0, **keep).fit(task, few(), ckpt_path=ckpt_path)
        return torch.load(tmp_path / name / "last.ckpt", weights_only=True)

    whole, _ = run("whole", 2), run("half", 1)
    resumed = run("resumed", 2, tmp_path / "half" / "last.ckpt")
    for key in ("state_dict", "current_model_state"):
        for name, value in whole[key].items():
            torch.testing.assert_close(resumed[key][name], value, msg=f"{key} {name}")


@pytest.mark.parametrize(
    "mix", [{"mixup_alpha": 0.2}, {"cutmix_alpha": 1.0}, {"mixup_alpha": 0.2, "cutmix_alpha": 1.0}]
)
def test_mixing_changes_training_only(mix):
    task = ClassificationTask(**SMALL, **mix)
    fit = trainer(max_epochs=1)
    fit.fit(task, few(), few())
    assert fit.callback_metrics["train/loss"].isfinite()
    assert 0 <= fit.callback_metrics["train/top1"] <= 1


def test_an_epochs_means_are_over_images():
    """The last batch may be smaller, one may go by, and validation, which comes before, must not reset them."""
    means = BatchMeans(["loss", "top1"])
    for size, loss, top1 in ((4, 1.0, 0.5), (3, float("nan"), 0.0), (2, 4.0, 1.0)):
        means.update(size, loss=torch.tensor(loss, requires_grad=True), top1=torch.tensor(top1))
    assert {name: value.item() for name, value in means.compute().items()} == {
        "loss": 2.0,
        "top1": pytest.approx(2 / 3),
    }
    task = ClassificationTask(**SMALL)
    fit = trainer(max_epochs=1)
    seen = []
    task.loss.register_forward_hook(lambda *call: seen.append((len(call[1][0]), call[2].item())))
    fit.fit(task, few())
    expected = sum(size * loss for size, loss in seen) / sum(size for size, _ in seen)
    assert fit.callback_metrics["train/loss"].item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("cast", [torch.nn.Module.half, torch.nn.Module.bfloat16, lambda m: m.to(torch.bfloat16)])
def test_an_epochs_means_keep_their_precision_in_a_network_of_less(cast):
    task = cast(ClassificationTask(**SMALL))
    for means in (task.train_means, task.val_means):
        means.reset()
        for i in range(600):
            given = dict.fromkeys(means.names, torch.tensor(i / 600))
            means.update(128, **given)
        assert means.compute()["loss"].item() == pytest.approx(599 / 1200, rel=1e-4)


def test_a_fit_in_bf16_logs_the_means_of_its_batches(tmp_path):
    task, fit, seen = ClassificationTask(**SMALL, lr=0.0), trainer(max_epochs=1, precision="bf16-true"), []
    task.loss.register_forward_hook(lambda *call: seen.append(call[2].item()))
    fit.fit(task, few(batches=40), few(batches=1))
    # Lightning's sanity check, the epoch, its validation.
    _, *train, val = seen
    assert len(train) == 40
    assert fit.callback_metrics["train/loss"].item() == pytest.approx(sum(train) / 40, rel=1e-5)
    assert fit.callback_metrics["val/loss"].item() == pytest.approx(val, rel=1e-5)
    fit.save_checkpoint(tmp_path / "a.ckpt")
    assert torch.load(tmp_path / "a.ckpt", weights_only=True)["train_means"]["totals"].dtype == torch.float32


def test_the_loss_of_a_step_is_logged_where_loggers_look(tmp_path):
    logger = CSVLogger(tmp_path, name="", version="")
    fit = trainer(max_steps=7, log_every_n_steps=3, logger=logger)
    fit.fit(ClassificationTask(**SMALL), few())
    rows = [row for row in csv.DictReader((tmp_path / "metrics.csv").open()) if row["train/loss_step"]]
    assert [int(row["step"]) for row in rows] == [2, 5]


def test_no_top5_among_few_classes():
    assert "top5" not in ClassificationTask("cifar_resnet20", 5).val_metrics


def test_learns_digits_and_names_what_it_predicts():
    pl.seed_everything(0)
    data = DigitsDataModule(batch_size=64)
    task = ClassificationTask(**SMALL, lr=0.1, weight_decay=5e-4, nesterov=True, warmup_epochs=1)
    fit = trainer(max_epochs=3)
    fit.fit(task, datamodule=data)
    (result,) = fit.test(task, datamodule=data, verbose=False)
    assert result["test/top1"] > 0.7
    rows = [row for batch in fit.predict(task, datamodule=data) for row in batch]
    assert set(rows[0]) == {"name", "class", "probability"}
    assert rows[0]["class"] in data.class_names
    assert len({row["name"] for row in rows}) == len(data.dataset("test"))
    # The confusion matrix counts every test image once.
    assert int(task.test_confusion.compute().sum()) == len(data.dataset("test"))


def test_pixels_undo_the_normalisation():
    data = DigitsDataModule()
    task = ClassificationTask(**SMALL)
    fit = trainer()
    fit.test(task, datamodule=data, verbose=False)
    images, labels = next(iter(data.test_dataloader()))
    (picture, *_) = task.draw((images[:1], labels[:1]), task(images[:1]))
    assert picture.image.shape == (3, 16, 16)
    assert picture.image.dtype == torch.uint8
    assert (picture.image.min(), picture.image.max()) == (0, 255)
