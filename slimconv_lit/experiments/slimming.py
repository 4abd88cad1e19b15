"""Network Slimming from one config: train with a penalty on the scales, prune, fine-tune, and all of it again.

Liu et al., "Learning Efficient Convolutional Networks through Network Slimming", ICCV 2017, Section 3 and Fig. 2.

Each stage has a folder of its own below runs/<name>/ with its runs in it and, once it has finished, stage.json. A stage
whose stage.json was written for the same configuration and the same first weights is not run again, so the same command
goes on where it was stopped.
"""

import argparse
import contextlib
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeAlias

import torch
import yaml  # type: ignore[import-untyped]
from matplotlib.figure import Figure

from slimconv_lit.analysis.complexity import macs, params
from slimconv_lit.analysis.latency import interleaved, machine, ratios, spread
from slimconv_lit.callbacks.checkpoints import DurableIO
from slimconv_lit.callbacks.run_folder import Lock
from slimconv_lit.config_files import Config, load_config, merge, recipe_of
from slimconv_lit.durable import write_whole
from slimconv_lit.errors import explain
from slimconv_lit.experiments.report import open_task
from slimconv_lit.lightning_cli import build_fit, open_checkpoint, run
from slimconv_lit.lookup import PRUNING, closest, find_checkpoint, find_config
from slimconv_lit.surgery import PruneReport, plans_of, prune
from slimconv_lit.surgery.classes import Streams
from slimconv_lit.tables import format_table
from slimconv_lit.usage import RaisingParser, UsageError


@dataclass(frozen=True)
class Slimming:
    """What the section `prune:` of a config may say, and the command line too.

    Attributes:
        ratio: The part of all scales to prune, in each pass.
        multi_pass: How many times the three stages are gone through.
        streams: What happens where blocks are joined, as in `prune`: keep, coupled or select.
        min_channels: No norm keeps fewer channels.
        max_ratio_per_layer: No norm loses a larger part of its channels in a pass (paper's multi-pass: 0.5).
        exclude: Name patterns of norms to leave alone.
        sparsity: Arguments of the callback `Sparsity`: {"strength": 1e-4}.
        sparse: What the configuration of sparse training has otherwise: {"trainer": {"max_epochs": 40}}.
        finetune: What the configuration of fine-tuning has otherwise.
        dense: Also train without penalty and pruning, to compare with.

    Raises:
        ValueError: If `ratio` or `multi_pass` is out of range.
    """

    ratio: float = 0.5
    multi_pass: int = 1
    streams: Streams = "keep"
    min_channels: int = 4
    max_ratio_per_layer: float = 0.9
    exclude: list[str] = field(default_factory=list)
    sparsity: dict[str, Any] = field(default_factory=dict)
    sparse: dict[str, Any] = field(default_factory=dict)
    finetune: dict[str, Any] = field(default_factory=dict)
    dense: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.ratio < 1:
            raise ValueError(f"ratio={self.ratio} is not at least 0 and below 1")
        if self.multi_pass < 1:
            raise ValueError(f"multi_pass={self.multi_pass} must be at least 1")

    def prune(self, network: torch.nn.Module, image: torch.Tensor) -> PruneReport:
        """Prunes `network`, which reads images like `image` (1, C, H, W)."""
        return prune(
            network,
            self.ratio,
            min_channels=self.min_channels,
            max_ratio_per_layer=self.max_ratio_per_layer,
            streams=self.streams,
            exclude=self.exclude,
            example_input=image,
        )


