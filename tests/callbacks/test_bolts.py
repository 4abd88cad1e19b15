"""In processes of their own: what the shim puts back must not leak into other tests."""

import subprocess
import sys

import pytest

NAMES = [
    "BatchGradientVerificationCallback",
    "ModuleDataMonitor",
    "PrintTableMetricsCallback",
    "TrainingDataMonitor",
]

FIT = """
import logging, sys
import pytorch_lightning as pl, torch
from pytorch_lightning.loggers import TensorBoardLogger
from slimconv_lit.callbacks import bolts
assert "pl_bolts" not in sys.modules
from slimconv_lit.data import DigitsDataModule
from slimconv_lit.tasks import ClassificationTask
callbacks = [getattr(bolts, name)() for name in bolts.__all__]
task = ClassificationTask("cifar_resnet20", 10, 1, operator="SlimConv2d")
task.example_input_array = torch.randn(4, 1, 16, 16)
trainer = pl.Trainer(
    accelerator="cpu", max_epochs=1, limit_train_batches=2, limit_val_batches=1, log_every_n_steps=1,
    logger=TensorBoardLogger(sys.argv[1], name="", version=""), callbacks=callbacks,
    enable_progress_bar=False, enable_checkpointing=False,
)
trainer.fit(task, datamodule=DigitsDataModule(batch_size=8))
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
print("HISTOGRAMS", len(EventAccumulator(sys.argv[1]).Reload().Tags()["histograms"]))
"""


def test_all_four_run_in_one_fit(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", FIT, str(tmp_path)], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    # The table of PrintTableMetricsCallback, and the histograms of both monitors.
    assert "train/loss" in done.stderr + done.stdout
    assert int(done.stdout.split("HISTOGRAMS")[1]) >= 3
    assert "under review" not in done.stderr.lower()
    assert "mixing data across the batch" not in done.stderr


def test_nothing_is_imported_before_it_is_asked_for():
    from slimconv_lit.callbacks import bolts

    assert set(dir(bolts)) == set(NAMES)
    with pytest.raises(AttributeError, match="it has BatchGradientVerificationCallback"):
        bolts.SomethingElse  # noqa: B018
    assert "pl_bolts" not in sys.modules
