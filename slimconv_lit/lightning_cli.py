"""fit, validate, test and predict: LightningCLI with run folders, composed configs and checkpoints that are enough."""

import json
import os
import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from jsonargparse.typing import PositiveInt
from lightning_fabric.plugins import CheckpointIO
from lightning_fabric.utilities.exceptions import MisconfigurationException
from pytorch_lightning import Trainer
from pytorch_lightning.accelerators import CUDAAccelerator
from pytorch_lightning.callbacks import Callback, ModelCheckpoint, ProgressBar, TQDMProgressBar
from pytorch_lightning.cli import ArgsType, LightningArgumentParser, LightningCLI
from pytorch_lightning.utilities import rank_zero_only
from pytorch_lightning.utilities.exceptions import SIGTERMException

from slimconv_lit.analysis.complexity import macs, params
from slimconv_lit.backbones.stages import WithoutWeights
from slimconv_lit.callbacks import (
    ClassReport,
    DetectionReport,
    DetectionWriter,
    FiniteLoss,
    LastValidation,
    MaskWriter,
    PredictionWriter,
    RunFolder,
    SegmentationReport,
    Visualize,
)
from slimconv_lit.callbacks.checkpoints import DurableIO, RandomState, SameBatches, make_checkpoints
from slimconv_lit.callbacks.loggers import Wandb, make_loggers
from slimconv_lit.callbacks.run_folder import Lock, new_run_folder
from slimconv_lit.checkpoint_files import read_checkpoint
from slimconv_lit.config_files import Config, compose
from slimconv_lit.data import BaseDataModule
from slimconv_lit.distributed import FSDP2, launched, prepare_devices
from slimconv_lit.durable import write_whole
from slimconv_lit.errors import Parser, explain
from slimconv_lit.faults import RunError, explain_fault, is_refusal
from slimconv_lit.memory import keep_memory
from slimconv_lit.ops.reconstruct import Kernel, use_kernel
from slimconv_lit.preemption import PreemptibleTrainer
from slimconv_lit.quiet import quieten
from slimconv_lit.results import describe_network, limits_of, of_a_part, results_table
from slimconv_lit.tasks import BaseTask
from slimconv_lit.tasks.base import BAR_EVERY
from slimconv_lit.usage import UsageError


def channels(size: Sequence[int]) -> int:
    """Of an image of `size` (C, H, W); `--help` shows the name."""
    return size[0]


# Arguments of the task that only the datamodule knows, and where they come from.
_LINKS = {"num_classes": ("data.num_classes", None), "in_channels": ("data.input_size", channels)}
# What a verb reads, in the names of loaders.
_STAGES = {"fit": ("train", "val", "test"), "validate": ("val",)}
# Each is for one task, and does nothing in the others.
_REPORTS = (ClassReport, SegmentationReport, DetectionReport)
_WRITERS = (PredictionWriter, MaskWriter, DetectionWriter)

TERMINATED, INTERRUPTED = 143, 130
"""Exit status of a run that was told to end and has saved, or was interrupted: 128 + signal, as shells count."""


