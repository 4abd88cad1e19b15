"""What the tests of pruning compare with: the masked original, made from the plan alone."""

import copy

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm


def randomise(model, seed=0):
    """Norms of which none scales like another, as after training; returns `model`."""
    generator = torch.Generator().manual_seed(seed)

    def draw(tensor, low, high):
        tensor.data.copy_(torch.rand(tensor.shape, generator=generator) * (high - low) + low)

    for module in model.modules():
        if isinstance(module, _BatchNorm) and module.weight is not None:
            draw(module.weight, 0.1, 1)
            # Negative ones count by their magnitude.
            module.weight.data[::3] *= -1
            draw(module.bias, -0.3, 0.3)
            draw(module.running_mean, -0.5, 0.5)
            draw(module.running_var, 0.5, 2)
    return model.eval()


def masked_by(original, plan):
    """A copy of the network before pruning, with the scales and shifts that the plan lets go at zero."""
    masked = copy.deepcopy(original)
    for name, sides in plan["kept"].items():
        layer = masked.get_submodule(name)
        if "output" not in sides:
            continue
        gone = torch.ones(layer.weight.shape[0], dtype=torch.bool)
        gone[sides["output"]] = False
        if isinstance(layer, _BatchNorm):
            layer.weight.data[gone] = 0
            layer.bias.data[gone] = 0
        elif isinstance(layer, nn.Conv2d) and layer.groups == layer.in_channels > 1 and layer.bias is not None:
            layer.bias.data[gone] = 0
    return masked


def apart(wanted, found):
    """The largest difference, relative to the largest value."""
    return ((wanted - found).abs().max() / wanted.abs().max()).item()


def check_pruned(original, report, x, matters=1e-4):
    """The pruned network is the masked original, every layer is accounted for, and masking made a difference."""
    with torch.no_grad():
        wanted, found, before = masked_by(original, report.plan)(x), report.model.eval()(x), original(x)
    assert wanted.isfinite().all()
    assert apart(wanted, found) <= 1e-5
    assert report.difference <= 1e-5
    if report.pruned:
        assert apart(wanted, before) >= matters
    assert all(row.now < row.was or row.why for row in report.rows), report
    widths = {row.layer: row.now for row in report.rows}
    for name, module in report.model.named_modules():
        if isinstance(module, _BatchNorm):
            # With a selection in front of it, a norm is one level down.
            assert module.num_features == widths.get(name, widths.get(name.removesuffix(".norm"))), name
