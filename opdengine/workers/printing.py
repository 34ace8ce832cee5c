"""Foreign text on a terminal and in messages: text of models, servers, files and users is shown, never obeyed."""

from __future__ import annotations

import logging
import re
import reprlib
from typing import Any

UNSAFE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
"""What moves the cursor, changes colours, reorders a line or cannot be encoded; tabs and line ends are left."""


def harmless(text: str) -> str:
    r"""The text with control characters written as escapes (``\x1b``): a terminal shows and does not obey them."""
    return UNSAFE.sub(lambda found: found[0].encode("unicode_escape", "surrogatepass").decode(), text)


def one_line(text: str, limit: int = 300) -> str:
    """The beginning of foreign text, harmless and on one line."""
    return harmless(" ".join(text[: 4 * limit].split()))[:limit]


def quiet_imports() -> None:
    """Leave out the lines that libraries print when they are imported."""
    for noisy in ("torchao", "torch.utils._pytree", "bitsandbytes.backends"):
        logging.getLogger(noisy).setLevel(logging.ERROR)


class HarmlessFormatter(logging.Formatter):
    """Log lines that a terminal can be shown, whatever is quoted in them."""

    def format(self, record: logging.LogRecord) -> str:
        """The formatted record without control characters."""
        return harmless(super().format(record))


class _Brief(reprlib.Repr):
    """``repr`` that is short, never fails, and does not descend into deep values."""

    def __init__(self, limit: int) -> None:
        super().__init__()
        self.maxlevel, self.maxstring, self.maxother = 4, limit, limit
        self.maxlist = self.maxtuple = self.maxdict = self.maxset = 12

    def repr_int(self, x: int, level: int) -> str:
        return repr(x) if x.bit_length() <= 200 else f"a number of about {x.bit_length() * 3 // 10} digits"


def brief(value: Any, limit: int = 200) -> str:
    """``repr`` of a value of any size and depth, for messages."""
    return harmless(_Brief(limit).repr(value))[: 2 * limit]
