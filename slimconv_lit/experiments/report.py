"""Runs side by side in one HTML page that needs no other file: scores, costs, what differs, curves, pictures."""

import base64
import csv
import html
import importlib
import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml  # type: ignore[import-untyped]
from matplotlib import rc_context
from matplotlib.figure import Figure

from slimconv_lit.analysis.latency import interleaved, machine, ratios, spread
from slimconv_lit.checkpoint_files import read_checkpoint
from slimconv_lit.config_files import checkpoint_config, read_yaml
from slimconv_lit.data import BaseDataModule
from slimconv_lit.tasks import BaseTask
from slimconv_lit.usage import UsageError

# A colour that matplotlib writes and the page replaces by that of its text, light or dark.
_INK = "#010203"
_COLOURS = ("#2a78b8", "#d9822b", "#3a9d5d", "#b8486c", "#7a5bb5", "#8a7a4b")
# Metrics that say the same as another, or are no curve.
_NO_CURVES = {"epoch", "step", "train/loss_step"}
_LARGEST, _HIGHEST = 2**53, 1e300
_EXAMPLE = "name a folder such as runs/quickstart/2026-01-31_12-00-00"

_STYLE = """
:root { color-scheme: light dark; --line: #8884; --soft: #8881; }
body { font: 15px/1.5 system-ui, sans-serif; margin: 0 auto; padding: 1rem; max-width: 1240px; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .7rem; border-bottom: 1px solid var(--line); text-align: left; overflow-wrap: anywhere; }
tbody th { font-weight: normal; }
thead th { background: var(--soft); }
@media (max-width: 600px) { body { font-size: 13px; } th, td { padding: .3rem .35rem; } }
.grid { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fit, minmax(min(100%, 20rem), 1fr)); }
figure { margin: 0; } figcaption { font-size: .9rem; overflow-wrap: anywhere; }
img, svg { max-width: 100%; height: auto; }
img { background: #fff; }
.key { display: inline-block; width: .8em; height: .8em; border-radius: 2px; margin-right: .4em; }
footer { margin-top: 2rem; font-size: .85rem; opacity: .75; }
"""


@dataclass(frozen=True)
class Run:
    """What a run folder holds.

    Attributes:
        path: The folder.
        label: Its name on the page, different for each run.
        config: Its configuration, flat: "model.init_args.lr".
        results: What results.json says; empty where the run was not tested.
        curves: (step, value) pairs of each metric.
        pictures: The PNG files, by name.
    """

    path: Path
    label: str
    config: Mapping[str, Any]
    results: Mapping[str, Any]
    curves: Mapping[str, list[tuple[int, float]]]
    pictures: Mapping[str, Path]


def open_runs(folders: Sequence[str], root: Path) -> list[Run]:
    """The runs in `folders`, each with a label of its own; the first is what the others are compared to.

    Args:
        folders: Run folders, or folders of runs (the newest run counts).
        root: Folder of all runs; what is not found from the current folder is looked for there.

    Raises:
        UsageError: If a folder holds no run.
    """
    paths = [find_run(folder, root) for folder in folders]
    return [read_run(path, label) for path, label in zip(paths, _labels(paths), strict=True)]


def write_page(runs: Sequence[Run], target: Path, rounds: int) -> None:
    """Writes the page about `runs`.

    Args:
        runs: The first is what the others are compared to.
        target: The HTML file to write.
        rounds: How often each network's forward pass is timed; 0 to leave the clock out.
    """
    timed = _latencies(runs, rounds) if rounds else {}
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(page(runs, timed), encoding="utf-8")


def find_run(folder: str, root: Path) -> Path:
    """The run folder that `folder` is, or the newest of those below it; from the current folder, else from `root`.

    Raises:
        UsageError: If there is none.
    """
    path = next((path for path in (Path(folder), root / folder) if path.is_dir()), None)
    if path is None:
        elsewhere = "" if Path(folder).is_absolute() else f", and nor is {str(root / folder)!r}"
        raise UsageError(f"compare: {folder!r} is not a folder{elsewhere}; {_EXAMPLE}")
    if (path / "config.yaml").is_file():
        return path
    runs = sorted(file.parent for file in path.glob("*/config.yaml"))
    if not runs:
        raise UsageError(f"compare: {str(path)!r} holds no run: no config.yaml in it or one level below; {_EXAMPLE}")
    return runs[-1]


def _labels(paths: Sequence[Path]) -> list[str]:
    """The end of each path, as long as it takes to tell the runs apart."""
    for depth in range(1, max(len(path.parts) for path in paths) + 1):
        labels = ["/".join(path.parts[-depth:]) for path in paths]
        if len(set(labels)) == len(labels) and depth > 1:
            return labels
    return [f"{i + 1}: {path}" for i, path in enumerate(paths)]


