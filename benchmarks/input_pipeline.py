"""Images per second that the input pipelines deliver, against torchvision's on PIL images, in one interleaved run.

    python benchmarks/input_pipeline.py --output benchmarks/results/input_pipeline.json
    python benchmarks/input_pipeline.py --photos FOLDER

CIFAR-size     crop, flip, rotation and normalisation of batches of 128 in memory, against the same transforms of
               torchvision on each PIL image
ImageNet-size  JPEG files, decoded and a random part resized to 224x224, as training does it, against PIL's decoder and
               the same transforms on PIL images
segmentation   the same photos, resized by a factor of 0.5 to 2 and cropped to 513x513, from tensors and from PIL images
detection      the same photos, flipped at random

All in one process and with `--threads` threads, so that the figures are those of cores. Without `--photos`, the JPEG
files are the two photos of 640x427 pixels that come with scikit-learn.
"""

import argparse
import json
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
from slimconv_lit.data.files import read_image, read_pixels
from slimconv_lit.data.transforms import (
    CIFAR100_STATS,
    IMAGENET_STATS,
    cifar100_train,
    detection_train,
    imagenet_train,
    segmentation_train,
)
from slimconv_lit.tables import format_table

BATCH = 128


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


def photos(files, ours, plain, target):
    """All files each way; `target` makes what belongs to a picture of height and width."""

    def each(read, transform):
        for file in files:
            image = read(file)
            height, width = image.shape[-2:] if isinstance(image, torch.Tensor) else image.size[::-1]
            transform(image, target(height, width))

    return {"PIL": lambda: each(read_image, plain), "ours": lambda: each(read_pixels, ours)}


def classification(files):
    tensors = [v2.PILToTensor(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(*IMAGENET_STATS)]
    plain = v2.Compose([v2.RandomResizedCrop(224), v2.RandomHorizontalFlip(), *tensors])
    return photos(files, imagenet_train(224), plain, lambda height, width: 0)


def segmentation(files):
    def mask(height, width):
        return tv_tensors.Mask(torch.zeros(height, width, dtype=torch.uint8))

    return photos(files, segmentation_train(513), segmentation_train(513), mask)


def detection(files):
    return photos(files, detection_train(), detection_train(), lambda height, width: {})


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", type=Path, help="a folder of JPEG files (*.jpg, *.JPEG)")
    parser.add_argument("--most", type=int, default=100, help="how many of them")
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
        files *= 10
    rows = []
    for name, runs, images in (
        ("CIFAR-size", cifar(), BATCH),
        ("ImageNet-size", classification(files), len(files)),
        ("segmentation", segmentation(files), len(files)),
        ("detection", detection(files), len(files)),
    ):
        times = interleaved(runs, args.rounds)
        rates = {way: spread([images / seconds for seconds in values]) for way, values in times.items()}
        faster = 1 / against(times, "PIL")["ours"].median
        rows.append({"pipeline": name, "PIL, images/s": str(rates["PIL"]), "ours": str(rates["ours"])})
        rows[-1]["times as fast"] = round(faster, 2)
    print(f"JPEG files: {len(files)}, of {sizes[0]}x{sizes[1]} pixels (median)\n\n{format_table(rows)}")
    if args.output:
        command = f"python benchmarks/input_pipeline.py --rounds {args.rounds} --threads {args.threads}"
        about = {"command": command, **machine(), "jpeg files": len(files), "median size": sizes}
        args.output.write_text(json.dumps(about | {"rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
