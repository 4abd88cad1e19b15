"""What every datamodule promises, on all of them."""

import multiprocessing
from functools import partial

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from PIL import Image

from benchmarks.kills import same
from slimconv_lit.data import (
    BaseDataModule,
    CIFAR100DataModule,
    COCO2014DataModule,
    DigitsDataModule,
    ImageNetDataModule,
    VOC2007DataModule,
    VOC2012AugDataModule,
)
from slimconv_lit.data.base import FolderImages
from slimconv_lit.data.detection import DetectionDataModule
from slimconv_lit.data.files import DataError, EncodedImage

PLAIN = (bool, int, float, str, list, type(None))


KINDS = {
    "cifar100": partial(CIFAR100DataModule, batch_size=64),
    "imagenet": partial(ImageNetDataModule, batch_size=64, image_size=32),
    "voc2007": partial(VOC2007DataModule, batch_size=16),
    "coco2014": partial(COCO2014DataModule, batch_size=16),
    "voc2012": partial(VOC2012AugDataModule, batch_size=64, crop_size=48),
}


@pytest.fixture(params=["digits", *KINDS])
def make(request, sample_root):
    """A function that makes one kind of datamodule with small images; every test runs on each kind."""

    def make(**own) -> BaseDataModule:
        if request.param == "digits":
            return DigitsDataModule(**own)
        own = {"root": sample_root, "sample": True, "num_workers": 0, **own}
        return KINDS[request.param](**own)

    return make


