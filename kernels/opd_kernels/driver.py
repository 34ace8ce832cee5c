"""The chunk driver: streams logits of the student and its teachers through a fixed workspace and hands them to
row operations.

Per chunk of c rows: student logits into buffer 0, those of a row's j-th teacher into buffer j; row statistics
(``table``); the terms of divergences that need the normalisers first; dZ; and the gradient GEMMs. A vocabulary that
is split over ranks (``shards``) is one more level of the same merge: after a chunk's statistics one all-gather of
``MERGED`` numbers per row and head, after its terms one all-reduce of two numbers per row. The value and every
statistic follow from the table, once, after the last chunk.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from . import table as fields
from .chunk import Chunk, Task
from .chunking import ChunkPlan, plan_chunks, spans
from .heads import HeadGradient, Wants, gather, half_gradient, needs_upcast
from .problem import KL, STATS_ONLY, Head, Problem
from .row_ops import make_row_ops, row_layout
from .sampling import Sampler, block_bytes, block_rows, scratch_bytes
from .selection import RowPlan, Run, capturing
from .table import ARG, LABEL_SCALE, LOG, MEAN, MERGED, SCALE, VALUE, WEIGHT
from .teacher_check import TeacherCheck
from .types import TokenStats


@dataclass(frozen=True)
class Scales:
    """Factors [N] of the terms of the loss: of each row's divergence, and of its -log p(label), if any."""

    divergence: Tensor
    logprob: Tensor | None = None

    def times(self, factor: Tensor) -> Scales:
        return Scales(self.divergence * factor, None if self.logprob is None else self.logprob * factor)


@dataclass(frozen=True)
class SomeRows:
    """A uniform sample of the rows that have a teacher: ``chosen`` [N] of them, ``count`` of ``total``; ``exact``
    is a scalar, NaN where a student's logits are not finite on any row and else 1."""

    chosen: Tensor
    count: int
    total: int
    exact: Tensor

    def error(self, values: Tensor) -> Tensor:
        """Standard error of ``total / count`` times the sum of the chosen ``values`` [N], which are 0 elsewhere."""
        if self.count in (1, self.total):
            return values.new_zeros(()) if self.count == self.total else values.new_full((), float("nan"))
        spread = (values.square().sum() - values.sum().square() / self.count) / (self.count - 1)
        left = (1 - self.count / self.total) / self.count
        return self.total * (spread.clamp(min=0.0) * left).sqrt()


@dataclass
class Outcome:
    """Per-token losses [N] and log-probs of the labels (NaN where not computed), and the gradients that were
    asked for. With sampled columns also the first three numbers of a ``SampleReport`` and all four of them, and,
    where values were computed for some rows only, which."""

    token_loss: Tensor
    stats: TokenStats | None
    logprob: Tensor | None = None
    hidden: Tensor | None = None
    weight: Tensor | None = None
    bias: Tensor | None = None
    sampling: Tensor | None = None
    some: SomeRows | None = None
    report: Tensor | None = None
    checks: list[TeacherCheck] = field(default_factory=list)

    def check(self) -> None:
        """Wait for the device and raise where a teacher's logits are not finite: the last thing of a call.

        Raises:
            ValueError: a teacher's logits hold NaN or inf; names the teacher and the first row.
        """
        for check in self.checks:
            check()
        self.checks.clear()


class Workspace:
    """The buffers of one pass, allocated once."""

    def __init__(
        self, plan: ChunkPlan, vocab: int, like: Tensor, buffers: int, tile_width: int, width: int, half: torch.dtype
    ) -> None:
        """Buffers of ``vocab`` columns whose rows lie ``width`` elements apart; ``half`` is the dtype of a
        gathered dZ."""
        self.plan = plan
        self.logits = like.new_empty(buffers, plan.chunk_rows, width)[..., :vocab]
        self.tile = like.new_empty(plan.weight_rows * tile_width) if plan.weight_rows else None
        self.gradient = None
        if plan.gradient_rows:
            self.gradient = like.new_empty(plan.gradient_rows, width, dtype=half)[:, :vocab]

    @property
    def storage(self) -> torch.dtype | None:
        """dtype in which dZ is gathered, None where it is used at once."""
        return None if self.gradient is None else self.gradient.dtype


