import csv
import io
import json

import pytest

from slimconv_lit.tables import format_table

ROWS = [
    {"layer": "conv1", "params": 25_557_032, "ratio": 0.65577},
    {"layer": "a|b", "macs": 3, "ratio": 1.0},
]


def test_table_for_the_terminal():
    assert format_table(ROWS) == "\n".join(
        [
            "layer      params  ratio  macs",
            "-----  ----------  -----  ----",
            "conv1  25,557,032  0.656",
            "a|b                1.000     3",
        ]
    )


def test_table_in_markdown():
    assert format_table(ROWS, "md") == "\n".join(
        [
            "| layer |     params | ratio | macs |",
            "| ----- | ---------: | ----: | ---: |",
            "| conv1 | 25,557,032 | 0.656 |      |",
            "| a\\|b  |            | 1.000 |    3 |",
        ]
    )


def test_csv_and_json_keep_the_values():
    read = list(csv.DictReader(io.StringIO(format_table(ROWS, "csv"))))
    assert read[0] == {"layer": "conv1", "params": "25557032", "ratio": "0.65577", "macs": ""}
    assert json.loads(format_table(ROWS, "json")) == ROWS


@pytest.mark.parametrize(
    ("values", "texts"),
    [
        ([0.1, 1e-5], ["0.1", "1e-05"]),
        ([12345.678, 0.5], ["12,346", "0.5"]),
        ([76.254, 9.1], ["76.25", "9.10"]),
        ([0.98765, 0.5], ["0.9877", "0.5000"]),
        ([float("nan"), 1.0], ["nan", "1.000"]),
        ([True, None], ["True", ""]),
        (["two\nlines", "one"], ["two lines", "one"]),
    ],
)
def test_cells(values, texts):
    table = format_table([{"row": i, "x": value} for i, value in enumerate(values)])
    assert [line[3:].strip() for line in table.split("\n")[2:]] == texts


@pytest.mark.parametrize("style", ["table", "csv", "json", "md"])
def test_no_rows(style):
    assert format_table([], style) in ("(no rows)", "", "[]")


def test_unknown_style():
    with pytest.raises(ValueError, match="'html'; known: table, csv, json, md"):
        format_table(ROWS, "html")
