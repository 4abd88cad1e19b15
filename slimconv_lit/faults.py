"""Why a run cannot go on, in one line; light, so that the command line can catch it before anything heavy is loaded."""

import re


class RunError(Exception):
    """A run has to stop, for a reason that is not a mistake in the program; the message says what to do about it."""


_NO_MEMORY = re.compile(r"out of memory|can't allocate memory|not enough memory|bad_alloc", re.IGNORECASE)
_NO_SHARED_MEMORY = re.compile(r"shared memory|unable to (mmap|write to file </torch)|Bus error", re.IGNORECASE)
_WORKER = re.compile(r"DataLoader worker (\(pid[^\n]*?\) )?(is killed|exited)[^\n.]*")


def explain_fault(error: BaseException, batch: str) -> str | None:
    """What happened and what to do about it, where it is one of the usual faults of a machine; None for others.

    Args:
        error: What a fit, test or prediction ended with.
        batch: What the network reads at a time: "64 images of 3 x 224 x 224 (--data.batch_size)".
    """
    said = str(error)
    if worker := _WORKER.search(said):
        reason = "shared memory has run out" if _NO_SHARED_MEMORY.search(said) else "often memory has run out"
        return f"{worker[0]}; {reason}: lower --data.num_workers or --data.batch_size"
    if isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and _NO_MEMORY.search(said)):
        asked = re.search(r"tr(?:ied|ying) to allocate ([\d.]+ ?\w+)", said, re.IGNORECASE)
        wanted = f", {asked[1]} more were asked for" if asked else ""
        return (
            f"out of memory with {batch}{wanted}. Lower the batch size (trainer.accumulate_grad_batches makes up for "
            "it), the size of the images, or --data.num_workers"
        )
    return None


_CHECKS: dict[type[BaseException], str] = {
    ValueError: "pytorch_lightning.loops.fit_loop",
    RuntimeError: "pytorch_lightning.callbacks.early_stopping",
}


def is_refusal(error: BaseException) -> bool:
    """Whether an error of a plain kind is from Lightning's own check of an option, made with the data at hand.

    Everywhere else these kinds mean a mistake in a program, also in what such a check calls.
    """
    frame = error.__traceback__
    while frame and frame.tb_next:
        frame = frame.tb_next
    return frame is not None and frame.tb_frame.f_globals.get("__name__") == _CHECKS.get(type(error))
