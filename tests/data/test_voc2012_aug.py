"""VOC2012 Aug on small trees in the official layouts; counts are patched where a tree has to pass for the official."""

import gzip
import os
import shutil
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.io import loadmat, savemat
from torchvision.datasets.utils import calculate_md5

from slimconv_lit.data import VOC2012AugDataModule, files, samples, sbd, voc2012_aug
from slimconv_lit.data.files import DataError
from tests.data.conftest import SHARED

COUNTS = (4, 6, 4)
"""VOC's train list, SBD alone, VOC's val list: SBD also names two of each, so that 10 images train."""


@pytest.fixture(scope="session")
def official(tmp_path_factory):
    root = tmp_path_factory.mktemp("official")
    samples.write_voc2012(root, COUNTS)
    samples.write_sbd(root, COUNTS)
    return root


@pytest.fixture
def tree(official, tmp_path, monkeypatch):
    """VOC2012 and SBD below a folder of their own, taken for the official ones."""
    monkeypatch.setattr(voc2012_aug, "COUNTS", {"train": 4, "val": 4})
    monkeypatch.setattr(voc2012_aug, "AUG_COUNT", 10)
    monkeypatch.setattr(sbd, "COUNTS", {"train": 7, "val": 3})
    return shutil.copytree(official, tmp_path / "root")


def make(root, **own):
    return VOC2012AugDataModule(**{"root": str(root), "crop_size": 64, "num_workers": 0, **own})


def prepared(root, stage="fit", **own):
    data = make(root, **own)
    data.prepare_data()
    data.setup(stage)
    return data


def voc(root, *parts):
    return root.joinpath("VOCdevkit", "VOC2012", *parts)


def names(data, split):
    return [path.stem for path in data.dataset(split).source.images]


def lines(path):
    return path.read_text().split()


def test_everything_is_known_with_no_data():
    data = VOC2012AugDataModule(root="nowhere")
    assert (data.num_classes, data.input_size, data.ignore_index) == (21, (3, 513, 513), 255)
    assert data.class_names[:3] + data.class_names[-1:] == ("background", "aeroplane", "bicycle", "tvmonitor")
    assert data.palette[[0, 1, 15, 20, 255]].tolist() == [
        [0, 0, 0],
        [128, 0, 0],
        [192, 128, 128],
        [0, 64, 128],
        [224, 224, 192],
    ]
    with pytest.raises(ValueError, match="crop_size=0 must be at least 1"):
        VOC2012AugDataModule(crop_size=0)


def test_voc_train_and_all_of_sbd_train_but_for_voc_val(tree):
    data = prepared(tree)
    sbd_names = {
        *lines(tree / "benchmark_RELEASE/dataset/train.txt"),
        *lines(tree / "benchmark_RELEASE/dataset/val.txt"),
    }
    val = lines(voc(tree, "ImageSets/Segmentation/val.txt"))
    assert sbd_names & set(val)
    assert set(names(data, "train")) == {*lines(voc(tree, "ImageSets/Segmentation/train.txt")), *sbd_names} - set(val)
    assert len(names(data, "train")) == 10
    assert names(data, "val") == names(data, "test") == val


def test_masks_are_vocs_own_where_there_are_such_and_sbds_elsewhere(tree):
    source = prepared(tree).dataset("train").source
    own = set(lines(voc(tree, "ImageSets/Segmentation/train.txt")))
    for index, path in enumerate(source.images):
        mask = source[index][1].numpy()
        assert (255 in mask) == (path.stem in own)
        if path.stem not in own:
            written = Image.open(voc(tree, "SegmentationClassAug", f"{path.stem}.png"))
            assert written.mode == "P"
            assert written.getpalette() == Image.open(voc(tree, "SegmentationClass/2012_000000.png")).getpalette()
            stored = loadmat(tree / f"benchmark_RELEASE/dataset/cls/{path.stem}.mat")["GTcls"]["Segmentation"][0, 0]
            assert np.array_equal(mask, stored)


