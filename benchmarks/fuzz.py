"""Hands damaged files and mistyped command lines to everything that reads them, for as long as it is told to.

    python benchmarks/fuzz.py voc_xml --minutes 30 --output benchmarks/results/fuzz.json

A reader must take an input, or refuse it with an error that names the file: no other exception, no crash, not more
than 10 seconds of the processor, not more than 500 MB. The inputs are those in tests/fuzz_corpus/READER, changed at
random; one that gets an answer which none had before is changed further. What is not refused cleanly is made as small
as it goes and kept in that folder as failed-*, where a test replays it from then on.
"""

import argparse
import contextlib
import hashlib
import io
import json
import multiprocessing
import os
import random
import re
import resource
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from slimconv_lit.analysis.latency import machine
from slimconv_lit.cli import main as command_line
from slimconv_lit.config_files import checkpoint_config, load_config
from slimconv_lit.data import COCO2014DataModule, VOC2007DataModule
from slimconv_lit.data.cifar100 import CIFARImages
from slimconv_lit.data.files import DataError, EncodedImage, inspect_image, read_image
from slimconv_lit.data.sbd import write_sbd_masks
from slimconv_lit.experiments.slimming import read_options
from slimconv_lit.experiments.sweep_file import read_sweep
from slimconv_lit.usage import UsageError

CORPUS = Path(__file__).parent.parent / "tests" / "fuzz_corpus"
COUNTED = ("inputs", "bytes", "read", "failures")
SECONDS, MEGABYTES, MOST_CRASHES, MOST_KEPT = 10, 500, 20, 1000
TOKENS = [
    *(b"0 -1 1 255 256 65536 2147483647 4294967296 9223372036854775808 1e999 -1e999 nan .nan .inf 0.5 1e-4".split()),
    *(
        b"null None true ~ [] {} [[]] '' * &a *a !!python/object/apply:os.system ! % : - ? | > \n \t \x00 \xff".split(
            b" "
        )
    ),
    *(b"../ /etc/passwd ${args} --config --allow-import class_path init_args os.system torch.hub.load base".split()),
    *(b"<!DOCTYPE <!ENTITY &lt; &#0; </ <a> <object> ]]> \xef\xbb\xbf \xed\xa0\x80".split()),
    *(b"cos\nsystem\n(S'true'\ntR. \x80\x04 \x8c\x02os \x93 R b .".split(b" ")),
]


@dataclass(frozen=True)
class Reader:
    """Something that reads files.

    Attributes:
        read: Called in an empty folder that `prepare` has filled, with the bytes to read.
        prepare: Writes what is needed beside them.
        clean: What it may raise.
    """

    read: Callable[[bytes], object]
    prepare: Callable[[], object] = lambda: None
    clean: tuple[type[Exception], ...] = (DataError, FileNotFoundError)


def _voc_tree() -> None:
    for folder in ("JPEGImages", "Annotations", "ImageSets/Main"):
        Path("VOCdevkit/VOC2007", folder).mkdir(parents=True)
    Image.new("RGB", (60, 40)).save("VOCdevkit/VOC2007/JPEGImages/a.jpg")
    Path("VOCdevkit/VOC2007/ImageSets/Main/val.txt").write_text("a\n")


def _voc_xml(content: bytes) -> object:
    Path("VOCdevkit/VOC2007/Annotations/a.xml").write_bytes(content)
    return VOC2007DataModule(root=".", num_workers=0).read("val")[0]


def _coco_tree() -> None:
    for folder in ("annotations", "val2014"):
        Path(folder).mkdir()
    for number in (1, 2):
        Image.new("RGB", (60, 40)).save(f"val2014/{number}.jpg")
    Path("minival.txt").write_text("1\n")


def _coco_json(content: bytes) -> object:
    Path("annotations/instances_val2014.json").write_bytes(content)
    return COCO2014DataModule(root=".", num_workers=0, class_names=["cat", "dog"], minival="minival.txt").read("test")[
        0
    ]


