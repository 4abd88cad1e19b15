"""From a checkpoint to a file that runs without this package: written, run again, compared with the network."""

import argparse
import bisect
import importlib.metadata
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from tqdm import tqdm  # type: ignore[import-untyped]

from slimconv_lit.config_files import checkpoint_config
from slimconv_lit.experiments import formats
from slimconv_lit.experiments.formats import FORMATS, Format, Runner
from slimconv_lit.lightning_cli import SlimCLI, open_checkpoint
from slimconv_lit.lookup import closest
from slimconv_lit.results import describe_network
from slimconv_lit.surgery import fuse
from slimconv_lit.tables import format_table
from slimconv_lit.tasks import DetectionTask, SegmentationTask
from slimconv_lit.usage import UsageError

# Of the largest output. Runtimes add in another order, which in float32 is about 1e-6.
TOLERANCE = 1e-4
# bfloat16 has three digits, and compilers round at other places than eager does.
TOLERANCE_BF16 = 5e-2
# More than this is no rounding, whatever the network makes of it.
MOST = 5e-2
# Of a detector's boxes, in image sides, and of its scores; and the share of detections that may be others, for what is
# close to a threshold falls on either side of it.
TOLERANCE_BOXES, OTHERS = 1e-3, 0.05
# torch.export takes a size of 1 for a constant: of the batch, and of maps that a small image leaves.
TRACED_BATCH, TRACED_SIDE = 2, 96
BATCHES = (1, 3)
# Pixels that are added to the size of the data: what strides divide, and what they do not.
OTHER_SIZES = ((32, 32), (13, 7))


def export(argv: Sequence[str]) -> Path:
    """Runs `export --ckpt_path C [--format F] [--precision P] ...`; returns the file.

    Raises:
        UsageError: If an option is wrong, a package is missing, the network cannot be exported so, or the file does not
            compute what the network does. Then nothing is left behind.
    """
    parser = argparse.ArgumentParser(
        prog="python -m slimconv_lit export",
        description="Write a checkpoint's network to a file for other runtimes, and check the file against it.",
        allow_abbrev=False,
    )
    parser.add_argument("--ckpt_path", required=True, help="a file, or `last` or `best` for that of the newest run")
    parser.add_argument("--format", default="onnx", help=f"{', '.join(FORMATS)} (default: onnx)")
    parser.add_argument("--precision", default="float32", help="float32, bf16 or int8 (default: float32)")
    parser.add_argument("--calibration", help="folder of images that int8 is set by (default: validation images)")
    parser.add_argument("--images", type=int, default=128, help="images that int8 is set by (default: 128)")
    parser.add_argument("--input_size", type=int, nargs="+", help="side of the image, or height and width, in pixels")
    parser.add_argument("--fixed_size", action="store_true", help="take images of this size alone, in any number")
    parser.add_argument("--output", type=Path, help="the file (default: in a new run folder)")
    own, rest = parser.parse_known_args(argv)
    form = _check(own)
    check_checkpoint(own.ckpt_path)
    data = ["--data", own.calibration] if own.calibration else []
    cli = open_checkpoint("export", [f"--ckpt_path={own.ckpt_path}", *data, *rest])
    assert cli.run_folder
    path = None
    try:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            path = _Export(cli, form, own).write()
    finally:
        if own.output or not path:
            shutil.rmtree(cli.run_folder.path)
    return path


def check_checkpoint(which: str) -> None:
    """Sees that a file, if `which` is one, is a checkpoint that this package wrote.

    Raises:
        UsageError: If it is something else.
    """
    if not os.path.isfile(which):
        return
    try:
        carried = checkpoint_config(Path(which))
    except ValueError as error:
        raise UsageError(_line(error, 200)) from error
    if missing := {"model", "data"} - carried.keys():
        raise UsageError(f"{which} is not a checkpoint of `fit`: it does not tell its {' and '.join(sorted(missing))}")


class Mismatch(Exception):
    """A file computes something else than the network; the message says where."""


