"""Sparsity training of Network Slimming (Liu et al., ICCV 2017): an L1 penalty on the scales of batch norms."""

from collections.abc import Sequence
from functools import partial

import pytorch_lightning as pl
import torch
from lightning_fabric.utilities.exceptions import MisconfigurationException
from matplotlib.figure import Figure
from pytorch_lightning.callbacks import Callback
from pytorch_lightning.loggers import TensorBoardLogger
from torch import Tensor, nn

from slimconv_lit.callbacks.loggers import tell
from slimconv_lit.callbacks.run_folder import pictures_of
from slimconv_lit.callbacks.visualize import save_figure
from slimconv_lit.surgery import prunable_norms


class Sparsity(Callback):
    """Adds strength * sum |gamma| to the loss, over the scales of batch norms.

    The penalty enters as its subgradient, strength * sign(gamma), after gradients have been unscaled and gathered and
    before they are clipped: that is the penalty of the loss under accumulation, mixed precision and DDP. It is logged
    as train/sparsity, and the scales' histogram as pictures/scales.png and in TensorBoard.

    Args:
        strength: Lambda; the paper has 1e-4 for VGG and 1e-5 for ResNet-164 and DenseNet-40.
        exclude: Name patterns (`fnmatch`, the network's names) of norms without penalty, besides those of gates.
        initial_scale: What all these scales are set to as a fit begins (paper: 0.5); None leaves them, as for a
            network that has been trained. A fit that is resumed never changes them.
        ramp_epochs: Epochs in which the penalty rises linearly from zero; 0 for its full strength at once.
        every_n_epochs: How often the histogram is drawn; it always is at the end.

    Raises:
        ValueError: If `strength` or `ramp_epochs` is negative.
    """

    def __init__(
        self,
        strength: float = 1e-4,
        exclude: Sequence[str] = (),
        initial_scale: float | None = 0.5,
        ramp_epochs: float = 0.0,
        every_n_epochs: int = 10,
    ) -> None:
        for name, value in (("strength", strength), ("ramp_epochs", ramp_epochs)):
            if value < 0:
                raise ValueError(f"Sparsity: {name}={value} must not be negative")
        self.strength = strength
        self.exclude = tuple(exclude)
        self.initial_scale = initial_scale
        self.ramp_epochs = ramp_epochs
        self.every_n_epochs = every_n_epochs
        self._scales: list[nn.Parameter] = []

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Finds the scales and gives them their first value.

        Raises:
            MisconfigurationException: If the network has no batch norm, or a pattern leaves none.
        """
        # As in a checkpoint of the network itself, patterns do not begin with the task's "model.".
        norms = prunable_norms(getattr(pl_module, "model", pl_module), exclude=self.exclude)
        if not norms:
            excluded = list(self.exclude)
            raise MisconfigurationException(f"Sparsity: exclude={excluded} leaves no batch norm of the network")
        self._scales = [norm.weight for norm in norms.values()]  # type: ignore[misc]
        if self.initial_scale is not None and not trainer.ckpt_path:
            with torch.no_grad():
                for scale in self._scales:
                    scale.fill_(self.initial_scale)

    def strength_at(self, trainer: pl.Trainer) -> float:
        """Lambda at the trainer's present step."""
        steps = self.ramp_epochs * trainer.num_training_batches / trainer.accumulate_grad_batches
        return self.strength * min(1.0, (trainer.global_step + 1) / steps) if steps else self.strength

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Adds the subgradient."""
        strength = self.strength_at(trainer)
        with torch.no_grad():
            for scale in self._scales:
                if scale.grad is not None:
                    scale.grad.add_(scale.sign(), alpha=strength)
        total = torch.stack([scale.detach().abs().sum() for scale in self._scales]).sum()
        pl_module.log("train/sparsity", strength * total, on_step=False, on_epoch=True)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Draws and logs the histogram, if it is time to."""
        if not trainer.is_global_zero or trainer.current_epoch % self.every_n_epochs:
            return
        self._draw(trainer)

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Draws the last histogram."""
        if trainer.is_global_zero:
            self._draw(trainer)

    def _draw(self, trainer: pl.Trainer) -> None:
        scales = torch.cat([scale.detach().flatten() for scale in self._scales]).abs().float().cpu()
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                tell(logger, partial(logger.experiment.add_histogram, "scales", scales, trainer.global_step))
        save_figure(draw_scales(scales, f"epoch {trainer.current_epoch}"), pictures_of(trainer) / "scales.png", trainer)


def draw_scales(scales: Tensor, title: str) -> Figure:
    """The histogram of |gamma| over all channels, and what a global pruning ratio would take for its threshold.

    Args:
        scales: |gamma| of all channels.
        title: What is printed above.
    """
    figure = Figure(figsize=(9, 3.4), layout="constrained", dpi=110)
    left, right = figure.subplots(1, 2)
    left.hist(scales.numpy(), bins=60, color="#24548f")
    left.set_yscale("symlog", linthresh=1)
    left.set_xlabel("|gamma|")
    left.set_ylabel("channels")
    left.set_title(f"{len(scales):,} scales, {title}", fontsize=10)
    ordered = scales.sort().values
    right.plot(torch.linspace(0, 100, len(ordered)).numpy(), ordered.numpy(), color="#24548f")
    right.set_xlabel("channels pruned (%)")
    right.set_ylabel("|gamma| at the threshold")
    right.set_title("threshold of a global pruning ratio", fontsize=10)
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    return figure
