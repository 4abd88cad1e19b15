"""A network against its plain counterpart on the clock: latency, throughput and memory, in turn, in one process."""

import itertools
import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from copy import deepcopy
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, cast

import torch
import torch._inductor.config
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn import functional
from tqdm import tqdm  # type: ignore[import-untyped]

from slimconv_lit.analysis.latency import (
    Spread,
    interleaved,
    machine,
    peak_memory,
    ratios,
    resident_memory,
    spread,
    tune_gpu,
)
from slimconv_lit.errors import explain
from slimconv_lit.experiments import formats
from slimconv_lit.experiments.counterparts import Networks, counterparts
from slimconv_lit.experiments.formats import FORMATS
from slimconv_lit.memory import keep_memory
from slimconv_lit.ops import OperatorFactory
from slimconv_lit.ops.reconstruct import Kernel, use_kernel
from slimconv_lit.surgery import fuse
from slimconv_lit.tables import format_table
from slimconv_lit.usage import RaisingParser, UsageError

Backend = Literal["eager", "compile", "aoti", "onnxruntime", "openvino"]
Precision = Literal["float32", "tf32", "bf16", "int8"]
Layout = Literal["channels_last", "contiguous"]
Head = Literal["classifier", "deeplab_v3plus", "faster_rcnn_fpn", "faster_rcnn_c4"]

# Those that run a file, by its format.
_RUNTIMES = {"aoti": "aoti", "onnxruntime": "onnx", "openvino": "openvino"}
_COLOURS = {
    "eager": "#2a78b8",
    "compile": "#d9822b",
    "aoti": "#7d5fb2",
    "onnxruntime": "#3a9d5d",
    "openvino": "#b8486c",
}
_MARKERS = "os^Dv<>P"
# Ten times what `export` accepts: weights that are not trained make more of roundings.
_MOST = 1e-3


@dataclass(frozen=True)
class Setting:
    """How the networks are run.

    Attributes:
        backend: What runs them.
        precision: bf16 is autocast in torch, and OpenVINO's own; int8 is set by noise, which is enough to time it.
        layout: Memory format of images and weights; "own" where the runtime chooses.
        batch: Images in one pass.
        threads: On the CPU.
        kernel: What folds SlimConv's maps, see `use_kernel`.
    """

    backend: str
    precision: str
    layout: str
    batch: int
    threads: int
    kernel: str


def benchmark(argv: Sequence[str]) -> Path:
    """Runs `benchmark NETWORK [--operator O] [--k K ...] ...`; returns the folder with table, picture and figures.

    Raises:
        UsageError: If the command line is wrong, a package is missing, or nothing of what is asked for can be run.
    """
    parser = _parser()
    try:
        own = parser.instantiate(parser.parse_args(list(argv)))
    except (UsageError, ValueError) as error:
        raise UsageError(explain(str(error), list(parser.get_defaults().keys()), argv)) from error
    if own.output and not Path(own.output).is_dir():
        raise UsageError(f"--output: there is no folder {own.output!r}")
    if own.fuse and own.train:
        raise UsageError("--fuse is for inference: a fused network has no norms to train")
    if own.rounds < 2:
        raise UsageError(f"--rounds={own.rounds}: at least 2, for a spread")
    settings = _settings(own)
    for name in dict.fromkeys(setting.backend for setting in settings if setting.backend in _RUNTIMES):
        FORMATS[_RUNTIMES[name]].check_packages(f"--backend {name}")
    try:
        compared, folder = counterparts(own)
    except (ValueError, TypeError) as error:
        raise UsageError(str(error)) from error
    kept = [setting for setting in settings if not _told(_refusal(setting, compared, own.train, own.device))]
    if not kept:
        raise UsageError("benchmark: nothing of what was asked for can be run; see above")
    threads = torch.get_num_threads()
    # Else the time that the system takes to hand out memory is measured too, and it comes and goes.
    keep_memory()
    try:
        with torch.random.fork_rng(), tempfile.TemporaryDirectory() as drafts:
            rows = _Benchmark(compared, own, Path(drafts)).measure(kept)
            kept = [setting for setting in kept if any(vars(setting).items() <= row.items() for row in rows)]
            if not rows:
                raise UsageError("benchmark: nothing of what was asked for could be run; see above")
    finally:
        torch.set_num_threads(threads)
    try:
        return _write(rows, kept, compared, own, folder)
    except OSError as error:
        raise UsageError(f"--output: cannot write into {str(folder)!r}: {error.strerror}") from error


