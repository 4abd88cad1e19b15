"""The files that a network can be exported to: how each is written, and how it is run again.

All but detectors start from one traced program (torch.export) in which the batch is free, and the image's size where
the network allows it.
"""

import contextlib
import json
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.jit._trace import TracerWarning

from slimconv_lit.ops.slim_conv import linear_as_sum
from slimconv_lit.usage import UsageError

Facts: TypeAlias = Mapping[str, Any]
"""What goes into a file beside the network: plain values by name."""
Runner: TypeAlias = Callable[[Tensor], tuple[Tensor, ...]]
"""Runs a file on images (B, C, H, W), float32 on the CPU, or on the device that it was compiled for."""

IMAGES = "images"
# What costs, and what joins it: norms and gates stay in float32, where ONNX Runtime cannot quantise all of them.
_INT8 = ("Conv", "Gemm", "MatMul", "Add", "MaxPool", "AveragePool")
# ResNets' widest: 2,048 channels and their 32nd part.
_MOST_OF_A_GATE = 2**17
AXES = {0: "batch", 2: "height", 3: "width"}


class Narrow(nn.Module):
    """A network in bfloat16 that takes and gives float32.

    Args:
        network: Changed to bfloat16 in place.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network.to(torch.bfloat16)

    def forward(self, images: Tensor) -> Tensor:
        """Logits, float32."""
        return self.network(images.to(torch.bfloat16)).float()


def trace(network: nn.Module, images: Tensor, free_size: bool = True) -> ExportedProgram:
    """The program that `network` runs on images like these, in any number.

    Args:
        network: In evaluation mode; it maps (B, C, H, W) to one tensor.
        images: At least two: torch.export takes a size of 1 for a constant.
        free_size: Whether height and width may be others too.

    Raises:
        Exception: Of many kinds, if an axis that is to be free is not; torch's message says why.
    """
    free = {axis: Dim.DYNAMIC for axis in (AXES if free_size else (0,))}
    with torch.no_grad():
        return torch.export.export(network, (images,), dynamic_shapes=(free,), strict=False)


def is_free(program: ExportedProgram, axis: int) -> bool:
    """Whether an axis of the images may have another size than the one that was traced."""
    (name,) = program.graph_signature.user_inputs
    (node,) = (node for node in program.graph.nodes if node.name == name)
    return isinstance(node.meta["val"].shape[axis], torch.SymInt)


def write_onnx(program: ExportedProgram, path: Path, facts: Facts) -> None:
    """One ONNX file, weights inside; the facts are its metadata, as JSON texts."""
    names = {axis: name for axis, name in AXES.items() if is_free(program, axis)}
    with _quiet():
        exported = torch.onnx.export(
            program,
            dynamic_shapes=(names,),
            input_names=[IMAGES],
            output_names=["logits"],
            external_data=False,
            verbose=False,
        )
    assert exported is not None
    exported.model.metadata_props.update(_texts(facts))
    exported.save(path, external_data=False)


def write_detector(network: nn.Module, image: Tensor, path: Path, facts: Facts) -> None:
    """An ONNX file of a detector: boxes (n, 4), labels (n,) and scores (n,) of one image of exactly this size.

    torch.export cannot follow how many boxes there are, for that depends on values. torch's older exporter keeps what
    it saw: the result is right at the traced size alone, so the file takes no other.

    Args:
        network: Of `faster_rcnn`, in evaluation mode.
        image: (1, 3, H, W), between 0 and 1.
        path: What is written.
        facts: The file's metadata.
    """
    import onnx

    outputs = ["boxes", "labels", "scores"]
    with _quiet():
        torch.onnx.export(
            _OneImage(network).eval(),
            (image,),
            path,
            dynamo=False,
            # The first with all that detection needs; runtimes are no faster with later ones.
            opset_version=17,
            input_names=[IMAGES],
            output_names=outputs,
            dynamic_axes={name: {0: "found"} for name in outputs},
        )
    model = onnx.load(path)
    onnx.helper.set_model_props(model, _texts(facts))
    onnx.save(model, path)


class _OneImage(nn.Module):
    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        (found,) = self.network([image[0]])
        return found["boxes"], found["labels"], found["scores"]


def halve_weights(path: Path) -> None:
    """Stores the large weights of an ONNX file as bfloat16 and casts them to float32 where they are read.

    ONNX Runtime computes nothing in bfloat16 on a CPU, and would not open a file that asks for it.
    """
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    model = onnx.load(path)
    casts = []
    for tensor in model.graph.initializer:
        # Biases and norms are as good as nothing, and a cast each would cost more than it saves.
        if tensor.data_type != TensorProto.FLOAT or len(tensor.dims) < 2:
            continue
        weight = torch.from_numpy(numpy_helper.to_array(tensor).copy()).to(torch.bfloat16)
        name, stored = tensor.name, f"{tensor.name}.bfloat16"
        data = weight.view(torch.int16).numpy().tobytes()
        tensor.CopyFrom(helper.make_tensor(stored, TensorProto.BFLOAT16, weight.shape, data, raw=True))
        casts.append(helper.make_node("Cast", [stored], [name], f"{name}.cast", to=TensorProto.FLOAT))
    nodes = [*casts, *model.graph.node]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    onnx.save(model, path)


def quantise(path: Path, batches: Iterable[Tensor]) -> None:
    """Makes an ONNX file compute in int8, between ranges of activations that it sees on `batches`.

    Weights have a scale for each output channel, activations one for each tensor (QuantizeLinear and DequantizeLinear
    nodes, which ONNX Runtime and OpenVINO both understand).

    Args:
        path: Changed in place.
        batches: Images like those that the network is for; (B, C, H, W), float32.
    """
    import onnx
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self.batches = iter(batches)

        def get_next(self) -> dict[str, Any] | None:
            return next(({IMAGES: images.numpy()} for images in self.batches), None)

    facts = {entry.key: entry.value for entry in onnx.load(path).metadata_props}
    prepared = path.with_suffix(".prepared.onnx")
    quant_pre_process(path, prepared, skip_symbolic_shape=True)
    quantize_static(
        prepared,
        path,
        Reader(),
        op_types_to_quantize=list(_INT8),
        quant_format=QuantFormat.QDQ,
        per_channel=True,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
    )
    prepared.unlink()
    model = onnx.load(path)
    onnx.helper.set_model_props(model, facts)
    onnx.save(model, path)


def write_openvino(onnx_file: Path, path: Path, facts: Facts) -> None:
    """OpenVINO's IR of an ONNX file: `path` and, beside it, the weights with the suffix .bin."""
    import openvino

    # Not `convert_model`, which reports its use over the network.
    model = _openvino_core().read_model(onnx_file)
    for key, text in _texts(facts).items():
        model.set_rt_info(text, ["slimconv_lit", key])
    openvino.save_model(model, path, compress_to_fp16=False)


