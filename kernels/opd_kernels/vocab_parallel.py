"""The chunk driver of a vocabulary that is split over ranks.

Every rank holds the same hidden states and its shard of every head, and forms logits, dZ and the
weight's gradient for its own columns only. A row's statistics over the whole vocabulary follow from
those of the shards by the chain rule: with P_r the student's mass on rank r, p_r its distribution
inside (Q_r, q_r the teacher's),

    H(p) = sum_r P_r (H(p_r) - log P_r),  KL(p || q) = sum_r P_r (KL(p_r || q_r) + log P_r - log Q_r),

and P_r follows from every shard's maximum and log-sum. Each term is small where the total is, so no
accuracy is lost by merging.

Collectives per chunk, each for the student and all teachers at once:

- reverse KL, forward KL and statistics: one, an all-gather of at most 4 + 7 K numbers per row;
- JSD, skew KL and mixtures: two. Their terms are not linear in log P_r and log Q_r, so the value can
  only be swept after the gather; an all-reduce of 2 + K numbers per row then sums it.

Per call there are two more: a header by which the ranks agree on the split, and the sum of the
hidden states' gradient. All logits of a chunk are alive together, (1 + teachers of a row) buffers of
the shard's width, which is what lets the teachers share a collective.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor

from .chunking import SCRATCH_TILES, plan_chunks, spans
from .driver import TEACHER_STATS, GradientSink, Outcome, Workspace
from .heads import HeadGradient, Wants, gather, half_gradient, needs_upcast
from .selection import RowPlan, joined
from .shards import NO_COLUMN, Shards
from .torch_impl import SWEEPS, StudentRows, Tile, TorchRowOps, dot
from .types import STATS_ONLY, Head, Problem, TokenStats

KL = ("reverse_kl", "forward_kl")


def run_sharded(problem: Problem, rows: RowPlan, row_scale: Tensor | None, wants: Wants) -> Outcome:
    """``driver.run_divergence`` for a problem with ``shards``; same arguments and results.

    The gradients of weight and bias are those of this rank's shard, the gradient of the hidden
    states is summed over the ranks.
    """
    like = problem.student.hidden.new_empty(0, dtype=problem.compute_dtype)
    outcome = Outcome(like.new_full((problem.rows,), float("nan")), None)
    if problem.stats:
        outcome.stats = TokenStats.empty(problem.rows, len(problem.teachers), problem.labels is not None, like)
    assert problem.shards is not None
    gradient = ShardGradient(problem.student, wants, rows, problem.compute_dtype, problem.shards)
    if rows.count:
        _ShardedPass(problem, rows, row_scale, wants, outcome, gradient, like).run()
    if outcome.stats is not None:
        outcome.stats.fill_gap()
    outcome.hidden, outcome.weight, outcome.bias = gradient.finish()
    return outcome


class ShardGradient(HeadGradient):
    """Gradients of a head's shard; that of the hidden states is summed over the ranks in the
    compute dtype."""

    def __init__(self, head: Head, wants: Wants, rows: RowPlan, compute_dtype: torch.dtype, shards: Shards) -> None:
        super().__init__(head, Wants(False, wants.weight, wants.bias), rows, compute_dtype)
        self.wants, self.shards = wants, shards
        if wants.hidden:
            self.hidden = head.hidden.new_zeros(head.hidden.shape, dtype=compute_dtype)

    def finish(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        if self.hidden is not None:
            self.shards.sum_(self.hidden)
        return super().finish()


@dataclass
class Partials:
    """Statistics of one head's rows inside this rank's shard; every field [c].

    ``top`` largest logit, ``log_sum`` log sum exp(logit - top): together the shard's mass.
    ``label`` is the log-prob of the label inside the shard, 0 where the label is elsewhere. The
    other fields are those of the shard's own distributions; None where they are not needed.
    """

    top: Tensor
    log_sum: Tensor
    entropy: Tensor | None = None
    argmax: Tensor | None = None
    label: Tensor | None = None
    reverse_kl: Tensor | None = None
    forward_kl: Tensor | None = None

    @classmethod
    def empty(cls, count: int, like: Tensor, full: bool, labels: bool, kl: tuple[str, ...]) -> Partials:
        """Partials of a shard without columns, until something is written."""
        names = ["top", "log_sum", *(("entropy", "argmax") if full else ()), *(("label",) if labels else ()), *kl]
        values = {name: like.new_zeros(count) for name in names}
        values["top"].fill_(NO_COLUMN)
        return cls(**values)

    def present(self) -> list[Tensor]:
        return [x for f in fields(self) if (x := getattr(self, f.name)) is not None]

    def unpack(self, gathered: list[Tensor]) -> Partials:
        """The same fields from every rank, [R, c] each, taken off the front of ``gathered``."""
        return Partials(
            **{f.name: gathered.pop(0) for f in fields(self) if getattr(self, f.name) is not None}  # type: ignore[arg-type]
        )


@dataclass
class Merged:
    """What ``Partials`` of all ranks say about the whole rows.

    ``log_mass`` is [R, c], log of every rank's share; ``lse`` and ``log_sum`` [c]: log sum exp of
    the logits, and of the logits minus the largest.
    """

    log_mass: Tensor
    lse: Tensor
    log_sum: Tensor

    @classmethod
    def of(cls, parts: Partials) -> Merged:
        top = parts.top.amax(0)
        shifted = (parts.top - top) + parts.log_sum
        log_sum = shifted.exp().sum(0).log()
        return cls(shifted - log_sum, top + log_sum, log_sum)

    def top1_prob(self) -> Tensor:
        return (-self.log_sum).exp()

    def entropy(self, parts: Partials) -> Tensor:
        assert parts.entropy is not None
        return (self.log_mass.exp() * (parts.entropy - self.log_mass)).sum(0)

    def label(self, parts: Partials, owner: Tensor) -> Tensor:
        """log-prob of the labels, which lie on the ranks ``owner`` [c]."""
        assert parts.label is not None
        return (parts.label + self.log_mass).gather(0, owner[None])[0]


def arg_max(parts: Partials) -> Tensor:
    """[c] global id of the largest logit; the lowest id of equal ones, as in one process."""
    assert parts.argmax is not None
    return parts.argmax.gather(0, parts.top.argmax(0, keepdim=True))[0]


def normalise_shard(x: Tensor, scratch: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Turn logits ``x`` [r, V_r] into log-probs inside the shard; return (largest logit, its
    column, log sum exp(x - largest)), [r] each."""
    top, where = x.max(1)
    x.sub_(top[:, None])
    log_sum = torch.exp(x, out=scratch).sum(1).log_()
    x.sub_(log_sum[:, None])
    return top, where, log_sum


