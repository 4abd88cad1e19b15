"""Says in one screen what is wrong with a command line: the key, and the accepted name closest to it."""

import inspect
import re
from collections import defaultdict
from collections.abc import Collection, Sequence

from pytorch_lightning import Callback, Trainer
from pytorch_lightning.loggers import Logger

from slimconv_lit.data import BaseDataModule
from slimconv_lit.ops.base import Operator, closest
from slimconv_lit.tasks import BaseTask


class UsageError(Exception):
    """A mistake on the command line or in a configuration; the message is all that the user should see."""


_BAD_KEY = re.compile(r"(?:Option|accept option|unrecognized arguments:) '?-*([\w.]+)")
_BAD_CLASS = re.compile(
    r"import path string: '?(?P<short>[\w.]+)"
    r"|class_path '(?P<dotted>[\w.]+)'"
    r"|module '[\w.]+' has no attribute '(?P<attribute>\w+)'"
    r"|'(?P<other>[\w.]+)' to be a subclass of"
)
_CHOICES = re.compile(r"Expected a typing\.Literal\[(.+?)\]\. Got value: (\S+)")
# What jsonargparse lists for a value that fits none of several types: the types it tried, not what is wrong.
_ASIDES = ("Expected a path but", "Does not validate", "Subtypes:", "Errors:", "Given value type:")


def _family(root: type) -> list[type]:
    members = [root]
    for cls in members:
        children: list[type] = cls.__subclasses__()
        members.extend(child for child in children if child not in members)
    return members


def _arguments(cls: type) -> set[str]:
    # `**kwargs` go on to a base class, so the arguments of all bases count.
    constructors = [vars(base)["__init__"] for base in cls.__mro__[:-1] if "__init__" in vars(base)]
    parameters = [p for method in constructors for p in inspect.signature(method).parameters.values()]
    return {p.name for p in parameters if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)} - {"self"}


def _owners() -> dict[str, list[str]]:
    """Every argument that can stand in a config, with the classes that take it."""
    owners: dict[str, list[str]] = defaultdict(list)
    for cls in [cls for root in (BaseTask, BaseDataModule, Operator) for cls in _family(root)[1:]] + [Trainer]:
        for name in _arguments(cls):
            owners[name].append(cls.__name__)
    return owners


def _explain_key(key: str, options: Collection[str], argv: Sequence[str]) -> str:
    # The parser may name only the last part of the key; what was typed says more.
    typed = next((w.partition("=")[0] for w in argv if re.search(rf"^-.*\b{re.escape(key)}(=|$)", w)), key)
    full = typed.lstrip("-")
    start = f"{typed!r} is not accepted"
    head, _, tail = full.partition(".")
    tops = {option.partition(".")[0] for option in options}
    if head not in tops and (full != key or typed != key or tail):
        return f"{start}; {closest(head, tops)}"
    siblings = {option for option in options if option.startswith("trainer.")}
    if head == "trainer" and tail.count(".") == 0:
        return f"{start}; {closest(full, siblings)}"
    owners, name = _owners(), full.rpartition(".")[2]
    if name in owners:
        return f"{start} here; {name!r} belongs to {' and '.join(owners[name][:4])}, which must be named first"
    hint = closest(name, owners)
    return f"{start}; {hint}" if hint.startswith("did") else f"{start}; `--help` lists what is"


def explain(message: str, options: Collection[str] = (), argv: Sequence[str] = ()) -> str:
    """What jsonargparse says in `message`, made short.

    Args:
        message: The parser's message, or that of an error it raised when it built an object.
        options: The options of the verb, without dashes ("trainer.max_epochs").
        argv: What the user typed.
    """
    if match := _BAD_KEY.search(message):
        return _explain_key(match[1], options, argv)
    if match := _BAD_CLASS.search(message):
        name = next(group for group in match.groups() if group)
        roots = (BaseTask, BaseDataModule, Operator, Callback, Logger)
        known = {cls.__name__ for root in roots for cls in _family(root)[1:]}
        hint = closest(name.rpartition(".")[2], known)
        return f"there is no class {name!r} that fits here" + (f"; {hint}" if hint.startswith("did") else "")
    if match := _CHOICES.search(message):
        key = re.search(r'key "([\w.]+)"', message)
        choices = re.findall(r"'([^']+)'", match[1])
        return f"{key[1] if key else 'a value'}: there is no {match[2]!r}; {closest(match[2], choices)}"
    lines = [line.strip(" -") for line in message.splitlines()]
    lines = [line for line in lines if line and not line.startswith(_ASIDES) and "NoneType" not in line]
    return "\n".join(line[:300] for line in lines[:8])
