"""Batch norms over the images of all devices (`--trainer.sync_batchnorm=true`).

Lightning's own plugin makes new layers: those of timm that have the activation in them lose it, and torch's refuse to
train on a processor. Here the layers stay what they are, but for their class.
"""

from typing import Any

from pytorch_lightning.plugins import LayerSync
from torch import Tensor, distributed, float32, nn, no_grad, promote_types, rsqrt
from torch.autograd.function import Function
from torch.nn.functional import batch_norm
from torch.nn.modules.batchnorm import _BatchNorm

from slimconv_lit.faults import RunError


class SyncBatchNorms(LayerSync):
    """Lightning's `TorchSyncBatchNorm`, for processors too, and for timm's norms with activations.

    Args:
        on_gpu: Whether the layers will compute on GPUs, where torch's own are faster. A strategy may hand them over
            before it moves them there, so they cannot be asked.
    """

    def __init__(self, on_gpu: bool) -> None:
        self.on_gpu = on_gpu

    def apply(self, model: nn.Module) -> nn.Module:
        """Has all batch norms of `model` look at the images of all devices, while it trains.

        Raises:
            RunError: If one has a forward of its own that is not known.
        """
        # It takes a second, and most runs have one device.
        from timm.layers.norm_act import BatchNormAct2d, SyncBatchNormAct

        for name, module in model.named_modules():
            if not isinstance(module, _BatchNorm) or isinstance(module, nn.SyncBatchNorm | CPUSyncBatchNorm):
                continue
            norm: Any = module
            with_activation = type(module) is BatchNormAct2d
            if not with_activation and type(module).forward is not _BatchNorm.forward:
                raise RunError(
                    f"--trainer.sync_batchnorm: {name} is a {type(module).__name__}, which cannot be synchronised"
                )
            norm._unsynchronised, norm.process_group = type(module), None
            if self.on_gpu:
                norm.__class__ = SyncBatchNormAct if with_activation else nn.SyncBatchNorm
            else:
                norm.__class__ = CPUSyncBatchNorm
        return model

    def revert(self, model: nn.Module) -> nn.Module:
        """Makes them what they were."""
        norm: Any
        for norm in model.modules():
            if hasattr(norm, "_unsynchronised"):
                norm.__class__ = norm._unsynchronised
                del norm._unsynchronised, norm.process_group
        return model


class CPUSyncBatchNorm(_BatchNorm):
    """A batch norm over all processes, with the sums of `torch.distributed` alone.

    In evaluation it is what it was.
    """

    running_mean: Any
    running_var: Any
    num_batches_tracked: Any
    act: Any
    drop: Any

    def forward(self, input: Tensor) -> Tensor:
        """(B, C, ...) to (B, C, ...), in training by the mean and variance of all processes' images."""
        exact = promote_types(input.dtype, float32)
        y = self._over_all(input.to(exact)).to(input.dtype) if self.training else self._as_learned(input)
        # timm's.
        return self.act(self.drop(y)) if hasattr(self, "act") else y

    def _as_learned(self, x: Tensor) -> Tensor:
        mean, variance = self.running_mean, self.running_var
        return batch_norm(x, mean, variance, self.weight, self.bias, training=mean is None, eps=self.eps)

    def _over_all(self, x: Tensor) -> Tensor:
        others = [0, *range(2, x.dim())]
        count = x.new_tensor([x.numel() / x.shape[1]])
        distributed.all_reduce(count)
        mean = _SumOfAll.apply(x.sum(others)) / count
        centred = x - _along_channels(mean, x)
        variance = _SumOfAll.apply(centred.square().sum(others)) / count
        if self.track_running_stats:
            with no_grad():
                self.num_batches_tracked += 1
                share = 1 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
                unbiased = variance * count / (count - 1).clamp(min=1)
                # Which may be of a lower precision than what is computed here.
                self.running_mean.lerp_(mean.to(self.running_mean), share)
                self.running_var.lerp_(unbiased.to(self.running_var), share)
        y = centred * _along_channels(rsqrt(variance + self.eps), x)
        return y * _along_channels(self.weight, x) + _along_channels(self.bias, x) if self.affine else y


class _SumOfAll(Function):
    """The sum of a tensor over all processes; its gradient is that of all their losses."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        total = x.clone()
        distributed.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return _SumOfAll.forward(ctx, *grads)


def _along_channels(values: Tensor, x: Tensor) -> Tensor:
    return values.view(-1, *[1] * (x.dim() - 2))
