"""Samples in the layouts of Pascal VOC2007 and VOC2012 and of the Semantic Boundaries Dataset.

The digits 0 to 9 go by the names of VOC's first ten classes, aeroplane to cow; the other ten never occur.
"""

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TypeAlias
from xml.etree import ElementTree

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy.io import savemat  # type: ignore[import-untyped]
from scipy.ndimage import maximum_filter, minimum_filter  # type: ignore[import-untyped]
from scipy.sparse import csc_matrix  # type: ignore[import-untyped]
from tqdm import tqdm  # type: ignore[import-untyped]

from slimconv_lit.data.samples.scenes import TINY, Pool, Scene, object_scene
from slimconv_lit.data.voc import OBJECT_NAMES, VOID, palette

Objects: TypeAlias = list[tuple[str, bool]]
"""Of an image: (class name, difficult)."""


def write_voc2012(folder: Path, counts: tuple[int, int, int] = (60, 240, 60), seed: int = 0) -> None:
    """The layout of Pascal VOC2012's trainval archive: images, XML boxes, masks of classes and of objects, lists.

    As in VOC, a thin border around each object is 255 in the masks, and images that only SBD labels have no mask.

    Args:
        folder: Where to write VOCdevkit/VOC2012.
        counts: Images in VOC's train list, images that only SBD labels, images in VOC's val list.
        seed: Of all that is drawn.
    """
    root = folder / "VOCdevkit" / "VOC2012"
    segmented: dict[str, list[str]] = {"train": [], "val": []}
    main: dict[str, dict[str, Objects]] = {"train": {}, "val": {}}
    for part, name, scene in _voc2012_scenes(counts, seed):
        main["val" if part == "val" else "train"][name] = _write_image(root, name, scene, segmented=part != "sbd")
        if part != "sbd":
            segmented[part].append(name)
            _write_mask(root / "SegmentationClass" / f"{name}.png", scene, _class_mask(scene))
            _write_mask(root / "SegmentationObject" / f"{name}.png", scene, scene.instances)
    for split, names in (*segmented.items(), ("trainval", segmented["train"] + segmented["val"])):
        _write_list(root / "ImageSets" / "Segmentation" / f"{split}.txt", names)
    _write_object_lists(root / "ImageSets" / "Main", main)


def write_sbd(folder: Path, counts: tuple[int, int, int] = (60, 240, 60), seed: int = 0) -> None:
    """The layout of the Semantic Boundaries Dataset's archive, for the images of `write_voc2012`.

    As in SBD, its lists also name images of VOC's train and val lists (here every second one), and no pixel is 255.

    Args:
        folder: Where to write benchmark_RELEASE.
        counts: As in `write_voc2012`; the scenes are the same.
        seed: Of all that is drawn.
    """
    root = folder / "benchmark_RELEASE" / "dataset"
    for kind in ("img", "cls", "inst"):
        (root / kind).mkdir(parents=True)
    names = []
    for number, (part, name, scene) in enumerate(_voc2012_scenes(counts, seed)):
        if part != "sbd" and number % 2:
            continue
        names.append(name)
        Image.fromarray(scene.image).save(root / "img" / f"{name}.jpg", quality=90)
        mask, labels = _class_mask(scene), np.array(scene.labels) + 1
        of_classes = {
            "Segmentation": mask,
            "Boundaries": _boundaries(mask, range(1, 21)),
            "CategoriesPresent": np.unique(labels)[:, None].astype(np.uint8),
        }
        of_objects = {
            "Segmentation": scene.instances,
            "Boundaries": _boundaries(scene.instances, range(1, len(labels) + 1)),
            "Categories": labels[:, None].astype(np.float64),
        }
        savemat(root / "cls" / f"{name}.mat", {"GTcls": of_classes}, do_compression=True)
        savemat(root / "inst" / f"{name}.mat", {"GTinst": of_objects}, do_compression=True)
    _write_list(root / "train.txt", [name for number, name in enumerate(names) if number % 4])
    _write_list(root / "val.txt", names[::4])


def write_voc2007(folder: Path, counts: tuple[int, int] = (300, 100), seed: int = 0) -> None:
    """The layout of Pascal VOC2007's trainval and test archives, for detection: images, XML boxes, lists.

    One image in four also has a tiny digit, which is `difficult`; one in 20 has no object at all.

    Args:
        folder: Where to write VOCdevkit/VOC2007.
        counts: Images of trainval, half of them train and half val, and of test.
        seed: Of all that is drawn.
    """
    root = folder / "VOCdevkit" / "VOC2007"
    pools = {False: Pool(train=True), True: Pool(train=False)}
    splits: dict[str, dict[str, Objects]] = {"train": {}, "val": {}, "test": {}}
    for number in tqdm(range(sum(counts)), desc="sample of VOC2007", delay=1, leave=False, disable=None):
        rng, test = np.random.default_rng((seed, number)), number >= counts[0]
        heights = [] if number % 20 == 7 else _heights(rng)
        tiny = rng.integers(TINY - 6, TINY, 1).tolist() if number % 4 == 0 else []
        scene = object_scene(rng, pools[test], heights + tiny, _size(rng))
        name = f"{number + 1:06d}"
        splits["test" if test else ("train", "val")[number % 2]][name] = _write_image(root, name, scene)
    _write_object_lists(root / "ImageSets" / "Main", splits)


