"""Archives, folders and pictures on disk: whole, or an error that names the file."""

import os
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

from PIL import Image
from torchvision.datasets.utils import check_integrity, download_url, extract_archive


class DataError(ValueError):
    """A file of a data set cannot be used; the message names it and says what to do."""


def some(names: Iterable[object], most: int = 5) -> str:
    """The first few names, and how many there are if that is more."""
    listed = [str(name) for name in names]
    more = f", ... ({len(listed)} in all)" if len(listed) > most else ""
    return ", ".join(listed[:most]) + more


def names_in(folder: Path, suffix: str) -> set[str]:
    """The names, less the suffix, of a folder's files that have it; one listing is faster than many questions."""
    if not folder.is_dir():
        return set()
    return {entry.removesuffix(suffix) for entry in os.listdir(folder) if entry.endswith(suffix)}


def read_list(path: Path, count: int | None = None) -> list[str]:
    """The names of images in a list, each once; of a path, as some lists have them, the name alone.

    Raises:
        FileNotFoundError: If there is no such list.
        DataError: If it is empty, or does not name `count` images.
    """
    if not path.is_file():
        raise FileNotFoundError(f"the list {path} is missing")
    names = list(dict.fromkeys(Path(line.split()[0]).stem for line in path.read_text().splitlines() if line.strip()))
    if not names or count not in (None, len(names)):
        raise DataError(f"{path} names {len(names):,} images{f', not {count:,}: unpack it again' if count else ''}")
    return names


def write_once(folder: Path, write: Callable[[Path], None]) -> Path:
    """`folder`, filled by `write` if it is not there.

    It is written under another name and then renamed, so an interrupted writing is never taken for a finished one.
    """
    if folder.is_dir():
        return folder
    partial = folder.with_name(f"{folder.name}.{os.getpid()}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        write(partial)
        partial.rename(folder)
    except OSError:
        # Another process may have been faster, with the same files.
        if not folder.is_dir():
            raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return folder


class Archive(NamedTuple):
    """An official archive, and how to tell that it is unpacked.

    Attributes:
        url: Where it is to be had.
        filename: Its name.
        md5: Its checksum.
        marker: A file in it, which is put in its place last: where it lies, the others do too.
    """

    url: str
    filename: str
    md5: str
    marker: str

    def unpack(self, root: Path, download: bool) -> None:
        """Unpacks the archive below `root`, where it lies or is downloaded to, unless that is done already.

        Raises:
            DataError: If the archive is not the official one.
        """
        path = root / self.filename
        if (root / self.marker).is_file() or not (download or path.is_file()):
            return
        if download:
            # Does nothing where the whole archive lies there, and fetches a truncated one anew.
            download_url(self.url, root, self.filename, self.md5)
        elif not check_integrity(path, self.md5):
            raise DataError(
                f"{path} is truncated or changed: its {path.stat().st_size:,} bytes do not have the md5 sum {self.md5}"
                f". --data.download=true fetches it again, from {self.url}"
            )
        partial = root / f"{self.filename}.unpacking"
        shutil.rmtree(partial, ignore_errors=True)
        extract_archive(path, partial)
        files = [file.relative_to(partial) for file in partial.rglob("*") if not file.is_dir()]
        for file in sorted(files, key=lambda file: (file == Path(self.marker), file)):
            (root / file).parent.mkdir(parents=True, exist_ok=True)
            (partial / file).replace(root / file)
        shutil.rmtree(partial)


def read_image(path: str | Path, mode: str | None = "RGB") -> Image.Image:
    """A picture in PIL's colour mode `mode`, whatever mode it was stored in; None leaves it as it is.

    Raises:
        FileNotFoundError: If there is no such file.
        DataError: If it cannot be decoded, for one because it is truncated.
    """
    try:
        with Image.open(path) as image:
            if mode is None:
                image.load()
                return image
            return image.convert(mode)
    except FileNotFoundError:
        raise
    except (OSError, SyntaxError, ValueError) as error:
        # PIL names the file in some of its messages only.
        raise DataError(f"{path} cannot be decoded: {error}. Copy or fetch it again, or take it out") from error


# How a whole file of each format ends.
_ENDS = {"JPEG": b"\xff\xd9", "PNG": b"IEND\xaeB`\x82"}


def inspect_image(path: Path) -> tuple[tuple[int, int], str]:
    """(width, height) and PIL's colour mode; decodes the picture only where its end is not as the format asks.

    Raises:
        FileNotFoundError: If there is no such file.
        DataError: If it is no picture, or truncated.
    """
    try:
        with path.open("rb") as file, Image.open(file) as image:
            size, mode = image.size, image.mode
            end = _ENDS.get(image.format or "", b"")
            file.seek(-len(end), os.SEEK_END)
            whole = file.read() == end
    except FileNotFoundError:
        raise
    except (OSError, SyntaxError, ValueError) as error:
        raise DataError(f"{path} cannot be decoded: {error}. Copy or fetch it again, or take it out") from error
    if not whole:
        read_image(path)
    return size, mode
