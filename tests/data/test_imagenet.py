import hashlib
import io
import json
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.io import savemat
from torchvision.datasets import imagenet

from slimconv_lit.cli import main
from slimconv_lit.data import ImageNetDataModule
from slimconv_lit.data.files import DataError


def write_tree(root, splits, classes, count=4, size=(48, 40)):
    rng = np.random.default_rng(0)
    for split in splits:
        for name in classes:
            (root / split / name).mkdir(parents=True)
            for number in range(count):
                pixels = rng.integers(0, 256, (*size, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(root / split / name / f"{number}.JPEG")


def make(root, **own):
    return ImageNetDataModule(root=str(root), image_size=32, batch_size=8, num_workers=0, **own)


def test_without_data_it_is_imagenet(tmp_path):
    data = ImageNetDataModule(root=str(tmp_path / "nowhere"))
    assert (data.num_classes, data.input_size) == (1000, (3, 224, 224))
    assert (data.class_names[0], data.class_names[-1]) == ("tench", "toilet tissue")


def test_classes_are_counted_at_construction(tmp_path):
    write_tree(tmp_path, ["train", "val"], ["cat", "ant", "bee"])
    data = make(tmp_path)
    assert (data.num_classes, data.class_names) == (3, ("ant", "bee", "cat"))
    with pytest.raises(
        ValueError, match=r"num_classes=5, but .*train has 3 classes; leave num_classes out or set it to 3"
    ):
        make(tmp_path, num_classes=5)


def test_a_thousand_wordnet_folders_have_names(tmp_path):
    for number in range(1000):
        (tmp_path / "train" / f"n{number:08d}").mkdir(parents=True)
    assert make(tmp_path).class_names[0] == "tench"


def test_splits_come_from_folders(tmp_path):
    write_tree(tmp_path, ["train", "validation"], ["a", "b"])
    data = make(tmp_path)
    assert [len(data.dataset(split)) for split in ("train", "val", "test")] == [8, 8, 8]
    assert torch.equal(data.dataset("test")[3][0], data.dataset("val")[3][0])
    write_tree(tmp_path, ["test"], ["a", "b"], count=5)
    assert len(make(tmp_path).dataset("test")) == 10


def test_unlabelled_official_test_images_do_not_count(tmp_path):
    write_tree(tmp_path, ["train", "val"], ["a", "b"])
    (tmp_path / "test").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "test" / "ILSVRC2012_test_00000001.JPEG")
    assert len(make(tmp_path).dataset("test")) == 8


def test_validation_can_be_held_out_of_train(tmp_path):
    write_tree(tmp_path, ["train", "test"], ["a", "b"], count=10)
    data = make(tmp_path, val_fraction=0.2)
    assert [len(data.dataset(split)) for split in ("train", "val", "test")] == [16, 4, 20]
    assert sorted(data.dataset("val").source[i][1] for i in range(4)) == [0, 0, 1, 1]
    with pytest.raises(FileNotFoundError, match=r"no val images.*--data\.val_fraction=0\.1.*--data\.sample=true"):
        make(tmp_path).setup("validate")


def test_train_alone_trains_and_tests_as_the_hint_says(in_tmp, capsys, caplog):
    write_tree(in_tmp / "photos", ["train"], ["a", "b"], count=10)
    fit = ["fit", "--config=quickstart.yaml", "--model.backbone=timm:test_resnet", "--data=ImageNetDataModule"]
    fit += ["--data.root=photos", "--data.image_size=32", "--data.num_workers=0", "--data.batch_size=8"]
    fit += ["--trainer.max_epochs=1", "--trainer.accelerator=cpu", "--logger=csv"]
    assert main(fit) == 2
    assert "neither photos/val with" in (told := capsys.readouterr().err)
    assert "--data.val_fraction=0.1" in told
    assert main([*fit, "--data.val_fraction=0.2"]) == 0
    assert "the images that were held out of train also test" in caplog.text
    (results,) = in_tmp.glob("runs/quickstart/*/results.json")
    assert 0 <= json.loads(results.read_text())["test/top1"] <= 1
    # What only the test would meet is told before the training too.
    write_tree(in_tmp / "photos", ["test"], ["a", "c"])
    assert main([*fit, "--data.val_fraction=0.2"]) == 2
    assert "test and photos/train must have the same class folders; only one has b, c" in capsys.readouterr().err
    assert len(list(in_tmp.glob("runs/quickstart/*"))) == 1


def test_a_part_too_small_to_hold_out_is_named(tmp_path):
    write_tree(tmp_path, ["train"], ["a", "b"])
    with pytest.raises(DataError, match=r"val_fraction=0\.05 of 8 images in 2 classes: .* an image of each class"):
        make(tmp_path, val_fraction=0.05).setup("fit")


def test_who_tests_alone_is_not_told_to_hold_out_of_train(tmp_path):
    write_tree(tmp_path, ["train"], ["a", "b"])
    with pytest.raises(FileNotFoundError, match=r"no test images in .*neither .*test with .* nor .*val\. ") as caught:
        make(tmp_path).setup("test")
    assert "val_fraction" not in str(caught.value)


@pytest.mark.parametrize(("eval_size", "shorter"), [(None, 256), (256, 293)])
def test_evaluation_resizes_as_documented(tmp_path, eval_size, shorter):
    data = ImageNetDataModule(root=str(tmp_path), eval_size=eval_size)
    size = eval_size or 224
    assert data.input_size == (3, size, size)
    # A ramp from left to right: how much of it the crop shows tells how far it was resized before.
    ramp = np.tile(np.linspace(0, 255, 640, dtype=np.uint8)[None, :, None], (640, 1, 3))
    image, _ = data.eval_transform(Image.fromarray(ramp), 0)
    shown = (image * torch.tensor(data.std).view(-1, 1, 1) + torch.tensor(data.mean).view(-1, 1, 1))[0, 0]
    assert image.shape == data.input_size
    assert abs(float(shown[-1] - shown[0]) - size / shorter) < 0.01


def test_class_folders_that_differ_are_refused_not_shifted(tmp_path):
    write_tree(tmp_path, ["train"], ["a", "b", "c"])
    write_tree(tmp_path, ["val"], ["a", "c"])
    with pytest.raises(ValueError, match=r"val and .*train must have the same class folders; only one has b"):
        make(tmp_path).setup("validate")


def test_a_checkpoint_names_the_classes_where_the_images_are_not(tmp_path):
    write_tree(tmp_path / "here", ["train", "val"], ["cat", "dog"])
    data = make(tmp_path / "here")
    elsewhere = ImageNetDataModule(**{**data.hparams, "root": str(tmp_path / "there")})
    assert elsewhere.num_classes == 2
    elsewhere.load_state_dict(data.state_dict())
    assert elsewhere.class_names == ("cat", "dog")


def test_missing_data_say_what_was_looked_for(tmp_path):
    with pytest.raises(FileNotFoundError) as caught:
        make(tmp_path).setup("fit")
    for said in (
        str(tmp_path / "train"),
        "ILSVRC2012_img_train.tar",
        "--data.root",
        "--data.sample=true",
        "image-net.org",
    ):
        assert said in str(caught.value)


def test_official_archives_are_unpacked_once(tmp_path, monkeypatch):
    source = tmp_path / "source"
    wnids = ("n00000001", "n00000002")
    write_tree(source, ["train"], wnids, count=2)
    root = tmp_path / "root"
    root.mkdir()
    with tarfile.open(root / "ILSVRC2012_img_train.tar", "w") as outer:
        for wnid in wnids:
            with tarfile.open(source / f"{wnid}.tar", "w") as inner:
                for file in sorted((source / "train" / wnid).iterdir()):
                    inner.add(file, f"{wnid}_{file.name}")
            outer.add(source / f"{wnid}.tar", f"{wnid}.tar")
    with tarfile.open(root / "ILSVRC2012_img_val.tar", "w") as outer:
        for number, wnid in enumerate((wnids[1], wnids[0]), start=1):
            outer.add(source / "train" / wnid / "0.JPEG", f"ILSVRC2012_val_{number:08d}.JPEG")
    fields = [("ILSVRC2012_ID", "O"), ("WNID", "O"), ("words", "O"), ("gloss", "O"), ("num_children", "O")]
    synsets = np.array(
        [(1, wnids[0], "cat, puss", "", 0), (2, wnids[1], "dog", "", 0), (3, "n3", "pet", "", 2)], fields
    )
    savemat(source / "meta.mat", {"synsets": synsets})
    with tarfile.open(root / "ILSVRC2012_devkit_t12.tar.gz", "w:gz") as devkit:
        devkit.add(source / "meta.mat", "ILSVRC2012_devkit_t12/data/meta.mat")
        truth = tarfile.TarInfo("ILSVRC2012_devkit_t12/data/ILSVRC2012_validation_ground_truth.txt")
        truth.size = 4
        devkit.addfile(truth, io.BytesIO(b"2\n1\n"))
    sums = {k: (n, hashlib.md5((root / n).read_bytes()).hexdigest()) for k, (n, _) in imagenet.ARCHIVE_META.items()}
    for name, value in sums.items():
        monkeypatch.setitem(imagenet.ARCHIVE_META, name, value)
    (root / "train.unpacking").mkdir()
    (root / "train.unpacking" / "left by a killed run").touch()

    data = make(root, num_classes=2)
    data.prepare_data()
    assert sorted(p.name for p in (root / "train").iterdir()) == list(wnids)
    assert sorted(p.name for p in (root / "val" / wnids[1]).iterdir()) == ["ILSVRC2012_val_00000001.JPEG"]
    assert not (root / "train.unpacking").exists()
    assert [len(data.dataset(split)) for split in ("train", "val")] == [4, 2]
    before = (root / "train").stat().st_mtime_ns
    data.prepare_data()
    assert (root / "train").stat().st_mtime_ns == before


def test_real_photos_of_clothing(unpack):
    root = unpack("clothing160.tar", lambda name: name.endswith(("0.jpg", "1.jpg"))) / "clothing"
    data = ImageNetDataModule(root=str(root), image_size=96, num_workers=0, batch_size=16)
    assert (data.num_classes, data.class_names[0], data.class_names[-1]) == (10, "dress", "t-shirt")
    assert len(data.dataset("train")) > len(data.dataset("val")) > 10
    assert len(data.dataset("test")) > 10
    for loader in (data.train_dataloader(), data.val_dataloader(), data.test_dataloader()):
        images, targets = next(iter(loader))
        assert images.shape[1:] == (3, 96, 96)
        assert 0 <= targets.min() <= targets.max() < 10


def test_real_thumbnails_of_cifar10(unpack):
    root = unpack("cifar10_jpeg.tar.xz", lambda name: name.endswith("0007.jpg") or ("/test/" in name and "01" in name))
    data = ImageNetDataModule(root=str(root / "cifar10img"), image_size=32, num_workers=0, val_fraction=0.5)
    assert data.class_names[:3] == ("airplane", "automobile", "bird")
    images, _ = next(iter(data.test_dataloader()))
    assert images.shape[1:] == (3, 32, 32)
    assert images.mean().abs() < 1
