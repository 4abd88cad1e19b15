"""Reads checkpoints, and says of one that is damaged which other one is whole."""

import re
import zipfile
from pathlib import Path
from typing import Any


def read_checkpoint(path: Path) -> dict[str, Any]:
    """What is in a checkpoint: tensors, which stay on the disk until they are looked at, and plain values.

    Raises:
        ValueError: If it is truncated, changed or no checkpoint, and the message names the newest one that is whole; or
            if it holds anything else, which is not unpickled.
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
    return checkpoint


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