class Recorder(pl.LightningModule):
    """Trains nothing to speak of and keeps every training image it was shown."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.epochs = []

    def on_train_epoch_start(self):
        self.epochs.append([])

    def training_step(self, batch, batch_idx):
        self.epochs[-1].append(batch[0])
        return self.weight * 0

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def test_step(self, batch, batch_idx):
        pass

    def predict_step(self, batch, batch_idx):
        return batch[1]


def trainer(folder, **own):
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    return pl.Trainer(default_root_dir=folder, **quiet, **own)


def first_batches(datamodule, epoch, count=2):
    datamodule.prepare_data()
    loader = datamodule.train_dataloader()
    loader.sampler.set_epoch(epoch)
    return [batch for batch, _ in zip(loader, range(count), strict=False)]


def test_batches_have_the_promised_shapes_types_and_scale(make):
    data = make()
    data.prepare_data()
    for loader in (data.train_dataloader(), data.val_dataloader(), data.test_dataloader()):
        images, targets = next(iter(loader))
        assert len(images) == len(targets) <= loader.batch_size
        if isinstance(data, DetectionDataModule):
            assert all(image.shape[0] == data.input_size[0] and image.ndim == 3 for image in images)
            labels = torch.cat([target["labels"] for target in targets]) - 1
        elif isinstance(data, VOC2012AugDataModule):
            assert type(images) is torch.Tensor
            assert images.shape[2:] == targets.shape[1:]
            # Images are evaluated at their own size.
            assert images.shape[1:] == data.input_size or loader.batch_size == 1
            labels = targets[targets != data.ignore_index]
        else:
            assert type(images) is torch.Tensor
            assert images.shape[1:] == data.input_size
            labels = targets
        assert labels.dtype == torch.int64
        assert 0 <= labels.min() <= labels.max() < data.num_classes == len(data.class_names)
        assert {image.dtype for image in images} == {torch.float32}
        mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (data.mean, data.std))
        pixels = torch.cat([(image * std + mean).flatten() for image in images])
        assert -1e-5 < pixels.min() < 0.2
        assert 0.8 < pixels.max() < 1 + 1e-5


def test_training_order_follows_from_seed_and_epoch(make):
    once, again = first_batches(make(seed=3), epoch=1), first_batches(make(seed=3), epoch=1)
    assert same(once, again)
    for other in (first_batches(make(seed=3), epoch=2), first_batches(make(seed=4), epoch=1)):
        assert not same(once[0][1], other[0][1])


def test_workers_change_neither_order_nor_augmentation(make):
    alone, helped = first_batches(make(), epoch=1), first_batches(make(num_workers=2), epoch=1)
    assert same(alone, helped)


def test_loading_leaves_the_ambient_random_numbers_alone(make):
    data = make()
    data.prepare_data()
    item = data.dataset("train")
    state = torch.get_rng_state()
    dealt = item[(0, 17)][0]
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(item[(0, 17)][0], dealt)
    assert not all(torch.equal(item[(0, seed)][0], dealt) for seed in range(18, 28))


def test_held_out_and_test_images_are_not_trained_on(make):
    data = make(val_fraction=0.1) if "val_fraction" in make().hparams else make()
    data.prepare_data()

    # What the loaders show of training images is augmented, so the stored ones are compared.
    def stored(split):
        dataset = data.dataset(split)
        if hasattr(dataset, "images"):
            return [image.numpy().tobytes() for image in dataset.images]
        images = [dataset.source[i][0] for i in range(len(dataset))]
        return [np.asarray(im.pixels() if isinstance(im, EncodedImage) else im).tobytes() for im in images]

    splits = {split: stored(split) for split in ("train", "val", "test")}
    for images in splits.values():
        assert len(images) >= data.num_classes
    pairs = [("train", "val"), ("train", "test"), ("val", "test")]
    # Nobody but its makers has labels of VOC2012's test images: validation images test.
    for a, b in pairs[:2] if isinstance(data, VOC2012AugDataModule) else pairs:
        assert set(splits[a]).isdisjoint(splits[b])


def test_hyperparameters_are_plain_and_a_checkpoint_rebuilds_the_datamodule(make, tmp_path):
    data = make(seed=5)
    run = trainer(tmp_path, max_epochs=1, limit_train_batches=1, enable_checkpointing=False)
    run.fit(Recorder(), data)
    run.save_checkpoint(tmp_path / "it.ckpt")
    kept = torch.load(tmp_path / "it.ckpt", weights_only=True)["datamodule_hyper_parameters"]
    assert kept["seed"] == 5
    assert all(isinstance(value, PLAIN) for value in kept.values())
    rebuilt = type(data).load_from_checkpoint(tmp_path / "it.ckpt")
    assert (rebuilt.hparams, rebuilt.class_names, rebuilt.seed) == (data.hparams, data.class_names, 5)
    assert same(first_batches(rebuilt, 0), first_batches(data, 0))


def test_lightning_shows_each_epoch_the_order_of_its_own_after_a_resume_too(make, tmp_path):
    whole, first, rest = Recorder(), Recorder(), Recorder()
    own = {"limit_train_batches": 2, "enable_checkpointing": False}
    trainer(tmp_path, max_epochs=2, **own).fit(whole, make())
    run = trainer(tmp_path, max_epochs=1, **own)
    run.fit(first, make())
    run.save_checkpoint(tmp_path / "it.ckpt")
    trainer(tmp_path, max_epochs=2, **own).fit(rest, make(), ckpt_path=tmp_path / "it.ckpt")
    for epoch, resumed in enumerate(first.epochs + rest.epochs):
        expected = [images for images, _ in first_batches(make(), epoch)]
        assert same(whole.epochs[epoch], expected)
        assert same(resumed, expected)


def test_prediction_without_a_folder_names_the_test_images(make):
    data = make(eval_batch_size=7)
    data.prepare_data()
    images, names = next(iter(data.predict_dataloader()))
    if isinstance(data, VOC2012AugDataModule):
        # One by one, by the names of their files.
        assert names == ["2012_000300.jpg"]
        assert torch.equal(images[0], data.dataset("test")[0][0])
        return
    own = isinstance(data, DetectionDataModule)
    assert names == (list(data.image_ids)[:7] if own else [f"test/{i:05d}" for i in range(7)])
    assert same(images, next(iter(data.test_dataloader()))[0])


def test_prediction_reads_every_image_below_a_folder(make, tmp_path):
    (tmp_path / "more").mkdir()
    modes = {"b.png": "L", "a.JPG": "RGB", "more/c.webp": "RGBA", "palette.bmp": "P"}
    for name, mode in modes.items():
        Image.new(mode, (40, 60), 200 if mode in "LP" else (200,) * len(mode)).save(
            tmp_path / name, format=None if name != "a.JPG" else "JPEG"
        )
    (tmp_path / "notes.txt").write_text("no image")
    (tmp_path / "._a.jpg").write_text("what a Mac leaves behind")
    data = make(predict_dir=str(tmp_path))
    batches = trainer(tmp_path).predict(Recorder(), data)
    assert [name for batch in batches for name in batch] == ["a.JPG", "b.png", "more/c.webp", "palette.bmp"]
    size = (3, 60, 40) if isinstance(data, DetectionDataModule | VOC2012AugDataModule) else data.input_size
    assert [image.shape for images, _ in data.predict_dataloader() for image in images] == [size] * 4


def test_pictures_taken_lying_are_turned_upright(tmp_path):
    pixels = np.zeros((8, 16), np.uint8)
    pixels[:, :8] = 255
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: rotate by 90 degrees clockwise to look at it
    Image.fromarray(pixels).save(tmp_path / "phone.png", exif=exif)
    data = DigitsDataModule(predict_dir=str(tmp_path))
    image = next(iter(data.predict_dataloader()))[0][0, 0]
    assert image[:8].mean() > 1 > -0.5 > image[8:].mean()


@pytest.mark.parametrize("note", [b"M", b"MM\x00*\x00\x00\x00\x08\x00"])
def test_a_picture_with_a_damaged_note_how_to_turn_it_stays_as_it_is(tmp_path, note):
    Image.new("RGB", (40, 60)).save(tmp_path / "phone.png", exif=b"Exif\x00\x00" + note)
    image, _ = FolderImages(tmp_path, "RGB")[0]
    assert image.size == (40, 60)


def test_a_picture_that_cannot_be_decoded_is_named(make, tmp_path):
    Image.new("RGB", (40, 60)).save(tmp_path / "half.png")
    (tmp_path / "half.png").write_bytes((tmp_path / "half.png").read_bytes()[:-30])
    with pytest.raises(DataError, match=r"half\.png cannot be decoded"):
        next(iter(make(predict_dir=str(tmp_path)).predict_dataloader()))


@pytest.mark.parametrize("there", [False, True])
def test_a_predict_dir_without_images_is_named(make, tmp_path, there):
    folder = tmp_path / "pictures"
    if there:
        folder.mkdir()
    with pytest.raises(
        FileNotFoundError, match=r"predict_dir='.*pictures' (is not a folder|has no image).*\.jpg.*\.png"
    ):
        make(predict_dir=str(folder)).setup("predict")


def test_a_last_batch_of_one_image_is_left_out_of_training_only(make):
    length = len(make().dataset("train"))
    sizes = [len(keys) for keys in make(batch_size=length - 1).train_dataloader().batch_sampler]
    assert sizes == [length - 1]
    sizes = [len(keys) for keys in make(batch_size=length - 2).train_dataloader().batch_sampler]
    assert sizes == [length - 2, 2]
    assert len(make(batch_size=1).train_dataloader()) == length
    test = make(eval_batch_size=len(make().dataset("test")) - 1).test_dataloader()
    assert [len(keys) for keys in test.batch_sampler][-1] == 1


@pytest.mark.parametrize(
    ("own", "said"),
    [
        ({"batch_size": 0}, "^batch_size=0 must be at least 1$"),
        ({"eval_batch_size": 0}, "eval_batch_size=0 must be at least 1"),
        ({"num_workers": -1}, "num_workers=-1 must be at least 0"),
        ({"seed": -1}, "seed=-1 must be at least 0"),
    ],
    ids=str,
)
def test_values_that_cannot_work_are_named(make, own, said):
    with pytest.raises(ValueError, match=said):
        make(**own)


@pytest.mark.parametrize(
    ("cls", "own", "said"),
    [
        (DigitsDataModule, {"split_seed": -1}, "split_seed=-1 must be from 0 to 4294967295"),
        (CIFAR100DataModule, {"split_seed": 2**32}, "split_seed=4294967296 must be from 0 to 4294967295"),
        (CIFAR100DataModule, {"val_fraction": 1.0}, r"val_fraction=1\.0 must lie between 0 and 1"),
        (CIFAR100DataModule, {"cutout": -1}, "cutout=-1 must be at least 0"),
        (ImageNetDataModule, {"split_seed": -1}, "split_seed=-1 must be from 0"),
        (ImageNetDataModule, {"val_fraction": -0.1}, r"val_fraction=-0\.1 must lie between 0 and 1"),
        (ImageNetDataModule, {"image_size": 0}, "image_size=0 must be at least 1"),
        (ImageNetDataModule, {"eval_size": 0}, "eval_size=0 must be at least 1"),
        (ImageNetDataModule, {"num_classes": -3}, "num_classes=-3 must be at least 1"),
        (VOC2012AugDataModule, {"scale": (0.5, float("inf"))}, r"scale=\[0\.5, inf\] must be"),
    ],
    ids=str,
)
def test_values_of_one_data_set_that_cannot_work_are_named(cls, own, said):
    with pytest.raises(ValueError, match=said):
        cls(**own)


def test_workers_default_to_no_more_than_the_cores():
    cores = multiprocessing.cpu_count()
    assert DigitsDataModule().num_workers == 0
    assert 1 <= CIFAR100DataModule().num_workers <= min(4, cores)
    for data in (ImageNetDataModule(), VOC2012AugDataModule()):
        assert 1 <= data.num_workers <= min(16, cores)
    assert 1 <= COCO2014DataModule().num_workers <= min(8, cores)
