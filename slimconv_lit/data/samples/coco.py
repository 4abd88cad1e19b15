"""A sample in the layout of MS COCO 2014."""

import json
from bisect import bisect
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import numpy as np
from contourpy import FillType, contour_generator
from numpy.typing import NDArray
from PIL import Image
from torchvision.models.detection import FasterRCNN_ResNet50_FPN_Weights
from tqdm import tqdm  # type: ignore[import-untyped]

from slimconv_lit.data.samples.scenes import Pool, Scene, bounds, compose_scene, scatter

# By the first category id of each.
_SUPERCATEGORIES = {
    1: "person",
    2: "vehicle",
    10: "outdoor",
    16: "animal",
    26: "accessory",
    34: "sports",
    44: "kitchen",
    52: "food",
    62: "furniture",
    72: "electronic",
    78: "appliance",
    84: "indoor",
}
_CROWD = 6


def write_coco2014(folder: Path, counts: tuple[int, int, int] = (200, 100, 100), seed: int = 0) -> None:
    """The layout of COCO 2014: train2014, val2014 and annotations/instances_*.json, with all 80 official categories.

    The digit d goes by the name of the category 8d of the 80: person, boat, ... The other 70 never occur. One image in
    eight also has a crowd, six small digits of one class annotated as one region. One in 20 has no object, and half of
    these have nothing but a crowd.

    Args:
        folder: Where to write.
        counts: Images of train2014, of val2014 without minival, and of minival, which is the rest of val2014.
        seed: Of all that is drawn.
    """
    names = FasterRCNN_ResNet50_FPN_Weights.COCO_V1.meta["categories"]
    ids = [number for number, name in enumerate(names) if number > 0 and name != "N/A"]
    starts = list(_SUPERCATEGORIES)
    head = {
        "info": {"description": "handwritten digits in the layout of COCO 2014", "version": "1.0", "year": 2014},
        "licenses": [{"id": 1, "name": "BSD 3-Clause", "url": "https://scikit-learn.org"}],
        "categories": [
            {"supercategory": _SUPERCATEGORIES[starts[bisect(starts, number) - 1]], "id": number, "name": names[number]}
            for number in ids
        ],
    }
    kinds = ("train", "valminusminival", "minival")
    parts = [part for part, count in zip(kinds, counts, strict=True) for _ in range(count)]
    pools = {part: Pool(train=part != "minival") for part in kinds}
    files: dict[str, dict[str, list[Any]]] = {
        key: {"images": [], "annotations": []} for key in ("train", "val", "valminusminival", "minival")
    }
    for name in ("train2014", "val2014", "annotations"):
        (folder / name).mkdir()
    for number, part in enumerate(tqdm(parts, desc="sample of COCO2014", delay=1, leave=False, disable=None), start=1):
        split = "train" if part == "train" else "val"
        scene, crowd = _scene(np.random.default_rng((seed, number)), pools[part], number)
        height, width = scene.instances.shape
        file_name = f"COCO_{split}2014_{number:012d}.jpg"
        Image.fromarray(scene.image).save(folder / f"{split}2014" / file_name, quality=90)
        image = {"license": 1, "file_name": file_name, "height": height, "width": width, "id": number}
        annotations = [
            {**shape, "image_id": number, "category_id": ids[8 * label], "id": 10 * number + index}
            for index, (label, shape) in enumerate(_objects(scene, crowd))
        ]
        for key in {part, split}:
            files[key]["images"].append(image)
            files[key]["annotations"].extend(annotations)
    for key, entry in files.items():
        (folder / "annotations" / f"instances_{key}2014.json").write_text(json.dumps({**head, **entry}))


def _scene(rng: np.random.Generator, pool: Pool, number: int) -> tuple[Scene, int]:
    """A scene, and how many of its digits, the last ones, are a crowd."""
    size = (int(rng.integers(96, 145)), int(rng.integers(96, 145)))
    heights = [] if number % 20 == 5 else rng.integers(40, 65, rng.integers(2, 7)).tolist()
    crowd = _CROWD if number % 8 == 3 or number % 40 == 5 else 0
    places = scatter(rng, [48] * bool(crowd) + heights, size)
    labels = rng.integers(10, size=len(places)).tolist()
    if crowd:
        (x0, y0, x1, y1), *places = places
        wide, tall = (x1 - x0) // 3, (y1 - y0) // 2
        corners = [(x0 + wide * column, y0 + tall * row) for row in range(2) for column in range(3)]
        places += [(x, y, x + wide, y + tall) for x, y in corners]
        labels = labels[1:] + crowd * labels[:1]
    return compose_scene(rng, pool, labels, places, size, cards=True), crowd


def _objects(scene: Scene, crowd: int) -> Iterator[tuple[int, dict[str, Any]]]:
    """(label, annotation) of each object, and of the crowd as one."""
    single = len(scene.labels) - crowd
    for number, label in enumerate(scene.labels[:single], start=1):
        polygons = _polygons(scene.instances == number)
        area = sum(_area(polygon) for polygon in polygons)
        x0, y0, x1, y1 = scene.boxes[number - 1]
        yield (
            label,
            {
                "segmentation": [polygon.round(2).ravel().tolist() for polygon in polygons],
                "area": area,
                "bbox": [x0, y0, x1 - x0, y1 - y0],
                "iscrowd": 0,
            },
        )
    if crowd:
        mask = scene.instances > single
        x0, y0, x1, y1 = bounds(mask)
        # Lengths of runs down the columns, background first.
        turns = np.flatnonzero(np.diff(mask.ravel(order="F"), prepend=False))
        yield (
            scene.labels[-1],
            {
                "segmentation": {"counts": np.diff([0, *turns, mask.size]).tolist(), "size": list(mask.shape)},
                "area": int(mask.sum()),
                "bbox": [x0, y0, x1 - x0, y1 - y0],
                "iscrowd": 1,
            },
        )


def _polygons(mask: NDArray[np.bool_]) -> list[NDArray[np.float64]]:
    """The outlines (N, 2) of x and y, pixels being centred at .5; polygons of COCO have no holes."""
    height, width = mask.shape
    generator = contour_generator(
        x=np.arange(-1, width + 1) + 0.5,
        y=np.arange(-1, height + 1) + 0.5,
        z=np.pad(mask, 1).astype(np.float64),
        fill_type=FillType.OuterOffset,
    )
    outlines, offsets = cast("tuple[list[NDArray[np.float64]], list[NDArray[np.uint32]]]", generator.filled(0.5, 2))
    return [outline[: ends[1]] for outline, ends in zip(outlines, offsets, strict=True)]


def _area(polygon: NDArray[np.float64]) -> float:
    x, y = polygon.T
    return round(abs(float(np.dot(x, np.roll(y, 1)) - np.dot(y, np.roll(x, 1)))) / 2, 2)