@cache
def _openvino_core() -> Any:
    """The one for the whole process, which nobody may end.

    Each gives the thread a stack for signals, and puts the one before it back when it ends (2026.4). Where two end in
    the order in which they were made, that one is memory no longer mapped, and the next signal with a handler kills the
    process: SIGCHLD has one as soon as a DataLoader has had workers.
    """
    import openvino

    return openvino.Core()


def write_program(program: ExportedProgram, path: Path, facts: Facts) -> None:
    """A program for `torch.export.load`; the facts are its extra file facts.json."""
    torch.export.save(program, path, extra_files={"facts.json": json.dumps(facts)})


def write_aoti(program: ExportedProgram, path: Path, facts: Facts) -> None:
    """A package of compiled code for `torch._inductor.aoti_load_package`, which runs on machines like this one.

    Raises:
        UsageError: If it cannot be compiled, for one because there is no C++ compiler.
    """
    from torch._inductor import aoti_compile_and_package
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        # Freezing lays the weights out once and for all, as the convolutions want them.
        configs = {"aot_inductor.metadata": _texts(facts), "freezing": True}
        with torch.no_grad():
            program = program.run_decompositions({torch.ops.aten.linear.default: _gate_as_sum})
            aoti_compile_and_package(program, package_path=str(path), inductor_configs=configs)
    except InvalidCxxCompiler as error:
        raise UsageError(f"--format aoti needs a C++ compiler: {error}") from error