def _sbd_tree() -> None:
    Path("dataset/cls").mkdir(parents=True)
    for split in ("train", "val"):
        Path(f"dataset/{split}.txt").write_text("a\n")


def _sbd_mat(content: bytes) -> object:
    Path("dataset/cls/a.mat").write_bytes(content)
    for left in Path().glob("masks*/*"):
        left.unlink()
    with contextlib.suppress(FileNotFoundError):
        Path("masks").rmdir()
    return write_sbd_masks(Path("dataset"), Path("masks"), (), official=False, num_workers=0)


def _cifar(content: bytes) -> object:
    Path("train").write_bytes(content)
    return [CIFARImages(Path("train"))[0]]


def _image(content: bytes) -> object:
    path = Path("a.jpg")
    path.write_bytes(content)
    image = EncodedImage(path)
    part = image.part(0, 0, image.height, image.width, (8, 8))
    return inspect_image(path), np.asarray(read_image(path)), part


def _checkpoint(content: bytes) -> object:
    Path("a.ckpt").write_bytes(content)
    return checkpoint_config(Path("a.ckpt"))


def _sweep(content: bytes) -> object:
    Path("a.yaml").write_bytes(content)
    sweep = read_sweep(Path("a.yaml"))
    return [sweep.arguments(point) for point in sweep.points(5)]


def _prune_section(content: bytes) -> object:
    Path("a.yaml").write_bytes(content)
    return read_options(load_config(Path("a.yaml")), {})


def _typed(words: Sequence[str]) -> object:
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()) as said:
        status = command_line(words)
    if status not in (0, 2) or (status == 2 and "error" not in said.getvalue()):
        raise AssertionError(f"exit status {status}: {said.getvalue()[-300:]}")
    return f"{status} {_words(said.getvalue())}"


def _words(message: object) -> str:
    """What tells a message from another: not the numbers and names in it, as far as that is to be had cheaply."""
    return " ".join(re.findall(r"\b[a-z]{2,}\b", str(message)))[:80]


def _config(content: bytes) -> object:
    Path("a.yaml").write_bytes(content)
    return _typed(["fit", "--config=a.yaml", "--print_config"])


def _cli(content: bytes) -> object:
    # A system hands over no text with a zero in it.
    words = content.decode("utf-8", "surrogateescape").replace("\0", "").splitlines()[:20]
    verb = words[0] if words else ""
    # What would train, time, write or count a thousand networks is left out; the others only print.
    ends = {"sweep": ["--dry_run", "--count=1"], "models": [], "profile": [], "explain": [], "export": []}
    lightning = {verb: ["--print_config"] for verb in ("fit", "validate", "test", "predict")}
    if verb == "models" and set("*?[").intersection("".join(words)):
        return None
    return _typed([*words, *(lightning | ends)[verb]]) if verb in lightning | ends else None


READERS = {
    "voc_xml": Reader(_voc_xml, _voc_tree),
    "coco_json": Reader(_coco_json, _coco_tree),
    "sbd_mat": Reader(_sbd_mat, _sbd_tree),
    "cifar_pickle": Reader(_cifar),
    "image": Reader(_image),
    # The verbs make them one line and exit status 2.
    "checkpoint": Reader(_checkpoint, clean=(ValueError,)),
    "sweep_file": Reader(_sweep, clean=(ValueError,)),
    "prune_section": Reader(_prune_section, clean=(ValueError, FileNotFoundError, UsageError)),
    "config": Reader(_config, clean=()),
    "command_line": Reader(_cli, clean=()),
}


def inputs_of(name: str) -> list[bytes]:
    """The committed inputs of a reader."""
    return [path.read_bytes() for path in sorted((CORPUS / name).iterdir())]


