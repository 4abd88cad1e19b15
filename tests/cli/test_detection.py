"""Detection through `main`, as a user types it: on the sample, on odd images, on a real subset."""

import csv
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from slimconv_lit.cli import main
from slimconv_lit.lightning_cli import run

SHARED = Path(__file__).parents[2] / "../shared/data"
QUIET = [
    *(f"--trainer.{what}=false" for what in ("enable_progress_bar", "enable_model_summary")),
    "--trainer.accelerator=cpu",
    "--data.num_workers=0",
]
SMALL = ["--model.min_size=64", "--model.max_size=96"]
SHORT = [
    *QUIET,
    *SMALL,
    "--config=det_sample.yaml",
    "--trainer.max_epochs=1",
    "--trainer.check_val_every_n_epoch=1",
    *(f"--trainer.limit_{stage}_batches=2" for stage in ("train", "val", "test", "predict")),
    "--data.batch_size=2",
]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("data")


@pytest.fixture(scope="module")
def fitted(tmp_path_factory, root):
    """The run folder of a short fit on the sample."""
    folder = tmp_path_factory.mktemp("fitted")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert main(["fit", *SHORT, f"--data.root={root}"]) == 0
    (run_folder,) = (folder / "runs" / "det_sample").iterdir()
    return run_folder


def test_what_a_fit_leaves_behind(fitted):
    assert "validation.png" in {path.name for path in (fitted / "pictures").iterdir()}
    with (fitted / "per_class.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 20
    assert {row["objects"] for row in rows[10:]} == {"0"}, "no digit is a dog or a monitor"
    with (fitted / "metrics.csv").open() as file:
        names = set(next(csv.reader(file)))
    parts = {f"train/loss{part}" for part in ("", "_classifier", "_box_reg", "_objectness", "_rpn_box_reg")}
    assert {"val/map", *parts} <= names
    results = json.loads((fitted / "results.json").read_text())
    assert results["network"].endswith("SlimConv2d k=4/3")
    shown = [float(row["ap"]) for row in rows if row["ap"]]
    assert results["test/map"] == pytest.approx(np.mean(shown), abs=1e-4)
    assert results["macs"] > 0
    # Linked from the datamodule.
    assert torch.load(fitted / "checkpoints" / "last.ckpt", weights_only=True)["hyper_parameters"]["num_classes"] == 20


def test_a_checkpoint_alone_is_enough_to_test_and_predict(fitted, in_tmp):
    checkpoint = f"--ckpt_path={fitted / 'checkpoints' / 'last.ckpt'}"
    cli = run("test", [checkpoint, *QUIET, "--trainer.limit_test_batches=2"])
    results = json.loads((fitted / "results.json").read_text())
    assert float(cli.trainer.callback_metrics["test/map"]) == pytest.approx(results["test/map"])
    assert (cli.run_folder.path / "per_class.csv").is_file()
    cli = run("predict", [checkpoint, *QUIET, "--trainer.limit_predict_batches=2", "--model.draw_score=0.01"])
    rows = json.loads((cli.run_folder.path / "predictions.json").read_text())
    test = cli.datamodule.dataset("test").source
    # VOC's images have no numbers of their own; the names tell which they are.
    assert {row["file_name"] for row in rows} <= {test[index][1]["name"] for index in range(4)}
    drawn = cli.run_folder.path / "predictions" / "boxes"
    assert {path.name for path in drawn.iterdir()} == {test[index][1]["name"] for index in range(4)}


def test_any_folder_of_images(fitted, in_tmp):
    """Grey, CMYK, with a palette, one pixel wide, lying on its side, in a subfolder, two of one name."""
    (in_tmp / "photos" / "sub").mkdir(parents=True)
    colours = Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 50, 3), dtype=np.uint8))
    colours.convert("L").save(in_tmp / "photos" / "grey.png")
    colours.convert("CMYK").save(in_tmp / "photos" / "print.jpg")
    colours.convert("P").save(in_tmp / "photos" / "sub" / "palette.png")
    colours.resize((1, 70)).save(in_tmp / "photos" / "narrow.png")
    colours.resize((70, 1)).save(in_tmp / "photos" / "flat.jpg")
    colours.resize((900, 400)).save(in_tmp / "photos" / "large.jpg")
    exif = Image.Exif()
    exif[0x0112] = 6
    colours.save(in_tmp / "photos" / "turned.jpg", exif=exif)
    colours.save(in_tmp / "photos" / "turned.png")
    checkpoint = f"--ckpt_path={fitted / 'checkpoints' / 'best.ckpt'}"
    cli = run("predict", [checkpoint, "--data", "photos", *QUIET])
    names = sorted(path.relative_to("photos").as_posix() for path in Path("photos").rglob("*.*"))
    drawn = cli.run_folder.path / "predictions" / "boxes"
    sizes = {path.relative_to(drawn).as_posix(): Image.open(path).size for path in drawn.rglob("*.*")}
    assert sorted(sizes) == names
    assert sizes["large.jpg"] == (900, 400)
    assert sizes["turned.jpg"] == (320, 400)
    assert max(sizes["narrow.png"]) <= 1280
    rows = json.loads((cli.run_folder.path / "predictions.json").read_text())
    assert {row["image_id"] for row in rows} <= set(range(1, len(names) + 1))
    assert all(names[row["image_id"] - 1] == row["file_name"] for row in rows)
    on_large = [row["bbox"] for row in rows if row["file_name"] == "large.jpg"]
    assert on_large
    assert all(0 <= x <= x + w <= 900.01 and 0 <= y <= y + h <= 400.01 for x, y, w, h in on_large)
    assert (cli.run_folder.path / "pictures" / "predictions.png").is_file()


