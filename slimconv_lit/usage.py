"""Mistakes on a command line, and parsers that raise them; light, so that the tool verbs need not load Lightning."""

from collections.abc import Sequence
from typing import Any, NoReturn

from jsonargparse import ArgumentParser

from slimconv_lit.trust import allow_imports


class UsageError(Exception):
    """A mistake on the command line or in a configuration; the message is all that the user should see."""


class RaisingParser(ArgumentParser):
    """A parser that raises its mistakes, so that they can be explained with all that is known of the command line."""

    def parse_args(self, args: Sequence[str] | None = None, *more: Any, **own: Any) -> Any:  # type: ignore[override]
        """Parses `args`, in which `--allow-import NAME` may stand anywhere.

        Raises:
            UsageError: If they are wrong.
        """
        try:
            words = None if args is None else allow_imports(args)
        except ValueError as error:
            raise UsageError(str(error)) from error
        return super().parse_args(words, *more, **own)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Raises `UsageError`."""
        if self.exit_on_error:
            raise UsageError(message) from ex
        # The parsers inside the parser try one type after the other and count on their own kind of error.
        super().error(message, ex)
