"""Batch norms over the images of all devices (`--trainer.sync_batchnorm=true`).

Lightning's own plugin makes new layers: those of timm that have the activation in them lose it, and torch's refuse to
train on a processor. Here the layers stay what they are, but for their class.
"""

from pytorch_lightning.plugins import LayerSync
from timm.layers.norm_act import BatchNormAct2d, SyncBatchNormAct
from torch import Tensor, distributed, nn, no_grad, rsqrt
from torch.distributed.nn.functional import all_reduce
from torch.nn.functional import batch_norm
from torch.nn.modules.batchnorm import _BatchNorm


class SyncBatchNorms(LayerSync):
    """Lightning's `TorchSyncBatchNorm`, for processors too, and for timm's norms with activations."""

    def apply(self, model: nn.Module) -> nn.Module:
        """Has all batch norms of `model` look at the images of all devices, while it trains.

        Raises:
            TypeError: If one has a forward of its own that is not known.
        """
        for name, norm in model.named_modules():
            if not isinstance(norm, _BatchNorm) or isinstance(norm, nn.SyncBatchNorm | CPUSyncBatchNorm):
                continue
            with_activation = type(norm) is BatchNormAct2d
            if not with_activation and type(norm).forward is not _BatchNorm.forward:
                raise TypeError(f"{name}: a {type(norm).__name__} cannot be synchronised")
            norm._unsynchronised, norm.process_group = type(norm), None
            if next(norm.buffers()).device.type == "cpu":
                norm.__class__ = CPUSyncBatchNorm
            else:
                norm.__class__ = SyncBatchNormAct if with_activation else nn.SyncBatchNorm
        return model

    def revert(self, model: nn.Module) -> nn.Module:
        """Makes them what they were."""
        for norm in model.modules():
            if hasattr(norm, "_unsynchronised"):
                norm.__class__ = norm._unsynchronised
                del norm._unsynchronised, norm.process_group
        return model


class CPUSyncBatchNorm(_BatchNorm):
    """A batch norm over all processes, with the sums of `torch.distributed` alone.

    B, C, ... to B, C, ...; the mean and variance of training are those of all processes' B together, and so are their
    gradients. In evaluation it is what it was.
    """

    def forward(self, input: Tensor) -> Tensor:
        y = self._over_all(input.float()).to(input.dtype) if self.training else self._as_learned(input)
        # timm's.
        return self.act(self.drop(y)) if hasattr(self, "act") else y

    def _as_learned(self, x: Tensor) -> Tensor:
        mean, variance = self.running_mean, self.running_var
        return batch_norm(x, mean, variance, self.weight, self.bias, training=mean is None, eps=self.eps)

    def _over_all(self, x: Tensor) -> Tensor:
        others = [0, *range(2, x.dim())]
        count = x.new_tensor([x.numel() / x.shape[1]])
        distributed.all_reduce(count)
        mean = all_reduce(x.sum(others)) / count
        centred = x - _along_channels(mean, x)
        variance = all_reduce(centred.square().sum(others)) / count
        if self.track_running_stats:
            with no_grad():
                self.num_batches_tracked += 1
                share = 1 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
                self.running_mean.lerp_(mean, share)
                self.running_var.lerp_(variance * count / (count - 1), share)
        y = centred * _along_channels(rsqrt(variance + self.eps), x)
        return y * _along_channels(self.weight, x) + _along_channels(self.bias, x) if self.affine else y


def _along_channels(values: Tensor, x: Tensor) -> Tensor:
    return values.view(-1, *[1] * (x.dim() - 2))
