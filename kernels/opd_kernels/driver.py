"""The chunk driver: streams student and teacher logits through a fixed workspace and hands the
sweeps to row operations.

Per chunk of c rows: student logits into ``z``; each teacher's logits into ``acc`` (its rows' first
teacher) or into one reused buffer ``t``; the row operations turn them into statistics and gather d
divergence / d p in ``acc`` (the row's last teacher may stay in ``t``); from these dZ is formed,
and the gradient GEMMs follow. The workspace does not depend on the number of teachers.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .chunking import ChunkPlan, plan_chunks, spans
from .compaction import Compactor, block_bytes, scratch_bytes
from .heads import HeadGradient, Wants, gather, half_gradient, needs_upcast
from .row_ops import make_row_ops, row_layout
from .selection import RowPlan, capturing
from .torch_impl import StudentRows, TeacherRows
from .types import Head, Problem, TokenStats

TEACHER_STATS = {
    "entropy": "teacher_entropy",
    "top1_prob": "teacher_top1_prob",
    "agreement": "top1_agreement",
    "reverse_kl": "reverse_kl",
    "forward_kl": "forward_kl",
    "logprob": "teacher_logprob",
}


@dataclass
class Outcome:
    """Per-token losses [N] and statistics (NaN where not computed), and the gradients that were
    asked for; ``dropped`` [N] where a tolerance may drop some of them."""

    token_loss: Tensor
    stats: TokenStats | None
    hidden: Tensor | None = None
    weight: Tensor | None = None
    bias: Tensor | None = None
    dropped: Tensor | None = None


class Workspace:
    """The buffers of one pass, allocated once."""

    def __init__(
        self, plan: ChunkPlan, vocab: int, like: Tensor, buffers: int, tile_width: int, width: int | None = None
    ) -> None:
        """Buffers of ``vocab`` columns whose rows lie ``width`` elements apart."""
        self.plan = plan
        width = vocab if width is None else width
        self.storage = storage = like.new_empty(buffers, plan.chunk_rows, width)[..., :vocab]
        self.z, self.acc, self.t = storage[0], storage[min(1, buffers - 1)], storage[buffers - 1]
        self.tile = like.new_empty(plan.weight_rows * tile_width) if plan.weight_rows else None
        self.gradient = None
        if plan.gradient_rows:
            self.gradient = like.new_empty(plan.gradient_rows, width, dtype=torch.bfloat16)[:, :vocab]


def run_divergence(problem: Problem, rows: RowPlan, row_scale: Tensor | None, wants: Wants) -> Outcome:
    """Solve ``problem`` for the rows of ``rows``.

    Args:
        problem: the validated call.
        rows: what is computed.
        row_scale: [N] factor of each row's gradient; read only when a gradient is wanted.
        wants: the gradients to compute.

    Raises:
        ValueError: a teacher's logits hold NaN or inf; names the teacher and the first row.
    """
    if problem.shards is not None:
        from .vocab_parallel import run_sharded

        return run_sharded(problem, rows, row_scale, wants)
    like = problem.student.hidden.new_empty(0, dtype=problem.compute_dtype)
    outcome = Outcome(like.new_full((problem.rows,), float("nan")), None)
    if problem.stats:
        outcome.stats = TokenStats.empty(
            problem.rows, len(problem.teachers), problem.labels is not None, like, problem.backward_tolerance > 0
        )
    gradient = HeadGradient(problem.student, wants, rows, problem.compute_dtype)
    if rows.count:
        _Pass(problem, rows, row_scale, wants, outcome, gradient, like).run()
    if outcome.stats is not None:
        outcome.stats.fill_gap()
        if outcome.stats.dropped_mass is not None and outcome.dropped is not None:
            outcome.stats.dropped_mass.copy_(outcome.dropped)
    outcome.hidden, outcome.weight, outcome.bias = gradient.finish()
    return outcome


class _Pass:
    """One traversal of the chunks; holds what every step of it needs."""

    def __init__(
        self,
        problem: Problem,
        rows: RowPlan,
        row_scale: Tensor | None,
        wants: Wants,
        outcome: Outcome,
        gradient: HeadGradient,
        like: Tensor,
    ) -> None:
        self.problem, self.rows, self.row_scale, self.wants = problem, rows, row_scale, wants
        self.outcome, self.gradient = outcome, gradient
        self.accumulates = bool(wants) or problem.mixture
        buffers = 3 if self.accumulates and not rows.single_teacher() else 2
        heads = (problem.student, *problem.teachers)
        self.workspace = make_workspace(problem, heads, rows.count, buffers, wants, like)
        self.ops = make_row_ops(problem.impl, self.workspace.plan.tile_rows, problem.student.vocab, like)
        self.finite = torch.ones(rows.count, len(problem.teachers), dtype=torch.bool, device=like.device)
        self.compactor = None
        if problem.backward_tolerance and wants:
            self.compactor = Compactor(problem.backward_tolerance, rows, problem.rows, self.workspace.plan, like)
            outcome.dropped = self.compactor.dropped
        self.sink = GradientSink(self.workspace, gradient, problem.student, rows, self.compactor)

    def run(self) -> None:
        for start, stop in spans(self.rows.count, self.workspace.plan.chunk_rows):
            self._chunk(start, stop)
        self.sink.flush()
        report_bad_teacher(self.problem, self.rows, self.finite)

    def _chunk(self, start: int, stop: int) -> None:
        problem, rows = self.problem, self.rows
        z, acc = self.workspace.z[: stop - start], self.workspace.acc[: stop - start]
        labels = None if problem.labels is None else gather(problem.labels, rows.index, start, stop)
        mix = gather(problem.mix, rows.index, start, stop)
        hidden = gather(problem.student.hidden, rows.index, start, stop)
        self.ops.write_logits(problem.student, hidden, z, self.workspace.tile)
        student = self.ops.student_rows(problem.student, z, labels, problem.stats, joint=True)

        value, acc_mean = z.new_zeros(stop - start), z.new_zeros(stop - start)
        for k in range(len(problem.teachers)):
            for left, right, place in rows.segments(k, start, stop):
                part = slice(left - start, right - start)
                weight = mix[part, k]
                result = self._teacher(k, left, right, place, z[part], acc[part], student, part, weight, labels)
                self._teacher_stats(result, k, left, right)
                if not problem.mixture:
                    value[part] += weight * result.value
                    if result.acc_mean is not None:
                        acc_mean[part] += weight * result.acc_mean
        if problem.mixture:
            result = self.ops.mixture_value(problem.rule, z, acc, student, keep=bool(self.wants))
            value = result.value
            acc_mean = acc_mean if result.acc_mean is None else result.acc_mean
        self._student_stats(student, start, stop)
        rows.scatter(self.outcome.token_loss, value, start, stop)
        if self.wants:
            self._gradient(z, acc, student, hidden, acc_mean, mix.sum(1), start, stop)

    def _teacher(
        self,
        k: int,
        left: int,
        right: int,
        place: tuple[int, bool],
        z: Tensor,
        acc: Tensor,
        student: StudentRows,
        part: slice,
        weight: Tensor,
        labels: Tensor | None,
    ) -> TeacherRows:
        """Logits and row operations of teacher ``k`` on the computed rows ``left:right``, the
        ``part`` of the chunk; ``place`` as ``RowPlan.segments`` gives it."""
        problem, teacher = self.problem, self.problem.teachers[k]
        before, last = place
        t = acc if before == 0 and self.accumulates else self.workspace.t[part]
        hidden = gather(teacher.hidden, self.rows.index, left, right)
        self.ops.write_logits(teacher, hidden, t, self.workspace.tile)
        student = student.part(part.start, part.stop)
        labels = None if labels is None else labels[part]
        if problem.mixture:
            result = self.ops.mixture_rows(
                problem.student,
                teacher,
                z,
                t,
                student,
                acc=acc,
                before=before,
                weight=weight,
                labels=labels,
                full=problem.stats,
            )
        else:
            result = self.ops.teacher_rows(
                problem.rule,
                problem.student,
                teacher,
                z,
                t,
                student,
                acc=acc if self.wants else None,
                before=before,
                last=last,
                weight=weight,
                labels=labels,
                full=problem.stats,
            )
        self.finite[left:right, k] = result.finite
        return result

    def _gradient(
        self,
        z: Tensor,
        acc: Tensor,
        student: StudentRows,
        hidden: Tensor,
        acc_mean: Tensor,
        total_weight: Tensor,
        start: int,
        stop: int,
    ) -> None:
        head = self.problem.student
        assert self.row_scale is not None
        row_scale = gather(self.row_scale, self.rows.index, start, stop)
        out, row_scale = self.sink.reserve(acc), row_scale * head.factor
        groups = [(start, stop, 1)] if self.problem.mixture else self.rows.groups(start, stop)
        for left, right, teachers in groups:
            part = slice(left - start, right - start)
            self.ops.gradient_rows(
                self.problem.rule,
                z[part],
                acc[part],
                self.workspace.t[part],
                student.part(part.start, part.stop),
                teachers=teachers,
                acc_mean=acc_mean[part],
                total_weight=total_weight[part],
                row_scale=row_scale[part],
                softcap=None if head.softcap is None else head.softcap / head.temperature,
                out=out[part],
            )
        self.sink.commit(out, hidden, start, stop)

    def _student_stats(self, student: StudentRows, start: int, stop: int) -> None:
        stats = self.outcome.stats
        if stats is None:
            return
        assert student.entropy is not None
        self.rows.scatter(stats.student_entropy, student.entropy, start, stop)
        if stats.student_logprob is not None and student.logprob is not None:
            self.rows.scatter(stats.student_logprob, student.logprob, start, stop)

    def _teacher_stats(self, result: TeacherRows, k: int, left: int, right: int) -> None:
        stats = self.outcome.stats
        if stats is None:
            return
        for source, name in TEACHER_STATS.items():
            target, values = getattr(stats, name), getattr(result, source)
            if target is not None and values is not None:
                self.rows.scatter(target, values, left, right, column=k)


class GradientSink:
    """Collects dZ of several chunks where it is stored in half precision, and runs the gradient
    GEMMs.

    In the compute dtype dZ lies in the accumulator of its chunk and is used at once.
    """

    def __init__(
        self,
        workspace: Workspace,
        gradient: HeadGradient,
        head: Head,
        rows: RowPlan,
        compactor: Compactor | None = None,
    ) -> None:
        self.workspace, self.gradient, self.head, self.rows = workspace, gradient, head, rows
        self.compactor = compactor
        self.start = self.stop = 0

    def reserve(self, in_place: Tensor) -> Tensor:
        """Where dZ of the next chunk goes; ``in_place`` [c, V] is its accumulator."""
        buffer = self.workspace.gradient
        if buffer is None:
            return in_place
        if self.stop - self.start + in_place.shape[0] > buffer.shape[0]:
            self.flush()
        used = self.stop - self.start
        return buffer[used : used + in_place.shape[0]]

    def commit(self, dz: Tensor, hidden: Tensor, start: int, stop: int) -> None:
        """dZ of the computed rows ``start:stop`` is ready in ``dz``, which ``reserve`` returned."""
        if self.workspace.gradient is None:
            self._add(dz, hidden, start, stop)
        else:
            self.stop = stop

    def flush(self) -> None:
        """Run the GEMMs of everything collected."""
        if self.workspace.gradient is None or self.stop == self.start:
            return
        dz = self.workspace.gradient[: self.stop - self.start]
        hidden = gather(self.head.hidden, self.rows.index, self.start, self.stop)
        self._add(dz, hidden, self.start, self.stop)
        self.start = self.stop

    def _add(self, dz: Tensor, hidden: Tensor, start: int, stop: int) -> None:
        if self.compactor is None:
            self.gradient.add(dz, hidden, start, stop, self.workspace.tile)
        else:
            self.compactor.add(self.gradient, dz, hidden, start, stop, self.workspace.tile)


def make_workspace(
    problem: Problem, heads: tuple[Head, ...], rows: int, buffers: int, wants: Wants, like: Tensor
) -> Workspace:
    """Plan the chunks of ``problem`` and allocate their buffers."""
    student = problem.student
    halves = bool(wants) and half_gradient(student.weight, like.dtype)
    upcasts = [needs_upcast(head.weight, like.dtype, gradient=False) for head in heads]
    upcasts.append(wants.hidden and needs_upcast(student.weight, like.dtype, gradient=True))
    widths = tuple(head.weight.shape[1] for head in heads)
    columns, scratch_tiles = row_layout(problem.impl, student.vocab)
    fixed = blocks = 0
    if problem.backward_tolerance and wants:
        scratch_tiles += 1
        fixed, blocks = scratch_bytes(student.vocab, like.itemsize), block_bytes(like.device)
    plan = plan_chunks(
        rows=rows,
        vocab=columns,
        hidden_sizes=widths,
        buffers=buffers,
        scratch_tiles=scratch_tiles,
        upcast=any(upcasts),
        half_gradient=halves,
        dtype=like.dtype,
        device=like.device,
        workspace_bytes=problem.workspace_bytes,
        fixed_bytes=fixed,
        block_bytes=blocks,
    )
    return Workspace(plan, student.vocab, like, buffers, max(widths), columns)


def report_bad_teacher(problem: Problem, rows: RowPlan, finite: Tensor) -> None:
    """Raise for the first teacher row whose logits are NaN or inf while the student's are finite; not
    while a CUDA graph is captured.

    A student that is not finite makes its own loss NaN instead: gradient scalers rely on seeing it.
    """
    if capturing(finite.device) or bool(finite.all()):
        return
    places = torch.arange(rows.count, device=finite.device) if rows.index is None else rows.index
    for k, teacher in enumerate(problem.teachers):
        suspects = places[~finite[:, k]]
        for row in torch.sort(suspects).values.tolist():
            if not _finite_logits(problem.student, row, problem.compute_dtype):
                continue
            raise ValueError(
                f"teachers[{k}] has NaN or inf logits, first at row {row} "
                f"(hidden finite: {bool(torch.isfinite(teacher.hidden[row]).all())}): give the row token_weight 0 or "
                f"mix[{row}, {k}] = 0, or repair the teacher's hidden states or weight"
            )


def _finite_logits(head: Head, row: int, dtype: torch.dtype) -> bool:
    hidden = head.hidden[row].to(dtype)
    for start, stop in spans(head.vocab, 8192):
        if not bool(torch.isfinite(head.weight[start:stop].to(dtype) @ hidden).all()):
            return False
    return True
