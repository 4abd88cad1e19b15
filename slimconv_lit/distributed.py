"""Many devices: what has started this process, and FSDP2 in a form that a configuration can name.

`ddp` is Lightning's own. Its `fsdp` is torch's first FSDP, and its `ModelParallelStrategy` wants the task to shard
itself and the configuration to know how many devices there are; `FSDP2` does both.
"""

import os
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import pytorch_lightning as pl
import torch.distributed
from lightning_fabric.plugins.environments.slurm import SLURMEnvironment
from lightning_fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from pytorch_lightning.accelerators import CUDAAccelerator
from pytorch_lightning.plugins import TorchSyncBatchNorm
from pytorch_lightning.strategies import ModelParallelStrategy
from pytorch_lightning.trainer.states import TrainerFn
from torch import nn
from torch.distributed.fsdp import FSDPModule, fully_shard

from slimconv_lit.callbacks import Sparsity
from slimconv_lit.sync_batchnorm import SyncBatchNorms


def launched() -> dict[str, int]:
    """`devices` and `num_nodes` of a trainer, where torchrun or srun has started a process for each device.

    Lightning takes no more from them than to complain when the trainer is told other numbers.
    """
    if TorchElasticEnvironment.detect():
        devices = int(os.environ["LOCAL_WORLD_SIZE"])
        return {"devices": devices, "num_nodes": int(os.environ["WORLD_SIZE"]) // devices}
    if SLURMEnvironment.detect() and "SLURM_NTASKS_PER_NODE" in os.environ:
        return {"devices": int(os.environ["SLURM_NTASKS_PER_NODE"]), "num_nodes": int(os.environ["SLURM_NNODES"])}
    return {}


class FSDP2(ModelParallelStrategy):
    """Fully sharded data parallelism: each device keeps its part of weights, gradients and momenta.

    Checkpoints are whole files, as those of one device. While it validates, tests or predicts, each device holds all
    weights: no device then waits for another, which may have a batch less.

    Args:
        unit_params: A block of the network with at least so many parameters is gathered by itself, just before it is
            needed, and dropped behind it; the rest is gathered at the start of a step.
        process_group_backend: nccl, gloo, ...; None for the one that fits the devices.
        timeout: After which a device that waits for the others gives up.
    """

    def __init__(
        self,
        unit_params: int = 1_000_000,
        process_group_backend: str | None = None,
        timeout: timedelta | None = timedelta(minutes=30),
    ) -> None:
        super().__init__(1, 1, False, process_group_backend, timeout)
        self.unit_params = unit_params

    def setup_environment(self) -> None:
        """Puts all devices of all nodes into one group."""
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()

    def setup(self, trainer: pl.Trainer) -> None:
        """Shards the task's network, if it is not yet, and then does what its parent does."""
        assert self.accelerator is not None
        assert self.model is not None
        self.accelerator.setup(trainer)
        if self._layer_sync:
            # Also where the network is sharded already: `teardown` has made its norms what they were.
            self.model = self._layer_sync.apply(self.model)
        network: Any = self.model.model
        if not isinstance(network, FSDPModule):
            mesh = self.device_mesh["data_parallel"]
            for unit in units(network, self.unit_params):
                fully_shard(unit, mesh=mesh)
            # What the units leave. Whole until the backward pass has gone through, for it is needed there first.
            fully_shard(network, mesh=mesh, reshard_after_forward=False)
        self.model = self.precision_plugin.convert_module(self.model)
        self.model_to_device()
        self.barrier()
        if trainer.state.fn == TrainerFn.FITTING:
            self.setup_optimizers(trainer)
        self.setup_precision_plugin()

    def teardown(self) -> None:
        """Also makes synchronised batch norms what they were, as DDP does."""
        if self._layer_sync and self.model is not None:
            self._layer_sync.revert(self.model)
        super().teardown()

    def _sharded(self) -> Iterator[FSDPModule]:
        assert self.model is not None
        return (module for module in self.model.modules() if isinstance(module, FSDPModule))

    def _gather(self) -> None:
        for module in self._sharded():
            module.set_reshard_after_forward(False, recurse=False)
            module.unshard()
        assert self.model is not None
        for buffer in self.model.buffers():
            # Each has the running statistics of its own images; those that are saved are the first one's.
            torch.distributed.broadcast(buffer, 0)

    on_validation_start = on_test_start = on_predict_start = _gather

    def _scatter(self) -> None:
        for module in self._sharded():
            module.reshard()
            module.set_reshard_after_forward(module is not self.model.model, recurse=False)  # type: ignore[union-attr]

    on_validation_end = on_test_end = on_predict_end = _scatter


def units(network: nn.Module, least: int) -> list[nn.Module]:
    """The blocks of a network with at least `least` parameters.

    A block is what a `Sequential` holds and is none itself: whoever walks through the `Sequential` calls it.
    """
    lists = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
    held = (child for part in network.modules() if isinstance(part, nn.Sequential) for child in part.children())
    blocks = {id(child): child for child in held if next(child.children(), None) and not isinstance(child, lists)}
    return [block for block in blocks.values() if sum(p.numel() for p in block.parameters()) >= least]


def prepare_devices(trainer: pl.Trainer, task: pl.LightningModule) -> None:
    """Has batch norms synchronised by our own plugin, and says at once what would fail in the first step.

    Raises:
        ValueError: If the trainer's devices cannot do what it and the task are asked for.
    """
    strategy: Any = trainer.strategy
    if isinstance(getattr(strategy, "_layer_sync", None), TorchSyncBatchNorm):
        strategy._layer_sync = SyncBatchNorms(isinstance(trainer.accelerator, CUDAAccelerator))
    if isinstance(strategy, FSDP2) and task.hparams.get("ema_decay"):
        raise ValueError("FSDP2 cannot average weights: say --model.ema_decay=null or --trainer.strategy=ddp")
    if isinstance(strategy, FSDP2) and any(isinstance(c, Sparsity) for c in trainer.callbacks):  # type: ignore[attr-defined]
        raise ValueError("FSDP2 keeps the scales of batch norms in parts, of which Sparsity cannot draw: take ddp")
