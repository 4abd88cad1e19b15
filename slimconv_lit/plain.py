"""What a file may hand over where options are read: plain values, and no more of them than a configuration needs."""

from collections.abc import Mapping
from typing import Any

import yaml  # type: ignore[import-untyped]

# Far more than a configuration needs, and less than what fills the memory or, nested, the stack of libyaml.
MOST_BYTES, MOST_VALUES, MOST_TEXT, MOST_NESTED = 2**20, 100_000, 10_000, 50


def check_plain(values: Any) -> None:
    """Looks through mappings, lists, texts, numbers and truth values; keys are texts.

    Raises:
        ValueError: If there is anything else, or more than `MOST_VALUES`; the message says what.
    """
    # A few lines of aliases of aliases stand for billions of values.
    if _count(values, MOST_VALUES) > MOST_VALUES:
        raise ValueError(f"it stands for more than {MOST_VALUES:,} values")


def check_yaml(text: str) -> None:
    """Sees that a YAML text can be loaded: it is not more than `MOST_NESTED` deep, nor stands for too many values.

    `check_plain` would be too late for either: aliases of mappings that are merged (`<<`) are written out as it loads.

    Raises:
        ValueError: If it cannot; the message says why.
        yaml.YAMLError: If it is no YAML.
    """
    # Of what has an anchor and is complete, how many values it stands for; of what is not, how many so far.
    sizes: dict[str | None, int] = {}
    anchors: list[str | None] = []
    counts = [0]
    for event in yaml.parse(text):
        if isinstance(event, yaml.CollectionStartEvent):
            sizes.pop(event.anchor, None)
            anchors.append(event.anchor)
            counts.append(1)
        elif isinstance(event, yaml.CollectionEndEvent):
            size = sizes[anchors.pop()] = counts.pop()
            counts[-1] += size
        elif isinstance(event, yaml.AliasEvent):
            if event.anchor not in sizes:
                raise ValueError(f"*{event.anchor} stands for nothing, or for what it is in, which is endlessly deep")
            counts[-1] += sizes[event.anchor]
        elif isinstance(event, yaml.ScalarEvent):
            _check_length(event.value)
            sizes[event.anchor] = 1
            counts[-1] += 1
        if len(anchors) > MOST_NESTED:
            raise ValueError(f"its lists and mappings are more than {MOST_NESTED} deep")
        if counts[-1] > MOST_VALUES:
            raise ValueError(f"it stands for more than {MOST_VALUES:,} values")


def _count(values: Any, most: int, depth: int = 0) -> int:
    """How many values are in mappings and lists, at any depth; not counted on where there are more than `most`."""
    if isinstance(values, str):
        _check_text(values)
    elif not isinstance(values, Mapping | list | tuple | int | float | None):
        raise ValueError(f"a {type(values).__name__} is no number, text, list or mapping")
    if depth > 2 * MOST_NESTED:
        raise ValueError(f"its lists and mappings are more than {2 * MOST_NESTED} deep")
    if isinstance(values, Mapping):
        if odd := [key for key in values if not isinstance(key, str)]:
            raise ValueError(f"the key {str(odd[0])[:40]!r} is not a text")
        values = list(values.values())
    total = 1
    for value in values if isinstance(values, list | tuple) else ():
        total += _count(value, most - total, depth + 1)
        if total > most:
            break
    return total


def _check_text(text: str) -> None:
    """Sees that a text is none that stands for much more than itself, should the parser of options read it as YAML."""
    _check_length(text)
    # An alias has an anchor, and either may be written as an escape in a text inside the text.
    if "&" not in text and "\\" not in text:
        return
    try:
        events = list(yaml.parse(text))
    except yaml.YAMLError:
        return
    if any(isinstance(event, yaml.AliasEvent) for event in events):
        raise ValueError(f"the text {text[:40]!r} has aliases in it, which only a file may have")
    for event in events:
        if isinstance(event, yaml.ScalarEvent) and event.value != text:
            _check_text(event.value)


def _check_length(text: str) -> None:
    if len(text) > MOST_TEXT:
        raise ValueError(f"a text has more than {MOST_TEXT:,} characters")