class SlimCLI(LightningCLI):
    """One verb of Lightning's, with its run folder.

    Args:
        verb: fit, validate, test or predict; only its parser is built.
        args: The verb's command line; the config is already composed and `--ckpt_path` is a file.
        purpose: What the run folder is named after; None for the verb.
    """

    run_folder: RunFolder | None = None
    lock: Lock | None = None
    results: dict[str, Any]

    def __init__(self, verb: str, args: Sequence[str], purpose: str | None = None) -> None:
        self.verb = verb
        self.purpose = purpose or verb
        self.results = {}
        try:
            super().__init__(
                BaseTask,
                BaseDataModule,
                save_config_callback=None,
                trainer_class=PreemptibleTrainer,
                seed_everything_default=0,
                parser_class=Parser,
                subclass_mode_model=True,
                subclass_mode_data=True,
                auto_configure_optimizers=False,
                args=[verb, *args],
            )
        except BaseException:
            if self.run_folder and not self.run_folder.discard_if_empty() and not rank_zero_only.rank:  # type: ignore[attr-defined]
                print(f"in {self.run_folder.path}")
            raise
        finally:
            for logger in self.trainer.loggers if getattr(self, "trainer", None) else ():
                if isinstance(logger, Wandb):
                    logger.finish()
            if self.lock:
                self.lock.release()

    def subcommands(self) -> dict[str, set[str]]:  # type: ignore[override]
        """The verb alone: building all four parsers takes four times as long."""
        return {self.verb: super().subcommands()[self.verb]}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """The options of the run folder, and what the task learns from the datamodule."""
        parser.add_argument("--name", type=str | None, help="Name of the run; by default that of the config file.")
        parser.add_argument("--run_root", type=str, default="runs", help="Folder of all runs.")
        parser.add_argument(
            "--logger", type=str, default="tensorboard", help="Besides metrics.csv: tensorboard, wandb, or both."
        )
        parser.add_argument("--threads", type=int | None, help="CPU threads of torch; null for as many as cores.")
        parser.add_argument(
            "--channels_last", type=bool | None, help="Keep the network's weights channels last; null does so on GPUs."
        )
        parser.add_argument("--compile", type=bool, default=False, help="Compile the network with torch.compile.")
        parser.add_argument(
            "--matmul_precision",
            type=Literal["highest", "high", "medium"] | None,
            help="Of float32 products on a GPU: high allows TF32, and is what null means there.",
        )
        parser.add_argument("--kernel", type=Kernel, default="torch", help="What folds SlimConv's maps on a GPU.")
        if self.verb == "fit":
            parser.add_argument("--test_after", type=bool, default=True, help="Test the best checkpoint at the end.")
            parser.add_argument(
                "--save_every", type=PositiveInt | None, help="Steps between two last.ckpt; null for validations only."
            )
            parser.add_argument(
                "--on_bad_loss",
                type=Literal["raise", "skip"],
                default="raise",
                help="Stop at a loss that is not finite, or let up to 1 % of an epoch's batches go by.",
            )
        for target, (source, compute) in _LINKS.items():
            parser.link_arguments(source, f"model.init_args.{target}", compute_fn=compute, apply_on="instantiate")

    def _prepare_subcommand_parser(self, klass: type, subcommand: str, **kwargs: Any) -> LightningArgumentParser:
        parser = super()._prepare_subcommand_parser(klass, subcommand, **kwargs)
        # Our checkpoints hold nothing that would have to be unpickled; a stranger's file must not run code.
        parser.set_defaults(weights_only=True)
        # Lightning's counts no FLOPs on the CPU and says 0; ours are in the table at the end.
        parser.set_defaults({"trainer.enable_model_summary": False})
        return parser

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """Parses `args` alone; Lightning's own version also looks at `sys.argv`.

        Raises:
            UsageError: With the accepted name that is closest to a wrong one.
        """
        assert isinstance(args, list)
        linked = re.compile(rf"--model\.(init_args\.)?({'|'.join(_LINKS)})(=|$)")
        if typed := next(filter(linked.match, args), None):
            raise UsageError(f"{typed.partition('=')[0]} is not to be set: the data say it")
        try:
            self.config = parser.parse_args(args)
        except UsageError as error:
            options = self._parser(self.verb).get_defaults().keys()
            raise UsageError(explain(str(error), list(options), args)) from error

    def before_instantiate_classes(self) -> None:
        """Sets the number of threads and the kernel before anything computes.

        Raises:
            UsageError: If the kernel cannot run here.
        """
        own = self.config[self.verb]
        if own["threads"]:
            torch.set_num_threads(own["threads"])
        try:
            use_kernel(own["kernel"])
        except ValueError as error:
            raise UsageError(f"--kernel: {error}") from error

    def _parse_ckpt_path(self) -> None:
        # Lightning would let the checkpoint's hyperparameters beat the command line; see `compose`.
        pass

    def instantiate_classes(self) -> None:
        """Builds datamodule, task and trainer.

        Raises:
            UsageError: With what a constructor had against its values.
        """
        try:
            super().instantiate_classes()
            if self.trainer is not None:
                prepare_devices(self.trainer, self.model)
        except (ValueError, MisconfigurationException) as error:
            if os.environ.get("JSONARGPARSE_DEBUG"):
                raise
            raise UsageError(explain(str(error).partition("Given value")[0])) from error
        if path := self.config[self.verb].get("ckpt_path"):
            self._take_shape(path)
        if self.trainer is not None:
            self._speed_up()
            if isinstance(self.trainer.strategy, FSDP2):
                # Now: a sharded network cannot be counted.
                _ = self.costs

    def _speed_up(self) -> None:
        own, on_gpu = self.config[self.verb], isinstance(self.trainer.accelerator, CUDAAccelerator)
        network = self.model.model
        if own["channels_last"] or (own["channels_last"] is None and on_gpu):
            network.to(memory_format=torch.channels_last)
        if not on_gpu:
            keep_memory()
        if own["matmul_precision"] or on_gpu:
            torch.set_float32_matmul_precision(own["matmul_precision"] or "high")
        if own["compile"]:
            # In place: a wrapper would change the names in checkpoints.
            network.compile()

    def _take_shape(self, path: str) -> None:
        """Prunes the network as the checkpoint's was: Lightning would do it when callbacks have copied the network."""
        try:
            self.model.on_load_checkpoint(read_checkpoint(Path(path)))
        except (ValueError, RuntimeError, TypeError) as error:
            if os.environ.get("JSONARGPARSE_DEBUG"):
                raise
            raise UsageError(f"{path}: {error}") from error

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """A trainer with the run's folder, loggers and callbacks, besides those that the user asked for."""
        own = self.config_init[self.verb]
        trainer = own["trainer"]
        callbacks = trainer["callbacks"] or []
        callbacks = list(callbacks) if isinstance(callbacks, list) else [callbacks]
        if trainer["devices"] == "auto" and trainer["num_nodes"] == 1:
            kwargs |= launched()
        if not trainer["fast_dev_run"]:
            path, new = self._open_folder(own)
            self.run_folder = RunFolder(path, self.full_config(), new)
            callbacks = self._own_callbacks(callbacks) + callbacks
            if trainer["logger"] in (None, True):
                # A prediction logs nothing.
                kwargs["logger"] = make_loggers("csv" if self.verb == "predict" else own["logger"], path)
        if trainer["enable_progress_bar"] is not False and not any(isinstance(c, ProgressBar) for c in callbacks):
            # Lightning would take rich's bar wherever that package happens to be installed.
            # At each step it would wait for the GPU, to print a loss that nobody can read so fast.
            callbacks.append(TQDMProgressBar(refresh_rate=BAR_EVERY))
        plugins = trainer["plugins"] if isinstance(trainer["plugins"], list) else [trainer["plugins"]]
        plugins = [plugin for plugin in plugins if plugin is not None]
        if not any(isinstance(plugin, CheckpointIO) for plugin in plugins):
            plugins.append(DurableIO())
        return super().instantiate_trainer(callbacks=callbacks, plugins=plugins, **kwargs)

    def _open_folder(self, own: Mapping[str, Any]) -> tuple[Path, bool]:
        """The folder of this run, and whether it is new: not where it is that of a run that goes on.

        Raises:
            UsageError: If it cannot be written to, or another process is writing into it.
        """
        home, last = Path(own["run_root"], own["name"] or self.verb), Path(own.get("ckpt_path") or "").resolve()
        goes_on = self.verb == "fit" and last.match("checkpoints/last.ckpt")
        goes_on = goes_on and last.parent.parent.parent == home.resolve()
        try:
            old = home / last.parent.parent.name
            path = old if goes_on else new_run_folder(home.parent, home.name, self.purpose)
            # The other processes of a distributed run write nothing.
            if self.verb == "fit" and not rank_zero_only.rank:  # type: ignore[attr-defined]
                self.lock = Lock(path)
        except BlockingIOError as error:
            raise UsageError(f"{error}; wait for its end, or begin a new run there with another --name") from error
        except OSError as error:
            raise UsageError(f"--run_root={own['run_root']}: cannot write into {home}: {error.strerror}") from error
        return path, not goes_on

    def _own_callbacks(self, given: Sequence[Callback]) -> list[Callback]:
        assert self.run_folder
        own = self.config_init[self.verb]
        checkpoint = not any(isinstance(c, ModelCheckpoint) for c in given)
        reports: list[Callback] = [Visualize(), *(report() for report in _REPORTS)]
        match self.verb:
            case "fit":
                callbacks = [self.run_folder, SameBatches(), RandomState(), FiniteLoss(own["on_bad_loss"])]
                callbacks += [LastValidation(), *reports]
                if checkpoint and own["trainer"]["enable_checkpointing"] is not False:
                    monitor = (self.model.monitor, self.model.monitor_mode)
                    callbacks += make_checkpoints(self.run_folder.path, *monitor, every=own["save_every"])
                return callbacks
            case "predict":
                return [self.run_folder, *(writer() for writer in _WRITERS)]
            case _:
                return [self.run_folder, LastValidation(), *reports]

    def full_config(self) -> Config:
        """All values in force, the linked ones too, fit to be a config file."""
        parser = self._parser(self.verb)
        text = parser.dump(self.config[self.verb], skip_link_targets=False, skip_none=False, format="json")
        config: Config = json.loads(text)
        for target in self.model.hparams.keys() & _LINKS.keys():
            config["model"]["init_args"][target] = self.model.hparams[target]
        # The file is a recipe, not a resumption.
        config["ckpt_path"] = None
        return config

    def _run_subcommand(self, subcommand: str) -> None:
        """Runs the verb.

        Raises:
            UsageError: If an option turns out to be wrong once the data have been read.
            RunError: If memory has run out or a process that loads images has died; it says what to lower.
            SystemExit: If the process was told to end (SIGTERM): a fit has saved last.ckpt, and the status is 143. Or
                if it was interrupted (Ctrl-C, SIGINT): the status is 130.
        """
        try:
            super()._run_subcommand(subcommand)
        except SIGTERMException:
            self._tell_how_to_go_on("told to end")
            raise SystemExit(TERMINATED) from None
        except SystemExit as end:
            # Lightning ends with status 1 when it is interrupted.
            if not isinstance(end.__context__, KeyboardInterrupt):
                raise
            self._tell_how_to_go_on("interrupted")
            raise SystemExit(INTERRUPTED) from None
        except (RuntimeError, MemoryError, ValueError, MisconfigurationException) as error:
            if os.environ.get("JSONARGPARSE_DEBUG"):
                raise
            if isinstance(error, MisconfigurationException) or is_refusal(error):
                raise UsageError(" ".join(str(error).split())[:500]) from error
            if told := explain_fault(error, self._batch()):
                raise RunError(told) from error
            raise

    def _tell_how_to_go_on(self, what: str) -> None:
        last = self.run_folder and self.run_folder.path / "checkpoints" / "last.ckpt"
        if self.trainer.is_global_zero:
            # On a line of its own, behind the progress bar's.
            print(f"\n{what}{'; `fit --ckpt_path last` goes on' if last and last.exists() else ''}")

    def _batch(self) -> str:
        data, fitting = self.datamodule, self.verb == "fit"
        key = "batch_size" if fitting else "eval_batch_size"
        return f"{getattr(data, key)} images of {' x '.join(map(str, data.input_size))} at a time (--data.{key})"

    def predict(self, **kwargs: Any) -> None:
        """Predicts; a callback writes each batch, so none is kept in memory."""
        self.trainer.predict(**kwargs | {"return_predictions": False})

    def validate(self, **kwargs: Any) -> None:
        """Validates; below Lightning's own table stands what it is of, if that is not all."""
        self.trainer.validate(**kwargs)
        if (limited := self._limits()) and self.trainer.is_global_zero:
            print(of_a_part(limited))

    def test(self, **kwargs: Any) -> None:
        """Tests, prints the same table as a fit, and writes results.json."""
        self._report(self.trainer.test(**kwargs | {"verbose": False}))

    def before_fit(self) -> None:
        """Has test images that cannot be read told before the training, not behind it."""
        self.datamodule.test_follows = self.config_init["fit"]["test_after"] and self.run_folder is not None

    def after_fit(self) -> None:
        """Tests the best checkpoint, prints one table and writes results.json."""
        own, folder = self.config_init["fit"], self.run_folder
        if not own["test_after"] or folder is None:
            return
        best = getattr(self.trainer.checkpoint_callback, "best_model_path", "") or None
        tested = self.trainer.test(self.model, self.datamodule, ckpt_path=best, weights_only=True, verbose=False)
        self._report(tested, seconds=round(folder.seconds, 1))

    @cached_property
    def costs(self) -> dict[str, int]:
        """What the network has and takes: params and macs."""
        return {"params": params(self.model.model), "macs": macs(*self.model.counted(self.datamodule.input_size))}

    def _limits(self) -> str:
        return limits_of(self.trainer, self.datamodule, *_STAGES.get(self.verb, (self.verb,)))

    def _report(self, tested: Sequence[Mapping[str, float]], **more: float) -> None:
        limited = self._limits()
        self.results = {
            "network": describe_network(self.model.hparams),
            **{key: value for of_loader in tested for key, value in of_loader.items()},
            **self.costs,
            **more,
            **({"limited": limited} if limited else {}),
        }
        if self.trainer.is_global_zero:
            if self.run_folder:
                write_whole(self.run_folder.path / "results.json", json.dumps(self.results, indent=2) + "\n")
            print(f"\n{results_table([self.results], self.model.monitor)}\n")