def _parser() -> RaisingParser:
    parser = RaisingParser(
        prog="python -m slimconv_lit benchmark",
        description="Time a network against its plain counterpart: in turn, in one process, with spread.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("network", type=str, help="a name from `models`, a checkpoint, or `last` or `best` for that of the newest run")
    add("--operator", type=OperatorFactory | None, help="what is compared with plain (default: SlimConv2d)")
    add("--k", type=str, nargs="+", default=[], help="compressions of SlimConv2d: --k 4/3 8/3")
    add("--head", type=Head, default="classifier", help="what stands on the backbone")
    add("--input_size", type=int, nargs="+", default=[], help="side of an image, or height and width, in pixels")
    add("--backend", type=Backend, nargs="+", default=["eager"], help="what runs the networks")
    add("--precision", type=Precision, nargs="+", default=["float32"], help="what they are run in")
    add("--memory_format", type=Layout, nargs="+", default=["channels_last"], help="of images and weights in torch")
    add("--batch", type=int, nargs="+", default=[1], help="images in a pass")
    add("--threads", type=int, nargs="+", default=[1], help="CPU threads")
    add("--kernel", type=Kernel, nargs="+", default=["torch"], help="what folds SlimConv's maps on a GPU")
    add("--device", type=str, default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda")
    add("--train", action="store_true", help="time training steps (loss, backward, SGD), not forward passes")
    add("--fuse", action="store_true", help="fold the norms of all networks into their convolutions first")
    add("--rounds", type=int, default=15, help="how often each is timed")
    add("--name", type=str | None, help="of the run that `last` or `best` is taken from")
    add("--run_root", type=str, default="runs", help="folder of all runs")
    add("--output", type=str | None, help="an existing folder to write into (default: a new run folder)")
    return parser


def _settings(own: Any) -> list[Setting]:
    combined = itertools.product(own.backend, own.precision, own.memory_format, own.batch, own.threads, own.kernel)
    # Runtimes choose their layout, so that asking for two of them is asking for one measurement.
    settings = (Setting(b, p, "own" if b in _RUNTIMES else f, n, t, k) for b, p, f, n, t, k in combined)
    return list(dict.fromkeys(settings))


def _refusal(setting: Setting, compared: Networks, train: bool, device: str) -> str | None:
    """Why a setting cannot be measured; None if it can."""
    backend, precision = setting.backend, setting.precision
    if backend in _RUNTIMES and (train or device != "cpu" or compared.is_detector):
        what = "training" if train else "a detector" if compared.is_detector else f"device {device}"
        return f"{backend} with {what}: it is for forward passes of classifiers and segmentation networks, on the CPU"
    if backend == "onnxruntime" and precision == "bf16":
        return "onnxruntime in bf16: it computes nothing in bfloat16 on a CPU"
    if precision not in ("float32", "tf32") and backend == "aoti":
        return f"aoti in {precision}: it is timed in float32 alone"
    if precision == "int8" and backend not in _RUNTIMES:
        return f"{backend} in int8: that is for onnxruntime and openvino"
    if precision == "tf32" and (device == "cpu" or backend in _RUNTIMES):
        return f"{backend} in tf32 on {device}: that is for CUDA"
    if setting.kernel == "triton" and (device == "cpu" or backend in _RUNTIMES):
        return f"{backend} with kernel triton on {device}: that is for torch on CUDA"
    return None


def _told(reason: str | None) -> bool:
    if reason:
        print(f"left out: {reason}")
    return bool(reason)


class _Benchmark:
    """One call's measurements.

    Args:
        compared: The networks.
        own: The command line.
        drafts: Where files for runtimes go.
    """

    def __init__(self, compared: Networks, own: Any, drafts: Path) -> None:
        self.compared, self.own, self.drafts = compared, own, drafts
        self.networks = {label: network.train(own.train) for label, network in compared.networks.items()}
        if own.fuse:
            for label, network in self.networks.items():
                try:
                    fuse(network.get_submodule("backbone") if compared.is_detector else network)
                except ValueError as error:
                    raise UsageError(f"--fuse: {label}: {error}") from error

    def measure(self, settings: Sequence[Setting]) -> list[dict[str, Any]]:
        """A row for each network in each setting."""
        rows = []
        for setting in tqdm(settings, desc="measuring", unit="setting", leave=False, disable=None):
            torch.set_num_threads(setting.threads)
            torch.manual_seed(0)
            runs, memory = {}, {}
            try:
                with use_kernel(cast(Kernel, setting.kernel)):
                    for label in self.networks:
                        runs[label], memory[label] = self._prepare(label, setting)
                    times = interleaved(runs, self.own.rounds, device=self.own.device)
            # What compilers and runtimes raise has no class in common, and the other settings are worth having.
            except Exception as error:
                _told(f"{' '.join(map(str, vars(setting).values()))}: {' '.join(str(error).split())[:300]}")
                continue
            against = ratios(times, "plain")
            for label, seconds in times.items():
                rows.append(self._row(label, setting, spread(seconds), against[label], memory))
            torch.compiler.reset()
        return rows

    def _row(
        self, label: str, setting: Setting, time: Spread, ratio: Spread, memory: Mapping[str, int | None]
    ) -> dict[str, Any]:
        counts, own, plain = self.compared.macs, memory[label], memory["plain"]
        return {
            "network": label,
            **vars(setting),
            "ms": 1000 * time.median,
            "ms low": 1000 * time.low,
            "ms high": 1000 * time.high,
            "images/s": setting.batch / time.median,
            "macs": counts[label],
            "macs ratio": counts[label] / counts["plain"],
            "latency ratio": ratio.median,
            "ratio low": ratio.low,
            "ratio high": ratio.high,
            "memory MB": None if own is None else own / 1e6,
            "memory ratio": own / plain if own and plain else None,
        }

    def _prepare(self, label: str, setting: Setting) -> tuple[Callable[[], object], int | None]:
        """What is timed, called once, and the bytes that it needs."""
        if setting.backend in _RUNTIMES:
            return self._runtime(label, setting)
        device, bf16 = torch.device(self.own.device), setting.precision == "bf16"
        if device.type == "cuda":
            tune_gpu(tf32=setting.precision == "tf32")
        layout = torch.channels_last if setting.layout == "channels_last" else torch.contiguous_format
        network = deepcopy(self.networks[label]).to(device, memory_format=layout)  # type: ignore[call-overload]
        images, targets = self._batch(setting.batch, device, layout)
        called = self._compiled(network) if setting.backend == "compile" else network
        autocast = torch.autocast(device.type, torch.bfloat16) if bf16 else nullcontext()

        def forward() -> None:
            with torch.no_grad(), autocast:
                called(images)

        optimizer = torch.optim.SGD(network.parameters(), lr=1e-4, momentum=0.9) if self.own.train else None

        def step() -> None:
            assert optimizer
            optimizer.zero_grad()
            with autocast:
                if self.compared.is_detector:
                    loss = torch.stack(list(called(images, targets).values())).sum()
                else:
                    loss = functional.cross_entropy(called(images).float(), targets)
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()

        run = step if self.own.train else forward
        # As an option of `torch.compile` it does nothing (2.15); it is looked at when the first call compiles.
        with torch._inductor.config.patch(freezing=setting.backend == "compile" and not self.own.train):
            run()
            run()
        if optimizer:
            # The gradients of a step are part of its peak, so they must not be there before.
            optimizer.zero_grad()
        return run, _held(network, optimizer) + peak_memory(run, self.own.device)

    def _compiled(self, network: nn.Module) -> Callable[..., Any]:
        if not self.compared.is_detector:
            compiled: Callable[..., Any] = torch.compile(network, dynamic=False)
            return compiled
        # Around its boxes a detector changes its shapes with every image.
        backbone = network.get_submodule("backbone")
        backbone.compile(dynamic=False)
        return network

    def _batch(self, batch: int, device: torch.device, layout: torch.memory_format) -> tuple[Any, Any]:
        """Noise, and targets for a training step."""
        channels, height, width = self.compared.size
        classes = self.compared.classes
        if self.compared.is_detector:
            corners = torch.tensor([[0.1, 0.1, 0.5, 0.6], [0.3, 0.2, 0.9, 0.8]]) * torch.tensor([width, height] * 2)
            target = {"boxes": corners.to(device), "labels": torch.tensor([1, classes], device=device)}
            return [torch.rand(channels, height, width, device=device) for _ in range(batch)], [target] * batch
        images = torch.randn(batch, channels, height, width, device=device).contiguous(memory_format=layout)
        shape = (batch, height, width) if self.compared.kind == "deeplab_v3plus" else (batch,)
        return images, torch.randint(classes, shape, device=device)

    def _runtime(self, label: str, setting: Setting) -> tuple[Callable[[], object], int | None]:
        shape = (setting.batch, *self.compared.size)
        images = torch.randn(shape)
        path = self._file(label, setting.precision) if setting.backend != "aoti" else self._package(label, images)

        def opened() -> formats.Runner:
            if setting.backend == "aoti":
                run = formats.open_aoti(path)
            elif setting.backend == "onnxruntime":
                run = formats.open_onnx(path)
            else:
                run = formats.open_openvino(path, "bf16" if setting.precision == "bf16" else "f32", shape)
            run(images)
            return run

        # Once for nothing else, for the first also loads the library.
        self._check(label, opened(), images, setting.precision)
        before = resident_memory()
        run = opened()
        after = resident_memory()
        return lambda: run(images), None if before is None or after is None else after - before

    def _check(self, label: str, run: formats.Runner, images: Tensor, precision: str) -> None:
        """A runtime's time means nothing where it computes something else; low precision may, within its limits."""
        if precision != "float32":
            return
        with torch.no_grad():
            expected = self.networks[label](images)
        difference = float((run(images)[0] - expected).abs().max() / expected.abs().max())
        if not difference < _MOST:
            raise ValueError(f"{label} differs from the network in torch by {difference:.2g} of the largest output")

    def _file(self, label: str, precision: str) -> Path:
        """The network as an ONNX file; bf16 is a matter of the runtime."""
        precision = "int8" if precision == "int8" else "float32"
        path = self.drafts / f"{list(self.networks).index(label)}-{precision}.onnx"
        if not path.exists():
            images = torch.randn(2, *self.compared.size)
            formats.write_onnx(formats.trace(self.networks[label], images, free_size=False), path, {})
            if precision == "int8":
                formats.quantise(path, [images])
        return path

    def _package(self, label: str, images: Tensor) -> Path:
        """The network as compiled code for images of this shape, which is faster than code for any number of them."""
        path = self.drafts / f"{list(self.networks).index(label)}.pt2"
        network = deepcopy(self.networks[label]).to(memory_format=torch.channels_last)
        with torch.no_grad():
            formats.write_aoti(torch.export.export(network, (images,)), path, {})
        return path


def _held(network: nn.Module, optimizer: torch.optim.Optimizer | None) -> int:
    """Bytes of weights, buffers and the optimizer's state."""
    tensors = [*network.parameters(), *network.buffers()]
    for state in optimizer.state.values() if optimizer else ():
        tensors += [value for value in state.values() if isinstance(value, Tensor)]
    return sum(tensor.nbytes for tensor in tensors)


def _write(
    rows: Sequence[Mapping[str, Any]], settings: Sequence[Setting], compared: Networks, own: Any, folder: Path
) -> Path:
    """Prints the table, and writes it as CSV, as JSON with all that it was measured with, and as a picture."""
    about = machine(own.device)
    # The table has it, setting by setting.
    about.pop("threads")
    about |= {
        package: version(package)
        for setting in settings
        if setting.backend in _RUNTIMES
        for package in FORMATS[_RUNTIMES[setting.backend]].packages
    }
    what = "training step" if own.train else "forward pass"
    size = "x".join(map(str, compared.size))
    same = {key: value for key, value in vars(settings[0]).items() if len({getattr(s, key) for s in settings}) == 1}
    shown = [
        {
            **{key: row[key] for key in ("network", *vars(settings[0])) if key not in same},
            "ms": str(Spread(row["ms"], row["ms low"], row["ms high"])),
            "images/s": row["images/s"],
            "memory MB": row["memory MB"],
            "memory ratio": row["memory ratio"],
            "macs ratio": row["macs ratio"],
            "latency ratio": str(Spread(row["latency ratio"], row["ratio low"], row["ratio high"])),
        }
        for row in rows
    ]
    fixed = ", ".join(f"{key} {value}" for key, value in same.items())
    title = f"{own.network}, {compared.kind}, {what} of {size}{', fused' if own.fuse else ''}"
    print(f"{title}; {fixed}\nmedian (quartiles) of {own.rounds} rounds on {about['machine']}, torch {about['torch']}")
    print(f"\n{format_table(shown)}\n")
    (folder / "benchmark.csv").write_text(format_table(rows, "csv") + "\n")
    arguments = {
        "network": own.network,
        "head": compared.kind,
        "image": list(compared.size),
        "mode": what,
        "device": own.device,
        "fused": own.fuse,
        "rounds": own.rounds,
    }
    document = {"machine": about, "arguments": arguments, "rows": list(rows)}
    (folder / "benchmark.json").write_text(json.dumps(document, indent=2) + "\n")
    draw(rows, title, f"{about['machine']}, torch {about['torch']}").savefig(folder / "benchmark.png")
    print(f"in {folder}: benchmark.csv, benchmark.json, benchmark.png")
    return folder


def draw(rows: Sequence[Mapping[str, Any]], title: str, where: str) -> Figure:
    """Latency ratio over ratio of multiply-accumulates, with quartiles; on the diagonal all that is saved is seen.

    Args:
        rows: As in benchmark.json.
        title: Of the picture.
        where: The machine.
    """
    others = [row for row in rows if row["network"] != "plain"]
    # The backend tells a layout that is its own.
    told = [key for key in Setting.__dataclass_fields__ if len({row[key] for row in rows} - {"own"}) > 1]
    told = list(dict.fromkeys(["backend", *told]))
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for row in others:
        words = [f"{key} {row[key]}" if key in ("batch", "threads") else row[key] for key in told]
        groups.setdefault(", ".join(words), []).append(row)
    figure = Figure(figsize=(8.6, 5), layout="constrained", dpi=120)
    axes = figure.subplots()
    seen: dict[str, int] = {}
    for number, (label, points) in enumerate(groups.items()):
        backend = points[0]["backend"]
        marker = _MARKERS[seen.setdefault(backend, 0) % len(_MARKERS)]
        seen[backend] += 1
        middle = [row["latency ratio"] for row in points]
        spreads = [[row["latency ratio"] - row["ratio low"] for row in points]]
        spreads.append([row["ratio high"] - row["latency ratio"] for row in points])
        # Side by side, so that spreads do not cover each other.
        x = [row["macs ratio"] + 0.008 * (number - (len(groups) - 1) / 2) for row in points]
        axes.errorbar(x, middle, spreads, fmt=marker, color=_COLOURS[backend], label=label, alpha=0.85, capsize=3)
    right = 1.05 * max(1.0, *(row["macs ratio"] for row in others))
    # A spread may leave the picture; on a busy machine it would press all else together.
    top = 1.25 * max(1.0, *(row["latency ratio"] for row in others))
    axes.plot([0, right], [0, right], color="gray", linewidth=1, label="as much time as work")
    axes.axhline(1, color="gray", linewidth=1, linestyle="dotted", label="as fast as the plain network")
    axes.set(xlim=(0, right), ylim=(0, top), xlabel="multiply-accumulates / plain", ylabel="latency / plain")
    names = {row["macs ratio"]: row["network"] for row in others}
    above = axes.secondary_xaxis("top")
    above.set_xticks(list(names), list(names.values()), fontsize=8, rotation=20, ha="left")
    above.spines["top"].set_visible(False)
    for ratio in names:
        axes.axvline(ratio, color="gray", linewidth=0.5, alpha=0.4)
    axes.set_title(f"{title}\n{where}", fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)
    # Beside the axes: inside, it would cover points wherever it stood.
    figure.legend(loc="outside right upper", frameon=False, fontsize=8)
    return figure