def test_all_10582_official_names(tmp_path):
    """The names of the augmented list in common use, split up as VOC2012 and SBD are, with the real counts."""
    listed = SHARED / "voc2012_train_aug.txt.gz"
    if not listed.is_file():
        pytest.skip("needs ../shared/data/voc2012_train_aug.txt.gz, which only development machines have")
    train = gzip.decompress(listed.read_bytes()).decode().split()
    val = [f"2007_9{number:05d}" for number in range(1_449)]
    own, rest = train[:1_464], train[1_464:]
    for folder in ("JPEGImages", "SegmentationClass", "SegmentationClassAug", "ImageSets/Segmentation"):
        voc(tmp_path, folder).mkdir(parents=True)
    Image.new("RGB", (2, 2)).save(tmp_path / "it.jpg")
    Image.new("P", (2, 2)).save(tmp_path / "it.png")
    for name in train + val:
        os.link(tmp_path / "it.jpg", voc(tmp_path, "JPEGImages", f"{name}.jpg"))
    for folder, some in (("SegmentationClass", own + val), ("SegmentationClassAug", rest + val[:773])):
        for name in some:
            os.link(tmp_path / "it.png", voc(tmp_path, folder, f"{name}.png"))
    for split, some in (("train", own), ("val", val)):
        voc(tmp_path, "ImageSets/Segmentation", f"{split}.txt").write_text("\n".join(some))
    data = prepared(tmp_path)
    assert sorted(names(data, "train")) == sorted(train)
    assert (len(names(data, "train")), len(names(data, "val"))) == (10_582, 1_449)
    voc(tmp_path, "SegmentationClassAug", f"{rest[0]}.png").unlink()
    with pytest.raises(DataError, match=r"10,582 images, but with .*SegmentationClassAug they are 10,581"):
        prepared(tmp_path)


def test_sbd_as_torchvision_arranges_it(tree):
    (tree / "benchmark_RELEASE/dataset").rename(tree / "sbd")
    assert len(names(prepared(tree), "train")) == 10


def test_masks_are_written_once_and_by_processes_too(tree):
    prepared(tree, num_workers=2)
    written = sorted(voc(tree, "SegmentationClassAug").iterdir())
    assert [path.name for path in written] == [f"2012_{number:06d}.png" for number in range(4, 10)]
    before = [path.stat().st_mtime_ns for path in written]
    shutil.rmtree(tree / "benchmark_RELEASE")
    prepared(tree)
    assert [path.stat().st_mtime_ns for path in written] == before


def test_writing_masks_leaves_the_random_numbers_alone(tree):
    state = torch.get_rng_state()
    make(tree).prepare_data()
    assert torch.equal(torch.get_rng_state(), state)


def test_interrupted_writing_is_not_taken_for_finished(tree, monkeypatch):
    save, count = Image.Image.save, []

    def interrupt(self, path, *args, **own):
        if len(count) == 3:
            raise KeyboardInterrupt
        count.append(path)
        save(self, path, *args, **own)

    with monkeypatch.context() as patch:
        patch.setattr(Image.Image, "save", interrupt)
        with pytest.raises(KeyboardInterrupt):
            make(tree).prepare_data()
    assert not list(voc(tree).glob("SegmentationClassAug*"))
    assert len(names(prepared(tree), "train")) == 10


@pytest.mark.parametrize("paths", [False, True])
def test_a_tree_with_masks_and_a_list_needs_no_sbd(tree, paths):
    make(tree).prepare_data()
    shutil.rmtree(tree / "benchmark_RELEASE")
    listed = [f"2012_{number:06d}" for number in range(10)]
    if paths:
        listed = [f"/JPEGImages/{name}.jpg /SegmentationClassAug/{name}.png" for name in listed]
    voc(tree, "ImageSets/Segmentation/train_aug.txt").write_text("\n".join(listed))
    assert names(prepared(tree), "train") == [f"2012_{number:06d}" for number in range(10)]


def test_without_sbd_a_list_of_its_own_trains_and_validation_works(tree):
    shutil.rmtree(tree / "benchmark_RELEASE")
    assert names(prepared(tree, train_list="train"), "train") == lines(voc(tree, "ImageSets/Segmentation/train.txt"))
    assert len(names(prepared(tree, "test"), "test")) == 4
    with pytest.raises(FileNotFoundError, match=r"no SBD in root=.*benchmark_RELEASE.*--data\.train_list=train"):
        prepared(tree)