class _Built(SlimCLI):
    """A fit's model and data, built and not run."""

    def before_instantiate_classes(self) -> None:
        """Forgets where weights would come from: they cost a download, and change no count."""
        arguments = self.config["fit"]["model"]["init_args"]
        arguments["weights"] = None
        options = arguments["backbone_options"] or {}
        arguments["backbone_options"] = {k: v for k, v in options.items() if k not in ("weights", "pretrained")}

    def instantiate_trainer(self, **kwargs: Any) -> Any:
        """None: nothing is trained."""
        return None

    def _run_subcommand(self, subcommand: str) -> None:
        pass


def build_fit(argv: Sequence[str]) -> SlimCLI:
    """Builds what a `fit` command line would train, without weights to start from: `.model` and `.datamodule`.

    Raises:
        UsageError: If the command line is wrong or the network cannot be built.
    """
    try:
        return _Built("fit", compose("fit", [*argv, "--seed_everything=false"]))
    except (FileNotFoundError, ValueError) as error:
        raise UsageError(str(error)) from error


def preview(argv: Sequence[str]) -> dict[str, Any]:
    """What the network of a `fit` command line is and costs, without weights: network, params and macs.

    Raises:
        UsageError: As `build_fit`.
    """
    with WithoutWeights():
        cli = build_fit(argv)
        return {"network": describe_network(cli.model.hparams)} | cli.costs


