"""What the sample configs reach and how long they take: one `fit` of each, as a user types it, data and all.

    python benchmarks/sample_scores.py seg_sample det_sample --output benchmarks/results/sample_scores.json

Each runs in a folder of its own that is empty at first, so its seconds include building the sample data, validation,
pictures and the test. It gets two cores, on machines that have more too. CPU seconds are those of all its processes;
where other programs share the cores, they say more than seconds do.
"""

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytorch_lightning
import torch
import torchvision

from slimconv_lit.tables import format_table

CORES = 2


def measured(config, options):
    words = ["-m", "slimconv_lit", "fit", "--config", f"{config}.yaml", *options]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([sys.executable, *words], cwd=folder, check=True)
        seconds = time.perf_counter() - start
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        (path,) = Path(folder).glob("runs/*/*/results.json")
        results = json.loads(path.read_text())
    scores = {key: round(value, 4) for key, value in results.items() if key.startswith("test/")}
    return {
        "config": config,
        "network": results["network"],
        **scores,
        "params": results["params"],
        "macs": results["macs"],
        "seconds": round(seconds, 1),
        "cpu seconds": round(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, 1),
        "command": " ".join(["python", *words]),
        "machine": f"{cpu_name()}, {len(os.sched_getaffinity(0))} cores",
        "versions": {
            "python": platform.python_version(),
            **{module.__name__: module.__version__ for module in (torch, torchvision, pytorch_lightning)},
        },
    }


def cpu_name():
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("configs", nargs="*", default=["seg_sample", "det_sample"], help="names of shipped configs")
    parser.add_argument("--output", type=Path, help="put the rows into this .json, in the place of older ones")
    args, options = parser.parse_known_args()
    # Inherited by all that is started from here.
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:CORES])
    rows = [measured(config, options) for config in args.configs]
    shown = ("config", "network", "test/miou", "test/map", "params", "macs", "seconds", "cpu seconds")
    print(format_table([{key: row[key] for key in shown if key in row} for row in rows]))
    if args.output:
        older = json.loads(args.output.read_text()) if args.output.exists() else []
        kept = [row for row in older if row["config"] not in args.configs]
        rows = sorted(kept + rows, key=lambda row: row["config"])
        args.output.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
