"""Prunes own backbones and torchvision's families, plain and slim, at three ratios; each prune is proved or refused.

    python benchmarks/prune_coverage.py --output benchmarks/results/prune_coverage.md

`prune` compares the pruned network with the masked one on random images, and takes back what differs by more than 1e-5;
the table gives the largest difference of the three ratios. Finished rows are kept beside the output, in a file that
ends in .partial, so that a run that was stopped goes on.
"""

import argparse
import collections
import json
import re
import time
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm

from slimconv_lit import create_backbone, prune
from slimconv_lit.analysis.latency import machine
from slimconv_lit.backbones.registry import OWN
from slimconv_lit.tables import format_table

RATIOS = (0.3, 0.5, 0.7)
KS = (None, "4/3", "2", "8/3")
STREAMS = ("select", "coupled")
TORCHVISION = (
    "resnet50", "resnext50_32x4d", "wide_resnet50_2", "densenet121", "mobilenet_v2", "mobilenet_v3_small",
    "efficientnet_b0", "regnet_y_400mf", "shufflenet_v2_x0_5", "squeezenet1_1", "googlenet", "inception_v3",
    "mnasnet0_5", "vgg11_bn",
)  # fmt: skip


def randomise(model):
    """Norms of which none scales like another, as after training."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.weight is not None:
            nn.init.uniform_(module.weight, 0.1, 1)
            nn.init.uniform_(module.bias, -0.3, 0.3)
            module.running_mean.uniform_(-0.5, 0.5)
            module.running_var.uniform_(0.5, 2)
    return model.eval()


def reasons(report):
    """Why layers keep all their channels, with how many of them."""
    counts = collections.Counter()
    for why in report.left.values():
        # One reason for many layers: without their names and numbers.
        counts[re.sub(r"\b[\w]+\.[\w.]+\b", "...", why).split(";")[0]] += 1
    counts.pop("the network returns it", None)
    return "; ".join(f"{n}x {why}" for why, n in counts.most_common(3)) + ("; ..." if len(counts) > 3 else "")


def examine(name, k, streams):
    """One row of the table: a network at all ratios."""
    operator = k and {"class_path": "SlimConv2d", "init_args": {"k": k}}
    row = {"network": name, "k": k or "plain", "streams": streams}
    differences = []
    size = 96 if "inception" in name else 64 if name.startswith("torchvision") else 32
    for ratio in RATIOS:
        torch.manual_seed(0)
        model = randomise(create_backbone(name, operator, num_classes=10))
        try:
            report = prune(model, ratio, streams=streams, example_input=torch.randn(2, 3, size, size))
        except ValueError as error:
            return row | {"why": str(error).partition(";")[0]}
        differences.append(report.difference)
        row |= {"scales": report.scales, f"{ratio:.0%}": f"{report.pruned / max(1, report.scales):.1%}"}
    return row | {"largest difference": f"{max(differences):.0e}", "why": reasons(report)}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help="networks whose names contain this")
    parser.add_argument("--output", type=Path, default=Path("prune_coverage.md"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    names = [name for name in [*OWN, *(f"torchvision:{name}" for name in TORCHVISION)] if (args.only or "") in name]
    kept = args.output.with_suffix(".partial")
    rows = [json.loads(line) for line in kept.read_text().splitlines()] if kept.exists() else []
    done = {(row["network"], row["k"]) for row in rows}
    # Both ways with streams are met by every second network and treatment each.
    wanted = [(name, k, STREAMS[(i + j) % 2]) for i, name in enumerate(names) for j, k in enumerate(KS)]
    started = time.monotonic()
    for name, k, streams in tqdm(wanted, unit="network"):
        if (name, k or "plain") in done:
            continue
        rows.append(examine(name, k, streams))
        with kept.open("a") as file:
            file.write(json.dumps(rows[-1]) + "\n")
    columns = ["network", "k", "streams", "scales", *(f"{r:.0%}" for r in RATIOS), "largest difference", "why"]
    rows = [{column: row.get(column, "") for column in columns} for row in rows]
    proved = sum(bool(row["largest difference"]) for row in rows)
    about = ", ".join(f"{key} {value}" for key, value in machine().items())
    args.output.write_text(
        "# Pruning, proved\n\n"
        f"`python benchmarks/prune_coverage.py`, {about}; {time.monotonic() - started:,.0f} s in the last run.\n\n"
        f"{proved} of {len(rows)} networks were pruned at 30, 50 and 70 % of their scales, and compute what the masked "
        "network computes, to the difference given (relative to the largest output). The others were refused, with the "
        "reason. Below each ratio stands the part of the scales that went: groups, orbits and limits are coarse. The "
        "last column says why layers keep all channels at 70 %; the classifier, which the network returns, is not "
        "counted.\n\n"
        f"{format_table(rows, 'md')}\n"
    )
    kept.unlink()


if __name__ == "__main__":
    main()