def test_official_archives_are_unpacked_once(tree, tmp_path, monkeypatch):
    root = tmp_path / "archives"
    root.mkdir()
    for name, mode in (("VOC2012", "w"), ("SBD", "w:gz")):
        archive = getattr(voc2012_aug, name)
        folder = archive.marker.partition("/")[0]
        with tarfile.open(root / archive.filename, mode) as tar:
            tar.add(tree / folder, folder)
        monkeypatch.setattr(voc2012_aug, name, archive._replace(md5=calculate_md5(root / archive.filename)))
    (root / "VOCtrainval_11-May-2012.tar.unpacking").mkdir()
    (root / "VOCtrainval_11-May-2012.tar.unpacking" / "left by a killed run").touch()
    assert len(names(prepared(root), "train")) == 10
    assert {path.name for path in root.iterdir() if path.is_dir()} == {"VOCdevkit", "benchmark_RELEASE"}
    before = voc(root, "ImageSets/Segmentation/val.txt").stat().st_mtime_ns
    prepared(root)
    assert voc(root, "ImageSets/Segmentation/val.txt").stat().st_mtime_ns == before


@pytest.mark.parametrize("name", ["VOCtrainval_11-May-2012.tar", "benchmark.tgz"])
def test_a_truncated_archive_is_named(tmp_path, name):
    (tmp_path / name).write_bytes(b"half of it")
    with pytest.raises(DataError, match=rf"{name} is truncated or changed: its 10 bytes.*--data\.download=true"):
        make(tmp_path).prepare_data()


def test_download_is_torchvisions_and_only_when_asked(tmp_path, monkeypatch):
    asked = []

    def fetch(url, root, filename, md5):
        asked.append((filename, md5))
        raise OSError("no network here")

    monkeypatch.setattr(files, "download_url", fetch)
    make(tmp_path).prepare_data()
    assert asked == []
    with pytest.raises(OSError, match="no network here"):
        make(tmp_path, download=True).prepare_data()
    assert asked == [("VOCtrainval_11-May-2012.tar", "6cd6e144f989b92b3379bac3b3de84fd")]


@pytest.mark.parametrize("there", ["", "VOCdevkit", "VOCdevkit/VOC2012"])
def test_missing_data_say_where_they_were_looked_for_and_what_to_do(tmp_path, there):
    (tmp_path / there).mkdir(parents=True, exist_ok=True)
    with pytest.raises(FileNotFoundError) as caught:
        prepared(tmp_path)
    for said in (str(voc(tmp_path)), "--data.download=true", "--data.sample=true", "--data.root", "benchmark.tgz"):
        assert said in str(caught.value)


@pytest.mark.parametrize(("folder", "suffix"), [("JPEGImages", "jpg"), ("SegmentationClass", "png")])
def test_missing_files_are_named_and_counted(tree, folder, suffix):
    make(tree).prepare_data()
    for name in lines(voc(tree, "ImageSets/Segmentation/val.txt"))[1:]:
        voc(tree, folder, f"{name}.{suffix}").unlink()
    with pytest.raises(FileNotFoundError, match=rf"3 of 4 files .* are missing: .*2012_000011\.{suffix}, .*Unpack"):
        make(tree).setup("validate")


def test_missing_masks_of_sbd_are_named(tree):
    (tree / "benchmark_RELEASE/dataset/cls/2012_000005.mat").unlink()
    with pytest.raises(FileNotFoundError, match=r"1 of 6 masks of SBD are missing: .*2012_000005\.mat.*benchmark\.tgz"):
        prepared(tree)


@pytest.mark.parametrize("content", ["truncated", "garbage", "other"])
def test_masks_of_sbd_that_cannot_be_read_are_named_and_nothing_is_left(tree, content):
    path = tree / "benchmark_RELEASE/dataset/cls/2012_000005.mat"
    if content == "other":
        savemat(path, {"GTinst": 1})
    else:
        path.write_bytes(b"no matlab" * 40 if content == "garbage" else path.read_bytes()[:-200])
    with pytest.raises(DataError, match=r"1 of 6 masks of SBD are broken: .*2012_000005\.mat cannot be read"):
        make(tree).prepare_data()
    assert not list(voc(tree).glob("SegmentationClassAug*"))


