"""Seconds of a plain network against the same network after `slimify`, in one interleaved run.

    python benchmarks/slim_vs_plain.py resnet50 --k 4/3 8/3 --batch 1 16

Each round times one forward pass (and, with --train, one training step) of every network in turn, so that a change of
the machine's mood meets all of them; what is reported is the median over the rounds of slim / plain, with quartiles.
"""

import argparse
import json
import platform
import statistics
import time
from pathlib import Path

import torch
import torchvision

from slimconv_lit import slimify
from slimconv_lit.analysis.complexity import macs
from slimconv_lit.tables import format_table


def seconds(run, device):
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def runner(model, x, train):
    def forward():
        with torch.no_grad():
            model(x)

    def step():
        model.zero_grad()
        model(x).float().square().mean().backward()

    return step if train else forward


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", default=["resnet50"], help="torchvision classification networks")
    parser.add_argument("--k", nargs="+", default=["4/3", "8/3"])
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 16])
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--train", action="store_true")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path, help="write the table and what it was measured on to this .json")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)

    rows = []
    for name in args.names:
        networks = {"plain": torchvision.models.get_model(name)}
        for k in args.k:
            networks[k] = torchvision.models.get_model(name)
            slimify(networks[k], k=k)
        counts = {label: macs(model, (3, args.size, args.size)) for label, model in networks.items()}
        for batch in args.batch:
            x = torch.randn(batch, 3, args.size, args.size, device=args.device)
            x = x.contiguous(memory_format=torch.channels_last)
            runs = {}
            for label, model in networks.items():
                model.to(args.device, memory_format=torch.channels_last).train(args.train)
                runs[label] = runner(model, x, args.train)
                runs[label]()
            times = {label: [] for label in networks}
            for _ in range(args.rounds):
                for label, run in runs.items():
                    times[label].append(seconds(run, args.device))
            for label in args.k:
                ratios = [slim / plain for slim, plain in zip(times[label], times["plain"], strict=True)]
                low, _, high = statistics.quantiles(ratios, n=4)
                rows.append(
                    {
                        "network": name,
                        "k": label,
                        "batch": batch,
                        "plain ms": round(1000 * statistics.median(times["plain"]), 1),
                        "slim ms": round(1000 * statistics.median(times[label]), 1),
                        "ratio": round(statistics.median(ratios), 3),
                        "quartiles": f"{low:.3f} to {high:.3f}",
                        "macs ratio": round(counts[label] / counts["plain"], 3),
                    }
                )
    print(format_table(rows))
    if args.output:
        device = torch.cuda.get_device_name() if args.device == "cuda" else cpu_name()
        about = {
            "machine": f"{device}, {args.threads} thread(s)" if args.device == "cpu" else device,
            "versions": {"python": platform.python_version(), "torch": torch.__version__},
            "torchvision": torchvision.__version__,
            "mode": "training step" if args.train else "forward pass, eval",
            "arguments": {k: v for k, v in vars(args).items() if k != "output"},
            "rows": rows,
        }
        args.output.write_text(json.dumps(about, indent=2, default=str) + "\n")


def cpu_name():
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())


if __name__ == "__main__":
    main()
