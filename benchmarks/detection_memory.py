"""Peak memory of a training step of Faster R-CNN on one 600x850 image: ours, plain and slim, beside torchvision's own.

    python benchmarks/detection_memory.py --output benchmarks/results/detection_memory_cpu.json

Each detector runs in a process of its own: it is built, and takes two steps of SGD with momentum on the same image with
eight objects. What is reported is the most memory that the process held, and how much of that is above what it held
once the detector was built; the second step has the gradients' and the momentum's memory besides the activations'.
Runs differ, for what is freed does not always go back to the system: medians are reported, and the range of the steps.
All detectors start from no weights but freeze what is frozen where there are some: conv1, layer1 and all batch norms.
"""

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
from pathlib import Path

import torch
import torchvision
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone

from slimconv_lit.analysis.complexity import params
from slimconv_lit.heads import faster_rcnn
from slimconv_lit.tables import format_table


def torchvisions_own(name):
    backbone = resnet_fpn_backbone(backbone_name=name, weights=None, trainable_layers=3)
    return FasterRCNN(backbone, num_classes=21, min_size=600, max_size=1000)


def ours(form, k=None):
    operator = {"class_path": "SlimConv2d", "init_args": {"k": k}} if k else None
    return faster_rcnn("torchvision:resnet101", operator, 20, form, freeze="stem")


DETECTORS = {
    "C4 ResNet-101": lambda: ours("c4"),
    "C4 Sc-ResNet-101, k=4/3": lambda: ours("c4", "4/3"),
    "C4 Sc-ResNet-101, k=8/3": lambda: ours("c4", "8/3"),
    "FPN ResNet-101": lambda: ours("fpn"),
    "FPN Sc-ResNet-101, k=4/3": lambda: ours("fpn", "4/3"),
    "torchvision FPN ResNet-101": lambda: torchvisions_own("resnet101"),
    "torchvision FPN ResNet-50": lambda: torchvisions_own("resnet50"),
}


def held():
    """MiB that the process holds now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 2**20


def measure(name, threads):
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    detector = DETECTORS[name]().train()
    trained = [p for p in detector.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=1e-4, momentum=0.9)
    corners = torch.rand(8, 2) * torch.tensor([500.0, 300.0])
    boxes = torch.cat([corners, corners + torch.randint(60, 300, (8, 2))], dim=1)
    target = {"boxes": boxes, "labels": torch.randint(1, 21, (8,))}
    image = torch.rand(3, 600, 850)
    built = held()
    for _ in range(2):
        optimizer.zero_grad()
        sum(detector([image], [target]).values()).backward()
        optimizer.step()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
    return {
        "detector": name,
        "params": params(detector),
        "trained": sum(p.numel() for p in trained),
        "built MiB": round(built),
        "peak MiB": round(peak),
        "step MiB": round(peak - built),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path, help="write the table and what it was measured on to this .json")
    parser.add_argument("--one", choices=DETECTORS, help="measure this one, in this process, and print it as JSON")
    args = parser.parse_args()
    if args.one:
        print(json.dumps(measure(args.one, args.threads)))
        return
    runs = {name: [] for name in DETECTORS}
    for _ in range(args.rounds):
        for name, found in runs.items():
            words = [sys.executable, __file__, "--one", name, "--threads", str(args.threads)]
            done = subprocess.run(words, capture_output=True, text=True, check=True)
            found.append(json.loads(done.stdout.splitlines()[-1]))
            print(found[-1], file=sys.stderr, flush=True)
    rows = []
    for found in runs.values():
        medians = {key: round(statistics.median(run[key] for run in found)) for key in found[0] if key != "detector"}
        steps = [run["step MiB"] for run in found]
        rows.append({"detector": found[0]["detector"], **medians, "range": f"{min(steps)} to {max(steps)}"})
    print(format_table(rows))
    if args.output:
        about = {
            "command": "python benchmarks/detection_memory.py --output " + str(args.output),
            "machine": f"{len(os.sched_getaffinity(0))}-core {platform.machine()} CPU, {args.threads} thread(s)",
            "versions": {
                "python": platform.python_version(),
                "torch": torch.__version__,
                "torchvision": torchvision.__version__,
            },
            "rows": rows,
        }
        args.output.write_text(json.dumps(about, indent=2) + "\n")


if __name__ == "__main__":
    main()
