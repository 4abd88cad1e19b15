"""What the gates of a network's SlimConv2d give to the channels, class by class and depth by depth (paper, Fig. 9)."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from slimconv_lit.ops import SlimConv2d

# More lines than this in one panel cannot be told apart.
MOST_CLASSES = 5


@dataclass(frozen=True)
class GateActivations:
    """The weights w of one SlimConv2d, averaged over images.

    Attributes:
        name: The operator's name in the network.
        mean: (classes, C): the mean over the images of a class, NaN where it has none.
        overall: (C,): the mean over all images.
        spread: (C,): the standard deviation over all images; near zero where the gate ignores its input.
    """

    name: str
    mean: Tensor
    overall: Tensor
    spread: Tensor


def gate_activations(
    model: nn.Module, batches: Iterable[tuple[Tensor, Tensor | None]], num_classes: int
) -> list[GateActivations]:
    """Runs the images through `model` and averages what each of its gates says, in the order of the network.

    Args:
        model: A network with SlimConv2d in it, in evaluation mode, on the device of the images.
        batches: (images (B, C, H, W), labels (B,)); None for labels puts all images into class 0.
        num_classes: How many classes there are.

    Raises:
        ValueError: If the network has no SlimConv2d, or there is no image.
    """
    gates = {name: m.gate for name, m in model.named_modules() if isinstance(m, SlimConv2d)}
    if not gates:
        raise ValueError("gates: the network has no SlimConv2d; train it with --model.operator=SlimConv2d")
    sums: dict[str, Tensor] = {}
    squares: dict[str, Tensor] = {}
    counts = torch.zeros(num_classes, dtype=torch.float64)
    labels = torch.zeros(0, dtype=torch.long)

    def record(name: str, w: Tensor) -> None:
        w = w.detach().flatten(1).cpu().double()
        total = sums.setdefault(name, w.new_zeros(num_classes, w.shape[1]))
        total.index_add_(0, labels, w)
        squares[name] = squares.get(name, 0) + w.square().sum(0)

    hooks = [gate.register_forward_hook(lambda _, __, w, name=name: record(name, w)) for name, gate in gates.items()]
    try:
        with torch.no_grad():
            for images, given in batches:
                labels = torch.zeros(len(images), dtype=torch.long) if given is None else given.cpu()
                counts += torch.bincount(labels, minlength=num_classes)
                model(images)
    finally:
        for hook in hooks:
            hook.remove()
    seen = counts.sum()
    if not seen:
        raise ValueError("gates: there is no image to look at")
    found = []
    for name in sums:
        overall = sums[name].sum(0) / seen
        spread = (squares[name] / seen - overall.square()).clamp(min=0).sqrt()
        found.append(GateActivations(name, sums[name] / counts[:, None], overall, spread))
    return found


def draw_gates(gates: Sequence[GateActivations], class_names: Sequence[str], depths: int = 4) -> Figure:
    """Rows go deeper into the network; on the left w as the top path takes it, on the right flipped.

    Args:
        gates: From `gate_activations`.
        class_names: Names of the rows of `GateActivations.mean`; of those with images the first five are drawn.
        depths: How many of the operators are drawn, spread evenly.
    """
    chosen = [gates[round(i)] for i in torch.linspace(0, len(gates) - 1, min(depths, len(gates))).tolist()]
    drawn = [i for i in range(len(class_names)) if not gates[0].mean[i].isnan().any()][:MOST_CLASSES]
    figure = Figure(figsize=(11, 0.8 + 1.9 * len(chosen)), layout="constrained", dpi=110)
    rows = figure.subplots(len(chosen), 2, squeeze=False, sharey=True)
    for gate, panels in zip(chosen, rows, strict=True):
        for axes, flipped in zip(panels, (False, True), strict=True):
            turn = (0,) if flipped else ()
            for i in drawn if len(drawn) > 1 else []:
                axes.plot(gate.mean[i].flip(turn), linewidth=0.9, label=class_names[i])
            axes.plot(gate.overall.flip(turn), color="black", linewidth=1.5, label="all images")
            axes.set_title(f"{gate.name}: {'flipped w' if flipped else 'w'}", fontsize=9)
            axes.set_xlim(0, len(gate.overall) - 1)
            axes.grid(alpha=0.3)
        panels[0].set_ylabel("mean weight")
    for axes in rows[-1]:
        axes.set_xlabel("channel")
    handles, labels = rows[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=len(labels), frameon=False, fontsize=9)
    return figure