def test_a_loss_that_is_not_finite_is_an_answer_not_a_traceback(in_tmp, root, capsys):
    wild = ["--model.lr=1e30", "--model.warmup_epochs=0", "--trainer.gradient_clip_val=null", f"--data.root={root}"]
    assert main(["fit", *SHORT, *wild]) == 2
    message = capsys.readouterr().err
    assert "not finite" in message
    assert ".jpg" in message
    assert "Traceback" not in message


def test_a_real_subset(in_tmp):
    """Six images of blood cells in the layout of VOC2007, with classes of their own, through VOC2007's recipe."""
    if not (SHARED / "bccd_voc.tar").is_file():
        pytest.skip("needs ../shared/data/bccd_voc.tar, which only development machines have")
    tree = "bccd/VOC2007"
    with tarfile.open(SHARED / "bccd_voc.tar") as tar:
        for split, count in (("train", 4), ("val", 2), ("test", 2)):
            listed = f"{tree}/ImageSets/Main/{split}.txt"
            tar.extract(listed, in_tmp, filter="data")
            names = Path(listed).read_text().split()[:count]
            Path(listed).write_text("\n".join(names))
            for name in names:
                for path in (f"JPEGImages/{name}.jpg", f"Annotations/{name}.xml"):
                    tar.extract(f"{tree}/{path}", in_tmp, filter="data")
    words = ["--config=det_voc.yaml", "--data.root=bccd", "--data.folder=VOC2007", "--data.val_on_test=false", *QUIET]
    words += ["--data.class_names=[RBC,WBC,Platelets]", "--data.batch_size=2", "--model.backbone=torchvision:resnet18"]
    # As few pixels and regions.
    words += ["--model.min_size=96", "--model.max_size=128", "--model.head.rpn_post_nms_top_n_test=20"]
    assert main(["fit", *words, "--trainer.max_steps=2", "--model.head.box_batch_size_per_image=16"]) == 0
    (folder,) = (in_tmp / "runs" / "det_voc").iterdir()
    assert (folder / "pictures" / "validation.png").is_file()
    with (folder / "per_class.csv").open() as file:
        rows = {row["class"]: int(row["objects"]) for row in csv.DictReader(file)}
    xml = "".join(Path(f"{tree}/Annotations/{name}.xml").read_text() for name in names)
    assert rows == {name: xml.count(f"<name>{name}</name>") for name in ("RBC", "WBC", "Platelets")}
    assert main(["predict", "--ckpt_path=best", "--name=det_voc", *QUIET]) == 0
    (predicted,) = (in_tmp / "runs" / "det_voc").glob("*-predict")
    assert {path.stem for path in (predicted / "predictions" / "boxes").iterdir()} == set(names)
