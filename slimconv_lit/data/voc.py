"""What the Pascal VOC data sets share: the names of the classes and the colours of the masks.

M. Everingham et al., "The Pascal Visual Object Classes (VOC) Challenge", IJCV 2010, http://host.robots.ox.ac.uk/pascal/VOC/
"""

import numpy as np
from numpy.typing import NDArray

_NAMES = """
aeroplane bicycle bird boat bottle bus car cat chair cow diningtable dog horse motorbike person pottedplant sheep sofa
train tvmonitor
"""
OBJECT_NAMES = tuple(_NAMES.split())
"""The 20 kinds of objects; in a mask they are 1 to 20, behind the background."""
VOID = 255
"""Pixels of a mask that count neither in training nor in a metric: the borders of objects, and what is unclear."""


def palette() -> NDArray[np.uint8]:
    """The colour of each label, (256, 3) uint8 RGB, as the official masks carry it: 255 is cream.

    The bits of a label are dealt to red, green and blue in turn, the lowest first, into their highest bits downwards.
    """
    labels, colours = np.arange(256), np.zeros((256, 3), dtype=np.int64)
    for bit in range(8):
        for channel in range(3):
            if (source := 3 * bit + channel) < 8:
                colours[:, channel] |= (labels >> source & 1) << (7 - bit)
    return colours.astype(np.uint8)
