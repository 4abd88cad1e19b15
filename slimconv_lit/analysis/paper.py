"""The papers' tables, rebuilt: what is printed, what we compute, and what is between them.

A file for each paper (`SOURCES`) holds one entry for every row; here each network is built without weights and counted
in its row's own convention, and by our uniform `macs`. Rows without a network are quoted.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from decimal import ROUND_HALF_UP, Decimal
from functools import cache
from importlib import resources
from typing import Any, Literal

import yaml  # type: ignore[import-untyped]
from torch import nn
from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN
from tqdm import tqdm  # type: ignore[import-untyped]

from slimconv_lit import heads
from slimconv_lit.analysis import conventions
from slimconv_lit.analysis.complexity import params
from slimconv_lit.backbones import create_backbone
from slimconv_lit.backbones.stages import WithoutWeights
from slimconv_lit.lookup import closest
from slimconv_lit.tables import TableStyle, format_table

Source = Literal["slimconv", "scconv", "slimming"]
# Qiu et al. (TIP 2021); Li et al. (CVPR 2023); Liu et al. (ICCV 2017).
SOURCES: dict[Source, str] = {
    "slimconv": "paper.yaml",
    "scconv": "paper_scconv.yaml",
    "slimming": "paper_slimming.yaml",
}
FIGURES = ("params", "flops", "ratio", "flops_ratio")


@dataclass(frozen=True)
class PaperRow:
    """One row of one table, rebuilt.

    Attributes:
        table: The table's number, as the paper prints it, or "Fig. 8".
        entry: The row's entry in its paper's file, with the settings of its table.
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
    def quoted(self) -> bool:
        """Whether the row has no network of ours, and so nothing computed; its note says why."""
        return "backbone" not in self.entry

    @property
    def as_recorded(self) -> bool:
        """Whether all integers are those of the paper's file."""
        if self.quoted:
            return True
        recorded = tuple(self.entry[key] for key in ("params", "counted", "macs"))
        return recorded == (self.params, self.counted, self.macs)

    def computed(self, figure: str) -> Decimal:
        """The figure "params", "flops", or a ratio (of parameters or "flops_ratio" saved, in %), unrounded."""
        match figure:
            case "params":
                return Decimal(self.params) / self.entry["params_unit"]
            case "flops":
                return Decimal(self.counted) / self.entry["flops_unit"]
            case "flops_ratio":
                return 100 * (1 - Decimal(self.counted) / self.entry["flops_ratio_to"])
            case _:
                return 100 * (1 - Decimal(self.params) / self.entry["ratio_to"])

    def prints(self, figure: str) -> bool:
        """Whether the computed figure, rounded as the table rounds, is the printed one."""
        if self.quoted:
            return False
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
            row[f"{figure} printed"] = text
            if self.quoted:
                continue
            computed = self.computed(figure)
            # Two digits more than are printed, so that a rounding can be seen.
            row[figure] = str(_round(computed, Decimal(text).scaleb(-2)))
            row[f"{figure} diff %"] = f"{100 * (computed / Decimal(text) - 1):+.2f}" if Decimal(text) else "+0.00"
            row[f"{figure} prints"] = "yes" if self.prints(figure) else "no"
        if self.quoted:
            return row | {"note": _note(self)}
        row["convention"] = self.entry["convention"]
        row |= {"params (exact)": self.params, "counted (exact)": self.counted, "macs (exact)": self.macs}
        return row | {"note": _note(self)}


def _round(value: Decimal, like: Decimal) -> Decimal:
    return value.quantize(Decimal(1).scaleb(int(like.as_tuple().exponent)), ROUND_HALF_UP)


def entries(table: str | None = None, source: Source = "slimconv") -> Iterator[tuple[str, dict[str, Any]]]:
    """(table, entry) for every row of a paper's file, the settings of its table filled in.

    Args:
        table: Only this one: "I" or "1", "fig8" or "Fig. 8".
        source: Which paper, a key of `SOURCES`.

    Raises:
        ValueError: If there is no such table.
    """
    text = resources.files("slimconv_lit.analysis").joinpath(SOURCES[source]).read_text(encoding="utf-8")
    tables = {entry["table"]: entry for entry in yaml.safe_load(text)["tables"]}
    numbered = enumerate(["I", "II", "III", "IV", "V", "VI", "VII", "VIII", "IX", "X", "XI"], 1)
    numerals = {str(number): numeral for number, numeral in numbered}
    wanted = None
    if table is not None:
        plain = {"".join(c for c in name.lower() if c.isalnum()): name for name in tables}
        asked = table if table in tables else numerals.get(table, table)
        wanted = plain.get("".join(c for c in asked.lower() if c.isalnum()))
        if wanted is None:
            raise ValueError(f"table: there is no {table!r}; {closest(asked, tables)}")
    for name, whole in tables.items():
        if wanted in (None, name):
            common = {key: value for key, value in whole.items() if key != "rows"}
            for row in whole["rows"]:
                entry = {"convention": "macs", **common, **row}
                yield name, {"macs": entry.get("counted"), **entry}


