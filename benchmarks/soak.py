"""Whether a long training grows: memory, open files and threads over 2,000 steps with validations and checkpoints.

    nice -n 19 python benchmarks/soak.py --output benchmarks/results/soak.json

A fit as a user starts it, on shards of the ImageNet sample: SlimConv, weight averaging, a worker, both loggers, a
validation with two checkpoints every 100 steps, and pictures. Every 50 steps the main process and its worker are looked
at. What the first 500 steps take is not growth: threads, buffers and caches begin there.
"""

import argparse
import contextlib
import json
import os
import tempfile
import threading
from pathlib import Path

import numpy as np
import pytorch_lightning as pl

from slimconv_lit.analysis.latency import machine, resident_memory
from slimconv_lit.cli import main as cli
from slimconv_lit.lightning_cli import run
from slimconv_lit.tables import format_table
from slimconv_lit.trust import allow

WARMUP, EVERY = 500, 50


def children():
    own = Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text().split()
    return [Path("/proc") / pid for pid in own]


class Watch(pl.Callback):
    """What the process and its workers hold, every so many steps."""

    def __init__(self):
        self.seen = []

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        if trainer.global_step % EVERY == 0:
            pages = [int((child / "statm").read_text().split()[1]) for child in children()]
            self.seen.append(
                {
                    "step": trainer.global_step,
                    "MB": round(resident_memory() / 1e6, 1),
                    "MB of workers": round(sum(pages) * os.sysconf("SC_PAGESIZE") / 1e6, 1),
                    "open files": len(os.listdir("/proc/self/fd")),
                    "open files of workers": sum(len(os.listdir(child / "fd")) for child in children()),
                    "processes": len(pages),
                    "threads": threading.active_count(),
                }
            )


def soak(steps):
    words = [
        "--config=quickstart.yaml", "--name=soak", "--data=ImageNetDataModule", "--data.root=shards",
        "--data.image_size=32", "--data.eval_size=32", "--data.batch_size=8", "--data.num_workers=1",
        "--model.operator=SlimConv2d", "--model.ema_decay=0.99", f"--trainer.max_steps={steps}",
        "--trainer.max_epochs=-1", "--trainer.enable_progress_bar=false", "--trainer.callbacks=__main__.Watch",
    ]  # fmt: skip
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        assert cli(["prepare", "--data.sample=true", "--data.root=images", "--output=shards"]) == 0
        allow(["__main__"])
        trainer = run("fit", words).trainer
    return next(c for c in trainer.callbacks if isinstance(c, Watch)).seen


def growth(seen, key):
    """From the end of the warm-up on: first, last, and by a straight line through all, per 1,000 steps."""
    later = [point for point in seen if point["step"] >= WARMUP]
    slope = np.polyfit([point["step"] for point in later], [point[key] for point in later], 1)[0]
    per_thousand = round(1000 * float(slope), 2) + 0.0
    return {"": key, f"step {WARMUP}": later[0][key], "last": later[-1][key], "per 1,000 steps": per_thousand}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    seen = soak(args.steps)
    rows = [growth(seen, key) for key in seen[0] if key != "step"]
    print(format_table(rows))
    if args.output:
        command = f"python benchmarks/soak.py --steps {args.steps}"
        result = {"command": command, **machine(), "growth": rows, "seen": seen}
        args.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
