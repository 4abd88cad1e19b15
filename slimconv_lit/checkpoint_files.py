"""Reads checkpoints, and says of one that is damaged which other one is whole."""

import zipfile
from pathlib import Path
from typing import Any


def read_checkpoint(path: Path) -> dict[str, Any]:
    """What is in a checkpoint; its tensors stay on the disk until they are looked at.

    Raises:
        ValueError: If it is truncated, changed or no checkpoint; the message names the newest one that is whole.
    """
    import torch

    if not is_whole(path):
        others = sorted(_others(path), key=lambda other: other.stat().st_mtime, reverse=True)
        whole = next((other for other in others if is_whole(other)), None)
        hint = f"the newest that is whole is {whole}" if whole else "no other of its runs is whole"
        raise ValueError(f"{path} is truncated or damaged, or no checkpoint; {hint}")
    checkpoint: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    return checkpoint


def is_whole(path: Path) -> bool:
    """Whether all that was written to a checkpoint can be read again; compares its checksums."""
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.testzip() is None
    except (OSError, zipfile.BadZipFile):
        return False


def _others(path: Path) -> list[Path]:
    """The other checkpoints of its run and of the runs of the same name."""
    found = [*path.parent.glob("*.ckpt"), *path.parent.parent.parent.glob("*/checkpoints/*.ckpt")]
    return [other for other in dict.fromkeys(found) if other != path]
