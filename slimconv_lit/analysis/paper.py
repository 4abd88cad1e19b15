"""The paper's tables, rebuilt: what is printed, what we compute, and what is between them.

paper.yaml holds one entry for every row; here each network is built without weights and counted in its row's own
convention, and by our uniform `macs`.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from decimal import ROUND_HALF_UP, Decimal
from functools import cache
from importlib import resources
from typing import Any

import yaml  # type: ignore[import-untyped]
from tqdm import tqdm  # type: ignore[import-untyped]

from slimconv_lit.analysis import conventions
from slimconv_lit.analysis.complexity import params
from slimconv_lit.backbones import create_backbone
from slimconv_lit.ops.base import closest
from slimconv_lit.tables import TableStyle, format_table


@dataclass(frozen=True)
class PaperRow:
    """One row of one table, rebuilt.

    Attributes:
        table: The table's number, as the paper prints it, or "Fig. 8".
        entry: The row's entry in paper.yaml, with the settings of its table.
        params: Parameters, as computed.
        counted: Operations in the row's own convention, as computed.
        macs: Multiply-accumulates of convolutions and linear layers, as computed.
    """

    table: str
    entry: Mapping[str, Any]
    params: int
    counted: int
    macs: int

    @property
    def as_recorded(self) -> bool:
        """Whether all integers are those of paper.yaml."""
        recorded = tuple(self.entry[key] for key in ("params", "counted", "macs"))
        return recorded == (self.params, self.counted, self.macs)

    def computed(self, figure: str) -> Decimal:
        """The figure "params", "flops" or "ratio" (of parameters saved, in %), in the table's unit, unrounded."""
        match figure:
            case "params":
                return Decimal(self.params) / self.entry["params_unit"]
            case "flops":
                return Decimal(self.counted) / self.entry["flops_unit"]
            case _:
                return 100 * (1 - Decimal(self.params) / self.entry["ratio_to"])

    def prints(self, figure: str) -> bool:
        """Whether the computed figure, rounded as the table rounds, is the printed one."""
        printed, computed = Decimal(self.entry["printed"][figure]), self.computed(figure)
        if figure == "ratio" and "read_off_within" in self.entry and printed.as_tuple().exponent == -1:
            return abs(printed - computed) <= Decimal(str(self.entry["read_off_within"]))
        if "rounded_before_to" in self.entry and figure == "flops":
            computed = _round(computed, Decimal(1).scaleb(-self.entry["rounded_before_to"]))
        return _round(computed, printed) == printed

    def as_dict(self) -> dict[str, object]:
        """The row for a table: printed, computed and the difference, for each figure that the paper prints."""
        row: dict[str, object] = {"table": self.table, "network": self.entry["name"]}
        for figure, text in self.entry["printed"].items():
            if figure == "score":
                continue
            computed = self.computed(figure)
            row[f"{figure} printed"] = text
            # Two digits more than are printed, so that a rounding can be seen.
            row[figure] = str(_round(computed, Decimal(text).scaleb(-2)))
            row[f"{figure} diff %"] = f"{100 * (computed / Decimal(text) - 1):+.2f}" if Decimal(text) else "+0.00"
            row[f"{figure} prints"] = "yes" if self.prints(figure) else "no"
        row["convention"] = self.entry["convention"]
        row |= {"params (exact)": self.params, "counted (exact)": self.counted, "macs (exact)": self.macs}
        return row | {"note": _note(self)}


def _round(value: Decimal, like: Decimal) -> Decimal:
    return value.quantize(Decimal(1).scaleb(int(like.as_tuple().exponent)), ROUND_HALF_UP)