def slimming(argv: Sequence[str]) -> Path:
    """Runs `prune --config C | --ckpt_path X [--ratio R] [--multi_pass N] [options of fit]`; returns the folder.

    With a config, the first pass begins with sparse training; with a checkpoint, it begins with pruning that network.
    The folder holds slimming.csv, slimming.png and the stages.

    Raises:
        UsageError: If an option is wrong, or the network cannot be pruned.
    """
    own, fit_options = _parser().parse_known_args(argv)
    if not (own.config or own.ckpt_path):
        raise UsageError("prune needs --config, or --ckpt_path: a file, or `last` or `best` for that of the newest run")
    root = Path(own.run_root)
    try:
        checkpoint = find_checkpoint(own.ckpt_path, root) if own.ckpt_path else None
        recipe = recipe_of(checkpoint) if checkpoint else {}
        if own.config:
            recipe = merge(recipe, load_config(find_config(own.config, PRUNING)))
    except (FileNotFoundError, ValueError) as error:
        raise UsageError(str(error)) from error
    typed = {f.name: getattr(own, f.name, None) for f in fields(Slimming)}
    options = read_options(recipe.pop("prune", {}), {name: value for name, value in typed.items() if value is not None})
    stem = Path(own.config).stem if own.config else checkpoint.parent.parent.parent.name if checkpoint else ""
    folder = root / (own.name or f"{stem}-prune")
    return _Loop(options, recipe, fit_options, folder).go(checkpoint)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m slimconv_lit prune",
        description="Network Slimming: train with a penalty on the scales of batch norms, prune, fine-tune. Other "
        "options go to fit. A section `prune:` of the config may say the same and more (sparsity, sparse, finetune); "
        "configs/pruning has examples. The same command goes on where it was stopped.",
        allow_abbrev=False,
    )
    parser.add_argument("--config", help="what to train, with or without a section `prune:`")
    parser.add_argument("--ckpt_path", help="a trained network to begin with: a file, `last` or `best`")
    helps = {
        "ratio": "part of all scales to prune in each pass (default: 0.5)",
        "multi_pass": "how often to sparsify, prune and fine-tune (default: 1)",
        "streams": "where blocks are joined: keep, coupled or select (default: keep)",
        "min_channels": "no norm keeps fewer channels (default: 4)",
        "max_ratio_per_layer": "no norm loses a larger part in a pass (default: 0.9)",
        "dense": "true: also train without penalty and pruning, to compare with",
    }
    for name, text in helps.items():
        parser.add_argument(f"--{name}", help=text)
    parser.add_argument("--run_root", default="runs", help="folder of all runs (default: runs)")
    parser.add_argument("--name", help="folder below it (default: that of the config, with -prune)")
    return parser


def read_options(section: object, typed: Mapping[str, str]) -> Slimming:
    """What a section `prune:` says, and over it the command line.

    Raises:
        UsageError: If there is something in the section that `Slimming` does not know, or out of range.
    """
    if not isinstance(section, dict):
        raise UsageError(f"the config's section `prune:` must be a mapping, it is {section!r}")
    names = [f.name for f in fields(Slimming)]
    if unknown := next((key for key in section if key not in names), None):
        raise UsageError(f"the config's section `prune:` has no {unknown!r}; {closest(unknown, names)}")
    parser = RaisingParser(prog="prune")
    parser.add_class_arguments(Slimming)
    try:
        # Values, never words: a word from a file could be any option.
        return Slimming(**parser.parse_object({**section, **typed}).as_dict())
    except (UsageError, ValueError) as error:
        raise UsageError(f"prune: {explain(str(error), names)}") from error


# Its checkpoint, what that network scores and costs, and the same of the network before, if the stage pruned it.
_Made: TypeAlias = tuple[Path, Config, Config | None]


@dataclass(frozen=True)
class _Stage:
    """What a finished stage left: stage.json.

    Attributes:
        made_from: What it was made from; if that is the same, it need not be run again.
        checkpoint: Its network.
        after: What its network scores and costs.
        before: The same of the network that was pruned; None where a stage trained.
    """

    made_from: Mapping[str, Any]
    checkpoint: str
    after: Config
    before: Config | None = None


