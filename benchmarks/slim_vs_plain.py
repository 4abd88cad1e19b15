"""Time and memory of a plain network against the same network after `slimify`, both given the same treatment.

    python benchmarks/slim_vs_plain.py resnet50 --k 4/3 8/3 --batch 1 16 --what eager fused compiled
    python benchmarks/slim_vs_plain.py resnet50 --k 4/3 8/3 --batch 16 --slice 2 --what packaged
    python benchmarks/slim_vs_plain.py resnet50 --k 4/3 8/3 --batch 16 --what train train-compiled

`gpu.py` asks for all of it on a GPU.

eager           a forward pass in evaluation mode
fused           the same behind `fuse`
compiled        the same by torch.compile with freezing (needs a C++ compiler on CPUs)
packaged        the same by AOTInductor with freezing: no Python between the layers
train           forward and backward pass; besides the time, the bytes kept for backward, and the peak of memory with
                the parameters but without an optimizer
train-compiled  the same by torch.compile

Each round runs every network once in turn, so that a change of the machine's mood meets all of them; what is reported
is the median over the rounds of slim / plain, with quartiles. Maps are in channels_last. Memory that a network frees
stays with the process, as in `fit` on a CPU; `--memory returned` is what the C library does by itself.
"""

import argparse
import copy
import itertools
import json
import statistics
import tempfile
from pathlib import Path

import torch
import torch._inductor.config
import torchvision

from slimconv_lit import fuse, slimify
from slimconv_lit.analysis.complexity import macs
from slimconv_lit.analysis.latency import interleaved, machine, peak_memory, ratios, tune_gpu
from slimconv_lit.memory import keep_memory
from slimconv_lit.ops.reconstruct import use_kernel
from slimconv_lit.tables import format_table

TREATMENTS = ("eager", "fused", "compiled", "packaged", "train", "train-compiled")


def autocast(x, precision):
    return torch.autocast(x.device.type, torch.bfloat16, enabled=precision == "bf16")


def treated(network, what, x, precision="float32", kernel="torch", slice=None):
    """What is timed: a call without arguments; forward passes take the batch in slices of that many images."""
    model = copy.deepcopy(network).train(what.startswith("train"))
    if what in ("fused", "compiled", "packaged"):
        # Compilers fold norms too, but leave gates convolutions. On the CPU: with TF32 it could not be proved right.
        fuse(model)
    run = model.to(x.device, memory_format=torch.channels_last)
    if what.startswith("train"):
        if what == "train-compiled":
            run = torch.compile(model, dynamic=False)

        def step():
            model.zero_grad()
            with use_kernel(kernel):
                with autocast(x, precision):
                    loss = run(x).float().square().mean()
                loss.backward()

        return model, step
    if what == "compiled":
        # As an option of `torch.compile` it does nothing (2.15).
        torch._inductor.config.freezing = True
        run = torch.compile(model, dynamic=False)
    parts = x.split(slice or len(x))
    if what == "packaged":
        run = packaged(model, parts[0])

    def forward():
        with torch.no_grad(), use_kernel(kernel), autocast(x, precision):
            for part in parts:
                run(part)

    return model, forward


def packaged(model, x):
    # Here, for `gpu.py` runs where the command line's packages are not.
    from slimconv_lit.experiments.formats import open_aoti, write_aoti

    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        path = Path(folder, "network.pt2")
        write_aoti(torch.export.export(model, (x,)), path, {})
        return open_aoti(path)


