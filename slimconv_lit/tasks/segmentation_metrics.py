"""Intersection over union and pixel accuracy from counts of pixels: integers, so that none is lost among many."""

from torch import Tensor


def class_iou(counts: Tensor) -> Tensor:
    """Pixels that are of a class and predicted as it, over those that are either.

    Args:
        counts: (C, C) integers; row: the true class, column: the predicted one. Ignored pixels are not in it.

    Returns:
        (C,) float64; NaN for a class that is neither in the truth nor predicted.
    """
    # Not on the GPU: Apple's has no float64.
    counts = counts.cpu()
    both = counts.diag()
    return both.double() / (counts.sum(0) + counts.sum(1) - both)


def mean_iou(counts: Tensor) -> Tensor:
    """The mean of `class_iou`, without absent classes; float64, NaN if no pixel counted."""
    return class_iou(counts).nanmean()


def pixel_accuracy(counts: Tensor) -> Tensor:
    """The share of pixels that are predicted right; float64, NaN if no pixel counted."""
    counts = counts.cpu()
    return counts.diag().sum().double() / counts.sum()
