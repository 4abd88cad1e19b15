"""Draws docs/slimconv.png, the picture of the operator in the README.

python docs/slimconv.py
"""

from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Rectangle

INK, GATE, TOP, LOW = "#22303c", "#8a5bb5", "#2a78b8", "#d9822b"


def channels(ax, x, y, count, colours, height=0.21, width=0.5):
    """A stack of channels, centred on y."""
    start = y + count * height / 2
    for i in range(count):
        colour = colours[i % len(colours)]
        ax.add_patch(Rectangle((x, start - (i + 1) * height), width, height * 0.86, fc=colour, ec="white", lw=0.8))
    return x + width


def box(ax, x, y, text, colour, width=1.25, height=0.6):
    shape = "round,pad=0.02,rounding_size=0.1"
    ax.add_patch(FancyBboxPatch((x, y - height / 2), width, height, boxstyle=shape, fc="white", ec=colour, lw=1.6))
    ax.text(x + width / 2, y, text, ha="center", va="center", color=INK, fontsize=9.5)
    return x + width


def arrow(ax, start, end, colour=INK, curve=0.0):
    bend = f"arc3,rad={curve}"
    ax.add_patch(
        FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=11, color=colour, lw=1.4, connectionstyle=bend)
    )


def main():
    fig, ax = plt.subplots(figsize=(11, 4.3), dpi=160)
    ax.set(xlim=(-0.1, 12.2), ylim=(-2.35, 2.5))
    ax.axis("off")
    high, low = 1.1, -1.1
    channels(ax, 0.3, 0, 8, [INK], width=0.5)
    ax.text(0.55, -1.25, "input\nC channels", ha="center", fontsize=9.5, color=INK)

    box(ax, 1.3, 0, "gate\npool, 1×1, 1×1, σ", GATE, width=1.8, height=0.72)
    arrow(ax, (0.85, 0), (1.28, 0))
    arrow(ax, (3.12, 0.1), (3.65, high - 0.25), GATE)
    arrow(ax, (3.12, -0.1), (3.65, low + 0.25), GATE)
    ax.text(3.15, 0.6, "w", color=GATE, fontsize=11, ha="center", style="italic")
    ax.text(2.85, -0.78, "w flipped", color=GATE, fontsize=9.5, ha="center")
    arrow(ax, (0.85, 0.6), (3.62, high + 0.1), curve=-0.22)
    arrow(ax, (0.85, -0.6), (3.62, low - 0.1), curve=0.22)
    for y in (high, low):
        ax.text(3.8, y, "×", fontsize=17, color=INK, ha="center", va="center")

    for y, colour in ((high, TOP), (low, LOW)):
        arrow(ax, (3.97, y), (4.4, y))
        channels(ax, 4.45, y, 8, [colour, colour, colour, colour, "#b7c3cd", "#b7c3cd", "#b7c3cd", "#b7c3cd"], 0.2)
        ax.text(5.22, y, "fold", fontsize=9.5, color=INK, ha="center", va="bottom")
        arrow(ax, (4.97, y - 0.05), (5.48, y - 0.05))
        channels(ax, 5.53, y, 4, [colour], 0.2)
    ax.text(5.78, high - 0.78, "T = C / n", fontsize=9.5, color=INK, ha="center")
    ax.text(5.78, low - 0.78, "T = C / n", fontsize=9.5, color=INK, ha="center")

    arrow(ax, (6.06, high), (6.65, high))
    box(ax, 6.67, high, "K×K, norm", TOP)
    arrow(ax, (7.94, high), (9.97, 0.5), TOP, curve=-0.12)
    arrow(ax, (6.06, low), (6.65, low))
    box(ax, 6.67, low, "1×1, norm\nReLU", LOW)
    arrow(ax, (7.94, low), (8.3, low))
    box(ax, 8.32, low, "K×K, norm", LOW)
    arrow(ax, (9.59, low), (9.97, -0.45), LOW, curve=0.12)
    ax.text(8.12, low - 0.62, "Q = T / 2", fontsize=9.5, color=INK, ha="center")
    channels(ax, 10.02, 0, 6, [TOP, TOP, TOP, TOP, LOW, LOW])
    ax.text(10.85, -1.2, "output\nC / k channels", ha="center", fontsize=9.5, color=INK)
    arrow(ax, (10.55, 0), (10.95, 0))
    box(ax, 10.97, 0, "the next\n1×1 reads\nC / k", "#7d8a95", width=1.15, height=0.95)

    for x, text in ((2.35, "Reconstruct"), (7.5, "Transform"), (10.3, "Fuse")):
        ax.text(x, 2.22, text, ha="center", fontsize=12, color=INK, weight="bold")
    for x in (6.36, 9.76):
        ax.plot([x, x], [-2.3, 2.45], color="#d5dbe0", lw=1, ls="--", zorder=0)
    fig.savefig(Path(__file__).with_suffix(".png"), bbox_inches="tight", facecolor="white")


if __name__ == "__main__":
    main()
