"""Finds what a word on the command line names, and the nearest names otherwise; light, to answer before torch loads."""

import difflib
import os
from collections.abc import Iterable, Sequence
from itertools import pairwise
from pathlib import Path

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
"""The checkout's own configurations."""

PRUNING = CONFIGS / "pruning"
"""Those of `prune`."""


def closest(name: str, names: Iterable[str]) -> str:
    """The end of an error message: the known names nearest to `name`, or when none is near all, up to twenty."""
    known = sorted(names)
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    if near:
        return f"did you mean {' or '.join(repr(n) for n in near)}?"
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
