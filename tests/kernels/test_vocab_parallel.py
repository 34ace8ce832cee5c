"""Vocabulary-parallel heads: several processes against one, and the split itself."""

from __future__ import annotations

from pathlib import Path

import pytest
from ranks_helpers import in_processes

from opd_kernels.shards import column_offsets

SCRIPT = Path(__file__).with_name("vocab_parallel_cases.py")


@pytest.mark.parametrize("processes", [2, 4])
def test_processes_equal_one(tmp_path, processes):
    """All cases of ``vocab_parallel_cases`` in one group of gloo processes."""
    in_processes(processes, lambda rank: (str(SCRIPT), str(rank), str(processes), str(tmp_path / "store")))


@pytest.mark.parametrize(
    ("table", "vocab_size", "offsets"),
    [
        ([[5, 5], [4, 4]], None, (0, 5, 9)),
        ([[5, 5], [6, 4]], 8, (0, 5, 8)),
        ([[5, 9], [6, 4]], 5, (0, 5, 5)),
        ([[4], [4], [4]], 7, (0, 4, 7, 7)),
    ],
)
def test_offsets(table, vocab_size, offsets):
    assert column_offsets(table, vocab_size) == offsets


@pytest.mark.parametrize(
    ("table", "vocab_size", "message"),
    [
        ([[5, 5], [6, 4]], None, r"student 11, teachers \[9\]: pass vocab_size="),
        ([[5, 6], [6, 5]], None, r"rank 0 holds 5 vocabulary rows of the student and \[6\] of the teachers"),
        ([[5, 5], [6, 4]], 10, r"vocab_size=10 must be an integer in \[1, 9\]"),
        ([[5, 5], [6, 4]], True, "vocab_size=True"),
    ],
)
def test_bad_offsets(table, vocab_size, message):
    with pytest.raises(ValueError, match=message):
        column_offsets(table, vocab_size)
