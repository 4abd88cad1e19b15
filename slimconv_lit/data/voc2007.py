"""Pascal VOC2007 for object detection, and any tree that is laid out like it.

M. Everingham et al., "The Pascal Visual Object Classes (VOC) Challenge", IJCV 2010, http://host.robots.ox.ac.uk/pascal/VOC/
"""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple
from xml.etree.ElementTree import ParseError

import numpy as np
from defusedxml import DTDForbidden, ElementTree, EntitiesForbidden  # type: ignore[import-untyped]
from torchvision.datasets import VOCDetection
from torchvision.datasets.voc import DATASET_YEAR_DICT
from tqdm import tqdm  # type: ignore[import-untyped]

from slimconv_lit.data import samples
from slimconv_lit.data.base import OnBadImage, Split
from slimconv_lit.data.detection import Annotations, DetectionDataModule, DetectionImages, check_boxes, unknown_class
from slimconv_lit.data.files import Archive, DataError, inspect_image, names_in, read_list, some
from slimconv_lit.data.voc import OBJECT_NAMES

_FOLDER = "VOCdevkit/VOC2007"
ARCHIVES = tuple(
    Archive(entry["url"], entry["filename"], entry["md5"], f"{_FOLDER}/ImageSets/Main/{last}.txt")
    for entry, last in ((DATASET_YEAR_DICT["2007"], "trainval"), (DATASET_YEAR_DICT["2007-test"], "test"))
)
_SIDES = ("xmin", "ymin", "xmax", "ymax")


class _Object(NamedTuple):
    kind: str
    corners: list[float]
    difficult: bool


def _read_objects(path: Path) -> list[_Object]:
    """The objects of one XML file.

    Raises:
        DataError: If it is no XML, or an object has no class or no box of four numbers.
    """
    try:
        tree = VOCDetection.parse_voc_xml(ElementTree.parse(path, forbid_dtd=True).getroot())
    except (DTDForbidden, EntitiesForbidden) as error:
        raise DataError(f"{path} defines entities, which no annotation of VOC does; it is not read") from error
    except (ParseError, ValueError, LookupError, RecursionError) as error:
        raise DataError(f"{path} is truncated or no XML: {error}. Copy or fetch it again") from error
    if not isinstance(annotation := tree.get("annotation"), dict):
        raise DataError(f"{path} is no annotation of VOC: it holds {str(tree)[:80]}")
    objects = []
    for number, entry in enumerate(annotation["object"], start=1):
        try:
            corners = [float(entry["bndbox"][side]) for side in _SIDES]
            if not isinstance(entry["name"], str):
                raise TypeError("several names, or none that is a text")
            objects.append(_Object(entry["name"], corners, bool(int(entry.get("difficult") or 0))))
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise DataError(
                f"{path}, object {number}: an object needs a name and a bndbox with the numbers {', '.join(_SIDES)}; "
                f"this one is {str(entry)[:300]}"
            ) from error
    return objects


