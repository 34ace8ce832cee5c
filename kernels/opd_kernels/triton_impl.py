"""Row operations of a GPU: the Triton kernels of ``rows``, behind the interface of
``TorchRowOps``.

Buffers keep logits: nothing is normalised in place. What is known about the rows of a chunk (the
student's normaliser, those of the raw teachers in ``acc`` and ``t``) lies in a small table that
the kernels read. The sweeps, in bytes read and written per logit, dZ in bfloat16:

- reverse and forward KL: statistics of student and first teacher in one read, 8, the same for
  every other teacher; gradient 8 + 2 for one teacher and 12 + 2 for more;
- JSD and skew KL: a value sweep more per teacher, 8; a teacher that is not the first has its
  statistics read alone, 4, unless ``full`` asks for the divergences of both directions;
- from the third teacher on, one fold of 12 (KL) or 16 per teacher; a mixture folds from the second
  on and has one value sweep;
- a bias, softcap or floor: 4 for the head's own logits, written back by the sweep that reads them
  first.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import triton
from torch import Tensor

from . import rows
from . import rows_math as layout
from .heads import write_product
from .torch_impl import StudentRows, TeacherRows
from .types import Head, Rule

KL = ("reverse_kl", "forward_kl")
# Partials of one field that a program of the merge kernel holds.
MERGE_ELEMENTS = 512


@dataclass
class TritonRows(StudentRows):
    """Rows whose student results are views of ``table`` [layout.TABLE, c]; filled by the first
    teacher's sweep when ``pending``."""

    table: Tensor = field(kw_only=True)
    pending: bool = False

    @classmethod
    def empty(cls, count: int, like: Tensor, labels: bool, full: bool, pending: bool) -> TritonRows:
        table = like.new_empty(layout.TABLE, count)
        return cls._view(table, labels, full, pending)

    @classmethod
    def _view(cls, table: Tensor, labels: bool, full: bool, pending: bool) -> TritonRows:
        return cls(
            lse=table[int(layout.LSE)],
            entropy=table[int(layout.ENTROPY)] if full else None,
            top1=table[int(layout.ARGMAX)] if full else None,
            logprob=table[int(layout.LOGPROB)] if full and labels else None,
            log_sum=table[int(layout.LOG)] if full else None,
            table=table,
            pending=pending,
        )

    def part(self, start: int, stop: int) -> TritonRows:
        table = self.table[:, start:stop]
        return self._view(table, self.logprob is not None, self.entropy is not None, self.pending)


