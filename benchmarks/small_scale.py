"""Plain against thinner networks on real photographs, at equal epochs, over several seeds.

    python benchmarks/small_scale.py PATH/TO/FOLDERS --output benchmarks/results/small_scale.json

PATH/TO/FOLDERS holds train/CLASS/* and test/CLASS/* with images of 32x32 pixels, such as CIFAR-10 as files. The first
`--images` training images in an order drawn from a fixed seed train; all test images test, once, after the last epoch.
The pruned network's epochs are split: sparse training, then fine-tuning. Finished runs are kept beside the output, in a
file that ends in .partial, so that a benchmark that was stopped goes on; a second process with `--from_the_end` shares
the work.
"""

import argparse
import json
import statistics
import time
import warnings
from pathlib import Path

import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder
from torchvision.io import decode_image
from torchvision.transforms import v2
from tqdm import tqdm

from slimconv_lit import ClassificationTask, prune
from slimconv_lit.analysis.complexity import macs, params
from slimconv_lit.analysis.latency import machine
from slimconv_lit.callbacks.sparsity import Sparsity
from slimconv_lit.tables import format_table

VARIANTS = {
    "plain": None,
    "SlimConv k=4/3": {"class_path": "SlimConv2d", "init_args": {"k": "4/3"}},
    "SlimConv k=8/3": {"class_path": "SlimConv2d", "init_args": {"k": "8/3"}},
    "SlimConv k=16/3": {"class_path": "SlimConv2d", "init_args": {"k": "16/3"}},
    "SCConv": {"class_path": "SCConv2d", "init_args": {}},
    "Ghost": {"class_path": "GhostConv2d", "init_args": {}},
    "Network Slimming 50 %": None,
}


def read(folder, count, seed):
    """(images (N, 3, 32, 32) uint8, labels (N,)): `count` of the images, or all of them if it is None."""
    samples = ImageFolder(folder).samples
    order = torch.randperm(len(samples), generator=torch.Generator().manual_seed(seed))[:count].tolist()
    chosen = [samples[i] for i in tqdm(order, desc=folder.name, leave=False)]
    images = torch.stack([decode_image(path, "RGB") for path, _ in chosen])
    return images, torch.tensor([label for _, label in chosen])


def loader(images, labels, train, seed):
    """Batches of 128; trained on are random crops of the padded image, flipped or not."""
    augment = v2.Compose([v2.RandomCrop(32, padding=4), v2.RandomHorizontalFlip()])
    finish = v2.Compose([v2.ToDtype(torch.float32, scale=True), v2.Normalize([0.49, 0.48, 0.45], [0.25, 0.24, 0.26])])

    def batch(indices):
        chosen = [augment(images[i]) for i in indices] if train else [images[i] for i in indices]
        return finish(torch.stack(chosen)), labels[indices]

    return DataLoader(
        range(len(labels)), 128 if train else 500, shuffle=train, collate_fn=batch,
        generator=torch.Generator().manual_seed(seed), drop_last=train,
    )  # fmt: skip


def fit(task, data, epochs, callbacks=()):
    trainer = pl.Trainer(
        max_epochs=epochs, accelerator="auto", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, callbacks=list(callbacks), limit_val_batches=0,
    )  # fmt: skip
    trainer.fit(task, data)
    return trainer


def measure(variant, seed, backbone, train, test, epochs):
    pl.seed_everything(seed, verbose=False)
    started = time.perf_counter()
    task = ClassificationTask(backbone, num_classes=10, operator=VARIANTS[variant], lr=0.1, weight_decay=5e-4,
                              nesterov=True, warmup_epochs=0.5)  # fmt: skip
    data = loader(*train, True, seed)
    if variant.startswith("Network Slimming"):
        first = (epochs + 1) // 2
        fit(task, data, first, [Sparsity(1e-3, every_n_epochs=epochs)])
        prune(task.model, 0.5, streams="coupled", example_input=torch.zeros(1, 3, 32, 32))
        task.hparams["lr"] = 0.05
        trainer = fit(task, data, epochs - first)
    else:
        trainer = fit(task, data, epochs)
    (scores,) = trainer.test(task, loader(*test, False, seed), verbose=False)
    size = (3, 32, 32)
    return {
        "variant": variant, "seed": seed, "top1": scores["test/top1"], "params": params(task.model),
        "macs": macs(task.model.cpu(), size), "seconds": round(time.perf_counter() - started, 1),
    }  # fmt: skip


def finished(kept):
    """What the file of finished runs holds: {(variant, seed): run}."""
    runs = [json.loads(line) for line in kept.read_text().splitlines()] if kept.exists() else []
    return {(run["variant"], run["seed"]): run for run in runs}


def summary(runs):
    """One line for each variant: mean and deviation over its seeds."""
    rows = []
    plain = None
    for variant in VARIANTS:
        own = [run for run in runs if run["variant"] == variant]
        if not own:
            continue
        score = [100 * run["top1"] for run in own]
        mean = {key: statistics.mean(run[key] for run in own) for key in ("params", "macs")}
        plain = plain or mean
        rows.append(
            {
                "network": variant,
                "top-1 %": round(statistics.mean(score), 2),
                "deviation": round(statistics.stdev(score), 2) if len(score) > 1 else "",
                "seeds": len(own),
                "params": round(mean["params"]),
                "macs": round(mean["macs"]),
                "params / plain": round(mean["params"] / plain["params"], 3),
                "macs / plain": round(mean["macs"] / plain["macs"], 3),
            }
        )
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--backbone", default="cifar_resnet20")
    parser.add_argument("--images", type=int, default=10_000)
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--from_the_end", action="store_true", help="begin with the last run")
    parser.add_argument("--output", type=Path, default=Path("small_scale.json"))
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    warnings.simplefilter("ignore")
    kept = args.output.with_suffix(".partial")
    train, test = read(args.folder / "train", args.images, 0), read(args.folder / "test", None, 0)
    wanted = [(variant, seed) for seed in range(args.seeds) for variant in VARIANTS]
    for variant, seed in tqdm(wanted[::-1] if args.from_the_end else wanted, unit="run"):
        if (variant, seed) not in finished(kept):
            run = measure(variant, seed, args.backbone, train, test, args.epochs)
            with kept.open("a") as file:
                file.write(json.dumps(run) + "\n")
    runs = [finished(kept)[one] for one in wanted]
    rows = summary(runs)
    print(format_table(rows))
    about = {
        "command": f"python benchmarks/small_scale.py FOLDER --backbone {args.backbone} --images {args.images} "
        f"--epochs {args.epochs} --seeds {args.seeds}",
        **machine("cuda" if torch.cuda.is_available() else "cpu"),
        "pytorch_lightning": pl.__version__,
        "train images": len(train[1]),
        "test images": len(test[1]),
    }
    args.output.write_text(json.dumps(about | {"rows": rows, "runs": runs}, indent=2) + "\n")


if __name__ == "__main__":
    main()
