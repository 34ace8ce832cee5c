"""Plain data as JSON and back: what programs in the sandbox are given and what they return.

Used on both sides of the wall, so the standard library alone. Nothing but the types named here comes out of
:func:`decode`, whatever was sent: no object of a program ever reaches the side that judges it.
"""

from __future__ import annotations

from typing import Any

DEPTH = 100
SEQUENCES: dict[str, Any] = {"tuple": tuple, "set": set, "frozenset": frozenset}


def encode(value: Any, depth: int = DEPTH) -> Any:
    """Plain data as what :mod:`json` can write; objects of subclasses count as their base.

    Raises:
        TypeError: it holds something else, or is nested deeper than :data:`DEPTH`.
    """
    if depth == 0:
        raise TypeError(f"data nested deeper than {DEPTH}")
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        return float(value)
    if isinstance(value, str):
        return str(value)
    if isinstance(value, list):
        return [encode(v, depth - 1) for v in value]
    for name, kind in SEQUENCES.items():
        if isinstance(value, kind):
            return {name: [encode(v, depth - 1) for v in value]}
    if isinstance(value, dict):
        return {"dict": [[encode(k, depth - 1), encode(v, depth - 1)] for k, v in value.items()]}
    if isinstance(value, (bytes, bytearray)):
        return {"bytes": value.hex()}
    if isinstance(value, complex):
        return {"complex": [value.real, value.imag]}
    raise TypeError(f"{type(value).__name__} is no plain data")


def decode(data: Any, depth: int = DEPTH) -> Any:
    """The value that :func:`encode` was given.

    Raises:
        ValueError: this is not how plain data is written.
    """
    if depth == 0:
        raise ValueError(f"data nested deeper than {DEPTH}")
    if isinstance(data, list):
        return [decode(v, depth - 1) for v in data]
    if not isinstance(data, dict):
        return data
    try:
        ((name, content),) = data.items()
        if name == "dict":
            return {decode(k, depth - 1): decode(v, depth - 1) for k, v in content}
        if name == "bytes":
            return bytes.fromhex(content)
        if name == "complex":
            return complex(*content)
        return SEQUENCES[name](decode(v, depth - 1) for v in content)
    except (TypeError, KeyError, ValueError) as error:
        raise ValueError(f"not plain data: {error}") from error
