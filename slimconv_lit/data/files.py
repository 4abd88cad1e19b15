"""Archives, folders and pictures on disk: whole, or an error that names the file."""

import contextlib
import io
import os
import shutil
import tarfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from http.client import HTTPException
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image, UnidentifiedImageError
from torch.nn import functional
from torchvision import tv_tensors
from torchvision.datasets.utils import check_integrity, download_url, extract_archive
from torchvision.transforms.v2.functional import pil_to_tensor

try:
    from torchvision.io import ImageReadMode, decode_jpeg
except ImportError:
    # torchvision has announced that it will drop its decoders; PIL's is slower.
    decode_jpeg = None


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
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    names = list(dict.fromkeys(Path(line.split()[0]).stem for line in lines if line.strip()))
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


# More files, or more bytes for each byte of the archive, than an official one has: pictures hardly compress.
_MOST_FILES, _MOST_GROWTH, _MOST_AT_LEAST = 2_000_000, 10, 2**26


def check_archive(path: Path) -> None:
    """Looks through a tar file, and through those that are in it, before anything of them is unpacked.

    Raises:
        DataError: If it is none, if a member would lie outside, is a link or a device, or if there is too much in it.
    """
    most, files = max(_MOST_AT_LEAST, _MOST_GROWTH * path.stat().st_size), 0

    def look_through(tar: tarfile.TarFile, inside: str) -> None:
        nonlocal most, files
        for member in tar:
            where = f"{path}: {inside}{member.name}"
            if not (member.isfile() or member.isdir()):
                raise DataError(f"{where} is a link or a device, which no official archive has; it is not unpacked")
            tarfile.data_filter(member, "unpacked")
            files, most = files + 1, most - member.size
            if most < 0 or files > _MOST_FILES:
                raise DataError(
                    f"{where}: up to here there are {files:,} files in it, of more than {_MOST_FILES:,} files or "
                    f"{_MOST_GROWTH} times its size in all; it is not unpacked"
                )
            if member.isfile() and member.name.endswith(".tar"):
                most += member.size
                with tarfile.open(fileobj=tar.extractfile(member), mode="r:") as inner:
                    look_through(inner, f"{inside}{member.name}: ")

    try:
        with tarfile.open(path) as tar:
            look_through(tar, "")
    except tarfile.FilterError as error:
        raise DataError(f"{path}: {error}; it is not unpacked") from error
    except (tarfile.TarError, EOFError, zlib.error) as error:
        raise DataError(f"{path} is truncated or no archive: {error}. Fetch it again") from error


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
            URLError: If it is to be downloaded and there is no network.
            DataError: If it is not the official one, was not downloaded whole, or `check_archive` has something
                against it.
        """
        path = root / self.filename
        if (root / self.marker).is_file() or not (download or path.is_file()):
            return
        if download:
            try:
                # Does nothing where the whole archive lies there, and fetches a truncated one anew.
                download_url(self.url, root, self.filename, self.md5)
            except (RuntimeError, HTTPException, ConnectionError, TimeoutError) as error:
                raise DataError(
                    f"{self.url} did not give {path} whole, with the md5 sum {self.md5}: {error}. The same command "
                    "fetches it anew; one from elsewhere may be put there"
                ) from error
        elif not check_integrity(path, self.md5):
            raise DataError(
                f"{path} is truncated or changed: its {path.stat().st_size:,} bytes do not have the md5 sum {self.md5}"
                f". --data.download=true fetches it again, from {self.url}"
            )
        check_archive(path)
        partial = root / f"{self.filename}.unpacking"
        shutil.rmtree(partial, ignore_errors=True)
        extract_archive(path, partial)
        files = [file.relative_to(partial) for file in partial.rglob("*") if not file.is_dir()]
        for file in sorted(files, key=lambda file: (file == Path(self.marker), file)):
            (root / file).parent.mkdir(parents=True, exist_ok=True)
            (partial / file).replace(root / file)
        shutil.rmtree(partial)


# Never PIL's others: it would hand an EPS, whatever its name, to Ghostscript, which runs programs.
_FORMATS = ("JPEG", "PNG", "BMP", "PPM", "TIFF", "WEBP", "GIF")


def _undecodable(path: str | Path, error: Exception) -> DataError:
    if isinstance(error, Image.DecompressionBombError):
        return DataError(f"{path} is not decoded, for it would fill the memory: {error} Make it smaller or take it out")
    # PIL names the file in some of its messages only, and in this one the memory that it was read into.
    reason = f"it is none of {', '.join(_FORMATS)}" if isinstance(error, UnidentifiedImageError) else error
    return DataError(f"{path} cannot be decoded: {reason}. Copy or fetch it again, or take it out")


@contextlib.contextmanager
def _decoding(path: str | Path) -> Iterator[None]:
    """Names the file where it cannot be decoded."""
    try:
        yield
    except FileNotFoundError:
        raise
    except (OSError, SyntaxError, ValueError, RuntimeError, Image.DecompressionBombError) as error:
        raise _undecodable(path, error) from error


def read_image(path: str | Path, mode: str | None = "RGB") -> Image.Image:
    """A picture in PIL's colour mode `mode`, whatever mode it was stored in; None leaves it as it is.

    Raises:
        FileNotFoundError: If there is no such file.
        DataError: If it cannot be decoded, for one because it is truncated, or has more pixels than PIL's limit.
    """
    with _decoding(path), Image.open(path, formats=_FORMATS) as image:
        if mode is None:
            image.load()
            return image
        return image.convert(mode)


class EncodedImage:
    """A picture of which the header is read; the rest is decoded once it is known how much of it is wanted.

    Args:
        path: Its file.
        content: Read in the place of the file, which then only has to be named.

    Attributes:
        height: In pixels.
        width: In pixels.

    Raises:
        FileNotFoundError: If there is no such file.
        DataError: If it is no picture, or has more pixels than PIL's limit.
    """

    def __init__(self, path: str | Path, content: bytes | None = None) -> None:
        self._path = path
        self._stored = Path(path).read_bytes() if content is None else content
        with _decoding(path), self._open() as image:
            self.width, self.height = image.size
            self._plain_jpeg = image.format == "JPEG" and image.mode in ("RGB", "L")

    def _open(self) -> Image.Image:
        return Image.open(io.BytesIO(self._stored), formats=_FORMATS)

    def pixels(self) -> tv_tensors.Image:
        """All of it, uint8 (3, H, W).

        Raises:
            DataError: As `read_image`.
        """
        with _decoding(self._path):
            if decode_jpeg and self._plain_jpeg:
                stored = torch.frombuffer(bytearray(self._stored), dtype=torch.uint8)
                return tv_tensors.Image(decode_jpeg(stored, mode=ImageReadMode.RGB))
            with self._open() as image:
                return tv_tensors.Image(pil_to_tensor(image.convert("RGB")))

    def part(
        self, top: int, left: int, height: int, width: int, size: Sequence[int], reserve: int = 1
    ) -> tv_tensors.Image:
        """A part of it, resized (bilinear, antialiased) to `size`; uint8 (3, *size).

        A JPEG holds its frequencies in order, so that a half, a quarter or an eighth of its height and width can be
        decoded in less time than the whole. That is done where the part is larger than `size` by as much.

        Args:
            top: Of the part, in pixels of the whole picture; so are the next three.
            left: Of the part.
            height: Of the part.
            width: Of the part.
            size: Height and width wanted.
            reserve: How many times `size` is decoded at least, before it is resized. At 1 the result differs from that
                of the whole picture by up to a grey level in the mean, at 2 by a third of one.

        Raises:
            DataError: As `read_image`.
        """
        spare = min(height // size[0], width // size[1]) // reserve
        shrink = next((factor for factor in (8, 4, 2) if spare >= factor), 1)
        if shrink > 1 and self._plain_jpeg:
            with _decoding(self._path), self._open() as image:
                image.draft(None, (self.width // shrink, self.height // shrink))
                # PIL's, because it takes a box between the pixels.
                box = (left / shrink, top / shrink, (left + width) / shrink, (top + height) / shrink)
                resized = image.resize((size[1], size[0]), Image.Resampling.BILINEAR, box)
                return tv_tensors.Image(pil_to_tensor(resized.convert("RGB")))
        inside = self.pixels().as_subclass(torch.Tensor)[None, :, top : top + height, left : left + width]
        # There is a faster loop for pixels whose colours lie side by side, without gaps between the rows.
        inside = inside.contiguous(memory_format=torch.channels_last)
        shown = functional.interpolate(inside, list(size), mode="bilinear", antialias=True)
        return tv_tensors.Image(shown[0].contiguous())


def read_pixels(path: str | Path, content: bytes | None = None) -> tv_tensors.Image:
    """A picture as a uint8 tensor (3, H, W), decoded as `read_image` does, and JPEGs faster.

    `content` is read in the place of the file, which then only has to be named.

    Raises:
        FileNotFoundError: If there is no such file.
        DataError: As `read_image`.
    """
    return EncodedImage(path, content).pixels()


# How a whole file of each format ends.
_ENDS = {"JPEG": b"\xff\xd9", "PNG": b"IEND\xaeB`\x82"}


def inspect_image(path: Path) -> tuple[tuple[int, int], str]:
    """(width, height) and PIL's colour mode; decodes the picture only where its end is not as the format asks.

    Raises:
        FileNotFoundError: If there is no such file.
        DataError: If it is no picture, or truncated, or has more pixels than PIL's limit.
    """
    with _decoding(path), path.open("rb") as file, Image.open(file, formats=_FORMATS) as image:
        size, mode = image.size, image.mode
        end = _ENDS.get(image.format or "", b"")
        file.seek(-len(end), os.SEEK_END)
        whole = file.read() == end
    if not whole:
        read_image(path)
    return size, mode
