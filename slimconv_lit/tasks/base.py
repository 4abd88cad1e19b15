"""What every task shares: plain-value hyperparameters, SGD, a schedule per optimizer step, weight averaging."""

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import EMAWeightAveraging
from pytorch_lightning.utilities import rank_zero_info
from pytorch_lightning.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.optim import lr_scheduler
from torchmetrics import Metric
from torchmetrics.utilities.distributed import gather_all_tensors

from slimconv_lit.backbones.weights import load_weights
from slimconv_lit.checks import at_least, from_0_to_1
from slimconv_lit.faults import RunError
from slimconv_lit.ops import OperatorFactory, OperatorLike, describe_operator
from slimconv_lit.surgery import apply_plans, plans_of

BAR_EVERY = 10
"""Steps between two looks of the progress bar; at each, it waits for the GPU."""

if TYPE_CHECKING:
    OperatorArgument = OperatorLike
else:
    # The command line reads this type. A bare `str` in it would let a mistyped class name pass the parser.
    OperatorArgument = OperatorFactory


class Picture(NamedTuple):
    """One image of a picture that a callback lays out.

    Attributes:
        image: (3, H, W), uint8, with whatever the task drew on it.
        caption: What is printed above it.
        correct: Whether the prediction is right; None where that is unknown.
        legend: What its colours mean, by label: {12: ("dog", "#400080")}.
    """

    image: Tensor
    caption: str
    correct: bool | None = None
    legend: Mapping[int, tuple[str, str]] = MappingProxyType({})


class BatchMeans(Metric):
    """Means over the images of an epoch, of what each batch says is its own mean.

    Logging at every step costs more than a small network's step; these are a sum and a count until the epoch ends, in
    float32 whatever the precision of the network.

    Args:
        names: Of what is averaged.
    """

    full_state_update = False
    totals: Tensor
    images: Tensor

    def __init__(self, names: Sequence[str]) -> None:
        super().__init__()
        self.names = tuple(names)
        self.add_state("totals", torch.zeros(len(self.names), dtype=torch.float32), dist_reduce_fx="sum")
        self.add_state("images", torch.zeros((), dtype=torch.float32), dist_reduce_fx="sum")

    def _apply(self, fn: Callable[[Tensor], Tensor], *args: Any) -> nn.Module:
        # With its task it goes to a device, and not to another precision: sums of bf16 stop growing, and fp16 ends.
        return super()._apply(lambda tensor: tensor.to(fn(tensor).device), *args)

    def update(self, images: int, **means: Tensor) -> None:
        """Adds a batch of so many `images`, with a mean (a scalar) for each name, if all of them are finite."""
        values = torch.stack([means[name].detach().to(self.totals) for name in self.names])
        # A batch that a fit lets go by. Asked on the device, which nothing has to wait for.
        finite = values.isfinite().all()
        self.totals += torch.where(finite, images * values, 0.0)
        self.images += torch.where(finite, images, 0)

    def compute(self) -> dict[str, Tensor]:
        """The means by name; not a number where there was no batch."""
        return dict(zip(self.names, self.totals / self.images, strict=True))


class MovingAverage(EMAWeightAveraging):
    """Lightning's moving average, which in a test or validation that follows a fit leaves the weights alone.

    Its parent would put the weights that were trained on, or the last average, in the place of the checkpoint's.
    """

    _in_place = False

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Restores average and weights when a fit goes on."""
        if trainer.state.fn == "fit":
            super().on_load_checkpoint(trainer, pl_module, checkpoint)

    def on_validation_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Puts the average in place for the validations of a fit."""
        if trainer.state.fn == "fit":
            super().on_validation_epoch_start(trainer, pl_module)
            self._in_place = True

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Puts the weights that are trained back."""
        if trainer.state.fn == "fit":
            super().on_validation_epoch_end(trainer, pl_module)
            self._in_place = False

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Puts them back where a validation is broken off, for what may be saved then."""
        if self._in_place:
            self._swap_models(pl_module)
            self._in_place = False