def _check(own: argparse.Namespace) -> Format:
    for option, known in (("format", list(FORMATS)), ("precision", ["float32", "bf16", "int8"])):
        if (value := getattr(own, option)) not in known:
            raise UsageError(f"--{option}: there is no {value!r}; {closest(value, known)}")
    form = FORMATS[own.format]
    if own.precision not in form.precisions:
        others = " and ".join(name for name, other in FORMATS.items() if own.precision in other.precisions)
        raise UsageError(f"--format {own.format} has no {own.precision}; {others} have")
    if own.calibration and own.precision != "int8":
        raise UsageError("--calibration is for --precision int8; nothing else is set by images")
    if own.input_size and (len(own.input_size) > 2 or min(own.input_size) < 1):
        raise UsageError("--input_size takes a side, or a height and a width, in pixels: --input_size 224 320")
    if own.output and own.output.suffix != form.suffix:
        raise UsageError(f"--output: a file of --format {own.format} ends in {form.suffix}, not {own.output.suffix!r}")
    if own.output and own.output.is_dir():
        raise UsageError(f"--output: {own.output} is a folder; name the file in it")
    form.check_packages(f"--format {own.format}")
    if own.output:
        # Known before the work rather than after it; the permission bits alone do not tell.
        with _writable(own.output.parent):
            pass
    return form


def _writable(folder: Path) -> tempfile.TemporaryDirectory[str]:
    if not folder.is_dir():
        raise UsageError(f"--output: there is no folder {str(folder)!r}")
    try:
        return tempfile.TemporaryDirectory(prefix=".export-", dir=folder)
    except OSError as error:
        raise UsageError(f"--output: cannot write into {str(folder)!r}: {error.strerror}") from error