class _ShardedPass:
    """One traversal of the chunks of a sharded problem."""

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
        assert problem.shards is not None
        self.problem, self.rows, self.row_scale, self.wants = problem, rows, row_scale, wants
        self.outcome, self.shards, self.kind = outcome, problem.shards, problem.rule.kind
        self.one_sweep = self.kind in (*KL, STATS_ONLY.kind) and not problem.mixture
        slots = max(run.teachers.bit_count() for run in rows.runs)
        self.buffers, self.workspace = make_buffers(problem, rows.count, 1 + slots, wants, like)
        self.ops = TorchRowOps(self.workspace.plan.tile_rows, self.shards.local, like)
        self.sink = GradientSink(self.workspace, gradient, problem.student, rows)
        self.finite = torch.ones(rows.count, len(problem.teachers), dtype=torch.bool, device=like.device)

    def run(self) -> None:
        for start, stop in spans(self.rows.count, self.workspace.plan.chunk_rows):
            self._chunk(start, stop)
        self.sink.flush()
        report_bad_teacher(self.rows, self.finite)

    def _chunk(self, start: int, stop: int) -> None:
        problem, rows, count = self.problem, self.rows, stop - start
        z = self.buffers[0, :count]
        mix = gather(problem.mix, rows.index, start, stop)
        hidden = gather(problem.student.hidden, rows.index, start, stop)
        labels = (
            None if problem.labels is None or not problem.stats else gather(problem.labels, rows.index, start, stop)
        )

        self.ops.write_logits(problem.student, hidden, z, self.workspace.tile)
        partials = [self._empty(z, student=True)]
        self._sweep(partials[0], z, None, slice(0, count), labels)
        for k, teacher in enumerate(problem.teachers):
            partials.append(self._empty(z, student=False))
            for left, right, slot in self._places(k, start, stop):
                part = slice(left - start, right - start)
                t = self.buffers[1 + slot, part]
                own = gather(teacher.hidden, rows.index, left, right)
                self.ops.write_logits(teacher, own, t, self.workspace.tile)
                self._sweep(partials[-1], t, z[part], part, None if labels is None else labels[part])

        columns = [x for part in partials for x in part.present()]
        gathered = list(self.shards.gather(torch.stack(columns)).unbind(1))
        everyone = [part.unpack(gathered) for part in partials]
        merged = [Merged.of(part) for part in everyone]
        z.add_(merged[0].log_mass[self.shards.rank, :, None])
        self._student_stats(everyone[0], merged[0], labels, start, stop)

        # Divergence, E_p[a], and per teacher whether it is not finite.
        sums = z.new_zeros(2 + len(problem.teachers), count)
        value, acc_mean = sums[0], sums[1]
        for k in range(len(problem.teachers)):
            results = self._teacher_results(k, everyone, merged, labels)
            for left, right, slot in self._places(k, start, stop):
                part = slice(left - start, right - start)
                own, own_mean = self._teacher(slot, part, merged[1 + k], mix[part, k], results["value"][part])
                value[part] += mix[part, k] * own
                acc_mean[part] += mix[part, k] * own_mean
                sums[2 + k, part] = (~torch.isfinite(results["value"][part] + own)).to(own.dtype)
                self._teacher_stats(results, k, left, right, part)
        if problem.mixture:
            value[:], acc_mean[:] = self._mixture(z)
        if not self.one_sweep:
            self.shards.sum_(sums)
        self.finite[start:stop] = (sums[2:] == 0).t() | ~torch.isfinite(merged[0].lse)[:, None]
        rows.scatter(self.outcome.token_loss, value, start, stop)
        if self.wants:
            self._gradient(z, merged[0].lse, hidden, acc_mean, mix.sum(1), start, stop)

    def _empty(self, like: Tensor, student: bool) -> Partials:
        problem = self.problem
        kl: tuple[str, ...] = ()
        if not student:
            kl = KL if problem.stats else (self.kind,) if self.one_sweep else ()
        return Partials.empty(like.shape[0], like, problem.stats, problem.stats and problem.labels is not None, kl)

    def _places(self, k: int, start: int, stop: int) -> list[tuple[int, int, int]]:
        """Parts of ``start:stop`` that teacher ``k`` works on: (start, stop, buffer that holds its
        logits)."""
        parts = []
        for run in self.rows.runs:
            left, right = max(run.start, start), min(run.stop, stop)
            if left < right and run.teachers >> k & 1:
                parts.append((left, right, (run.teachers & ((1 << k) - 1)).bit_count()))
        return list(joined(parts))

    def _sweep(self, out: Partials, y: Tensor, x: Tensor | None, part: slice, labels: Tensor | None) -> None:
        """Fill rows ``part`` of ``out`` from logits ``y`` [c, V_r], left as log-probs inside the
        shard; ``x`` are the student's, once it has been swept."""
        if self.shards.local == 0:
            return
        for tile, s1, s2, _ in self.ops.tiles(y.shape[0]):
            rows = slice(part.start + tile.start, part.start + tile.stop)
            own = y[tile]
            out.top[rows], where, out.log_sum[rows] = normalise_shard(own, s1)
            if out.entropy is not None and out.argmax is not None:
                out.entropy[rows] = dot(torch.exp(own, out=s1), own, s2).neg_()
                out.argmax[rows] = (where + self.shards.start).to(own.dtype)
            if x is not None and (out.forward_kl is not None or out.reverse_kl is not None):
                torch.sub(own, x[tile], out=s2)
                if out.forward_kl is not None:
                    out.forward_kl[rows] = torch.exp(own, out=s1).mul_(s2).sum(1)
                if out.reverse_kl is not None:
                    out.reverse_kl[rows] = torch.exp(x[tile], out=s1).mul_(s2).sum(1).neg_()
        if out.label is not None and labels is not None:
            columns, here = self.shards.localise(labels)
            out.label[part] = torch.where(here, y.gather(1, columns[:, None])[:, 0], 0.0)

    def _teacher_results(
        self, k: int, everyone: list[Partials], merged: list[Merged], labels: Tensor | None
    ) -> dict[str, Tensor]:
        """Per-row results [c] of teacher ``k``, under the names of ``TeacherRows``; ``value`` is
        the divergence where one sweep gives it, else only as finite as the teacher."""
        p, q, parts = merged[0], merged[1 + k], everyone[1 + k]
        out = {"value": q.lse}
        if parts.forward_kl is not None:
            out["forward_kl"] = (q.log_mass.exp() * (parts.forward_kl + q.log_mass - p.log_mass)).sum(0)
        if parts.reverse_kl is not None:
            out["reverse_kl"] = (p.log_mass.exp() * (parts.reverse_kl + p.log_mass - q.log_mass)).sum(0)
        if self.one_sweep and self.kind in out:
            out["value"] = out[self.kind]
        if parts.argmax is not None:
            out["entropy"], out["top1_prob"] = q.entropy(parts), q.top1_prob()
            out["agreement"] = (arg_max(parts) == arg_max(everyone[0])).to(q.lse.dtype)
        if labels is not None:
            out["logprob"] = q.label(parts, self.shards.owner(labels))
        return out

    def _teacher(self, slot: int, part: slice, merged: Merged, weight: Tensor, known: Tensor) -> tuple[Tensor, Tensor]:
        """Add ``weight`` [c] times a teacher's terms to the accumulator; return (divergence,
        E_p[a]), both ``known`` [c] where one sweep gives them, else this shard's share."""
        if self.kind == STATS_ONLY.kind:
            return torch.zeros_like(known), torch.zeros_like(known)
        t, acc = self.buffers[1 + slot, part], self.buffers[1, part]
        t.add_(merged.log_mass[self.shards.rank, part, None])
        if self.problem.mixture:
            t.add_(weight.log()[:, None])
            if slot:
                torch.logaddexp(acc, t, out=acc)
            return torch.zeros_like(known), torch.zeros_like(known)
        if self.one_sweep and not self.wants:
            return known, known
        share = self._divergence(self.buffers[0, part], t, acc if self.wants else None, slot == 0, weight)
        return (known, known) if self.one_sweep else share

    def _mixture(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """This shard's share of (divergence, E_p[a]) from the mixture in the accumulator."""
        acc = self.buffers[1, : z.shape[0]]
        return self._divergence(z, acc, acc if self.wants else None, True, z.new_ones(z.shape[0]))

    def _divergence(
        self, x: Tensor, y: Tensor, acc: Tensor | None, first: bool, weight: Tensor
    ) -> tuple[Tensor, Tensor]:
        value, mean = x.new_zeros(2, x.shape[0])
        for rows, *scratch in self.ops.tiles(x.shape[0]):
            s1, s2, s3 = scratch
            tile = Tile(
                x=x[rows],
                y=y[rows],
                acc=None if acc is None else acc[rows],
                first=first,
                weight=weight[rows, None],
                value=value[rows],
                mean=mean[rows],
                scratch=(s1, s2, s3),
                clamp=self.ops.clamp,
            )
            SWEEPS[self.kind](self.problem.rule, tile)
        return value, mean

    def _gradient(
        self, z: Tensor, lse: Tensor, hidden: Tensor, acc_mean: Tensor, total: Tensor, start: int, stop: int
    ) -> None:
        head, acc = self.problem.student, self.buffers[1, : z.shape[0]]
        assert self.row_scale is not None
        out = self.sink.reserve(acc)
        self.ops.gradient_rows(
            self.problem.rule,
            z,
            acc,
            acc,
            StudentRows(lse),
            teachers=1,
            acc_mean=acc_mean,
            total_weight=total,
            row_scale=gather(self.row_scale, self.rows.index, start, stop) * head.factor,
            softcap=None if head.softcap is None else head.softcap / head.temperature,
            out=out,
        )
        self.sink.commit(out, hidden, start, stop)

    def _student_stats(self, parts: Partials, merged: Merged, labels: Tensor | None, start: int, stop: int) -> None:
        stats = self.outcome.stats
        if stats is None:
            return
        self.rows.scatter(stats.student_entropy, merged.entropy(parts), start, stop)
        if stats.student_logprob is not None and labels is not None:
            self.rows.scatter(stats.student_logprob, merged.label(parts, self.shards.owner(labels)), start, stop)

    def _teacher_stats(self, results: dict[str, Tensor], k: int, left: int, right: int, part: slice) -> None:
        for source, name in TEACHER_STATS.items():
            target = getattr(self.outcome.stats, name, None)
            if target is not None and source in results:
                self.rows.scatter(target, results[source][part], left, right, column=k)


def make_buffers(problem: Problem, rows: int, buffers: int, wants: Wants, like: Tensor) -> tuple[Tensor, Workspace]:
    """[buffers, chunk rows, V_r] logits, and the workspace they belong to. The plan depends on
    nothing that differs between ranks: they must agree on the chunks."""
    shards, heads = problem.shards, (problem.student, *problem.teachers)
    assert shards is not None
    widths = tuple(head.weight.shape[1] for head in heads)
    upcasts = [needs_upcast(head.weight, like.dtype, gradient=False) for head in heads]
    upcasts.append(wants.hidden and needs_upcast(problem.student.weight, like.dtype, gradient=True))
    plan = plan_chunks(
        rows=rows,
        vocab=shards.widest,
        hidden_sizes=widths,
        buffers=buffers,
        scratch_tiles=SCRATCH_TILES,
        upcast=any(upcasts),
        half_gradient=bool(wants) and half_gradient(problem.student.weight, like.dtype),
        dtype=like.dtype,
        device=like.device,
        workspace_bytes=problem.workspace_bytes,
    )
    workspace = Workspace(plan, shards.local, like, buffers, max(widths))
    return workspace.storage, workspace


def report_bad_teacher(rows: RowPlan, finite: Tensor) -> None:
    """Raise on every rank for the first teacher row that is not finite; ``finite`` [n, K]."""
    if bool(finite.all()):
        return
    places = torch.arange(rows.count, device=finite.device) if rows.index is None else rows.index
    for k in range(finite.shape[1]):
        bad = places[~finite[:, k]]
        if bad.numel():
            row = int(bad.min())
            raise ValueError(
                f"teachers[{k}] has NaN or inf logits on some rank, first at row {row}: give the row token_weight 0 "
                f"or mix[{row}, {k}] = 0, or repair the teacher's hidden states or weight"
            )
