"""The reverse KL with teachers that work on the sampled columns only.

d KL / d z = p (g - E_p[g]) with g = sum_k w_k (z - t_k) needs no teacher's normaliser. So the student's logits are
computed in full, columns are drawn by what is known of dZ from them (``sampling``), s_v = ||u p[:, v]|| ||W_v|| with
u the rows' factors in the loss, and everything else happens in those columns. E_p[g] comes from the same draw,

    E = r + sum over drawn v of p_v (g_v - r) / pi_v,

with r the mean of g under p among the columns of pi 1, which depends on no chance. The product of E with another sum
over the draw would be biased by the columns that meet themselves; what each of them adds to E is taken out of its own
entry, and put in with its expectation:

    dZ_v = u p_v / pi_v (g_v - E + p_v (g_v - r) (1 / pi_v - 1)),

which is unbiased, exactly. A label whose log-prob has a weight is drawn with pi 1.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from . import table as fields
from .chunk import Chunk, Task
from .chunking import spans
from .driver import Pass, make_task
from .heads import Wants, gather, needs_upcast, write_logits
from .problem import STATS_ONLY, Head, Problem
from .sampling import DRAWN_TOGETHER, Draw, Sampler
from .selection import RowPlan, Run
from .table import LABEL_SCALE, LOG, MERGED, SCALE, TOP, VALUE


class SampledPass(Pass):
    """One traversal of the rows for gradients, the log-probs of labels and the student's statistics.

    The student's VALUE in the table holds E.
    """

    @staticmethod
    def buffers(rows: RowPlan) -> int:
        return 1

    @staticmethod
    def task_of(problem: Problem, wants: Wants) -> Task:
        return replace(make_task(problem, wants), rule=STATS_ONLY, mixture=False, gradient=False)

    def run(self) -> None:
        self.total = self.table.new_zeros(self.rows.count)
        mix = gather(self.problem.mix, self.rows.index, 0, self.rows.count)
        for run in self.rows.runs:
            for k in run.names:
                self.total[run.start : run.stop] += mix[run.start : run.stop, k]
        super().run()

    def finite(self) -> Tensor:
        """A scalar: 1, or NaN where a student's logits are not finite on some row."""
        return 1.0 + 0.0 * self.table[0, TOP : LOG + 1].sum()

    def _chunk(self, start: int, stop: int) -> None:
        student, shards = self.problem.student, self.problem.shards
        hidden = gather(student.hidden, self.rows.index, start, stop)
        labels = None if self.labels is None else self.labels[start:stop]
        chunk = Chunk(self.workspace.logits[:, : stop - start], self.table[:, :, start:stop], labels)
        self.ops.write_logits(student, hidden, chunk.logits[0], self.workspace.tile)
        if shards is not None:
            self.ops.statistics(chunk)
            merged = chunk.table[:, :MERGED]
            merged.copy_(fields.merge(shards.gather(merged)))
        sampler = self._sampler()
        if sampler.kernels is not None:
            self._blocks(chunk, hidden, start, fresh=shards is None)
            return
        for first, last in spans(stop - start, sampler.block_rows):
            self._block(chunk.part(first, last), hidden[first:last], start + first, shards is None)

    def _blocks(self, chunk: Chunk, hidden: Tensor, start: int, fresh: bool) -> None:
        """As ``_block`` for every block of ``chunk``; the columns of several are drawn together."""
        sampler, table = self._sampler(), chunk.table[0]
        if fresh:
            self.ops.statistics(chunk)
        labels = chunk.labels if self.task.label_term else None
        for first, last in spans(chunk.rows, DRAWN_TOGETHER * sampler.block_rows):
            part = chunk.part(first, last)
            factor = self._factor(part, start + first)
            assert sampler.kernels is not None
            squares = sampler.kernels.squares_of_p(self.ops, part, factor, sampler.block_rows)
            own = None if labels is None else labels[first:last]
            draws = sampler.draw_blocks(squares, start + first, own, table[:, first:last])
            for draw, (left, right) in zip(draws, spans(last - first, sampler.block_rows), strict=True):
                block, states = part.part(left, right), hidden[first + left : first + right]
                self._drawn(block, states, start + first + left, factor[left:right], draw)

    def _factor(self, chunk: Chunk, start: int) -> Tensor:
        """[c] sums of squares of what p is multiplied with in dZ."""
        table, total = chunk.table[0], self.total[start : start + chunk.rows]
        return (table[SCALE] * total).square() + table[LABEL_SCALE].square()

    def _block(self, chunk: Chunk, hidden: Tensor, start: int, fresh: bool) -> None:
        """Gradients of rows that share a draw; ``fresh``: their statistics are still to be computed."""
        factor = self._factor(chunk, start)
        squares = factor.new_zeros(self.problem.student.vocab)
        self.ops.squares(chunk, factor, squares, fresh)
        labels, weighted = self._labelled(chunk) if self.task.label_term else (None, None)
        self._drawn(chunk, hidden, start, factor, self._sampler().draw(squares, start, labels, weighted))

    def _drawn(self, chunk: Chunk, hidden: Tensor, start: int, factor: Tensor, draw: Draw) -> None:
        """Gradients of the rows of ``draw``; ``factor`` [c] from ``_factor``."""
        table, stop, sampler = chunk.table[0], start + chunk.rows, self._sampler()
        if sampler.kernels is not None:
            dz, sums = self._by_kernels(chunk, factor, draw, start)
            if self.gradient.bias is not None:
                self.gradient.add_bias_columns(sums[2], draw.columns)
            sampler.products(self.gradient, draw, dz, sums[:2], hidden, start, stop)
            return
        z = chunk.logits[0].index_select(1, draw.columns)
        p = (z - table[TOP, :, None]).sub_(table[LOG, :, None]).exp_()
        share = p * draw.inverse
        dz = self._reverse_kl(p, self._gap(z, draw, start, stop), draw, table).mul_(share).mul_(table[SCALE, :, None])
        if self.task.label_term and draw.columns.numel():
            self._add_labels(dz, share, draw, chunk)
        if self.task.softcap is not None:
            dz.mul_(1.0 - (z / self.task.softcap).square_())
        if self.gradient.bias is not None:
            self.gradient.add_bias_columns(dz.sum(0), draw.columns)
        weights = (factor.sqrt()[None] @ share)[0]
        sums = torch.stack([dz.square().sum(0) * draw.spread, weights])
        sampler.products(self.gradient, draw, dz, sums, hidden, start, stop)

    def _by_kernels(self, chunk: Chunk, factor: Tensor, draw: Draw, start: int) -> tuple[Tensor, Tensor]:
        """(dZ [c, k] in the drawn columns, sums over its rows [2, k] or with a bias [3, k]), see ``triton_columns``."""
        sampler, total = self._sampler(), self.total[start : start + chunk.rows]
        assert sampler.kernels is not None
        gap, single = self._teachers(draw, start, start + chunk.rows)
        z, sums = sampler.kernels.pick(chunk, draw.columns, draw.inverse, total, gap, single)
        if self.problem.shards is not None:
            sums = self.problem.shards.sum_(sums)
        found: tuple[Tensor, Tensor] = sampler.kernels.ratio(
            chunk,
            draw.columns,
            draw.inverse,
            factor,
            z,
            gap,
            sums,
            sampler.operand,
            self.task.softcap,
            self.task.label_term,
            self.gradient.bias is not None,
        )
        return found

    def _sampler(self) -> Sampler:
        assert self.sampler is not None
        return self.sampler

    def _labelled(self, chunk: Chunk) -> tuple[Tensor, Tensor]:
        """(columns of the labels, whether the log-prob of each has a weight)."""
        assert chunk.labels is not None
        return chunk.labels.clamp(min=0), (chunk.labels >= 0) & (chunk.table[0, LABEL_SCALE] != 0)

    def _gap(self, z: Tensor, draw: Draw, start: int, stop: int) -> Tensor:
        """[c, k] g in the drawn columns, of rows ``start:stop``."""
        gap = z * self.total[start:stop, None]
        for k, left, right in self._places(start, stop):
            part = gap[left - start : right - start]
            part.addcmul_(self._teacher(k, left, right, draw), -self._weight(k, left, right)[:, None])
        return gap

    def _teachers(self, draw: Draw, start: int, stop: int) -> tuple[Tensor, bool]:
        """[c, k] weighted sum of the teachers' logits in the drawn columns, of rows ``start:stop``; or the logits of
        the only teacher of all of them, and True."""
        places = self._places(start, stop)
        if len(places) == 1 and places[0][1:] == (start, stop):
            return self._teacher(*places[0], draw), True
        out = self.table.new_zeros(stop - start, draw.columns.numel())
        for k, left, right in places:
            part = out[left - start : right - start]
            part.addcmul_(self._teacher(k, left, right, draw), self._weight(k, left, right)[:, None])
        return out, False

    def _places(self, start: int, stop: int) -> list[tuple[int, int, int]]:
        """(teacher, start, stop) of its rows within ``start:stop``."""
        names = range(len(self.problem.teachers))
        return [(k, left, right) for k in names for left, right, _ in self.rows.places(k, start, stop)]

    def _weight(self, k: int, start: int, stop: int) -> Tensor:
        """[m] of a teacher on the rows ``start:stop``."""
        return gather(self.problem.mix[:, k], self.rows.index, start, stop)

    def _teacher(self, k: int, start: int, stop: int, draw: Draw) -> Tensor:
        """[m, k] logits of a teacher on the rows ``start:stop`` in the drawn columns."""
        teacher = self.problem.teachers[k]
        return self._logits(teacher, gather(teacher.hidden, self.rows.index, start, stop), draw)

    def _logits(self, head: Head, hidden: Tensor, draw: Draw) -> Tensor:
        """[m, k] logits of ``hidden`` [m, d] in the drawn columns."""
        out = self.table.new_empty(hidden.shape[0], draw.columns.numel())
        sampler, item = self._sampler(), 3 * self.table.itemsize
        if sampler.kernels is not None and not needs_upcast(head.weight, self.table.dtype):
            item = head.weight.itemsize
        for left, right in sampler.pieces(draw, head.weight.shape[1], item):
            columns = draw.columns[left:right]
            bias = None if head.bias is None else head.bias.index_select(0, columns)
            part = replace(head, weight=head.weight.index_select(0, columns), bias=bias, vocab=right - left)
            write_logits(part, hidden, out[:, left:right], self.workspace.tile)
        return out

    def _reverse_kl(self, p: Tensor, gap: Tensor, draw: Draw, table: Tensor) -> Tensor:
        """[c, k] dZ_v pi_v / (u p_v), see the module docstring."""
        ways = torch.stack([draw.certain.to(p.dtype), torch.where(draw.certain, 0.0, draw.inverse)], 1)
        sums = torch.cat([p @ ways, (p * gap) @ ways], 1)
        if self.problem.shards is not None:
            sums = self.problem.shards.sum_(sums)
        mass, rest, certain, chance = sums.unbind(1)
        middle = torch.where(mass > 0, certain / mass.clamp(min=torch.finfo(mass.dtype).tiny), 0.0)
        drift = chance - middle * rest
        table[VALUE] = middle + drift
        gap.sub_(middle[:, None])
        return (p * (draw.inverse - 1.0)).add_(1.0).mul_(gap).sub_(drift[:, None])

    def _add_labels(self, dz: Tensor, share: Tensor, draw: Draw, chunk: Chunk) -> None:
        """LABEL_SCALE (p - 1_y)."""
        columns, weighted = self._labelled(chunk)
        up = chunk.table[0, LABEL_SCALE]
        dz.addcmul_(share, up[:, None])
        dz.scatter_add_(1, draw.places[columns].clamp(min=0)[:, None], torch.where(weighted, -up, 0.0)[:, None])

    def _report(self, run: Run) -> None:
        self._report_student(run)
