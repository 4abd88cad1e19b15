"""Reads checkpoints, and says of one that is damaged which other one is whole."""

import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from slimconv_lit.plain import check_plain

# Become options, and so are JSON for a moment.
_PLAIN = ("hyper_parameters", "datamodule_hyper_parameters", "class_paths")


def read_checkpoint(path: Path) -> dict[str, Any]:
    """What is in a checkpoint: tensors, which stay on the disk until they are looked at, and plain values.

    Raises:
        ValueError: If it is truncated, changed or no checkpoint, and the message names the newest one that is whole; or
            if it holds anything else, which is not unpickled; or not what `fit` writes.
    """
    import torch

    if not is_whole(path):
        others = sorted(_others(path), key=lambda other: other.stat().st_mtime, reverse=True)
        whole = next((other for other in others if is_whole(other)), None)
        hint = f"the newest that is whole is {whole}" if whole else "no other of its runs is whole"
        raise ValueError(f"{path} is truncated or damaged, or no checkpoint; {hint}")
    try:
        checkpoint = torch.load(path, weights_only=True, map_location="cpu", mmap=True)
    except (FileNotFoundError, PermissionError):
        raise
    except Exception as error:  # in a strange file, torch raises whatever it happens to run into
        reason = " ".join(str(error).split())[:200]
        if asked := re.search(r"GLOBAL ([\w.]+)", str(error)):
            reason = f"it asks for {asked[1]}, and could run code if it got it"
        raise ValueError(f"{path} is not a checkpoint of tensors and plain values: {reason}") from error
    if not isinstance(checkpoint, dict):
        raise ValueError(f"{path} is not a checkpoint: it holds a {type(checkpoint).__name__}")
    try:
        _check_shape(checkpoint)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not a checkpoint of `fit`: {error}") from error
    return checkpoint


def _check_shape(checkpoint: Mapping[str, Any]) -> None:
    """Sees that what the verbs read of a checkpoint is of the kind that `fit` writes.

    Raises:
        ValueError: If it is not; the message names the key.
    """
    import torch

    if "state_dict" not in checkpoint:
        raise ValueError(f"it has no 'state_dict'; it holds {', '.join(map(str, list(checkpoint)[:6]))}"[:200])
    mappings: dict[str, type] = dict.fromkeys((*_PLAIN, "loops", "callbacks", "run_folder"), object)
    # What a datamodule has added stands under the name of its class.
    mappings |= dict.fromkeys((key for key in checkpoint if str(key).endswith("DataModule")), object)
    mappings |= {"state_dict": torch.Tensor, "train_means": torch.Tensor, "pruned": list}
    for key, kind in mappings.items():
        values = checkpoint.get(key) or {}
        if not isinstance(values, Mapping):
            raise ValueError(f"what it says under {key!r} is no mapping")
        for name, value in values.items():
            if not isinstance(value, kind):
                raise ValueError(f"{key!r}: {str(name)[:80]!r} is a {type(value).__name__}, not a {kind.__name__}")
    if (sums := checkpoint.get("train_means")) and sums.keys() != {"totals", "images"}:
        raise ValueError("what it says under 'train_means' is not 'totals' and 'images'")
    for key in _PLAIN:
        try:
            check_plain(checkpoint.get(key))
        except ValueError as error:
            raise ValueError(f"{key!r}: {error}") from error
    for key in ("optimizer_states", "lr_schedulers", "random_states"):
        if not isinstance(checkpoint.get(key) or [], list):
            raise ValueError(f"what it says under {key!r} is no list")


def is_whole(path: Path) -> bool:
    """Whether all that was written to a checkpoint can be read again; compares its checksums."""
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.testzip() is None
    except Exception:  # zipfile raises whatever a damaged file leads it to
        return False


def _others(path: Path) -> list[Path]:
    """The other checkpoints of its run and of the runs of the same name."""
    found = [*path.parent.glob("*.ckpt"), *path.parent.parent.parent.glob("*/checkpoints/*.ckpt")]
    return [other for other in dict.fromkeys(found) if other != path]
