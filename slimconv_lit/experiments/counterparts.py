"""A network and its plain counterparts: what `benchmark` sets side by side."""

import inspect
import re
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
from torch import nn

from slimconv_lit.analysis.complexity import macs
from slimconv_lit.backbones import create_backbone
from slimconv_lit.backbones.presets import PRESETS
from slimconv_lit.backbones.registry import made_for
from slimconv_lit.callbacks.run_folder import new_run_folder
from slimconv_lit.experiments.export import check_checkpoint
from slimconv_lit.heads import WithoutProposals, deeplab_v3plus, faster_rcnn
from slimconv_lit.lightning_cli import open_checkpoint
from slimconv_lit.ops import OperatorLike, SlimConv2d, describe_operator, operator_classes
from slimconv_lit.results import describe_network
from slimconv_lit.surgery.plan import plans_of
from slimconv_lit.tasks import DetectionTask, SegmentationTask
from slimconv_lit.usage import UsageError

# What SlimConv's tables have: Pascal VOC's classes, and a photo as its detector resizes it.
_DENSE: dict[str, tuple[int, tuple[int, int]]] = {"deeplab_v3plus": (21, (513, 513)), "faster_rcnn": (20, (600, 800))}


@dataclass(frozen=True)
class Networks:
    """What is compared.

    Attributes:
        networks: By what the table calls them; the first is the plain one.
        kind: What stands on the backbone: "classifier", or a head as `benchmark --head` calls it.
        size: (C, H, W) of an image.
        classes: How many there are.
        macs: Multiply-accumulates of each for one image.
    """

    networks: Mapping[str, nn.Module]
    kind: str
    size: tuple[int, int, int]
    classes: int
    macs: Mapping[str, int]

    @property
    def is_detector(self) -> bool:
        """Whether it takes a list of images."""
        return self.kind.startswith("faster_rcnn")


def counterparts(own: Any) -> tuple[Networks, Path]:
    """The networks to compare, and a folder for what comes of it.

    Args:
        own: The command line of `benchmark`.

    Raises:
        UsageError: If nothing is said to compare with, or `k` of an operator that has none.
        ValueError: If a network or operator cannot be built, as `create_backbone`.
    """
    operators: list[OperatorLike] = [] if own.operator is None else [own.operator]
    if own.k:
        described = describe_operator(own.operator or SlimConv2d)
        if not described["class_path"].endswith(".SlimConv2d"):
            raise UsageError("--k is SlimConv2d's; other operators take theirs as --operator.NAME=VALUE")
        operators = [described | {"init_args": described["init_args"] | {"k": k}} for k in own.k]
    variants = {_label(operator): operator for operator in operators}
    if own.network in ("last", "best") or own.network.endswith(".ckpt"):
        return _from_checkpoint(own, variants)
    plain, preset = own.network, PRESETS.get(own.network)
    if preset:
        plain = preset.backbone
    if not variants and not preset:
        variants[_label(SlimConv2d)] = SlimConv2d
    side, classes = made_for(plain)
    size = (side, side)
    if own.head != "classifier":
        classes, size = _DENSE["deeplab_v3plus" if own.head == "deeplab_v3plus" else "faster_rcnn"]
    height, width = (own.input_size * 2)[:2] or size
    built = {"plain": _build(own.head, plain, None, classes, height)}
    if preset:
        built[own.network] = _build(own.head, own.network, None, classes, height)
    built |= {label: _build(own.head, plain, op, classes, height) for label, op in variants.items()}
    counts = {label: macs(_counted(network), (3, height, width)) for label, network in built.items()}
    folder = Path(own.output or new_run_folder(Path(own.run_root), re.sub(r"\W+", "-", own.network), "benchmark"))
    return Networks(built, own.head, (3, height, width), classes, counts), folder


def _label(operator: OperatorLike) -> str:
    """An operator in a few words: its class, k, and what else is not as by default."""
    described = describe_operator(operator)
    cls = operator_classes()[described["class_path"]]
    name = cls.__name__
    defaults = {key: p.default for key, p in inspect.signature(cls).parameters.items()}
    given = ({"k": defaults["k"]} if "k" in defaults else {}) | described["init_args"]
    words = [name]
    for key, value in given.items():
        if key == "k" or value != defaults.get(key):
            words.append(f"{key}={Fraction(value).limit_denominator(99) if isinstance(value, float) else value}")
    return " ".join(words)


def _build(head: str, name: str, operator: Any, classes: int, side: int) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        if head == "classifier":
            return create_backbone(name, operator, classes)
        if head == "deeplab_v3plus":
            return deeplab_v3plus(name, operator, classes)
        form: Any = head.removeprefix("faster_rcnn_")
        # The image is not resized, and a test looks at as many regions whatever the weights.
        return faster_rcnn(name, operator, classes, form, min_size=side, max_size=None)


def _counted(network: nn.Module) -> nn.Module:
    return WithoutProposals(network) if hasattr(network, "roi_heads") else network


def _from_checkpoint(own: Any, variants: Mapping[str, OperatorLike]) -> tuple[Networks, Path]:
    """The checkpoint's network and its counterpart: the same task without operator and before pruning."""
    options = [f"--run_root={own.run_root}", *([f"--name={own.name}"] if own.name else [])]
    check_checkpoint(own.network)
    cli = open_checkpoint("benchmark", [f"--ckpt_path={own.network}", *options])
    assert cli.run_folder
    folder = cli.run_folder.path
    if own.output:
        folder.rmdir()
        folder = Path(own.output)
    task = cli.model
    hparams = {key: value for key, value in task.hparams.items() if not key.startswith("_")}
    preset = PRESETS.get(hparams["backbone"])
    plain = hparams | {"operator": None, "backbone": preset.backbone if preset else hparams["backbone"]}
    tasks = {"plain": type(task)(**plain)}
    pruned = bool(plans_of(task.model))
    if hparams["operator"] or preset or pruned:
        tasks[describe_network(hparams) + (", pruned" if pruned else "")] = task
    elif not variants:
        raise UsageError(f"{own.network} holds a plain network; say what to compare it with: --operator=SlimConv2d")
    tasks |= {label: type(task)(**plain | {"operator": operator}) for label, operator in variants.items()}
    channels, *sides = cli.datamodule.input_size
    height, width = (own.input_size * 2)[:2] or sides
    size = (channels, height, width)
    counts = {label: macs(*one.counted(size)) for label, one in tasks.items()}
    kind = "classifier"
    if isinstance(task, (SegmentationTask, DetectionTask)):
        kind = "deeplab_v3plus" if isinstance(task, SegmentationTask) else f"faster_rcnn_{hparams['form']}"
    networks = {label: one.model for label, one in tasks.items()}
    return Networks(networks, kind, size, hparams["num_classes"], counts), folder