class _Loop:
    """One call of `prune`."""

    def __init__(self, options: Slimming, recipe: Config, fit_options: Sequence[str], folder: Path) -> None:
        self.options, self.recipe, self.fit_options, self.folder = options, recipe, list(fit_options), folder
        self.rows: dict[str, Config] = {}
        self.networks: dict[str, str] = {}

    def go(self, checkpoint: Path | None) -> Path:
        """All stages that are not done, then the table and the pictures."""
        if checkpoint is None:
            self._rehearse()
        self.folder.mkdir(parents=True, exist_ok=True)
        try:
            lock = Lock(self.folder)
        except BlockingIOError as error:
            raise UsageError(f"{error}; wait for its end, or say another --name") from error
        try:
            self._run_stages(str(checkpoint) if checkpoint else None)
            self._finish()
        finally:
            lock.release()
        return self.folder

    def _run_stages(self, weights: str | None) -> None:
        given = weights is not None
        if self.options.dense:
            dense = self._train("0-dense", {}, None, best=True)
            self._note("dense", dense.after, dense.checkpoint)
        for number in range(1, self.options.multi_pass + 1):
            if weights is None or number > 1:
                weights = self._train(f"{number}-sparse", self._sparse(fresh=weights is None), weights).checkpoint
            pruned = self._stage(f"{number}-prune", {"options": self._how_to_prune()}, weights, self._prune)
            assert pruned.before is not None
            assert weights is not None
            self._note("given" if number == 1 and given else f"{number} sparse", pruned.before, weights)
            self._note(f"{number} pruned", pruned.after, pruned.checkpoint)
            finetuned = self._train(f"{number}-finetune", self.options.finetune, pruned.checkpoint, best=True)
            self._note(f"{number} fine-tuned", finetuned.after, finetuned.checkpoint)
            weights = finetuned.checkpoint

    # ---- stages --------------------------------------------------------------------------------------------------

    def _stage(
        self, name: str, made_from: Config, weights: str | None, make: Callable[[str, Config, str | None], _Made]
    ) -> _Stage:
        """The stage `name`: read, if it was made from the same, else made."""
        # The file may have been written anew since.
        digest = _sha256(Path(weights)) if weights else None
        facts = {"weights": weights, "sha256": digest, "fit": self.fit_options}
        own = json.loads(json.dumps(made_from | facts))
        record = self.folder / name / "stage.json"
        with contextlib.suppress(FileNotFoundError, json.JSONDecodeError, TypeError):
            known = _Stage(**json.loads(record.read_text()))
            if known.made_from == own and Path(known.checkpoint).is_file():
                print(f"{name}: done before")
                return known
        print(f"{name}: in {record.parent}")
        checkpoint, after, before = make(name, made_from, weights)
        done = _Stage(own, str(checkpoint), after, before)
        write_whole(record, json.dumps(vars(done), indent=2) + "\n")
        return done

    def _train(self, name: str, changes: Config, weights: str | None, best: bool = False) -> _Stage:
        config = merge(self._without_penalty(self.recipe), changes)
        kind = "best" if best else "last"
        return self._stage(name, {"config": config, "checkpoint": kind}, weights, self._fit)

    def _fit(self, name: str, made_from: Config, weights: str | None) -> _Made:
        folder = self.folder / name
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "stage.yaml").write_text(yaml.safe_dump(made_from["config"], sort_keys=False))
        words = [f"--config={folder / 'stage.yaml'}", f"--run_root={self.folder}", f"--name={name}", *self.fit_options]
        if weights:
            words.append(f"--model.init_args.weights={weights}")
        cli = run("fit", [*words, "--trainer.enable_model_summary=false"])
        if cli.run_folder is None or not cli.results:
            raise UsageError("prune needs the test after each fit: no fast_dev_run, no --test_after=false")
        checkpoints = cli.run_folder.path / "checkpoints"
        return checkpoints / f"{made_from['checkpoint']}.ckpt", _line(cli.results), None

    def _prune(self, name: str, made_from: Config, weights: str | None) -> _Made:
        cli = open_checkpoint("prune", [f"--ckpt_path={weights}", f"--run_root={self.folder}", f"--name={name}"])
        assert cli.run_folder is not None
        assert weights is not None
        network, size = cli.model.counted(cli.datamodule.input_size)
        if network is not cli.model.model:
            raise UsageError(f"prune takes classifiers and segmentation networks; {weights} is a detector's")

        def tested() -> Config:
            (scores,) = cli.trainer.test(cli.model, cli.datamodule, verbose=False)
            return _line(dict(scores) | {"params": params(network), "macs": macs(network, size)})

        before = tested()
        try:
            report = self.options.prune(network.cpu(), torch.zeros(1, *size))
        except ValueError as error:
            raise UsageError(f"{weights}: {error}") from error
        folder = cli.run_folder.path
        (folder / "pictures").mkdir(exist_ok=True)
        # What trained this network, and not how it was opened, is what its checkpoint goes on with.
        recipe = self._without_penalty(recipe_of(Path(weights)))
        write_whole(folder / "config.yaml", yaml.safe_dump(recipe, sort_keys=False))
        (folder / "pruned.txt").write_text(f"{report}\n")
        draw_widths(report).savefig(folder / "pictures" / "widths.png")
        print(str(report).splitlines()[-1])
        target = folder / "checkpoints" / "pruned.ckpt"
        _save_pruned(Path(weights), cli.model, target)
        return target, tested(), before

    # ---- what the stages are made from ---------------------------------------------------------------------------

    def _rehearse(self) -> None:
        """Prunes the untrained network: what cannot be pruned should be known before it has been trained."""
        config = merge(self.recipe, self._sparse(fresh=True))
        with TemporaryDirectory() as folder:
            file = Path(folder) / "sparse.yaml"
            file.write_text(yaml.safe_dump(config))
            cli = build_fit([f"--config={file}", *self.fit_options])
        network, size = cli.model.counted(cli.datamodule.input_size)
        if network is not cli.model.model:
            raise UsageError("prune takes classifiers and segmentation networks, not detectors")
        try:
            self.options.prune(network, torch.zeros(1, *size))
        except ValueError as error:
            raise UsageError(str(error)) from error

    def _how_to_prune(self) -> Config:
        names = ("ratio", "streams", "min_channels", "max_ratio_per_layer", "exclude")
        return {name: getattr(self.options, name) for name in names}

    def _sparse(self, fresh: bool) -> Config:
        """What sparse training has otherwise; scales that have been learned are not set to 0.5 again."""
        arguments = self.options.sparsity | ({} if fresh else {"initial_scale": None})
        changes = self.options.sparse
        recipe = merge(self._without_penalty(self.recipe), changes)
        penalty = {"class_path": "slimconv_lit.callbacks.Sparsity", "init_args": arguments}
        return merge(changes, {"trainer": {"callbacks": [*recipe["trainer"]["callbacks"], penalty]}})

    @staticmethod
    def _without_penalty(recipe: Config) -> Config:
        trainer = recipe.get("trainer", {})
        callbacks = [*(trainer.get("callbacks") or []), *(trainer.get("callbacks+") or [])]
        kept = [c for c in callbacks if not str(c.get("class_path", "")).endswith("Sparsity")]
        return merge(recipe, {"trainer": {"callbacks": kept}})

    # ---- results -------------------------------------------------------------------------------------------------

    def _note(self, label: str, line: Config, checkpoint: str) -> None:
        self.rows[label] = line
        self.networks[label] = checkpoint

    def _finish(self) -> None:
        ways: dict[str, Callable[[], Any]] = {}
        for label in [next(iter(self.rows)), *(label for label in self.rows if label.endswith("fine-tuned"))]:
            task, size = open_task(Path(self.networks[label]))
            ways[label] = partial(torch.inference_mode()(task.model.eval()), torch.randn(1, *size))
        first = next(iter(self.rows))
        times = interleaved(ways)
        against = ratios(times, first)
        table = []
        for label, row in self.rows.items():
            costs = {f"{key} / first": round(row[key] / self.rows[first][key], 3) for key in ("params", "macs")}
            line = {"stage": label, **row, **costs, "latency ms": "", "latency / first": ""}
            if label in times:
                line["latency ms"] = str(spread([1000 * seconds for seconds in times[label]]))
                line["latency / first"] = str(against[label])
            table.append(line)
        (self.folder / "slimming.csv").write_text(format_table(table, "csv") + "\n")
        draw_stages(table).savefig(self.folder / "slimming.png")
        about = ", ".join(f"{key} {value}" for key, value in machine().items())
        print(f"\n{format_table(table)}\n")
        print("accuracy: of the checkpoint that goes on; of sparse training the last, where its own table has the best")
        print(f"latency: one image, forward, median (quartiles), on {about}; its ratio is of pairs run in turn")
        print(f"in {self.folder}: slimming.csv, slimming.png")


