"""Runs `main` on one, two and four processes, as torchrun would start them, and leaves what they wrote in a folder.

    python -m tests.scale.driver FOLDER

A program of its own, and not a test: its processes are forked, so that all imports are paid for once, and a test
runner has threads by then.
"""

import os
import signal
import sys
from pathlib import Path

import numpy as np
import pytorch_lightning as pl
import timm  # noqa: F401 - so that the processes need not import it, as what else has this mark
import torch
import torch.utils.tensorboard
import yaml
from PIL import Image

from benchmarks import kills
from slimconv_lit.callbacks import RunFolder
from slimconv_lit.cli import main
from slimconv_lit.data import VOC2007DataModule, VOC2012AugDataModule
from slimconv_lit.lightning_cli import TERMINATED
from slimconv_lit.tasks import DetectionTask, SegmentationTask

# No batch norm: that of two devices with four images each is another than that of one with eight.
RECIPE = {
    "model": {
        "class_path": "ClassificationTask",
        "init_args": {"backbone": "timm:test_efficientnet_gn", "lr": 0.03, "nesterov": True},
    },
    "data": {"class_path": "ImageNetDataModule", "init_args": {"image_size": 32, "eval_size": 32, "num_workers": 0}},
    "trainer": {
        "max_epochs": 3,
        "accelerator": "cpu",
        "gradient_clip_val": 1.0,
        "log_every_n_steps": 1,
        "enable_progress_bar": False,
    },
}


KILLED = {"ddp": [], "fsdp2": ["--config=trainer/fsdp.yaml", "--model.ema_decay=null"]}
SMALL = {"pyramid_width": 16, "head_width": 32, "box_score_thresh": 0.0, "rpn_post_nms_top_n_test": 8}
UNTRAINED = {
    "seg": (SegmentationTask("torchvision:resnet18", 21, head={"width": 16}), VOC2012AugDataModule(num_workers=0)),
    "det": (DetectionTask("torchvision:resnet18", 20, min_size=64, head=SMALL), VOC2007DataModule(num_workers=0)),
}


def save(name):
    """A checkpoint of a network as it was made, which finds something in any image."""
    task, data = UNTRAINED[name]
    trainer = pl.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    trainer.datamodule = data
    trainer.strategy.connect(task)
    task.trainer = trainer
    trainer.save_checkpoint(f"{name}.ckpt")


def write_images(folder, classes, count, rng):
    """`count` small noisy pictures, each class with its own colour, dealt out among `classes`."""
    for number in range(count):
        label = number % classes
        pixels = rng.integers(0, 120, (40, 48, 3), dtype=np.uint8)
        pixels[..., label] += 120
        path = folder / f"{label}" / f"{number:02d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path)


def launch(name, world, *words, status=0):
    print(name, world, *words, flush=True)
    logs = [f"{name}.{rank}.log" for rank in range(world)]
    assert kills.launch([*words, f"--name={name}"], world, logs) == status, words


def tell_to_end(callback, trainer, module, batch, batch_idx):
    """Sends SIGTERM to the second of two processes one step before the first one gets it, in the middle of an epoch."""
    if trainer.fit_loop.total_batch_idx == 4 - trainer.global_rank:
        os.kill(os.getpid(), signal.SIGTERM)


def fill_the_disk(callback, trainer, module):
    """Has what is written of last.ckpt, before it is renamed, go to a device that is always full."""
    if trainer.is_global_zero:
        (callback.path / "checkpoints").mkdir()
        (callback.path / "checkpoints" / "last.ckpt.partial").symlink_to("/dev/full")


def all_runs():
    rng = np.random.default_rng(0)
    # Eleven images on four devices: one has fewer than the others, and with one image a batch also fewer batches.
    for split, count in (("train", 24), ("val", 11)):
        write_images(Path("data") / split, 3, count, rng)
    write_images(Path("photos"), 1, 6, rng)
    # Its mask would have the name of another's.
    Image.new("RGB", (48, 40)).save("photos/0/00.png")
    Path("tiny.yaml").write_text(yaml.safe_dump(RECIPE))
    fit = ["fit", "--config=tiny.yaml", "--data.root=data", "--data.eval_batch_size=1"]
    launch("one", 1, *fit, "--data.batch_size=8")
    launch("ddp2", 2, fit[0], "--config=trainer/ddp.yaml", *fit[1:], "--data.batch_size=4")
    # The same images from shards, with no config but the recipe.
    assert main(["prepare", "--data.root=data", "--output=shards", "--shard_images=5"]) == 0
    launch("ddp4", 4, *fit, "--data.root=shards", "--data.batch_size=2")
    sharded = ["--config=trainer/fsdp.yaml", "--trainer.strategy.init_args.unit_params=10000"]
    launch("fsdp2", 2, fit[0], *sharded, *fit[1:], "--data.batch_size=4")
    # SlimConv has norms of its own, one of them on maps of a single pixel: with one image, they see that pixel alone.
    slim = ["--model.backbone=cifar_resnet20", "--model.operator=SlimConv2d", "--trainer.max_epochs=2"]
    # Norms of four values make much of what is rounded.
    slim.append("--trainer.precision=64-true")
    launch("norms", 1, *fit, *slim, "--data.batch_size=4")
    for world in (2, 4):
        words = ["--trainer.sync_batchnorm=true", f"--data.batch_size={4 // world}"]
        launch(f"norms{world}", world, fit[0], "--config=trainer/ddp.yaml", *fit[1:], *slim, *words)
    # FSDP2 knows no float64, so that this is close for an epoch only.
    words = ["--trainer.precision=32-true", "--trainer.sync_batchnorm=true", "--data.batch_size=2"]
    launch("norms_fsdp", 2, fit[0], *sharded, *fit[1:], *slim, *words)
    RunFolder.on_train_batch_start = tell_to_end
    launch("told", 2, *fit, "--data.batch_size=4", status=TERMINATED)
    del RunFolder.on_train_batch_start
    launch("told", 1, *fit, "--data.batch_size=4", "--ckpt_path=last", status=2)
    launch("told", 1, *fit, "--data.batch_size=8", "--ckpt_path=last")
    for name, own in KILLED.items():
        print(name, flush=True)
        short = ["--save_every=2", "--trainer.max_epochs=1", "--trainer.limit_train_batches=12", "--data.num_workers=1"]
        short += ["--test_after=false", "--logger=csv"]
        assert kills.main(["--processes=2", "--kills=1", "--after=7", *short, *own]) == 0, name
    RunFolder.on_train_start = fill_the_disk
    launch("unwritten", 2, fit[0], *sharded, *fit[1:], "--data.batch_size=4", status=2)
    del RunFolder.on_train_start
    (checkpoint,) = Path("runs/one").glob("*/checkpoints/last.ckpt")
    predict = ["predict", "--data=photos", "--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false"]
    for world in (1, 4):
        launch(f"cls{world}", world, *predict, f"--ckpt_path={checkpoint}", "--data.eval_batch_size=1")
    for name in UNTRAINED:
        save(name)
        for world in (1, 2):
            launch(f"{name}{world}", world, *predict, f"--ckpt_path={name}.ckpt")


if __name__ == "__main__":
    torch.set_num_threads(1)
    os.chdir(sys.argv[1])
    all_runs()
