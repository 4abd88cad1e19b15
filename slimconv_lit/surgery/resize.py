"""Changing the width of a layer in place, with a way back."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torchvision.ops import FrozenBatchNorm2d

Role = Literal["input", "output"]

# Norms that stand for nothing but themselves.
_PLAIN_NORMS = (nn.BatchNorm2d, nn.SyncBatchNorm, nn.InstanceNorm2d, nn.GroupNorm, FrozenBatchNorm2d)


class ResizeError(Exception):
    """A layer cannot take another width; the message says why."""


def host_forward(layer: nn.Module) -> str:
    """Why the forward pass of a convolution or linear layer is not the ordinary one; "" if it is."""
    base: Any = nn.Conv2d if isinstance(layer, nn.Conv2d) else nn.Linear
    # timm's Conv2dSame differs in its padding alone.
    if type(layer).forward is not base.forward and type(layer).__name__ != "Conv2dSame":
        return f"a {type(layer).__name__} computes more than a {base.__name__}"
    if hasattr(layer, "parametrizations") or not isinstance(layer.weight, nn.Parameter):
        return "its weight is computed from other parameters"
    return ""


def has_hooks(module: nn.Module) -> bool:
    """Whether something watches the module, or has a part in what it computes."""
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return any(hooks)


def without_norm(norm: nn.Module) -> nn.Module | None:
    """What is left of a norm once an operator with norms of its own precedes it; None where that cannot be told."""
    base = next((cls for cls in _PLAIN_NORMS if isinstance(norm, cls)), None)
    if base is not None and type(norm).forward is base.forward:
        return nn.Identity()
    # timm's norms carry the dropout and the activation behind them; what else a subclass computes is not known.
    children = {name for name, _ in norm.named_children()}
    if base is not None and "act" in children and children <= {"drop", "act"}:
        return nn.Sequential(*norm.children())
    return None


def check_resize(layer: nn.Module, width: int, role: Role) -> None:
    """Raises `ResizeError` if `layer` cannot read (role "input") or write ("output") `width` channels instead."""
    if isinstance(layer, nn.GroupNorm):
        if width % layer.num_groups:
            raise ResizeError(f"{width} channels do not divide into its {layer.num_groups} groups")
    elif isinstance(layer, nn.LayerNorm):
        if len(layer.normalized_shape) != 1:
            raise ResizeError("it normalises over more than the channels")
    elif isinstance(layer, (nn.Conv2d, nn.Linear)):
        if problem := host_forward(layer):
            raise ResizeError(problem)
        groups = layer.groups if isinstance(layer, nn.Conv2d) else 1
        if groups > 1 and (role == "output" or width % groups):
            raise ResizeError(f"{width} channels do not divide into its {groups} groups")
    elif not isinstance(layer, (_NormBase, FrozenBatchNorm2d)):
        raise ResizeError(f"a {type(layer).__name__} has no known width")


class Edits:
    """Changes to a network that can be taken back in one step.

    What substitution puts in or resizes gets an attribute `rewritten`, so that whoever loads the plain network's
    weights can tell it from a module of another network. Pruning and fusing do not set it: of a network that was
    pruned otherwise, or is not fused, no weights fit.

    Args:
        model: The network that is changed, in place.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._undo: list[Callable[[], None]] = []

    def take_back(self) -> None:
        """Undoes every edit, the last first."""
        while self._undo:
            self._undo.pop()()

    def replace(self, name: str, module: nn.Module) -> None:
        """Puts `module` where the layer `name` is."""
        parent_name, _, child = name.rpartition(".")
        parent = self.model.get_submodule(parent_name)
        before = parent.get_submodule(child)
        self._undo.append(functools.partial(setattr, parent, child, before))
        setattr(parent, child, module)

    def resize(self, name: str, old: int, new: int, role: Role) -> None:
        """Narrows layer `name` from `old` to `new` channels on one side; it keeps the leading part of its weights.

        A linear layer behind a flattened map reads each channel several times, in a row. A norm starts anew, because
        what it had learned belonged to other channels.
        """
        layer = self.model.get_submodule(name)
        self._set(layer, {"rewritten": True})
        if isinstance(layer, nn.Linear):
            features = layer.in_features if role == "input" else layer.out_features
            size = features // old * new
            self._set(layer, {"in_features" if role == "input" else "out_features": size})
            self._cut(layer, "weight", 1 if role == "input" else 0, size)
        elif isinstance(layer, nn.Conv2d):
            self._set(layer, {"in_channels" if role == "input" else "out_channels": new})
            self._cut(layer, "weight", 1 if role == "input" else 0, new // layer.groups)
        else:
            sizes: dict[str, Any] = {"num_features": new, "num_channels": new, "normalized_shape": (new,)}
            self._set(layer, {key: value for key, value in sizes.items() if hasattr(layer, key)})
            for tensor in ("weight", "bias", "running_mean", "running_var"):
                self._cut(layer, tensor, 0, new)
            # Counted back to zero in place.
            self._rebuild(layer, "num_batches_tracked", torch.clone)
            if hasattr(layer, "reset_parameters"):
                layer.reset_parameters()  # type: ignore[operator]
            return
        if role == "output":
            self._cut(layer, "bias", 0, new)

    def keep(self, name: str, kept: Sequence[int], role: Role) -> None:
        """Keeps the channels `kept` of layer `name` on one side, with all that was learned for them.

        A norm has one side, "output". What a depthwise convolution loses on its input it loses whole groups by; of
        another grouped convolution each group must keep equally many. A linear layer's positions are its features.
        """
        layer = self.model.get_submodule(name)
        index = torch.as_tensor(kept)
        if isinstance(layer, nn.Linear):
            self._set(layer, {"in_features" if role == "input" else "out_features": len(kept)})
            self._take(layer, "weight", 1 if role == "input" else 0, index)
        elif isinstance(layer, nn.Conv2d) and role == "output":
            self._set(layer, {"out_channels": len(kept)})
            self._take(layer, "weight", 0, index)
        elif isinstance(layer, nn.Conv2d) and layer.groups == layer.in_channels:
            self._set(layer, {"in_channels": len(kept), "groups": len(kept)})
        elif isinstance(layer, nn.Conv2d):
            each, groups = layer.in_channels // layer.groups, layer.groups
            in_group = index.view(groups, -1) - torch.arange(groups)[:, None] * each
            self._set(layer, {"in_channels": len(kept)})
            self._take(layer, "weight", 1, in_group)
        else:
            sizes: dict[str, Any] = {"num_features": len(kept), "num_channels": len(kept)}
            self._set(layer, {key: value for key, value in sizes.items() if hasattr(layer, key)})
            for tensor in ("weight", "bias", "running_mean", "running_var"):
                self._take(layer, tensor, 0, index)
            return
        if role == "output":
            self._take(layer, "bias", 0, index)

    def set(self, name: str, values: dict[str, Any]) -> None:
        """Sets attributes of layer `name`."""
        self._set(self.model.get_submodule(name), values)

    def _set(self, layer: nn.Module, values: dict[str, Any]) -> None:
        for key, value in values.items():
            if hasattr(layer, key):
                self._undo.append(functools.partial(setattr, layer, key, getattr(layer, key)))
            else:
                self._undo.append(functools.partial(delattr, layer, key))
            setattr(layer, key, value)

    def _cut(self, layer: nn.Module, name: str, axis: int, size: int) -> None:
        self._rebuild(layer, name, lambda tensor: tensor.narrow(axis, 0, size))

    def _take(self, layer: nn.Module, name: str, axis: int, index: Tensor) -> None:
        """Picks along `axis` by `index`; where it has two axes, the first is the groups of the weight's first axis."""

        def pick(tensor: Tensor) -> Tensor:
            own = index.to(tensor.device)
            if own.ndim == 1:
                return tensor.index_select(axis, own)
            return torch.cat([t.index_select(axis, i) for t, i in zip(tensor.chunk(len(own)), own, strict=True)])

        self._rebuild(layer, name, pick)

    def _rebuild(self, layer: nn.Module, name: str, change: Callable[[Tensor], Tensor]) -> None:
        tensor = getattr(layer, name, None)
        if not isinstance(tensor, Tensor):
            return
        layout = torch.channels_last if tensor.ndim == 4 and not tensor.is_contiguous() else torch.contiguous_format
        kept = change(tensor.detach()).clone(memory_format=layout)
        self._set(layer, {name: nn.Parameter(kept, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else kept})
