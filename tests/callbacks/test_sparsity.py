"""Sparsity training: the penalty is that of the paper, whatever the trainer does with gradients."""

import pytest
import pytorch_lightning as pl
import torch
from lightning_fabric.utilities.exceptions import MisconfigurationException
from torch.utils.data import DataLoader, TensorDataset

from slimconv_lit import ClassificationTask
from slimconv_lit.callbacks.sparsity import Sparsity, draw_scales
from slimconv_lit.cli import main
from slimconv_lit.surgery import prunable_norms

NETWORK = {"backbone": "cifar_resnet20", "num_classes": 3, "schedule": "constant", "momentum": 0.0, "weight_decay": 0.0}


def task(**own):
    torch.manual_seed(0)
    return ClassificationTask(**NETWORK | own)


def data():
    generator = torch.Generator().manual_seed(0)
    images, labels = torch.randn(8, 3, 16, 16, generator=generator), torch.arange(8) % 3
    return DataLoader(TensorDataset(images, labels), batch_size=4)


def fit(module, callback, **own):
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    trainer = pl.Trainer(max_epochs=1, accelerator="cpu", logger=False, callbacks=[callback], **quiet | own)
    trainer.fit(module, data())
    return trainer


class Zero(ClassificationTask):
    """A loss without gradients, so that the penalty alone moves the scales."""

    def training_step(self, batch, batch_idx):
        return 0.0 * super().training_step(batch, batch_idx)


@pytest.mark.parametrize(
    ("settings", "steps"), [({}, 2), ({"accumulate_grad_batches": 2}, 1), ({"precision": "bf16-mixed"}, 2)], ids=str
)
def test_the_penalty_moves_every_scale_by_its_subgradient(settings, steps, tmp_path):
    torch.manual_seed(0)
    module = Zero(**NETWORK, lr=0.5)
    fit(module, Sparsity(strength=0.01), default_root_dir=tmp_path, **settings)
    for norm in prunable_norms(module.model).values():
        torch.testing.assert_close(norm.weight.detach(), torch.full_like(norm.weight, 0.5 - steps * 0.5 * 0.01))


def test_it_is_the_penalty_of_the_loss(tmp_path):
    """One step with the callback, and one with the penalty written into the loss."""

    class Penalised(ClassificationTask):
        def training_step(self, batch, batch_idx):
            penalty = sum(norm.weight.abs().sum() for norm in prunable_norms(self.model).values())
            return super().training_step(batch, batch_idx) + 0.01 * penalty

    states = []
    for cls, strength in ((ClassificationTask, 0.01), (Penalised, 0.0)):
        torch.manual_seed(0)
        module = cls(**NETWORK)
        fit(module, Sparsity(strength), gradient_clip_val=0.05, default_root_dir=tmp_path)
        states.append(module.model.state_dict())
    for name, value in states[0].items():
        torch.testing.assert_close(value, states[1][name], rtol=1e-5, atol=1e-6)


def test_gates_and_patterns_are_left_out():
    network = task(operator="SlimConv2d").model
    names = set(prunable_norms(network))
    assert not any("gate" in name for name in names)
    assert {"bn1", "layer1.0.conv1.top.1"} <= names
    assert set(prunable_norms(network, exclude="layer*")) == {"bn1"}


def test_a_ramp_and_a_network_that_has_been_trained(tmp_path):
    module = Zero(**NETWORK, lr=1.0)
    with torch.no_grad():
        module.model.bn1.weight.fill_(0.3)
    fit(module, Sparsity(0.01, initial_scale=None, ramp_epochs=1), default_root_dir=tmp_path)
    # Half the strength in the first of two steps.
    torch.testing.assert_close(module.model.bn1.weight.detach(), torch.full((16,), 0.3 - 0.005 - 0.01))


def test_mistakes(tmp_path):
    with pytest.raises(ValueError, match="strength=-1 must not be negative"):
        Sparsity(strength=-1)
    with pytest.raises(MisconfigurationException, match="leaves no batch norm"):
        fit(task(), Sparsity(exclude=["*"]), default_root_dir=tmp_path)


def test_from_the_command_line(in_tmp):
    words = [
        "--config=quickstart.yaml",
        "--trainer.max_epochs=1",
        "--trainer.limit_train_batches=2",
        "--test_after=false",
    ]
    assert main(["fit", *words, "--trainer.callbacks+=Sparsity", "--trainer.callbacks.strength=1e-3"]) == 0
    (folder,) = (in_tmp / "runs" / "quickstart").iterdir()
    assert (folder / "pictures" / "scales.png").stat().st_size > 5000
    header, *_ = (folder / "metrics.csv").read_text().splitlines()
    assert "train/sparsity" in header.split(",")


def test_the_picture_s_threshold_is_the_quantile():
    scales = torch.linspace(0, 1, 101)
    _, right = draw_scales(scales, "epoch 1").axes
    x, y = right.lines[0].get_data()
    assert y[30] == pytest.approx(0.3)
    assert x[30] == pytest.approx(30)
