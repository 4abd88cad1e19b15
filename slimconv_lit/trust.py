"""What a configuration, a checkpoint or a sweep file may name: each may come from a stranger, and must not run code.

Importing this module sets three switches of libraries, for the whole process:

- jsonargparse imports the classes that a configuration names from the packages in `ALLOWED` alone, and looks also at
  where a thing was defined: "torch.nn.functional.importlib.import_module" does not get through. It builds classes only
  where an argument asks for one of their kind.
- jsonargparse reads a YAML file that another one names only once `check_yaml` has nothing against it.
- `torch.load` unpickles nothing but tensors and plain values, in torchvision and timm too.

It cannot be left to the readers of files, for jsonargparse reads texts inside texts and files that files name.
"""

import os
from collections.abc import Iterator, Sequence
from typing import Any

import yaml  # type: ignore[import-untyped]
from jsonargparse import get_loader, set_loader, set_parsing_settings

import slimconv_lit
from slimconv_lit.plain import MOST_BYTES, MOST_NESTED, check_yaml

ALLOWED = (
    # Not the command line and its verbs: a function, too, may be named where something is to be called.
    *(f"slimconv_lit.{name}" for name in ("ops", "tasks", "data", "callbacks", "distributed", *slimconv_lit.__all__)),
    "slimconv_lit.tool_verbs.Images",
    # Of Lightning's, what a trainer is put together from; parts of these are defined in lightning_fabric.
    *(f"pytorch_lightning.{part}" for part in ("accelerators", "callbacks", "loggers", "plugins", "profilers")),
    *("pytorch_lightning.strategies", "pytorch_lightning.Callback"),
    *(f"lightning_fabric.{part}" for part in ("accelerators", "plugins", "strategies")),
    # All of torch would be too much: torch.hub and torch.utils.cpp_extension are there to run code.
    *("torch.nn", "torch.optim", "torch.distributed.fsdp"),
    "torchmetrics",
    "pl_bolts.callbacks",
)
"""Packages, with all that is in them, that a configuration may name classes of."""

OPTION = "--allow-import"

let_in: list[str] = []
"""What the command line has allowed besides; a process that is started for a part of the work is told."""

set_parsing_settings(
    import_path_denylist=["*"], import_path_allowlist=list(ALLOWED), instantiate_subclass_spec_in_any=False
)
_read_yaml = get_loader("yaml")


def _read_checked(text: str) -> Any:
    # What is shorter can be neither too deep nor a bomb; most options are.
    if len(text) > MOST_NESTED:
        try:
            if len(text) > MOST_BYTES:
                raise ValueError(f"it has more than {MOST_BYTES:,} characters")
            check_yaml(text)
        except ValueError as error:
            raise yaml.YAMLError(str(error)) from error
    return _read_yaml(text)


set_loader("yaml", _read_checked, (yaml.YAMLError,))
# Who has set the opposite has decided for himself, and torch takes only one of both.
if "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD" not in os.environ:
    os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = "1"


def allow_imports(words: Sequence[str]) -> list[str]:
    """Follows each `--allow-import NAME` of a command line, until the process ends, and returns the other words.

    `cli.main` alone calls it, with what was typed, and no parser knows the option: whatever a verb puts together from
    files and hands to a parser, a file that says it lets nothing in.

    Raises:
        ValueError: If a name is missing, or cannot be one of a package.
    """
    names: list[str] = []
    others = list(_without_names(words, names))
    allow(names)
    return others


def allow(names: Sequence[str]) -> None:
    """Lets packages in, until the process ends.

    Raises:
        ValueError: If one cannot be the name of a package.
    """
    if not names:
        return
    try:
        set_parsing_settings(import_path_allowlist=list(names))
    except ValueError as error:
        raise ValueError(f"nothing of {', '.join(names)} can be allowed: {error}") from error
    let_in.extend(names)


def asks_for_imports(word: str) -> bool:
    """Whether a word of a command line is `--allow-import`, with or without a name."""
    return word.partition("=")[0].replace("_", "-") == OPTION


def _without_names(words: Sequence[str], names: list[str]) -> Iterator[str]:
    remaining = iter(words)
    for word in remaining:
        if not asks_for_imports(word):
            yield word
            continue
        _, equals, name = word.partition("=")
        name = name if equals else next(remaining, "")
        if not name or name.startswith("-"):
            raise ValueError(f"a name is missing: {OPTION} my_package")
        names.append(name)
