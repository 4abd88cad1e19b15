"""Puts SlimConv into networks of every family that timm ships, runs each forward and through one training step.

    python benchmarks/timm_coverage.py --output benchmarks/results/timm_coverage.md

The two networks with the shortest names of each family are taken, as far as they have at most 40 million parameters.
"""

import argparse
import collections
import signal
import sys
import warnings
from pathlib import Path

import timm
import torch
from torch.utils._pytree import tree_iter
from tqdm import tqdm

from slimconv_lit import slimify
from slimconv_lit.analysis.complexity import params
from slimconv_lit.backbones.stages import WithoutWeights
from slimconv_lit.tables import format_table

SECONDS = 120


def families():
    """The modules of timm, one a family, with the names of their networks."""
    return {
        module: sorted(timm.list_models(module=module), key=lambda n: (len(n), n)) for module in timm.list_modules()
    }


def chosen(names, count, limit):
    """The first `count` networks with at most `limit` parameters."""
    found = []
    for name in names:
        try:
            with WithoutWeights():
                size = params(timm.create_model(name))
        except Exception:
            # Some networks compute with their weights as they are built; here only the size is asked for.
            size = params(timm.create_model(name))
        if size <= limit:
            found.append(name)
        if len(found) == count:
            break
    return found


def step(model, x):
    """One training step and one forward pass in eval mode."""
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    outputs = [t for t in tree_iter(model.train()(x)) if isinstance(t, torch.Tensor)]
    sum(t.float().square().mean() for t in outputs).backward()
    optimizer.step()
    with torch.no_grad():
        model.eval()(x)
    if not all(p.grad is None or p.grad.isfinite().all() for p in model.parameters()):
        raise ArithmeticError("a gradient is not finite")


def examine(family, name):
    """One row of the table."""
    model = timm.create_model(name, num_classes=10)
    row = {"family": family, "network": name, "params": params(model)}
    report = slimify(model)
    row["slim / plain params"] = round(params(model) / row["params"], 3)
    row |= {"spatial": len(report.rows), "replaced": len(report.replaced)}
    reasons = collections.Counter(row.why.split(":")[0].split(" (")[0] for row in report.rows if not row.now)
    side = (model.pretrained_cfg.get("min_input_size") or model.pretrained_cfg.get("input_size"))[-1]
    try:
        step(model, torch.randn(2, 3, side, side))
        row["runs and trains"] = "yes"
    except Exception as error:
        # A network that does not run plain either is not for us to mend.
        try:
            step(timm.create_model(name, num_classes=10), torch.randn(2, 3, side, side))
            row["runs and trains"] = f"NO: {' '.join(str(error).split())[:80]}"
        except Exception as plain:
            row["runs and trains"] = f"nor does the plain one: {' '.join(str(plain).split())[:60]}"
    if not report.replaced:
        row["why nothing is replaced"] = "; ".join(f"{n}x {why}" for why, n in reasons.most_common(2)) or "no Conv2d"
    return row


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--per_family", type=int, default=2)
    parser.add_argument("--limit", type=int, default=40_000_000, help="most parameters of a network")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")

    def too_long(*_):
        raise TimeoutError(f"took more than {SECONDS} s")

    signal.signal(signal.SIGALRM, too_long)
    rows = []
    for family, names in tqdm(families().items(), file=sys.stderr):
        for name in chosen(names, args.per_family, args.limit):
            signal.alarm(SECONDS)
            try:
                rows.append(examine(family, name))
            except TimeoutError as error:
                rows.append({"family": family, "network": name, "runs and trains": str(error)})
            finally:
                signal.alarm(0)
    done = [row for row in rows if row["runs and trains"] == "yes"]
    summary = (
        f"{len(done)} of {len(rows)} networks of {len({row['family'] for row in rows})} families run and train after "
        f"`slimify(model, k=4/3)`; {sum(bool(row.get('replaced')) for row in done)} of them have something replaced."
    )
    print(format_table(rows), summary, sep="\n\n")
    if args.output:
        made = f"`python benchmarks/timm_coverage.py`, torch {torch.__version__}, timm {timm.__version__}, on a CPU."
        made += " Ten classes; two images of the smallest size that the network is made for."
        args.output.write_text(f"# SlimConv in timm's networks\n\n{made}\n\n{summary}\n\n{format_table(rows, 'md')}\n")


if __name__ == "__main__":
    main()
