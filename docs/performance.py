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
    "onnxruntime": "#3a9d5d",
    "openvino": "#b8486c",
}
COLOURS |= {"train": "#555555", "train-compiled": "#a0a0a0"}
NAMES = {"fused": "eager, behind `fuse`", "compiled": "torch.compile, frozen", "onnxruntime": "ONNX Runtime"}
NAMES |= {"openvino": "OpenVINO", "train": "training step, eager", "train-compiled": "training step, torch.compile"}


def read(name):
    return json.loads((HERE.parent / "benchmarks" / "results" / f"{name}.json").read_text())


def ratios():
    """{(what, batch): {k: (macs ratio, median, low, high)}}."""
    found = {}
    for row in read("slim_vs_plain_cpu")["rows"] + read("slim_vs_plain_train_cpu")["rows"]:
        low, high = map(float, row["quartiles"].split(" to "))
        found.setdefault((row["what"], row["batch"]), {})[row["k"]] = (row["macs ratio"], row["ratio"], low, high)
    for row in read("runtimes_cpu")["rows"]:
        if row["network"] != "plain":
            values = (row["macs ratio"], row["latency ratio"], row["ratio low"], row["ratio high"])
            found.setdefault((row["backend"], row["batch"]), {})[row["network"].rpartition("=")[2]] = values
    return found


def draw(found):
    figure = Figure(figsize=(8.6, 5), layout="constrained", dpi=120)
    axes = figure.subplots()
    for number, ((what, batch), of_k) in enumerate(found.items()):
        macs, middle, low, high = zip(*of_k.values(), strict=True)
        # Side by side, so that spreads do not cover each other.
        x = [value + 0.006 * (number - (len(found) - 1) / 2) for value in macs]
        spread = [[m - v for m, v in zip(middle, low, strict=True)], [v - m for m, v in zip(middle, high, strict=True)]]
        label = f"{NAMES.get(what, what).replace('`', '')}, batch {batch}"
        marker = "o" if batch == 1 else "s"
        axes.errorbar(x, middle, spread, fmt=marker, color=COLOURS[what], label=label, capsize=3, ms=6)
    axes.plot([0, 1], [0, 1], color="gray", linewidth=1, label="as much time as work")
    axes.set(xlim=(0.38, 0.72), ylim=(0.38, 0.9), xlabel="multiply-accumulates / ResNet-50", ylabel="time / ResNet-50")
    for k, ratio in (("k = 8/3", 0.46), ("k = 4/3", 0.649)):
        axes.text(ratio, 0.885, f"Sc-ResNet-50, {k}", ha="center", va="top", fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside right upper", frameon=False, fontsize=8)
    figure.savefig(HERE / "performance.png")


def main():
    found = ratios()
    draw(found)
    rows = []
    for what in dict.fromkeys(what for what, _ in found):
        row = {"how": NAMES.get(what, what)}
        for batch in (1, 16):
            of_k = found.get((what, batch), {})
            row[f"batch {batch}"] = " / ".join(f"{values[1]:.2f}" for values in of_k.values()) or "-"
        rows.append(row)
    print(format_table(rows, "md"), end="\n\n")
    wanted = ("network", "batch", "macs", "eager", "compiled", "train")
    print(format_table([{key: row[key] for key in wanted} for row in read("network_table_cpu")["rows"]], "md"))


if __name__ == "__main__":
    main()
