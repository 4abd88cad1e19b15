"""From a checkpoint and images to pictures of what the network does: where it looks, its gates, maps, redundancy."""

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor
from tqdm import tqdm  # type: ignore[import-untyped]

from slimconv_lit.analysis.cam import draw_cams, grad_cam
from slimconv_lit.analysis.gates import draw_gates, gate_activations
from slimconv_lit.analysis.maps import draw_maps, maps_of
from slimconv_lit.analysis.redundancy import draw_redundancy, reads_map, redundancy, redundancy_rows, spatial_layers
from slimconv_lit.checks import at_least
from slimconv_lit.lightning_cli import SlimCLI, open_checkpoint
from slimconv_lit.lookup import closest
from slimconv_lit.ops import SlimConv2d
from slimconv_lit.tables import format_table
from slimconv_lit.tasks import ClassificationTask
from slimconv_lit.usage import UsageError


def explain(argv: Sequence[str]) -> Path:
    """Runs `explain --ckpt_path C [--data FOLDER] [--images N] [--shown N] [--layer NAME]`; returns the folder.

    Raises:
        UsageError: If an option is wrong, the checkpoint is a detector's, or its network has nothing to look at.
    """
    parser = argparse.ArgumentParser(
        prog="python -m slimconv_lit explain",
        description="Pictures of what a network does with images: Grad-CAM, gates, feature maps, redundancy.",
        allow_abbrev=False,
    )
    parser.add_argument("--ckpt_path", required=True, help="a file, or `last` or `best` for that of the newest run")
    parser.add_argument("--data", help="a folder of images (default: the test images of the checkpoint's data)")
    parser.add_argument("--images", type=int, default=64, help="images that gates and redundancy average (default: 64)")
    parser.add_argument("--shown", type=int, default=6, help="images that Grad-CAM draws (default: 6)")
    parser.add_argument("--layer", help="the layer whose maps are drawn (default: the first operator)")
    own, rest = parser.parse_known_args(argv)
    try:
        at_least(1, images=own.images, shown=own.shown)
    except ValueError as error:
        raise UsageError(f"explain: --{error}") from error
    data = ["--data", own.data] if own.data else []
    cli = open_checkpoint("explain", [f"--ckpt_path={own.ckpt_path}", *data, *rest])
    with torch.random.fork_rng():
        return _Explanation(cli, own.images, own.shown, own.layer, own.data is not None).write()


class _Explanation:
    """What one call looks at."""

    def __init__(self, cli: SlimCLI, images: int, shown: int, layer: str | None, own_images: bool) -> None:
        assert cli.run_folder
        self.folder = cli.run_folder.path
        self.task, self.shown = cli.model, shown
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.network = cli.model.model.to(self.device).eval()
        self.batches = list(_first(cli.datamodule, images, own_images))
        if not isinstance(self.batches[0][0], Tensor):
            raise UsageError("explain looks at classifiers and segmentation networks; this checkpoint is a detector's")
        layers = spatial_layers(self.network)
        if not any(map(reads_map, layers.values())):
            raise UsageError(
                "explain looks at operators and convolutions that read feature maps; this network has none"
            )
        slim = [name for name, module in layers.items() if isinstance(module, SlimConv2d)]
        self.layer = layer or [*slim, *layers][0]
        if self.layer not in layers:
            raise UsageError(f"--layer: there is no {self.layer!r}; {closest(self.layer, layers)}")
        self.has_gates = bool(slim)

    def write(self) -> Path:
        """Draws all that this network has something to show for."""
        (self.folder / "pictures").mkdir(parents=True, exist_ok=True)
        (image,), caption = self.batches[0][0][:1], self._captions(self.batches[0])[0]
        maps = maps_of(self.network, self.layer, image[None].to(self.device))
        self._save(draw_maps(maps, f"{self.layer}, {caption}"), "maps")
        layers = redundancy(self.network, (images for images, _ in self._progress("redundancy")))
        (self.folder / "redundancy.csv").write_text(format_table(redundancy_rows(layers), "csv") + "\n")
        self._save(draw_redundancy(layers), "redundancy")
        classifier = isinstance(self.task, ClassificationTask)
        if self.has_gates:
            names = self.task.class_names if classifier else ["all"]
            found = gate_activations(self.network, self._labelled(classifier), len(names))
            self._save(draw_gates(found, names), "gates")
        if classifier:
            self._save(self._cams(), "cam")
        return self.folder

    def _cams(self) -> Figure:
        images = torch.cat([batch[0] for batch in self.batches])[: self.shown].to(self.device)
        captions = [caption for batch in self.batches for caption in self._captions(batch)][: self.shown]
        with torch.no_grad():
            sure, labels = self.network(images).softmax(dim=1).max(dim=1)
        # Which class it is that the network was looking for.
        names = [self.task.class_names[label] for label in labels.tolist()]
        told = [f"{c}\nseen as {name}, {p:.0%}" for c, name, p in zip(captions, names, sure.tolist(), strict=True)]
        return draw_cams(self.task.pixels(images).cpu(), {"Grad-CAM": grad_cam(self.network, images)}, told)

    def _captions(self, batch: Sequence[Any]) -> list[str]:
        if isinstance(batch[1], Tensor):
            labels = batch[1].tolist() if batch[1].ndim == 1 else []
            return [self.task.class_names[label] for label in labels] or [f"image {i}" for i in range(len(batch[0]))]
        return [Path(name).name for name in batch[1]]

    def _labelled(self, classifier: bool) -> Iterator[tuple[Tensor, Tensor | None]]:
        for images, targets in self._progress("gates"):
            yield images, targets if classifier and isinstance(targets, Tensor) else None

    def _progress(self, what: str) -> Iterator[tuple[Tensor, Any]]:
        for images, targets, *_ in tqdm(self.batches, desc=what, unit="batch", leave=False, delay=1, disable=None):
            yield images.to(self.device), targets

    def _save(self, figure: Figure, name: str) -> None:
        figure.savefig(self.folder / "pictures" / f"{name}.png")


def _first(data: Any, images: int, own_images: bool) -> Iterator[Any]:
    """The batches with the first `images` images: those of a folder, else test images in an order drawn from a seed."""
    data.prepare_data()
    data.setup("predict" if own_images else "test")
    dataset = data.predict_dataset() if own_images else data.dataset("test")
    order = range(len(dataset)) if own_images else torch.randperm(len(dataset)).tolist()
    chosen = list(order)[:images]
    for start in range(0, len(chosen), data.eval_batch_size):
        yield data.collate([dataset[i] for i in chosen[start : start + data.eval_batch_size]])