class BaseTask(pl.LightningModule):
    """A task is its hyperparameters plus three hooks: `build_model`, `build_loss` and `build_metrics`.

    A training step hands its loss to `track`, which logs it where somebody looks, and its mean at the epoch's end.

    All hyperparameters, those of subclasses too, are in `self.hparams` as plain values before the hooks are called.

    Args:
        backbone: A name that `create_backbone` knows.
        operator: The operator in the place of the spatial convolutions: a class, a partial, a name or plain values.
            None leaves the backbone as it is.
        backbone_options: More arguments of `create_backbone`: {"exclude": "layer1.*"}, {"weights": "DEFAULT"}.
        weights: A file to start from, as `load_weights` takes it; a pruned network's prunes this one.
        weights_exclude: Patterns of tensors that are not taken from it: ["fc.*"] for other classes.
        lr: Learning rate after warm-up.
        momentum: Momentum of SGD.
        weight_decay: Weight decay of SGD, on all parameters.
        nesterov: Whether SGD uses Nesterov's momentum.
        schedule: How the learning rate falls, once per optimizer step: "multistep" by `gamma` at each of
            `milestones`, "cosine" to zero at the end of training, "poly" (power 0.9) to 1e-6, "constant" not at all.
        milestones: Epochs after which "multistep" lowers the learning rate.
        gamma: Factor of "multistep".
        warmup_epochs: Epochs in which the learning rate rises linearly from a hundredth of `lr`.
        ema_decay: Decay of an exponential moving average of the weights, which is then what is validated, saved and
            tested. None for no average.

    Raises:
        ValueError: If a number is out of its range, or `milestones` do not rise.
    """

    monitor: str = "val/loss"
    """The metric that the best checkpoint is chosen by."""
    monitor_mode: Literal["min", "max"] = "min"
    tracked: tuple[str, ...] = ("loss",)
    """What is logged of training, as train/loss and so on."""

    def __init__(
        self,
        backbone: str,
        operator: OperatorArgument | None = None,
        backbone_options: dict[str, Any] | None = None,
        weights: str | None = None,
        weights_exclude: Sequence[str] = (),
        lr: float = 0.1,
        momentum: float = 0.9,
        weight_decay: float = 1e-4,
        nesterov: bool = False,
        schedule: Literal["multistep", "cosine", "poly", "constant"] = "cosine",
        milestones: Sequence[float] = (),
        gamma: float = 0.1,
        warmup_epochs: float = 0.0,
        ema_decay: float | None = None,
    ) -> None:
        super().__init__()
        at_least(0, lr=lr, momentum=momentum, weight_decay=weight_decay, gamma=gamma, warmup_epochs=warmup_epochs)
        from_0_to_1(ema_decay=ema_decay)
        if nesterov and not momentum:
            raise ValueError("nesterov=True needs a momentum above 0")
        if any(later <= sooner for sooner, later in pairwise([0, *milestones])):
            raise ValueError(f"milestones={list(milestones)} must rise, from above 0")
        # logger=False: the run folder hands the nested configuration to the loggers, once.
        self.save_hyperparameters(logger=False, ignore=["operator"])
        # The command line hands every task what it learns from the data; in_channels is no argument of all.
        taken = {name for cls in type(self).__mro__ for name in inspect.signature(cls).parameters}
        for name in [name for name in self.hparams if name not in taken and not name.startswith("_")]:
            del self.hparams[name]
        # Plain values, also when built from Python: a checkpoint must load without unpickling a class.
        self.hparams["operator"] = None if operator is None else describe_operator(operator)
        self.hparams["milestones"] = list(milestones)
        self.hparams["weights_exclude"] = list(weights_exclude)
        self.model = self.build_model()
        self.loss = self.build_loss()
        self.train_means, self.val_means = BatchMeans(self.tracked), BatchMeans(["loss"])
        self.build_metrics()
        # A checkpoint of this task holds what the first weights became; reading it must not ask for them again.
        options = self.hparams["backbone_options"] or {}
        self.hparams["backbone_options"] = {k: v for k, v in options.items() if k not in ("weights", "pretrained")}
        self.hparams["weights"] = None

    def build_model(self) -> nn.Module:
        """The network, from `self.hparams`."""
        raise NotImplementedError

    def start_from_weights(self, network: nn.Module) -> nn.Module:
        """Reads the file that `weights` names into `network`, if there is one, and says what became of it."""
        if self.hparams["weights"]:
            rank_zero_info(load_weights(network, self.hparams["weights"], exclude=self.hparams["weights_exclude"]))
        return network

    def build_loss(self) -> nn.Module:
        """What is minimised, from `self.hparams`."""
        raise NotImplementedError

    def build_metrics(self) -> None:
        """Sets the metrics as attributes, so that Lightning moves and resets them."""
        raise NotImplementedError

    def draw(self, batch: Any, outputs: Any) -> list[Picture]:
        """One picture for each image of `batch`; a callback lays them out, writes and logs them.

        Args:
            batch: (images, targets), or (images, names) when there is no truth.
            outputs: What `forward` returned for these images in evaluation mode.
        """
        return []

    def counted(self, input_size: tuple[int, int, int]) -> tuple[nn.Module, tuple[int, int, int]]:
        """What `macs` counts for one image of the datamodule: the network, and the size (C, H, W) that it reads."""
        return self.model, input_size

    def forward(self, images: Tensor) -> Any:
        """Hands `images` (B, C, H, W) to the network."""
        return self.model(images)

    def pixels(self, images: Tensor) -> Tensor:
        """Undoes the datamodule's normalisation: (B, C, H, W) floats become (B, 3, H, W) uint8."""
        data = getattr(self.trainer, "datamodule", None)
        mean, std = (images.new_tensor(getattr(data, key, default)) for key, default in (("mean", 0.0), ("std", 1.0)))
        plain = images * std.view(-1, 1, 1) + mean.view(-1, 1, 1)
        return (plain.clamp(0, 1) * 255).round().to(torch.uint8).expand(-1, 3, -1, -1)

    @property
    def class_names(self) -> Sequence[str]:
        """The datamodule's class names, or numbers where there is no datamodule."""
        names: Sequence[str] | None = getattr(getattr(self._trainer, "datamodule", None), "class_names", None)
        return names or [str(number) for number in range(self.hparams["num_classes"])]

    def track(self, batch_idx: int, images: int, **means: Tensor) -> None:
        """Takes note of a training step: of its loss and the like, means over so many `images`, named as in `tracked`.

        Loggers and the progress bar are told the loss as often as they look.
        """
        self.train_means.update(images, **means)
        trainer = self._trainer
        if trainer is None:
            return
        every: int = trainer.log_every_n_steps  # type: ignore[attr-defined]
        logged = every and (self.global_step + 1) % every == 0
        if logged or (batch_idx + 1) % BAR_EVERY == 0 or trainer.is_last_batch:
            self.log("train/loss_step", means["loss"], on_epoch=False, prog_bar=True)

    def on_train_epoch_start(self) -> None:
        """Forgets the last epoch."""
        self.train_means.reset()

    def on_train_epoch_end(self) -> None:
        """Logs the epoch's means, unless a validation has."""
        if self.train_means.update_called:
            self._log_means("train", self.train_means)

    def on_validation_epoch_end(self) -> None:
        """Logs the mean loss, where the task has handed it to `val_means`; behind an epoch, also those of training.

        A fit that goes on from the checkpoint of this validation has the epoch behind it, and would not log them.
        """
        if self.val_means.update_called:
            self._log_means("val", self.val_means)
        trainer = self.trainer
        if trainer.state.fn == "fit" and not trainer.sanity_checking and trainer.is_last_batch:
            self.on_train_epoch_end()

    def _log_means(self, stage: str, means: BatchMeans) -> None:
        values = {f"{stage}/{name}": value.to(self.device) for name, value in means.compute().items()}
        # `compute` has put the processes' parts together, so all have the same; Lightning warns unless told to ask.
        self.log_dict(values, sync_dist=True)
        means.reset()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Notes what was pruned, and the classes, which Lightning leaves out unless its command line built them.

        Also what each process has summed of an epoch that is not over yet.
        """
        for name in ("totals", "images"):
            own = getattr(self.train_means, name)
            of_each = gather_all_tensors(own) if self.trainer.world_size > 1 else [own]
            checkpoint.setdefault("train_means", {})[name] = torch.stack(of_each)
        parts = {"model": self, "data": getattr(self.trainer, "datamodule", None)}
        classes = {part: type(value) for part, value in parts.items() if value is not None}
        checkpoint["class_paths"] = {part: f"{cls.__module__}.{cls.__qualname__}" for part, cls in classes.items()}
        if plans := plans_of(self.model):
            checkpoint["pruned"] = plans

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Prunes the network as that of the checkpoint was, before its weights are read; an epoch's sums go on."""
        apply_plans(self.model, checkpoint.get("pruned", {}))
        if not (sums := checkpoint.get("train_means")) or not sums["images"].any():
            return
        # Nothing, so that they count as gathered in all processes.
        self.train_means.update(0, **dict.fromkeys(self.tracked, torch.zeros(())))
        world, rank = (self._trainer.world_size, self._trainer.global_rank) if self._trainer else (1, 0)
        for name, of_each in sums.items():
            # Among another number of processes, the first one has all.
            own = of_each[rank] if len(of_each) == world else of_each.sum(0) * (rank == 0)
            getattr(self.train_means, name).copy_(own)

    def parameter_groups(self) -> list[dict[str, Any]]:
        """What the optimizer is given: groups of parameters, with what differs from `lr` and `weight_decay` in each."""
        return [{"params": list(self.parameters())}]

    def configure_callbacks(self) -> list[pl.Callback]:
        """Adds the moving average while fitting; outside of it there is nothing to average."""
        decay = self.hparams["ema_decay"]
        return [MovingAverage(decay=decay)] if decay and self.trainer.state.fn == "fit" else []

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """SGD with the schedule, which is stepped after each optimizer step."""
        h = self.hparams
        groups = self.parameter_groups()
        optimizer = torch.optim.SGD(
            groups, h["lr"], momentum=h["momentum"], weight_decay=h["weight_decay"], nesterov=h["nesterov"]
        )
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": self._schedule(optimizer), "interval": "step"},
        }

    def _schedule(self, optimizer: torch.optim.Optimizer) -> lr_scheduler.LRScheduler:
        h, groups = self.hparams, optimizer.param_groups
        total = self.trainer.estimated_stepping_batches
        if not isinstance(total, int) or total < 1:
            raise RunError(
                f"the schedule needs to know where it ends: max_epochs={self.trainer.max_epochs}, max_steps="
                f"{self.trainer.max_steps}; set trainer.max_epochs or trainer.max_steps to a number above 0"
            )
        # Where only max_steps is set, asking for their total has not made Lightning count the batches.
        self.trainer.fit_loop.setup_data()
        steps_per_epoch = math.ceil(self.trainer.num_training_batches / self.trainer.accumulate_grad_batches)
        warmup = round(h["warmup_epochs"] * steps_per_epoch)
        remaining = max(1, total - warmup)
        schedule: lr_scheduler.LRScheduler
        match h["schedule"]:
            case "multistep":
                steps = [round(epoch * steps_per_epoch) - warmup for epoch in h["milestones"]]
                schedule = lr_scheduler.MultiStepLR(optimizer, steps, h["gamma"])
            case "cosine":
                schedule = lr_scheduler.CosineAnnealingLR(optimizer, remaining)
            case "poly":
                schedule = lr_scheduler.LambdaLR(optimizer, [_poly(group["lr"], remaining) for group in groups])
            case _:
                schedule = lr_scheduler.ConstantLR(optimizer, factor=1.0)
        if not warmup:
            return schedule
        rise = lr_scheduler.LinearLR(optimizer, start_factor=0.01, total_iters=warmup)
        return lr_scheduler.SequentialLR(optimizer, [rise, schedule], [warmup])


def _poly(rate: float, steps: int, power: float = 0.9, least: float = 1e-6) -> Callable[[int], float]:
    """What `rate` is multiplied by after each step: (1 - step / steps) ** power, as long as the rate is above `least`.

    torch's own PolynomialLR ends at zero; the reference for segmentation (VainF) at `least`.
    """
    floor = min(1.0, least / rate) if rate else 0.0
    return lambda step: max(floor, max(0.0, 1 - step / steps) ** power)
