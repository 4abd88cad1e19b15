"""MS COCO 2014 for object detection, and any tree that is laid out like it.

T.-Y. Lin et al., "Microsoft COCO: Common Objects in Context", ECCV 2014, https://cocodataset.org
"""

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, TypeAlias, TypeVar

import numpy as np
from numpy.typing import NDArray
from torchvision.models.detection import FasterRCNN_ResNet50_FPN_Weights

from slimconv_lit.data import samples
from slimconv_lit.data.base import OnBadImage, Split
from slimconv_lit.data.detection import Annotations, DetectionDataModule, DetectionImages, check_boxes, unknown_class
from slimconv_lit.data.files import DataError, names_in, some

Part: TypeAlias = Literal["train2014", "val2014"]
Row = TypeVar("Row")

# The 91 names that the paper lists, of which 80 are annotated; the others have the name N/A, and number 0 none.
_NAMES = FasterRCNN_ResNet50_FPN_Weights.COCO_V1.meta["categories"]
CATEGORIES = {name: number for number, name in enumerate(_NAMES) if number > 0 and name != "N/A"}
"""COCO's own number of each of its 80 classes: 1 to 90, with gaps."""
_URL = "http://images.cocodataset.org"
_MINIVAL = ("instances_minival2014.json", "instances_val2017.json")


