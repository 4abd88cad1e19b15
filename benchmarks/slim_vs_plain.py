"""Time and memory of a plain network against the same network after `slimify`, both given the same treatment.

    python benchmarks/slim_vs_plain.py resnet50 --k 4/3 8/3 --batch 1 16 --what eager fused compiled
    python benchmarks/slim_vs_plain.py resnet50 --k 4/3 8/3 --batch 16 --what train train-compiled

eager           a forward pass in evaluation mode
fused           the same behind `fuse`
compiled        the same by torch.compile with freezing (needs a C++ compiler on CPUs)
train           forward and backward pass; besides the time, the bytes kept for backward, and the peak of memory with
                the parameters but without an optimizer
train-compiled  the same by torch.compile

Each round runs every network once in turn, so that a change of the machine's mood meets all of them; what is reported
is the median over the rounds of slim / plain, with quartiles. Maps are in channels_last. Memory that a network frees
stays with the process, as in `fit` on a CPU; `--memory returned` is what the C library does by itself.
"""

import argparse
import copy
import json
import statistics
from pathlib import Path

import torch
import torch._inductor.config
import torchvision

from slimconv_lit import fuse, slimify
from slimconv_lit.analysis.complexity import macs
from slimconv_lit.analysis.latency import interleaved, machine, peak_memory, ratios
from slimconv_lit.memory import keep_memory
from slimconv_lit.tables import format_table

TREATMENTS = ("eager", "fused", "compiled", "train", "train-compiled")


def treated(network, what, x):
    """What is timed: a call without arguments."""
    model = copy.deepcopy(network).to(x.device, memory_format=torch.channels_last).train(what.startswith("train"))
    run = model
    if what.startswith("train"):
        if what == "train-compiled":
            run = torch.compile(model, dynamic=False)

        def step():
            model.zero_grad()
            run(x).float().square().mean().backward()

        return model, step
    if what in ("fused", "compiled"):
        # Compilers fold norms too, but leave gates convolutions.
        fuse(model)
    if what == "compiled":
        # As an option of `torch.compile` it does nothing (2.15).
        torch._inductor.config.freezing = True
        run = torch.compile(model, dynamic=False)

    def forward():
        with torch.no_grad():
            run(x)

    return model, forward


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


def compare(name, networks, what, batch, args):
    x = torch.randn(batch, 3, args.size, args.size, device=args.device)
    x = x.contiguous(memory_format=torch.channels_last)
    made = {label: treated(network, what, x) for label, network in networks.items()}
    times = interleaved({label: run for label, (_, run) in made.items()}, args.rounds, device=args.device)
    relative = ratios(times, "plain")
    counts = {label: macs(network, (3, args.size, args.size)) for label, network in networks.items()}
    rows = []
    memory = {}
    if what.startswith("train"):
        for label, (model, run) in made.items():
            # The first step has made gradients, which the next one would hold from the start.
            model.zero_grad()
            held = sum(t.nbytes for t in (*model.parameters(), *model.buffers()))
            memory[label] = (kept_for_backward(model, x), held + peak_memory(run, args.device))
    for label in args.k:
        plain, slim = (1000 * statistics.median(times[each]) for each in ("plain", label))
        row = {
            "network": name,
            "what": what,
            "batch": batch,
            "k": label,
            "plain ms": round(plain, 1),
            "slim ms": round(slim, 1),
            "ratio": round(relative[label].median, 3),
            "quartiles": f"{relative[label].low:.3f} to {relative[label].high:.3f}",
            "macs ratio": round(counts[label] / counts["plain"], 3),
        }
        for i, kind in enumerate(("kept MB", "peak MB") if memory else ()):
            row[kind] = f"{memory['plain'][i] / 1e6:.0f} -> {memory[label][i] / 1e6:.0f}"
            row[f"{kind[:4]} ratio"] = round(memory[label][i] / memory["plain"][i], 3)
        rows.append(row)
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", default=["resnet50"], help="torchvision classification networks")
    parser.add_argument("--k", nargs="+", default=["4/3", "8/3"])
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 16])
    parser.add_argument("--what", nargs="+", choices=TREATMENTS, default=["eager", "fused", "train"])
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
        networks = {"plain": torchvision.models.get_model(name).eval()}
        for k in args.k:
            networks[k] = torchvision.models.get_model(name).eval()
            slimify(networks[k], k=k)
        for what in args.what:
            for batch in args.batch:
                rows += compare(name, networks, what, batch, args)
                print(format_table(rows[-len(args.k) :]), flush=True)
    if args.output:
        arguments = {key: value for key, value in vars(args).items() if key != "output"}
        args.output.write_text(
            json.dumps({**machine(args.device), "arguments": arguments, "rows": rows}, indent=2) + "\n"
        )


if __name__ == "__main__":
    main()
