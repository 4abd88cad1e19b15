"""Checkpoints from which a run that was killed at any moment goes on exactly."""

import random
import shutil
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytorch_lightning as pl
import torch
from lightning_fabric.plugins import TorchCheckpointIO
from pytorch_lightning.callbacks import Callback, ModelCheckpoint
from pytorch_lightning.utilities.exceptions import SIGTERMException

from slimconv_lit.durable import write_whole
from slimconv_lit.faults import RunError


class DurableIO(TorchCheckpointIO):
    """Writes a checkpoint beside the old one and renames it once it is on the disk, so that one of them is whole."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Writes `checkpoint` to `path`.

        Raises:
            RunError: If the disk is full or cannot be written to; what lay at `path` is as it was.
        """
        try:
            write_whole(Path(path), partial(torch.save, checkpoint))
        except (OSError, RuntimeError) as error:
            raise RunError(_unwritten(Path(path), error)) from error


def _unwritten(path: Path, error: Exception) -> str:
    # torch wraps the system's reason into one of its own.
    cause = next((e for e in (error, error.__cause__, error.__context__) if isinstance(e, OSError)), error)
    reason = getattr(cause, "strerror", None) or str(cause).splitlines()[0]
    free = f" ({shutil.disk_usage(path.parent).free / 2**20:,.0f} MiB free)" if path.parent.is_dir() else ""
    last = path.with_name("last.ckpt")
    way_out = f"; then go on with --ckpt_path {last}, which is whole" if last.is_file() else ""
    return f"{path} cannot be written: {reason}{free}. Make room or mend the disk{way_out}"


class RunCheckpoint(ModelCheckpoint):
    """One file of a run's folder. A run that goes on in its folder knows what it kept; one that begins anew does not.

    Args:
        folder: Of the run.
        name: Of the file, without its suffix.
        own: Of ModelCheckpoint.
    """

    def __init__(self, folder: Path, name: str, **own: Any) -> None:
        # Without the counter the file keeps its name where a killed process has left one.
        super().__init__(
            folder / "checkpoints", name, auto_insert_metric_name=False, enable_version_counter=False, **own
        )
        self._goes_on = False

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Notes whether a fit goes on in this folder; Lightning hands over the state behind this."""
        self._goes_on = trainer.state.fn == "fit" and Path(str(trainer.ckpt_path)).resolve().parent == Path(
            str(self.dirpath)
        )

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes over which file was the best, and how good; the folder may have been moved."""
        if not self._goes_on:
            return
        moved = {str(state_dict["dirpath"]): str(self.dirpath)}

        def here(path: str) -> str:
            return str(Path(moved.get(str(Path(path).parent), Path(path).parent), Path(path).name)) if path else path

        paths = {key: here(state_dict[key]) for key in ("best_model_path", "kth_best_model_path", "last_model_path")}
        scores = {here(path): score for path, score in state_dict["best_k_models"].items()}
        super().load_state_dict(state_dict | paths | {"best_k_models": scores, "dirpath": self.dirpath})


class LastCheckpoint(RunCheckpoint):
    """last.ckpt: after each validation, every few steps, and when the process is told to end (SIGTERM).

    Args:
        folder: Of the run.
        every: Steps between two; None for validations only. Between two epochs without a validation it is one more.
    """

    def __init__(self, folder: Path, every: int | None = None) -> None:
        super().__init__(folder, "last")
        self.every = every
        self._begun = 0
        self._waits = False

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Counts the steps from where the run was resumed."""
        super().on_train_start(trainer, pl_module)
        self._begun = trainer.global_step

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Saves what the steps before this one have reached, if it is time to.

        At the end of a step it would be too early: that is not logged then, nor validated where that is due.
        """
        since = trainer.global_step - max(self._begun, self._last_global_step_saved)
        due = self._waits or (self.every is not None and since >= self.every)
        if not due or batch_idx % trainer.accumulate_grad_batches != 0 or batch_idx == 0:
            return
        self._waits = False
        # This batch has been counted as begun. Without it, Lightning goes on as after the end of the one before.
        progress: Any = trainer.fit_loop.epoch_loop.batch_progress
        progress.total.ready, progress.current.ready = progress.total.ready - 1, progress.current.ready - 1
        self._save_topk_checkpoint(trainer, self._monitor_candidates(trainer))
        progress.increment_ready()

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Saves; within accumulated gradients, of which it would have none, only once they have made a step."""
        self._waits = trainer.state.fn == "fit" and trainer.fit_loop.epoch_loop._should_accumulate()
        if not self._waits:
            super().on_validation_end(trainer, pl_module)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Saves when the process was told to end, which Lightning raises between two steps or in a validation."""
        if not isinstance(exception, SIGTERMException) or trainer.state.fn != "fit" or trainer.sanity_checking:
            return
        if trainer.validating:
            # It is broken off. So Lightning is told that it has begun, and will run the whole of it.
            progress = trainer.fit_loop.epoch_loop.val_loop.batch_progress
            progress.reset()
            progress.total.ready = progress.total.started = 1  # type: ignore[attr-defined]
        if trainer.global_step > self._last_global_step_saved:
            self._save_topk_checkpoint(trainer, self._monitor_candidates(trainer))


