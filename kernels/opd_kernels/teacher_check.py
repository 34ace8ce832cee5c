"""Whether what the teachers gave can be used; asked for when everything else of a call is with the device."""

from __future__ import annotations

import torch
from torch import Tensor

from .chunking import spans
from .problem import Head, Problem
from .selection import RowPlan
from .table import DOT, MERGED


class TeacherCheck:
    """Whether a teacher's logits are finite wherever the student's are.

    A student that is not finite makes its own loss NaN instead: gradient scalers rely on seeing it.
    """

    def __init__(self, problem: Problem, rows: RowPlan, table: Tensor) -> None:
        self.problem, self.rows = problem, rows
        sums = table[:, :MERGED].sum((0, 1))
        self.bad = ~torch.isfinite(sums) & torch.isfinite(table[0, : DOT + 1].sum(0))
        self.any = self.bad.any()

    def __call__(self) -> None:
        """Raise for the first teacher row whose logits are NaN or inf while the student's are finite."""
        if not bool(self.any):
            return
        places = torch.nonzero(self.bad)[:, 0]
        index = places if self.rows.index is None else self.rows.index[places]
        index, order = torch.sort(index)
        teachers = [next(run.teachers for run in self.rows.runs if at < run.stop) for at in places[order].tolist()]
        used = list(zip(index.tolist(), teachers, strict=True))
        for k, teacher in enumerate(self.problem.teachers):
            for row, names in used:
                if names >> k & 1 and not self._finite(teacher, row) and self._finite(self.problem.student, row):
                    raise ValueError(self._bad_teacher(k, teacher, row))

    def _finite(self, head: Head, row: int) -> bool:
        """Whether the logits of a row are, on every rank."""
        dtype, shards = self.problem.compute_dtype, self.problem.shards
        hidden, wrong = head.hidden[row].to(dtype) * head.factor, head.hidden.new_zeros((), dtype=dtype)
        for start, stop in spans(head.vocab, 8192):
            logits = head.weight[start:stop].to(dtype) @ hidden
            wrong += (~torch.isfinite(logits if head.softcap is None else logits.tanh_())).sum()
        return not bool(wrong if shards is None else shards.sum_(wrong))

    def _bad_teacher(self, k: int, teacher: Head, row: int) -> str:
        where = " on some rank" if self.problem.shards is not None else ""
        finite = bool(torch.isfinite(teacher.hidden[row]).all())
        return (
            f"teachers[{k}] has NaN or inf logits{where}, first at row {row} (hidden finite: {finite}): give the row "
            f"token_weight 0 or mix[{row}, {k}] = 0, or repair the teacher's hidden states or weight"
        )