class _Export:
    """What one call writes: in a folder of its own, from which the files move when all has been checked."""

    def __init__(self, cli: SlimCLI, form: Format, own: argparse.Namespace) -> None:
        assert cli.run_folder
        self.cli, self.form, self.own, self.task = cli, form, own, cli.model
        self.network: nn.Module = cli.model.model.cpu().eval()
        self.label = describe_network(self.task.hparams)
        channels, *size = cli.datamodule.input_size
        height, width = (own.input_size * 2)[:2] if own.input_size else size
        self.image = (channels, height, width)
        words = [self.label, *([own.precision] if own.precision != "float32" else [])]
        name = re.sub(r"[^\w.]+", "-", " ".join(words).replace("k=", "k"))
        self.path: Path = own.output or cli.run_folder.path / f"{name}{form.suffix}"
        self.is_detector = isinstance(self.task, DetectionTask)
        self.free_size = not own.fixed_size and not self.is_detector
        self.least_side: int | None = None
        self.checks: list[dict[str, object]] = []
        self.calibration: Any = self._calibration_images() if own.precision == "int8" else []

    def write(self) -> Path:
        """Writes, checks and moves the files, and says what was found."""
        with _writable(self.path.parent) as folder:
            draft = Path(folder) / self.path.name
            if self.is_detector:
                self._detector(draft)
            else:
                self._network(draft)
            parts = "the image's longer side (scores as they are)" if self.is_detector else "its largest output"
            print(f"against the network in torch, as parts of {parts}:\n{format_table(self.checks)}")
            if self.least_side:
                print(f"right for images with sides from {self.least_side} px on")
            scores = {} if self.own.precision == "float32" else self._scores(draft)
            size = sum(path.stat().st_size for path in draft.parent.iterdir())
            facts = self._facts() | {"least_side": self.least_side, "checks": self.checks} | scores
            draft.with_suffix(".json").write_text(json.dumps(facts, indent=2) + "\n")
            # The file that names the others comes last.
            for path in sorted(draft.parent.iterdir(), key=lambda path: path.suffix == self.form.suffix):
                path.replace(self.path.with_name(path.name))
        print(f"in {self.path} ({size / 1e6:.1f} MB), with {self.path.with_suffix('.json').name}")
        return self.path

    def _network(self, draft: Path) -> None:
        """For any size where that works, and else for this size alone; for any number of images in both."""
        if self.free_size:
            try:
                return self._try(draft)
            except UsageError:
                raise
            # What exporters and runtimes raise has no class in common.
            except Exception as error:
                print(f"for images of {_shown(self.image[1:])} alone, as other sizes failed: {_line(error)}")
                self.free_size, self.least_side = False, None
        try:
            self._try(draft)
        except UsageError:
            raise
        except Exception as error:
            raise UsageError(f"--format {self.own.format}, nothing is written: {_line(error, 500)}") from error

    def _try(self, draft: Path) -> None:
        for path in draft.parent.iterdir():
            path.unlink()
        reference, narrow = self.network, self.own.precision != "float32"
        traced = torch.randn(_traced(self.image, self.free_size))
        network = self._fused(traced)
        if narrow and self.form.suffix == ".pt2":
            network = reference = formats.Narrow(network).eval()
        with tqdm(total=5 if narrow else 3, desc="tracing", unit="step", leave=False, disable=None) as bar:

            def step(then: str) -> None:
                bar.update()
                bar.set_description(then)

            program = formats.trace(network, traced, self.free_size)
            step("writing")
            if self.form.suffix == ".pt2":
                write = formats.write_aoti if self.own.format == "aoti" else formats.write_program
                write(program, draft, self._facts())
                step("checking")
                self._check(reference, self.form.open(draft), TOLERANCE_BF16 if narrow else TOLERANCE)
                bar.update()
                return
            path = draft.with_suffix(".onnx")
            formats.write_onnx(program, path, self._facts())
            if narrow:
                # Before it is rounded, for what is then left of the outputs says little about whether a file is right.
                step("checking")
                self._check(reference, formats.open_onnx(path), TOLERANCE)
                step("rounding")
                if self.own.precision == "bf16":
                    formats.halve_weights(path)
                else:
                    formats.quantise(path, self._calibration())
            if path != draft:
                formats.write_openvino(path, draft, self._facts())
                path.unlink()
            step("checking")
            self._check(reference, self.form.open(draft), None if narrow else TOLERANCE)

    def _fused(self, images: Tensor) -> nn.Module:
        """The network behind `fuse`: exporters fold norms too, but leave gates convolutions, or fold nothing."""
        network = deepcopy(self.network)
        try:
            fuse(network, images)
        except ValueError as error:
            print(f"norms and gates are left as they are: {_line(error)}")
        return network

    def _calibration_images(self) -> Any:
        """The data set of the images that int8 is set by."""
        data, folder = self.cli.datamodule, self.own.calibration is not None
        data.prepare_data()
        data.setup("predict" if folder else "validate")
        return data.predict_dataset() if folder else data.dataset("val")

    def _calibration(self) -> Iterator[Tensor]:
        """Images that int8 is set by, one at a time, in an order drawn from a seed."""
        order = torch.randperm(len(self.calibration))[: self.own.images].tolist()
        for index in tqdm(order, desc="calibrating", unit="image", leave=False, disable=None):
            yield self._of_size(self.cli.datamodule.collate([self.calibration[index]])[0])

    def _of_size(self, images: Tensor) -> Tensor:
        if not self.free_size and tuple(images.shape[1:]) != self.image:
            raise UsageError(
                f"the file takes images of {_shown(self.image[1:])} alone, and one of the data is of "
                f"{_shown(images.shape[2:])}; name that with --input_size, or leave --fixed_size out"
            )
        return images

    def _check(self, reference: nn.Module, run: Runner, tolerance: float | None) -> None:
        self.checks, least = check(reference, run, self.image, self.free_size, tolerance)
        self.least_side = least or self.least_side

    def _detector(self, draft: Path) -> None:
        """One image of one size, in float32.

        Raises:
            UsageError: If more is asked for, or the file does not find what the detector finds.
        """
        if self.form.suffix == ".pt2" or self.own.precision != "float32":
            raise UsageError("a detector is exported in float32, to onnx or openvino: torch.export cannot follow boxes")
        if not self.own.input_size:
            raise UsageError(
                "how many boxes a detector has depends on values, so its file is right for the size it was traced at "
                f"alone; name it: --input_size {self.image[1]} {self.image[2]}, and resize images to it"
            )
        shape = (1, *self.image)
        path = draft.with_suffix(".onnx")
        with tqdm(total=2, desc="writing", unit="step", leave=False, disable=None) as bar:
            formats.write_detector(self.network, torch.rand(shape), path, self._facts())
            if path != draft:
                formats.write_openvino(path, draft, self._facts())
                path.unlink()
            bar.update()
            bar.set_description("checking")
            run = self.form.open(draft)
            for image in self._pictures(shape[2:]):
                with torch.no_grad():
                    (expected,) = self.network([image[0]])
                self.checks.append(compare_detections(expected, run(image), shape[2:]))
            bar.update()
        try:
            run(torch.rand(1, shape[1], shape[2] + 32, shape[3]))
        # Each runtime has an error of its own for it.
        except Exception:
            return
        raise UsageError("nothing is written: the file takes images of other sizes, for which it would be wrong")

    def _pictures(self, size: Sequence[int], count: int = 3) -> list[Tensor]:
        """Test images, resized; noise where there are none."""
        data = self.cli.datamodule
        try:
            data.prepare_data()
            data.setup("test")
        except FileNotFoundError:
            return [torch.rand(1, self.image[0], *size) for _ in range(count)]
        dataset: Any = data.dataset("test")
        images = [dataset[index][0] for index in range(min(count, len(dataset)))]
        return [functional.interpolate(image[None], tuple(size), mode="bilinear") for image in images]

    def _scores(self, draft: Path) -> dict[str, Any]:
        """The test metric of the network in float32 and of the file; empty where there are no test images."""
        metric = f"test/{self.task.monitor.partition('/')[2]}"
        try:
            plain = self._score(self.network, metric)
            narrow = self._score(_Exported(self.form.open(draft), self), metric)
        except FileNotFoundError as error:
            print(f"accuracy not measured: {_line(error)}")
            return {}
        precision = self.own.precision
        print(f"{metric}: float32 {plain:.2%}, {precision} {narrow:.2%} ({100 * (narrow - plain):+.2f})")
        return {"metric": metric, "float32": plain, precision: narrow}

    def _score(self, network: nn.Module, metric: str) -> float:
        self.task.model = network
        results = self.cli.trainer.test(self.task, self.cli.datamodule, verbose=False)
        return next(float(scores[metric]) for scores in results if metric in scores)

    def _facts(self) -> dict[str, Any]:
        """What whoever runs the file has to know, as plain values."""
        data, hparams = self.cli.datamodule, self.task.hparams
        channels, height, width = self.image
        free = ["height", "width"] if self.free_size else []
        packages = ("torch", "torchvision", *self.form.packages)
        outputs = "labels of pixels, (B, classes, H, W)" if isinstance(self.task, SegmentationTask) else "(B, classes)"
        return {
            "network": self.label,
            "task": type(self.task).__name__,
            "checkpoint": str(self.cli.config["predict"]["ckpt_path"]),
            "precision": self.own.precision,
            "images": f"{formats.IMAGES}: (B, {channels}, H, W), float32, (pixels - mean) / std of pixels from 0 to 1",
            "outputs": "boxes (n, 4), labels (n,) from 1, scores (n,)" if self.is_detector else f"logits of {outputs}",
            "input_size": [channels, height, width],
            "free_axes": [] if self.is_detector else ["batch", *free],
            "mean": list(data.mean),
            "std": list(data.std),
            "preparation": " ".join(str(data.eval_transform).split()),
            "class_names": list(self.task.class_names),
            "backbone": hparams["backbone"],
            "operator": hparams["operator"],
            "versions": {name: importlib.metadata.version(name) for name in packages},
        }


