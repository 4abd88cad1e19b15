"""Finds configuration files, puts their parts together, and reads the configuration that a checkpoint carries.

A file may start from others: `base: other.yaml` (or a list of them) at its top, or inside `data:`, `model:` or
`trainer:`, is read first, and the file then states only what differs. `data: other.yaml` is short for the whole part.
`callbacks+:` adds to a list of theirs.
Paths count from the file that names them.
"""

import argparse
import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import yaml  # type: ignore[import-untyped]
from jsonargparse import get_loader

from slimconv_lit.checkpoint_files import read_checkpoint
from slimconv_lit.lookup import find_checkpoint, find_config
from slimconv_lit.plain import MOST_BYTES, check_plain, check_yaml

Config: TypeAlias = dict[str, Any]

PARTS = ("data", "model", "trainer")
# Of a checkpoint, what a fit goes on from; that of a network which was pruned behind its training has none.
_RESUMED = {"loops", "optimizer_states", "lr_schedulers"}


_MOST_BASES = 8


def read_yaml(path: Path, load: Callable[[str], Any]) -> dict[str, Any]:
    """The mapping in a YAML file, as `load` reads it from its text.

    Raises:
        ValueError: If there is none in it, or more than a configuration can need; the message names the file.
    """
    try:
        if path.stat().st_size > MOST_BYTES:
            raise ValueError(f"it has more than {MOST_BYTES:,} bytes")
        text = path.read_text(encoding="utf-8")
        check_yaml(text)
        values = load(text)
        check_plain(values)
    except (yaml.YAMLError, ValueError, TypeError, OverflowError, RecursionError) as error:
        raise ValueError(f"{path}: not YAML that can be used: {' '.join(str(error).split())[:200]}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path}: expected `key: value` lines, found {type(values).__name__}")
    return values


def load_config(path: Path, by: Sequence[Path] = ()) -> Config:
    """The configuration in `path` with all that it starts from.

    Args:
        path: The file.
        by: The files that led to it.

    Raises:
        ValueError: If a file is not a mapping, or starts from itself; the message names the file.
        FileNotFoundError: If a file that it starts from does not exist.
    """
    if len(by) > _MOST_BASES:
        raise ValueError(f"{path}: more than {_MOST_BASES} files start from one another; does one start from itself?")
    # jsonargparse's reader: to YAML 1.1, 1e-4 is a text.
    values = read_yaml(path, get_loader("yaml"))
    by = [*by, path]
    for part in PARTS:
        if isinstance(values.get(part), str) and values[part].endswith((".yaml", ".yml")):
            values[part] = _load_named(values[part], by)
        elif isinstance(values.get(part), dict):
            values[part] = _with_bases(values[part], by)
    return _with_bases(values, by)


def _with_bases(values: Config, by: Sequence[Path]) -> Config:
    bases = values.pop("base", [])
    whole: Config = {}
    for name in bases if isinstance(bases, list) else [bases]:
        whole = merge(whole, _load_named(name, by))
    return merge(whole, values)


def _load_named(name: object, by: Sequence[Path]) -> Config:
    if not isinstance(name, str):
        raise ValueError(f"{by[-1]}: `base` is the name of a file, or a list of them; not {str(name)[:80]}")
    path = by[-1].parent / name
    if not os.path.isfile(path):
        try:
            path = find_config(name, by[-1].parent)
        except FileNotFoundError as error:
            reason = str(error).partition("; ")[2]
            raise FileNotFoundError(f"{by[-1]}: it names {name!r}, which is not there; {reason}") from None
    return load_config(path, by)


def merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> Config:
    """`base` with `over` laid on top, key by key; a class inherits no arguments from another that it replaces.

    `callbacks+` adds its list to that of `callbacks`; where there is none yet, it waits for one further below, and the
    parser takes what is left.
    """
    merged = dict(base)
    for key, value in over.items():
        old = merged.get(key)
        longer = next(
            (k for k in (key.removesuffix("+"), key) if key[-1:] == "+" and isinstance(merged.get(k), list)), ""
        )
        if longer and isinstance(value, list):
            merged[longer] = [*merged[longer], *value]
            continue
        merged.pop(f"{key}+", None)
        if isinstance(old, Mapping) and isinstance(value, Mapping) and _same_class(old, value):
            merged[key] = merge(old, value)
        else:
            merged[key] = value
    return merged


def _same_class(old: Mapping[str, Any], new: Mapping[str, Any]) -> bool:
    names = {str(node["class_path"]).rpartition(".")[2] for node in (old, new) if node.get("class_path")}
    return len(names) < 2


def checkpoint_config(path: Path) -> Config:
    """The `model` and `data` parts that a checkpoint was trained with, as far as it carries them.

    Raises:
        ValueError: As `read_checkpoint`.
    """
    checkpoint = read_checkpoint(path)
    config: Config = {}
    for part, key in (("model", "hyper_parameters"), ("data", "datamodule_hyper_parameters")):
        init_args = dict(checkpoint.get(key) or {})
        # Lightning's newer releases alone look at it before they call what it names.
        init_args.pop("_instantiator", None)
        noted = (checkpoint.get("class_paths") or {}).get(part)
        if class_path := init_args.pop("_class_path", noted):
            config[part] = {"class_path": class_path, "init_args": init_args}
    return config


def recipe_of(checkpoint: Path) -> Config:
    """The configuration of the fit that a checkpoint is from: its own parts, and the rest from its run folder."""
    carried = checkpoint_config(checkpoint)
    recipe = checkpoint.parent.parent / "config.yaml"
    return merge(load_config(recipe), carried) if recipe.is_file() else carried


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
    for key in ("name", "run_root", "ckpt_path"):
        if not isinstance(config.get(key), str | None):
            raise ValueError(f"{paths[-1]}: {key} must be a text, not {str(config[key])[:80]}")
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
        if verb == "fit" and not read_checkpoint(checkpoint).keys() >= _RESUMED:
            print(f"{checkpoint} holds a network and nothing to go on from; a new fit starts from its weights")
            rest.insert(0, f"--model.init_args.weights={checkpoint}")
        else:
            rest.append(f"--ckpt_path={checkpoint}")
    elif verb != "fit" and not _starts_from_weights(config, rest):
        raise ValueError(f"{verb} needs --ckpt_path: a file, or `last` or `best` for that of the newest run")
    return ["--config", json.dumps(config), *rest, f"--name={name or verb}", f"--run_root={root}"]


def _is_folder(value: str) -> bool:
    # Not there, but written as a path: the datamodule's message about it is clearer than one about a class.
    is_path = "/" in value and not value.startswith("{") and not value.endswith((".yaml", ".yml"))
    return os.path.isdir(value) or is_path


def _starts_from_weights(config: Config, words: Sequence[str]) -> bool:
    model = config.get("model")
    init_args = model.get("init_args") if isinstance(model, Mapping) else None
    init_args = init_args if isinstance(init_args, Mapping) else {}
    options = init_args.get("backbone_options")
    named = [init_args.get("weights"), *(options if isinstance(options, Mapping) else ())]
    typed = [word for word in words if re.match(r"--model\.(init_args\.)?(weights|backbone_options)\b(?!_)", word)]
    return bool({"weights", "pretrained"} & set(named[1:]) or named[0] or typed)
