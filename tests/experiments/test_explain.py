import csv

import pytest
from PIL import Image

from slimconv_lit.cli import main

SHORT = ["--trainer.max_epochs=1", "--trainer.limit_train_batches=2", "--trainer.accelerator=cpu"]
QUIET = ["--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    root = tmp_path_factory.mktemp("explained")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        for name, operator in (("slim", "SlimConv2d"), ("plain", "null")):
            words = ["--config=quickstart.yaml", *SHORT, *QUIET, "--test_after=false"]
            assert main(["fit", *words, f"--model.operator={operator}", f"--name={name}"]) == 0
    return root


def pictures(root, name):
    (folder,) = (root / "runs" / name).glob("*-explain")
    return folder, {path.name for path in (folder / "pictures").iterdir()}


def test_a_slim_classifier(runs, monkeypatch, capsys):
    monkeypatch.chdir(runs)
    assert main(["explain", "--ckpt_path=last", "--name=slim", "--images=20"]) == 0
    folder, drawn = pictures(runs, "slim")
    assert f"in {folder.relative_to(runs)}" in capsys.readouterr().out
    assert drawn == {"cam.png", "gates.png", "maps.png", "redundancy.png"}
    with (folder / "redundancy.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 18
    assert sum(bool(row["channels folded"]) for row in rows) == 9


def test_a_plain_classifier_and_a_folder(runs, monkeypatch):
    monkeypatch.chdir(runs)
    (runs / "photos").mkdir()
    for number in range(3):
        Image.new("L", (20, 30), number * 90).save(runs / "photos" / f"{number}.png")
    words = ["--name=plain", "--data", "photos", "--shown=2", "--layer=layer2.0.conv2"]
    assert main(["explain", "--ckpt_path=last", *words]) == 0
    assert pictures(runs, "plain")[1] == {"cam.png", "maps.png", "redundancy.png"}


def test_mistakes(runs, monkeypatch, capsys):
    monkeypatch.chdir(runs)
    (runs / "empty").mkdir()
    assert main(["explain", "--ckpt_path=last", "--name=slim", "--data", "empty"]) == 2
    assert "has no image" in capsys.readouterr().err
    assert main(["explain", "--ckpt_path=last", "--name=slim", "--layer=layer1.0.conv3"]) == 2
    assert "'layer1.0.conv3'; did you mean 'layer1.0.conv2'" in capsys.readouterr().err
    for words in (["--images=0"], ["--shown=0", "--images=8"]):
        assert main(["explain", "--ckpt_path=last", "--name=slim", *words]) == 2
        assert f"error: explain: {words[0]} must be at least 1" in capsys.readouterr().err
    assert main(["explain", "--ckpt_path=nowhere.ckpt"]) == 2
    assert "no file 'nowhere.ckpt'" in capsys.readouterr().err


def test_a_network_of_other_layers_is_refused(in_tmp, capsys):
    words = ["--config=quickstart.yaml", *SHORT, *QUIET, "--test_after=false", "--data.image_size=160"]
    assert main(["fit", *words, "--model.backbone=timm:test_vit", "--trainer.limit_val_batches=1"]) == 0
    assert main(["explain", "--ckpt_path=last", "--images=2"]) == 2
    assert "error: explain looks at operators and convolutions that read feature maps; this" in capsys.readouterr().err
