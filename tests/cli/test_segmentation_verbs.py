"""Segmentation through `main`, as a user types it: on the sample, on odd images, on a real subset."""

import csv
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from slimconv_lit.cli import main
from slimconv_lit.data.voc import palette
from slimconv_lit.lightning_cli import run

SHARED = Path(__file__).parents[2] / "../shared/data"
QUIET = [
    *(f"--trainer.{what}=false" for what in ("enable_progress_bar", "enable_model_summary")),
    "--trainer.accelerator=cpu",
    "--data.num_workers=0",
]
SHORT = [
    *QUIET,
    "--config=seg_sample.yaml",
    "--trainer.max_epochs=1",
    *(f"--trainer.limit_{stage}_batches=2" for stage in ("train", "val", "test", "predict")),
    "--data.batch_size=2",
    "--data.crop_size=49",
]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("data")


@pytest.fixture(scope="module")
def fitted(tmp_path_factory, root):
    """The run folder of a short fit on the sample, with crops evaluated too."""
    folder = tmp_path_factory.mktemp("fitted")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert main(["fit", *SHORT, f"--data.root={root}", "--data.crop_eval=true"]) == 0
    (run_folder,) = (folder / "runs" / "seg_sample").iterdir()
    return run_folder


def test_what_a_fit_leaves_behind(fitted):
    assert {path.name for path in (fitted / "pictures").iterdir()} == {"validation.png", "per_class.png"}
    with (fitted / "per_class.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 21
    assert [row["class"] for row in rows[::20]] == ["background", "tvmonitor"]
    for row in rows:
        occurs = int(row["pixels"]) + int(row["predicted_pixels"])
        assert (row["iou"] != "") == (occurs > 0)
    assert not any(int(row["pixels"]) for row in rows[11:]), "the digits are the first ten classes"
    with (fitted / "metrics.csv").open() as file:
        names = set(next(csv.reader(file)))
    scores = {"miou", "pixel_accuracy", "miou_crop", "pixel_accuracy_crop"}
    assert {"train/loss", "val/loss", *(f"val/{name}" for name in scores)} <= names
    results = json.loads((fitted / "results.json").read_text())
    assert {f"test/{name}" for name in scores} == {key for key in results if key.startswith("test/")}
    assert results["network"].endswith("SlimConv2d k=4/3")
    shown = [float(row["iou"]) for row in rows if row["iou"]]
    assert results["test/miou"] == pytest.approx(np.mean(shown), abs=1e-4)
    assert torch.load(fitted / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == 2


def test_a_checkpoint_alone_is_enough_to_test_and_predict(fitted, in_tmp):
    checkpoint = f"--ckpt_path={fitted / 'checkpoints' / 'last.ckpt'}"
    cli = run("test", [checkpoint, *QUIET, "--trainer.limit_test_batches=2"])
    results = json.loads((fitted / "results.json").read_text())
    # Training ends with its best checkpoint, which here is the only one.
    assert float(cli.trainer.callback_metrics["test/miou"]) == pytest.approx(results["test/miou"])
    assert cli.datamodule.crop_eval
    assert (cli.run_folder.path / "per_class.csv").is_file()
    cli = run("predict", [checkpoint, *QUIET, "--trainer.limit_predict_batches=2", "--model.tta_flip=true"])
    assert cli.model.hparams["tta_flip"]
    masks = sorted((cli.run_folder.path / "predictions" / "masks").iterdir())
    originals = [cli.datamodule.dataset("val").source.images[index] for index in (0, 1)]
    assert [path.stem for path in masks] == [path.stem for path in originals]
    assert [Image.open(path).size for path in masks] == [Image.open(path).size for path in originals]


def test_any_folder_of_images(fitted, in_tmp):
    """Grey, CMYK, with a palette, one pixel wide, lying on its side, in a subfolder, two of one name."""
    (in_tmp / "photos" / "sub").mkdir(parents=True)
    colours = Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 50, 3), dtype=np.uint8))
    colours.convert("L").save(in_tmp / "photos" / "grey.png")
    colours.convert("CMYK").save(in_tmp / "photos" / "print.jpg")
    colours.convert("P").save(in_tmp / "photos" / "sub" / "palette.png")
    colours.resize((1, 70)).save(in_tmp / "photos" / "narrow.png")
    colours.resize((70, 1)).save(in_tmp / "photos" / "flat.jpg")
    exif = Image.Exif()
    exif[0x0112] = 6
    colours.save(in_tmp / "photos" / "turned.jpg", exif=exif)
    colours.save(in_tmp / "photos" / "turned.png")
    checkpoint = f"--ckpt_path={fitted / 'checkpoints' / 'best.ckpt'}"
    cli = run("predict", [checkpoint, "--data", "photos", *QUIET])
    folder = cli.run_folder.path / "predictions"
    sizes = {
        "flat": (70, 1),
        "grey": (50, 40),
        "narrow": (1, 70),
        "print": (50, 40),
        "sub/palette": (50, 40),
        "turned": (40, 50),
        "turned.png": (50, 40),
    }
    for kind, suffix in (("masks", ".png"), ("overlays", ".jpg")):
        written = {
            path.relative_to(folder / kind).as_posix().removesuffix(suffix): Image.open(path)
            for path in (folder / kind).rglob(f"*{suffix}")
        }
        assert {name: image.size for name, image in written.items()} == sizes
        if kind == "masks":
            assert {image.mode for image in written.values()} == {"P"}
            assert written["grey"].getpalette()[: 3 * 21] == palette()[:21].ravel().tolist()
    assert (cli.run_folder.path / "pictures" / "predictions.png").is_file()