def make_checkpoints(
    folder: Path, monitor: str, mode: Literal["min", "max"], every: int | None = None
) -> list[ModelCheckpoint]:
    """Keep `best.ckpt` by the metric `monitor`, and `last.ckpt` of every validation and every few steps.

    Args:
        folder: Of the run; both are kept in checkpoints/.
        monitor: The metric, as it is logged.
        mode: Whether it is better when it is smaller or larger.
        every: As `LastCheckpoint` takes it.
    """
    # Two, for `save_last=True` beside a monitor writes last.ckpt only when the best one changes.
    return [RunCheckpoint(folder, "best", monitor=monitor, mode=mode), LastCheckpoint(folder, every)]


class SameBatches(Callback):
    """Keeps a fit from going on in the middle of an epoch with batches of another size, on all devices together."""

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Compares.

        Raises:
            RunError: If images would come twice or not at all in this epoch; the message has the size that fits.
        """
        data: Any = getattr(trainer, "datamodule", None)
        progress = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
        done, devices = progress["current"]["completed"], len(checkpoint.get("random_states", []))
        each = checkpoint.get("datamodule_hyper_parameters", {}).get("batch_size")
        if trainer.state.fn != "fit" or progress["is_last_batch"] or not (done and devices and each):
            return
        size, world = devices * each, trainer.world_size
        if size != world * data.batch_size:
            way_out = f"--data.batch_size={size // world}" if size % world == 0 else f"devices that divide {size}"
            raise RunError(
                f"{trainer.ckpt_path} has {done} batches of {size} images of an epoch behind it ({devices} devices "
                f"with {each} each); with {world} x {data.batch_size} some would come twice or not at all. "
                f"Go on with {way_out}"
            )


class RandomState(Callback):
    """Keeps the state of all random generators in the checkpoint, of each process of a run."""

    def __init__(self) -> None:
        self._states: list[dict[str, Any]] = []

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Adds the states; all processes take part."""
        numpy: Any = np.random.get_state()
        own = {
            "python": random.getstate(),
            # As plain values, for a checkpoint is read without unpickling.
            "numpy": (numpy[0], numpy[1].tolist(), *numpy[2:]),
            "torch": torch.get_rng_state(),
            # Of this process's own device; those of others belong to other processes.
            "cuda": torch.cuda.get_rng_state() if pl_module.device.type == "cuda" else None,
        }
        states: list[dict[str, Any]] = [own] * trainer.world_size
        if trainer.world_size > 1:
            torch.distributed.all_gather_object(states, own)
        checkpoint["random_states"] = states

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Keeps them until training starts: what is set up until then draws numbers, too."""
        self._states = checkpoint.get("random_states", []) if trainer.state.fn == "fit" else []

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Restores them, unless the run had another number of processes."""
        if len(self._states) == trainer.world_size:
            own = self._states[trainer.global_rank]
            random.setstate(own["python"])
            np.random.set_state(own["numpy"])
            torch.set_rng_state(own["torch"])
            if own["cuda"] is not None and pl_module.device.type == "cuda":
                torch.cuda.set_rng_state(own["cuda"])
        self._states = []
