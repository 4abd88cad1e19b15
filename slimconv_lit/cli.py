"""`python -m slimconv_lit VERB`: finds the verb. Nothing heavy is imported before one is known."""

import os
import sys
from collections.abc import Sequence
from urllib.error import URLError

LIGHTNING_VERBS = {
    "fit": "train, then test the best checkpoint",
    "validate": "run the validation set through a checkpoint",
    "test": "run the test set through a checkpoint",
    "predict": "write what a checkpoint says of images",
}
TOOL_VERBS = {
    "compare": "train a config plain and slim, and put both in one table",
    "sweep": "run a W&B sweep file here, without W&B",
    "prune": "train with a penalty on the scales, prune, and fine-tune",
    "explain": "draw what a checkpoint's network does with images",
    "export": "write a checkpoint's network to a file for other runtimes, and check it",
    "benchmark": "time a network against its plain counterpart",
    "prepare": "pack a folder of images into a few large files with checksums",
    "models": "list the networks that a config can name",
    "profile": "count parameters and multiply-accumulates of a network, layer by layer",
    "paper": "rebuild the networks of the papers' tables and compare the counts",
}

# Those whose files and options of a training can be looked for before seconds are spent on imports.
_LOOKED_THROUGH = {*LIGHTNING_VERBS, "compare", "prune", "explain", "export"}

USAGE = "\n".join(
    [
        "usage: python -m slimconv_lit VERB [options]; `VERB --help` lists the options of one",
        "",
        *(f"  {verb:<9} {what}" for verb, what in (LIGHTNING_VERBS | TOOL_VERBS).items()),
        "",
        "  --allow-import NAME   of any verb: let files and options name classes of this package too (SECURITY.md)",
        "",
        "first steps:",
        "  python -m slimconv_lit fit --config quickstart.yaml",
        "  python -m slimconv_lit fit --config quickstart.yaml --model.operator=SlimConv2d --model.operator.k=8/3",
        "  python -m slimconv_lit test --ckpt_path best",
    ]
)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command line (`sys.argv`'s by default); returns the exit status, 2 for a mistake in it."""
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] in ("-h", "--help"):
        print(USAGE)
        return 0
    verb, *rest = words
    if verb not in LIGHTNING_VERBS | TOOL_VERBS:
        import difflib

        near = difflib.get_close_matches(verb, LIGHTNING_VERBS | TOOL_VERBS, n=1)
        print(f"error: there is no verb {verb!r}{f'; did you mean {near[0]!r}?' if near else ''}\n", file=sys.stderr)
        print(USAGE, file=sys.stderr)
        return 2
    # argparse makes an empty list of it, wherever it stands.
    if nothing := next((word for word in rest if word.endswith("=--")), None):
        print(f"error: {nothing}: '--' is no value", file=sys.stderr)
        return 2
    if verb in _LOOKED_THROUGH and not {"-h", "--help"} & set(rest):
        from slimconv_lit.lookup import check_files, check_keys

        try:
            check_files(verb, rest)
            # Classes of other packages have options of their own.
            if not any(word.startswith("--allow-import") for word in rest):
                check_keys(rest)
        except (FileNotFoundError, ValueError) as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
    from slimconv_lit.trust import allow_imports

    try:
        rest = allow_imports(rest)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return run_verb(verb, rest)


def run_verb(verb: str, argv: list[str]) -> int:
    """Runs a verb as `main` does, and lets no package in, whatever `argv` says: a part of it may be from a file."""
    from slimconv_lit.faults import RunError
    from slimconv_lit.usage import UsageError

    try:
        if verb in LIGHTNING_VERBS:
            from slimconv_lit.lightning_cli import run

            run(verb, argv)
        elif verb == "compare":
            from slimconv_lit.experiments.compare import compare

            compare(argv)
        elif verb == "sweep":
            from slimconv_lit.experiments.sweep import sweep

            return sweep(argv)
        elif verb == "prune":
            from slimconv_lit.experiments.slimming import slimming

            slimming(argv)
        elif verb == "explain":
            from slimconv_lit.experiments.explain import explain

            print(f"in {explain(argv)}")
        elif verb == "export":
            from slimconv_lit.experiments.export import export

            export(argv)
        elif verb == "benchmark":
            from slimconv_lit.experiments.benchmark import benchmark

            benchmark(argv)
        else:
            from slimconv_lit.tool_verbs import run_tool

            return run_tool(verb, argv)
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except SystemExit as done:
        # What `--help` and `--print_config` end with.
        return done.code if isinstance(done.code, int) else int(done.code is not None)
    except BrokenPipeError:
        # `... | head` has read enough; without this, Python would complain once more as it flushes stdout.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (OSError, FloatingPointError, RunError) as error:
        # Missing data, failed downloads, full disks, losses that are not finite and other faults of the machine are the
        # user's to mend; the message says how, a traceback does not.
        if os.environ.get("JSONARGPARSE_DEBUG"):
            raise
        offline = "; the download needs a network (or --data.sample=true, a small sample without one)"
        print(f"error: {_told(error)}{offline if isinstance(error, URLError) else ''}", file=sys.stderr)
        return 2
    except ValueError as error:
        # Light where nothing has failed: only what has read data can raise it.
        from slimconv_lit.data.files import DataError

        if not isinstance(error, DataError) or os.environ.get("JSONARGPARSE_DEBUG"):
            raise
        print(f"error: {_told(error)}", file=sys.stderr)
        return 2
    return 0


def _told(error: Exception) -> str:
    """What an error says, without the traceback that is put around it where a loader's process has raised it."""
    _, name, message = str(error).rpartition(f"{type(error).__name__}: ")
    return message.strip() if name and str(error).startswith("Caught ") else str(error)
