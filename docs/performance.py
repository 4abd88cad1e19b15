"""Draws docs/performance.png, and prints the tables of docs/performance.md, from benchmarks/results.

python docs/performance.py
"""

import json
from pathlib import Path

from matplotlib.figure import Figure

from slimconv_lit.tables import format_table

HERE = Path(__file__).parent
COLOURS = {
    "eager": "#2a78b8",
    "fused": "#7db3d8",
    "compiled": "#d9822b",
    "packaged": "#7d5fb2",
    "onnxruntime": "#3a9d5d",
    "openvino": "#b8486c",
}
COLOURS |= {"train": "#555555", "train-compiled": "#a0a0a0"}
MARKERS = {"1": "o", "16": "s", "16 in twos": "D"}
NAMES = {"fused": "eager, behind `fuse`", "compiled": "torch.compile, frozen", "onnxruntime": "ONNX Runtime"}
NAMES |= {"packaged": "AOTInductor, frozen"}
NAMES |= {"openvino": "OpenVINO", "train": "training step, eager", "train-compiled": "training step, torch.compile"}


def read(name):
    return json.loads((HERE.parent / "benchmarks" / "results" / f"{name}.json").read_text())


def ratios():
    """{(what, batch): {k: (macs ratio, median, low, high)}}."""
    found = {}
    for name in ("cpu", "compiled_cpu", "slices_cpu", "train_cpu"):
        for row in read(f"slim_vs_plain_{name}")["rows"]:
            low, high = map(float, row["quartiles"].split(" to "))
            batch = "16 in twos" if row.get("slice") == 2 else str(row["batch"])
            found.setdefault((row["what"], batch), {})[row["k"]] = (row["macs ratio"], row["ratio"], low, high)
    for row in read("runtimes_cpu")["rows"]:
        if row["network"] != "plain":
            values = (row["macs ratio"], row["latency ratio"], row["ratio low"], row["ratio high"])
            # A runtime's passes of two images, one after the other, are its batch of 16 in twos.
            batch = "16 in twos" if row["batch"] == 2 else str(row["batch"])
            found.setdefault((row["backend"], batch), {})[row["network"].rpartition("=")[2]] = values
    return found


def draw(found):
    figure = Figure(figsize=(8.6, 5), layout="constrained", dpi=120)
    axes = figure.subplots()
    for number, ((what, batch), of_k) in enumerate(found.items()):
        macs, middle, low, high = zip(*of_k.values(), strict=True)
        # Side by side, so that spreads do not cover each other.
        x = [value + 0.0045 * (number - (len(found) - 1) / 2) for value in macs]
        spread = [[m - v for m, v in zip(middle, low, strict=True)], [v - m for m, v in zip(middle, high, strict=True)]]
        label = f"{NAMES.get(what, what).replace('`', '')}, batch {batch}"
        axes.errorbar(x, middle, spread, fmt=MARKERS[batch], color=COLOURS[what], label=label, capsize=2, ms=5)
    ticks = {ratio: f"Sc-ResNet-50, k = {k}\n{ratio} of the macs" for k, (ratio, *_) in found["eager", "1"].items()}
    for ratio in ticks:
        label = "as much time as work" if ratio == max(ticks) else None
        axes.hlines(ratio, ratio - 0.06, ratio + 0.06, color="gray", linewidth=1, label=label)
    axes.set(xlim=(0.38, 0.73), ylim=(0.4, 0.9), ylabel="time / ResNet-50")
    axes.set_xticks(list(ticks), list(ticks.values()))
    axes.tick_params(axis="x", length=0)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside right upper", frameon=False, fontsize=8)
    figure.savefig(HERE / "performance.png")


def main():
    found = ratios()
    draw(found)
    rows = []
    for what in dict.fromkeys(what for what, _ in found):
        row = {"how": NAMES.get(what, what)}
        for batch in MARKERS:
            of_k = found.get((what, batch), {})
            row[f"batch {batch}"] = " / ".join(f"{values[1]:.2f}" for values in of_k.values()) or "-"
        rows.append(row)
    print(format_table(rows, "md"), end="\n\n")
    wanted = ("network", "batch", "macs", "eager", "compiled", "train")
    print(format_table([{key: row[key] for key in wanted} for row in read("network_table_cpu")["rows"]], "md"))


if __name__ == "__main__":
    main()
