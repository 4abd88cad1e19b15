"""Time of many networks against their plain counterparts: eager, compiled, and as training steps, on one machine.

    python benchmarks/network_table.py --output benchmarks/results/network_table_cpu.json

Each pair is timed in turn, round by round; what is reported is the median of thin / plain, with quartiles. Maps are in
channels_last, memory that is freed is kept (see slimconv_lit/memory.py). Pruned networks have random scales: which
channels go does not matter to the clock.
"""

import argparse
import json
import statistics
from pathlib import Path

import torch
import torch._inductor.config
from torch import nn
from torch.profiler import ProfilerActivity, profile

from slimconv_lit import create_backbone, fuse, prune
from slimconv_lit.analysis.complexity import macs
from slimconv_lit.analysis.latency import interleaved, machine, ratios
from slimconv_lit.heads import WithoutProposals, deeplab_v3plus, faster_rcnn
from slimconv_lit.memory import keep_memory
from slimconv_lit.tables import format_table


def pruned(name):
    network = create_backbone(name, num_classes=1000).eval()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight)
    prune(network, ratio=0.5)
    return network


def classifier(name, operator=None, **options):
    return lambda: create_backbone(name, operator and {"class_path": operator, "init_args": options}, 1000)


def segmenter(operator):
    return lambda: deeplab_v3plus("torchvision:resnet50", operator, 21)


def detector(operator):
    return lambda: faster_rcnn("torchvision:resnet101", operator, 20, "c4", min_size=600, max_size=None)


# What is thinned, the plain network, (C, H, W) and the images in a pass.
PAIRS = {
    "Sc-ResNet-50, k=4/3": (classifier("torchvision:resnet50", "SlimConv2d", k="4/3"), 0),
    "Sc-ResNet-50, k=8/3": (classifier("torchvision:resnet50", "SlimConv2d", k="8/3"), 0),
    "Sc-ResNet-101, k=4/3": (classifier("torchvision:resnet101", "SlimConv2d", k="4/3"), 1),
    "Sc-MobileNetV2, k=8/3": (classifier("sc_mobilenet_v2"), 2),
    "SCConv ResNet-50": (classifier("torchvision:resnet50", "SCConv2d"), 0),
    "Ghost ResNet-50": (classifier("torchvision:resnet50", "GhostConv2d"), 0),
    "pruned ResNet-50, 50 %": (lambda: pruned("torchvision:resnet50"), 0),
    "DeepLabv3+ Sc-ResNet-50": (segmenter("SlimConv2d"), 3),
    "Faster R-CNN C4 Sc-ResNet-101": (detector("SlimConv2d"), 4),
}
PLAIN = (
    (classifier("torchvision:resnet50"), (3, 224, 224), 16),
    (classifier("torchvision:resnet101"), (3, 224, 224), 16),
    (classifier("torchvision:mobilenet_v2"), (3, 224, 224), 16),
    (segmenter(None), (3, 513, 513), 1),
    (detector(None), (3, 600, 800), 1),
)


def prepared(network, what, x):
    network = network.to(memory_format=torch.channels_last).train(what == "train")
    is_detector = hasattr(network, "roi_heads")
    images = list(x) if is_detector else x
    target = {"boxes": torch.tensor([[80.0, 60, 400, 350]]), "labels": torch.tensor([1])}
    if what == "compiled":
        # The detector's norms are frozen at their first values: without training its maps grow until the last digits
        # of a fused one differ, and the compiler folds them anyway.
        if not is_detector:
            fuse(network)
        part = network.backbone if is_detector else network
        part.compile(dynamic=False)

    def forward():
        with torch.no_grad():
            network(images)

    def step():
        network.zero_grad()
        output = sum(network(images, [target] * len(x)).values()) if is_detector else network(images)
        output.float().square().mean().backward()

    return step if what == "train" else forward


def profiled(run):
    """Milliseconds of each kind of operation."""
    with profile(activities=[ProfilerActivity.CPU]) as recorded:
        run()
    rows = sorted(((e.self_cpu_time_total / 1000, e.key) for e in recorded.key_averages()), reverse=True)
    return {key: round(time, 1) for time, key in rows[:10]}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="networks whose name has this in it")
    parser.add_argument(
        "--what", nargs="+", choices=("eager", "compiled", "train"), default=["eager", "compiled", "train"]
    )
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--worst", type=int, default=3, help="how many of the eager passes are profiled")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    keep_memory()
    torch._inductor.config.freezing = True
    rows, excess = [], {}
    for name, (thin, plain) in PAIRS.items():
        if args.only not in name:
            continue
        make, size, batch = PLAIN[plain]
        torch.manual_seed(0)
        x = torch.rand(batch, *size).contiguous(memory_format=torch.channels_last)
        counts = [macs(WithoutProposals(n) if hasattr(n, "roi_heads") else n, size) for n in (make(), thin())]
        row = {"network": name, "batch": batch, "macs": round(counts[1] / counts[0], 3)}
        for what in args.what:
            runs = {"plain": prepared(make().eval(), what, x), "thin": prepared(thin().eval(), what, x)}
            times = interleaved(runs, args.rounds)
            ratio = ratios(times, "plain")["thin"]
            row |= {f"{what} ms": round(1000 * statistics.median(times["thin"]), 1), what: str(ratio)}
            if what == "eager":
                excess[name] = (ratio.median - row["macs"], {label: profiled(run) for label, run in runs.items()})
            torch.compiler.reset()
        rows.append(row)
        print(format_table([row]), flush=True)
    worst = sorted(excess, key=lambda name: excess[name][0], reverse=True)[: args.worst]
    for name in worst:
        print(f"\n{name}, eager, ms: {json.dumps(excess[name][1], indent=1)}")
    if args.output:
        about = {"command": "python benchmarks/network_table.py", **machine(), "rounds": args.rounds}
        profiles = {name: excess[name][1] for name in worst}
        args.output.write_text(json.dumps(about | {"rows": rows, "worst, profiled": profiles}, indent=2) + "\n")


if __name__ == "__main__":
    main()