class Pass:
    """One traversal of the chunks; holds what every step of it needs."""

    def __init__(
        self,
        problem: Problem,
        rows: RowPlan,
        scales: Scales | None,
        wants: Wants,
        outcome: Outcome,
        gradient: HeadGradient,
        like: Tensor,
    ) -> None:
        self.problem, self.rows, self.outcome = problem, rows, outcome
        self.task = self.task_of(problem, wants)
        self.workspace = make_workspace(problem, rows, wants, like, self.buffers(rows))
        plan, student = self.workspace.plan, problem.student
        self.ops = make_row_ops(problem.impl, self.task, plan.tile_rows, student.vocab, like)
        self.labels = self._labels()
        self.sampler = None
        if problem.sampling is not None and wants:
            self.sampler = Sampler(problem.sampling, student, problem.shards, plan, like, problem.impl)
        self.gradient = gradient
        self.sink = GradientSink(self.workspace, gradient, student, rows, self.sampler)
        self.table = self._table(self._scaled(scales) if scales and wants else None, like)

    @staticmethod
    def task_of(problem: Problem, wants: Wants) -> Task:
        """What the row operations are to compute."""
        return make_task(problem, wants)

    @staticmethod
    def buffers(rows: RowPlan) -> int:
        """[c, V] buffers of logits."""
        return 1 + rows.most_teachers()

    def _scaled(self, scales: Scales) -> Scales:
        """What the gradient's storage wants its factors to be."""
        storage = self.workspace.storage if self.sampler is None else self.sampler.operand
        factor = self.gradient.choose_scale(storage, scales.divergence, scales.logprob)
        return scales if factor is None else scales.times(factor)

    def _labels(self) -> Tensor | None:
        """[n] column of each computed row's label, -1 where another rank holds it."""
        problem = self.problem
        if problem.labels is None or not (problem.stats or problem.logprob_weight is not None):
            return None
        labels = gather(problem.labels, self.rows.index, 0, self.rows.count)
        if problem.shards is not None:
            columns, here = problem.shards.localise(labels)
            return torch.where(here, columns, -1)
        return labels

    def _table(self, scales: Scales | None, like: Tensor) -> Tensor:
        """The table of all computed rows: its inputs, and zeros."""
        problem, rows = self.problem, self.rows
        table = like.new_zeros(self.workspace.logits.shape[0], fields.FIELDS, rows.count)
        mix = gather(problem.mix, rows.index, 0, rows.count)
        for run in rows.runs:
            for head, k in zip(range(1, len(table)), run.names, strict=False):
                table[head, WEIGHT, run.start : run.stop] = mix[run.start : run.stop, k]
        if scales is not None:
            table[0, SCALE] = gather(scales.divergence, rows.index, 0, rows.count) * problem.student.factor
            if scales.logprob is not None:
                table[0, LABEL_SCALE] = gather(scales.logprob, rows.index, 0, rows.count) * problem.student.factor
        return table

    def run(self) -> None:
        for start, stop in spans(self.rows.count, self.workspace.plan.chunk_rows):
            self._chunk(start, stop)
        self.sink.flush()
        for run in self.rows.runs:
            self._report(run)
        if not capturing(self.table.device):
            self.outcome.checks.append(TeacherCheck(self.problem, self.rows, self.table))

    def _chunk(self, start: int, stop: int) -> None:
        problem, rows, logits = self.problem, self.rows, self.workspace.logits
        hidden = gather(problem.student.hidden, rows.index, start, stop)
        self.ops.write_logits(problem.student, hidden, logits[0, : stop - start], self.workspace.tile)
        for k, teacher in enumerate(problem.teachers):
            for left, right, before in rows.places(k, start, stop):
                own = gather(teacher.hidden, rows.index, left, right)
                self.ops.write_logits(
                    teacher, own, logits[1 + before, left - start : right - start], self.workspace.tile
                )
        out = None
        if self.task.gradient:
            out = self.sink.reserve(logits[min(1, logits.shape[0] - 1), : stop - start])
        chunks = [self._part(run, left, right, start, out) for run, left, right in rows.overlaps(start, stop)]
        self._solve(chunks, start, stop)
        if out is not None:
            self.sink.commit(out, hidden, start, stop)

    def _part(self, run: Run, left: int, right: int, start: int, out: Tensor | None) -> Chunk:
        """Rows ``left:right`` of the chunk from ``start`` on, all of one run."""
        heads, part = 1 + len(run.names), slice(left - start, right - start)
        return Chunk(
            self.workspace.logits[:heads, part],
            self.table[:heads, :, left:right],
            None if self.labels is None else self.labels[left:right],
            None if out is None else out[part],
        )

    def _solve(self, chunks: list[Chunk], start: int, stop: int) -> None:
        """Every stage of the parts of rows ``start:stop``."""
        shards = self.problem.shards
        if shards is None:
            for chunk in chunks:
                self.ops.solve(chunk)
            return
        for chunk in chunks:
            self.ops.statistics(chunk)
        whole = self.table[:, :, start:stop]
        whole[:, :MERGED] = fields.merge(shards.gather(whole[:, :MERGED]))
        if not self.task.one_sweep:
            for chunk in chunks:
                self.ops.terms(chunk)
            sums = whole[0, VALUE : MEAN + 1].contiguous()
            whole[0, VALUE : MEAN + 1] = shards.sum_(sums)
        if self.task.gradient:
            for chunk in chunks:
                self.ops.gradient(chunk)

    def _report(self, run: Run) -> None:
        """Losses and statistics of a run, from its table."""
        self._report_student(run)
        put, stats = partial(self._put, run), self.outcome.stats
        table = self.table[: 1 + len(run.names), :, run.start : run.stop]
        if run.names and self.task.kind != STATS_ONLY.kind:
            put(self.outcome.token_loss, self._value(table))
        if stats is None:
            return
        for head, k in enumerate(run.names, 1):
            put(stats.teacher_entropy, fields.entropy(table, head), k)
            put(stats.teacher_top1_prob, (-table[head, LOG]).exp(), k)
            put(stats.top1_agreement, (table[head, ARG] == table[0, ARG]).to(table.dtype), k)
            put(stats.reverse_kl, fields.reverse_kl(table, head), k)
            put(stats.forward_kl, fields.forward_kl(table, head), k)
            if self.labels is not None:
                put(stats.teacher_logprob, fields.logprob(table, head), k)

    def _report_student(self, run: Run) -> None:
        """What a run says about the student alone."""
        stats, table = self.outcome.stats, self.table[:1, :, run.start : run.stop]
        if stats is not None:
            self._put(run, stats.student_entropy, fields.entropy(table, 0))
        if self.labels is not None:
            self._put(run, self.outcome.logprob, fields.logprob(table, 0))
            self._put(run, None if stats is None else stats.student_logprob, fields.logprob(table, 0))

    def _put(self, run: Run, target: Tensor | None, values: Tensor, column: int | None = None) -> None:
        """Write the values of a run's rows to their places."""
        if target is not None:
            self.rows.scatter(target, values, run.start, run.stop, column)

    def _value(self, table: Tensor) -> Tensor:
        """[m] divergence of the rows of ``table``."""
        if not self.task.one_sweep:
            return table[0, VALUE]
        of = fields.reverse_kl if self.task.kind == KL[0] else fields.forward_kl
        heads = range(1, table.shape[0])
        return torch.stack([table[head, WEIGHT] * of(table, head) for head in heads]).sum(0)


