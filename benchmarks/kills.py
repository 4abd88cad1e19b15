"""Kills a training run at random moments, resumes it, and compares it bit by bit with one that was never killed.

    python benchmarks/kills.py --output benchmarks/results/kills.json

The run has processes that load images, dropout, MixUp, a moving average of the weights and a last.ckpt every 20 steps.
Each time a new one is started and, at a moment drawn evenly over its time of training, it and its processes get
SIGKILL; then it goes on with `--ckpt_path last`, to its end. Compared are all weights, averages, momenta, schedules and
random states of last.ckpt, metrics.csv and results.json (but for its seconds). With `--processes 2` a run is two of
them (DDP on gloo), which all get SIGKILL with what has started them. `--after 10` kills at the end of step 10 instead.

The parent has imported everything and forks the runs, for an import takes longer than such a run.
"""

import argparse
import csv
import json
import mmap
import os
import random
import signal
import socket
import struct
import sys
import tempfile
import time
from itertools import count
from pathlib import Path

import torch
from pytorch_lightning.utilities import rank_zero_only
from torch.multiprocessing import ProcessExitedException, start_processes

import slimconv_lit.lightning_cli  # noqa: F401 (what the forked runs need)
from slimconv_lit.analysis.latency import machine
from slimconv_lit.callbacks import RunFolder, Visualize
from slimconv_lit.cli import main as command_line

SAVE_EVERY = 20
RUN = [
    "fit", "--config=quickstart.yaml", "--model.backbone=timm:test_resnet", "--model.ema_decay=0.99",
    '--model.backbone_options={"drop_rate": 0.2}', "--model.mixup_alpha=0.2",
    "--data.num_workers=2", f"--save_every={SAVE_EVERY}", "--trainer.max_epochs=2", "--trainer.limit_train_batches=30",
    "--trainer.enable_progress_bar=false", "--trainer.accelerator=cpu",
]  # fmt: skip
# Shared with the runs: the steps that are done.
STEPS = mmap.mmap(-1, 8)


def steps_done():
    return struct.unpack("q", STEPS[:])[0]


def note_step(callback, trainer, module, outputs, batch, batch_idx):
    STEPS[:] = struct.pack("q", trainer.global_step)


def launch(run, processes, outputs):
    """Runs a command line in so many processes, as torchrun would start them; returns the status of the first to fail.

    What they print is added to the files `outputs`, one for each.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    try:
        # Forked, so that all imports are paid for once.
        start_processes(_process, (processes, port, run, outputs), processes, start_method="fork")
    except ProcessExitedException as error:
        return error.exit_code
    return 0


def _process(rank, world, port, run, outputs):
    output = os.open(outputs[rank], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    # Before there is a second thread: torch makes its pool anew behind a fork, which two at once get wrong.
    torch.set_num_threads(1)
    if world > 1:
        own = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world, "GROUP_RANK": 0}
        own |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_RUN_ID": "kills"}
        os.environ.update({key: str(value) for key, value in own.items()})
        # Read from the environment when Lightning is imported, which here was before.
        rank_zero_only.rank = rank
    sys.exit(command_line(run))


def fork(run, root, processes):
    """A process, the first of a group of its own, that runs a command line, or starts others that do."""
    STEPS[:] = struct.pack("q", 0)
    if pid := os.fork():
        return pid
    os.setsid()
    # None takes this long.
    signal.alarm(180)
    RunFolder.on_train_batch_end = note_step
    # One picture a validation: else most of the time is drawing, and few kills would meet anything else.
    Visualize.__init__.__defaults__ = (1, 10)
    status = 1
    try:
        status = launch([*run, f"--run_root={root}"], processes, [root / "output.txt"] * processes)
    finally:
        sys.stderr.flush()
        os._exit(status)


def whole(run, root, processes):
    """Seconds from the first step to the end; 0 for a run that has only its test left."""
    pid = fork(run, root, processes)
    first, ended = None, 0
    while not ended:
        time.sleep(0.001)
        first = first or (time.perf_counter() if steps_done() else None)
        ended, status = os.waitpid(pid, os.WNOHANG)
    if status:
        raise RuntimeError(f"a run ended with {status}: {(root / 'output.txt').read_text()[-2000:]}")
    return time.perf_counter() - first if first else 0.0


def killed(run, root, processes, steps, seconds):
    """Whether a run was killed so many seconds after so many steps, and did not end before."""
    pid = fork(run, root, processes)
    while steps_done() < steps:
        if os.waitpid(pid, os.WNOHANG)[0]:
            raise RuntimeError(f"a run ended before step {steps}: {(root / 'output.txt').read_text()[-2000:]}")
        time.sleep(0.001)
    time.sleep(seconds)
    if os.waitpid(pid, os.WNOHANG)[0]:
        return False
    os.killpg(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    if processes > 1:
        # Those that it had started are not ours to wait for.
        time.sleep(0.5)
    return True


def only_folder(root, name):
    (folder,) = (root / name).iterdir()
    return folder


def contents(folder):
    """All of a run that a kill must not change."""
    checkpoint = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)
    kept = ("state_dict", "current_model_state", "averaging_state", "optimizer_states", "lr_schedulers")
    rows = [
        {key: value for key, value in row.items() if value} for row in csv.DictReader((folder / "metrics.csv").open())
    ]
    results = json.loads((folder / "results.json").read_text()) if (folder / "results.json").exists() else {}
    return {
        **{key: checkpoint.get(key) for key in (*kept, "random_states", "global_step")},
        "metrics.csv": rows,
        "results.json": {key: value for key, value in results.items() if key != "seconds"},
    }


def same(a, b):
    """Whether two values, batches or parts of checkpoints are equal, tensors bit for bit."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(same(*pair) for pair in zip(a, b, strict=True))
    return a == b