def kept_for_backward(model, x):
    """Bytes that autograd keeps in a forward pass, each storage once, parameters left out."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = {}

    def note(tensor):
        storage = tensor.untyped_storage()
        # With the tensor, so that its place is not taken by another.
        kept[storage.data_ptr()] = (storage.nbytes(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        output = model(x)
    del output
    return sum(size for place, (size, _) in kept.items() if place not in own)


def compare(name, networks, what, batch, precision, args):
    x = torch.randn(batch, 3, args.size, args.size, device=args.device)
    x = x.contiguous(memory_format=torch.channels_last)
    on_gpu = args.device.startswith("cuda")
    if on_gpu:
        tune_gpu(tf32=precision == "tf32")
    # (k, kernel) of what is compared with the plain network.
    pairs = [("plain", "torch"), *((k, kernel) for k in args.k for kernel in args.kernel)]
    made = {pair: treated(networks[pair[0]], what, x, precision, pair[1], args.slice) for pair in pairs}
    times = interleaved({pair: run for pair, (_, run) in made.items()}, args.rounds, device=args.device)
    relative = ratios(times, pairs[0])
    counts = {label: macs(network, (3, args.size, args.size)) for label, network in networks.items()}
    memory = {pair: {} for pair in pairs}
    for pair, (model, run) in made.items():
        if what.startswith("train"):
            # The first step has made gradients, which the next one would hold from the start.
            model.zero_grad()
            with use_kernel(pair[1]), autocast(x, precision):
                memory[pair]["kept"] = kept_for_backward(model, x)
        if what.startswith("train") or on_gpu:
            held = sum(t.nbytes for t in (*model.parameters(), *model.buffers()))
            memory[pair]["peak"] = held + peak_memory(run, args.device)
        model.zero_grad()
    # Else the compiler gives up at the ninth network.
    torch.compiler.reset()
    rows = []
    for pair in pairs[1:]:
        k, kernel = pair
        plain, slim = (1000 * statistics.median(times[each]) for each in (pairs[0], pair))
        row = {
            "network": name,
            "what": what,
            "batch": batch,
            "slice": min(batch, args.slice or batch),
            "k": k,
            "precision": precision,
            "kernel": kernel,
            "plain ms": round(plain, 1),
            "slim ms": round(slim, 1),
            "ratio": round(relative[pair].median, 3),
            "quartiles": f"{relative[pair].low:.3f} to {relative[pair].high:.3f}",
            "macs ratio": round(counts[k] / counts["plain"], 3),
        }
        for kind, used in memory[pair].items():
            row[f"{kind} MB"] = f"{memory[pairs[0]][kind] / 1e6:.0f} -> {used / 1e6:.0f}"
            row[f"{kind} ratio"] = round(used / memory[pairs[0]][kind], 3)
        rows.append(row)
    return rows


def built(name, compressions):
    networks = {"plain": torchvision.models.get_model(name).eval()}
    for k in compressions:
        networks[k] = torchvision.models.get_model(name).eval()
        slimify(networks[k], k=k)
    return networks


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", default=["resnet50"], help="torchvision classification networks")
    parser.add_argument("--k", nargs="+", default=["4/3", "8/3"])
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 16])
    parser.add_argument("--what", nargs="+", choices=TREATMENTS, default=["eager", "fused", "train"])
    parser.add_argument("--precision", nargs="+", choices=["float32", "tf32", "bf16"], default=["float32"])
    parser.add_argument("--kernel", nargs="+", choices=["torch", "triton"], default=["torch"], help="of Reconstruct")
    parser.add_argument("--slice", type=int, help="images that a forward pass takes at a time (default: the batch)")
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--memory", choices=["kept", "returned"], default="kept", help="see slimconv_lit/memory.py")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path, help="write the table and what it was measured on to this .json")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.memory == "kept":
        keep_memory()

    rows = []
    for name in args.names:
        networks = built(name, args.k)
        for what, batch, precision in itertools.product(args.what, args.batch, args.precision):
            found = compare(name, networks, what, batch, precision, args)
            print(format_table(found), flush=True)
            rows += found
    if args.output:
        arguments = {key: value for key, value in vars(args).items() if key != "output"}
        args.output.write_text(
            json.dumps({**machine(args.device), "arguments": arguments, "rows": rows}, indent=2) + "\n"
        )


if __name__ == "__main__":
    main()
