"""Time on the clock, and memory: things are timed in turn, so that a change of the machine's mood meets all of them."""

import ctypes
import gc
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torchvision
from torch.profiler import ProfilerActivity, profile
from tqdm import tqdm  # type: ignore[import-untyped]


@dataclass(frozen=True)
class Spread:
    """Median and quartiles of measurements."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.median:.3g} ({self.low:.3g} to {self.high:.3g})"


def spread(values: Sequence[float]) -> Spread:
    """The median and quartiles of `values`, at least two."""
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return Spread(median, low, high)


def interleaved(
    runs: Mapping[str, Callable[[], object]], rounds: int = 15, warmup: int = 2, device: str = "cpu"
) -> dict[str, list[float]]:
    """Seconds of each of `runs` in every round; a round runs them all, in their order.

    Args:
        runs: What to time, by name.
        rounds: How many times each is timed.
        warmup: Rounds before, which do not count.
        device: "cuda" waits for the GPU around every run.
    """
    wait: Callable[[], None] = torch.cuda.synchronize if device.startswith("cuda") else lambda: None
    times: dict[str, list[float]] = {name: [] for name in runs}
    for number in tqdm(range(-warmup, rounds), desc="timing", unit="round", leave=False, delay=2, disable=None):
        for name, run in runs.items():
            wait()
            start = time.perf_counter()
            run()
            wait()
            if number >= 0:
                times[name].append(time.perf_counter() - start)
    return times


def ratios(times: Mapping[str, Sequence[float]], base: str) -> dict[str, Spread]:
    """How long each takes, as a multiple of `base`, round by round."""
    return {
        name: spread([own / plain for own, plain in zip(values, times[base], strict=True)])
        for name, values in times.items()
    }


def peak_memory(run: Callable[[], object], device: str = "cpu") -> int:
    """Bytes that torch holds at most during one call of `run`, above what it held before.

    What a library allocates past torch (the scratch memory of oneDNN and cuDNN plans, other runtimes) is not seen.

    Args:
        run: Called once; call it before, so that what only a first call needs does not count. On the CPU it should
            free nothing that was there before, for that is not seen either.
        device: "cuda" asks torch's allocator on the GPU; else its allocations on the CPU are added up.
    """
    if device.startswith("cuda"):
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    # Else the profiler tells of its own start and end, in capitals.
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        run()
    assert recorded.profiler
    assert recorded.profiler.kineto_results
    # The public tables give what each operation allocates; when it is freed again is in the events alone.
    events = [e for e in recorded.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        if event.device_type().name == "CPU":
            held += event.nbytes()
            peak = max(peak, held)
    return peak


def tune_gpu(tf32: bool) -> None:
    """Lets cuDNN choose by trying, and float32 products and convolutions be rounded to TF32 or not, on GPUs.

    By torch's older switches: compilers read them, and once the newer ones are set, reading them is an error.
    """
    torch.backends.cudnn.benchmark = True
    torch.set_float32_matmul_precision("high" if tf32 else "highest")
    torch.backends.cudnn.allow_tf32 = tf32


def resident_memory() -> int | None:
    """Bytes of this process that lie in memory, once what was freed has been given back; None on systems but Linux.

    For runtimes with allocators of their own: they keep what a pass needed for the next.
    """
    pages = Path("/proc/self/statm")
    if not pages.exists():
        return None
    gc.collect()
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)
    return int(pages.read_text().split()[1]) * os.sysconf("SC_PAGESIZE")


def machine(device: str = "cpu") -> dict[str, object]:
    """What a measurement has to be read with: the processor, its threads and the versions."""
    if device.startswith("cuda"):
        processor = torch.cuda.get_device_name()
    else:
        info = Path("/proc/cpuinfo")
        lines = info.read_text().splitlines() if info.exists() else []
        named = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "")
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        processor = f"{named or platform.processor()}, {cores} cores"
    return {
        "machine": processor,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
    }
