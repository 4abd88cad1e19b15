"""Shards are the folder that they were made from, image by image, or an error that names the file."""

import json
import shutil
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image

from slimconv_lit.cli import main
from slimconv_lit.data import ImageNetDataModule
from slimconv_lit.data.files import DataError

COUNTS = {"train": 9, "val": 4}


def write_folder(root):
    rng = np.random.default_rng(0)
    for split, count in COUNTS.items():
        for number in range(count):
            # The last one's name is longer than a tar's header has room for.
            name = f"{split}_{number}{'x' * 120 * (number == 8)}.JPEG"
            path = root / split / ("cat", "dog")[number % 2] / name
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(0, 256, (40, 48, 3), dtype=np.uint8)).save(path)


def prepare(*words):
    return main(["prepare", "--shard_images=4", "--workers=2", *words])


def make(root, **own):
    return ImageNetDataModule(root=str(root), image_size=32, batch_size=3, num_workers=0, seed=7, **own)


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    """A folder with the images, and one with their shards."""
    root = tmp_path_factory.mktemp("packed")
    write_folder(root / "images")
    assert prepare(f"--data.root={root / 'images'}", f"--output={root / 'shards'}") == 0
    return root


@pytest.fixture
def shards(packed, tmp_path):
    """Shards to be damaged."""
    return shutil.copytree(packed / "shards", tmp_path / "shards")


@pytest.mark.parametrize("own", [{}, {"val_fraction": 0.4}], ids=str)
def test_batches_from_shards_are_those_from_the_folder(packed, own):
    of_folder, of_shards = (make(packed / kind, **own) for kind in ("images", "shards"))
    assert of_shards.class_names == of_folder.class_names == ("cat", "dog")
    for name in ("train_dataloader", "val_dataloader", "test_dataloader"):
        loaders = [getattr(data, name)() for data in (of_folder, of_shards)]
        if name.startswith("train"):
            for loader in loaders:
                loader.sampler.set_epoch(3)
        for (images, labels), (others, other_labels) in zip(*loaders, strict=True):
            assert torch.equal(images, others)
            assert torch.equal(labels, other_labels)


def test_shards_are_ordinary_tar_files_with_checksums(packed, capsys):
    manifest = json.loads((packed / "shards" / "manifest.json").read_text())
    files = [name for split in manifest["splits"].values() for name in split["files"]]
    assert {path.name for path in (packed / "shards").iterdir()} == {"manifest.json", *files}
    assert [name for name in files if name.startswith("train")] == [
        "train.npy", *(f"train-{number:05d}.tar" for number in range(3))
    ]  # fmt: skip
    with tarfile.open(packed / "shards" / "train-00000.tar") as tar:
        names = tar.getnames()
        assert names == [f"cat/train_{number}.JPEG" for number in (0, 2, 4, 6)]
        assert tar.extractfile(names[1]).read() == (packed / "images" / "train" / names[1]).read_bytes()
    assert main(["prepare", f"--output={packed / 'shards'}", "--verify"]) == 0
    assert "all whole" in capsys.readouterr().out


def test_an_interrupted_prepare_goes_on(tmp_path, packed, capsys):
    images, output = shutil.copytree(packed / "images", tmp_path / "images"), tmp_path / "shards"
    words = [f"--data.root={images}", f"--output={output}", "--workers=1"]
    last = images / "train" / "dog" / "train_7.JPEG"
    whole = last.read_bytes()
    # Found when the last shard is being written.
    last.write_bytes(whole[:-200])
    assert prepare(*words) == 2
    assert f"error: {last} cannot be decoded" in capsys.readouterr().err
    assert not (output / "manifest.json").exists()
    written = {path.name: path.stat().st_mtime_ns for path in output.glob("*.tar")}
    assert set(written) == {"train-00000.tar", "train-00001.tar"}
    # What has been cut off is made again, too.
    (output / "train-00001.tar").write_bytes(b"half")
    last.write_bytes(whole)
    assert prepare(*words) == 0
    assert (output / "train-00000.tar").stat().st_mtime_ns == written["train-00000.tar"]
    for path in (packed / "shards").iterdir():
        assert (output / path.name).read_bytes() == path.read_bytes()
    assert {path.name for path in output.iterdir()} == {path.name for path in (packed / "shards").iterdir()}
    # All is there: nothing is written. Other images: neither.
    assert prepare(*words) == 0
    assert (output / "train-00000.tar").stat().st_mtime_ns == written["train-00000.tar"]
    last.unlink()
    assert prepare(*words) == 2
    assert f"error: {output} has shards of other images. Name another --output" in capsys.readouterr().err