@pytest.mark.parametrize(
    "path", ["VOCdevkit/VOC2012/ImageSets/Segmentation/train.txt", "benchmark_RELEASE/dataset/train.txt"]
)
@pytest.mark.parametrize("left", [1, 0])
def test_a_truncated_list_is_named(tree, path, left):
    (tree / path).write_text("\n".join(lines(tree / path)[:left]))
    with pytest.raises(DataError, match=rf"{path} names {left} images, not \d: unpack it again"):
        prepared(tree)


def test_a_validation_image_in_train_is_named(tree):
    leak = lines(voc(tree, "ImageSets/Segmentation/val.txt"))[2]
    voc(tree, "ImageSets/Segmentation/mine.txt").write_text(f"2012_000001\n{leak}\n")
    with pytest.raises(DataError, match=rf"1 validation images are in .*mine\.txt too: {leak}\. Take them out"):
        prepared(tree, train_list="mine")


def test_a_mask_of_another_size_is_named(tree):
    make(tree).prepare_data()
    Image.new("P", (7, 9)).save(voc(tree, "SegmentationClass/2012_000001.png"))
    with pytest.raises(
        DataError, match=r"1 of 10 images cannot be used\. .*2012_000001\.png is 7x9 pixels, but .*jpg is"
    ):
        make(tree).setup("fit")


@pytest.mark.parametrize("file", ["JPEGImages/2012_000010.jpg", "SegmentationClass/2012_000010.png"])
@pytest.mark.parametrize("left", [0, 300, -60])
def test_a_truncated_picture_is_named_before_training_starts(tree, file, left):
    make(tree).prepare_data()
    content = voc(tree, file).read_bytes()
    voc(tree, file).write_bytes(content[:left])
    with pytest.raises(DataError, match=rf"1 of 4 images cannot be used\. .*{file} cannot be decoded"):
        make(tree).setup("fit")


def test_bytes_after_the_end_of_a_picture_do_no_harm(tree):
    with voc(tree, "JPEGImages/2012_000010.jpg").open("ab") as file:
        file.write(b"left by a camera")
    prepared(tree)


def test_colours_in_the_place_of_labels_are_named(tree):
    path = voc(tree, "SegmentationClass/2012_000010.png")
    with Image.open(path) as mask:
        mask.convert("RGB").save(path)
    with pytest.raises(DataError, match=r"2012_000010\.png has the colours of classes \(mode RGB\)"):
        prepared(tree)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_label_that_no_class_has_is_named(tree, workers):
    path = voc(tree, "SegmentationClass/2012_000010.png")
    with Image.open(path) as mask:
        labels = np.array(mask)
    labels[0, :2] = 21, 254
    Image.fromarray(labels).save(path)
    data = prepared(tree, num_workers=workers)
    with pytest.raises(DataError, match=r"2012_000010\.png has the label 21, 254; labels are 0 to 20, and 255"):
        list(data.val_dataloader())


@pytest.mark.parametrize("mode", ["L", "CMYK"])
def test_grey_and_cmyk_images_are_converted(tree, mode):
    path = voc(tree, "JPEGImages/2012_000010.jpg")
    with Image.open(path) as image:
        expected = image.convert("L").convert("RGB") if mode == "L" else image.convert("RGB")
        image.convert(mode).save(path, quality=95)
    data = prepared(tree)
    image, _ = data.dataset("val")[0]
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (data.mean, data.std))
    difference = (image * std + mean) * 255 - torch.from_numpy(np.array(expected)).permute(2, 0, 1)
    assert difference.abs().mean() < 8


