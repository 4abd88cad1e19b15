"""What every datamodule promises, on all of them."""

import multiprocessing

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from PIL import Image

from slimconv_lit.data import BaseDataModule, CIFAR100DataModule, DigitsDataModule, ImageNetDataModule

PLAIN = (bool, int, float, str, type(None))


@pytest.fixture(params=["digits", "cifar100", "imagenet"])
def make(request, sample_root):
    """A function that makes one kind of datamodule with small images; every test runs on each kind."""

    def make(**own) -> BaseDataModule:
        if request.param == "digits":
            return DigitsDataModule(**own)
        own = {"root": sample_root, "sample": True, "num_workers": 0, "batch_size": 64, **own}
        return CIFAR100DataModule(**own) if request.param == "cifar100" else ImageNetDataModule(image_size=32, **own)

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
        assert type(images) is torch.Tensor
        assert images.dtype == torch.float32
        assert targets.dtype == torch.int64
        assert images.shape[1:] == data.input_size
        assert len(images) == len(targets) <= loader.batch_size
        assert 0 <= targets.min() <= targets.max() < data.num_classes == len(data.class_names)
        pixels = images * torch.tensor(data.std).view(-1, 1, 1) + torch.tensor(data.mean).view(-1, 1, 1)
        assert -1e-5 < pixels.min() < 0.2
        assert 0.8 < pixels.max() < 1 + 1e-5


def test_training_order_follows_from_seed_and_epoch(make):
    once, again = first_batches(make(seed=3), epoch=1), first_batches(make(seed=3), epoch=1)
    assert all(torch.equal(a, b) for x, y in zip(once, again, strict=True) for a, b in zip(x, y, strict=True))
    for other in (first_batches(make(seed=3), epoch=2), first_batches(make(seed=4), epoch=1)):
        assert not torch.equal(once[0][1], other[0][1])


def test_workers_change_neither_order_nor_augmentation(make):
    alone, helped = first_batches(make(), epoch=1), first_batches(make(num_workers=2), epoch=1)
    assert all(torch.equal(a, b) for x, y in zip(alone, helped, strict=True) for a, b in zip(x, y, strict=True))


def test_loading_leaves_the_ambient_random_numbers_alone(make):
    data = make()
    data.prepare_data()
    item = data.dataset("train")
    state = torch.get_rng_state()
    dealt = item[(0, 17)][0]
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(item[(0, 17)][0], dealt)
    assert not torch.equal(item[(0, 18)][0], dealt)


def test_held_out_and_test_images_are_not_trained_on(make):
    data = make(val_fraction=0.1) if "val_fraction" in make().hparams else make()
    data.prepare_data()

    # What the loaders show of training images is augmented, so the stored ones are compared.
    def stored(split):
        dataset = data.dataset(split)
        if hasattr(dataset, "images"):
            return [image.numpy().tobytes() for image in dataset.images]
        return [np.asarray(dataset.source[i][0]).tobytes() for i in range(len(dataset))]

    splits = {split: stored(split) for split in ("train", "val", "test")}
    for images in splits.values():
        assert len(images) >= data.num_classes
    for a, b in (("train", "val"), ("train", "test"), ("val", "test")):
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
    batches = zip(first_batches(rebuilt, 0), first_batches(data, 0), strict=True)
    assert all(torch.equal(a[0], b[0]) for a, b in batches)


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
        for shown in (whole.epochs[epoch], resumed):
            assert all(torch.equal(a, b) for a, b in zip(shown, expected, strict=True))


def test_prediction_without_a_folder_names_the_test_images(make):
    data = make(eval_batch_size=7)
    data.prepare_data()
    images, names = next(iter(data.predict_dataloader()))
    assert names == [f"test/{i:05d}" for i in range(7)]
    assert torch.equal(images, next(iter(data.test_dataloader()))[0])


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
    (batch,) = trainer(tmp_path).predict(Recorder(), data)
    assert batch == ["a.JPG", "b.png", "more/c.webp", "palette.bmp"]
    assert next(iter(data.predict_dataloader()))[0].shape == (4, *data.input_size)


def test_pictures_taken_lying_are_turned_upright(tmp_path):
    pixels = np.zeros((8, 16), np.uint8)
    pixels[:, :8] = 255
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: rotate by 90 degrees clockwise to look at it
    Image.fromarray(pixels).save(tmp_path / "phone.png", exif=exif)
    data = DigitsDataModule(predict_dir=str(tmp_path))
    image = next(iter(data.predict_dataloader()))[0][0, 0]
    assert image[:8].mean() > 1 > -0.5 > image[8:].mean()


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


@pytest.mark.parametrize(("own", "said"), [({"batch_size": 0}, "batch_size=0"), ({"seed": -1}, "seed=-1")])
def test_values_that_cannot_work_are_named(make, own, said):
    with pytest.raises(ValueError, match=said):
        make(**own)


def test_workers_default_to_no_more_than_the_cores():
    cores = multiprocessing.cpu_count()
    assert DigitsDataModule().num_workers == 0
    assert 1 <= CIFAR100DataModule().num_workers <= min(4, cores)
    assert 1 <= ImageNetDataModule().num_workers <= min(16, cores)
