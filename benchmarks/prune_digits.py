"""Network Slimming on the digits, as `configs/pruning/digits.yaml` ships it: top-1 of dense and pruned, over seeds.

python benchmarks/prune_digits.py --output benchmarks/results/prune_digits.json

Each loop runs in a folder of its own that is empty at first; its seconds include imports, pictures and the clock.
"""

import argparse
import csv
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from slimconv_lit.analysis.latency import machine
from slimconv_lit.tables import format_table


def run(seed):
    """The rows of slimming.csv of one whole loop, and its seconds."""
    words = ["-m", "slimconv_lit", "prune", "--config=digits.yaml", f"--seed_everything={seed}", f"--data.seed={seed}"]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([sys.executable, *words, "--trainer.enable_progress_bar=false"], cwd=folder, check=True)
        seconds = time.perf_counter() - start
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        (table,) = Path(folder).glob("runs/*/slimming.csv")
        with table.open() as file:
            rows = [{"seed": seed, **row} for row in csv.DictReader(file)]
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return rows, {"seed": seed, "seconds": round(seconds, 1), "cpu seconds": round(cpu, 1)}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    made = [run(seed) for seed in range(args.seeds)]
    rows = [row for found, _ in made for row in found]
    print(format_table(rows))
    if args.output:
        about = {
            "command": "python -m slimconv_lit prune --config digits.yaml --seed_everything=SEED --data.seed=SEED",
            **machine(),
            "times": [times for _, times in made],
            "rows": rows,
        }
        args.output.write_text(json.dumps(about, indent=2) + "\n")


if __name__ == "__main__":
    main()
