"""Finds what a word on the command line names, and the nearest names otherwise; light, to answer before torch loads."""

import ast
import difflib
import os
import re
from collections.abc import Iterable, Sequence
from functools import cache
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
"""The checkout's own configurations."""

PRUNING = CONFIGS / "pruning"
"""Those of `prune`."""

# What others call it, where the spelling does not lead to our name; without "_".
SYNONYMS = {
    "learningrate": "lr",
    "stepsize": "lr",
    "l2": "weight_decay",
    "wd": "weight_decay",
    "lrscheduler": "schedule",
    "scheduler": "schedule",
    "warmup": "warmup_epochs",
    "epochs": "max_epochs",
    "nepochs": "max_epochs",
    "numepochs": "max_epochs",
    "steps": "max_steps",
    "iterations": "max_steps",
    "gpu": "devices",
    "gpus": "devices",
    "ngpus": "devices",
    "numgpus": "devices",
    "device": "accelerator",
    "amp": "precision",
    "fp16": "precision",
    "bf16": "precision",
    "clip": "gradient_clip_val",
    "clipgrad": "gradient_clip_val",
    "accumulate": "accumulate_grad_batches",
    "gradaccum": "accumulate_grad_batches",
    "bs": "batch_size",
    "jobs": "num_workers",
    "workers": "num_workers",
    "datadir": "root",
    "datapath": "root",
    "dataset": "data",
    "resolution": "image_size",
    "imgsize": "image_size",
    "arch": "backbone",
    "architecture": "backbone",
    "encoder": "backbone",
    "net": "backbone",
    "network": "backbone",
    "conv": "operator",
    "checkpoint": "ckpt_path",
    "resume": "ckpt_path",
    "outdir": "run_root",
    "output": "run_root",
    "outputdir": "run_root",
    "savedir": "run_root",
    "experiment": "name",
    "randomseed": "seed_everything",
}

# Where the classes are that options belong to, and how their names end.
_OWNERS = {
    "model": (Path(__file__).parent / "tasks", "Task"),
    "data": (Path(__file__).parent / "data", "DataModule"),
    "trainer": (Path(find_spec("pytorch_lightning").origin or "").parent / "trainer", "Trainer"),  # type: ignore[union-attr]
}


def closest(name: str, names: Iterable[str]) -> str:
    """The end of an error message: the known names nearest to `name`, or when none is near all, up to twenty."""
    known = sorted(names)
    lower = {name.lower(): name for name in known}
    # A slip or a missing end are nearer than that, another word is not.
    near = [lower[found] for found in difflib.get_close_matches(name.lower(), lower, n=3, cutoff=0.6)]
    if near:
        return f"did you mean {' or '.join(map(repr, near))}?"
    more = f" and {len(known) - 20} more" if len(known) > 20 else ""
    return f"known: {', '.join(known[:20])}{more}"


def find_config(name: str, *folders: Path) -> Path:
    """The file called `name`: as a path from the current folder, else in `folders`, else among the checkout's configs.

    Raises:
        FileNotFoundError: If none exists; the message gives the nearest names.
    """
    inside = [path for folder in (*folders, CONFIGS) for path in (folder / name, folder / f"{name}.yaml")]
    for path in (Path(name), *inside):
        # It says no where pathlib raises an error: to a name that is too long, say.
        if os.path.isfile(path):
            return path
    known = {path.name for folder in (Path(), *folders, CONFIGS) for path in folder.glob("*.yaml")}
    raise FileNotFoundError(f"--config: there is no {name!r}; {closest(name, known)}")


def find_checkpoint(which: str, root: Path, name: str = "*") -> Path:
    """The checkpoint file `which`, or the "last" or "best" one of the newest run that has it.

    Args:
        which: A path, "last" or "best".
        root: The folder of all runs.
        name: The name of the runs to look at; "*" for all.

    Raises:
        FileNotFoundError: If there is none.
    """
    if which not in ("last", "best"):
        if not os.path.isfile(which):
            raise FileNotFoundError(f"--ckpt_path: there is no file {which!r}; a file, `last` or `best` would do")
        return Path(which)
    # Names of run folders are dates, so the newest sorts last.
    runs = sorted(root.glob(f"{name}/*/checkpoints/{which}.ckpt"), key=lambda path: path.parent.parent.name)
    if not runs:
        raise FileNotFoundError(f"--ckpt_path {which}: there is no {root / name}/*/checkpoints/{which}.ckpt")
    return runs[-1]


def check_files(verb: str, argv: Sequence[str]) -> None:
    """Looks whether the files are there that `--config` and `--ckpt_path` of a verb name.

    Raises:
        FileNotFoundError: If one is not.
    """
    for option, value in pairwise([*argv, ""]):
        name, equals, own = option.partition("=")
        value = own if equals else value
        if name in ("-c", "--config"):
            find_config(value, *([PRUNING] if verb == "prune" else []))
        elif name == "--ckpt_path" and value not in ("last", "best"):
            find_checkpoint(value, Path())


def check_keys(argv: Sequence[str]) -> None:
    """Looks for slips in the options of the task, the data and the trainer, in the source of all such classes.

    What has no near name, or belongs to another class, is left to the parser, which knows the classes that are named.

    Raises:
        ValueError: If there is one; the message gives the nearest names.
    """
    for word in argv:
        found = re.match(r"--(model|data|trainer)\.(init_args\.)?(\w+)(?=[.=]|$)", word)
        if not found or re.sub("_", "", found[3].lower()) in SYNONYMS:
            continue
        known = _arguments(*_OWNERS[found[1]]) | {"class_path", "dict_kwargs", "help", "init_args"}
        if found[3] in known or any(found[3] in _arguments(*owner) for owner in _OWNERS.values()):
            continue
        if (hint := closest(found[3], known)).startswith("did"):
            hint = re.sub(r"'(\w+)'", rf"'--{found[1]}.\1'", hint)
            raise ValueError(f"{found[0]!r} is not accepted; {hint}")


@cache
def _arguments(folder: Path, ending: str) -> set[str]:
    nodes = [node for file in folder.glob("*.py") for node in ast.walk(ast.parse(file.read_bytes()))]
    classes = [node for node in nodes if isinstance(node, ast.ClassDef) and node.name.endswith(ending)]
    makers = [d for c in classes for d in c.body if isinstance(d, ast.FunctionDef) and d.name == "__init__"]
    return {argument.arg for maker in makers for argument in (*maker.args.args, *maker.args.kwonlyargs)} - {"self"}
