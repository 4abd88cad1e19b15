"""Images per second that the input pipelines deliver, against torchvision's image by image, in one interleaved run.

    python benchmarks/input_pipeline.py --output benchmarks/results/input_pipeline.json

CIFAR-size: crop, flip, rotation and normalisation of batches of 128, in memory, against the same transforms of
torchvision on each PIL image. Both in one process and with `--threads` threads, so that the figures are those of cores.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import default_collate

from slimconv_lit.analysis.latency import interleaved, machine, spread
from slimconv_lit.analysis.latency import ratios as against
from slimconv_lit.data.base import Transformed
from slimconv_lit.data.batched import BatchAugment, InMemory
from slimconv_lit.data.transforms import CIFAR100_STATS, cifar100_train
from slimconv_lit.tables import format_table

BATCH = 128


def cifar():
    """One batch each way: {name: function}."""
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (BATCH, 32, 32, 3), dtype=np.uint8)
    stored = [(Image.fromarray(image), 0) for image in pixels]
    one_by_one = Transformed(stored, cifar100_train())
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous()
    together = InMemory(images, [0] * BATCH, CIFAR100_STATS, BatchAugment())
    keys = [(i, 1000 + i) for i in range(BATCH)]
    return {
        "torchvision, image by image": lambda: default_collate([one_by_one[key] for key in keys]),
        "batches in memory": lambda: together.__getitems__(keys),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=50)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    times = interleaved(cifar(), args.rounds)
    base = next(iter(times))
    shares = against(times, base)
    rows = [
        {
            "pipeline": name,
            "images/s": str(spread([BATCH / seconds for seconds in values])),
            "times as fast": round(1 / shares[name].median, 2),
        }
        for name, values in times.items()
    ]
    print(format_table(rows))
    if args.output:
        command = f"python benchmarks/input_pipeline.py --rounds {args.rounds} --threads {args.threads}"
        args.output.write_text(json.dumps({"command": command, **machine(), "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
