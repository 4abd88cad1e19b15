import csv
import json

import pytest
import torch
from PIL import Image

from slimconv_lit.analysis.latency import peak_memory, resident_memory
from slimconv_lit.cli import main
from slimconv_lit.experiments import formats

SMALL = ["cifar_resnet20", "--input_size=16", "--rounds=2"]


def rows_of(folder):
    with (folder / "benchmark.csv").open() as file:
        return list(csv.DictReader(file))


def test_peak_memory_is_what_lies_in_memory_at_once():
    x = torch.randn(1000, 1000)

    def run():
        y = x * 2
        z = y + x
        del y
        return z.relu_()

    run()
    assert peak_memory(run) == pytest.approx(2 * x.nbytes, rel=0.01)
    resident = resident_memory()
    assert resident is None or resident > x.nbytes


def test_slim_and_plain(in_tmp, capsys):
    words = ["--k", "4/3", "8/3", "--fuse"]
    assert main(["benchmark", *SMALL, *words]) == 0
    (folder,) = (in_tmp / "runs" / "cifar_resnet20").iterdir()
    said = capsys.readouterr().out
    assert f"in {folder.relative_to(in_tmp)}" in said
    assert "classifier, forward pass of 3x16x16, fused; backend eager, precision float32" in said
    assert "batch 1, threads 1" in said
    rows = rows_of(folder)
    names = ["plain", "SlimConv2d k=4/3", "SlimConv2d k=8/3"]
    assert [row["network"] for row in rows] == names
    for row in rows:
        assert float(row["ms low"]) <= float(row["ms"]) <= float(row["ms high"])
        assert float(row["images/s"]) == pytest.approx(1000 * int(row["batch"]) / float(row["ms"]))
        assert float(row["macs ratio"]) == pytest.approx(int(row["macs"]) / int(rows[0]["macs"]))
        assert float(row["memory MB"]) > 0
    assert float(rows[2]["macs ratio"]) < float(rows[1]["macs ratio"]) < 1
    document = json.loads((folder / "benchmark.json").read_text())
    assert document["machine"]["torch"] == torch.__version__
    assert document["arguments"]["fused"] is True
    with Image.open(folder / "benchmark.png") as picture:
        assert picture.size[0] > 800


def test_training_steps_of_segmentation_into_a_folder(in_tmp):
    (in_tmp / "found").mkdir()
    words = ["--head=deeplab_v3plus", "--input_size=32", "--batch=2", "--train", "--rounds=2", "--output=found"]
    assert main(["benchmark", "cifar_resnet20", "--operator=GhostConv2d", *words]) == 0
    assert [row["network"] for row in rows_of(in_tmp / "found")] == ["plain", "GhostConv2d"]
    assert not (in_tmp / "runs").exists()


def test_a_checkpoint_in_runtimes(in_tmp, capsys):
    for package in ("onnx", "onnxscript", "onnxruntime", "openvino"):
        pytest.importorskip(package, reason='needs pip install "slimconv_lit[export]"')
    quiet = [f"--trainer.enable_{what}=false" for what in ("progress_bar", "model_summary")]
    short = [*quiet, "--trainer.max_epochs=1", "--trainer.limit_train_batches=1", "--test_after=false"]
    network = ["--model.backbone=timm:test_resnet", "--model.operator=SlimConv2d", "--model.operator.k=8/3"]
    assert main(["fit", "--config=quickstart.yaml", *short, *network, "--data.image_size=64"]) == 0
    words = ["--backend", "onnxruntime", "openvino", "--precision", "float32", "bf16", "--rounds=2"]
    assert main(["benchmark", "last", *words]) == 0
    said = capsys.readouterr().out
    assert "left out: onnxruntime in bf16" in said
    (folder,) = (in_tmp / "runs" / "quickstart").glob("*-benchmark")
    rows = rows_of(folder)
    assert [(row["backend"], row["precision"]) for row in rows[::2]] == [
        ("onnxruntime", "float32"),
        ("openvino", "float32"),
        ("openvino", "bf16"),
    ]
    assert {row["network"] for row in rows[1::2]} == {"timm:test_resnet + SlimConv2d k=8/3"}
    assert {row["layout"] for row in rows} == {"own"}
    assert "openvino" in json.loads((folder / "benchmark.json").read_text())["machine"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--backend=onxruntime"], "there is no 'onxruntime'; did you mean 'onnxruntime'?"),
        (["--operator=SlimConv"], "did you mean 'SlimConv2d'"),
        (["--output=missing"], "--output: there is no folder 'missing'"),
        (["--fuse", "--train"], "--fuse is for inference"),
        (["--rounds=1"], "--rounds=1: at least 2"),
        (["--operator=GhostConv2d", "--k=2"], "--k is SlimConv2d's"),
        (["--kernel=triton", "--device=cpu"], "nothing of what was asked for can be run"),
        (["--precision=int8"], "nothing of what was asked for can be run"),
        (["--k=5"], "nearest: 14/3"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_mistakes(in_tmp, capsys, words, message):
    assert main(["benchmark", *SMALL[:2], *words]) == 2
    assert message in capsys.readouterr().err


def test_names_and_packages(in_tmp, capsys, monkeypatch):
    assert main(["benchmark", "cifar_resnet21"]) == 2
    assert "or 'cifar_resnet20'" in capsys.readouterr().err
    monkeypatch.setattr(formats, "find_spec", lambda name: None)
    assert main(["benchmark", "cifar_resnet20", "--backend=openvino"]) == 2
    assert 'pip install "slimconv_lit[export]"' in capsys.readouterr().err
