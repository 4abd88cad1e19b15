"""What the command line costs before it trains, against importing torch, torchvision and pytorch_lightning alone.

    python benchmarks/start_up.py --output benchmarks/results/start_up.json

Every round starts each once in a process of its own. What is compared is the CPU time of the processes, which other
work on the machine changes less than the time on the clock; that is given too.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tqdm import tqdm

from slimconv_lit.analysis.latency import machine, ratios, spread
from slimconv_lit.tables import format_table

IMPORTS = ["-c", "import torch, torchvision, pytorch_lightning"]
ONE_BATCH = ["--trainer.max_steps=1", "--trainer.limit_val_batches=1", "--test_after=false", "--data.num_workers=0"]
COMMANDS = {
    "imports": IMPORTS,
    "--help": ["-m", "slimconv_lit", "--help"],
    "fit --help": ["-m", "slimconv_lit", "fit", "--help"],
    "fit of one batch": ["-m", "slimconv_lit", "fit", "--config", "quickstart.yaml", *ONE_BATCH],
}


def seconds(words, folder):
    """(CPU time, time on the clock) of one process."""
    start, before = time.perf_counter(), os.times()
    subprocess.run([sys.executable, *words], cwd=folder, capture_output=True, check=True)
    after = os.times()
    cpu = after.children_user + after.children_system - before.children_user - before.children_system
    return cpu, time.perf_counter() - start


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    cpu, clock = ({name: [] for name in COMMANDS} for _ in range(2))
    with tempfile.TemporaryDirectory() as folder:
        for number in tqdm(range(args.rounds + 1), unit="round", leave=False):
            for name, words in COMMANDS.items():
                measured = seconds(words, folder)
                # The first round fills the disk's cache.
                if number:
                    cpu[name].append(measured[0])
                    clock[name].append(measured[1])
    shares = ratios(cpu, "imports")
    rows = [
        {
            "command": name,
            "CPU s": str(spread(cpu[name])),
            "clock s": str(spread(clock[name])),
            "CPU / imports": str(shares[name]),
        }
        for name in COMMANDS
    ]
    print(format_table(rows))
    if args.output:
        command = f"python benchmarks/start_up.py --rounds {args.rounds}"
        args.output.write_text(json.dumps({"command": command, **machine(), "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
