"""Runs a W&B sweep file without W&B: grid and random, several points at a time, going on where it was stopped.

Each point is a `fit` in a process of its own. Its folder below runs/<sweep>/ keeps its output and, once it has
finished, point.json with its command, results, and a hash of all that the command names; a point for which that is the
same is not run again.
"""

import argparse
import contextlib
import fcntl
import hashlib
import json
import multiprocessing
import os
import re
import shlex
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from hashlib import sha1
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from tqdm import tqdm  # type: ignore[import-untyped]

from slimconv_lit.cli import run_verb
from slimconv_lit.config_files import compose
from slimconv_lit.durable import write_whole
from slimconv_lit.experiments.sweep_file import Point, Sweep, find_sweep, read_sweep
from slimconv_lit.lightning_cli import preview
from slimconv_lit.tables import format_table
from slimconv_lit.trust import allow, let_in
from slimconv_lit.usage import UsageError

# Where the run came to lie and how long it took differ from one attempt to the next; the table must not.
_UNSTEADY = ("seconds",)


def sweep(argv: Sequence[str]) -> int:
    """Runs `sweep FILE [--count N] [--jobs N] [--dry_run]`; returns 1 if a point failed.

    Below `--run_root`/<name of the file> lie sweep.csv, sweep.png and one folder per point.

    Raises:
        UsageError: If the file or an option is wrong, or another process runs the same sweep.
    """
    parser = argparse.ArgumentParser(
        prog="python -m slimconv_lit sweep",
        description="Run a W&B sweep file here, without W&B. Other options go to each fit.",
        allow_abbrev=False,
    )
    parser.add_argument("file", help="such as k_digits.yaml, from configs/sweeps or anywhere")
    parser.add_argument("--count", type=int, help="points of a random search; of a grid, the first ones alone")
    parser.add_argument("--jobs", type=int, default=1, help="points at a time (default: 1)")
    parser.add_argument("--dry_run", action="store_true", help="print each point's command, params and macs; run none")
    parser.add_argument("--run_root", default="runs", help="folder of all runs (default: runs)")
    own, fit_options = parser.parse_known_args(argv)
    try:
        plan = read_sweep(find_sweep(own.file))
        points = plan.points(own.count)
    except (FileNotFoundError, ValueError) as error:
        raise UsageError(str(error)) from error
    # Nothing of W&B's is needed here, and a key without a network would cost minutes.
    shared = [word for word in plan.options if not word.startswith("--logger")]
    commands = [[*shared, "--logger=csv", *plan.arguments(point), *fit_options] for point in points]
    if own.dry_run:
        print(dry_run(points, commands))
        return 0
    folder = Path(own.run_root, plan.path.stem)
    with _alone_in(folder):
        rows = _run_all(plan, points, commands, folder, max(1, own.jobs))
    print(f"\n{format_table(rows)}\n\nin {folder}: sweep.csv, sweep.png")
    return int(any(row["status"] != "finished" for row in rows))


def dry_run(points: Sequence[Point], commands: Sequence[Sequence[str]]) -> str:
    """Every point's command with what its network would cost, or why it cannot be built."""
    lines = []
    rows: list[dict[str, Any]] = []
    for point, command in zip(tqdm(points, desc="points", leave=False, delay=1), commands, strict=True):
        lines.append(shlex.join(["python", "-m", "slimconv_lit", "fit", *command]))
        rows.append(dict(point) | _cost(command))
    return "\n".join([*lines, "", format_table(rows)])


def _cost(command: Sequence[str]) -> dict[str, Any]:
    try:
        return preview(command)
    except (UsageError, FileNotFoundError) as error:
        return {"network": f"cannot be built: {error}".splitlines()[0]}


@contextlib.contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise UsageError(f"another process is running this sweep in {folder}") from error
        yield


def _run_all(
    plan: Sweep, points: Sequence[Point], commands: Sequence[Sequence[str]], folder: Path, jobs: int
) -> list[dict[str, Any]]:
    # The plain network of the shared options, that the compressed ratio refers to.
    plain = _cost([*commands[0], "--model.operator=null"]).get("params")
    rows: list[dict[str, Any]] = [dict(point) | {"status": "waiting"} for point in points]
    spawner = multiprocessing.get_context("forkserver")
    # Each point would otherwise spend seconds on importing torch.
    spawner.set_forkserver_preload(["slimconv_lit.lightning_cli"])
    with ThreadPoolExecutor(jobs) as pool, tqdm(total=len(points), desc=plan.path.stem, unit="point") as bar:
        futures = {
            pool.submit(_run_point, spawner, c, folder / _slug(p)): i
            for i, (p, c) in enumerate(zip(points, commands, strict=True))
        }
        for future in as_completed(futures):
            i = futures[future]
            rows[i] = dict(points[i]) | _outcome(future.result(), plan.metric, plain)
            bar.update()
            write_whole(folder / "sweep.csv", format_table(rows, "csv") + "\n")
    figure = draw_sweep(rows, plan)
    if figure is not None:
        figure.savefig(folder / "sweep.png")
    return rows


def _slug(point: Point) -> str:
    """A folder name for a point: readable, and different for different points."""
    text = "_".join(f"{name.rpartition('.')[2]}-{value}" for name, value in point.items())
    plain = re.sub(r"[^\w.-]", "-", text)[:60]
    return f"{plain}-{sha1(json.dumps(point, sort_keys=True, default=str).encode()).hexdigest()[:6]}"


