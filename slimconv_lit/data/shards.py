"""A folder of images as a few large files: uncompressed tar files, and an index of where in them each image lies.

    ROOT/manifest.json       classes; of each split its images; of each file its bytes and SHA-256 sum
    ROOT/train.npy           a row for each image, in the order that torchvision's ImageFolder has them
    ROOT/train-00000.tar     some thousand images, CLASS/NAME.JPEG, as any tar reads them

One read gets one image, so the sampler deals images from shards as it does from a folder: the same images with the same
seeds in the same order, on any number of devices, and a run goes on in the middle of an epoch.
"""

import hashlib
import json
import os
import re
import tarfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import Dataset
from torchvision.datasets import ImageFolder
from tqdm import tqdm  # type: ignore[import-untyped]

from slimconv_lit.data.files import DataError, EncodedImage, inspect_image, some

MANIFEST = "manifest.json"
_FORMAT = "slimconv_lit shards, version 1"
_ROW = np.dtype([("shard", "<u4"), ("offset", "<u8"), ("bytes", "<u4"), ("label", "<u4")])
_BLOCK = tarfile.BLOCKSIZE
_REPAIR = "Copy it again; `prepare --verify --output {}` looks for others"
_ELSEWHERE = "Name another --output, or empty that one"


class Member(NamedTuple):
    """An image that goes into a shard.

    Attributes:
        path: Where it is.
        name: What it is called there, CLASS/NAME.
        label: Its class.
        bytes: Its size.
    """

    path: Path
    name: str
    label: int
    bytes: int


class ShardedImages(Dataset[tuple[EncodedImage, int]]):
    """(image, label) of a split, in the order of the folder that it was made from.

    Args:
        root: The folder with the manifest.
        split: train, val or test.

    Attributes:
        classes: Names in the order of the labels.
        targets: The label of each image.

    Raises:
        FileNotFoundError: If there is no such split.
        DataError: If a file is missing, or not of the size that the manifest says.
    """

    def __init__(self, root: Path, split: str) -> None:
        manifest = read_manifest(root)
        if split not in manifest["splits"]:
            raise FileNotFoundError(f"{root / MANIFEST} has no {split} images, only {', '.join(manifest['splits'])}")
        files: Mapping[str, Any] = manifest["splits"][split]["files"]
        for name, noted in files.items():
            check_size(root / name, noted["bytes"])
        index, *shards = files
        self.classes: list[str] = manifest["classes"]
        self.shards = [root / name for name in shards]
        sizes = np.array([files[name]["bytes"] for name in shards], np.uint64)
        self.rows = _read_index(root / index, sizes, len(self.classes))
        self.targets: list[int] = self.rows["label"].tolist()

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[EncodedImage, int]:
        path, content = self.read(index)
        return EncodedImage(path, content), self.targets[index]

    def read(self, index: int) -> tuple[Path, bytes]:
        """An image as it is stored: SHARD/CLASS/NAME, and the bytes of the file."""
        shard, offset, size, _ = self.rows[index].tolist()
        path = self.shards[shard]
        # Opened each time, as a file of a folder is: a descriptor for each shard would be more than many systems allow.
        with path.open("rb") as file:
            file.seek(offset - _BLOCK)
            block = file.read(_BLOCK + size)
        # What the image is called stands before it, and whether it is one.
        if len(block) < _BLOCK + size or block[257:262] != b"ustar":
            raise DataError(f"{path} is damaged at byte {offset:,}. {_REPAIR.format(path.parent)}")
        return path / block[:100].rstrip(b"\0").decode(errors="replace"), block[_BLOCK:]


def _read_index(path: Path, sizes: NDArray[np.uint64], classes: int) -> NDArray[np.void]:
    """The rows, of which each names a place inside a shard; `sizes` are the shards' bytes."""
    try:
        # Every worker looks at the one copy in the system's cache.
        rows: NDArray[np.void] = np.load(path, mmap_mode="r")
        if rows.dtype == _ROW and (rows["shard"] < len(sizes)).all() and (rows["label"] < classes).all():
            starts, ends = rows["offset"], sizes[rows["shard"]]
            if (starts >= _BLOCK).all() and (starts <= ends).all() and (rows["bytes"] <= ends - starts).all():
                return rows
    except (ValueError, EOFError):
        pass
    raise DataError(f"{path} is damaged. {_REPAIR.format(path.parent)}")


