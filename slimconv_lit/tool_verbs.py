"""The verbs that train nothing, or train through `fit`: each is a function, its signature is its command line."""

import importlib
from collections.abc import Sequence

from slimconv_lit.errors import UsageError

_FUNCTIONS = {
    "models": ("slimconv_lit.analysis.report", "models"),
    "profile": ("slimconv_lit.analysis.report", "profile"),
}


def run_tool(verb: str, argv: Sequence[str]) -> None:
    """Runs a tool verb and prints what it returns.

    Raises:
        UsageError: If the command line is wrong.
    """
    if verb == "compare":
        from slimconv_lit.compare import compare

        compare(argv)
        return
    from jsonargparse import auto_cli

    module, name = _FUNCTIONS[verb]
    try:
        print(auto_cli(getattr(importlib.import_module(module), name), args=list(argv), prog=f"slimconv_lit {verb}"))
    except ValueError as error:
        raise UsageError(str(error)) from error
