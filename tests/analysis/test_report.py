import json
import re

import pytest

from slimconv_lit.analysis import macs, models_rows, models_table, params, profile_rows, profile_table
from slimconv_lit.backbones import create_backbone, list_backbones
from slimconv_lit.ops import SlimConv2d


def test_models_of_a_pattern():
    rows = models_rows("cifar_resnet5*")
    assert [row["backbone"] for row in rows] == ["cifar_resnet50", "cifar_resnet56"]
    assert rows[1] == {
        "backbone": "cifar_resnet56", "params": 858_868, "macs": 125_491_456, "image": "32x32", "classes": 100,
    }  # fmt: skip


def test_models_table():
    lines = models_table("timm:dla46*").split("\n")
    assert lines[0].split() == ["backbone", "params", "macs", "image", "classes"]
    assert lines[2].startswith("timm:dla46_c")
    assert "1,301,400" in lines[2]
    assert json.loads(models_table("cifar_resnet20", "json"))[0]["backbone"] == "cifar_resnet20"


def test_without_a_pattern_the_names_alone_are_listed(monkeypatch):
    def build(*args, **options):
        raise AssertionError("to build all takes a minute")

    monkeypatch.setattr("slimconv_lit.analysis.report.create_backbone", build)
    text = models_table()
    assert set(list_backbones()) <= set(text.split())
    assert all(len(line) <= 120 for line in text.split("\n"))
    assert re.search(r"\ntimm, 1,\d{3}: give a pattern, such as 'timm:resnet\*'\n", text)
    rows = json.loads(models_table(style="json"))
    assert {"backbone": "cifar_resnet56", "image": "32x32", "classes": 100} in rows
    assert len(rows) == len(list_backbones())


def test_models_that_do_not_exist():
    with pytest.raises(ValueError, match=r"no network matches: .*did you mean 'torchvision:resnet50'"):
        models_rows("resnet5o")
    assert [row["backbone"] for row in models_rows("resnet50")] == ["torchvision:resnet50"]


@pytest.mark.parametrize(
    ("depth", "layers"),
    [
        (0, ["total"]),
        (1, ["conv1", "bn1", "layer1", "layer2", "layer3", "fc", "total"]),
        (2, ["conv1", "bn1", *(f"layer{i}.{j}" for i in (1, 2, 3) for j in (0, 1, 2)), "fc", "total"]),
    ],
)
def test_depth_folds_the_layers_up(depth, layers):
    rows = profile_rows("cifar_resnet20", depth=depth)
    assert [row["layer"] for row in rows] == layers
    if depth:
        for column in ("params", "macs"):
            assert sum(row[column] for row in rows[:-1]) == rows[-1][column]


def test_without_a_depth_every_layer_has_a_row():
    rows = profile_rows("cifar_resnet20", SlimConv2d, depth=None)
    total = rows.pop()
    assert sum(row["macs"] for row in rows) == total["macs"]
    assert sum(row["params"] for row in rows) == total["params"]
    new = next(row for row in rows if row["layer"] == "layer2.1.conv1.top.0")
    assert new["macs/plain"] is None


def test_an_operator_is_compared_with_the_plain_backbone():
    operator = {"class_path": "SlimConv2d", "init_args": {"k": "8/3"}}
    rows = profile_rows("cifar_resnet20", operator, num_classes=10, input_size=64)
    plain = create_backbone("cifar_resnet20", num_classes=10)
    slim = create_backbone("cifar_resnet20", operator, num_classes=10)
    assert rows[-1]["params/plain"] == pytest.approx(params(slim) / params(plain), abs=1e-4)
    assert rows[-1]["macs/plain"] == pytest.approx(macs(slim, 64) / macs(plain, 64), abs=1e-4)
    assert rows[0]["params/plain"] == 1
    assert rows[0]["output"] == "16x64x64"


def test_a_backbone_with_an_operator_in_its_name_is_compared_with_the_plain_one():
    text = profile_table("sc_cifar_resnet56", depth=0)
    assert text.startswith("sc_cifar_resnet56 with SlimConv2d(min_hidden=4), 100 classes")
    assert text.split()[-5:] == ["459,916", "66,148,096", "100", "0.5355", "0.5271"]


def test_options_reach_the_backbone():
    rows = profile_rows("cifar_resnet20", SlimConv2d, in_channels=1, include="layer3.*")
    assert [row["layer"] for row in rows if (row["params/plain"] or 1) < 1] == [
        "layer3.0",
        "layer3.1",
        "layer3.2",
        "total",
    ]
    assert rows[0]["params"] == 144


def test_profile_table_says_what_was_counted():
    text = profile_table("torchvision:resnet50", {"class_path": "SlimConv2d", "init_args": {"k": 2}}, depth=1)
    assert text.startswith("torchvision:resnet50 with SlimConv2d(k=2), 1,000 classes, one image of 224x224\n\nlayer ")
    assert "one image of 3x40x50" in profile_table("cifar_resnet20", input_size=(3, 40, 50), depth=0)
    assert profile_table("cifar_resnet20", depth=0, style="csv") == (
        "layer,type,params,macs,output\ntotal,CifarResNet,275572,40556800,100"
    )


def test_an_unknown_backbone():
    with pytest.raises(ValueError, match="'cifar_resnet20'"):
        profile_rows("cifar_resnet21")
