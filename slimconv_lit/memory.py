"""Keeps the memory that a network frees, instead of handing it back to the system at every layer.

The C library of Linux asks the system for every large map anew and gives it back as soon as it is freed. A page that
comes back has to be cleared and mapped again: on a CPU that is a tenth to a quarter of ResNet-50's forward pass (see
docs/performance.md). PyTorch does on GPUs what is done here, with an allocator of its own.
"""

import ctypes
import sys

# From malloc.h.
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4


def keep_memory() -> bool:
    """From now on, this process keeps what it frees for what it allocates next.

    The process stays as large as it has once been. Calling it again changes nothing.

    Returns:
        Whether that could be had: it is the GNU C library's.
    """
    # Windows has no library without a name.
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is None:
        return False
    # -1 is never. The padding saves most of the questions while the process still grows.
    settings = ((_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, -1), (_M_TOP_PAD, 64 << 20))
    return all([mallopt(setting, value) == 1 for setting, value in settings])
