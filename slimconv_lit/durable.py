"""Writing files of which, whenever the process or the machine dies, the old or the new one is whole."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any


def write_whole(path: Path, content: str | Callable[[IO[bytes]], Any]) -> None:
    """Writes a file beside the old one and renames it once it is on the disk; its folder is made if it is not there.

    Args:
        path: The file.
        content: Its text, or what writes into the opened file.

    Raises:
        OSError: If it cannot be written; what lay at `path` is as it was. What `content` raises, likewise.
    """
    # One name: what a killed process has left is overwritten by the next.
    partial = path.with_name(f"{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("wb") as file:
            if isinstance(content, str):
                file.write(content.encode())
            else:
                content(file)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    # The new name is in the folder, which is a file of its own.
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
