"""A trainer that is told to end (SIGTERM), and does so where a checkpoint keeps all that has been reached."""

from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.trainer.states import TrainerFn


class PreemptibleTrainer(pl.Trainer):
    """Lightning's, whose fits end on SIGTERM between two steps of the optimizer, of all devices the same two."""

    _asking = False

    def __init__(
        self,
        *args: Any,
        # Of Lightning's `Union[int, float]`, `typing` may keep the other order, and 1 batch would be 1.0, all of them.
        limit_train_batches: int | float | None = None,
        limit_val_batches: int | float | None = None,
        limit_test_batches: int | float | None = None,
        limit_predict_batches: int | float | None = None,
        overfit_batches: int | float = 0.0,
        **kwargs: Any,
    ) -> None:
        limits = {
            "limit_train_batches": limit_train_batches,
            "limit_val_batches": limit_val_batches,
            "limit_test_batches": limit_test_batches,
            "limit_predict_batches": limit_predict_batches,
        }
        given: dict[str, Any] = {name: limit for name, limit in limits.items() if limit is not None}
        super().__init__(*args, overfit_batches=overfit_batches, **given, **kwargs)
        # Lightning's own has devices talk to each other wherever the signal finds them, in the middle of other talk.
        self._signal_connector._sigterm_notifier_fn = self._note  # type: ignore[method-assign]
        loop = self.fit_loop.epoch_loop
        self._ask, loop._broadcast_sigterm_tensor = loop._broadcast_sigterm_tensor, self._ask_first  # type: ignore[method-assign]

    def _note(self, signum: int, _: Any) -> None:
        if self.strategy.launcher and not self._signal_connector.received_sigterm:
            self.strategy.launcher.kill(signum)
        self._signal_connector.received_sigterm = True

    def _ask_first(self) -> None:
        self._asking = True
        try:
            self._ask()
        finally:
            self._asking = False

    @property
    def received_sigterm(self) -> bool:
        """Whether to end here.

        Not within accumulated gradients: a checkpoint has none. And of several devices in a fit, none by itself: before
        each batch Lightning asks the first one for all.
        """
        if self.state.fn == TrainerFn.FITTING and (self._within_a_step or (self.world_size > 1 and not self._asking)):
            return False
        return super().received_sigterm

    @property
    def _within_a_step(self) -> bool:
        return self.fit_loop.epoch_loop._should_accumulate()
