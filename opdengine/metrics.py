"""Numbers that several processes can merge, and small files of rows."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


class Mean(float):
    """A mean that knows of how many values, so that the means of several ranks can be merged.

    A metric of one rank that is a plain float is a count.

    Args:
        value: the mean.
        weight: number of values.
    """

    weight: float

    def __new__(cls, value: float, weight: float = 1.0) -> Mean:
        mean = super().__new__(cls, value)
        mean.weight = float(weight)
        return mean


def mean(values: Sequence[float]) -> Mean:
    """Mean of at least one value."""
    return Mean(sum(values) / len(values), len(values))


def merge(parts: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Metrics of several ranks as one: counts are added, means weighted by their numbers of values."""
    merged: dict[str, float] = {}
    for name in dict.fromkeys(name for part in parts for name in part):
        values = [part[name] for part in parts if name in part]
        means = [value for value in values if isinstance(value, Mean)]
        if not means:
            merged[name] = sum(values)
        elif len(values) == 1:
            merged[name] = float(values[0])
        else:
            weight = sum(value.weight for value in means)
            merged[name] = sum(value * value.weight for value in means) / weight if weight else 0.0
    return merged


def write_jsonl(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write a small JSONL file, whole or not at all; a value that JSON does not have (a date, say) becomes its text."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".tmp")
    text = "".join(json.dumps(row, ensure_ascii=False, default=str) + "\n" for row in rows)
    partial.write_text(text, "utf-8", errors="backslashreplace")  # a lone surrogate stays an escape of JSON
    partial.replace(path)