class _Exported(nn.Module):
    """A file in the place of the network, so that the task's own test can judge it."""

    def __init__(self, run: Runner, by: _Export) -> None:
        super().__init__()
        self.run, self.of_size = run, by._of_size

    def forward(self, images: Tensor) -> Tensor:
        return self.run(self.of_size(images).float().cpu())[0].to(images.device)


def check(
    reference: nn.Module, run: Runner, image: tuple[int, int, int], free_size: bool, tolerance: float | None
) -> tuple[list[dict[str, object]], int | None]:
    """Compares a file with the network at the traced size and others, and looks for the least size.

    Args:
        reference: The network, in evaluation mode.
        run: The file.
        image: (C, H, W) of the data.
        free_size: Whether images may have other sizes.
        tolerance: Largest difference, as a part of the largest output; None judges nothing and looks for no size.

    Returns:
        A row for each shape that was tried, and the least side in pixels from which on file and network agree.

    Raises:
        Mismatch: If the file differs by more.
    """
    channels, height, width = image
    shapes = list(dict.fromkeys([_traced(image, free_size), *((batch, *image) for batch in BATCHES)]))
    if free_size:
        shapes += [(1, channels, height + down, width + right) for down, right in OTHER_SIZES]
    rows = []
    for shape in shapes:
        found = _difference(reference, run, shape, tolerance)
        if found is None:
            continue
        difference, accepted = found
        rows.append({"images": _shown(shape), "largest difference": difference})
        if tolerance:
            rows[-1]["accepted"] = accepted
        # Also where it is not a number.
        if tolerance and not difference <= accepted:
            where = f"the file differs from the network by {difference:.2g} of its largest output"
            raise Mismatch(f"{where}, for images {_shown(shape)}; {accepted:.2g} would do")
    if not tolerance or not free_size:
        return rows, None

    def agrees(side: int) -> bool:
        try:
            found = _difference(reference, run, (1, channels, side, side), tolerance)
        # Each runtime has an error of its own for images that are too small.
        except Exception:
            return False
        return found is not None and found[0] <= found[1]

    # With small images a network may go another way, which a program does not follow that was traced with large ones.
    return rows, 1 + bisect.bisect_left(range(1, min(height, width)), True, key=agrees)


