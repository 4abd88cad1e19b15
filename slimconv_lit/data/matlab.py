"""Reads a matrix of bytes out of a struct in a file of MATLAB's version 5, as the masks of SBD are.

scipy reads them too, but in C, and a damaged file makes it read outside its memory and crash; benchmarks/fuzz.py found
that in seconds. So this is the part of the format that the masks need.

MathWorks, "MAT-File Format", chapter 1: https://www.mathworks.com/help/pdf_doc/matlab/matfile_format.pdf
"""

import math
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

Order: TypeAlias = Literal["little", "big"]

# Types of elements, and classes of matrices.
_INT32, _MATRIX, _COMPRESSED = 5, 14, 15
_STRUCT, _UINT8 = 2, 9
# What a mask of 16 million pixels needs.
_MOST_BYTES = 2**24


def read_field(path: Path, struct: str, field: str) -> NDArray[np.uint8]:
    """The matrix of bytes `struct.field`.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is truncated, of another version, too large, or has no such matrix.
    """
    content = path.read_bytes()
    order: Order = "big" if content[126:128] == b"MI" else "little"
    if content[126:128] not in (b"MI", b"IM"):
        raise ValueError("it is no file of MATLAB's version 5")
    for kind, data in _elements(content[128:], order):
        unpacked = _unpacked(data) if kind == _COMPRESSED else data
        for inner_kind, matrix in _elements(unpacked, order) if kind == _COMPRESSED else [(kind, data)]:
            if inner_kind == _MATRIX:
                of_class, _, name, rest = _matrix(matrix, order)
                if (of_class, name) == (_STRUCT, struct):
                    return _bytes(_field(rest, field, order), order)
    raise ValueError(f"it has no struct {struct}")


def _unpacked(data: bytes) -> bytes:
    unpacker = zlib.decompressobj()
    try:
        unpacked = unpacker.decompress(data, _MOST_BYTES)
    except zlib.error as error:
        raise ValueError(str(error)) from error
    if unpacker.unconsumed_tail:
        raise ValueError(f"it unpacks to more than {_MOST_BYTES:,} bytes, which no mask does")
    return unpacked


def _elements(content: bytes, order: Order) -> Iterator[tuple[int, bytes]]:
    """(type, data) of each element, one behind the other."""
    place = 0
    while place + 8 <= len(content):
        kind, size = (int.from_bytes(content[place + i : place + i + 4], order) for i in (0, 4))
        start, end = place + 8, place + 8 + size
        if kind >> 16:
            # Up to four bytes stand in the second half of the tag; its first half has both numbers.
            kind, size = kind & 0xFFFF, kind >> 16
            start, end = place + 4, place + 4 + min(size, 4)
        if end > len(content):
            raise ValueError("it is truncated")
        yield kind, content[start:end]
        # All but compressed ones are filled up to whole words of eight bytes.
        place = end if kind == _COMPRESSED else place + 8 + (max(0, end - place - 8) + 7) // 8 * 8


def _matrix(content: bytes, order: Order) -> tuple[int, list[int], str, list[tuple[int, bytes]]]:
    """Class, sizes and name of a matrix, and the elements behind them."""
    parts = list(_elements(content, order))
    if len(parts) < 3 or parts[1][0] != _INT32:
        raise ValueError("it has a matrix without sizes or a name")
    (_, flags), (_, sizes), (_, name), *rest = parts
    numbers = np.frombuffer(sizes, "<i4" if order == "little" else ">i4").tolist()
    return int.from_bytes(flags[:4], order) & 0xFF, numbers, name.decode("latin-1"), rest


def _field(parts: list[tuple[int, bytes]], field: str, order: Order) -> bytes:
    if len(parts) < 2:
        raise ValueError("it has a struct without fields")
    (_, width), (_, names), *values = parts
    step = int.from_bytes(width, order)
    starts = range(0, len(names), step) if step > 0 else ()
    known = [names[start : start + step].split(b"\0")[0].decode("latin-1") for start in starts]
    if field not in known or known.index(field) >= len(values):
        raise ValueError(f"its struct has no {field}")
    kind, value = values[known.index(field)]
    if kind != _MATRIX:
        raise ValueError(f"its {field} is no matrix")
    return value


def _bytes(content: bytes, order: Order) -> NDArray[np.uint8]:
    of_class, sizes, _, rest = _matrix(content, order)
    data = rest[0][1] if rest else b""
    if of_class != _UINT8 or len(sizes) != 2 or min(sizes) < 1 or math.prod(sizes) != len(data):
        raise ValueError(f"its matrix of class {of_class} with {sizes} values in {len(data)} bytes is no mask")
    return np.frombuffer(data, np.uint8).reshape(sizes, order="F")
