"""How ImageNet is best stored: a folder, our shards, WebDataset or LitData, on the same 2,000 JPEGs.

    pip install webdataset litdata
    python benchmarks/shards.py --output benchmarks/results/shards.json

One process reads an epoch in shuffled order: the bytes alone (warm: the system's cache has the files; cold: it has been
told to forget them), and 500 images decoded and augmented as in training. Beside the speed stands what a run needs that
is to be repeated: whether the first 64 images are the same however many devices share them, and how long it takes to go
on in the middle of an epoch. WebDataset reads our tar files; its and LitData's settings are those of their
introductions.
"""

import argparse
import io
import json
import os
import tempfile
import time
from itertools import islice
from pathlib import Path

import litdata
import torch
import webdataset
from litdata.utilities.env import _DistributedEnv
from PIL import Image
from torchvision.datasets import ImageFolder

from slimconv_lit.analysis.latency import interleaved, machine, spread
from slimconv_lit.data.base import EpochSampler
from slimconv_lit.data.samples import write_imagenet
from slimconv_lit.data.shards import ShardedImages, write_shards
from slimconv_lit.data.transforms import imagenet_train
from slimconv_lit.tables import format_table

PER_SHARD, FIRST, MIDDLE = 250, 64, 1000


def litdata_item(sample):
    path, label = sample
    return {"image": Path(path).read_bytes(), "label": label, "name": Path(path).name}


# Each way: an iterator over (name, bytes) of an epoch, as one of `world` devices sees it.


def of_folder(root, rank=0, world=1, start=0):
    samples = ImageFolder(root / "images" / "train").samples
    for index, _ in islice(EpochSampler(len(samples), 0, world, rank), start, None):
        path = Path(samples[index][0])
        yield path.name, path.read_bytes()


def of_shards(root, rank=0, world=1, start=0):
    images = ShardedImages(root / "shards", "train")
    for index, _ in islice(EpochSampler(len(images), 0, world, rank), start, None):
        path, content = images.read(index)
        yield path.name, content


def of_webdataset(root, rank=0, world=1, start=0):
    urls = [str(path) for path in sorted((root / "shards").glob("train-*.tar"))]

    def of_this_device(urls):
        return islice(urls, rank, None, world)

    shards = webdataset.WebDataset(urls, shardshuffle=100, detshuffle=True, seed=0, nodesplitter=of_this_device)
    # It has no way to begin in the middle: what was seen is read once more.
    for sample in islice(shards.shuffle(1000, seed=0), start, None):
        yield f"{Path(sample['__key__']).name}.JPEG", sample["jpeg"]


def of_litdata(root, rank=0, world=1, start=0):
    dataset = litdata.StreamingDataset(str(root / "litdata"), shuffle=True, seed=0, drop_last=world > 1)
    dataset.distributed_env = _DistributedEnv(world, rank, 1)
    if start:
        dataset.load_state_dict(dataset.state_dict(start, 0, 1))
    for sample in dataset:
        yield sample["name"], sample["image"]


WAYS = {"folder": of_folder, "our shards": of_shards, "webdataset": of_webdataset, "litdata": of_litdata}


def forget(root):
    """Tells the system to drop the files from its cache."""
    for path in root.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def consume(images):
    return sum(len(content) for _, content in images)


def train(images, count=500):
    augment = imagenet_train(224)
    for _, content in islice(images, count):
        augment(Image.open(io.BytesIO(content)).convert("RGB"), 0)


def names(images, count=None):
    return [name for name, _ in islice(images, count)]


def same_batch(way, root):
    """Whether 2 and 4 devices together begin with the images that one begins with."""
    alone = set(names(way(root), FIRST))
    return all(
        {name for rank in range(world) for name in names(way(root, rank, world), FIRST // world)} == alone
        for world in (2, 4)
    )


def goes_on(way, root):
    """Whether an epoch begun in the middle goes on as one that was never stopped, and the seconds until then."""
    try:
        started = time.perf_counter()
        rest = names(way(root, start=MIDDLE), 1)
        seconds = time.perf_counter() - started
        rest = names(way(root, start=MIDDLE))
    except Exception as error:  # what a library cannot do is a result
        return f"no: {type(error).__name__}", None
    return rest == names(way(root))[MIDDLE:], seconds


def write(root, count):
    write_imagenet(root / "images", (count // 10, 1))
    folder = ImageFolder(root / "images" / "train")
    started = time.perf_counter()
    write_shards({"train": folder}, root / "shards", PER_SHARD, workers=2)
    ours = time.perf_counter() - started
    started = time.perf_counter()
    litdata.optimize(
        litdata_item, folder.samples, str(root / "litdata"), chunk_size=PER_SHARD, num_workers=2, verbose=False
    )
    return {"our shards": ours, "litdata": time.perf_counter() - started}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        writing = write(root, args.images)
        size = sum(path.stat().st_size for path in (root / "images" / "train").rglob("*.JPEG")) / args.images
        runs = {name: lambda way=way: consume(way(root)) for name, way in WAYS.items()}
        warm = interleaved(runs, args.rounds)
        cold = {name: [] for name in WAYS}
        for _ in range(args.rounds):
            for name, way in WAYS.items():
                forget(root)
                started = time.perf_counter()
                consume(way(root))
                cold[name].append(time.perf_counter() - started)
        first = interleaved({n: lambda way=way: names(way(root), 1) for n, way in WAYS.items()}, args.rounds)
        trained = interleaved({n: lambda way=way: train(way(root)) for n, way in WAYS.items()}, args.rounds)
        rows = []
        for name, way in WAYS.items():
            exact, seconds = goes_on(way, root)
            rows.append(
                {
                    "storage": name,
                    "read warm, images/s": str(spread([args.images / s for s in warm[name]])),
                    "read cold, images/s": str(spread([args.images / s for s in cold[name]])),
                    "augmented, images/s": str(spread([500 / s for s in trained[name]])),
                    "first image, ms": str(spread([1000 * s for s in first[name]])),
                    "written in s": round(writing[name], 2) if name in writing else None,
                    "same batches on 1, 2, 4": str(same_batch(way, root)).lower(),
                    "goes on exactly": str(exact).lower(),
                    "goes on after ms": round(1000 * seconds, 1) if seconds else None,
                }
            )
    print(format_table(rows))
    result = {
        "command": f"python benchmarks/shards.py --images {args.images} --rounds {args.rounds}",
        **machine(),
        "webdataset": webdataset.__version__,
        "litdata": litdata.__version__,
        "bytes per image": round(size),
        "rows": rows,
    }
    if args.output:
        args.output.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
