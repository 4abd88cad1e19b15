"""Reads the pickles that CIFAR-100 is published in, without running what a pickle can ask for.

A pickle is a program for a small machine, which may import and call anything. Of that machine this is the part that
puts numbers, texts, lists, dictionaries and arrays of bytes together. It imports nothing; the only calls it knows are
those that numpy's arrays are pickled by, and it does not leave them to numpy either, which trusts what it is told.
"""

import pickletools
from pathlib import Path
from typing import Any

import numpy as np

from slimconv_lit.data.files import DataError

# What an array is made by, in Python 2's numpy 1 as in numpy 2; _codecs.encode makes bytes in old protocols.
_GLOBALS = {
    *(f"{module} _reconstruct" for module in ("numpy.core.multiarray", "numpy._core.multiarray")),
    *("numpy ndarray", "numpy dtype", "_codecs encode"),
}
_VALUES = {
    *("BININT", "BININT1", "BININT2", "LONG1"),
    *("BINUNICODE", "SHORT_BINUNICODE", "BINSTRING", "SHORT_BINSTRING", "BINBYTES", "SHORT_BINBYTES"),
}
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


class _Global(str):
    """The name of something that a pickle asks to import."""


class _Bytes:
    """An array that is being put together, or the type of one."""

    array: Any = None

    def build(self, state: Any) -> None:
        """Takes the state of an array of bytes; that of a type says nothing that matters for bytes."""
        if len(state) == 5:
            _, shape, kind, fortran, raw = state
            if not isinstance(kind, _Bytes):
                raise ValueError("an array of something else than bytes")
            content = raw.encode("latin-1") if isinstance(raw, str) else raw
            self.array = np.frombuffer(content, np.uint8).reshape(shape, order="F" if fortran else "C")


def read_pickle(path: Path) -> Any:
    """The value in a pickle of numbers, texts, lists, dictionaries by text, and arrays of bytes.

    Raises:
        DataError: If it is truncated, no pickle, or asks for anything else; the message says for what.
    """
    try:
        return _Machine().run(path.read_bytes())
    except (ValueError, LookupError, TypeError, AttributeError, OverflowError) as error:
        raise DataError(
            f"{path} is no pickle of plain values and arrays of bytes ({error}); a pickle can run code, so no other is "
            "read. Fetch it again"
        ) from error


class _Machine:
    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}

    def run(self, program: bytes) -> Any:
        for operation, argument, _ in pickletools.genops(program):
            if operation.name == "STOP":
                return _finished(self.stack.pop())
            self.step(operation.name, argument)
        raise ValueError("it has no end")

    def step(self, name: str, argument: Any) -> None:
        stack = self.stack
        if name in _VALUES:
            stack.append(argument)
        elif name in ("BINPUT", "LONG_BINPUT", "MEMOIZE"):
            self.memo[len(self.memo) if argument is None else argument] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET"):
            stack.append(self.memo[argument])
        elif name in _CONSTANTS:
            stack.append(_CONSTANTS[name])
        elif name in ("EMPTY_LIST", "EMPTY_DICT"):
            stack.append([] if name == "EMPTY_LIST" else {})
        elif name == "MARK":
            self.marks.append(len(stack))
        elif name in ("APPEND", "APPENDS"):
            items = self.taken() if name == "APPENDS" else [stack.pop()]
            stack[-1] += items
        elif name in ("SETITEM", "SETITEMS"):
            items = self.taken() if name == "SETITEMS" else self.taken(2)
            for key, value in zip(items[::2], items[1::2], strict=True):
                stack[-1][_text(key)] = value
        elif name in ("TUPLE", *_TUPLES):
            stack.append(tuple(self.taken(_TUPLES.get(name))))
        elif name in ("GLOBAL", "STACK_GLOBAL"):
            asked = argument if name == "GLOBAL" else " ".join(map(_text, self.taken(2)))
            if asked not in _GLOBALS:
                raise ValueError(f"it asks for {asked.replace(' ', '.')}")
            stack.append(_Global(asked))
        elif name == "REDUCE":
            function, arguments = self.taken(2)
            stack.append(_called(function, arguments))
        elif name == "BUILD":
            state = stack.pop()
            stack[-1].build(state)
        elif name not in ("PROTO", "FRAME"):
            raise ValueError(f"it uses {name}")

    def taken(self, count: int | None = None) -> list[Any]:
        """What lies above the last mark, or the last `count` things, taken off the stack."""
        start = self.marks.pop() if count is None else len(self.stack) - count
        if start < 0:
            raise IndexError("too little on the stack")
        items = self.stack[start:]
        del self.stack[start:]
        return items


def _text(key: Any) -> str:
    # As a key, a tuple in a tuple, a million deep, would overflow the stack of the interpreter.
    if not isinstance(key, str):
        raise TypeError(f"a {type(key).__name__} where a text is needed")
    return key


def _called(function: Any, arguments: Any) -> Any:
    if function == "_codecs encode" and isinstance(function, _Global):
        text, coding = arguments
        if coding != "latin1":
            raise ValueError("bytes in another coding than latin1")
        return text.encode(coding)
    if not isinstance(function, _Global) or (function == "numpy dtype" and arguments[0] != "u1"):
        raise ValueError("an array of something else than bytes")
    return _Bytes()


def _finished(value: Any) -> Any:
    """`value`, a dictionary with arrays among its values, say, with these complete."""
    if isinstance(value, dict):
        return {key: part.array if isinstance(part, _Bytes) else part for key, part in value.items()}
    return value
