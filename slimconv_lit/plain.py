"""What a file may hand over where options are read: plain values, and no more of them than a configuration needs."""

from collections.abc import Mapping
from typing import Any

import yaml  # type: ignore[import-untyped]

# Far more than a configuration needs, and less than what fills the memory or, nested, the stack of libyaml.
MOST_VALUES, MOST_TEXT, MOST_NESTED = 100_000, 10_000, 50


def check_plain(values: Any) -> None:
    """Looks through mappings, lists, texts, numbers and truth values; keys are texts.

    Raises:
        ValueError: If there is anything else, or more than `MOST_VALUES`; the message says what.
    """
    # A few lines of aliases of aliases stand for billions of values.
    if _count(values, MOST_VALUES) > MOST_VALUES:
        raise ValueError(f"it stands for more than {MOST_VALUES:,} values")


def check_nesting(text: str) -> None:
    """Sees that the lists and mappings in a YAML text are not more than `MOST_NESTED` deep.

    Raises:
        ValueError: If they are.
        yaml.YAMLError: If it is no YAML.
    """
    depth = 0
    for event in yaml.parse(text):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > MOST_NESTED:
            raise ValueError(f"its lists and mappings are more than {MOST_NESTED} deep")


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
    if len(text) > MOST_TEXT:
        raise ValueError(f"a text has more than {MOST_TEXT:,} characters")
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
