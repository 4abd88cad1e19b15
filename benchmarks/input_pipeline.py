"""Images per second that the input pipelines deliver, against torchvision's on PIL images, in one interleaved run.

    python benchmarks/input_pipeline.py --output benchmarks/results/input_pipeline.json
    python benchmarks/input_pipeline.py --only classification evaluation --sizes 4000x3000 --photos FOLDER

CIFAR-size     crop, flip, rotation and normalisation of batches of 128 in memory, against the same transforms of
               torchvision on each PIL image
classification JPEG files, decoded and a random part resized to 224x224, as training does it on ImageNet, against PIL's
               decoder and torchvision's transforms on PIL images; "whole" is ours without scaled decoding
evaluation     the same files, the shorter side to 256 and 224x224 cropped
segmentation   the photos as they are, resized by a factor of 0.5 to 2 and cropped to 513x513, from tensors and from
               PIL images
detection      the same photos, flipped at random

All in one process and with `--threads` threads, so that the figures are those of cores. Without `--photos`, the JPEG
files are the two photos of 640x427 pixels that come with scikit-learn; for classification the photos are resized
(Lanczos) to each of `--sizes` and stored at quality 92.
"""

import argparse
import json
import tempfile
from pathlib import Path

import numpy as np
import sklearn.datasets
import torch
from PIL import Image
from torch.utils.data import default_collate
from torchvision import tv_tensors
from torchvision.transforms import v2

from slimconv_lit.analysis.latency import interleaved, machine, spread
from slimconv_lit.analysis.latency import ratios as against
from slimconv_lit.data.base import Transformed
from slimconv_lit.data.batched import BatchAugment, InMemory
from slimconv_lit.data.files import EncodedImage, read_image, read_pixels
from slimconv_lit.data.transforms import (
    CIFAR100_STATS,
    IMAGENET_STATS,
    cifar100_train,
    detection_train,
    imagenet_eval,
    imagenet_train,
    segmentation_train,
)
from slimconv_lit.tables import format_table

BATCH = 128
PARTS = ["CIFAR", "classification", "evaluation", "segmentation", "detection"]


def cifar():
    """One batch each way: {name: function}."""
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (BATCH, 32, 32, 3), dtype=np.uint8)
    stored = [(Image.fromarray(image), 0) for image in pixels]
    one_by_one = Transformed(stored, cifar100_train())
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous()
    together = InMemory(images, [0] * BATCH, CIFAR100_STATS, BatchAugment())
    keys = [(i, 1000 + i) for i in range(BATCH)]
    return {
        "PIL": lambda: default_collate([one_by_one[key] for key in keys]),
        "ours": lambda: together.__getitems__(keys),
    }


def each_way(files, target, **ways):
    """All files each way, a reader and a transform; `target` makes what belongs to a picture of height and width."""

    def each(read, transform):
        # The same parts of them each way.
        torch.manual_seed(0)
        for file in files:
            image = read(file)
            height, width = image.shape[-2:] if isinstance(image, torch.Tensor) else (image.height, image.width)
            transform(image, target(height, width))

    return {name: lambda way=way: each(*way) for name, way in ways.items()}


def no_target(height, width):
    return {}


TENSORS = [v2.PILToTensor(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(*IMAGENET_STATS)]


def classification(files):
    ours = imagenet_train(224)
    plain = v2.Compose([v2.RandomResizedCrop(224), v2.RandomHorizontalFlip(), *TENSORS])
    return each_way(files, no_target, PIL=(read_image, plain), whole=(read_pixels, ours), ours=(EncodedImage, ours))


def evaluation(files):
    ours = imagenet_eval(224)
    plain = v2.Compose([v2.Resize(256), v2.CenterCrop(224), *TENSORS])
    return each_way(files, no_target, PIL=(read_image, plain), whole=(read_pixels, ours), ours=(EncodedImage, ours))


def resized(files, width, height, folder):
    """The photos at another size, as files of their own."""
    made = folder / f"{width}x{height}"
    made.mkdir()
    for number, file in enumerate(files):
        image = Image.open(file).convert("RGB").resize((width, height), Image.Resampling.LANCZOS)
        image.save(made / f"{number}.jpg", quality=92)
    return sorted(made.iterdir())


def segmentation(files):
    def mask(height, width):
        return tv_tensors.Mask(torch.zeros(height, width, dtype=torch.uint8))

    return each_way(files, mask, PIL=(read_image, segmentation_train(513)), ours=(read_pixels, segmentation_train(513)))


def detection(files):
    return each_way(files, no_target, PIL=(read_image, detection_train()), ours=(read_pixels, detection_train()))


def measure(name, runs, images, rounds):
    """A row of the table: images a second of each way, and how many times PIL's that is."""
    times = interleaved(runs, rounds)
    row = {"pipeline": name} | {
        f"{way}, images/s": str(spread([images / seconds for seconds in values])) for way, values in times.items()
    }
    for way, ratio in against(times, "PIL").items():
        if way != "PIL":
            row[f"{way} / PIL"] = round(1 / ratio.median, 2)
    return row


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", type=Path, help="a folder of JPEG files (*.jpg, *.JPEG)")
    parser.add_argument("--most", type=int, default=100, help="how many of them")
    parser.add_argument("--sizes", nargs="*", default=["500x375", "640x480", "1280x960", "2000x1500"])
    parser.add_argument(
        "--only", nargs="*", default=["CIFAR", "classification", "evaluation", "segmentation", "detection"]
    )
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    folder = args.photos or Path(sklearn.datasets.__file__).parent / "images"
    files = sorted(f for f in folder.rglob("*") if f.suffix.lower() in (".jpg", ".jpeg"))
    # Spread over the folder, which may be sorted by size or class.
    files = files[:: -(-len(files) // args.most)]
    sizes = np.median([Image.open(file).size for file in files], axis=0).astype(int).tolist()
    if not args.photos:
        files *= 5
    with tempfile.TemporaryDirectory() as folder:
        by_size = {size: resized(files, *map(int, size.split("x")), Path(folder)) for size in args.sizes}
        runs = {"CIFAR": (cifar(), BATCH)}
        for name, make in (("classification", classification), ("evaluation", evaluation)):
            runs |= {f"{name} {size}": (make(those), len(those)) for size, those in by_size.items()}
        runs |= {"segmentation": (segmentation(files), len(files)), "detection": (detection(files), len(files))}
        rows = [measure(name, *run, args.rounds) for name, run in runs.items() if name.partition(" ")[0] in args.only]
    print(f"JPEG files: {len(files)}, of {sizes[0]}x{sizes[1]} pixels (median)\n\n{format_table(rows)}")
    if args.output:
        command = f"python benchmarks/input_pipeline.py --rounds {args.rounds} --threads {args.threads}"
        about = {"command": command, **machine(), "jpeg files": len(files), "median size": sizes}
        args.output.write_text(json.dumps(about | {"rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
