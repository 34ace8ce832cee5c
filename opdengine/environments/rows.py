"""Files that a user brings to an environment, checked row by row."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from opdengine.data.prompts import DataError, Undecodable, read_rows

logger = logging.getLogger(__name__)

T = TypeVar("T")


def checked_rows(path: str, check: Callable[[str, Mapping[str, Any]], T], *, skip_bad_rows: bool = False) -> list[T]:
    """Return what ``check`` makes of each row of a file.

    Args:
        path: as :func:`opdengine.data.prompts.read_rows` reads it.
        check: (row number, row) -> the result; raises ValueError with what is wrong with the row.
        skip_bad_rows: leave bad rows out, counted by reason in the log, instead of refusing the file.

    Raises:
        DataError: the file cannot be read, a row is bad, or none is left.
    """
    good: list[T] = []
    bad: list[str] = []
    reasons: Counter[str] = Counter()
    for number, row in read_rows(path):
        try:
            if isinstance(row, Undecodable):
                raise ValueError(str(row))
            if not isinstance(row, Mapping):
                raise ValueError("not a JSON object")
            good.append(check(str(number), row))
        except ValueError as error:
            bad.append(f"  row {number}: {error}")
            reasons[str(error).split(" (")[0]] += 1
    shown = "\n".join(bad[:10]) + ("\n  ..." if len(bad) > 10 else "")
    if bad and not skip_bad_rows:
        raise DataError(
            f"{len(bad)} of {len(bad) + len(good)} rows of {path!r} cannot be used:\n{shown}\n"
            "Fix them, or leave them out with skip_bad_rows."
        )
    if bad:
        logger.warning("left out %d of %d rows of %s: %s", len(bad), len(bad) + len(good), path, dict(reasons))
    if not good:
        raise DataError(f"{path!r} holds no usable row{':' if bad else ''}\n{shown}".rstrip())
    return good


def file_of(split: str, files: Mapping[str, str], option: str) -> str:
    """The file of a split.

    Raises:
        DataError: there is none.
    """
    if not isinstance(files, Mapping) or split not in files:
        known = sorted(files) if isinstance(files, Mapping) else files
        raise DataError(f"no file for split {split!r}; set {option}: {{{split}: path}} (known splits: {known})")
    return files[split]
