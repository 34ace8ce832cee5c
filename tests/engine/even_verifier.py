"""A verifier that random models sometimes satisfy."""

from __future__ import annotations

from typing import Any


def even(text: str, answer: Any, messages: Any) -> float:
    """1 for an even number of letters."""
    return float(sum(map(str.isalpha, text)) % 2 == 0)
