import subprocess
import sys

import pytest

# What a network does with a map of 64 MB, layer by layer: it is allocated, written and freed.
LAYERS = """
import ctypes, resource
from slimconv_lit.memory import keep_memory

libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(4):
        place = libc.malloc(64 << 20)
        ctypes.memset(place, 1, 64 << 20)
        libc.free(place)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

returned = faults()
kept = keep_memory()
faults()
print(kept, returned, faults())
"""


def test_memory_that_is_freed_is_not_asked_for_again():
    kept, returned, again = subprocess.run(
        [sys.executable, "-c", LAYERS], capture_output=True, text=True, check=True
    ).stdout.split()
    if kept == "False":
        pytest.skip("this system's C library has no such setting")
    assert int(returned) > 0
    assert int(again) < int(returned) / 100