def _heights(rng: np.random.Generator, least: int = 40, most: int = 64) -> list[int]:
    # As many as there is room for: a network learns the classes from the objects, and an empty ground costs as much.
    heights: list[int] = rng.integers(least, most + 1, rng.integers(3, 9)).tolist()
    return heights


def _size(rng: np.random.Generator, least: int = 96, most: int = 144) -> tuple[int, int]:
    return int(rng.integers(least, most + 1)), int(rng.integers(least, most + 1))


def _voc2012_scenes(counts: tuple[int, int, int], seed: int) -> Iterator[tuple[str, str, Scene]]:
    """(part, name, scene) of every image; the parts are "train", "sbd" and "val"."""
    parts = [part for part, count in zip(("train", "sbd", "val"), counts, strict=True) for _ in range(count)]
    pools = {part: Pool(train=part != "val") for part in set(parts)}
    for number, part in enumerate(tqdm(parts, desc="sample of VOC2012 and SBD", delay=1, leave=False, disable=None)):
        # A generator for each image: VOC2012 and SBD are written apart, and both show the same images.
        rng = np.random.default_rng((seed, number))
        # Smaller than the scenes of VOC2007: a label for every pixel needs finer maps, which take longer.
        yield part, f"2012_{number:06d}", object_scene(rng, pools[part], _heights(rng, 24, 40), _size(rng, 64, 96))


def _class_mask(scene: Scene) -> NDArray[np.uint8]:
    """(H, W): 0 background, d + 1 the digit d."""
    return np.array([0, *(label + 1 for label in scene.labels)], dtype=np.uint8)[scene.instances]


def _borders(mask: NDArray[np.uint8]) -> NDArray[np.bool_]:
    """What has another label next to it."""
    borders: NDArray[np.bool_] = maximum_filter(mask, 3) != minimum_filter(mask, 3)
    return borders


def _write_mask(path: Path, scene: Scene, mask: NDArray[np.uint8]) -> None:
    picture = Image.fromarray(np.where(_borders(scene.instances), np.uint8(VOID), mask))
    picture.putpalette(palette().ravel().tolist())
    path.parent.mkdir(exist_ok=True)
    picture.save(path)


def _boundaries(mask: NDArray[np.uint8], values: range) -> NDArray[np.object_]:
    """A column of sparse masks, one for each value: the outermost pixels that have it."""
    borders, present, nothing = np.where(_borders(mask), mask, 0), np.unique(mask), csc_matrix(mask.shape, dtype=bool)
    cells = np.empty((len(values), 1), dtype=object)
    cells[:, 0] = [csc_matrix(borders == value) if value in present else nothing for value in values]
    return cells


def _write_image(root: Path, name: str, scene: Scene, segmented: bool = False) -> Objects:
    """Writes JPEGImages/NAME.jpg and Annotations/NAME.xml."""
    for kind in ("JPEGImages", "Annotations"):
        (root / kind).mkdir(parents=True, exist_ok=True)
    Image.fromarray(scene.image).save(root / "JPEGImages" / f"{name}.jpg", quality=90)
    height, width = scene.instances.shape
    annotation = ElementTree.Element("annotation")
    _add(annotation, folder=root.name, filename=f"{name}.jpg")
    source = f"handwritten digits in the layout of {root.name}"
    _add(ElementTree.SubElement(annotation, "source"), database=source, annotation=source, image="scikit-learn")
    _add(ElementTree.SubElement(annotation, "size"), width=width, height=height, depth=3)
    _add(annotation, segmented=int(segmented))
    objects = []
    for label, (x0, y0, x1, y1) in zip(scene.labels, scene.boxes, strict=True):
        kind, difficult = OBJECT_NAMES[label], y1 - y0 < TINY
        objects.append((kind, difficult))
        node = ElementTree.SubElement(annotation, "object")
        _add(node, name=kind, pose="Unspecified", truncated=0, difficult=int(difficult))
        # VOC counts pixels from 1 and names the last one inside.
        _add(ElementTree.SubElement(node, "bndbox"), xmin=x0 + 1, ymin=y0 + 1, xmax=x1, ymax=y1)
    ElementTree.indent(annotation, "\t")
    (root / "Annotations" / f"{name}.xml").write_bytes(ElementTree.tostring(annotation))
    return objects


def _add(parent: ElementTree.Element, **texts: str | int) -> None:
    for tag, text in texts.items():
        ElementTree.SubElement(parent, tag).text = str(text)


def _write_object_lists(folder: Path, splits: Mapping[str, dict[str, Objects]]) -> None:
    """SPLIT.txt, and CLASS_SPLIT.txt, where 1 stands by a name, or -1: no such object, or 0: only difficult ones."""
    trainval = dict(sorted((splits["train"] | splits["val"]).items()))
    for split, images in {**splits, "trainval": trainval}.items():
        _write_list(folder / f"{split}.txt", images)
        for kind in OBJECT_NAMES:
            rows = []
            for name, objects in images.items():
                difficult = [hard for label, hard in objects if label == kind]
                rows.append(f"{name} {-1 if not difficult else int(not all(difficult)):2d}")
            _write_list(folder / f"{kind}_{split}.txt", rows)


def _write_list(path: Path, lines: Iterable[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{line}\n" for line in lines))