@pytest.mark.parametrize("size", [(1, 40), (40, 1), (1, 1)])
def test_images_one_pixel_wide_work(tree, size):
    for name in ("2012_000001", "2012_000010"):
        Image.new("RGB", size).save(voc(tree, f"JPEGImages/{name}.jpg"))
        Image.new("L", size, 3).save(voc(tree, f"SegmentationClass/{name}.png"))
    data = prepared(tree, batch_size=10, eval_batch_size=2, crop_eval=True)
    images, masks = next(iter(data.train_dataloader()))
    assert images.shape == (10, 3, 64, 64)
    assert masks.shape == (10, 64, 64)
    assert data.dataset("val")[0][0].shape == (3, size[1], size[0])
    whole, centres = (next(iter(loader)) for loader in data.val_dataloader())
    assert (whole[1][0] == 3).sum() == size[0] * size[1]
    assert (centres[1][0] == 3).all()


def test_evaluation_shows_whole_images_filled_up_in_a_batch(tree):
    one, four = prepared(tree), prepared(tree, eval_batch_size=4)
    images, masks = next(iter(four.val_dataloader()))
    assert images.shape[2:] == masks.shape[1:]
    for index, (image, mask) in enumerate(one.val_dataloader()):
        height, width = image.shape[2:]
        stored = Image.open(one.dataset("val").source.images[index])
        assert (width, height) == stored.size
        assert torch.equal(images[index, :, :height, :width], image[0])
        assert torch.equal(masks[index, :height, :width], mask[0])
        for beyond in (np.s_[..., height:, :], np.s_[..., :, width:]):
            assert (images[index][beyond] == 0).all()
            assert (masks[index][beyond] == 255).all()


def test_the_crop_evaluation_comes_beside_the_whole_images(tree):
    data = prepared(tree, crop_eval=True)
    for loaders in (data.val_dataloader(), data.test_dataloader()):
        whole, centres = loaders
        assert len(whole) == len(centres) == 4
        for image, mask in centres:
            assert image.shape == (1, 3, 64, 64)
            assert mask.shape == (1, 64, 64)
        assert next(iter(whole))[0].shape[2:] != (64, 64)
    state = torch.get_rng_state()
    centres.dataset[0]
    assert torch.equal(torch.get_rng_state(), state)


def test_a_crop_larger_than_the_images_is_filled_up(tree):
    images, masks = next(iter(prepared(tree, crop_size=320).train_dataloader()))
    assert images.shape == (10, 3, 320, 320)
    assert 0.1 < (masks == 255).float().mean() < 0.99
    assert images[:, :, masks[0] == 255][0].abs().max() < 0.01


def test_training_mirrors_unless_told_not_to(tree):
    flips = [prepared(tree, flip=flip).dataset("train").transform.transforms for flip in (True, False)]
    assert [t.p for transforms in flips for t in transforms if hasattr(t, "p")] == [0.5, 0.0]


def test_predictions_of_several_images_keep_names_and_sizes(tree, tmp_path):
    pictures = tmp_path / "pictures"
    (pictures / "more").mkdir(parents=True)
    sizes = {"a.png": (30, 20), "more/b.jpg": (15, 40), "more/c.webp": (1, 9)}
    for name, size in sizes.items():
        Image.new("RGB", size).save(pictures / name)
    data = make(tmp_path / "nowhere", predict_dir=str(pictures), eval_batch_size=8, download=False)
    data.setup("predict")
    seen = {names[0]: (images.shape[3], images.shape[2]) for images, names in data.predict_dataloader()}
    assert seen == sizes
    own = prepared(tree, "predict")
    assert [names for _, names in own.predict_dataloader()] == [[f"2012_{n:06d}.jpg"] for n in range(10, 14)]


def test_real_photos_with_masks(unpack):
    root = unpack("voc_from_coco.tar", lambda name: "Annotations" not in name)
    data = prepared(root, train_list="train", crop_size=97, batch_size=8)
    assert (len(names(data, "train")), len(names(data, "val"))) == (100, 100)
    images, masks = next(iter(data.train_dataloader()))
    assert images.shape == (8, 3, 97, 97)
    assert set(masks.unique().tolist()) <= {*range(21), 255}
    seen = {int(label) for index in range(100) for label in data.dataset("val")[index][1].unique()}
    assert len(seen) > 15
