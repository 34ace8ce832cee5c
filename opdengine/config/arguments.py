"""The parser of ``opdengine``: names are written out, given once, and an error says what to add."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any, NoReturn

from opdengine.workers.printing import harmless


class Parser(argparse.ArgumentParser):
    """An :class:`argparse.ArgumentParser` that takes no abbreviations and no argument twice.

    Args:
        example: a whole command line that works, shown with every error.
        options: as of :class:`argparse.ArgumentParser`.
    """

    def __init__(self, prog: str | None = None, *, example: str = "", **options: Any) -> None:
        super().__init__(prog=prog, allow_abbrev=False, **options)
        self.example = example
        self.register("action", None, _Once)

    def error(self, message: str) -> NoReturn:
        """End with status 2, the message and the example."""
        example = f"; for example: {self.example}" if self.example else ""
        self.exit(2, harmless(f"{self.prog}: {message}{example}\n"))


class _Once(argparse.Action):
    """Stores a value and refuses a second one."""

    given = False

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: str | Sequence[Any] | None,
        option_string: str | None = None,
    ) -> None:
        if self.given:
            parser.error(f"{option_string} is given twice; give it once")
        self.given = True
        setattr(namespace, self.dest, values)