def mutate(content: bytes, others: Sequence[bytes], rng: random.Random) -> bytes:
    """`content`, changed in one to five places."""
    data = bytearray(content)
    for _ in range(rng.choice((1, 1, 2, 3, 5))):
        at = rng.randrange(len(data) + 1)
        end = min(len(data), at + rng.choice((1, 2, 4, 8, 64, 1024)))
        # Words most often: what they make is not refused at the door.
        match rng.choice((0, 1, 2, 3, 4, 5, 6, 6, 6, 6, 7, 8)):
            case 0 if at < len(data):
                data[at] ^= 1 << rng.randrange(8)
            case 1 if at < len(data):
                data[at] = rng.randrange(256)
            case 2:
                del data[at:end]
            case 3:
                data[at:at] = data[at:end] * rng.choice((1, 1, 1, 100))
            case 4:
                data[at:at] = rng.choice(TOKENS)
            case 5:
                other = rng.choice(others)
                start = rng.randrange(len(other) + 1)
                data[at:end] = other[start : start + rng.choice((4, 16, 256))]
            case 6 if words := list(re.finditer(rb"[\w.+-]+", data)):
                # A word, a name or a number, in the place of another.
                chosen = rng.choice(words)
                theirs = re.findall(rb"[\w.+-]+", rng.choice(others)) or [b""]
                data[chosen.start() : chosen.end()] = rng.choice((rng.choice(TOKENS), rng.choice(theirs)))
            case 7 if lines := data.split(b"\n"):
                rng.shuffle(lines) if rng.random() < 0.1 else lines.insert(0, lines.pop(rng.randrange(len(lines))))
                data = bytearray(b"\n".join(lines))
            case _:
                data[at : at + 4] = rng.choice((0, 1, 255, 2**16, 2**31 - 1, 2**32 - 1)).to_bytes(4, "little")
    return bytes(data[:100_000])


class TooLong(BaseException):
    """A reader took too long; no handler of its own should hold it up."""


def _alarm(number: int, frame: object) -> None:
    raise TooLong(f"more than {SECONDS} seconds")


