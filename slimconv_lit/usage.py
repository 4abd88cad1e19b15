"""Mistakes on a command line, and parsers that raise them; light, so that the tool verbs need not load Lightning."""

from typing import NoReturn

from jsonargparse import ArgumentParser

import slimconv_lit.trust  # noqa: F401  (no parser without its switches)


class UsageError(Exception):
    """A mistake on the command line or in a configuration; the message is all that the user should see."""


class RaisingParser(ArgumentParser):
    """A parser that raises its mistakes, so that they can be explained with all that is known of the command line."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Raises `UsageError`."""
        if self.exit_on_error:
            raise UsageError(message) from ex
        # The parsers inside the parser try one type after the other and count on their own kind of error.
        super().error(message, ex)