def _run_point(spawner: Any, command: Sequence[str], folder: Path) -> dict[str, Any]:
    """Runs one point, unless it has been; returns what point.json holds, or {"failed": the reason}."""
    record = folder / "point.json"
    made_from = _made_from(command)
    with contextlib.suppress(FileNotFoundError, json.JSONDecodeError, AttributeError):
        known: dict[str, Any] = json.loads(record.read_text())
        if made_from and known.get("made_from") == made_from:
            return known
    folder.mkdir(parents=True, exist_ok=True)
    # Those of attempts with another recipe.
    before = set(folder.glob("*/results.json"))
    words = [*command, f"--run_root={folder.parent}", f"--name={folder.name}"]
    process = spawner.Process(target=_fit, args=(words, folder / "output.txt", let_in))
    process.start()
    process.join()
    if process.exitcode:
        return {"failed": _reason(folder / "output.txt", process.exitcode)}
    results = set(folder.glob("*/results.json")) - before
    if not results:
        return {"failed": "it was not tested, so it has no results.json"}
    done = {"command": list(command), "made_from": made_from, "results": json.loads(results.pop().read_text())}
    write_whole(record, json.dumps(done, indent=2) + "\n")
    return done


def _made_from(command: Sequence[str]) -> str | None:
    """A hash of a point's options with what is in the files that they name; None if one cannot be read."""
    try:
        words = compose("fit", command)
    except (FileNotFoundError, ValueError):
        return None
    found = sha1(json.dumps(words).encode())
    # The configurations are in the words; weights and the like are named there.
    for text in [*_texts(json.loads(words[1])), *(word.rpartition("=")[2] for word in words)]:
        if os.path.isfile(text):
            with open(text, "rb") as file:
                found.update(hashlib.file_digest(file, "sha1").digest())
    return found.hexdigest()


def _texts(values: Any) -> Iterator[str]:
    if isinstance(values, str):
        yield values
    for value in values.values() if isinstance(values, dict) else values if isinstance(values, list) else ():
        yield from _texts(value)


def _fit(words: Sequence[str], output: Path, allowed: Sequence[str]) -> None:
    """What a point's process does."""
    allow(allowed)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    with output.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.exit(run_verb("fit", list(words)))


def _end_with_parent() -> None:
    # A sweep that is killed must not leave runs behind that share the machine with those of the next attempt.
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _reason(output: Path, status: int | None) -> str:
    lines = (
        [line for line in output.read_text(errors="replace").splitlines() if line.strip()] if output.exists() else []
    )
    told = next((line for line in reversed(lines) if re.match(r"error:|\w*(Error|Exception)\b", line)), None)
    return (told or f"exit status {status}, see {output.name}").removeprefix("error: ")[:200]


def _outcome(done: Mapping[str, Any], metric: str, plain: int | None) -> dict[str, Any]:
    if "failed" in done:
        return {"status": f"failed: {done['failed']}"}
    results = {key: value for key, value in done["results"].items() if key not in _UNSTEADY}
    if metric not in results:
        return {"status": f"failed: no metric {metric!r} in {', '.join(results)}"}
    ratio = {"compressed %": round(100 * (1 - results["params"] / plain), 2)} if plain else {}
    return {"status": "finished", metric: results[metric]} | {k: v for k, v in results.items() if k != metric} | ratio


def draw_sweep(rows: Sequence[Mapping[str, Any]], plan: Sweep) -> Figure | None:
    """The metric over the compressed ratio (Fig. 8 of the SlimConv paper), with the line of points that none beats.

    Args:
        rows: What sweep.csv holds.
        plan: The sweep.

    Returns:
        None where no point has finished.
    """
    done = [row for row in rows if row["status"] == "finished" and "compressed %" in row]
    if not done:
        return None
    figure = Figure(figsize=(7, 4.6), layout="constrained", dpi=120)
    axes = figure.subplots()
    percent = all(0 <= row[plan.metric] <= 1 for row in done)
    scale, sign = (100 if percent else 1), (1 if plan.maximize else -1)
    x, y = [row["compressed %"] for row in done], [scale * row[plan.metric] for row in done]
    best = _pareto(x, [sign * value for value in y])
    others = [i for i in range(len(done)) if i not in best]
    # One point is no line.
    label, width = ("Pareto line", 1.4) if len(best) > 1 else ("none is smaller, none better", 0)
    axes.plot([x[i] for i in best], [y[i] for i in best], "o", ls="-", lw=width, ms=7, color="#1b7f3b", label=label)
    if others:
        axes.plot([x[i] for i in others], [y[i] for i in others], "o", ms=6, color="#24548f", label="other points")
    varied = [name for name in plan.parameters if len({str(row[name]) for row in done}) > 1]
    if len(done) <= 24:
        for row, left, up in zip(done, x, y, strict=True):
            text = ", ".join(f"{name.rpartition('.')[2]}={row[name]}" for name in varied)
            axes.annotate(text, (left, up), (4, 4), textcoords="offset points", fontsize=8)
    axes.set_title(": ".join([plan.path.stem, *([", ".join(n.rpartition(".")[2] for n in varied)] if varied else [])]))
    axes.set_xlabel("compressed ratio: parameters saved against the plain network (%)")
    axes.set_ylabel(f"{plan.metric} (%)" if percent else plan.metric)
    axes.yaxis.set_major_locator(MaxNLocator(6))
    axes.margins(0.12)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    if len(done) > 1:
        figure.legend(loc="outside lower right", ncols=2, frameon=False)
    return figure


def _pareto(ratio: Sequence[float], score: Sequence[float]) -> list[int]:
    """Indices of the points than which none is both smaller and better, by falling ratio."""
    kept: list[int] = []
    for i in sorted(range(len(ratio)), key=lambda i: (-ratio[i], -score[i])):
        if not kept or score[i] > score[kept[-1]]:
            kept.append(i)
    return kept