def is_sharded(root: Path) -> bool:
    """Whether a folder has a manifest."""
    return (root / MANIFEST).is_file()


def read_manifest(root: Path) -> dict[str, Any]:
    """What ROOT/manifest.json says.

    Raises:
        FileNotFoundError: If there is none.
        DataError: If it is none of ours.
    """
    path = root / MANIFEST
    if not path.is_file():
        raise FileNotFoundError(f"there is no {path}: `prepare --data.root FOLDER --output {root}` makes shards")
    try:
        manifest: dict[str, Any] = json.loads(path.read_text())
        if _is_whole(manifest):
            return manifest
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        pass
    raise DataError(f"{path} is damaged, or no manifest of {_FORMAT!r}: make the shards again with `prepare`")


def _is_whole(manifest: Any) -> bool:
    """Whether all is there that `write_shards` writes, and of its type; one of other types may end in an error."""
    classes, splits = manifest["classes"], manifest["splits"]
    return (
        manifest["format"] == _FORMAT
        and isinstance(classes, list)
        and len(classes) > 0
        and all(isinstance(name, str) for name in classes)
        and len(splits) > 0
        and all(re.fullmatch(r"\w+", name) and _is_split(name, split) for name, split in splits.items())
    )


def _is_split(name: str, split: Any) -> bool:
    index, *shards = split["files"]
    return (
        index == f"{name}.npy"
        and all(re.fullmatch(r"\w+-\d+\.tar", shard) for shard in shards)
        and all(type(f["bytes"]) is int and isinstance(f["sha256"], str) for f in split["files"].values())
        and type(split["images"]) is int
        and isinstance(split["source"], str)
    )


def check_size(path: Path, size: int) -> None:
    """Raises a DataError unless `path` is a file of so many bytes."""
    found = path.stat().st_size if path.is_file() else None
    if found != size:
        state = "is missing" if found is None else f"has {found:,} bytes, not {size:,}"
        raise DataError(f"{path} {state}. {_REPAIR.format(path.parent)}")


def write_shards(splits: Mapping[str, ImageFolder], root: Path, per_shard: int, workers: int) -> dict[str, Any]:
    """Writes the images of all splits, as many shards at a time as there are workers; returns the manifest.

    What is there already stays: after an interruption it goes on with the shards that are missing.

    Args:
        splits: The folders to read, all with the same classes.
        root: Where to write.
        per_shard: Images in a shard.
        workers: Threads.

    Raises:
        DataError: If an image is damaged, or `root` has shards of other images.
    """
    root.mkdir(parents=True, exist_ok=True)
    members = {split: _members(folder, workers) for split, folder in splits.items()}
    sources = {split: _source(images) for split, images in members.items()}
    if is_sharded(root):
        manifest = read_manifest(root)
        if {split: noted["source"] for split, noted in manifest["splits"].items()} != sources:
            raise DataError(f"{root} has shards of other images. {_ELSEWHERE}")
    else:
        manifest = {"format": _FORMAT, "classes": next(iter(splits.values())).classes, "splits": {}}
        for split, images in members.items():
            manifest["splits"][split] = _write_split(split, images, sources[split], root, per_shard, workers)
        _replace(root / MANIFEST, lambda file: file.write(json.dumps(manifest, indent=1).encode()))
    for note in root.glob("*.tar.json"):
        note.unlink()
    return manifest


def _write_split(
    split: str, images: Sequence[Member], source: str, root: Path, per_shard: int, workers: int
) -> dict[str, Any]:
    """Writes shards and index of a split; returns what the manifest says of it."""
    parts = [images[start : start + per_shard] for start in range(0, len(images), per_shard)]
    names = [f"{split}-{number:05d}.tar" for number in range(len(parts))]
    jobs = [partial(_write_shard, root / name, part) for name, part in zip(names, parts, strict=True)]
    noted = _each(jobs, map(len, parts), workers, f"{split} images")
    rows = np.array([(number, *row) for number, note in enumerate(noted) for row in note["rows"]], _ROW)
    _replace(root / f"{split}.npy", partial(np.save, arr=rows))
    files = {f"{split}.npy": _sum(root / f"{split}.npy")}
    files |= {name: {key: note[key] for key in ("bytes", "sha256")} for name, note in zip(names, noted, strict=True)}
    return {"images": len(images), "source": source, "files": files}


