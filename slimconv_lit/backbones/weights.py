"""Reading weights into a network: all that fit, each accounted for, or none at all."""

import os
import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from slimconv_lit.ops import Operator
from slimconv_lit.surgery import Plan, apply_plans

# Where checkpoints keep the state dict, and what wrappers put before its names.
CONTAINERS = ("state_dict", "model", "model_state_dict", "model_ema")
PREFIXES = ("module.", "model.", "_orig_mod.", "net.", "backbone.")

# The SlimConv authors' names for the parts of the operator, and ours.
PUBLISHED = (
    (re.compile(r"\.conv2_1\.([01])\."), r".top.\1."),
    (re.compile(r"\.conv2_2\.([0134])\."), r".bottom.\1."),
    (re.compile(r"\.fc\.0\."), ".gate.squeeze."),
    (re.compile(r"\.fc\.1\."), ".gate.norm."),
    (re.compile(r"\.fc\.3\."), ".gate.excite."),
)


@dataclass(frozen=True)
class LoadReport:
    """What `load_weights` did with every tensor; prints as a summary.

    Attributes:
        loaded: Names of the network's tensors that were read.
        converted: Those of them that have another name in the file, with that name.
        missing: Tensors that keep their first values: operators and narrowed layers when the file is a plain network's.
        left_over: Tensors of the file that have no place any more: what operators replaced, what was excluded, and the
            classifier where a head stands in its place.
    """

    loaded: tuple[str, ...]
    converted: Mapping[str, str]
    missing: tuple[str, ...]
    left_over: tuple[str, ...]

    def __str__(self) -> str:
        def some(names: Sequence[str]) -> str:
            more = f" and {len(names) - 4} more" if len(names) > 4 else ""
            return f": {', '.join(names[:4])}{more}" if names else ""

        # Block by block: a name for each tensor would fill the screen.
        blocks = Counter(".".join(name.split(".")[:-1][:3]) for name in self.loaded)
        return "\n".join(
            [
                f"loaded {len(self.loaded)} tensors: {', '.join(f'{name} ({n})' for name, n in blocks.items())}",
                f"  of these under another name: {len(self.converted)}{some(list(self.converted.values()))}",
                f"not in the file, as at the start: {len(self.missing)}{some(self.missing)}",
                f"in the file, not used: {len(self.left_over)}{some(self.left_over)}",
            ]
        )


def load_weights(
    model: nn.Module, path: str | Path, *, exclude: str | Sequence[str] = (), head: Collection[str] = ()
) -> LoadReport:
    """Reads a checkpoint into `model`, in place, with `weights_only=True`.

    It takes torchvision's and timm's state dicts, Lightning's checkpoints, and the checkpoints that the SlimConv
    authors published. In a network that `substitute` rewrote, the weights of a plain network go into every layer that
    was left unchanged; the operators and the narrowed layers keep their values, and are listed. A checkpoint of a
    pruned network says under "pruned" (`plans_of`) what was pruned; a network that is not pruned yet is shaped first.

    Args:
        model: The network to read into.
        path: A file that `torch.load` reads.
        exclude: Name patterns (`fnmatch`, the network's names) of tensors to leave as they are, such as "fc.*".
        head: Names of tensors that the file may have though the network does not.

    Returns:
        What became of every tensor.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file holds no weights or they are another network's. The message gives the first name that
            differs and both shapes; nothing has been loaded then.
    """
    found, plans = _read(Path(path))
    if plans and head:
        raise ValueError(f"{path}: a pruned classifier's weights do not go into a backbone; prune the whole network")
    try:
        take_back = apply_plans(model, plans)
    except ValueError as error:
        raise ValueError(f"{path}: {error}; nothing was loaded") from error
    try:
        return _load(model, found, str(path), [exclude] if isinstance(exclude, str) else exclude, head)
    except BaseException:
        take_back()
        raise