def read_run(path: Path, label: str) -> Run:
    """Reads a run folder; what a run has not got to yet is empty.

    Raises:
        UsageError: If a file in it cannot be read; the message names it.
    """
    try:
        config = read_yaml(path / "config.yaml", yaml.safe_load)
        results = json.loads((path / "results.json").read_text()) if (path / "results.json").is_file() else {}
        numbers = [value for key, value in results.items() if key not in ("network", "limited")]
        if not all(
            isinstance(value, float) or (isinstance(value, int) and abs(value) <= _LARGEST) for value in numbers
        ):
            raise ValueError("results.json has something else than numbers beside the network")
        curves = _curves(path / "metrics.csv") if (path / "metrics.csv").is_file() else {}
        # Half a character and a number of thousands of digits can be read, and not be written.
        json.dumps([config, results], ensure_ascii=False, default=str).encode()
    except (ValueError, TypeError, AttributeError, RecursionError, csv.Error) as error:
        raise UsageError(f"compare: {path} is damaged: {' '.join(str(error).split())[:200]}") from error
    pictures = {file.stem: file for file in sorted((path / "pictures").glob("*.png"))}
    for file in pictures.values():
        # The page goes to others; a link of a stranger's must not put what lies elsewhere into it.
        if not (file.is_file() and file.resolve().is_relative_to(path.resolve())):
            raise UsageError(f"compare: {file} is no picture of this run, but a folder, or a link out of it; remove it")
    return Run(path, label, dict(_flat(config)), results, curves, pictures)