def kill_once(run, name, root, processes, steps, seconds, reference):
    """One kill and one resumption; what came of it, or None if the run ended before."""
    if not killed([*run, f"--name={name}"], root, processes, steps, seconds):
        return None
    reached = steps_done()
    folder = only_folder(root, name)
    last = folder / "checkpoints" / "last.ckpt"
    kept = torch.load(last, weights_only=True)["global_step"] if last.exists() else 0
    interrupted_save = bool(list(folder.glob("checkpoints/*.partial")))
    if kept:
        whole([*run, f"--name={name}", "--ckpt_path=last"], root, processes)
    else:
        # There is nothing to go on from.
        name += "-anew"
        whole([*run, f"--name={name}"], root, processes)
    found = contents(only_folder(root, name))
    differs = [key for key in reference if not same(reference[key], found[key])]
    return {"steps done": reached, "went on from": kept, "while saving": interrupted_save, "differs": differs}


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--after", type=int, metavar="STEP")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path)
    args, more = parser.parse_known_args(argv)
    run = [*RUN, f"--data.batch_size={28 // args.processes}", *more]
    chosen = {name: getattr(args, name) for name in ("processes", "kills", "after", "seed")}
    options = [f"--{name}={value}" for name, value in chosen.items() if value != parser.get_default(name)]
    torch.set_num_threads(1)
    rng = random.Random(args.seed)
    kills = []
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        seconds = whole([*run, "--name=reference"], root, args.processes)
        reference = contents(only_folder(root, "reference"))
        for attempt in count():
            moment = (args.after, 0) if args.after else (1, rng.uniform(0, seconds))
            kill = kill_once(run, f"run-{attempt}", root, args.processes, *moment, reference)
            if kill is None:
                continue
            kills.append(kill)
            print(json.dumps(kill), flush=True)
            if args.output:
                found = {"command": " ".join(["python benchmarks/kills.py", *options, *more])}
                found |= summary(kills) | {
                    "processes": args.processes,
                    "steps": reference["global_step"],
                    "run": " ".join(run),
                    "each": kills,
                }
                args.output.write_text(json.dumps(found, indent=1) + "\n")
            if len(kills) == args.kills:
                break
    print(json.dumps(summary(kills), indent=2))
    return int(any(kill["differs"] for kill in kills) or summary(kills)["most steps lost"] > SAVE_EVERY)


def summary(kills):
    return {
        **machine(),
        "kills": len(kills),
        "bit by bit as if never killed": sum(not kill["differs"] for kill in kills),
        "most steps lost": max(kill["steps done"] - kill["went on from"] for kill in kills),
        "killed while saving": sum(kill["while saving"] for kill in kills),
        "killed before the first checkpoint": sum(not kill["went on from"] for kill in kills),
    }


if __name__ == "__main__":
    sys.exit(main())