def _load(
    model: nn.Module, found: Mapping[str, Tensor], path: str, patterns: Sequence[str], head: Collection[str]
) -> LoadReport:
    wanted = dict(model.state_dict())
    names = {old: _translate(old, found, wanted) for old in found}
    # A plain network's file has nothing for operators and narrowed layers; one of a network like this has all.
    from_plain = not any(_inside_operator(model, name) for name in names.values() if name in wanted)

    def excluded(name: str) -> bool:
        return any(fnmatchcase(name, p) for p in patterns)

    def optional(name: str) -> bool:
        return excluded(name) or (from_plain and _is_new(model, name))

    take: dict[str, Tensor] = {}
    left_over: list[str] = []
    problems: dict[str, str] = {}
    for old, name in names.items():
        theirs = tuple(found[old].shape)
        replaced = _is_new(model, name) and not _inside_operator(model, name)
        if name in wanted and wanted[name].shape == found[old].shape and not excluded(name):
            take[name] = found[old]
        elif optional(name) or (name not in wanted and (replaced or name in head)):
            left_over.append(old)
        elif name not in wanted:
            problems[name] = f"{old} {theirs} is in the file, and the network has no {name}"
        else:
            problems[name] = f"{name} is {theirs} in the file and {tuple(wanted[name].shape)} in the network"
    missing = [name for name in wanted if name not in take]
    for name in missing:
        # Files from before torch 0.4.1 do not have this counter, and with a fixed momentum nothing reads it.
        if not (optional(name) or name.endswith("num_batches_tracked")):
            problems.setdefault(name, f"{name} {tuple(wanted[name].shape)} is in the network and not in the file")
    if problems or not take:
        first = next(iter(problems.values()), "no tensor of the file has a name that the network knows")
        more = f" ({len(problems)} differences)" if len(problems) > 1 else ""
        raise ValueError(f"{path}: these are another network's weights: {first}{more}; nothing was loaded")
    model.load_state_dict(take, strict=False)
    converted = {name: old for old, name in names.items() if name in take and name != old}
    return LoadReport(tuple(take), converted, tuple(missing), tuple(left_over))


def load_backbone_weights(
    model: nn.Module, path: str | Path, *, classifier: nn.Module, exclude: str | Sequence[str] = ()
) -> LoadReport:
    """Reads a classifier's checkpoint into the backbone of `model`, or one of a network like `model` into all of it.

    Which of both it is, the names in the file tell: all of a backbone's begin with "backbone.".

    Args:
        model: A network with a head, whose `backbone` is a `FeatureMaps`.
        path: As in `load_weights`.
        classifier: The network that the backbone is a part of; it may be on the meta device. The tensors of the file
            that only the classifier has are left out; all others have to fit.
        exclude: Name patterns of tensors to leave as they are: the backbone's names, or the network's.

    Returns:
        What became of every tensor.

    Raises:
        FileNotFoundError: As `load_weights`.
        ValueError: As `load_weights`.
    """
    found, wanted = _read(Path(path))[0], dict(model.state_dict())
    names = {_translate(old, found, wanted) for old in found}
    if any(name.startswith("backbone.") for name in names & wanted.keys()):
        return load_weights(model, path, exclude=exclude)
    maps: nn.Module = model.backbone.net  # type: ignore[assignment, union-attr]
    return load_weights(maps, path, exclude=exclude, head=classifier.state_dict().keys() - maps.state_dict().keys())


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, list[Plan]]]:
    if not os.path.isfile(path):
        raise FileNotFoundError(f"weights: there is no file {str(path)!r}")
    try:
        content: Any = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        reason = " ".join(str(error).split())[:160]
        raise ValueError(f"{path}: torch.load(weights_only=True) cannot read it: {reason}") from error
    plans = content.get("pruned", {}) if isinstance(content, Mapping) else {}
    if not (isinstance(plans, Mapping) and all(isinstance(value, list) for value in plans.values())):
        raise ValueError(f'{path}: what it says under "pruned" is not what `plans_of` gives')
    while isinstance(content, Mapping):
        inner = next((content[key] for key in CONTAINERS if isinstance(content.get(key), Mapping)), None)
        if inner is None:
            break
        content = inner
    if not isinstance(content, Mapping):
        raise ValueError(f"{path}: it holds a {type(content).__name__}, not a state dict")
    tensors = {str(name): value for name, value in content.items() if isinstance(value, Tensor)}
    if not tensors:
        raise ValueError(f"{path}: no state dict in it; it holds {', '.join(map(str, list(content)[:6]))}")
    return tensors, dict(plans)


def _translate(name: str, found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> str:
    """The network's name for a tensor that the file calls `name`."""
    bare = name
    # Only what stands before every name of the file is a wrapper's.
    while prefix := next((p for p in PREFIXES if bare.startswith(p) and bare not in wanted), None):
        if not all(other.startswith(name[: len(name) - len(bare)] + prefix) for other in found):
            break
        bare = bare.removeprefix(prefix)
    for pattern, ours in PUBLISHED:
        renamed = pattern.sub(ours, bare)
        if renamed != bare and renamed in wanted:
            return renamed
    return bare


def _modules_on_the_way(model: nn.Module, name: str) -> list[nn.Module]:
    """The modules from the network down to a tensor, as far as the network has them."""
    modules: list[nn.Module] = [model]
    for part in name.split(".")[:-1]:
        child = dict(modules[-1].named_children()).get(part)
        if child is None:
            break
        modules.append(child)
    return modules


def _inside_operator(model: nn.Module, name: str) -> bool:
    return any(isinstance(module, Operator) for module in _modules_on_the_way(model, name))


def _is_new(model: nn.Module, name: str) -> bool:
    """Whether substitution put something else where this tensor was: an operator, its own norms, a narrowed layer."""
    return any(getattr(module, "rewritten", False) for module in _modules_on_the_way(model, name))