class TritonRowOps:
    """Row operations on [c, V] float32 views of a chunk whose rows are padded to ``rows.ALIGNMENT``
    elements."""

    def __init__(self, vocab: int) -> None:
        self.vocab = vocab
        self.width = -(-vocab // rows.ALIGNMENT) * rows.ALIGNMENT
        self.block = rows.BLOCK
        self.splits = triton.cdiv(self.width, self.block)
        self.merge_splits = triton.next_power_of_2(self.splits)

    def write_logits(self, head: Head, hidden: Tensor, out: Tensor, tile: Tensor | None) -> None:
        """The head's product alone; the first sweep over ``out`` adds bias, softcap and floor."""
        write_product(head, hidden, out, tile)

    def student_rows(self, head: Head, z: Tensor, labels: Tensor | None, full: bool, joint: bool) -> TritonRows:
        """Statistics of ``z``; with ``joint`` they are left to the sweep of each row's first
        teacher."""
        student = TritonRows.empty(z.shape[0], z, labels is not None, full, joint)
        if not joint:
            self._statistics(student, z, labels, student_head=head)
        return student

    def teacher_rows(
        self,
        rule: Rule,
        student_head: Head,
        head: Head,
        z: Tensor,
        t: Tensor,
        student: StudentRows,
        *,
        acc: Tensor | None,
        before: int,
        last: bool,
        weight: Tensor,
        labels: Tensor | None,
        full: bool,
    ) -> TeacherRows:
        """As ``TorchRowOps.teacher_rows``; ``acc`` is left alone for a row's first teacher, which
        lies in it, and for its last one, which ``gradient_rows`` reads from ``t``."""
        assert isinstance(student, TritonRows)
        cross = full or rule.kind in KL
        out = self._teacher(student_head, head, z, t, student, weight, labels, full, cross, before)
        if rule.kind in ("jsd", "skew_kl"):
            out.value, out.acc_mean = self._value(rule, z, t, student, before)
        elif rule.kind == "forward_kl":
            assert out.forward_kl is not None
            out.value, out.acc_mean = out.forward_kl, None
        elif rule.kind == "reverse_kl":
            assert out.reverse_kl is not None
            out.value = out.reverse_kl
        if acc is not None and before > 0 and not last:
            self._fold(rule.kind, parameter(rule), z, acc, t, student, before)
        return out

    def mixture_rows(
        self,
        student_head: Head,
        head: Head,
        z: Tensor,
        t: Tensor,
        student: StudentRows,
        *,
        acc: Tensor,
        before: int,
        weight: Tensor,
        labels: Tensor | None,
        full: bool,
    ) -> TeacherRows:
        """As ``TorchRowOps.mixture_rows``; the row's first teacher stays raw in ``acc``."""
        assert isinstance(student, TritonRows)
        out = self._teacher(student_head, head, z, t, student, weight, labels, full, full, before)
        if before > 0:
            self._fold("mixture", 0.0, z, acc, t, student, before)
            top, end = int(layout.ACC_SIDE + layout.SIDE_TOP), int(layout.ACC_SIDE + layout.SIDE_WEIGHT)
            student.table[top:end] = 0.0
            student.table[end] = 1.0
        return out

    def mixture_value(self, rule: Rule, z: Tensor, acc: Tensor, student: StudentRows, keep: bool) -> TeacherRows:
        """The divergence from the mixture in ``acc``, which is left as it is."""
        assert isinstance(student, TritonRows)
        value, mean = self._value(rule, z, acc, student, 0)
        return TeacherRows(value, None if rule.kind == "forward_kl" else mean, torch.isfinite(value))

    def gradient_rows(
        self,
        rule: Rule,
        z: Tensor,
        acc: Tensor,
        t: Tensor,
        student: StudentRows,
        *,
        teachers: int,
        acc_mean: Tensor,
        total_weight: Tensor,
        row_scale: Tensor,
        softcap: float | None,
        out: Tensor,
    ) -> None:
        """As ``TorchRowOps.gradient_rows``; with more than one of ``teachers``, the last is read
        from ``t``."""
        assert isinstance(student, TritonRows)
        self._launch(
            rows.gradient_kernel,
            z,
            z_ptr=z,
            acc_ptr=acc,
            t_ptr=t,
            table_ptr=student.table,
            mean_ptr=acc_mean,
            weight_ptr=total_weight,
            scale_ptr=row_scale,
            out_ptr=out,
            parameter=parameter(rule),
            cap=1.0 if softcap is None else softcap,
            z_stride=z.stride(0),
            acc_stride=acc.stride(0),
            t_stride=t.stride(0),
            table_stride=student.table.stride(0),
            out_stride=out.stride(0),
            KIND=rule.kind,
            RAW=teachers < 3,
            HAS_T=teachers > 1,
            CAP=softcap is not None,
        )

    def logprob_gradient_rows(
        self,
        z: Tensor,
        labels: Tensor,
        student: StudentRows,
        *,
        entropy: Tensor,
        logprob_scale: Tensor,
        entropy_scale: Tensor | None,
        softcap: float | None,
        out: Tensor,
    ) -> None:
        """As ``TorchRowOps.logprob_gradient_rows``."""
        assert isinstance(student, TritonRows)
        self._launch(
            rows.logprob_gradient_kernel,
            z,
            z_ptr=z,
            label_ptr=labels,
            table_ptr=student.table,
            entropy_ptr=entropy,
            logprob_scale_ptr=logprob_scale,
            entropy_scale_ptr=logprob_scale if entropy_scale is None else entropy_scale,
            out_ptr=out,
            cap=1.0 if softcap is None else softcap,
            z_stride=z.stride(0),
            table_stride=student.table.stride(0),
            out_stride=out.stride(0),
            HAS_ENTROPY=entropy_scale is not None,
            CAP=softcap is not None,
        )

    def _teacher(
        self,
        student_head: Head,
        head: Head,
        z: Tensor,
        t: Tensor,
        student: TritonRows,
        weight: Tensor,
        labels: Tensor | None,
        full: bool,
        cross: bool,
        before: int,
    ) -> TeacherRows:
        """Statistics of one teacher, and of the student where this is the first sweep over its
        rows; ``value`` is still to be filled."""
        pending = student_head if student.pending and before == 0 else None
        results, finite = self._statistics(
            student, z, labels, student_head=pending, head=head, t=t, weight=weight, cross=cross, side=side_of(before)
        )
        out = TeacherRows(torch.zeros_like(finite, dtype=torch.float32), results[int(layout.MEAN_GAP)], finite)
        if cross:
            out.reverse_kl, out.forward_kl = results[int(layout.REVERSE_KL)], results[int(layout.FORWARD_KL)]
        if full:
            out.entropy, out.top1_prob = results[int(layout.Q_ENTROPY)], results[int(layout.Q_TOP1)]
            out.agreement = results[int(layout.Q_AGREES)]
            out.logprob = None if labels is None else results[int(layout.Q_LOGPROB)]
        return out

    def _statistics(
        self,
        student: TritonRows,
        z: Tensor,
        labels: Tensor | None,
        *,
        student_head: Head | None,
        head: Head | None = None,
        t: Tensor | None = None,
        weight: Tensor | None = None,
        cross: bool = False,
        side: int = 0,
    ) -> tuple[Tensor, Tensor]:
        """One sweep over ``z`` and ``t`` and the merge of its partials: (results [RESULTS, c],
        finite [c]).

        ``student_head`` is None where the student's rows are known, ``head`` where there is no
        teacher.
        """
        count, full = z.shape[0], student.entropy is not None
        t = z if t is None else t
        partial = z.new_empty(layout.PARTIALS, count, self.splits)
        results = z.new_empty(layout.RESULTS, count)
        finite = torch.empty(count, dtype=torch.bool, device=z.device)
        flags = {"STUDENT": student_head is not None, "TEACHER": head is not None, "CROSS": cross, "FULL": full}
        self._launch(
            rows.statistics_kernel,
            z,
            z_ptr=z,
            t_ptr=t,
            table_ptr=student.table,
            partial_ptr=partial,
            rows=count,
            z_stride=z.stride(0),
            t_stride=t.stride(0),
            table_stride=student.table.stride(0),
            **flags,
            **finishing("z", student_head, z),
            **finishing("t", head, t),
        )
        group = min(MERGE_ELEMENTS // self.merge_splits, triton.next_power_of_2(count)) or 1
        with device_of(z):
            rows.merge_kernel[(triton.cdiv(count, group),)](
                partial,
                z,
                t,
                partial if labels is None else labels,
                partial if weight is None else weight,
                student.table,
                results,
                finite,
                count,
                self.splits,
                z.stride(0),
                t.stride(0),
                0 if weight is None else weight.stride(0),
                student.table.stride(0),
                results.stride(0),
                LABELS=full and labels is not None,
                SIDE=side,
                ROWS=group,
                SPLITS=self.merge_splits,
                **flags,
                **rows.OPTIONS,
            )
        return results, finite

    def _value(self, rule: Rule, z: Tensor, t: Tensor, student: TritonRows, before: int) -> tuple[Tensor, Tensor]:
        """(divergence, E_p[a]), each [c], from the teacher or mixture in ``t``."""
        partial = z.new_empty(2, z.shape[0], self.splits)
        self._launch(
            rows.value_kernel,
            z,
            z_ptr=z,
            t_ptr=t,
            table_ptr=student.table,
            partial_ptr=partial,
            parameter=parameter(rule),
            rows=z.shape[0],
            z_stride=z.stride(0),
            t_stride=t.stride(0),
            table_stride=student.table.stride(0),
            KIND=rule.kind,
            SIDE=side_of(before),
        )
        value, mean = partial.sum(2)
        return value, mean

    def _fold(
        self, kind: str, number: float, z: Tensor, acc: Tensor, t: Tensor, student: TritonRows, before: int
    ) -> None:
        """Add the teacher in ``t`` to ``acc``, which holds the raw logits of the only teacher
        before it, or folded terms."""
        self._launch(
            rows.fold_kernel,
            z,
            z_ptr=z,
            acc_ptr=acc,
            t_ptr=t,
            table_ptr=student.table,
            parameter=number,
            z_stride=z.stride(0),
            acc_stride=acc.stride(0),
            t_stride=t.stride(0),
            table_stride=student.table.stride(0),
            KIND=kind,
            RAW=before == 1,
        )

    def _launch(self, kernel: Any, z: Tensor, **arguments: Any) -> None:
        """One program per block of columns and row of ``z``."""
        with device_of(z):
            kernel[(z.shape[0] * self.splits,)](
                splits=self.splits,
                vocab=self.vocab,
                width=self.width,
                BLOCK=self.block,
                **arguments,
                **rows.OPTIONS,
            )


def parameter(rule: Rule) -> float:
    """The number that the kernels of this divergence need."""
    return rule.alpha if rule.kind == "skew_kl" else rule.beta


def side_of(before: int) -> int:
    """Where the table describes a teacher's raw logits: a row's first teacher lies in ``acc``."""
    return int(layout.ACC_SIDE if before == 0 else layout.T_SIDE)


def finishing(prefix: str, head: Head | None, like: Tensor) -> dict[str, Any]:
    """Kernel arguments that finish the logits of ``head``; None: they are finished."""
    bias = None if head is None else head.bias
    cap = None if head is None or head.softcap is None else head.softcap / head.temperature
    name = prefix.upper()
    return {
        f"{prefix}_bias_ptr": like if bias is None else bias,
        f"{prefix}_factor": 1.0 if head is None else head.factor,
        f"{prefix}_cap": 1.0 if cap is None else cap,
        f"{name}_BIAS": bias is not None,
        f"{name}_CAP": cap is not None,
        f"{name}_FLOOR": head is not None and head.floor,
    }


def device_of(tensor: Tensor) -> torch.cuda.device_of:
    """Kernels start on the current device: make it the tensor's. Does nothing on a CPU."""
    return torch.cuda.device_of(tensor)
