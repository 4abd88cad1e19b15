"""One folder for one run: its configuration, metrics, checkpoints, pictures and results.

runs/<name>/<date-time>/config.yaml is the whole configuration; `fit --config` takes it back. Beside it lie metrics.csv
with every logged number, tensorboard/, checkpoints/best.ckpt and last.ckpt, pictures/ with what the callbacks drew, and
results.json with what the best checkpoint reached on the test set. A fit that is resumed from its last.ckpt goes on in
its folder; what metrics.csv has from after that checkpoint is dropped, so it is that of a run without a break.
"""

import contextlib
import errno
import os
import sys
import time
from collections.abc import Mapping
from datetime import datetime
from itertools import count
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import yaml  # type: ignore[import-untyped]
from pytorch_lightning.callbacks import Callback
from pytorch_lightning.loggers import CSVLogger
from pytorch_lightning.utilities import rank_zero_info, rank_zero_only

from slimconv_lit.callbacks.loggers import MetricsFile
from slimconv_lit.durable import write_whole

if sys.platform != "win32":
    import fcntl


def new_run_folder(root: Path, name: str, verb: str = "fit") -> Path:
    """Makes `root/name/<date-time>`, with the verb behind it unless that is "fit"; no two calls get the same one.

    On any process but the first of a distributed run nothing is made: there the folder is known once `RunFolder`
    has been told it by the first.
    """
    if rank_zero_only.rank:  # type: ignore[attr-defined]
        return root / name / "pending"
    stamp = datetime.now().strftime("%Y-%m-%d_%H-%M-%S") + ("" if verb == "fit" else f"-{verb}")
    for attempt in count(1):
        path = root / name / (stamp if attempt == 1 else f"{stamp}-{attempt}")
        try:
            # Making it is the test: of two processes that try at once, one gets the error.
            path.mkdir(parents=True)
        except FileExistsError:
            continue
        return path
    raise AssertionError("unreachable")


class Lock:
    """Keeps a second process from writing into a run's folder. It ends with the process, however that ends.

    Args:
        folder: Of the run; it is there and can be written to.

    Raises:
        BlockingIOError: If another process holds it; the message names that.
        OSError: If the folder cannot be written to.
    """

    def __init__(self, folder: Path) -> None:
        self._file = (folder / ".lock").open("a+")
        if sys.platform == "win32":
            return
        try:
            # Not `flock`: processes that load images would inherit it, and outlive a killed parent by seconds.
            fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            # Some network file systems have no locks.
            if error.errno in (errno.EACCES, errno.EAGAIN):
                self._file.seek(0)
                raise BlockingIOError(f"process {self._file.read() or '?'} is writing into {folder}") from None
        self._file.truncate(0)
        self._file.write(str(os.getpid()))
        self._file.flush()

    def release(self) -> None:
        """Lets others in. The file stays: who waits for one that is gone and who makes a new one would both hold it."""
        self._file.close()


def folder_of(trainer: pl.Trainer) -> Path:
    """The run folder of a trainer, or its logging folder when it was built without one."""
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, RunFolder):
            return callback.path
    return Path(trainer.log_dir or trainer.default_root_dir)


def pictures_of(trainer: pl.Trainer) -> Path:
    """Where this trainer's pictures go; made if it is not there."""
    folder = folder_of(trainer) / "pictures"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


class RunFolder(Callback):
    """Writes config.yaml, tells the loggers the configuration once, and takes the time of a fit.

    Args:
        path: The run's folder, from `new_run_folder`, or that of the run that goes on.
        config: The whole configuration, as plain values.
        new: Whether this run made the folder, and so may remove it.
    """

    def __init__(self, path: Path, config: Mapping[str, Any], new: bool = True) -> None:
        self.path = path
        self.new = new
        self.config = dict(config)
        self._written = False
        self._before = 0.0
        self._started: float | None = None

    @property
    def seconds(self) -> float:
        """Time of the fit so far, less what it lost in breaks."""
        return self._before + (0.0 if self._started is None else time.perf_counter() - self._started)

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Makes all processes agree on the folder; the first one writes the configuration."""
        self.path = Path(trainer.strategy.broadcast(str(self.path)))
        if self._written or not trainer.is_global_zero:
            return
        self._written = True
        write_whole(self.path / "config.yaml", yaml.safe_dump(self.config, sort_keys=False))
        for logger in trainer.loggers:
            if not isinstance(logger, CSVLogger):
                logger.log_hyperparams(self.config)

    def discard_if_empty(self) -> bool:
        """Removes the folder that a run made which then failed before it had read its data; says whether it is gone.

        No file but those that loggers begin with: in the folder of a run that goes on may be all that is left of that.
        """
        if not self.new or (self.path / "config.yaml").exists():
            return False
        if not rank_zero_only.rank:  # type: ignore[attr-defined]
            for begun in (self.path / ".lock", *self.path.rglob("events.out.tfevents.*")):
                begun.unlink(missing_ok=True)
            # Also the folder of runs of this name, if this was the first.
            inside = [Path(folder) for folder, _, _ in os.walk(self.path, topdown=False)]
            with contextlib.suppress(OSError):
                for folder in [*inside, self.path.parent]:
                    folder.rmdir()
        return not self.path.exists()

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Notes how far metrics.csv and the clock are, once what was logged is on the disk."""
        checkpoint["run_folder"] = {"seconds": self.seconds}
        for logger in trainer.loggers:
            if isinstance(logger, MetricsFile) and trainer.is_global_zero:
                logger.save()
                checkpoint["run_folder"]["rows"] = logger.experiment.count

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Takes the clock over and, in the folder that the checkpoint is from, drops the metrics that came after it."""
        noted = checkpoint.get("run_folder")
        if trainer.state.fn != "fit" or not noted:
            return
        self._before = noted["seconds"]
        goes_on = Path(str(trainer.ckpt_path)).resolve().parent.parent == self.path.resolve()
        for logger in trainer.loggers:
            if goes_on and isinstance(logger, MetricsFile) and trainer.is_global_zero:
                logger.experiment.keep(noted["rows"])

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Starts the clock."""
        self._started = time.perf_counter()

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Stops the clock."""
        self._before, self._started = self.seconds, None

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Lists the pictures that could not be read, if some were passed over."""
        left_out = getattr(getattr(trainer, "datamodule", None), "left_out", [])
        if left_out:
            name = "left_out.txt" if trainer.world_size == 1 else f"left_out.{trainer.global_rank}.txt"
            (self.path / name).write_text("".join(f"{message}\n" for message in left_out))
            rank_zero_info(f"{len(left_out)} pictures could not be read and were left out: {self.path / name}")
