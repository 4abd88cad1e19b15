"""Puts runs side by side: those that are there, or one config trained plain and slim through the very same `fit`."""

import argparse
import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from slimconv_lit.callbacks.run_folder import new_run_folder
from slimconv_lit.experiments.report import open_runs, write_page
from slimconv_lit.lightning_cli import run
from slimconv_lit.lookup import find_config
from slimconv_lit.ops.slim_conv import folds_of
from slimconv_lit.results import results_table
from slimconv_lit.tables import format_table
from slimconv_lit.tasks import BaseTask
from slimconv_lit.usage import UsageError

_RATIOS = ("params", "macs", "seconds")


def compare(argv: Sequence[str]) -> Path:
    """Runs `compare`: with run folders, a table and a page about them; with `--config`, plain and slim training first.

    Returns:
        The page, or the folder with all that came of the training.

    Raises:
        UsageError: If an option is wrong.
    """
    options = {word.partition("=")[0] for word in argv}
    trains = not argv or (argv[0].startswith("-") and options & {"--config", "--k", "-h", "--help"})
    return _train_and_compare(argv) if trains else _compare_runs(argv)


def _compare_runs(argv: Sequence[str]) -> Path:
    parser = argparse.ArgumentParser(
        prog="python -m slimconv_lit compare",
        description="Put runs that are there side by side, in a table and in one HTML page.",
        allow_abbrev=False,
    )
    parser.add_argument("runs", nargs="+", help="run folders; the others are compared with the first")
    parser.add_argument("--run_root", default="runs", help="folder in which they are looked for too (default: runs)")
    parser.add_argument("--output", default="comparison.html", help="the page (default: comparison.html)")
    parser.add_argument("--rounds", type=int, default=15, help="timed passes of each network; 0 for none (default: 15)")
    own = parser.parse_args(argv)
    if Path(own.output).suffix != ".html":
        raise UsageError(f"--output: the page is an .html file, not {own.output!r}")
    if own.rounds < 0 or own.rounds == 1:
        raise UsageError(f"--rounds={own.rounds}: 0 for none, or at least 2, for a spread")
    runs = open_runs(own.runs, Path(own.run_root))
    # Of all tasks, for nothing keeps runs of different ones apart.
    monitors = [task.monitor for task in BaseTask.__subclasses__()]
    first = runs[0].results
    rows = [
        {"run": run.label, "network": "not tested"} | dict(run.results) | ratios(run.results, first, "first")
        for run in runs
    ]
    print(f"{results_table(rows, *monitors)}\n", flush=True)
    write_page(runs, Path(own.output), own.rounds)
    print(f"in {own.output}: what differs, curves, pictures")
    return Path(own.output)


def _train_and_compare(argv: Sequence[str]) -> Path:
    """Runs `compare --config C [--k 4/3 8/3 ...] [options of fit]`; returns the folder with all that came of it.

    The folder holds comparison.csv, curves.png and one run folder per network.

    Raises:
        UsageError: If the config or a k is wrong.
    """
    parser = argparse.ArgumentParser(
        prog="python -m slimconv_lit compare",
        description="Train a config plain and with SlimConv2d for each k, and compare. Other options go to fit. "
        "With run folders (`compare runs/A runs/B`) nothing is trained; `compare runs/A --help` has its options.",
        allow_abbrev=False,
    )
    parser.add_argument("--config", required=True, help="what to train")
    parser.add_argument("--k", nargs="+", default=["4/3"], help="compressions of SlimConv2d (default: 4/3)")
    parser.add_argument("--run_root", default="runs", help="folder of all runs (default: runs)")
    own, fit_options = parser.parse_known_args(argv)
    try:
        name = find_config(own.config).stem
        for k in own.k:
            folds_of(k)
    except (FileNotFoundError, ValueError) as error:
        raise UsageError(str(error)) from error

    folder = new_run_folder(Path(own.run_root), f"{name}-compare")
    variants = {"plain": ["--model.operator=null"]}
    for k in own.k:
        variants[f"k{k.replace('/', '-')}"] = ["--model.operator=SlimConv2d", f"--model.operator.k={k}"]
    rows: list[dict[str, Any]] = []
    curves: dict[str, Path] = {}
    for variant, options in variants.items():
        common = ["--config", own.config, f"--run_root={folder}", f"--name={variant}"]
        cli = run("fit", [*common, "--trainer.enable_model_summary=false", *fit_options, *options])
        if cli.run_folder is None or not cli.results:
            raise UsageError("compare needs the test after each fit: no fast_dev_run, no --test_after=false")
        rows.append(cli.results | ratios(cli.results, rows[0] if rows else cli.results, "plain"))
        curves[cli.results["network"]] = cli.run_folder.path / "metrics.csv"

    (folder / "comparison.csv").write_text(format_table(rows, "csv") + "\n")
    monitor = cli.model.monitor
    draw_curves({label: read_curves(path, monitor) for label, path in curves.items()}).savefig(folder / "curves.png")
    print(f"\n{results_table(rows, monitor)}\n\nin {folder}: comparison.csv, curves.png")
    return folder


def ratios(results: Mapping[str, Any], first: Mapping[str, Any], name: str) -> dict[str, float]:
    """What `results` costs, as multiples of what those called `name` cost, as far as both are known."""
    known = [key for key in _RATIOS if key in results and first.get(key)]
    return {f"{key} / {name}": round(results[key] / first[key], 3) for key in known}


def read_curves(metrics: Path, score: str) -> dict[str, list[tuple[int, float]]]:
    """(epoch, value) pairs of "train/loss" and of `score` in a run's metrics.csv."""
    with metrics.open(newline="") as file:
        rows = list(csv.DictReader(file))
    return {key: [(int(r["epoch"]), float(r[key])) for r in rows if r.get(key)] for key in ("train/loss", score)}


def draw_curves(curves: Mapping[str, Mapping[str, Sequence[tuple[int, float]]]]) -> Figure:
    """One panel for each metric and one line for each network, over epochs."""
    keys = list(next(iter(curves.values())))
    figure = Figure(figsize=(5.2 * len(keys), 4), layout="constrained", dpi=120)
    for axes, key in zip(figure.subplots(1, len(keys), squeeze=False).flat, keys, strict=True):
        for number, (label, lines) in enumerate(curves.items()):
            epochs, values = zip(*lines[key], strict=True)
            # Lines that lie on each other stay visible: later ones are thinner.
            width = max(1.4, 2.6 - 0.5 * number)
            axes.plot([e + 1 for e in epochs], values, label=label, linewidth=width, marker="o", markersize=1.5 * width)
        axes.set_title(key)
        axes.set_xlabel("epoch")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    if all(value > 0 for lines in curves.values() for _, value in lines[keys[0]]):
        figure.axes[0].set_yscale("log")
    figure.axes[0].legend(frameon=False)
    return figure
