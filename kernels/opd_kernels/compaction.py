"""Compaction of the backward: gradient GEMMs over the vocabulary columns that carry gradient.

dZ = d loss / d (hidden W^T) of a peaked distribution is negligible in almost every column. For a
chunk of rows the columns whose entries are small in every row are dropped, under one rule:

    sum over dropped v of abs(dZ[n, v])  <=  tolerance * sum over all v of abs(dZ[n, v])   for every row n,

so that with m_n = sum_v abs(dZ[n, v]) and e_n <= tolerance the dropped share of row n

- the gradient of hidden state n is off by at most e_n m_n max_v ||W_v||,
- the gradients of all weight rows v together, sum_v ||error_v||, by at most sum_n e_n m_n ||hidden_n||,
- the gradient of the bias not at all.

A column's score is its largest relative entry, max_n abs(dZ[n, v]) / m_n. Kept are the columns whose
score reaches a threshold: the highest of ``LEVELS``, from the tolerance (a larger entry alone would
break the rule) down to tolerance / V (where the rule cannot break), that the rows allow. Rows that
need many columns do not spoil the rest: a chunk may be cut in two groups of rows with a threshold
each. Where that leaves more than ``DENSE_ABOVE`` of the work, the dense GEMMs run instead, and
nothing is dropped.

Shapes: c rows of a chunk, V columns, L levels, k kept columns, d hidden size.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from .chunking import ChunkPlan, spans
from .heads import HeadGradient, accumulate
from .selection import RowPlan

LEVELS = 16
"""Thresholds that are tried, in equal ratios."""
DENSE_ABOVE = 0.6
"""Share of the dense work from which compaction does not pay for its gathers."""
SPLIT_BELOW = 0.8
"""Two groups of rows must save this much over one: each reads its rows of the weight."""
ALIGNMENT = 16
"""Elements to whose multiple rows of a gathered block are padded in half precision, where GEMMs lose
most of their speed on rows that are not aligned."""


def scratch_bytes(vocab: int, itemsize: int) -> int:
    """Bytes a compactor needs besides its tile of rows and the blocks of its GEMMs: what it knows
    about columns."""
    return vocab * (LEVELS * (itemsize + 1) + 24)


def block_bytes(device: torch.device) -> int:
    """Most bytes that pay for a block of columns."""
    return 256 << 20 if device.type == "cuda" else 16 << 20


@dataclass(frozen=True)
class Part:
    """Rows of a chunk and the columns they keep, ascending; None stands for all of them."""

    rows: Tensor | None
    columns: Tensor | None


class Compactor:
    """Chooses the columns of each chunk and runs its gradient GEMMs.

    Attributes:
        dropped: [N] share of each row's mass that was dropped; NaN where no gradient was computed.
    """

    def __init__(self, tolerance: float, rows: RowPlan, total_rows: int, plan: ChunkPlan, like: Tensor) -> None:
        """``total_rows`` is N, ``like`` of the compute dtype."""
        self.tolerance, self.rows = tolerance, rows
        self.tile_rows, self.block_bytes = plan.tile_rows, plan.block_bytes
        self.dropped = like.new_full((total_rows,), float("nan"))
        self.scratch: Tensor | None = None

    def add(
        self, gradient: HeadGradient, dz: Tensor, hidden: Tensor, start: int, stop: int, tile: Tensor | None
    ) -> None:
        """As ``HeadGradient.add``, on the kept columns."""
        if not (gradient.wants.hidden or gradient.wants.weight):
            parts, dropped = None, dz.new_zeros(dz.shape[0], dtype=self.dropped.dtype)
        else:
            parts, dropped = self.choose(dz)
        self.rows.scatter(self.dropped, dropped, start, stop)
        if parts is None:
            gradient.add(dz, hidden, start, stop, tile)
            return
        gradient.add_bias(dz)
        rows = None
        if gradient.wants.hidden:
            rows = dz.new_zeros(dz.shape[0], gradient.head.weight.shape[1], dtype=gradient.dtype)
        for part in parts:
            self._add_part(gradient, part, dz, hidden.to(dz.dtype), rows)
        if rows is not None:
            gradient.put_hidden(rows, start, stop)

    def choose(self, dz: Tensor) -> tuple[list[Part] | None, Tensor]:
        """What to keep of ``dz`` [c, V], and the dropped share of each row [c]; no parts: all of
        it."""
        count, vocab = dz.shape
        if self.scratch is None:
            self.scratch = dz.new_empty(self.tile_rows, vocab)
        mass = self._mass(dz)
        score = self._score(dz, mass)
        below = score < self._thresholds(score)[:, None]
        dropped = self._dropped(dz, below)
        passes = dropped <= self.tolerance * mass[:, None]
        allowed, small = torch.stack([passes.sum(0), below.sum(1)]).tolist()
        kept = [vocab - columns for columns in small]

        # The highest threshold that all rows allow, and a higher one for as many as pay for it.
        last = next((i for i, rows in enumerate(allowed) if rows == count), None)
        if last is None:
            return None, torch.zeros_like(mass)
        single = count * kept[last]
        costs = [rows * kept[i] + (count - rows) * kept[last] for i, rows in enumerate(allowed[:last])]
        first = min(range(last), key=costs.__getitem__) if last else 0
        split = last > 0 and costs[first] < SPLIT_BELOW * single
        if (costs[first] if split else single) > DENSE_ABOVE * count * vocab:
            return None, torch.zeros_like(mass)
        share = dropped / mass.clamp(min=torch.finfo(mass.dtype).tiny)[:, None]
        if not split:
            return [Part(None, columns_of(below[last], kept[last]))], share[:, last]
        easy = passes[:, first]
        parts = [
            Part(torch.nonzero(easy)[:, 0], columns_of(below[first], kept[first])),
            Part(torch.nonzero(~easy)[:, 0], columns_of(below[last], kept[last])),
        ]
        return parts, torch.where(easy, share[:, first], share[:, last])

    def _thresholds(self, score: Tensor) -> Tensor:
        """[L] descending, in the dtype of ``score``."""
        exponents = torch.linspace(0, 1, LEVELS, dtype=torch.float64, device=score.device)
        return (self.tolerance * score.shape[0] ** -exponents).to(score.dtype)

    def _magnitudes(self, dz: Tensor, factor: Tensor | None = None) -> Iterator[tuple[int, int, Tensor]]:
        """(start, stop, abs(dZ) [r, V], times ``factor`` [c]) tile by tile."""
        assert self.scratch is not None
        for start, stop in spans(dz.shape[0], self.tile_rows):
            part = torch.abs(dz[start:stop], out=self.scratch[: stop - start])
            yield start, stop, part if factor is None else part.mul_(factor[start:stop, None])

    def _mass(self, dz: Tensor) -> Tensor:
        """[c] sum of abs(dZ)."""
        mass = self.dropped.new_empty(dz.shape[0])
        for start, stop, part in self._magnitudes(dz):
            torch.sum(part, 1, dtype=mass.dtype, out=mass[start:stop])
        return mass

    def _score(self, dz: Tensor, mass: Tensor) -> Tensor:
        """[V] largest share that a column has of any row's mass."""
        inverse = torch.where(mass > 0, mass.reciprocal(), torch.zeros_like(mass))
        score = dz.new_zeros(dz.shape[1])
        for _, _, part in self._magnitudes(dz, inverse):
            torch.maximum(score, part.amax(0), out=score)
        return score

    def _dropped(self, dz: Tensor, below: Tensor) -> Tensor:
        """[c, L] mass of each row in the columns of ``below`` [L, V]."""
        columns = below.to(dz.dtype).t()
        dropped = self.dropped.new_empty(dz.shape[0], LEVELS)
        for start, stop, part in self._magnitudes(dz):
            if dz.dtype == dropped.dtype:
                torch.mm(part, columns, out=dropped[start:stop])
            else:
                dropped[start:stop] = torch.mm(part, columns, out_dtype=dropped.dtype)
        return dropped

    def _add_part(
        self, gradient: HeadGradient, part: Part, dz: Tensor, hidden: Tensor, hidden_gradient: Tensor | None
    ) -> None:
        """GEMMs of one part, a block of columns at a time; ``hidden`` [c, d] in the dtype of dZ."""
        weight, vocab = gradient.head.weight, gradient.head.vocab
        count = dz.shape[0] if part.rows is None else part.rows.numel()
        columns = vocab if part.columns is None else part.columns.numel()
        column_bytes = weight.shape[1] * (dz.itemsize + gradient.dtype.itemsize) + 2 * count * dz.itemsize
        hidden = hidden if part.rows is None else hidden[part.rows]
        rows = hidden_gradient
        if rows is not None and part.rows is not None:
            rows = rows.new_zeros(count, rows.shape[1])
        step = max(1, self.block_bytes // column_bytes)
        for start, stop in spans(columns, step - step % ALIGNMENT or step):
            add_block(gradient, part, dz, hidden, rows, start, stop)
        if hidden_gradient is not None and part.rows is not None and rows is not None:
            hidden_gradient.index_copy_(0, part.rows, rows)


def add_block(
    gradient: HeadGradient, part: Part, dz: Tensor, hidden: Tensor, rows: Tensor | None, start: int, stop: int
) -> None:
    """Columns ``start:stop`` of a part; ``rows`` [c, d] collects the gradient of its hidden
    states."""
    weight, index = gradient.head.weight, None
    if part.columns is None:
        block, head = dz[:, start:stop], weight[start:stop]
    else:
        index = part.columns[start:stop]
        block, head = pick(dz, 1, index), weight.index_select(0, index)
    if part.rows is not None:
        block = pick(block, 0, part.rows)
    if rows is not None:
        accumulate(block, head.to(dz.dtype), rows)
    del head
    if gradient.wants.weight:
        gradient.add_weight_rows(block, hidden, index, start, stop)


def pick(matrix: Tensor, dim: int, index: Tensor) -> Tensor:
    """Rows (``dim`` 0) or columns ``index``."""
    if matrix.itemsize > 2:
        return matrix.index_select(dim, index)
    rows, columns = (index.numel(), matrix.shape[1]) if dim == 0 else (matrix.shape[0], index.numel())
    out = matrix.new_empty(rows, -(-columns // ALIGNMENT) * ALIGNMENT)[:, :columns]
    return torch.index_select(matrix, dim, index, out=out)


def columns_of(below: Tensor, kept: int) -> Tensor | None:
    """The ``kept`` columns that are not ``below`` [V], ascending; None for all."""
    return None if kept == below.numel() else torch.nonzero(~below)[:, 0]