def entries(table: str | None = None) -> Iterator[tuple[str, dict[str, Any]]]:
    """(table, entry) for every row of paper.yaml, the settings of its table filled in.

    Args:
        table: Only this one: "I" or "1", "fig8" or "Fig. 8".

    Raises:
        ValueError: If there is no such table.
    """
    text = resources.files("slimconv_lit.analysis").joinpath("paper.yaml").read_text(encoding="utf-8")
    tables = {entry["table"]: entry for entry in yaml.safe_load(text)["tables"]}
    numerals = {"1": "I", "2": "II", "3": "III", "4": "IV", "5": "V", "6": "VI", "10": "X", "11": "XI"}
    wanted = None
    if table is not None:
        plain = {"".join(c for c in name.lower() if c.isalnum()): name for name in tables}
        asked = numerals.get(table, table)
        wanted = plain.get("".join(c for c in asked.lower() if c.isalnum()))
        if wanted is None:
            raise ValueError(f"table: there is no {table!r}; {closest(asked, tables)}")
    for name, whole in tables.items():
        if wanted in (None, name):
            common = {key: value for key, value in whole.items() if key != "rows"}
            for row in whole["rows"]:
                entry = {"convention": "macs", **common, **row}
                yield name, {"macs": entry["counted"], **entry}


def rebuild(table: str, entry: Mapping[str, Any]) -> PaperRow:
    """Builds the network of one entry, without weights, and counts it."""
    network = {key: entry.get(key) for key in ("backbone", "operator", "options", "classes", "input")}
    parameters, ran = _count(json.dumps(network))
    convention = getattr(conventions, entry["convention"])
    return PaperRow(table, entry, parameters, convention(ran, **entry.get("counting", {})), conventions.macs(ran))


@cache
def _count(network: str) -> tuple[int, list[conventions.Operation]]:
    """Parameters and operations of a network, which more than one row may have; its description is JSON."""
    asked = json.loads(network)
    options = {**(asked["options"] or {}), "without_weights": True}
    model = create_backbone(asked["backbone"], asked["operator"], asked["classes"], **options)
    return params(model), conventions.operations(model, asked["input"])


def paper_rows(table: str | None = None) -> list[PaperRow]:
    """Every row of the paper's tables, or of one, rebuilt; with a progress bar on a terminal's stderr.

    Raises:
        ValueError: If there is no such table.
    """
    every = list(entries(table))
    bar = tqdm(every, desc="rebuilding", unit=" rows", leave=False, delay=1, disable=None)
    return [rebuild(name, entry) for name, entry in bar]


def paper_table(rows: list[PaperRow], style: TableStyle = "table") -> str:
    """Rebuilt rows as text: everything for programs ("csv", "json"), and for readers less, with the notes below."""
    if style in ("csv", "json"):
        return format_table([row.as_dict() for row in rows], style)
    notes = {note: number for number, note in enumerate(dict.fromkeys(filter(None, map(_note, rows))), 1)}
    figures = [figure for figure in ("params", "flops", "ratio") if any(figure in r.entry["printed"] for r in rows)]
    shown: list[dict[str, object]] = []
    for row in rows:
        line: dict[str, object] = {"table": row.table, "network": row.entry["name"]}
        for figure in figures:
            line |= {figure: None, f"our {figure}": None, f"{figure} off by": None}
            if figure in row.entry["printed"]:
                text = Decimal(row.entry["printed"][figure])
                ours = f"{_round(row.computed(figure), text.scaleb(-2))}{'' if row.prints(figure) else ' *'}"
                difference = f"{100 * (row.computed(figure) / text - 1):+.2f} %" if text else ""
                line |= {figure: str(text), f"our {figure}": ours, f"{figure} off by": difference}
        convention = row.entry["convention"]
        line |= {"counted by": convention, "macs": row.macs, "note": f"[{notes[_note(row)]}]" if _note(row) else ""}
        shown.append(line)
    printed = [(row, figure) for row in rows for figure in figures if figure in row.entry["printed"]]
    exact = sum(row.prints(figure) for row, figure in printed)
    below = [f"[{number}] {note}" for note, number in notes.items()]
    summary = f"{exact} of {len(printed)} printed figures are reached digit by digit; * marks those that are not."
    # In Markdown, lines that follow each other run together.
    return "\n".join([format_table(shown, style), "", *below, *([""] if below else []), summary]).replace(
        "\n[", "\n\n[" if style == "md" else "\n["
    )


def _note(row: PaperRow) -> str:
    drift = "" if row.as_recorded else "INTEGERS DIFFER from paper.yaml. "
    return drift + row.entry.get("note", "")