def rebuild(table: str, entry: Mapping[str, Any]) -> PaperRow:
    """Builds the network of one entry, without weights, and counts it; of a quoted row there is nothing but zeros."""
    if "backbone" not in entry:
        return PaperRow(table, entry, 0, 0, 0)
    network = {key: entry.get(key) for key in ("head", "backbone", "operator", "options", "classes", "input")}
    parameters, ran = _count(json.dumps(network))
    convention = getattr(conventions, entry["convention"])
    return PaperRow(table, entry, parameters, convention(ran, **entry.get("counting", {})), conventions.macs(ran))


@cache
def _count(network: str) -> tuple[int, list[conventions.Operation]]:
    """Parameters and operations of a network, which more than one row may have; its description is JSON."""
    asked = json.loads(network)
    build: Any = getattr(heads, asked["head"]) if asked["head"] else create_backbone
    with WithoutWeights():
        model: nn.Module = build(asked["backbone"], asked["operator"], asked["classes"], **(asked["options"] or {}))
    if isinstance(model, GeneralizedRCNN):
        model = heads.WithoutProposals(model, regions=300)
    return params(model), conventions.operations(model, asked["input"])


def paper_rows(table: str | None = None, source: Source = "slimconv") -> list[PaperRow]:
    """Every row of a paper's tables, or of one, rebuilt; with a progress bar on a terminal's stderr.

    Args:
        table: As in `entries`.
        source: As in `entries`.

    Raises:
        ValueError: If there is no such table.
    """
    every = list(entries(table, source))
    bar = tqdm(every, desc="rebuilding", unit=" rows", leave=False, delay=1, disable=None)
    return [rebuild(name, entry) for name, entry in bar]


def paper_table(rows: list[PaperRow], style: TableStyle = "table") -> str:
    """Rebuilt rows as text: everything for programs ("csv", "json"), and for readers less, with the notes below."""
    if style in ("csv", "json"):
        return format_table([row.as_dict() for row in rows], style)
    notes = {note: number for number, note in enumerate(dict.fromkeys(filter(None, map(_note, rows))), 1)}
    figures = [figure for figure in FIGURES if any(figure in r.entry["printed"] for r in rows)]
    shown: list[dict[str, object]] = []
    for row in rows:
        line: dict[str, object] = {"table": row.table, "network": row.entry["name"]}
        for figure in figures:
            line |= {figure: row.entry["printed"].get(figure), f"our {figure}": None, f"{figure} off by": None}
            if figure in row.entry["printed"] and not row.quoted:
                text = Decimal(row.entry["printed"][figure])
                ours = f"{_round(row.computed(figure), text.scaleb(-2))}{'' if row.prints(figure) else ' *'}"
                difference = f"{100 * (row.computed(figure) / text - 1):+.2f} %" if text else ""
                line |= {f"our {figure}": ours, f"{figure} off by": difference}
        counted = (None, None) if row.quoted else (row.entry["convention"], row.macs)
        line |= dict(zip(("counted by", "macs"), counted, strict=True))
        shown.append(line | {"note": f"[{notes[_note(row)]}]" if _note(row) else ""})
    rebuilt = [row for row in rows if not row.quoted]
    printed = [(row, figure) for row in rebuilt for figure in figures if figure in row.entry["printed"]]
    exact = sum(row.prints(figure) for row, figure in printed)
    below = [f"[{number}] {note}" for note, number in notes.items()]
    summary = f"{exact} of {len(printed)} printed figures are reached digit by digit; * marks those that are not."
    if len(rebuilt) < len(rows):
        summary += f" {len(rows) - len(rebuilt)} rows are quoted, without a network of ours; their notes say why."
    # In Markdown, lines that follow each other run together.
    return "\n".join([format_table(shown, style), "", *below, *([""] if below else []), summary]).replace(
        "\n[", "\n\n[" if style == "md" else "\n["
    )


def _note(row: PaperRow) -> str:
    drift = "" if row.as_recorded else "INTEGERS DIFFER from the recorded ones. "
    return drift + row.entry.get("note", "")
