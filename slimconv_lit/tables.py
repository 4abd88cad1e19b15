"""Tables as text: the one formatter behind every report and tool verb. Imports nothing of the package."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Mapping, Sequence
from math import floor, isfinite, log10
from typing import Literal, TypeAlias

TableRows: TypeAlias = Sequence[Mapping[str, object]]
TableStyle: TypeAlias = Literal["table", "csv", "json", "md"]


def format_table(rows: TableRows, style: TableStyle = "table") -> str:
    """Rows as text without a final newline; a column for every key, in the order in which the keys first appear.

    "table" (for a terminal) and "md" (GitHub Markdown) are for reading: numbers to the right, thousands separated, as
    many decimals as give a column's largest number four digits, nothing for `None` or a missing key. "csv" and "json"
    are for programs: values as they are.

    Raises:
        ValueError: If `style` is unknown.
    """
    writers: dict[str, Callable[[TableRows], str]] = {"table": _table, "csv": _csv, "json": _json, "md": _markdown}
    if style not in writers:
        raise ValueError(f"style: there is no {style!r}; known: {', '.join(writers)}")
    return writers[style](rows)


def _columns(rows: TableRows) -> list[str]:
    return list(dict.fromkeys(key for row in rows for key in row))


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _decimals(values: list[object]) -> int | None:
    """How many decimals give a column's largest number four digits; None where its smallest would be lost."""
    sizes = [abs(float(value)) for value in values if isinstance(value, (int, float)) and value and isfinite(value)]
    if not sizes:
        return 0
    decimals = max(0, 3 - max(0, floor(log10(max(sizes)))) + (max(sizes) < 1))
    return decimals if min(sizes) >= 10**-decimals else None


def _cell(value: object, decimals: int | None) -> str:
    if isinstance(value, float):
        large = decimals is None and abs(value) >= 1000
        return f"{value:,.4g}" if decimals is None and not large else f"{value:,.{decimals or 0}f}"
    text = "" if value is None else f"{value:,}" if _is_number(value) else str(value)
    return " ".join(text.split("\n"))


def _aligned(rows: TableRows, escape: bool = False) -> tuple[list[list[str]], list[bool]]:
    """Cells padded to their column's width, the header first, and whether each column holds numbers."""
    columns = _columns(rows)
    values = [[row[column] for row in rows if row.get(column) is not None] for column in columns]
    numeric = [bool(column) and all(map(_is_number, column)) for column in values]
    decimals = [_decimals(column) for column in values]
    cells = [columns] + [[_cell(row.get(c), d) for c, d in zip(columns, decimals, strict=True)] for row in rows]
    if escape:
        cells = [[cell.replace("|", "\\|") for cell in line] for line in cells]
    # A Markdown delimiter cell needs three characters.
    widths = [max(3, *map(len, column)) for column in zip(*cells, strict=True)]
    pad = [str.rjust if number else str.ljust for number in numeric]
    return [[p(c, w) for p, c, w in zip(pad, line, widths, strict=True)] for line in cells], numeric


def _table(rows: TableRows) -> str:
    if not rows:
        return "(no rows)"
    (header, *body), _ = _aligned(rows)
    rule = ["-" * len(cell) for cell in header]
    return "\n".join("  ".join(line).rstrip() for line in [header, rule, *body])


def _markdown(rows: TableRows) -> str:
    if not rows:
        return "(no rows)"
    (header, *body), numeric = _aligned(rows, escape=True)
    rule = ["-" * (len(c) - 1) + (":" if number else "-") for c, number in zip(header, numeric, strict=True)]
    return "\n".join(f"| {' | '.join(line)} |" for line in [header, rule, *body])


def _csv(rows: TableRows) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, _columns(rows), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().rstrip("\n")


def _json(rows: TableRows) -> str:
    return json.dumps([dict(row) for row in rows], indent=2, ensure_ascii=False, default=str)


def narrow(text: str, width: int) -> str:
    """`text` with the middle of each line left out that is longer than `width`.

    Of a long line, such as a path, the beginning and the end say most.
    """
    half = width // 2
    return "\n".join(s if len(s) <= width else f"{s[: half - 1]}…{s[-half:]}" for s in text.split("\n"))
