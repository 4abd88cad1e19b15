"""The Semantic Boundaries Dataset (SBD): its masks, as pictures of labels like those of Pascal VOC.

B. Hariharan et al., "Semantic Contours from Inverse Detectors", ICCV 2011. It labels 11,355 images of VOC.
"""

import zlib
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image
from scipy.io import loadmat  # type: ignore[import-untyped]
from torch.utils.data import DataLoader, Dataset
from torchvision.datasets import SBDataset
from tqdm import tqdm  # type: ignore[import-untyped]

from slimconv_lit.data.files import Archive, DataError, names_in, read_list, some, write_once
from slimconv_lit.data.voc import palette

SBD = Archive(SBDataset.url, SBDataset.filename, SBDataset.md5, marker="benchmark_RELEASE/dataset/val.txt")
COUNTS = {"train": 8_498, "val": 2_857}
"""How many images the official lists name."""
# Where people have it: as the archive unpacks, and as torchvision's SBDataset rearranges it.
_FOLDERS = ("benchmark_RELEASE/dataset", "sbd", "sbd/benchmark_RELEASE/dataset", ".")

# Of a file's parts, in MATLAB's version 5; and what a mask of 16 million pixels needs.
_COMPRESSED, _MOST_BYTES = 15, 2**24


def find_sbd(root: Path) -> Path | None:
    """The folder below `root` that holds SBD's lists and cls/*.mat."""
    return next((root / name for name in _FOLDERS if (root / name / "cls").is_dir()), None)


class _Conversion(Dataset[str]):
    """Each item, when it is read, becomes a picture of labels; it is what went wrong, or nothing."""

    def __init__(self, files: Sequence[Path], folder: Path) -> None:
        self.files, self.folder = files, folder

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> str:
        path = self.files[index]
        try:
            _refuse_bombs(path)
            labels = loadmat(path, variable_names=["GTcls"])["GTcls"][0]["Segmentation"][0]
            if labels.dtype != np.uint8 or labels.ndim != 2:
                raise ValueError(f"its mask is {labels.dtype} in {labels.ndim} dimensions, not uint8 in two")
            mask = Image.fromarray(labels)
        except Exception as error:  # in a broken file, scipy raises whatever it happens to run into
            return f"{path} cannot be read: {' '.join(str(error).split())[:200]}"
        mask.putpalette(palette().ravel().tolist())
        mask.save(self.folder / f"{path.stem}.png")
        return ""


def _refuse_bombs(path: Path) -> None:
    """Looks how much the compressed parts of a file of MATLAB's version 5 hold, for scipy takes all that there is."""
    content, left = path.read_bytes(), _MOST_BYTES
    order: Literal["big", "little"] = "big" if content[126:128] == b"MI" else "little"
    place = 128
    while place + 8 <= len(content):
        kind, length = (int.from_bytes(content[place + i : place + i + 4], order) for i in (0, 4))
        if kind == _COMPRESSED:
            held = zlib.decompressobj().decompress(content[place + 8 : place + 8 + length], left + 1)
            left -= len(held)
        if left < 0:
            raise ValueError(f"it unpacks to more than {_MOST_BYTES:,} bytes, which no mask does")
        place += 8 + length


def write_sbd_masks(sbd: Path, folder: Path, known: Collection[str], official: bool, num_workers: int) -> None:
    """Turns the masks of SBD's train and val lists into palette PNGs, once; an interrupted run starts again.

    Args:
        sbd: What `find_sbd` found.
        folder: Where to write NAME.png; nothing is done if it exists.
        known: Names of images that need no mask.
        official: Whether the lists must have the official lengths.
        num_workers: Processes that share the work; 0 works in this one.

    Raises:
        FileNotFoundError: If lists or masks are missing.
        DataError: If they are truncated or cannot be read.
    """
    if folder.is_dir():
        return
    listed: list[str] = []
    for split, count in COUNTS.items():
        listed += read_list(sbd / f"{split}.txt", count if official else None)
    there = names_in(sbd / "cls", ".mat")
    files = [sbd / "cls" / f"{name}.mat" for name in dict.fromkeys(listed) if name not in known]
    again = f"Unpack {SBD.filename} again (--data.download=true fetches it where it is missing)"
    if missing := [file for file in files if file.stem not in there]:
        raise FileNotFoundError(
            f"{len(missing):,} of {len(files):,} masks of SBD are missing: {some(missing)}. {again}"
        )

    def write(partial: Path) -> None:
        # Its own generator: whether masks had to be written must not change the random numbers of the training.
        loader = DataLoader(
            _Conversion(files, partial), batch_size=None, num_workers=num_workers, generator=torch.Generator()
        )
        problems = list(filter(None, tqdm(loader, desc="masks of SBD", unit=" masks", delay=1)))
        if problems:
            raise DataError(f"{len(problems):,} of {len(files):,} masks of SBD are broken: {some(problems)}. {again}")

    write_once(folder, write)
