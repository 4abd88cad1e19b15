import json
from decimal import Decimal
from pathlib import Path

import pytest
import torchvision
import yaml

from slimconv_lit import SlimConv2d, create_backbone, slimify
from slimconv_lit.analysis import complexity, conventions
from slimconv_lit.analysis.paper import entries, paper_rows, paper_table, rebuild

TABLES = Path(__file__).parents[2].parent / "shared" / "reference" / "slimconv_tables.yaml"

# What the reference says cannot be reached, and why is in the row's note.
NOT_REACHED = {
    ("I", "SPConv-ResNet50 a=1/2", "params"),
    ("I", "SPConv-ResNet50 a=1/2", "flops"),
    ("I", "SPConv-ResNet50 a=1/8", "flops"),
    ("II", "Oct-ResNet-50 (alpha=0.5)", "params"),
    ("III", "SqueezeNet-B", "params"),
    ("III", "SqueezeNet-B", "flops"),
    ("III", "1.0 MobileNet (v2)", "params"),
    ("III", "1.0 MobileNet (v2)", "flops"),
    ("X", "Sc-ResNet-50@256", "flops"),
}


@pytest.fixture(scope="module")
def rows():
    return paper_rows()


def test_every_integer_is_the_recorded_one(rows):
    wrong = [(row.table, row.entry["name"], row.params, row.counted, row.macs) for row in rows if not row.as_recorded]
    assert not wrong


def test_every_printed_figure_is_reached_but_the_known_ones_which_have_a_note(rows):
    missed = {
        (row.table, row.entry["name"], figure)
        for row in rows
        for figure in row.entry["printed"]
        if figure != "score" and not row.prints(figure)
    }
    assert missed == NOT_REACHED
    unexplained = {(row.table, row.entry["name"]) for row in rows if not row.entry.get("note")}
    assert not unexplained & {(table, name) for table, name, _ in missed}


@pytest.mark.skipif(not TABLES.exists(), reason="the reference tables are not beside this checkout")
def test_the_printed_figures_are_the_papers():
    """paper.yaml against an independent transcription of the tables."""
    reference = yaml.safe_load(TABLES.read_text())
    numbers = {"I": 1, "II": 2, "III": 3, "V": 5, "VI": 6, "X": 10, "XI": 11}
    for table, number in numbers.items():
        theirs = reference[f"table{number}"]["rows"]
        ours = [entry for _, entry in entries(table)]
        assert len(ours) == len(theirs)
        for entry, row in zip(ours, theirs, strict=True):
            printed = {key: float(value) for key, value in entry["printed"].items()}
            assert printed == {"params": row["params"], "flops": row["flops"], "score": row["error"]}, entry["name"]
            assert entry["input"] == row.get("input", [3, entry["input"]])[1]
    ratios = [(float(e["printed"]["ratio"]), float(e["printed"]["score"])) for _, e in entries("fig8")]
    assert ratios == [(row["compressed_ratio"], row["top1"]) for row in reference["figure8"]["rows"]]
    fourth = [(float(e["printed"]["ratio"]), float(e["printed"]["score"])) for _, e in entries("IV")]
    assert fourth == [(row["compressed_ratio"], row["latency_ms"]) for row in reference["table4"]["rows"]]


def test_the_tables_as_text(rows):
    text = paper_table(rows[:4])
    assert "Sc-ResNet-50" in text
    assert "[1] 18.345 is printed cut off" in text
    assert "2.9074 *" in text
    assert "printed figures are reached digit by digit" in text
    parsed = json.loads(paper_table(rows, "json"))
    assert len(parsed) == len(rows)
    assert parsed[3] | {"note": ""} == {
        "table": "I", "network": "Sc-ResNet-50", "params printed": "16.76", "params": "16.7587",
        "params diff %": "-0.01", "params prints": "yes", "flops printed": "2.65", "flops": "2.6522",
        "flops diff %": "+0.08", "flops prints": "yes", "convention": "macs", "params (exact)": 16758740,
        "counted (exact)": 2652222208, "macs (exact)": 2652222208, "note": "",
    }  # fmt: skip


def test_a_table_by_its_number_numeral_or_name():
    assert [n for n, _ in entries("2")] == [n for n, _ in entries("II")] == ["II"] * 4
    assert len(list(entries("fig8"))) == 7
    with pytest.raises(ValueError, match="there is no '12'"):
        list(entries("12"))


def test_a_drift_is_seen_and_said():
    table, entry = next(entries("I"))
    row = rebuild(table, entry | {"params": 1})
    assert not row.as_recorded
    assert "INTEGERS DIFFER" in paper_table([row])
    assert "INTEGERS DIFFER" in paper_table([row], "json")


def test_rounding_is_the_tables():
    (eleventh, *_) = [rebuild(t, e) for t, e in entries("XI")]
    assert eleventh.computed("flops") == Decimal("1.304879104")
    assert eleventh.prints("flops")


@pytest.mark.parametrize("build", [torchvision.models.resnet18, torchvision.models.densenet121])
def test_conventions_agree_where_they_must(build):
    model = build()
    ran = conventions.operations(model, 64)
    assert conventions.macs(ran) == complexity.macs(model, 64)
    linear = sum(op.macs for op in ran if op.kind == "linear")
    norms = sum(2 * op.outputs for op in ran if op.kind == "norm")
    assert conventions.convolutions(ran) == conventions.macs(ran) - linear
    pooled = sum(op.inputs + op.outputs for op in ran if op.kind == "global_pool")
    assert conventions.thop_2020(ran) == conventions.macs(ran) + linear + norms + pooled
    without = conventions.ptflops_2018(ran, relus="operators")
    pools = sum(op.inputs for op in ran if op.kind == "pool")
    assert without == conventions.macs(ran) + norms + pools
    assert conventions.ptflops_baseline(ran) == conventions.ptflops_2018(ran) + 1000


def test_activations_count_where_the_convention_says():
    model = torchvision.models.resnet18()
    slimify(model)
    ran = conventions.operations(model, 224)
    slim = [m for m in model.modules() if isinstance(m, SlimConv2d)]
    # Gate and bottom path of the two blocks of each stage; the first of a stage reads the map before its stride.
    areas = [56**2, 56**2, 56**2, 28**2, 28**2, 14**2, 14**2, 7**2]
    inner = sum(m.gate.squeeze.out_channels + m.bottom[0].out_channels * a for m, a in zip(slim, areas, strict=True))
    behind = sum(
        m.out_channels * a for m, a in zip(slim, [56**2] * 2 + [28**2] * 2 + [14**2] * 2 + [7**2] * 2, strict=True)
    )
    none, operators, also_behind, modules = (
        sum(op.outputs for op in ran if op.kind == "relu" and op.place in places)
        for places in ((), ("operator",), ("operator", "behind operator"), ("operator", "behind operator", "module"))
    )
    assert (none, operators, also_behind) == (0, inner, inner + behind)
    for relus, extra in (("operators", operators), ("behind operators", also_behind), ("modules", modules)):
        base = conventions.ptflops_2018([op for op in ran if op.kind != "relu"])
        assert conventions.ptflops_2018(ran, relus=relus) == base + extra
    assert conventions.ptflops_2018(ran, relus="modules") == conventions.ptflops_2018(ran)
    plain = create_backbone("cifar_resnet20", num_classes=10)
    functions = conventions.operations(plain, 32)
    assert conventions.ptflops_2018(functions, relus="modules") < conventions.ptflops_2018(functions)
