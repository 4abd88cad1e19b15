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
    `val_check_interval` is counted in steps and training ends between two of them. What was learned since the last
    validation would be in no checkpoint.
    """

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Says that the fit may stop, which it is about to do anyway; Lightning validates then."""
        if is_last(trainer) and (trainer.is_last_batch or trainer.global_step >= trainer.max_steps > 0):
            trainer.should_stop = True