def test_without_data_the_way_out_is_named(in_tmp, capsys):
    assert main(["fit", "--config=seg_voc.yaml", *QUIET]) == 2
    message = capsys.readouterr().err
    assert "data/voc" in message
    assert "--data.download=true" in message
    assert "--data.sample=true" in message


def test_a_classifier_s_weights_from_the_command_line(in_tmp, root, capsys):
    from slimconv_lit import create_backbone

    torch.save(create_backbone("torchvision:resnet18", "SlimConv2d").state_dict(), "sc_resnet18.pth")
    own = ["--model.backbone=torchvision:resnet18", "--model.weights=sc_resnet18.pth", f"--data.root={root}"]
    assert main(["fit", *SHORT, *own, "--trainer.limit_val_batches=0", "--test_after=false"]) == 0
    (folder,) = (in_tmp / "runs" / "seg_sample").iterdir()
    assert "weights: sc_resnet18.pth" in (folder / "config.yaml").read_text()
    own[1] = "--model.weights=nothing.pth"
    assert main(["fit", *SHORT, *own]) == 2
    assert "nothing.pth" in capsys.readouterr().err


def test_a_real_subset(in_tmp):
    """Six photographs in the layout of VOC2012, with masks, through the recipe of VOC2012 Aug."""
    if not (SHARED / "voc_from_coco.tar").is_file():
        pytest.skip("needs ../shared/data/voc_from_coco.tar, which only development machines have")
    lists = Path("VOCdevkit/VOC2012/ImageSets/Segmentation")
    with tarfile.open(SHARED / "voc_from_coco.tar") as tar:
        tar.extractall(
            in_tmp, [tar.getmember(f"{lists.as_posix()}/{split}.txt") for split in ("train", "val")], filter="data"
        )
        for split, count in (("train", 4), ("val", 2)):
            names = (in_tmp / lists / f"{split}.txt").read_text().split()[:count]
            (in_tmp / lists / f"{split}.txt").write_text("\n".join(names))
            for name in names:
                for path in (f"JPEGImages/{name}.jpg", f"SegmentationClassAug/{name}.png"):
                    tar.extract(f"VOCdevkit/VOC2012/{path}", in_tmp, filter="data")
    words = ["--config=seg_voc.yaml", "--data.root=.", "--data.train_list=train", *QUIET]
    # A slimmer backbone, for time; and as few pixels.
    words += ["--model.backbone=torchvision:resnet18", "--data.batch_size=2", "--data.crop_size=65"]
    assert main(["fit", *words, "--trainer.max_steps=2"]) == 0
    (folder,) = (in_tmp / "runs" / "seg_voc").iterdir()
    assert (folder / "pictures" / "validation.png").is_file()
    with (folder / "per_class.csv").open() as file:
        pixels = sum(int(row["pixels"]) for row in csv.DictReader(file))
    masks = [np.asarray(Image.open(f"VOCdevkit/VOC2012/SegmentationClassAug/{name}.png")) for name in names]
    assert pixels == sum(int((mask != 255).sum()) for mask in masks)
    assert main(["predict", "--ckpt_path=best", "--name=seg_voc", *QUIET]) == 0
    (predicted,) = (in_tmp / "runs" / "seg_voc").glob("*-predict")
    written = sorted((predicted / "predictions" / "masks").iterdir())
    assert [Image.open(path).size for path in written] == [mask.shape[::-1] for mask in masks]
