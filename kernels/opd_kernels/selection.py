"""Which rows are computed, and which teacher works on which of them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

Tag = TypeVar("Tag")


@dataclass(frozen=True)
class Run:
    """Consecutive computed rows ``start:stop`` that need the same teachers: bit k of ``teachers``
    is teacher k."""

    start: int
    stop: int
    teachers: int

    @property
    def names(self) -> tuple[int, ...]:
        """The teachers, ascending."""
        return tuple(k for k in range(self.teachers.bit_length()) if self.teachers >> k & 1)


@dataclass(frozen=True)
class RowPlan:
    """The rows to compute, those with the same teachers side by side.

    Attributes:
        index: [n] positions among the N rows, or None when every row is computed in order.
        count: n.
        runs: cover ``range(n)``.
    """

    index: Tensor | None
    count: int
    runs: tuple[Run, ...]

    def places(self, teacher: int, start: int, stop: int) -> Iterator[tuple[int, int, int]]:
        """Parts of ``start:stop`` that ``teacher`` works on: (start, stop, teachers of these rows before it).

        Neighbouring runs are joined, so that one GEMM serves them.
        """
        return joined(
            (left, right, (run.teachers & ((1 << teacher) - 1)).bit_count())
            for run, left, right in self.overlaps(start, stop)
            if run.teachers >> teacher & 1
        )

    def overlaps(self, start: int, stop: int) -> Iterator[tuple[Run, int, int]]:
        """(run, start, stop) of the runs within ``start:stop``."""
        for run in self.runs:
            left, right = max(run.start, start), min(run.stop, stop)
            if left < right:
                yield run, left, right

    def most_teachers(self) -> int:
        """Of any row."""
        return max((len(run.names) for run in self.runs), default=0)

    def scatter(self, out: Tensor, values: Tensor, start: int, stop: int, column: int | None = None) -> None:
        """Write the values of computed rows ``start:stop`` to their places in ``out`` [N] or [N,
        K]."""
        target = out if column is None else out[:, column]
        if self.index is None:
            target[start:stop] = values
        else:
            target[self.index[start:stop]] = values.to(out.dtype)


def joined(parts: Iterable[tuple[int, int, Tag]]) -> Iterator[tuple[int, int, Tag]]:
    """Join (start, stop, tag) parts that touch and have the same tag."""
    pending: tuple[int, int, Tag] | None = None
    for left, right, tag in parts:
        if pending is not None and pending[1] == left and pending[2] == tag:
            left = pending[0]
        elif pending is not None:
            yield pending
        pending = (left, right, tag)
    if pending is not None:
        yield pending


def capturing(device: torch.device) -> bool:
    """Whether a CUDA graph is being captured: the host cannot read what is on the device."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def plan_rows(
    mix: Tensor,
    uniform: bool,
    row_weight: Tensor | None,
    others: Tensor | None = None,
    known: int | None = None,
) -> RowPlan:
    """Drop rows without weight or teacher and group the rest by the set of their teachers. In a CUDA
    graph every teacher works on every row, whatever the weights of a replay.

    Args:
        mix: [N, K] teacher weights.
        uniform: all rows of ``mix`` are the same.
        row_weight: [N] or None; rows with 0 have no teacher.
        others: [N] or None; rows where it is not 0 are computed although they have no teacher.
        known: of a uniform ``mix`` the bits of its teachers; None reads them from the device.
    """
    rows, teachers = mix.shape
    if rows == 0:
        return RowPlan(None, 0, ())
    if capturing(mix.device):
        return RowPlan(None, rows, (Run(0, rows, (1 << teachers) - 1),))
    if uniform and others is None:
        code = known
        if code is None:
            code = sum(1 << k for k, used in enumerate((mix[0] > 0).tolist()) if used)
        index = None if row_weight is None else torch.nonzero(row_weight)[:, 0]
        count = 0 if code == 0 else rows if index is None else index.numel()
        if count == rows:
            index = None
        return RowPlan(index, count, (Run(0, count, code),) if count else ())

    codes = ((mix > 0) * (1 << torch.arange(teachers, device=mix.device))).sum(1)
    if row_weight is not None:
        codes = torch.where(row_weight != 0, codes, 0)
    index = torch.nonzero(codes if others is None else (codes != 0) | (others != 0))[:, 0]
    codes, order = torch.sort(codes[index], stable=True)
    kinds, counts = torch.unique_consecutive(codes, return_counts=True)
    runs, start = [], 0
    for code, length in torch.stack([kinds, counts], 1).tolist():
        runs.append(Run(start, start + length, code))
        start += length
    whole = start == rows and len(runs) == 1
    return RowPlan(None if whole else index[order], start, tuple(runs))