def _traced(image: tuple[int, int, int], free_size: bool) -> tuple[int, int, int, int]:
    channels, height, width = image
    least = TRACED_SIDE if free_size else 1
    return TRACED_BATCH, channels, max(height, least), max(width, least)


def _shown(sizes: Sequence[int]) -> str:
    return "x".join(map(str, sizes))


def _difference(
    reference: nn.Module, run: Runner, shape: Sequence[int], tolerance: float | None
) -> tuple[float, float] | None:
    """The largest difference on noise of this shape, as a part of the largest output, and the one that is accepted.

    A network with a hard gate (SCConv's) jumps where rounding puts a value on the other side of it. So what is accepted
    is at least what the network itself makes of a change of its images by 1e-5.

    Returns:
        None if the network itself does not take images of this shape.

    Raises:
        Mismatch: If the outputs have other shapes.
    """
    images = torch.randn(tuple(shape))
    with torch.no_grad():
        try:
            expected = reference(images)
        except (RuntimeError, ValueError):
            return None
        moved = [reference(images * (1 + 1e-5 * torch.randn_like(images))) for _ in range(3 if tolerance else 0)]
    largest = expected.abs().max()
    (actual,) = run(images)
    if actual.shape != expected.shape:
        raise Mismatch(f"the file gives {tuple(actual.shape)} and the network {tuple(expected.shape)}")
    jumps = max((float((other - expected).abs().max() / largest) for other in moved), default=0.0)
    return float((actual - expected).abs().max() / largest), max(tolerance or 0.0, min(jumps, MOST))


def compare_detections(expected: dict[str, Tensor], found: Sequence[Tensor], size: Sequence[int]) -> dict[str, object]:
    """How far each detection is from the nearest of the same class on the other side; both ways."""
    boxes, labels, scores = found
    far = torch.cdist(expected["boxes"], boxes, p=torch.inf) / max(size)
    far = far.maximum((expected["scores"][:, None] - scores).abs())
    far = far.masked_fill(expected["labels"][:, None] != labels, torch.inf)
    # Beside them a stand-in that is infinitely far, for where one side has none.
    nearest = torch.cat([functional.pad(far, (0, 1, 0, 1), value=torch.inf).amin(dim)[:-1] for dim in (0, 1)])
    matched = nearest[nearest <= TOLERANCE_BOXES]
    others = 1 - len(matched) / len(nearest) if len(nearest) else 0.0
    if others > OTHERS:
        raise UsageError(
            f"nothing is written: the file finds {len(boxes)} objects and the detector {len(expected['boxes'])}, and "
            f"{others:.0%} of them differ"
        )
    largest = float(matched.max()) if len(matched) else 0.0
    return {"objects": len(expected["boxes"]), "largest difference": largest, "others": others}


def _line(error: Exception, most: int = 200) -> str:
    """An error's message in one line."""
    return " ".join(str(error).split())[:most]
