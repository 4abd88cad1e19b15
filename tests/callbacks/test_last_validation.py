import pytest
import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader, TensorDataset

from slimconv_lit.callbacks import LastValidation, RunFolder, Visualize
from slimconv_lit.callbacks.checkpoints import make_checkpoints
from slimconv_lit.tasks import ClassificationTask, Picture


class Tiny(ClassificationTask):
    """A linear layer that notes when it is validated and drawn."""

    def __init__(self):
        super().__init__("cifar_resnet20", 3, 3, lr=0.1, schedule="constant")
        self.model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(48, 3))
        self.validated, self.drawn = [], []

    def on_validation_epoch_start(self):
        if not self.trainer.sanity_checking:
            self.validated.append(self.global_step)

    def validation_step(self, batch, batch_idx):
        images, labels = batch
        self.log("val/loss", self.loss(self(images), labels))

    def draw(self, batch, outputs):
        if self.global_step not in self.drawn:
            self.drawn.append(self.global_step)
        return [Picture(torch.zeros(3, 4, 4, dtype=torch.uint8), "x")]


def fitted(folder, cls=Tiny, every_n_epochs=100, **options):
    """A fit with ten batches in an epoch."""
    loader = DataLoader(TensorDataset(torch.randn(20, 3, 4, 4), torch.arange(20) % 3), 2)
    folder.mkdir(exist_ok=True)
    drawer = Visualize(images=2, every_n_epochs=every_n_epochs)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    callbacks = [RunFolder(folder, {}), LastValidation(), drawer]
    callbacks += make_checkpoints(folder, "val/loss", "min")
    trainer, task = pl.Trainer(callbacks=callbacks, **quiet | options), cls()
    trainer.fit(task, loader, loader)
    saved = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)
    return task, saved["global_step"]


BY_STEPS = {"check_val_every_n_epoch": None}


def test_the_last_checkpoint_is_of_the_last_validation_and_the_best_of_the_best(tmp_path):
    class Worse(Tiny):
        def validation_step(self, batch, batch_idx):
            self.log("val/loss", float(self.global_step))

    _, saved_step = fitted(tmp_path, Worse, max_epochs=3)
    assert saved_step == 30
    best = torch.load(tmp_path / "checkpoints" / "best.ckpt", weights_only=True)
    assert best["global_step"] == 10
    assert {path.name for path in (tmp_path / "checkpoints").iterdir()} == {"best.ckpt", "last.ckpt"}


@pytest.mark.parametrize(
    ("options", "validated"),
    [
        ({"max_epochs": 2}, [10, 20]),
        ({"max_steps": 20}, [10, 20]),
        ({"max_steps": 23}, [10, 20, 23]),
        ({"max_epochs": 9, "max_steps": 4}, [4]),
        ({"max_steps": 24, "val_check_interval": 12, **BY_STEPS}, [12, 24]),
        ({"max_steps": 25, "val_check_interval": 12, **BY_STEPS}, [12, 24, 25]),
        ({"max_epochs": 1, "val_check_interval": 1500, **BY_STEPS}, [10]),
        ({"max_epochs": 1, "limit_train_batches": 2, "val_check_interval": 1500, **BY_STEPS}, [2]),
        ({"max_epochs": 2, "val_check_interval": 0.5}, [5, 10, 15, 20]),
        ({"max_epochs": 1, "check_val_every_n_epoch": 4}, [10]),
        ({"max_epochs": 5, "check_val_every_n_epoch": 2}, [20, 40, 50]),
        ({"max_steps": 33, "check_val_every_n_epoch": 3}, [30, 33]),
        ({"max_steps": 7, "accumulate_grad_batches": 2}, [5, 7]),
    ],
    ids=str,
)
def test_the_last_weights_are_validated_saved_and_drawn_once(options, validated, tmp_path):
    task, saved_step = fitted(tmp_path, **options)
    assert task.validated == validated
    assert task.global_step == saved_step == validated[-1]
    assert task.drawn[-1] == validated[-1]
    # Otherwise in the first validation only.
    first_and_last = {validated[0], validated[-1]}
    last_epoch = {step for step in validated if options.get("max_epochs") == 2 and step > 10}
    assert set(task.drawn) == first_and_last | last_epoch


def test_no_validation_where_none_is_wanted(tmp_path):
    task, _ = fitted(tmp_path, max_steps=5, limit_val_batches=0)
    assert task.validated == []
    assert task.global_step == 5


def test_pictures_every_few_epochs_also_where_validations_are_rarer_or_more_frequent(tmp_path):
    # Validations in epochs 1, 2, 3, 4 (after 15, 30, 45, 60 steps ...).
    task, _ = fitted(tmp_path / "a", every_n_epochs=3, max_steps=90, val_check_interval=15, **BY_STEPS)
    assert task.validated == [15, 30, 45, 60, 75, 90]
    assert task.drawn == [15, 45, 75, 90]
    task, _ = fitted(tmp_path / "b", every_n_epochs=2, max_steps=45, val_check_interval=0.5)
    assert task.drawn == [5, 25, 45]
