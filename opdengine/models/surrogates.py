"""Lone surrogates: halves of characters, which JSON can escape (a cut emoji) and no tokenizer and no file takes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any


def surrogate_in(text: str) -> int | None:
    """Return the place of the first code point that UTF-8 cannot write; None where there is none."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return error.start
    return None


def levels(value: Any) -> Iterator[list[Any]]:
    """Everything in a value as JSON has it, keys included, level by level, however deep."""
    level = [value]
    while level:
        yield level
        inner: list[Any] = []
        for item in level:
            if isinstance(item, Mapping):
                inner += [*item, *item.values()]
            elif isinstance(item, (list, tuple)):
                inner += item
        level = inner


def without_surrogates(value: Any) -> Any:
    """A value as JSON has it, with U+FFFD for every lone surrogate in it; what has none is returned as it is."""
    if any(isinstance(item, str) and surrogate_in(item) is not None for level in levels(value) for item in level):
        return _replaced(value)
    return value


def _replaced(value: Any) -> Any:
    if isinstance(value, str):  # UTF-16 joins halves that belong together
        return value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    if isinstance(value, Mapping):
        return {_replaced(key): _replaced(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)([_replaced(item) for item in value])
    return value
