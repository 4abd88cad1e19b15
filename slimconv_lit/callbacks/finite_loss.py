"""Stops a fit whose loss is not finite, and says on which images; or lets a few such batches go by."""

import json
from itertools import islice
from typing import Any, Literal

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback
from pytorch_lightning.utilities import rank_zero_warn
from torch import Tensor
from torch.utils.data import Subset

from slimconv_lit.callbacks.run_folder import folder_of
from slimconv_lit.data.shards import ShardedImages

# A GPU would have to wait at each step for its loss to be looked at.
_LOOK_EVERY = 50
_CEILING = 0.01


class FiniteLoss(Callback):
    """Looks at each loss before the weights learn from it; on a GPU, every fifty steps and before a checkpoint.

    A loss that is not finite stops the fit, and bad_batches.jsonl in the run's folder says what was in the batch.

    Args:
        on_bad_loss: "raise", or "skip": such a batch changes nothing, weights nor running statistics, unless it is more
            than 1 % of an epoch's batches (and more than one). Among accumulated gradients, all batches of its step go
            with it. On a GPU this costs a wait at each batch.
    """

    def __init__(self, on_bad_loss: Literal["raise", "skip"] = "raise") -> None:
        self.skips = on_bad_loss == "skip"
        self._waiting: list[tuple[int, Tensor]] = []
        self._buffers: list[Tensor] = []
        self._skipped = 0
        self._bad = False

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Counts anew."""
        self._skipped, self._bad, self._buffers = 0, False, []

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Where batches may be skipped, keeps the running statistics, which the forward pass changes."""
        self._batch_idx = batch_idx
        # Of several batches whose gradients are accumulated for one step, those before the first.
        if self.skips and not self._buffers:
            self._buffers = [buffer.clone() for buffer in pl_module.buffers()]

    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor) -> None:
        """Notes the loss, and looks at it now or later."""
        self._waiting.append((self._batch_idx, loss.detach()))
        if self.skips or loss.device.type == "cpu" or len(self._waiting) >= _LOOK_EVERY:
            self._look(trainer, pl_module)

    def on_after_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Takes the statistics back at once: a validation may come before the step."""
        if self._bad:
            self._take_back(pl_module)

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Takes the gradients of a bad batch away; the optimizer passes over what has none."""
        # Also those of the other devices are not finite then: gradients have been averaged over all of them.
        if self.skips and (self._bad or (trainer.world_size > 1 and not _finite(optimizer))):
            optimizer.zero_grad(set_to_none=True)
            self._take_back(pl_module)
        self._bad, self._buffers = False, []

    def _take_back(self, pl_module: pl.LightningModule) -> None:
        for buffer, kept in zip(pl_module.buffers(), self._buffers, strict=True):
            buffer.copy_(kept)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Looks at what is left."""
        self._look(trainer, pl_module)

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Looks before weights are saved that may be lost."""
        self._look(trainer, pl_module)

    def _look(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Does what is wanted of the first loss that is not finite.

        Raises:
            FloatingPointError: If there is one, and it is not skipped.
        """
        waiting, self._waiting = self._waiting, []
        if not waiting:
            return
        finite = torch.stack([loss for _, loss in waiting]).isfinite().tolist()
        if all(finite):
            return
        batch_idx, loss = waiting[finite.index(False)]
        epoch, path = trainer.current_epoch, folder_of(trainer) / "bad_batches.jsonl"
        what = {"epoch": epoch, "batch": batch_idx, "loss": str(loss.item())}
        with path.open("a") as file:
            file.write(json.dumps(what | {"samples": samples_of(trainer, batch_idx)}) + "\n")
        told = f"the loss is {loss.item()} in batch {batch_idx} of epoch {epoch}; what is in it: {path}"
        self._skipped += 1
        if not self.skips:
            raise FloatingPointError(
                f"{told}. A lower --model.lr or --trainer.gradient_clip_val may help; --on_bad_loss=skip lets it go by"
            )
        if self._skipped > max(1, _CEILING * trainer.num_training_batches):
            raise FloatingPointError(
                f"{told}. It is number {self._skipped} in this epoch, and --on_bad_loss=skip lets {_CEILING:.0%} go by"
            )
        rank_zero_warn(f"{told}. It is left out")
        self._bad = True


def _finite(optimizer: torch.optim.Optimizer) -> bool:
    gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    return all(bool(gradient.isfinite().all()) for gradient in gradients)


def samples_of(trainer: pl.Trainer, batch_idx: int) -> list[dict[str, Any]]:
    """Which images are in a batch of the present epoch: their index, and file where they are files.

    The order of an epoch follows from its number, so it can be asked for again.
    """
    loader: Any = trainer.train_dataloader
    keys: list[Any] = next(islice(getattr(loader, "batch_sampler", None) or (), batch_idx, None), [])
    indices = [key[0] if isinstance(key, tuple) else key for key in keys]
    return [{"index": index} | _file_of(loader.dataset, index) for index in indices]


def _file_of(dataset: Any, index: int) -> dict[str, str]:
    # Down through transforms and subsets to what knows its files.
    while inner := getattr(dataset, "source", None) or getattr(dataset, "dataset", None):
        index = dataset.indices[index] if isinstance(dataset, Subset) else index
        dataset = inner
    if isinstance(dataset, ShardedImages):
        return {"file": str(dataset.read(index)[0])}
    # Of ImageFolder, and of the segmentation data sets; a detector names its images itself.
    files = getattr(dataset, "samples", None) or getattr(dataset, "images", None)
    if not isinstance(files, list):
        return {}
    return {"file": str(files[index][0] if isinstance(files[index], tuple) else files[index])}
