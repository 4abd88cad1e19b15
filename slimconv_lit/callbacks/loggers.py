"""The loggers of a run: metrics.csv that a resumed run goes on with, and none whose failure would end the training."""

import csv
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any
from weakref import WeakSet

from lightning_fabric.loggers.logger import _DummyExperiment, rank_zero_experiment
from pytorch_lightning.loggers import CSVLogger, Logger, TensorBoardLogger, WandbLogger
from pytorch_lightning.loggers.csv_logs import ExperimentWriter
from pytorch_lightning.utilities import rank_zero_warn

from slimconv_lit.lookup import closest

LOGGERS = ("csv", "tensorboard", "wandb")

_failed: WeakSet[Logger] = WeakSet()


def tell(logger: Logger, send: Callable[[], Any]) -> None:
    """Calls `send`, which writes to `logger`; if that fails, there is one warning, and the logger is left alone."""
    if logger in _failed:
        return
    try:
        send()
    except Exception as error:
        _leave_out(logger, error)


def _leave_out(logger: Logger, error: Exception) -> None:
    if logger in _failed:
        return
    _failed.add(logger)
    rank_zero_warn(f"{type(logger).__name__} has failed and is left out from here on; training goes on. {error!r}")
    if isinstance(logger, Wandb):
        logger.finish()


def _forgive(logger: Logger) -> Logger:
    """Has `tell` stand between Lightning and all that it sends to `logger`."""

    def guarded(method: Callable[..., Any]) -> Callable[..., None]:
        return lambda *args, **kwargs: tell(logger, lambda: method(*args, **kwargs))

    for name in ("log_hyperparams", "log_metrics", "log_image", "save", "after_save_checkpoint", "finalize"):
        if hasattr(logger, name):
            setattr(logger, name, guarded(getattr(logger, name)))
    return logger


class Wandb(WandbLogger):
    """W&B's run, which a training does without where W&B cannot begin it, or has lost it.

    Args:
        folder: Of the run.
    """

    def __init__(self, folder: Path) -> None:
        # W&B asks a server that it cannot reach for 90 s otherwise.
        os.environ.setdefault("WANDB_INIT_TIMEOUT", "30")
        project = os.environ.get("WANDB_PROJECT", "slimconv_lit")
        super().__init__(f"{folder.parent.name}/{folder.name}", save_dir=folder, project=project)

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        """W&B's run, begun when it is first asked for; once that has failed, one that takes all and does nothing."""
        if self._experiment is None:
            tell(self, self._begin)
        return _DummyExperiment() if self in _failed else self._experiment

    def _begin(self) -> None:
        begun: Any = super().experiment
        # W&B draws everything over its own step; validation is a matter of epochs.
        begun.define_metric("epoch")
        for part in ("val/*", "test/*"):
            begun.define_metric(part, step_metric="epoch")

    def finish(self) -> None:
        """Ends W&B's run, if it has begun; one that is left open would take in the next one of this process."""
        run: Any = self._experiment
        if run is None:
            return
        try:
            run.finish()
        except Exception as error:
            import wandb

            # W&B's own process is gone. All that is printed would still be sent there, and so would the next run.
            wandb.run = self._experiment = None
            with suppress(Exception, SystemExit):
                run._console_stop()
                wandb.teardown()
            _leave_out(self, error)


class _Rows(ExperimentWriter):
    """Lightning's writer, which goes on with a metrics.csv that is there and never has it half written."""

    def _check_log_dir_exists(self) -> None:
        # Lightning would delete the metrics of the run that goes on.
        self.count = 0
        if os.path.isfile(self.metrics_file_path):
            with open(self.metrics_file_path, newline="") as file:
                reader = csv.DictReader(file)
                self.metrics_keys = list(reader.fieldnames or ())
                self.count = sum(1 for _ in reader)

    def save(self) -> None:
        waiting = len(self.metrics)
        super().save()
        self.count += waiting

    def keep(self, count: int) -> None:
        """Drops all rows but the first `count`."""
        if count < self.count:
            self._rewrite_with_new_header(self.metrics_keys, count)
            self.count = count

    def _rewrite_with_new_header(self, fieldnames: list[str], count: int | None = None) -> None:
        with open(self.metrics_file_path, newline="") as file:
            rows = list(csv.DictReader(file))
        partial = f"{self.metrics_file_path}.partial"
        with open(partial, "w", newline="") as file:
            writer = csv.DictWriter(file, fieldnames=fieldnames)
            writer.writeheader()
            writer.writerows(rows[:count])
        os.replace(partial, self.metrics_file_path)


class MetricsFile(CSVLogger):
    """metrics.csv in the run's folder.

    Args:
        folder: Of the run.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, name="", version="")

    @property
    @rank_zero_experiment
    def experiment(self) -> _Rows:
        """The writer; made when it is first asked for."""
        if not isinstance(self._experiment, _Rows):
            self._experiment = _Rows(self.log_dir)
        return self._experiment


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
        loggers.append(Wandb(folder))
    # Last: callbacks that write pictures or histograms look at the first logger only.
    return [_forgive(logger) for logger in (*loggers, MetricsFile(folder))]
