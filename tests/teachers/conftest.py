"""Servers of teachers: one with a real tiny model for the session, fresh ones for faults."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "engine"))


@pytest.fixture(scope="session")
def real_server(models: dict[str, str]) -> Iterator[Any]:
    """Serves the tiny model "big", whose head is padded beyond the vocabulary."""
    from teacher_helpers import serve

    with serve(models["big"]) as server:
        yield server


@pytest.fixture(scope="module")
def bigrams(tokenizer: Any) -> Iterator[Any]:
    """Serves a table of bigrams over the vocabulary."""
    from teacher_helpers import serve

    with serve(len(tokenizer)) as server:
        yield server
