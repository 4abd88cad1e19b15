"""Says in one screen what is wrong with a command line: the key, and the accepted name closest to it."""

import inspect
import re
from collections.abc import Collection, Sequence
from typing import Any

from pytorch_lightning import Callback
from pytorch_lightning.cli import LightningArgumentParser
from pytorch_lightning.loggers import Logger

from slimconv_lit.data import BaseDataModule
from slimconv_lit.lookup import SYNONYMS, closest
from slimconv_lit.ops.base import Operator
from slimconv_lit.tasks import BaseTask
from slimconv_lit.usage import RaisingParser


class Parser(RaisingParser, LightningArgumentParser):
    """Lightning's parser, which raises its mistakes and takes no key that is cut short."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        # A key that is cut short would work until a new option makes it ambiguous, and never in a file.
        super().__init__(*args, allow_abbrev=False, **kwargs)


_ROOTS: dict[str, type] = {
    "model": BaseTask,
    "data": BaseDataModule,
    "operator": Operator,
    "callbacks": Callback,
    "logger": Logger,
}
# What jsonargparse 4 says. For nested values it repeats itself level by level, the innermost last.
_KEY = re.compile(r'Parser key "([\w.]+)"')
_BAD_KEY = re.compile(r"(?:Option|accept option|unrecognized arguments:) '?-*([\w.-]+)")
_CLASS = re.compile(r"class_path[ =]'([\w.]+)'")
_BAD_CLASS = re.compile(
    r"import path string: '?([\w.]+)|module '[\w.]+' has no attribute '(\w+)'|'([\w.]+)' to be a subclass of"
)
_DENIED = re.compile(r"Importing '([\w.]+)' is not allowed")
_CHOICES = re.compile(r"Expected a typing\.Literal\[(.+?)\]\. Got value: ([^\s.]+)")
_BAD_TYPE = re.compile(r"Expected a <class '(\w+)'>")
_VALUE = re.compile(r"(?:Got|Given) value: (.+)")


def _family(root: type) -> list[type]:
    members = [root]
    for cls in members:
        children: list[type] = cls.__subclasses__()
        members.extend(child for child in children if child not in members)
    return members[1:]


def _arguments(cls: type) -> set[str]:
    # `**kwargs` go on to a base class, so the arguments of all bases count.
    constructors = [vars(base)["__init__"] for base in cls.__mro__[:-1] if "__init__" in vars(base)]
    parameters = [p for method in constructors for p in inspect.signature(method).parameters.values()]
    return {p.name for p in parameters if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)} - {"self"}


def _explain_key(key: str, part: str, named: Collection[str], options: Collection[str], argv: Sequence[str]) -> str:
    """Why `key` is not accepted in the `part` of the config ("model.operator") in which the classes `named` stand."""
    # The parser may name only the last part of the key; what was typed says more.
    typed = next((w.partition("=")[0] for w in argv if re.search(rf"^-.*\b{re.escape(key)}(=|$)", w)), key)
    full = typed.lstrip("-")
    head, _, tail = full.partition(".")
    name = full.rpartition(".")[2]
    meant = SYNONYMS.get(re.sub("[-_]", "", name.lower()))
    if meant and (places := _places(meant, options)):
        return f"{typed!r} is not accepted; did you mean {' or '.join(map(repr, places))}?"
    tops = {option.partition(".")[0] for option in options}
    if head not in tops and (typed != key or tail):
        return f"{typed!r} is not accepted; {closest(head, tops)}"
    root = _ROOTS.get((part or head).rpartition(".")[2])
    family = _family(root) if root else []
    if owners := [cls.__name__ for cls in family if name in _arguments(cls)]:
        return f"{typed!r} is not accepted here; it belongs to {' and '.join(owners)}, which must be named first"
    if elsewhere := _places(name, options):
        return f"{typed!r} is not accepted; did you mean {' or '.join(map(repr, elsewhere))}?"
    if not family:
        inside = [option for option in options if option.startswith(f"{head}.")]
        return f"{typed!r} is not accepted; {closest(full, inside) if inside else '`--help` lists what is'}"
    chosen = [cls for cls in family if cls.__name__ in named] or family
    hint = _near(name, {argument for cls in chosen for argument in _arguments(cls)})
    return f"{typed!r} is not accepted; {hint or '`--help` lists what is'}"


def _places(name: str, options: Collection[str]) -> list[str]:
    """The options that end with `name`."""
    parts = [p for p in ("model", "data") if any(name in _arguments(cls) for cls in _family(_ROOTS[p]))]
    return [f"--{p}.{name}" for p in parts] + [f"--{o}" for o in options if o in (name, f"trainer.{name}")]


def _near(name: str, known: Collection[str]) -> str:
    hint = closest(name, known)
    return hint if hint.startswith("did") else ""


def explain(message: str, options: Collection[str] = (), argv: Sequence[str] = ()) -> str:
    """What jsonargparse says in `message`, made short.

    Args:
        message: The parser's message, or that of an error it raised when it built an object.
        options: The options of the verb, without dashes ("trainer.max_epochs").
        argv: What the user typed.
    """
    key = ".".join(_KEY.findall(message))
    where = f"{key}: " if key else ""
    if match := _DENIED.search(message):
        package = match[1].partition(".")[0]
        return (
            f"{where}{match[1]} is of no package that a configuration may name classes of; if you trust its code, say "
            f"--allow-import {package}"
        )
    if match := _BAD_KEY.search(message):
        named = [path.rpartition(".")[2] for path in _CLASS.findall(message)]
        return _explain_key(match[1], key, named, options, argv)
    if match := _CHOICES.search(message):
        choices = re.findall(r"'([^']+)'", match[1])
        return f"{where}there is no {match[2]!r}; {closest(match[2], choices)}"
    if found := _BAD_CLASS.findall(message):
        name = next(filter(None, found[-1]))
        root = _ROOTS.get(key.rpartition(".")[2])
        known = {cls.__name__ for base in ([root] if root else _ROOTS.values()) for cls in _family(base)}
        return f"{where}there is no class {name!r} that fits; {closest(name.rpartition('.')[2], known)}"
    values = _VALUE.findall(message)
    if (types := [name for name in _BAD_TYPE.findall(message) if name != "NoneType"]) and values:
        return f"{where}expected {' or '.join(dict.fromkeys(types))}, not {values[0]!r}"
    # An error of a constructor, as one of several alternatives that failed.
    *_, listed = message.partition("Given value")[0].split("Errors:")
    lines = [line.strip(" -")[:300] for line in listed.splitlines()]
    told = "\n".join([line for line in lines if line and not re.search("NoneType|given class_path", line)][:8])
    return told + (
        "\na config that states it: --config quickstart.yaml" if re.search(r"are required: \w+\.", told) else ""
    )
