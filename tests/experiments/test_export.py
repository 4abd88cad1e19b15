import json
import signal
import subprocess
from copy import deepcopy
from functools import partial

import pytest
import torch

from slimconv_lit import SlimConv2d, create_backbone, fuse
from slimconv_lit.cli import main
from slimconv_lit.experiments import export as verb
from slimconv_lit.experiments import formats
from slimconv_lit.usage import UsageError

for package in ("onnx", "onnxscript", "onnxruntime", "openvino"):
    pytest.importorskip(package, reason='needs pip install "slimconv_lit[export]"')

QUIET = [f"--trainer.enable_{what}=false" for what in ("progress_bar", "model_summary")]
FEW = [QUIET[0], "--data.eval_batch_size=32"]
SHORT = [*QUIET, "--trainer.max_epochs=1", "--trainer.limit_train_batches=2", "--trainer.accelerator=cpu"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A folder with the run "tiny": a small network with SlimConv in it, trained for two batches."""
    root = tmp_path_factory.mktemp("exported")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        network = ["--model.backbone=timm:test_resnet", "--model.operator=SlimConv2d", "--data.image_size=64"]
        words = ["--config=quickstart.yaml", *SHORT, *network, "--test_after=false", "--name=tiny"]
        assert main(["fit", *words]) == 0
    return root


def exported(root, *words):
    assert main(["export", "--ckpt_path=last", "--name=tiny", *FEW, *words]) == 0
    folder = max((root / "runs" / "tiny").glob("*-export"), key=lambda path: path.name)
    (facts,) = folder.glob("*.json")
    return folder, json.loads(facts.read_text())


def network_of(root):
    (path,) = (root / "runs" / "tiny").glob("*/checkpoints/last.ckpt")
    weights = torch.load(path, weights_only=True)["state_dict"]
    network = create_backbone("timm:test_resnet", "SlimConv2d", 10, 1).eval()
    network.load_state_dict({key.removeprefix("model."): value for key, value in weights.items()})
    return network


def test_onnx_in_any_number_and_size(runs, monkeypatch, capsys):
    import onnx

    monkeypatch.chdir(runs)
    folder, facts = exported(runs)
    said = capsys.readouterr().out
    path = folder / "timm-test_resnet-SlimConv2d-k4-3.onnx"
    assert f"in {path.relative_to(runs)}" in said
    assert "largest difference" in said
    assert facts["free_axes"] == ["batch", "height", "width"]
    assert facts["class_names"] == list("0123456789")
    assert (facts["mean"], facts["std"], facts["input_size"]) == ([0.3053], [0.3189], [1, 64, 64])
    assert {row["images"] for row in facts["checks"]} >= {"1x1x64x64", "3x1x64x64", "1x1x77x71"}
    metadata = {entry.key: entry.value for entry in onnx.load(path).metadata_props}
    assert json.loads(metadata["class_names"]) == facts["class_names"]
    images = torch.randn(4, 1, 50, 60)
    with torch.no_grad():
        expected = network_of(runs)(images)
    torch.testing.assert_close(formats.open_onnx(path)(images)[0], expected, rtol=1e-4, atol=1e-5)
    assert {file.name for file in folder.iterdir()} == {path.name, path.with_suffix(".json").name}


def test_int8_for_openvino_from_a_folder_of_images(runs, monkeypatch, capsys):
    import openvino
    from PIL import Image

    monkeypatch.chdir(runs)
    (runs / "photos").mkdir()
    for number in range(3):
        Image.new("L", (64, 64), 80 * number).save(runs / "photos" / f"{number}.png")
    folder, facts = exported(runs, "--format=openvino", "--precision=int8", "--calibration=photos", "--images=3")
    assert "test/top1: float32" in capsys.readouterr().out
    assert set(facts) >= {"float32", "int8", "metric"}
    (path,) = folder.glob("*.xml")
    assert path.with_suffix(".bin").is_file()
    model = openvino.Core().read_model(path)
    assert json.loads(model.get_rt_info(["slimconv_lit", "std"]).value) == [0.3189]
    # Its weights are bytes, and not floats that were bytes once.
    assert "i8" in {op.get_element_type().get_type_name() for op in model.get_ops() if op.get_type_name() == "Constant"}


def test_signals_are_handled_behind_openvino(tmp_path):
    network = torch.nn.Conv2d(3, 4, 3).eval()
    formats.write_onnx(formats.trace(network, torch.randn(2, 3, 32, 32), free_size=False), tmp_path / "net.onnx", {})
    runners = [formats.open_openvino(tmp_path / "net.onnx") for _ in range(2)]
    while runners:
        del runners[0]
    heard = []
    before = signal.signal(signal.SIGCHLD, lambda number, frame: heard.append(number))
    try:
        # It ended the process, by writing the signal where OpenVINO's memory had been.
        subprocess.run(["true"], check=True)
    finally:
        signal.signal(signal.SIGCHLD, before)
    assert heard == [signal.SIGCHLD]


def test_a_bfloat16_program_of_one_size(runs, monkeypatch):
    monkeypatch.chdir(runs)
    target = runs / "net.pt2"
    before = {path.name for path in (runs / "runs" / "tiny").iterdir()}
    words = ["--format=torch_export", "--precision=bf16", "--fixed_size", *FEW]
    assert main(["export", "--ckpt_path=last", "--name=tiny", f"--output={target}", *words]) == 0
    assert {path.name for path in (runs / "runs" / "tiny").iterdir()} == before
    facts = json.loads(target.with_suffix(".json").read_text())
    assert facts["free_axes"] == ["batch"]
    assert facts["bf16"] == pytest.approx(facts["float32"], abs=0.05)
    images = torch.randn(5, 1, 64, 64)
    with torch.no_grad():
        expected = network_of(runs)(images)
    (found,) = formats.open_program(target)(images)
    assert found.dtype == torch.float32
    assert (found - expected).abs().max() < 0.05 * expected.abs().max()
    program = torch.export.load(target)
    assert {value.dtype for _, value in program.named_parameters()} == {torch.bfloat16}


def test_fused_networks_in_all_runtimes(tmp_path):
    """In other numbers of images than they were traced with."""
    torch.manual_seed(0)
    network = create_backbone("cifar_resnet20", partial(SlimConv2d, k="8/3"), 10).eval()
    expected = deepcopy(network).double()
    fuse(network)
    program = formats.trace(network, torch.randn(2, 3, 32, 32), free_size=False)
    formats.write_aoti(program, tmp_path / "net.pt2", {})
    formats.write_onnx(program, tmp_path / "net.onnx", {})
    formats.write_openvino(tmp_path / "net.onnx", tmp_path / "net.xml", {})
    for run in (
        formats.open_aoti(tmp_path / "net.pt2"),
        formats.open_onnx(tmp_path / "net.onnx"),
        formats.open_openvino(tmp_path / "net.xml"),
    ):
        for count in (1, 2, 3):
            images = torch.randn(count, 3, 32, 32)
            with torch.no_grad():
                (found,), wanted = run(images), expected(images.double())
            assert (found - wanted).abs().max() < 1e-5 * wanted.abs().max()


def test_a_detector_is_right_at_its_size_and_takes_no_other(tmp_path):
    from slimconv_lit.heads import faster_rcnn

    settings = {"min_size": 64, "pyramid_width": 16, "head_width": 32, "rpn_post_nms_top_n_test": 20}
    network = faster_rcnn("cifar_resnet20", "SlimConv2d", 3, box_score_thresh=0.0, **settings).eval()
    path = tmp_path / "net.onnx"
    formats.write_detector(network, torch.rand(1, 3, 64, 80), path, {})
    run = formats.open_onnx(path)
    for image in torch.rand(2, 1, 3, 64, 80):
        with torch.no_grad():
            (expected,) = network([image[0]])
        row = verb.compare_detections(expected, run(image), (64, 80))
        assert row["objects"] > 0
        assert row["others"] == 0
    with pytest.raises(Exception, match="invalid dimensions"):
        run(torch.rand(1, 3, 96, 80))
    few = {key: value[:2] for key, value in expected.items()}
    with pytest.raises(UsageError, match="nothing is written: the file finds"):
        verb.compare_detections(few, run(image), (64, 80))


class PadsSmallImages(torch.nn.Module):
    """Takes another way with small images, which a trace with large ones does not see."""

    def forward(self, x):
        return x.mean((2, 3)) if x.shape[2] >= 20 else -x.mean((2, 3))


def test_the_least_size_is_found(tmp_path):
    path = tmp_path / "net.onnx"
    network = PadsSmallImages().eval()
    formats.write_onnx(formats.trace(network, torch.randn(2, 3, 96, 96)), path, {})
    rows, least = verb.check(network, formats.open_onnx(path), (3, 64, 64), True, verb.TOLERANCE)
    assert least == 20
    assert [row["images"] for row in rows] == ["2x3x96x96", "1x3x64x64", "3x3x64x64", "1x3x96x96", "1x3x77x71"]


def test_weights_in_bfloat16_halve_a_file(tmp_path):
    path = tmp_path / "net.onnx"
    network = torch.nn.Sequential(torch.nn.Conv2d(3, 64, 3), torch.nn.ReLU(), torch.nn.Conv2d(64, 64, 3)).eval()
    images = torch.randn(2, 3, 16, 16)
    formats.write_onnx(formats.trace(network, images), path, {"mean": [0.5]})
    size = path.stat().st_size
    formats.halve_weights(path)
    assert path.stat().st_size < 0.6 * size
    for layer in (network[0], network[2]):
        layer.weight.data = layer.weight.data.bfloat16().float()
    with torch.no_grad():
        torch.testing.assert_close(formats.open_onnx(path)(images)[0], network(images), rtol=1e-4, atol=1e-5)


def test_a_file_that_computes_something_else_is_not_left_behind(runs, monkeypatch, capsys):
    monkeypatch.chdir(runs)
    before = {path.name for path in (runs / "runs" / "tiny").iterdir()}
    monkeypatch.setattr(formats, "trace", lambda network, images, free: torch.export.export(Wrong(), (images,)))
    assert main(["export", "--ckpt_path=last", "--name=tiny", "--format=torch_export", "--fixed_size"]) == 2
    assert "nothing is written: the file differs from the network by" in capsys.readouterr().err
    assert {path.name for path in (runs / "runs" / "tiny").iterdir()} == before


class Wrong(torch.nn.Module):
    def forward(self, x):
        return x.mean((1, 2, 3))[:, None].expand(-1, 10).clone()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--format=onxx"], "--format: there is no 'onxx'; did you mean 'onnx'?"),
        (["--precision=int4"], "--precision: there is no 'int4'; did you mean 'int8'?"),
        (["--format=aoti", "--precision=int8"], "--format aoti has no int8; onnx and openvino have"),
        (["--output=missing/net.onnx"], "--output: there is no folder 'missing'"),
        (["--output=net.pt2"], "a file of --format onnx ends in .onnx, not '.pt2'"),
        (["--calibration=photos"], "--calibration is for --precision int8"),
        (["--input_size", "1", "2", "3"], "--input_size takes a side, or a height and a width"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_mistakes(in_tmp, capsys, words, message):
    assert main(["export", "--ckpt_path=last", *words]) == 2
    assert message in capsys.readouterr().err


def test_a_folder_that_cannot_be_written_to(in_tmp, capsys, monkeypatch):
    def refuse(**kwargs):
        raise PermissionError(13, "Permission denied")

    # Tests may run as root, whom permission bits do not stop.
    monkeypatch.setattr(verb.tempfile, "TemporaryDirectory", refuse)
    assert main(["export", "--ckpt_path=last", "--output=net.onnx"]) == 2
    assert "cannot write into '.': Permission denied" in capsys.readouterr().err


def test_a_missing_package_names_the_extra(in_tmp, capsys, monkeypatch):
    monkeypatch.setattr(formats, "find_spec", lambda name: None if name == "onnxruntime" else object())
    assert main(["export", "--ckpt_path=last"]) == 2
    assert 'needs onnxruntime: pip install "slimconv_lit[export]"' in capsys.readouterr().err


def test_a_file_that_is_no_checkpoint_of_ours(in_tmp, capsys):
    torch.save(torch.nn.Linear(2, 2).state_dict(), "weights.pth")
    (in_tmp / "notes.ckpt").write_text("not a checkpoint")
    for name in ("weights.pth", "notes.ckpt"):
        assert main(["export", f"--ckpt_path={name}"]) == 2
        assert name in capsys.readouterr().err
    assert not list(in_tmp.glob("runs/*/*"))