class GradientSink:
    """Collects dZ of several chunks where it is stored in half precision, and runs the gradient
    GEMMs.

    In the compute dtype dZ lies in a buffer of its chunk and is used at once.
    """

    def __init__(
        self,
        workspace: Workspace,
        gradient: HeadGradient,
        head: Head,
        rows: RowPlan,
        sampler: Sampler | None = None,
    ) -> None:
        self.workspace, self.gradient, self.head, self.rows = workspace, gradient, head, rows
        self.sampler = sampler
        self.start = self.stop = 0

    def reserve(self, in_place: Tensor) -> Tensor:
        """Where dZ of the next chunk goes; ``in_place`` [c, V] is a buffer of it."""
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
        if self.sampler is None:
            self.gradient.add(dz, hidden, start, stop, self.workspace.tile)
        else:
            self.sampler.add(self.gradient, dz, hidden, start, stop)


def make_task(problem: Problem, wants: Wants) -> Task:
    """What the row operations of ``problem`` are to compute."""
    student, shards = problem.student, problem.shards
    return Task(
        rule=problem.rule,
        mixture=problem.mixture,
        full=problem.stats,
        gradient=bool(wants),
        label_term=problem.logprob_weight is not None,
        softcap=None if student.softcap is None else student.softcap / student.temperature,
        first_column=0 if shards is None else shards.start,
        first_rank=shards is None or shards.rank == 0,
    )


def make_workspace(problem: Problem, rows: RowPlan, wants: Wants, like: Tensor, buffers: int) -> Workspace:
    """Plan the chunks of ``problem`` and allocate their ``buffers``. The plan depends on nothing that differs
    between ranks: they must agree on the chunks."""
    student, shards = problem.student, problem.shards
    heads = (student, *problem.teachers)
    sampling = problem.sampling if wants else None
    sampled = sampling is not None and problem.teachers_sampled
    halves = bool(wants) and half_gradient(student.weight, like.dtype) and not sampled
    upcasts = [needs_upcast(head.weight, like.dtype) for head in heads]
    widths = tuple(head.weight.shape[1] for head in heads)
    columns, scratch_tiles = row_layout(problem.impl, student.vocab if shards is None else shards.widest)
    fixed = blocks = 0
    if sampling is not None:
        scratch_tiles += 1
        device, blocks = like.device, block_bytes(like.device)
        fixed = scratch_bytes(sampling.share, columns, rows.count, like.itemsize, device)
    plan = plan_chunks(
        rows=rows.count,
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
        block_rows=0 if sampling is None else block_rows(like.device),
    )
    width, _ = row_layout(problem.impl, student.vocab)
    return Workspace(plan, student.vocab, like, buffers, max(widths), width, student.weight.dtype)
