"""The Semantic Boundaries Dataset (SBD): its masks, as pictures of labels like those of Pascal VOC.

B. Hariharan et al., "Semantic Contours from Inverse Detectors", ICCV 2011. It labels 11,355 images of VOC.
"""

from collections.abc import Collection, Sequence
from pathlib import Path

import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torchvision.datasets import SBDataset
from tqdm import tqdm  # type: ignore[import-untyped]

from slimconv_lit.data.files import Archive, DataError, names_in, read_list, some, write_once
from slimconv_lit.data.matlab import read_field
from slimconv_lit.data.voc import palette

SBD = Archive(SBDataset.url, SBDataset.filename, SBDataset.md5, marker="benchmark_RELEASE/dataset/val.txt")
COUNTS = {"train": 8_498, "val": 2_857}
"""How many images the official lists name."""
# Where people have it: as the archive unpacks, and as torchvision's SBDataset rearranges it.
_FOLDERS = ("benchmark_RELEASE/dataset", "sbd", "sbd/benchmark_RELEASE/dataset", ".")


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
            mask = Image.fromarray(read_field(path, "GTcls", "Segmentation"))
        except (OSError, ValueError) as error:
            return f"{path} cannot be read: {error}"
        mask.putpalette(palette().ravel().tolist())
        mask.save(self.folder / f"{path.stem}.png")
        return ""


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
