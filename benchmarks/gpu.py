"""Sc-ResNet-50 against ResNet-50 on a GPU: eager, compiled, with our kernels; and the bandwidth of Reconstruct alone.

    python benchmarks/gpu.py
    python benchmarks/gpu.py --what compiled train-compiled --precision tf32 --output more.json
    TRITON_INTERPRET=1 python benchmarks/gpu.py --device cpu --batch 2 --size 32 --rounds 2 --what eager train

The networks are compared by `slim_vs_plain.py`, where the treatments are told. Reconstruct alone is the folds of all
its SlimConvs, one after the other, on maps of their sizes, without gate and pooling; `torch` is autograd through
`fold`, in the networks its backward pass is another. On a GPU each way is one CUDA graph, so that the launches do not
count. The bytes are those that have to be moved, each once: x and the folded maps; backward x, its gradient and the
folded maps' too. Bytes over time is what a way has of the GPU's bandwidth; `copy` is that of a plain copy of as many.

A precision after the other, Reconstruct first, compiled training last. What is not begun within `--minutes` is left
out and told, and the file is written anew after every part, so that it may be stopped at any time.
"""

import argparse
import json
import time
from functools import partial
from pathlib import Path

import torch
import torch._dynamo.config
from slim_vs_plain import TREATMENTS, built, compare

from slimconv_lit import SlimConv2d
from slimconv_lit.analysis.latency import interleaved, machine, spread
from slimconv_lit.ops.reconstruct import fold_paths, use_kernel
from slimconv_lit.tables import format_table


def slim_convs(network, size):
    """(C, H, W) of the maps that the SlimConvs of `network` read, in their order."""
    shapes = []
    layers = [module for module in network.modules() if isinstance(module, SlimConv2d)]
    handles = [layer.register_forward_pre_hook(lambda _, args: shapes.append(args[0].shape[1:])) for layer in layers]
    with torch.no_grad():
        network(torch.zeros(1, 3, size, size))
    for handle in handles:
        handle.remove()
    return shapes


def captured(run, device):
    """`run` as a CUDA graph."""
    if not device.startswith("cuda"):
        return run
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        # Compilers and the choice of plans are no part of a graph.
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def reconstruct(k, folds, shapes, dtype, args):
    """Rows for the folds of all layers, forward, and forward and backward, by each way."""

    def drawn(*shape):
        x = torch.randn(args.batch, *shape, device=args.device, dtype=dtype)
        return x.contiguous(memory_format=torch.channels_last).requires_grad_()

    inputs = [(drawn(*shape), [drawn(shape[0], 1, 1), drawn(shape[0], 1, 1)]) for shape in shapes]
    grads = [[drawn(shape[0] // folds, *shape[1:]).detach() for _ in range(2)] for shape in shapes]
    passes = sum(x.nbytes for x, _ in inputs)
    mapped = sum(grad.nbytes for pair in grads for grad in pair)
    moved = {"forward": passes + mapped, "both": passes + mapped + 2 * passes + mapped}

    def both_paths(x, weights):
        return list(fold_paths(x, weights, folds))

    def forward(function, kernel):
        def run():
            with torch.no_grad(), use_kernel(kernel):
                for x, weights in inputs:
                    function(x, weights)

        return run

    def both(function, kernel):
        def run():
            with use_kernel(kernel):
                for (x, weights), grad in zip(inputs, grads, strict=True):
                    torch.autograd.grad(function(x, weights), [x, *weights], grad)

        return run

    compiled = torch.compile(both_paths, dynamic=False)
    ways = {"torch": (both_paths, "torch"), "compiled": (compiled, "torch")}
    if "triton" in args.kernel:
        ways["triton"] = (both_paths, "triton")
    rows = []
    for what, make in (("forward", forward), ("both", both)):
        runs = {way: captured(make(function, kernel), args.device) for way, (function, kernel) in ways.items()}
        whole, half = torch.empty(2, moved[what] // 4, device=args.device, dtype=torch.int16)
        runs["copy"] = lambda whole=whole, half=half: whole.copy_(half)
        for way, seconds in interleaved(runs, args.rounds, device=args.device).items():
            found = spread(seconds)
            row = {"k": k, "precision": str(dtype).removeprefix("torch."), "what": what, "way": way}
            row |= {
                "ms": round(1000 * found.median, 3),
                "quartiles": f"{1000 * found.low:.3f} to {1000 * found.high:.3f}",
            }
            rows.append(row | {"MB": round(moved[what] / 1e6, 1), "GB/s": round(moved[what] / found.median / 1e9, 1)})
    torch.compiler.reset()
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--k", nargs="+", default=["4/3", "8/3"])
    parser.add_argument("--what", nargs="*", choices=TREATMENTS, help="of the networks (default: all but fused)")
    parser.add_argument("--precision", nargs="+", choices=["bf16", "tf32"], default=["bf16", "tf32"])
    parser.add_argument("--kernel", nargs="+", choices=["torch", "triton"], default=["torch", "triton"])
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--minutes", type=float, default=7)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "gpu.json")
    parser.set_defaults(slice=None)
    args = parser.parse_args()
    if args.device.startswith("cuda") and not torch.cuda.is_available():
        parser.error("torch sees no GPU here; how to try the script on a CPU is at its top")
    what = ["train", "eager", "compiled", "train-compiled"] if args.what is None else args.what
    end = time.monotonic() + 60 * args.minutes
    torch._dynamo.config.recompile_limit = 64

    networks = built("resnet50", args.k)
    document = {**machine(args.device), "arguments": {key: str(value) for key, value in vars(args).items()}}
    document |= {"reconstruct": [], "networks": [], "left out": []}

    def note(part, rows):
        document[part] += rows
        args.output.write_text(json.dumps(document, indent=2) + "\n")
        print(format_table(rows), flush=True)

    def compare_reconstruct(k, precision):
        folds = next(module.folds for module in networks[k].modules() if isinstance(module, SlimConv2d))
        dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        return reconstruct(k, folds, slim_convs(networks[k], args.size), dtype, args)

    for precision in args.precision:
        parts = [("reconstruct", k, compare_reconstruct) for k in args.k]
        parts += [
            ("networks", one, partial(compare, "resnet50", networks, args=args, batch=args.batch)) for one in what
        ]
        for part, one, measure in parts:
            if time.monotonic() > end:
                note("left out", [{"part": part, "what": one, "precision": precision}])
            else:
                note(part, measure(one, precision=precision))


if __name__ == "__main__":
    main()
