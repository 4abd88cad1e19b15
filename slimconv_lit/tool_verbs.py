"""The command lines of the tool verbs; what they do is elsewhere."""

import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from slimconv_lit.analysis.paper import Source, paper_rows, paper_table
from slimconv_lit.analysis.report import models_table, profile_table
from slimconv_lit.ops import OperatorFactory
from slimconv_lit.tables import TableStyle, format_table
from slimconv_lit.usage import RaisingParser, UsageError


def profile(
    backbone: str,
    operator: OperatorFactory | None = None,
    num_classes: int | None = None,
    input_size: int | None = None,
    depth: int | None = 2,
    format: TableStyle = "table",
) -> str:
    """Counts the parameters and multiply-accumulates of a network, part by part.

    Args:
        backbone: A name from `models`.
        operator: The operator in it: --operator=SlimConv2d --operator.k=8/3. It is compared with the plain network.
        num_classes: Width of the classifier; null for the data that the network was made for.
        input_size: Side of the image in pixels; null for the data that the network was made for.
        depth: How deep to look; 0 shows the total alone, null each layer.
        format: table, csv, json or md.
    """
    return profile_table(backbone, operator, num_classes, input_size, depth, format)


def models(pattern: str | None = None, format: TableStyle = "table") -> str:
    """Lists the networks that a config can name; those that match a pattern with what they cost.

    Args:
        pattern: Such as 'cifar_*', 'timm:resnet*', or '*' for all but timm's, which takes a minute.
        format: table, csv, json or md.
    """
    return models_table(pattern, format)


def paper(source: Source = "slimconv", table: str | None = None, format: TableStyle = "table") -> str:
    """Rebuilds the networks of a paper's tables and sets printed and computed figures side by side.

    Args:
        source: Whose tables: slimconv, scconv, or slimming for Network Slimming.
        table: One table alone: I or 1, ..., fig8.
        format: table, csv, json or md.

    Raises:
        DriftError: If an integer is not the recorded one.
    """
    rows = paper_rows(table, source)
    text = paper_table(rows, format)
    if not all(row.as_recorded for row in rows):
        raise DriftError(text)
    return text


@dataclass
class Images:
    """The images to shard.

    Args:
        root: Folder that holds train and val, or ImageNet's official archives, as ImageNetDataModule takes it.
        sample: Shard the small sample that is built below `root`.
    """

    root: str = "data/imagenet"
    sample: bool = False


def prepare(
    output: str,
    data: Images | None = None,
    shard_images: int = 1000,
    workers: int | None = None,
    verify: bool = False,
) -> str:
    """Packs a folder of images into a few large files, which --data.root then names; goes on where it was stopped.

    Args:
        output: Folder that the shards go to.
        data: What to pack: --data.root FOLDER.
        shard_images: Images in each file.
        workers: Threads; null for two on each CPU core, for they wait for the disk.
        verify: Write nothing, and compare what lies in `output` with its checksums.
    """
    # Lightning takes seconds to import, and the other verbs do without.
    from slimconv_lit.data.base import cpu_count
    from slimconv_lit.data.imagenet import ImageNetDataModule
    from slimconv_lit.data.shards import verify_shards, write_shards

    threads, root = workers or 2 * cpu_count(), Path(output)
    if threads < 1 or shard_images < 1:
        raise ValueError("workers and shard_images must be at least 1")
    if verify:
        manifest = verify_shards(root, threads)
    else:
        given = data or Images()
        source = ImageNetDataModule(given.root, sample=given.sample)
        source.prepare_data()
        manifest = write_shards(source.folders(), root, shard_images, threads)
    rows = []
    for name, split in manifest["splits"].items():
        files = split["files"].values()
        size = sum(file["bytes"] for file in files)
        rows.append({"split": name, "images": split["images"], "files": len(files), "bytes": size})
    return f"{format_table(rows)}\n\n{'all whole ' if verify else ''}in {root}"


class DriftError(Exception):
    """A count has changed; the message is the table."""


def run_tool(verb: str, argv: Sequence[str]) -> int:
    """Runs one of them and prints its table; returns the exit status, 1 if `paper` finds a drift.

    Raises:
        UsageError: If the command line is wrong.
    """
    verbs: dict[str, Callable[..., str]] = {"models": models, "profile": profile, "paper": paper, "prepare": prepare}
    function = verbs[verb]
    what = (function.__doc__ or "").partition("\n")[0]
    parser = RaisingParser(prog=f"python -m slimconv_lit {verb}", description=what, allow_abbrev=False)
    positional = {"models": "pattern", "profile": "backbone"}.get(verb)
    if positional:
        parser.add_argument(positional, type=str, nargs="?" if verb == "models" else None)
    if verb == "prepare":
        # As a flag, without the `=true` that a function's argument asks for.
        parser.add_argument("--verify", action="store_true", help="write nothing; compare OUTPUT with its checksums")
    own: set[str | int] = {"verify", *([positional] if positional else [])}
    parser.add_function_arguments(function, skip=own)
    # What the imports made is there to stay; the garbage collector would spend seconds on going over it again.
    gc.freeze()
    try:
        given = parser.instantiate(parser.parse_args(list(argv)))
        print(function(**given.as_dict()))
    except (UsageError, ValueError) as error:
        # They know Lightning's classes too, and so take seconds to import.
        from slimconv_lit.data.files import DataError
        from slimconv_lit.errors import explain

        if isinstance(error, DataError):
            raise
        raise UsageError(explain(str(error), list(parser.get_defaults().keys()), argv)) from error
    except DriftError as error:
        print(error)
        return 1
    finally:
        gc.unfreeze()
    return 0