def answer(reader: Reader, content: bytes) -> tuple[tuple[object, ...], str | None]:
    """What came of an input, in short, and the traceback if it was not refused cleanly."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    signal.signal(signal.SIGPROF, _alarm)
    # Of the processor: what else runs on the machine makes no reader slow.
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    try:
        found: tuple[object, ...] = ("read", str(reader.read(content))[:80])
        trouble = None
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        chain = [part for part in (error, error.__cause__) if part]
        frames = [traceback.extract_tb(part.__traceback__)[-1] for part in chain]
        # A subclass, such as UnicodeDecodeError, is raised by those who know no file.
        clean = type(error) in reader.clean
        found = tuple((type(p).__name__, f.filename, f.lineno) for p, f in zip(chain, frames, strict=True))
        found += (_words(error),) if clean else ()
        trouble = None if clean else "".join(traceback.format_exception(error))
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    if grown > MEGABYTES:
        found, trouble = ("memory",), trouble or f"it took {grown:,.0f} MB"
    return found, trouble


def smaller(reader: Reader, content: bytes, found: tuple[object, ...], tries: int = 300) -> bytes:
    """As much of `content` as gets the same answer."""
    step = len(content) // 2
    while step and tries > 0:
        for start in range(0, len(content), step):
            tries -= 1
            candidate = content[:start] + content[start + step :]
            if tries > 0 and answer(reader, candidate)[0] == found:
                content = candidate
                break
        else:
            step //= 2
    return content


def keep(name: str, content: bytes) -> None:
    """Puts an input that failed into the corpus."""
    (CORPUS / name / f"failed-{hashlib.sha1(content).hexdigest()[:8]}").write_bytes(content)


def _limit_memory() -> None:
    # A reader that asks for more than the machine has must not take others down with it.
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + 8 * 2**30, resource.getrlimit(resource.RLIMIT_AS)[1]))


def work(name: str, seed: int, seconds: float, kept: Path, report: Path) -> None:
    """Runs one reader for `seconds`; the input at hand lies in `kept`, should the process not survive it."""
    reader, rng = READERS[name], random.Random(seed)
    pool = inputs_of(name)
    known: set[tuple[object, ...]] = set()
    counts: dict[str, float] = dict.fromkeys((*COUNTED, "seconds"), 0)
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        reader.prepare()
        _limit_memory()
        waiting = list(pool)
        started = time.process_time()
        while counts["seconds"] < seconds:
            content = waiting.pop() if waiting else mutate(rng.choice(pool), pool, rng)
            kept.write_bytes(content)
            found, trouble = answer(reader, content)
            counts["inputs"] += 1
            counts["bytes"] += len(content)
            counts["read"] += found[0] == "read"
            if found not in known and trouble:
                counts["failures"] += 1
                content = smaller(reader, content, found)
                keep(name, content)
                print(f"{name}: {content[:200]!r}\n{trouble[-3000:]}", flush=True)
            elif found not in known and len(pool) < MOST_KEPT:
                pool.append(content)
            known.add(found)
            counts["seconds"] = round(time.process_time() - started, 2)
            if counts["inputs"] % 20 == 0:
                report.write_text(json.dumps(counts | {"answers": len(known)}))
        report.write_text(json.dumps(counts | {"answers": len(known)}))


def fuzz(name: str, minutes: float, seed: int) -> dict[str, Any]:
    """Runs one reader for `minutes`, in processes of its own: one that crashes is followed by another."""
    total: dict[str, float] = {"seconds": 0}
    crashes = 0
    # A copy of this process, for importing torch takes as long as thousands of inputs.
    spawn = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory() as folder:
        kept, report = Path(folder, "input"), Path(folder, "report.json")
        while total["seconds"] < 60 * minutes - 1 and crashes < MOST_CRASHES:
            left = 60 * minutes - total["seconds"]
            process = spawn.Process(target=work, args=(name, 1000 * seed + crashes, left, kept, report))
            process.start()
            process.join()
            counts = json.loads(report.read_text()) if report.exists() else {}
            report.unlink(missing_ok=True)
            total |= {key: round(total.get(key, 0) + value, 1) for key, value in counts.items()}
            if process.exitcode:
                crashes += 1
                content = kept.read_bytes() if kept.exists() else b""
                keep(name, content)
                print(f"{name}: the process ended with {process.exitcode}: {content[:200]!r}", flush=True)
    ran = round(total.pop("seconds") / 60, 1)
    return {"minutes": ran, **total, "crashes": crashes, "seeds": [seed], **machine()}


def add_up(before: dict[str, Any], row: dict[str, Any]) -> dict[str, Any]:
    """What several runs found together; their answers may be the same, so that the run with most of them counts."""
    summed = {key: round(before[key] + row[key], 1) for key in ("minutes", *COUNTED, "crashes")}
    return row | summed | {"answers": max(before["answers"], row["answers"]), "seeds": before["seeds"] + row["seeds"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "readers", nargs="+", choices=[*READERS, "all"], metavar="READER", help=f"{', '.join(READERS)}, or all"
    )
    parser.add_argument("--minutes", type=float, default=30, help="for each reader (default: 30)")
    parser.add_argument("--output", type=Path, help="a JSON file; the runs that it tells of are added to")
    own = parser.parse_args()
    for name in READERS if "all" in own.readers else own.readers:
        rows = json.loads(own.output.read_text()) if own.output and own.output.is_file() else {}
        row = fuzz(name, own.minutes, seed=len(rows[name]["seeds"]) if name in rows else 0)
        print(name, json.dumps(row), flush=True)
        if own.output:
            rows[name] = add_up(rows[name], row) if name in rows else row
            own.output.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    os.environ.setdefault("WANDB_MODE", "offline")
    sys.exit(main())