def verify_shards(root: Path, workers: int) -> dict[str, Any]:
    """Reads every file and compares it with its checksum; returns the manifest.

    Raises:
        DataError: If files are missing or damaged; the message names them.
    """
    manifest = read_manifest(root)
    files = {root / name: note for split in manifest["splits"].values() for name, note in split["files"].items()}

    def whole(path: Path) -> bool:
        return path.is_file() and _sum(path) == files[path]

    sizes = [note["bytes"] for note in files.values()]
    good = _each([partial(whole, path) for path in files], sizes, workers, "verifying", unit="B")
    if damaged := [path for path, is_good in zip(files, good, strict=True) if not is_good]:
        raise DataError(
            f"{len(damaged)} of {len(files)} files are missing or damaged: {some(damaged)}. Copy them again"
        )
    return manifest


def _each(
    jobs: Sequence[Callable[[], Any]], sizes: Iterable[int], workers: int, what: str, unit: str = "image"
) -> list[Any]:
    """What all jobs return, in their order; the first error stops those that have not begun."""
    sizes = list(sizes)
    bar = tqdm(total=sum(sizes), desc=what, unit=unit, unit_scale=True, disable=None)
    with bar, ThreadPoolExecutor(workers) as pool:
        futures = [pool.submit(job) for job in jobs]
        for future, size in zip(futures, sizes, strict=True):
            future.add_done_callback(lambda _, size=size: bar.update(size))  # type: ignore[misc]
        try:
            return [future.result() for future in futures]
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _members(folder: ImageFolder, workers: int) -> list[Member]:
    def member(sample: tuple[str, int]) -> Member:
        path, label = Path(sample[0]), sample[1]
        return Member(path, path.relative_to(folder.root).as_posix(), label, path.stat().st_size)

    # Asked for one after the other, a million sizes take longer than all the rest where files are far away.
    with ThreadPoolExecutor(workers) as pool:
        return list(pool.map(member, folder.samples))


def _source(members: Iterable[Member]) -> str:
    """A checksum of which images these are: by name, size and class."""
    return hashlib.sha256("".join(f"{m.name}\t{m.bytes}\t{m.label}\n" for m in members).encode()).hexdigest()


def _write_shard(path: Path, members: Sequence[Member]) -> dict[str, Any]:
    """Writes one shard, unless it is there; returns size and checksum, and (offset, bytes, label) of each image."""
    beside = path.with_name(f"{path.name}.json")
    source = _source(members)
    if beside.is_file():
        found: dict[str, Any] = json.loads(beside.read_text())
        if found["source"] != source:
            raise DataError(f"{path} has other images. {_ELSEWHERE}")
        if path.is_file() and path.stat().st_size == found["bytes"]:
            return found
    rows: list[tuple[int, int, int]] = []

    def write(file: Any) -> None:
        # Of the formats, the one in which names may have any length and each image still has a header just before it.
        with tarfile.open(fileobj=file, mode="w", format=tarfile.GNU_FORMAT) as tar:
            for member in members:
                inspect_image(member.path)
                info = tarfile.TarInfo(member.name)
                info.size = member.bytes
                with member.path.open("rb") as image:
                    tar.addfile(info, image)
                # Images are filled up to whole blocks.
                rows.append((file.tell() + -member.bytes // _BLOCK * _BLOCK, member.bytes, member.label))

    _replace(path, write)
    note = {"source": source, "rows": rows, **_sum(path)}
    # Last: where it lies, the shard is whole.
    _replace(beside, lambda file: file.write(json.dumps(note).encode()))
    return note


def _sum(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def _replace(path: Path, write: Callable[[Any], object]) -> None:
    """Writes a file under another name and renames it: an interrupted writing is never taken for a finished one."""
    half = path.with_name(f"{path.name}.partial")
    with half.open("wb") as file:
        write(file)
        file.flush()
        os.fsync(file.fileno())
    half.replace(path)
