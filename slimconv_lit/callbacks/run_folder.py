"""One folder for one run: its configuration, metrics, checkpoints, pictures and results.

runs/<name>/<date-time>/config.yaml is the whole configuration; `fit --config` takes it back. Beside it lie metrics.csv
with every logged number, tensorboard/, checkpoints/best.ckpt and last.ckpt, pictures/ with what the callbacks drew, and
results.json with what the best checkpoint reached on the test set.
"""

import os
import time
from collections.abc import Mapping
from datetime import datetime
from itertools import count
from pathlib import Path
from typing import Any, Literal

import pytorch_lightning as pl
import yaml  # type: ignore[import-untyped]
from pytorch_lightning.callbacks import Callback, ModelCheckpoint
from pytorch_lightning.loggers import CSVLogger, Logger, TensorBoardLogger, WandbLogger
from pytorch_lightning.utilities import rank_zero_only

from slimconv_lit.ops.base import closest

LOGGERS = ("csv", "tensorboard", "wandb")


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


def make_loggers(names: str, folder: Path) -> list[Logger]:
    """The loggers that the comma-separated `names` ask for, writing into `folder`; metrics.csv is always among them.

    Raises:
        ValueError: If a name is unknown.
    """
    wanted = [name.strip() for name in names.split(",") if name.strip()]
    for name in wanted:
        if name not in LOGGERS:
            raise ValueError(f"--logger: there is no {name!r}; {closest(name, LOGGERS)}")
    loggers: list[Logger] = []
    if "tensorboard" in wanted:
        loggers.append(TensorBoardLogger(folder / "tensorboard", name="", version="", default_hp_metric=False))
    if "wandb" in wanted:
        project = os.environ.get("WANDB_PROJECT", "slimconv_lit")
        loggers.append(WandbLogger(f"{folder.parent.name}/{folder.name}", save_dir=folder, project=project))
    # Last: callbacks that write pictures or histograms look at the first logger only.
    return [*loggers, CSVLogger(folder, name="", version="")]


def make_checkpoints(folder: Path, monitor: str, mode: Literal["min", "max"]) -> list[ModelCheckpoint]:
    """Keep `best.ckpt` by the metric `monitor`, and `last.ckpt` of the last validation, below `folder`."""
    # Two, for `save_last=True` beside a monitor writes last.ckpt only when the best one changes.
    best = ModelCheckpoint(folder / "checkpoints", "best", monitor=monitor, mode=mode, auto_insert_metric_name=False)
    return [best, ModelCheckpoint(folder / "checkpoints", "last", auto_insert_metric_name=False)]


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
        path: The run's folder, from `new_run_folder`.
        config: The whole configuration, as plain values.
    """

    def __init__(self, path: Path, config: Mapping[str, Any]) -> None:
        self.path = path
        self.config = dict(config)
        self.seconds = 0.0
        self._written = False

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Makes all processes agree on the folder; the first one writes the configuration."""
        self.path = Path(trainer.strategy.broadcast(str(self.path)))
        if self._written or not trainer.is_global_zero:
            return
        self._written = True
        (self.path / "config.yaml").write_text(yaml.safe_dump(self.config, sort_keys=False))
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger):
                # W&B draws everything over its own step; validation is a matter of epochs.
                logger.experiment.define_metric("epoch")
                for part in ("val/*", "test/*"):
                    logger.experiment.define_metric(part, step_metric="epoch")
            if not isinstance(logger, CSVLogger):
                logger.log_hyperparams(self.config)

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Starts the clock."""
        self.seconds = -time.perf_counter()

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Stops the clock."""
        self.seconds += time.perf_counter()
