"""What a training step costs through `fit`, against a bare PyTorch loop over the same network, batches and optimizer.

    python benchmarks/loop_overhead.py --output benchmarks/results/loop_overhead.json

All train the same network on the same batches in memory, one epoch in turn; the batch size sets how long a step is.
`fit` runs as a user runs it: progress bar, loggers, metrics, schedule and checkpoint callbacks, without validation.
`Lightning` is its trainer with none of these, and a module that does nothing but the loss.
"""

import argparse
import contextlib
import json
import os
import tempfile
import time
from pathlib import Path

import pytorch_lightning as pl
import torch
from torch.nn import functional

from slimconv_lit import ClassificationTask, DigitsDataModule
from slimconv_lit.analysis.latency import machine, ratios, spread
from slimconv_lit.lightning_cli import run
from slimconv_lit.tables import format_table
from slimconv_lit.trust import allow

RECIPE = {"lr": 0.01, "momentum": 0.9, "weight_decay": 5e-4, "nesterov": True}


class Clock(pl.Callback):
    """Seconds of a step, from the first batch after the warm-up on to the last."""

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        # The first batches warm up.
        if batch_idx == WARMUP:
            self.started = time.perf_counter()

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        if batch_idx == trainer.num_training_batches - 1:
            self.seconds = (time.perf_counter() - self.started) / (batch_idx + 1 - WARMUP)


WARMUP = 5


class LossAlone(pl.LightningModule):
    """The least that Lightning trains."""

    def __init__(self, network, steps):
        super().__init__()
        self.network, self.steps = network, steps

    def training_step(self, batch, batch_idx):
        images, labels = batch
        return functional.cross_entropy(self.network(images), labels)

    def configure_optimizers(self):
        optimizer, schedule = recipe(self.network, self.steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def fitted(batch_size, threads):
    clock = Clock()
    words = [
        "--config=quickstart.yaml", f"--data.batch_size={batch_size}", f"--model.lr={RECIPE['lr']}",
        "--trainer.max_epochs=1", "--trainer.limit_val_batches=0", "--test_after=false", f"--threads={threads}",
        "--trainer.callbacks=__main__.Clock", "--trainer.enable_model_summary=false",
    ]  # fmt: skip
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder), open(os.devnull, "w") as null:
        allow(["__main__"])
        with contextlib.redirect_stdout(null):
            cli = run("fit", words)
        clock = next(c for c in cli.trainer.callbacks if isinstance(c, Clock))
    return clock.seconds


def recipe(network, steps):
    optimizer = torch.optim.SGD(network.parameters(), **RECIPE)
    return optimizer, torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)


def parts(batch_size):
    """The network and its batches."""
    pl.seed_everything(0, verbose=False)
    data = DigitsDataModule(batch_size=batch_size)
    data.setup("fit")
    network = ClassificationTask("cifar_resnet20", num_classes=10, in_channels=1).model.train()
    return network, data.train_dataloader()


def by_lightning(batch_size):
    network, loader = parts(batch_size)
    clock = Clock()
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = pl.Trainer(max_epochs=1, accelerator="cpu", callbacks=[clock], enable_model_summary=False, **quiet)
    trainer.fit(LossAlone(network, len(loader)), loader)
    return clock.seconds


def bare(batch_size):
    network, loader = parts(batch_size)
    optimizer, schedule = recipe(network, len(loader))
    for i, (images, labels) in enumerate(loader):
        if i == WARMUP:
            started = time.perf_counter()
        optimizer.zero_grad()
        functional.cross_entropy(network(images), labels).backward()
        optimizer.step()
        schedule.step()
    return (time.perf_counter() - started) / (len(loader) - WARMUP)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", nargs="+", type=int, default=[8, 16])
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    rows = []
    for batch in args.batch:
        times = {"bare loop": [], "Lightning": [], "fit": []}
        for _ in range(args.rounds):
            times["bare loop"].append(bare(batch))
            times["Lightning"].append(by_lightning(batch))
            times["fit"].append(fitted(batch, args.threads))
        relative = ratios(times, "bare loop")
        milliseconds = {f"{name} ms": str(spread([1000 * s for s in values])) for name, values in times.items()}
        against = {f"{name} / bare": str(relative[name]) for name in ("Lightning", "fit")}
        rows.append({"batch": batch, **milliseconds, **against})
    print(format_table(rows))
    if args.output:
        command = "python benchmarks/loop_overhead.py"
        args.output.write_text(json.dumps({"command": command, **machine(), "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