def _flat(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    found: list[tuple[str, Any]] = []
    for key, value in values.items():
        found += _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else [(f"{prefix}{key}", value)]
    return found


def _curves(path: Path) -> dict[str, list[tuple[int, float]]]:
    curves: dict[str, list[tuple[int, float]]] = {}
    with path.open(newline="") as file:
        for number, row in enumerate(csv.DictReader(file, restkey=""), start=1):
            if "" in row:
                raise ValueError(f"metrics.csv, row {number}: a field without a name")
            for key, value in row.items():
                if value and row.get("step") and key not in _NO_CURVES and not key.startswith(("test/", "lr")):
                    step, height = float(row["step"]), float(value)
                    # More than an axis can be drawn for.
                    if not abs(step) <= _LARGEST or (math.isfinite(height) and abs(height) > _HIGHEST):
                        raise ValueError(f"metrics.csv, row {number}: {key}={height} at step {step}")
                    curves.setdefault(key, []).append((int(step) + 1, height))
    return {key: points for key, points in curves.items() if len(points) > 1}


def _latencies(runs: Sequence[Run], rounds: int) -> dict[str, tuple[str, str]]:
    """(milliseconds, multiple of the first) of a forward pass of one image, by label; of runs with a checkpoint."""
    passes = {}
    for run in runs:
        checkpoints = [run.path / "checkpoints" / f"{which}.ckpt" for which in ("best", "last")]
        found = next((path for path in checkpoints if path.is_file()), None)
        if found is not None:
            task, size = open_task(found)
            network, image = task.model.eval(), torch.randn(1, *size)
            passes[run.label] = partial(torch.inference_mode()(network), image)
    if not passes:
        return {}
    times = interleaved(passes, rounds)
    against = ratios(times, next(iter(passes)))
    return {
        label: (str(spread([1000 * value for value in values])), str(against[label])) for label, values in times.items()
    }


def open_task(checkpoint: Path) -> tuple[BaseTask, tuple[int, ...]]:
    """The task in a checkpoint, and the size (C, H, W) of its data's images.

    Raises:
        UsageError: If classes of another package made it.
    """
    try:
        held, carried = read_checkpoint(checkpoint), checkpoint_config(checkpoint)
        # Not by Lightning's `load_from_checkpoint`, which would call what a checkpoint names as its maker.
        task, data = (
            _own_class(str(held["class_paths"][part]), kind)(**carried[part]["init_args"])
            for part, kind in (("model", BaseTask), ("data", BaseDataModule))
        )
        task.on_load_checkpoint(held)
        task.load_state_dict(held["state_dict"])
    except (ImportError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise UsageError(f"{checkpoint} cannot be opened: {' '.join(str(error).split())[:300]}") from error
    return task, data.input_size


def _own_class(name: str, kind: type) -> Any:
    module, _, attribute = name.rpartition(".")
    # A checkpoint names the classes that made it; one of a stranger must not import what it likes.
    if not module.startswith("slimconv_lit."):
        raise ValueError(f"it was made by {name}; compare opens the package's own classes alone")
    found = getattr(importlib.import_module(module), attribute, None)
    if not (isinstance(found, type) and issubclass(found, kind)):
        raise ValueError(f"it was made by {name}, which is no {kind.__name__}")
    return found


def page(runs: Sequence[Run], timed: Mapping[str, tuple[str, str]]) -> str:
    """The whole page. Every text that comes from a run is escaped."""
    title = " against ".join(run.label for run in runs) if len(runs) < 4 else f"{len(runs)} runs"
    parts = [_scores(runs, timed), _differences(runs), _charts(runs), _gallery(runs)]
    about = ", ".join(f"{key} {value}" for key, value in machine().items())
    clock = f"<footer>Latency: one image, forward, median (quartiles) of interleaved passes on {_t(about)}.</footer>"
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{_t(title)}</title>'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<link rel="icon" href="data:,"><style>{_STYLE}</style></head>'
        f"<body><h1>{_t(title)}</h1>{''.join(parts)}{clock if timed else ''}</body></html>\n"
    )


def _t(value: object) -> str:
    return html.escape(str(value))


def _key(runs: Sequence[Run], run: Run) -> str:
    colour = _COLOURS[list(runs).index(run) % len(_COLOURS)]
    return f'<span class="key" style="background:{colour}"></span>{_t(run.label)}'


def _scores(runs: Sequence[Run], timed: Mapping[str, tuple[str, str]]) -> str:
    tests = list(dict.fromkeys(key for run in runs for key in run.results if key.startswith("test/")))
    rows = {"network": [run.results.get("network", "not tested") for run in runs]}
    stars = ["*" * bool(run.results.get("limited")) for run in runs]
    for key in tests:
        scores = [f"{run.results[key]:.4f}" if key in run.results else "" for run in runs]
        rows[key] = [f"{score}{star}" for score, star in zip(scores, stars, strict=True)]
    for key in ("params", "macs"):
        first = runs[0].results.get(key)
        counts = [run.results.get(key) for run in runs]
        rows[key] = [f"{n:,} ({n / first:.3f})" if n and first else f"{n or ''}" for n in counts]
    rows["seconds to train"] = [f"{run.results['seconds']:,}" if "seconds" in run.results else "" for run in runs]
    if timed:
        times = [timed.get(run.label, ("no checkpoint", "")) for run in runs]
        rows["latency, ms"], rows["latency / first"] = [own for own, _ in times], [ratio for _, ratio in times]
    body = "".join(_row(name, cells) for name, cells in rows.items())
    note = "<p>In brackets: as a multiple of the first run's.</p>"
    limits = [f"{run.label}: {run.results['limited']}" for run in runs if run.results.get("limited")]
    if limits:
        note += f"<p>* Of a part of the data only. {_t('; '.join(limits))}.</p>"
    return _table("", runs, body) + note


def _row(name: str, cells: Sequence[object]) -> str:
    return f"<tr><th>{_t(name)}</th>{''.join(f'<td>{_t(cell)}</td>' for cell in cells)}</tr>"


def _table(corner: str, runs: Sequence[Run], body: str) -> str:
    head = "".join(f"<th>{_key(runs, run)}</th>" for run in runs)
    header = f"<thead><tr><th>{_t(corner)}</th>{head}</tr></thead>"
    return f'<div class="wide"><table>{header}<tbody>{body}</tbody></table></div>'


def _differences(runs: Sequence[Run]) -> str:
    keys = list(dict.fromkeys(key for run in runs for key in run.config))
    differing = [key for key in keys if len({json.dumps(run.config.get(key), default=str) for run in runs}) > 1]
    if not differing:
        return "<h2>What differs in their configurations</h2><p>Nothing.</p>"
    body = "".join(_row(key, [run.config.get(key, "not set") for run in runs]) for key in differing)
    return f"<h2>What differs in their configurations</h2>{_table('option', runs, body)}"


def _charts(runs: Sequence[Run]) -> str:
    metrics = list(dict.fromkeys(key for run in runs for key in run.curves))
    if not metrics:
        return ""
    charts = "".join(f"<figure>{_chart(runs, metric)}</figure>" for metric in metrics)
    return f'<h2>Curves</h2><div class="grid">{charts}</div>'


def _chart(runs: Sequence[Run], metric: str) -> str:
    # A fixed salt: the same runs give the same page.
    style: dict[Any, Any] = {"svg.fonttype": "none", "svg.hashsalt": metric, "font.family": "sans-serif"}
    for key in ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"):
        style[key] = _INK
    with rc_context(style):
        figure = Figure(figsize=(5, 3.2), layout="constrained")
        axes = figure.subplots()
        for i, run in enumerate(runs):
            if points := run.curves.get(metric):
                axes.plot(*zip(*points, strict=True), color=_COLOURS[i % len(_COLOURS)], linewidth=1.6)
        # A name is no formula, whatever signs it has.
        axes.set_title(metric, parse_math=False)
        axes.set_xlabel("optimizer step")
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        text = io.StringIO()
        figure.savefig(text, format="svg", transparent=True, metadata={"Date": None})
    svg = text.getvalue()
    return svg[svg.index("<svg") :].replace(_INK, "currentColor")


def _gallery(runs: Sequence[Run]) -> str:
    names = list(dict.fromkeys(name for run in runs for name in run.pictures))
    sections = []
    for name in names:
        figures = "".join(
            f'<figure><img alt="{_t(name)} of {_t(run.label)}" src="data:image/png;base64,'
            f'{base64.b64encode(run.pictures[name].read_bytes()).decode()}">'
            f"<figcaption>{_key(runs, run)}</figcaption></figure>"
            for run in runs
            if name in run.pictures
        )
        sections.append(f'<h2>{_t(name)}</h2><div class="grid">{figures}</div>')
    return "".join(sections)
