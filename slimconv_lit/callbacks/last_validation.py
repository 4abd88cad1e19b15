"""The last weights of a fit are validated, so they are saved and drawn too, wherever in an epoch it ends."""

from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import Callback


def is_last(trainer: pl.Trainer) -> bool:
    """Whether a fit is in its last epoch, or past its last step."""
    return (
        trainer.should_stop
        or trainer.global_step >= trainer.max_steps > 0
        or trainer.current_epoch + 1 == trainer.max_epochs
    )


class LastValidation(Callback):
    """Has a fit validate after its last step.

    Lightning does so only where that step happens to be due for it: not when `max_steps` ends an epoch early, nor when
    `val_check_interval` is counted in steps or `check_val_every_n_epoch` in epochs and training ends between two of
    them. What was learned since the last validation would be in no checkpoint.
    """

    def __init__(self) -> None:
        self._interval: int | None = None

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Notes what the trainer was asked for."""
        self._interval = trainer.check_val_every_n_epoch

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Says that the fit may stop, which it is about to do anyway; Lightning validates then, in any epoch."""
        if is_last(trainer) and (trainer.is_last_batch or trainer.global_step >= trainer.max_steps > 0):
            trainer.should_stop = True
            if self._interval is not None:
                trainer.check_val_every_n_epoch = 1

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Takes the last epoch's exception back."""
        trainer.check_val_every_n_epoch = self._interval