def test_a_damaged_shard_is_named_before_training(shards, capsys):
    path = shards / "train-00001.tar"
    size = path.stat().st_size
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(DataError, match=rf"train-00001\.tar has {size - 1000:,} bytes, not {size:,}"):
        make(shards).setup("fit")
    path.unlink()
    with pytest.raises(DataError, match=r"train-00001\.tar is missing"):
        make(shards).setup("fit")
    assert main(["prepare", f"--output={shards}", "--verify"]) == 2
    assert f"error: 1 of 6 files are missing or damaged: {path}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("where", "said"),
    [(257, r"train-00000\.tar is damaged at byte 512"), (512, r"train-00000\.tar/cat/train_0\.JPEG cannot be decoded")],
    ids=["header", "image"],
)
def test_damage_inside_a_shard_is_named_when_it_is_read(shards, where, said, capsys):
    path = shards / "train-00000.tar"
    content = bytearray(path.read_bytes())
    content[where : where + 64] = bytes(64)
    path.write_bytes(content)
    with pytest.raises(DataError, match=said):
        make(shards).dataset("train")[0]
    assert main(["prepare", f"--output={shards}", "--verify"]) == 2
    assert str(path) in capsys.readouterr().err


@pytest.mark.parametrize("field", ["shard", "offset", "bytes", "label", None])
def test_an_index_that_points_elsewhere_is_named(shards, field):
    path = shards / "train.npy"
    if field is None:
        path.write_bytes(bytes(path.stat().st_size))
    else:
        rows = np.load(path)
        rows[field][3] = 0 if field == "offset" else 2**32 - 1
        np.save(path, rows)
    with pytest.raises(DataError, match=r"train\.npy is damaged"):
        make(shards).setup("fit")


def lacking(*keys):
    """A change of a manifest: what lies there is gone."""

    def change(text):
        manifest = inner = json.loads(text)
        for key in keys[:-1]:
            inner = inner[key]
        del inner[keys[-1]]
        return json.dumps(manifest)

    return change


@pytest.mark.parametrize(
    "change",
    [
        *(lambda _, text=text: text for text in ("", "[]", '{"splits": 3}', '{"format": "x", "splits": {}}')),
        lambda _: "[" * 100_000,
        lambda text: text.replace("train-00000.tar", "../x.tar"),
        lambda text: text.replace('"cat"', "5"),
        lacking("classes"),
        lacking("splits", "train", "images"),
        lacking("splits", "train", "files", "train.npy"),
        lacking("splits", "train", "files", "train.npy", "bytes"),
    ],
)
def test_a_manifest_that_is_none_is_named(shards, change, capsys):
    path = shards / "manifest.json"
    path.write_text(change(path.read_text()))
    with pytest.raises(DataError, match=r"manifest\.json is damaged"):
        make(shards)
    assert main(["prepare", f"--output={shards}", "--verify"]) == 2
    assert f"error: {path} is damaged" in capsys.readouterr().err


def test_missing_images_and_strange_numbers_are_told(tmp_path, capsys):
    assert prepare(f"--data.root={tmp_path / 'nowhere'}", f"--output={tmp_path / 'out'}") == 2
    assert "error: no train images in root=" in capsys.readouterr().err
    assert prepare(f"--output={tmp_path}", "--workers=-1") == 2
    assert "must be at least 1" in capsys.readouterr().err
    assert main(["prepare", f"--output={tmp_path}", "--verify"]) == 2
    assert "manifest.json" in capsys.readouterr().err