class VOC2007DataModule(DetectionDataModule):
    """Pascal VOC2007 below `root`/VOCdevkit/VOC2007: 20 classes, 5,011 images in trainval and 4,952 in test.

    By default it trains on the official list train, validates on val and only tests on test. The reference recipe
    trains on trainval, which is both, and looks at test alone: `val_on_test=True`. A tree without a test list is
    tested on val. Both official archives are wanted: below `root`, unpacked or not, or fetched with `download`.

    VOC names the first and the last pixel of a box, counted from 1. Here a box goes from the left edge of the first to
    the right edge of the last (xmin - 1, ymin - 1, xmax, ymax), as torchvision's detectors measure boxes; the
    reference (jwyang) has the last pixel itself, xmax - 1. A box whose first pixel is also its last is left out.

    Evaluation keeps `difficult` objects and says which they are; VOC's metric passes over them.

    With `sample=True` the first ten classes are handwritten digits, and the other ten never occur.

    Args:
        root: Folder that holds VOCdevkit, or the archives.
        batch_size: Images per training step on each device.
        eval_batch_size: Images per step elsewhere; None means `batch_size`.
        num_workers: Processes that load images; None means one per CPU core, at most 8.
        seed: Of the training order and the augmentation.
        folder: Below `root`, of a tree in this layout: JPEGImages, Annotations and ImageSets/Main.
        class_names: In the order of the labels; None means VOC's 20.
        val_on_test: Train on trainval and validate on test.
        train_on_difficult: Train on difficult objects too, as the reference (jwyang) does and py-faster-rcnn does not.
        download: Fetch the archives (0.4 GB each) into `root` where they are missing.
        sample: Read a small data set in the same layout (300 and 100 images), built below `root`.
        predict_dir: Predict all images below this folder; None predicts the test images.
        pin_memory: Load into page-locked memory; None does so where CUDA is available.
        on_bad_image: "raise" stops at a picture that cannot be read and names it; "skip" goes on without it as long as
            no more than 1 % of them are missing, or any number in prediction.
    """

    def __init__(
        self,
        root: str = "data/voc",
        batch_size: int = 4,
        eval_batch_size: int | None = None,
        num_workers: int | None = None,
        seed: int = 0,
        folder: str = _FOLDER,
        class_names: list[str] | None = None,
        val_on_test: bool = False,
        train_on_difficult: bool = True,
        download: bool = False,
        sample: bool = False,
        predict_dir: str | None = None,
        pin_memory: bool | None = None,
        on_bad_image: OnBadImage = "raise",
    ) -> None:
        super().__init__(
            root, batch_size, eval_batch_size, num_workers, seed, sample, predict_dir, pin_memory, on_bad_image
        )
        if folder != _FOLDER and (download or sample):
            raise ValueError(f"folder={folder!r} cannot be downloaded or be a sample; leave it out, it is {_FOLDER!r}")
        self.save_hyperparameters(logger=False)
        self.folder = folder
        self.val_on_test = val_on_test
        self.train_on_difficult = train_on_difficult
        self.download = download
        self.class_names = tuple(class_names or OBJECT_NAMES)
        self.num_classes = len(self.class_names)
        self.category_ids = tuple(range(1, self.num_classes + 1))
        self.input_size = (3, 136, 136) if sample else (3, 600, 850)
        self._read: dict[str, Annotations] = {}

    def prepare_data(self) -> None:
        """Unpacks the archives, fetched where asked to, or builds the sample; either only where it is missing."""
        if self.sample:
            samples.build_once(self.root, "voc2007", samples.write_voc2007)
        elif self.folder == _FOLDER:
            for archive in ARCHIVES:
                archive.unpack(self.root, self.download)

    def read(self, split: Split) -> DetectionImages:
        """The images of a split; all files are looked at, though no image is decoded.

        Raises:
            FileNotFoundError: If the tree, a list, an XML file or an image is missing.
            DataError: If a list, an XML file or an image cannot be used, a class is unknown, or an image to evaluate
                on is among the training images.
        """
        tested = "test" if "test" in self._lists() else "val"
        held_out = tested if self.val_on_test else "val"
        name = {"train": "trainval" if self.val_on_test else "train", "val": held_out, "test": tested}[split]
        if split == "train":
            self._refuse_leaks(name, {held_out, tested})
        if name not in self._read:
            self._read[name] = self._annotations(name)
        annotations = self._read[name]
        if split == "train" and not self.train_on_difficult:
            annotations = annotations.objects(~annotations.difficult)
        return DetectionImages(self._tree, annotations)

    @property
    def _tree(self) -> Path:
        root = samples.build_once(self.root, "voc2007", samples.write_voc2007) if self.sample else self.root
        return root / self.folder

    def _lists(self) -> set[str]:
        folder = self._tree / "ImageSets" / "Main"
        lists = names_in(folder, ".txt")
        if not lists:
            raise FileNotFoundError(
                f"no VOC2007 in root={str(self.root)!r}: {folder} has no lists. Fetch it (or unpack "
                f"{' and '.join(archive.filename for archive in ARCHIVES)} that lie in root) with "
                "--data.download=true, name the folder that holds VOCdevkit with --data.root, or try a small sample "
                "with --data.sample=true"
            )
        return lists

    def _list(self, name: str) -> Path:
        return self._tree / "ImageSets" / "Main" / f"{name}.txt"

    def _refuse_leaks(self, train: str, others: set[str]) -> None:
        trained = set(read_list(self._list(train)))
        for other in sorted(others & self._lists()):
            if leaked := sorted(trained.intersection(read_list(self._list(other)))):
                raise DataError(
                    f"{len(leaked):,} images of {self._list(other)} are in {self._list(train)} too: {some(leaked)}. "
                    "Take them out of one: who trains on them measures nothing"
                )

    def _annotations(self, list_name: str) -> Annotations:
        source = self._list(list_name)
        names = read_list(source)
        for kind, suffix in (("Annotations", ".xml"), ("JPEGImages", ".jpg")):
            there = names_in(self._tree / kind, suffix)
            if missing := [f"{name}{suffix}" for name in names if name not in there]:
                raise FileNotFoundError(
                    f"{len(missing):,} of the {len(names):,} images that {source} names have no file in "
                    f"{self._tree / kind}: {some(missing)}. Unpack or copy them again"
                )
        xml = [self._tree / "Annotations" / f"{name}.xml" for name in names]
        images = [self._tree / "JPEGImages" / f"{name}.jpg" for name in names]
        # Threads, because a folder on a network answers slowly.
        with ThreadPoolExecutor(8) as pool:
            sizes = np.array([size for size, _ in pool.map(inspect_image, images)])
            each = pool.map(_read_objects, xml)
            objects = list(tqdm(each, f"reading {source.stem}", len(names), delay=2, leave=False))
        owners = np.repeat(np.arange(len(names)), [len(found) for found in objects])
        flat = [one for found in objects for one in found]
        places = [f"{path.name}, object {n}" for path, found in zip(xml, objects, strict=True) for n in _count(found)]
        self._refuse_unknown(flat, places)
        # VOC's first pixel is 1, and its last pixel belongs to the box.
        edges = np.array([one.corners for one in flat], dtype=np.float64).reshape(-1, 4) - (1, 1, 0, 0)
        boxes, kept = check_boxes(edges, sizes[owners], 1, str(source), places.__getitem__)
        annotations = Annotations(
            files=np.array([f"JPEGImages/{name}.jpg" for name in names]),
            ids=np.arange(1, len(names) + 1),
            sizes=sizes,
            owners=owners,
            boxes=boxes,
            labels=np.array([self.class_names.index(one.kind) + 1 for one in flat], dtype=np.int64),
            difficult=np.array([one.difficult for one in flat], dtype=bool),
            crowd=np.zeros(len(flat), dtype=bool),
            area=(boxes[:, 2:] - boxes[:, :2]).prod(1),
        )
        return annotations.objects(kept)

    def _refuse_unknown(self, objects: Sequence[_Object], places: Sequence[str]) -> None:
        first = {one.kind: place for one, place in reversed(list(zip(objects, places, strict=True)))}
        for kind, place in first.items():
            if kind not in self.class_names:
                raise DataError(
                    f"{self._tree / 'Annotations' / place}: {unknown_class(kind, self.class_names)}. To read all "
                    f"that is there: --data.class_names=[{','.join(sorted(first))}]"
                )


def _count(items: Sequence[object]) -> range:
    return range(1, len(items) + 1)