class _Opened(SlimCLI):
    """A checkpoint's model and data, with a run folder, and nothing run."""

    def _run_subcommand(self, subcommand: str) -> None:
        pass


def open_checkpoint(purpose: str, argv: Sequence[str]) -> SlimCLI:
    """What a checkpoint holds, for a verb of our own: `.model` with its weights, `.datamodule` and `.run_folder`.

    Args:
        purpose: Becomes the end of the run folder's name.
        argv: `--ckpt_path` and what `predict` takes.

    Raises:
        UsageError: If the command line is wrong or the weights are not the network's.
    """
    quieten("predict")
    try:
        args = compose("predict", argv)
    except (FileNotFoundError, ValueError) as error:
        raise UsageError(str(error)) from error
    cli = _Opened("predict", args, purpose)
    path = cli.config["predict"]["ckpt_path"]
    try:
        cli.model.load_state_dict(read_checkpoint(Path(path))["state_dict"])
    except RuntimeError as error:
        raise UsageError(f"{path}: {error}") from error
    # As a running verb would: the task asks the datamodule for class names and for its normalisation.
    cli.model.trainer, cli.trainer.datamodule = cli.trainer, cli.datamodule  # type: ignore[attr-defined]
    return cli


def run(verb: str, argv: Sequence[str]) -> SlimCLI:
    """Runs one of Lightning's verbs and hands back all that took part.

    Raises:
        UsageError: If the command line or a configuration is wrong.
    """
    quieten(verb)
    try:
        args = compose(verb, argv)
    except (FileNotFoundError, ValueError) as error:
        raise UsageError(str(error)) from error
    cli = SlimCLI(verb, args)
    if cli.run_folder and cli.trainer.is_global_zero:
        print(f"in {cli.run_folder.path}")
    return cli