def _sha256(file: Path) -> str:
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def _line(results: Mapping[str, Any]) -> Config:
    """Of the test's scores the first, which is what checkpoints are chosen by, in percent, the costs, and limits."""
    score = next(key for key in results if key.startswith("test/") and key != "test/loss")
    kept = {key: results[key] for key in ("params", "macs", "limited") if key in results}
    return {f"{score} %": round(100 * results[score], 2), **kept}


def _save_pruned(trained: Path, task: Any, target: Path) -> None:
    """The checkpoint `trained` with the weights of its network as it is now, and without what a fit would resume."""
    held = torch.load(trained, map_location="cpu", weights_only=True)
    unfit = {"optimizer_states", "lr_schedulers", "callbacks", "loops", "MixedPrecision"}
    kept = {key: value for key, value in held.items() if key not in unfit and not key.startswith("averaging")}
    kept |= {"state_dict": task.state_dict(), "pruned": plans_of(task.model)}
    DurableIO().save_checkpoint(kept, target)


def draw_widths(report: PruneReport) -> Figure:
    """Channels of each layer before and after pruning."""
    rows = [row for row in report.rows if row.was > 1]
    figure = Figure(figsize=(8, min(40, 1.2 + 0.17 * len(rows))), layout="constrained", dpi=110)
    axes = figure.subplots()
    places = range(len(rows))
    axes.barh(places, [row.was for row in rows], color="#c9d6e6", label="before")
    axes.barh(places, [row.now for row in rows], color="#24548f", label="kept")
    axes.set_yticks(places, [row.layer for row in rows], fontsize=7)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.set_xlabel("channels")
    axes.set_title(f"{report.pruned:,} of {report.scales:,} scales pruned", fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower right", ncols=2, frameon=False)
    return figure


def draw_stages(table: Sequence[Mapping[str, Any]]) -> Figure:
    """Score of each stage, and what its network costs as a part of the first one's."""
    score = next(key for key in table[0] if key.startswith("test/"))
    labels = [row["stage"] for row in table]
    figure = Figure(figsize=(max(6.0, 1.4 * len(labels)), 5.4), layout="constrained", dpi=110)
    top, bottom = figure.subplots(2, 1, sharex=True)
    top.plot(labels, [row[score] for row in table], color="#24548f", marker="o")
    for label, row in zip(labels, table, strict=True):
        # On the line's own colour of paper, for a line that rises on both sides runs through what stands above it.
        paper = {"facecolor": "white", "edgecolor": "none", "pad": 1}
        place = {"textcoords": "offset points", "ha": "center", "bbox": paper}
        top.annotate(f"{row[score]:.2f}", (label, row[score]), (0, 9), **place)
    top.margins(y=0.2)
    top.set_ylabel(score)
    top.set_title("Network Slimming, stage by stage")
    for number, (key, colour) in enumerate((("params", "#24548f"), ("macs", "#d9822b"))):
        shares = [100 * row[f"{key} / first"] for row in table]
        bottom.bar([i + 0.38 * (number - 0.5) for i in range(len(labels))], shares, 0.36, color=colour, label=key)
    bottom.set_xticks(range(len(labels)), labels)
    bottom.set_ylabel("of the first network (%)")
    for axes in (top, bottom):
        axes.grid(axis="y", alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower right", ncols=2, frameon=False)
    return figure
