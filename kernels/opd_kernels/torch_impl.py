"""Row operations in plain torch: the CPU path, and the living reference of the Triton row kernels.

All sweeps go tile by tile over a few rows, so that on a CPU the operands stay in cache from one sweep to the
next; where no other process holds columns, a tile goes through all stages at once.

Symbols: z student logits / T, p its softmax; t teacher logits / T, q its softmax; g = z - t; r = log q - log p;
a = d divergence / d p up to a constant per row, so that d divergence / d z = p (a - E_p[a]). Every a is taken
relative to its value at the student's largest logit: ``b``. Sums over a row use e = exp(logit - TOP) and are
divided by exp(LOG) after.

What a teacher's buffer holds after a stage: logits after ``statistics``; after ``terms`` the first one holds the
weighted sum of b, or of the mixture's q (forward KL). Where the stages follow each other in a tile, ``statistics``
leaves g - REF for the gradient of the reverse KL, and scratch buffers their e.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from . import table as fields
from .chunk import Chunk, Task
from .chunking import SCRATCH_TILES, spans
from .heads import write_logits
from .problem import Head
from .table import ARG, DOT, LABEL, LABEL_SCALE, LOG, MEAN, MEAN_P, MEAN_Q, REF, SCALE, TOP, VALUE, WEIGHT

PEAK_BLOCK = 512
"""Columns among which ``peak`` searches one by one."""


class TorchRowOps:
    """``chunk.RowOps`` on any device; see the module docstring for the symbols.

    Args:
        task: what is computed.
        tile_rows: rows of a tile.
        vocab: V, columns of this process.
        like: of the dtype and device of the logits.
    """

    def __init__(self, task: Task, tile_rows: int, vocab: int, like: Tensor) -> None:
        self.task, self.tile_rows, self.vocab = task, tile_rows, vocab
        self.scratch = like.new_empty(SCRATCH_TILES, tile_rows, vocab)
        self.clamp = 83.0 if like.dtype == torch.float32 else 700.0
        # The head whose e of the tile at work a scratch buffer still holds.
        self.held: dict[int, int] = {}
        self.keeps_gaps = False

    def write_logits(self, head: Head, hidden: Tensor, out: Tensor, tile: Tensor | None) -> None:
        write_logits(head, hidden, out, tile)

    def statistics(self, chunk: Chunk) -> None:
        if self.vocab == 0:
            fields.clear(chunk.table)
        for tile in self._tiles(chunk):
            self._statistics(tile)

    def squares(self, chunk: Chunk, factor: Tensor, out: Tensor, fresh: bool) -> None:
        done = 0
        for tile in self._tiles(chunk):
            if fresh:
                self._statistics(tile)
            own = factor[done : done + tile.rows] * (-2.0 * tile.table[0, LOG]).exp()
            done += tile.rows
            squares = torch.square(self._e(tile, 0), out=self._scratch(1, tile))
            torch.addmv(out, squares.t(), own, out=out)

    def terms(self, chunk: Chunk) -> None:
        chunk.table[0, VALUE : MEAN + 1] = 0.0
        for tile in self._tiles(chunk):
            self._terms(tile)

    def gradient(self, chunk: Chunk) -> None:
        for tile in self._tiles(chunk):
            self._gradient(tile)

    def solve(self, chunk: Chunk) -> None:
        task = self.task
        self.keeps_gaps = task.gradient and task.kind == "reverse_kl" and not task.mixture
        for tile in self._tiles(chunk):
            self._statistics(tile)
            if not task.one_sweep and tile.teachers:
                self._terms(tile)
            if task.gradient:
                self._gradient(tile)
        self.keeps_gaps = False

    def logprob_gradient(self, chunk: Chunk, entropy_scale: Tensor | None) -> None:
        done = 0
        for tile in self._tiles(chunk):
            z, table = tile.logits[0], tile.table
            d, slope = self._scratch(1, tile), self._slope(tile)
            e, mass = self._e(tile, 0), (-table[0, LOG]).exp()
            if entropy_scale is None:
                torch.mul(e, column(table[0, LABEL_SCALE] * mass), out=d)
            else:
                # d H / d z = -p (log p + H), and log p + H = (z - TOP) - DOT.
                up = entropy_scale[done : done + tile.rows]
                torch.sub(z, column(table[0, TOP]), out=d).sub_(column(table[0, DOT])).mul_(column(up))
                d.add_(column(table[0, LABEL_SCALE])).mul_(e).mul_(column(mass))
            self._subtract_label(d, tile)
            self._finish(d, slope, tile)
            done += tile.rows

    def label_sets_gradient(
        self,
        chunk: Chunk,
        columns: Tensor,
        arrive: Tensor,
        removed: Tensor,
        tail: Tensor,
        tail_scale: Tensor,
        entropy_scale: Tensor | None,
        with_tail: bool,
    ) -> None:
        """dZ of several labels a row and of the mass of all other columns, see ``label_sets``.

        Args:
            chunk: its LABEL_SCALE is what the row's gradients sum up to.
            columns: [c, L] columns of the labels that are here, 0 for the others.
            arrive: [c, L] gradients of their log-probs, 0 for the others.
            removed: [c, L] -inf where a label is here, else 0.
            tail: [c] log of the mass of the other columns, times sum exp(z - TOP).
            tail_scale: [c] gradient of the tail.
            entropy_scale: [c] gradient of the entropy, or None.
            with_tail: whether there is a tail.
        """
        for rows, tile in zip(spans(chunk.rows, self.tile_rows), self._tiles(chunk), strict=False):
            part, table, z = slice(*rows), tile.table, tile.logits[0]
            d, e, slope = self._scratch(1, tile), self._e(tile, 0), self._slope(tile)
            mass, leave = (-table[0, LOG]).exp(), table[0, LABEL_SCALE]
            if entropy_scale is None:
                torch.mul(e, column(-leave * mass), out=d)
            else:
                torch.sub(z, column(table[0, TOP]), out=d).sub_(column(table[0, DOT]))
                d.mul_(column(-entropy_scale[part])).sub_(column(leave)).mul_(e).mul_(column(mass))
            if with_tail:
                # The logits are not needed any more.
                outside = z.sub_(column(table[0, TOP])).sub_(column(tail[part]))
                outside.scatter_add_(1, columns[part], removed[part])
                d.addcmul_(outside.exp_(), column(tail_scale[part]))
            d.scatter_add_(1, columns[part], arrive[part])
            self._finish(d, slope, tile)

    def _tiles(self, chunk: Chunk) -> Iterator[Chunk]:
        if self.vocab == 0:
            return
        for start, stop in spans(chunk.rows, self.tile_rows):
            self.held.clear()
            yield chunk.part(start, stop)

    def _scratch(self, place: int, tile: Chunk) -> Tensor:
        self.held.pop(place, None)
        return self.scratch[place, : tile.rows]

    def _e(self, tile: Chunk, head: int) -> Tensor:
        """[r, V] exp(logit - TOP) of a head: the student's in the first scratch buffer, a teacher's in the
        second."""
        place = min(head, 1)
        if self.held.get(place) == head:
            return self.scratch[place, : tile.rows]
        e = self._scratch(place, tile)
        torch.sub(tile.logits[head], column(tile.table[head, TOP]), out=e).exp_()
        self.held[place] = head
        return e

    def _summarise(self, tile: Chunk, head: int) -> tuple[Tensor, Tensor]:
        """TOP, LOG and, where every statistic is asked for, DOT, ARG and LABEL of a head; returns (column of
        its largest logit, sum of e), [r] each."""
        x, row, full = tile.logits[head], tile.table[head], self.task.full
        row[TOP], where = peak(x)
        e = self._e(tile, head)
        total = e.sum(1)
        row[LOG] = total.log()
        if full:
            below = torch.sub(x, column(row[TOP]), out=self._scratch(2, tile))
            row[DOT] = below.mul_(e).sum(1) / total
            row[ARG] = (where + self.task.first_column).to(row.dtype)
        if tile.labels is not None and (full or head == 0):
            found = x.gather(1, column(tile.labels.clamp(min=0)))[:, 0]
            row[LABEL] = torch.where(tile.labels >= 0, found, 0.0)
        return where, total

    def _statistics(self, tile: Chunk) -> None:
        task, z = self.task, tile.logits[0]
        where, total = self._summarise(tile, 0)
        for head in range(1, 1 + tile.teachers):
            t, row = tile.logits[head], tile.table[head]
            row[REF] = (z.gather(1, column(where)) - t.gather(1, column(where)))[:, 0]
            _, theirs = self._summarise(tile, head)
            if task.needs("forward_kl"):
                g = torch.sub(z, t, out=self._scratch(2, tile))
                row[MEAN_Q] = g.mul_(self._e(tile, head)).sum(1) / theirs
            if task.needs("reverse_kl"):
                g = torch.sub(z, t, out=t if self.keeps_gaps else self._scratch(1, tile))
                g.sub_(column(row[REF]))
                row[MEAN_P] = torch.mul(g, self._e(tile, 0), out=self._scratch(2, tile)).sum(1) / total

    def _terms(self, tile: Chunk) -> None:
        table, teachers = tile.table, tile.logits[1:]
        if self.task.mixture:
            self._mix(tile)
            one = table.new_ones(tile.rows)
            self._add_terms(tile, 1, fields.mixture_at_top(table), weight=one, mass=one)
            return
        for head, t in enumerate(teachers, 1):
            self._e(tile, head)
            shift = fields.log_ratio(table, head)
            torch.sub(t, tile.logits[0], out=t).add_(column(shift))
            mass = (-table[head, LOG]).exp()
            self._add_terms(tile, head, shift - table[head, REF], weight=table[head, WEIGHT], mass=mass)

    def _mix(self, tile: Chunk) -> None:
        """Turn the first teacher's buffer into r of the mixture, and the second scratch buffer into its q."""
        acc = tile.logits[1]
        for head, t in enumerate(tile.logits[1:], 1):
            row = tile.table[head]
            t.sub_(column(row[TOP])).add_(column(row[WEIGHT].clamp(min=1e-37).log() - row[LOG]))
            if head > 1:
                torch.logaddexp(acc, t, out=acc)
        torch.exp(acc, out=self._scratch(1, tile))
        below = torch.sub(tile.logits[0], column(tile.table[0, TOP]), out=self._scratch(2, tile))
        acc.sub_(below).add_(column(tile.table[0, LOG]))

    def _add_terms(self, tile: Chunk, head: int, at_top: Tensor, weight: Tensor, mass: Tensor) -> None:
        """Add one teacher, or the mixture, to VALUE, MEAN and the accumulator, the first teacher's buffer.

        ``logits[head]`` holds its r, the second scratch buffer its q divided by ``mass`` [r]; ``at_top`` [r] is r
        at the student's largest logit, ``weight`` [r] the factor of its divergence.
        """
        task, table = self.task, tile.table
        kind, number = task.kind, task.parameter
        r, q = tile.logits[head], self._scratch(1, tile)
        if kind == "forward_kl":
            table[0, VALUE] += weight * mass * r.mul_(q).sum(1)
            if task.gradient:
                r.copy_(q)
            return
        constant = torch.zeros_like(weight)
        if kind == "reverse_kl":
            factor, value, constant = 1.0, constant, -at_top
            b = r.sub_(column(at_top)).neg_()
        elif kind == "jsd":
            factor = number - 1.0
            r.clamp_(max=self.clamp)
            log = torch.expm1(r, out=self._scratch(2, tile)).mul_(number).log1p_()
            value = q.mul_(r.sub_(log)).sum(1) * (number * mass)
            log_at_top = torch.expm1(at_top.clamp(max=self.clamp)).mul_(number).log1p_()
            constant = factor * log_at_top
            b = torch.sub(log, column(log_at_top), out=r)
        else:
            assert kind == "skew_kl"
            factor = number - 1.0
            ratio = torch.expm1(r.neg_().clamp_(max=self.clamp), out=r).mul_(-factor)
            value = -mass * q.mul_(torch.log1p(ratio, out=self._scratch(2, tile))).sum(1)
            ratio_at_top = 1.0 - factor * torch.expm1((-at_top).clamp(max=self.clamp))
            b = ratio.add_(1.0).reciprocal_().sub_(column(1.0 / ratio_at_top))
        mean = torch.mul(b, self._e(tile, 0), out=self._scratch(2, tile)).sum(1) * (factor * (-table[0, LOG]).exp())
        if kind != "skew_kl":  # whose a is no part of its value
            value = value + mean + (constant if task.first_rank else 0.0)
        table[0, VALUE] += weight * value
        table[0, MEAN] += weight * mean
        if task.gradient:
            b.mul_(column(weight * factor))
            if head > 1:
                tile.logits[1].add_(b)

    def _gradient(self, tile: Chunk) -> None:
        task, table = self.task, tile.table
        p = table[0, SCALE] * (-table[0, LOG]).exp()  # times e
        slope = self._slope(tile)
        if tile.teachers == 0:
            d = self._scratch(1, tile)
            torch.mul(self._e(tile, 0), column(table[0, LABEL_SCALE] * (-table[0, LOG]).exp()), out=d)
        else:
            d = tile.logits[1]
            if task.kind == "forward_kl":
                self._forward_gradient(d, tile, p)
            else:
                if task.one_sweep:
                    self._gaps(d, tile)
                else:
                    d.sub_(column(table[0, MEAN]))
                d.mul_(self._e(tile, 0)).mul_(column(p))
            if task.label_term:
                d.addcmul_(self._e(tile, 0), column(table[0, LABEL_SCALE] * (-table[0, LOG]).exp()))
        if task.label_term:
            self._subtract_label(d, tile)
        self._finish(d, slope, tile)

    def _gaps(self, d: Tensor, tile: Chunk) -> None:
        """sum_k w_k (g_k - E_p[g_k]) into ``d``, the first teacher's buffer."""
        teachers = tile.table[1:]
        weight, mean = teachers[:, WEIGHT], teachers[:, MEAN_P]
        if not self.keeps_gaps:
            for t, row in zip(tile.logits[1:], teachers, strict=True):
                torch.sub(tile.logits[0], t, out=t).sub_(column(row[REF]))
        if tile.teachers == 1:
            d.sub_(column(mean[0])).mul_(column(weight[0]))
            return
        d.mul_(column(weight[0]))
        for t, own in zip(tile.logits[2:], weight[1:], strict=True):
            d.addcmul_(t, column(own))
        d.sub_(column((weight * mean).sum(0)))

    def _forward_gradient(self, d: Tensor, tile: Chunk, p: Tensor) -> None:
        """SCALE ((sum_k w_k) p - sum_k w_k q_k) into ``d``, the first teacher's buffer."""
        table, scale = tile.table, tile.table[0, SCALE]
        if self.task.mixture:  # the buffer holds its q
            d.mul_(column(-scale)).addcmul_(self._e(tile, 0), column(p))
            return
        for head in range(1, 1 + tile.teachers):
            own = column(-scale * table[head, WEIGHT] * (-table[head, LOG]).exp())
            e = self._e(tile, head)
            if head == 1:
                torch.mul(e, own, out=d)
            else:
                d.addcmul_(e, own)
        d.addcmul_(self._e(tile, 0), column(p * table[1:, WEIGHT].sum(0)))

    def _slope(self, tile: Chunk) -> Tensor | None:
        """[r, V] slope of the student's softcap: 1 - (logits / cap)^2."""
        if self.task.softcap is None:
            return None
        slope = torch.square(tile.logits[0], out=self._scratch(2, tile))
        return slope.mul_(-1.0 / self.task.softcap**2).add_(1.0)

    def _subtract_label(self, d: Tensor, tile: Chunk) -> None:
        """LABEL_SCALE off the label's column."""
        assert tile.labels is not None
        own = torch.where(tile.labels >= 0, -tile.table[0, LABEL_SCALE], 0.0)
        d.scatter_add_(1, column(tile.labels.clamp(min=0)), column(own))

    def _finish(self, d: Tensor, slope: Tensor | None, tile: Chunk) -> None:
        if slope is not None:
            d.mul_(slope)
        assert tile.out is not None
        if tile.out.data_ptr() != d.data_ptr():
            tile.out.copy_(d)


def column(values: Tensor) -> Tensor:
    """[r, 1]"""
    return values[:, None]


def peak(x: Tensor) -> tuple[Tensor, Tensor]:
    """(largest entry, its column) of every row of ``x`` [r, V]: ``max(1)``, with most of the search in a
    plain maximum, which is ten times as fast on a CPU."""
    width = x.shape[1]
    whole = width - width % PEAK_BLOCK
    if whole < 4 * PEAK_BLOCK:
        return x.max(1)
    tops = [x[:, :whole].unflatten(1, (-1, PEAK_BLOCK)).amax(2)]
    if whole < width:
        tops.append(x[:, whole:].amax(1, keepdim=True))
    start = (torch.cat(tops, 1).argmax(1) * PEAK_BLOCK).clamp(max=width - PEAK_BLOCK)
    near = x.gather(1, start[:, None] + torch.arange(PEAK_BLOCK, device=x.device))
    top, where = near.max(1)
    return top, start + where
