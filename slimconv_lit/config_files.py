"""Finds configuration files, puts their parts together, and reads the configuration that a checkpoint carries.

A file may start from others: `base: other.yaml` (or a list of them) at its top, or inside `data:`, `model:` or
`trainer:`, is read first, and the file then states only what differs. `data: other.yaml` is short for the whole part.
Paths count from the file that names them.
"""

import argparse
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from jsonargparse import get_loader

from slimconv_lit.checkpoint_files import read_checkpoint
from slimconv_lit.ops.base import closest

Config: TypeAlias = dict[str, Any]

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
"""The checkout's own configurations."""

PARTS = ("data", "model", "trainer")


def find_config(name: str) -> Path:
    """The file called `name`: as a path from the current folder, else among the checkout's configs.

    Raises:
        FileNotFoundError: If neither exists; the message gives the nearest names.
    """
    for path in (Path(name), CONFIGS / name, CONFIGS / f"{name}.yaml"):
        if path.is_file():
            return path
    known = {path.name for folder in (Path(), CONFIGS) for path in folder.glob("*.yaml")}
    raise FileNotFoundError(f"--config: there is no {name!r}; {closest(name, known)}")


def load_config(path: Path) -> Config:
    """The configuration in `path` with all that it starts from.

    Raises:
        ValueError: If a file is not a mapping; the message names the file.
        FileNotFoundError: If a file that it starts from does not exist.
    """
    # jsonargparse's reader: to YAML 1.1, 1e-4 is a text.
    values = get_loader("yaml")(path.read_text())
    if not isinstance(values, dict):
        raise ValueError(f"{path}: expected `key: value` lines, found {type(values).__name__}")
    for part in PARTS:
        if isinstance(values.get(part), str) and values[part].endswith((".yaml", ".yml")):
            values[part] = _load_named(values[part], path)
        elif isinstance(values.get(part), dict):
            values[part] = _with_bases(values[part], path)
    return _with_bases(values, path)


def _with_bases(values: Config, path: Path) -> Config:
    bases = values.pop("base", [])
    whole: Config = {}
    for name in [bases] if isinstance(bases, str) else bases:
        whole = merge(whole, _load_named(name, path))
    return merge(whole, values)


def _load_named(name: str, by: Path) -> Config:
    path = by.parent / name
    if not path.is_file():
        raise FileNotFoundError(f"{by}: it names {name!r}, which is not there")
    return load_config(path)


def merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> Config:
    """`base` with `over` laid on top, key by key; a class inherits no arguments from another that it replaces."""
    merged = dict(base)
    for key, value in over.items():
        old = merged.get(key)
        if isinstance(old, Mapping) and isinstance(value, Mapping) and _same_class(old, value):
            merged[key] = merge(old, value)
        else:
            merged[key] = value
    return merged


def _same_class(old: Mapping[str, Any], new: Mapping[str, Any]) -> bool:
    names = {str(node["class_path"]).rpartition(".")[2] for node in (old, new) if node.get("class_path")}
    return len(names) < 2


def checkpoint_config(path: Path) -> Config:
    """The `model` and `data` parts that a checkpoint was trained with, as far as it carries them."""
    checkpoint = read_checkpoint(path)
    config: Config = {}
    for part, key in (("model", "hyper_parameters"), ("data", "datamodule_hyper_parameters")):
        init_args = dict(checkpoint.get(key) or {})
        init_args.pop("_instantiator", None)
        noted = checkpoint.get("class_paths", {}).get(part)
        if class_path := init_args.pop("_class_path", noted):
            config[part] = {"class_path": class_path, "init_args": init_args}
    return config


def recipe_of(checkpoint: Path) -> Config:
    """The configuration of the fit that a checkpoint is from: its own parts, and the rest from its run folder."""
    carried = checkpoint_config(checkpoint)
    recipe = checkpoint.parent.parent / "config.yaml"
    return merge(load_config(recipe), carried) if recipe.is_file() else carried


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
        if not Path(which).is_file():
            raise FileNotFoundError(f"--ckpt_path: there is no file {which!r}; a file, `last` or `best` would do")
        return Path(which)
    # Names of run folders are dates, so the newest sorts last.
    runs = sorted(root.glob(f"{name}/*/checkpoints/{which}.ckpt"), key=lambda path: path.parent.parent.name)
    if not runs:
        raise FileNotFoundError(f"--ckpt_path {which}: there is no {root / name}/*/checkpoints/{which}.ckpt")
    return runs[-1]


def compose(verb: str, argv: Sequence[str]) -> list[str]:
    """The verb's command line with all files that it names read into one `--config`.

    `predict --data FOLDER` is short for `--data.predict_dir=FOLDER`.

    From weak to strong: what the checkpoint carries, the config files in their order, the command line.

    Raises:
        FileNotFoundError: If a file is missing.
        ValueError: If a config is not a mapping, or a verb other than fit has no checkpoint.
    """
    if any(re.fullmatch(r"-h|--([\w.]+\.)?help(=.*)?", word) for word in argv):
        return list(argv)
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("-c", "--config", action="append", default=[])
    for option in ("--ckpt_path", "--name", "--run_root", "--data"):
        parser.add_argument(option)
    known, rest = parser.parse_known_args(argv)
    if known.data is not None:
        images = verb == "predict" and _is_folder(known.data)
        rest.insert(0, f"--data{'.predict_dir' if images else ''}={known.data}")

    paths = [find_config(name) for name in known.config]
    config: Config = {}
    for path in paths:
        config = merge(config, load_config(path))
    root = Path(known.run_root or config.get("run_root") or "runs")
    name = known.name or config.get("name") or (paths[-1].stem if paths else None)
    which = known.ckpt_path or config.pop("ckpt_path", None)
    if which:
        checkpoint = find_checkpoint(which, root, name or "*")
        run = checkpoint.parent.parent
        # The trainer's settings are not in the checkpoint; going on means going on with those too.
        goes_on = verb == "fit" and not paths
        config = merge(recipe_of(checkpoint) if goes_on else checkpoint_config(checkpoint), config)
        name = name or (run.parent.name if checkpoint.parent.name == "checkpoints" else None)
        rest.append(f"--ckpt_path={checkpoint}")
    elif verb != "fit" and not _starts_from_weights(config, rest):
        raise ValueError(f"{verb} needs --ckpt_path: a file, or `last` or `best` for that of the newest run")
    return ["--config", json.dumps(config), *rest, f"--name={name or verb}", f"--run_root={root}"]


def _is_folder(value: str) -> bool:
    # Not there, but written as a path: the datamodule's message about it is clearer than one about a class.
    is_path = "/" in value and not value.startswith("{") and not value.endswith((".yaml", ".yml"))
    return Path(value).is_dir() or is_path


def _starts_from_weights(config: Config, words: Sequence[str]) -> bool:
    init_args = config.get("model", {}).get("init_args", {})
    named = [init_args.get("weights"), *(init_args.get("backbone_options") or {})]
    typed = [word for word in words if re.match(r"--model\.(init_args\.)?(weights|backbone_options)\b(?!_)", word)]
    return bool({"weights", "pretrained"} & set(named[1:]) or named[0] or typed)