def _gate_as_sum(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Linear layers of vectors as sums, if they are as small as gates are."""
    if x.ndim != 2 or weight.numel() > _MOST_OF_A_GATE:
        return NotImplemented
    return linear_as_sum(x, weight, bias)


def open_onnx(path: Path) -> Runner:
    """ONNX Runtime on the CPU, with as many threads as torch has."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    # It raises what it logs.
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return lambda images: tuple(map(torch.from_numpy, session.run(None, {IMAGES: images.numpy()})))


def open_openvino(path: Path, precision: str = "f32", shape: Sequence[int] | None = None) -> Runner:
    """OpenVINO on the CPU, with as many threads as torch has.

    Args:
        path: An IR or an ONNX file.
        precision: Of floating-point sums, "f32" or "bf16"; left alone, OpenVINO takes bf16 where the CPU has it.
        shape: Of the images, (B, C, H, W); code for one shape is faster than for all that the file takes.
    """
    settings = {"INFERENCE_PRECISION_HINT": precision, "INFERENCE_NUM_THREADS": torch.get_num_threads()}
    core = _openvino_core()
    model = core.read_model(path)
    if shape is not None:
        model.reshape(shape)
    compiled = core.compile_model(model, "CPU", settings)
    return lambda images: tuple(map(torch.from_numpy, compiled(images.numpy()).values()))


def open_program(path: Path) -> Runner:
    """The program, by torch."""
    module = torch.export.load(path).module()
    return torch.no_grad()(lambda images: (module(images),))


def open_aoti(path: Path) -> Runner:
    """The compiled code, by torch."""
    package = torch._inductor.aoti_load_package(str(path))
    return torch.no_grad()(lambda images: (package(images),))


@dataclass(frozen=True)
class Format:
    """A kind of file.

    Attributes:
        suffix: Of its name.
        packages: What is needed to write and run it, besides the package's own requirements.
        precisions: What it can hold.
        open: Makes it run.
    """

    suffix: str
    packages: tuple[str, ...]
    precisions: tuple[str, ...]
    open: Callable[[Path], Runner]

    def check_packages(self, what: str) -> None:
        """Sees that the packages are there.

        Args:
            what: What they are asked for by: "--format onnx".

        Raises:
            UsageError: With the command that installs them.
        """
        if missing := [name for name in self.packages if find_spec(name) is None]:
            raise UsageError(f'{what} needs {" and ".join(missing)}: pip install "slimconv_lit[export]"')


_ONNX = ("onnx", "onnxscript", "onnxruntime")
FORMATS = {
    "onnx": Format(".onnx", _ONNX, ("float32", "bf16", "int8"), open_onnx),
    # It is read from an ONNX file, so that both are the same network.
    "openvino": Format(".xml", (*_ONNX, "openvino"), ("float32", "bf16", "int8"), open_openvino),
    "torch_export": Format(".pt2", (), ("float32", "bf16"), open_program),
    "aoti": Format(".pt2", (), ("float32", "bf16"), open_aoti),
}


def _texts(facts: Facts) -> dict[str, str]:
    return {key: value if isinstance(value, str) else json.dumps(value) for key, value in facts.items()}


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The exporters warn of their own past and future; what matters is checked on the file."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        warnings.simplefilter("ignore", FutureWarning)
        warnings.simplefilter("ignore", UserWarning)
        warnings.simplefilter("ignore", TracerWarning)
        yield