class COCO2014DataModule(DetectionDataModule):
    """MS COCO 2014: `root`/annotations/instances_{train,val}2014.json, `root`/train2014, `root`/val2014; 80 classes.

    The test images are the 5,000 of val2014 that are called minival. By default it trains on train2014 and validates on
    the rest of val2014. The reference recipe trains on both, 118,287 images, and looks at minival alone:
    `val_on_test=True`.

    The ids of minival are read from a file: `minival`, or annotations/instances_minival2014.json, or the official
    annotations/instances_val2017.json, for COCO's later val2017 are the same images
    (https://github.com/facebookresearch/Detectron/blob/main/detectron/datasets/data/README.md).

    Crowds, which are one box around many objects, are not trained on. Evaluation keeps them and says which they are;
    COCO's metric passes over what is found in them. `area` is that of an object's outline, not of its box.

    With `sample=True` ten of the classes are handwritten digits, and the others never occur.

    Args:
        root: Folder that holds annotations, train2014 and val2014.
        batch_size: Images per training step on each device.
        eval_batch_size: Images per step elsewhere; None means `batch_size`.
        num_workers: Processes that load images; None means one per CPU core, at most 8.
        seed: Of the training order and the augmentation.
        class_names: In the order of the labels, for files with other categories; None means COCO's 80.
        minival: A file of ids: a JSON file of COCO, of which the images count, or text with an id on each line.
        val_on_test: Train on train2014 and the rest of val2014, and validate on minival.
        sample: Read a small data set in the same layout (200, 100 and 100 images), built below `root`.
        predict_dir: Predict all images below this folder; None predicts minival.
        pin_memory: Load into page-locked memory; None does so where CUDA is available.
        on_bad_image: "raise" stops at a picture that cannot be read and names it; "skip" goes on without it as long as
            no more than 1 % of them are missing, or any number in prediction.
    """

    def __init__(
        self,
        root: str = "data/coco",
        batch_size: int = 4,
        eval_batch_size: int | None = None,
        num_workers: int | None = None,
        seed: int = 0,
        class_names: list[str] | None = None,
        minival: str | None = None,
        val_on_test: bool = False,
        sample: bool = False,
        predict_dir: str | None = None,
        pin_memory: bool | None = None,
        on_bad_image: OnBadImage = "raise",
    ) -> None:
        super().__init__(
            root, batch_size, eval_batch_size, num_workers, seed, sample, predict_dir, pin_memory, on_bad_image
        )
        self.save_hyperparameters(logger=False)
        self.minival = minival
        self.val_on_test = val_on_test
        self.class_names = tuple(class_names or CATEGORIES)
        self.num_classes = len(self.class_names)
        # Those of other classes are in the files.
        self.category_ids = tuple(CATEGORIES.get(name, i) for i, name in enumerate(self.class_names, start=1))
        self.input_size = (3, 136, 136) if sample else (3, 600, 899)
        self._read: dict[Part, Annotations] = {}

    def state_dict(self) -> dict[str, Any]:
        """The categories' ids, so that a checkpoint can write results where the annotations are not."""
        return {"category_ids": list(self.category_ids)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes the ids over, unless the classes are other ones by now or the annotations have been read."""
        ids = state_dict.get("category_ids")
        if not isinstance(ids, list) or not all(isinstance(number, int) for number in ids):
            return
        if not self._read and len(ids) == self.num_classes:
            self.category_ids = tuple(ids)

    def prepare_data(self) -> None:
        """Builds the sample where it is missing."""
        if self.sample:
            samples.build_once(self.root, "coco2014", samples.write_coco2014)

    def read(self, split: Split) -> DetectionImages:
        """The images of a split.

        Raises:
            FileNotFoundError: If a JSON file, the list of minival or an image is missing.
            DataError: If a file cannot be used, or what it says does not fit together.
        """
        if split == "train":
            annotations = self._part("train2014")
            if self.val_on_test:
                annotations = annotations + self._part("val2014").images(~self._in_minival())
            annotations = annotations.objects(~annotations.crowd)
        else:
            tested = self._in_minival()
            chosen = tested if split == "test" or self.val_on_test else ~tested
            annotations = self._part("val2014").images(chosen)
        if not len(annotations.files):
            raise DataError(f"{self._json('val2014')} has no image for {split}: minival has all of them")
        self._refuse_missing(annotations.files)
        return DetectionImages(self._tree, annotations)

    @property
    def _tree(self) -> Path:
        return samples.build_once(self.root, "coco2014", samples.write_coco2014) if self.sample else self.root

    def _json(self, part: Part) -> Path:
        return self._tree / "annotations" / f"instances_{part}.json"

    def _part(self, part: Part) -> Annotations:
        """All of a JSON file, which is read once: it takes a while."""
        if part not in self._read:
            path = self._json(part)
            if not path.is_file():
                raise FileNotFoundError(
                    f"no COCO in root={str(self.root)!r}: {path} does not exist. Unpack {_URL}/zips/train2014.zip, "
                    f"{_URL}/zips/val2014.zip and {_URL}/annotations/annotations_trainval2014.zip in root, name the "
                    "folder that holds annotations with --data.root, or try a small sample with --data.sample=true"
                )
            content = load_json(path)
            self.category_ids = self._category_ids(path, content)
            self._read[part] = parse(path, content, part, self.category_ids)
        return self._read[part]

    def _category_ids(self, path: Path, content: dict[str, Any]) -> tuple[int, ...]:
        found = {name: number for name, number in rows_of(path, content, "categories", _category)}
        for name in found:
            if name not in self.class_names:
                raise DataError(
                    f"{path}: {unknown_class(name, self.class_names)}. To read all that is there: "
                    f"--data.class_names=[{','.join(found)}]"
                )
        if missing := [name for name in self.class_names if name not in found]:
            raise DataError(f"{path}: its categories lack {some(missing)}, which class_names has")
        return tuple(found[name] for name in self.class_names)

    def _in_minival(self) -> NDArray[np.bool_]:
        """For each image of val2014 whether it is one of minival."""
        folder = self._tree / "annotations"
        known = self._part("val2014").ids
        files = [Path(self.minival)] if self.minival else [folder / name for name in _MINIVAL]
        path = next((file for file in files if file.is_file()), None)
        if path is None:
            raise FileNotFoundError(
                f"which images of val2014 are minival, on which COCO 2014 is tested, is not known: there is no "
                f"{' and no '.join(map(str, files))}. They are the images of instances_val2017.json: put that file of "
                f"{_URL}/annotations/annotations_trainval2017.zip into {folder}, or name a list with --data.minival"
            )
        ids = read_ids(path)
        if strange := sorted(set(ids).difference(known.tolist())):
            raise DataError(f"{path}: {len(strange):,} of its {len(ids):,} ids are not in val2014: {some(strange)}")
        return np.isin(known, ids)

    def _refuse_missing(self, files: NDArray[np.str_]) -> None:
        there = {f"{part}/{name}" for part in ("train2014", "val2014") for name in names_in(self._tree / part, "")}
        if missing := [file for file in files.tolist() if file not in there]:
            raise FileNotFoundError(
                f"{len(missing):,} of {len(files):,} annotated images are not in {self._tree}: {some(missing)}. Unpack "
                f"{_URL}/zips/{missing[0].partition('/')[0]}.zip there again"
            )


def load_json(path: Path) -> dict[str, Any]:
    """A JSON file of COCO, without the outlines of the objects.

    Raises:
        DataError: If it is truncated or is not a dictionary.
    """
    try:
        with path.open(encoding="utf-8") as file:
            content = json.load(file, object_hook=_without_outline)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is truncated or no JSON: {error}. Copy or fetch it again") from error
    if not isinstance(content, dict):
        raise DataError(f"{path} is not in COCO's format, a dictionary of images, annotations and categories")
    return content


def _without_outline(entry: dict[str, Any]) -> dict[str, Any]:
    # Outlines are most of the file, and gigabytes once they are Python's lists.
    entry.pop("segmentation", None)
    return entry


def rows_of(path: Path, content: dict[str, Any], what: str, row: Callable[[Any], Row]) -> list[Row]:
    """`row` of each entry of content[what].

    Raises:
        DataError: If there are none, or `row` cannot do with one of them; the message shows it.
    """
    if not isinstance(content.get(what), list):
        raise DataError(f"{path} is not in COCO's format: it has no {what}")
    rows: list[Row] = []
    try:
        for entry in content[what]:
            rows.append(row(entry))
    except (AttributeError, KeyError, TypeError, ValueError, OverflowError) as error:
        raise DataError(
            f"{path}, {what}[{len(rows)}] lacks something or is misspelt ({type(error).__name__}: {error}): "
            f"{str(content[what][len(rows)])[:300]}"
        ) from error
    return rows


def _category(entry: Any) -> tuple[str, int]:
    return str(entry["name"]), _whole(entry["id"])


def _image(entry: Any) -> tuple[str, int, int, int]:
    return str(entry["file_name"]), _whole(entry["id"]), _whole(entry["width"]), _whole(entry["height"])


def _whole(value: Any) -> int:
    number = int(value)
    # They share a table with coordinates.
    if abs(number) > 2**53:
        raise ValueError(f"{number:.3g} is too large")
    return number


def _annotation(entry: Any) -> tuple[float, ...]:
    x, y, width, height = map(float, entry["bbox"])
    area, crowd = float(entry.get("area", width * height)), _whole(entry.get("iscrowd", 0))
    numbers = _whole(entry["id"]), _whole(entry["image_id"]), _whole(entry["category_id"])
    return *numbers, crowd, area, x, y, x + width, y + height


def read_ids(path: Path) -> list[int]:
    """The ids of images in a JSON file of COCO, or in a text file.

    Raises:
        DataError: If there are none, or a line is not an id.
    """
    if path.suffix == ".json":
        ids = [number for _, number, _, _ in rows_of(path, load_json(path), "images", _image)]
    else:
        lines = path.read_text(encoding="utf-8", errors="replace").split()
        if strange := [line for line in lines if not re.fullmatch("[0-9]{1,15}", line)]:
            raise DataError(f"{path} must have the id of an image on each line; it has {some(strange)}")
        ids = list(map(int, lines))
    if not ids:
        raise DataError(f"{path} names no image")
    return ids


def parse(path: Path, content: dict[str, Any], folder: str, category_ids: Sequence[int]) -> Annotations:
    """What a JSON file says, as arrays.

    Args:
        path: Of the file.
        content: Of the file.
        folder: That its images are in.
        category_ids: The categories in the order of the labels.

    Raises:
        DataError: If there is no image, or an annotation's image or category is not there.
    """
    images = rows_of(path, content, "images", _image)
    if not images:
        raise DataError(f"{path} has no images")
    ids = np.array([number for _, number, _, _ in images])
    order = np.argsort(ids)
    if len(twice := ids[order][1:][np.diff(ids[order]) == 0]):
        raise DataError(f"{path} has two images with one id: {some(twice.tolist())}")
    table = np.array(rows_of(path, content, "annotations", _annotation)).reshape(-1, 9)
    numbers, image_ids, categories = table[:, :3].astype(np.int64).T

    def refuse(wrong: NDArray[np.bool_], what: str, values: NDArray[np.int64]) -> None:
        if wrong.any():
            pairs = zip(numbers[wrong].tolist(), values[wrong].tolist(), strict=True)
            listed = some(f"annotation {number} ({what} {value})" for number, value in pairs)
            raise DataError(f"{path}: {wrong.sum():,} annotations have an {what} that is not in the file: {listed}")

    refuse(~np.isin(image_ids, ids), "image_id", image_ids)
    refuse(~np.isin(categories, category_ids), "category_id", categories)
    owners = order[np.searchsorted(ids[order], image_ids)]
    rows = np.argsort(owners, kind="stable")
    table, owners, numbers, categories = table[rows], owners[rows], numbers[rows], categories[rows]
    sizes = np.array([(width, height) for _, _, width, height in images])

    def name(row: int) -> str:
        return f"annotation {numbers[row]} ({images[owners[row]][0]})"

    boxes, kept = check_boxes(table[:, 5:], sizes[owners], 0, str(path), name)
    labels = {number: label for label, number in enumerate(category_ids, start=1)}
    annotations = Annotations(
        files=np.array([f"{folder}/{file}" for file, _, _, _ in images]),
        ids=ids,
        sizes=sizes,
        owners=owners,
        boxes=boxes,
        labels=np.array([labels[number] for number in categories.tolist()], dtype=np.int64),
        difficult=np.zeros(len(boxes), dtype=bool),
        crowd=table[:, 3] > 0,
        area=table[:, 4].astype(np.float32),
    )
    return annotations.objects(kept)
