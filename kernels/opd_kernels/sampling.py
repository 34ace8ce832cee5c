"""Gradients from a sample of the vocabulary's columns: unbiased, for a share of the products.

Column v of a block of at most ``BLOCK_ROWS`` rows is drawn with probability pi_v, independently of all others, and
what is drawn is divided by pi_v:

    dX = sum over drawn v of dZ[:, v] W_v / pi_v,        dW_v = dZ[:, v]^T hidden / pi_v, 0 where v is not drawn.

The expectations are the dense gradients, whatever pi is, and the noise is known: for dX

    E ||dX - E dX||^2 = sum over v of (1 / pi_v - 1) ||dZ[:, v]||^2 ||W_v||^2,

smallest for a given number of columns where pi_v = min(1, c s_v) with s_v = ||dZ[:, v]|| ||W_v||. Of W_v a part is
enough for pi, and ``sampled`` takes for dZ what is known of it before any teacher has worked. The sum is estimated
from what is drawn.

What is drawn is a function of the seed, the block's rows and the global id of a column: it is the same again in a
resumed run, and on every device whose chunks have the same rows, which follow from ``workspace_bytes``.

Shapes: c rows of a block, V columns, k drawn columns, d hidden size.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .chunking import ALIGNMENT, WEIGHT_TILE_BYTES, ChunkPlan, spans
from .heads import HeadGradient, half_gradient, multiplied
from .problem import Head, Sampling
from .shards import Shards
from .splitmix import uniforms

BLOCK_ROWS = {"cpu": 256, "cuda": 512}
"""Rows that share a draw. Fewer need fewer columns for the same noise, more pay less for gathered weights: of these and
of the rows of dW as many bytes move for a block of 256 rows as for one of 1024. On a GPU the products are so fast that
256 rows would wait for those bytes. Twice the rows cost up to 2.5 times the noise where the share of the columns is
small beside the number of live ones, which is why it is not 1024 (``benchmarks/NOTES.md``)."""
DRAWN_TOGETHER = 8
"""Most blocks for which a GPU draws at once."""
ROUNDS = 24
"""Of the search for the constant in pi; in each the columns that are certain can only grow in number."""
DEVIATIONS = 8
"""Standard deviations of the number of drawn columns for which a GPU has room: more come less than once in 10^14
draws, and would lose the last columns."""
WIDTH = 64
"""Components of W_v that stand for its size in pi: reading all of W would cost more than the better pi saves."""


def inclusion(score: Tensor, budget: float) -> Tensor:
    """[V] float64 probabilities min(1, c score) whose sum is ``budget``; where a score is not finite, which spoils
    the gradient anyway, the same for all."""
    score = score.double()
    certain = torch.zeros_like(score, dtype=torch.bool)
    factor = score.new_zeros(())
    for _ in range(ROUNDS):
        rest = torch.where(certain, 0.0, score).sum()
        factor = torch.where(rest > 0, (budget - certain.sum()).clamp(min=0.0) / rest, 0.0)
        certain |= score * factor >= 1.0
    pi = torch.where(certain, 1.0, score * factor)
    return torch.where(score.isfinite().all(), pi, budget / max(1, score.numel()))


@dataclass(frozen=True)
class Draw:
    """The drawn columns of a block.

    Attributes:
        columns: [k] ascending.
        inverse: [k] 1 / pi in the compute dtype; 0 for places that hold no column (on a GPU).
        known: [V] more than 0 where a column is drawn, and else 0 or False.
    """

    columns: Tensor
    inverse: Tensor
    known: Tensor

    @property
    def certain(self) -> Tensor:
        """[k] whether pi is 1."""
        return self.inverse == 1.0

    @property
    def places(self) -> Tensor:
        """[V] where a drawn column is among them."""
        return (self.known > 0).cumsum(0) - 1

    @property
    def spread(self) -> Tensor:
        """[k] 1 - pi."""
        return torch.where(self.inverse > 0, 1.0 - self.inverse.clamp(min=1.0).reciprocal(), 0.0)


def block_rows(device: torch.device) -> int:
    """Rows that share a draw on a device."""
    return BLOCK_ROWS.get(device.type, BLOCK_ROWS["cuda"])


def scratch_bytes(share: float, vocab: int, rows: int, item: int, device: torch.device) -> int:
    """Bytes a sampler needs besides the blocks of its products: what it knows of columns, and about eight [c, k]."""
    block = min(rows, block_rows(device))
    known = 3 * item + 48
    if device.type == "cuda":
        # Of every block that is drawn with others sums of squares of 32 rows each, scores, and what is drawn.
        known = min(DRAWN_TOGETHER, -(-rows // block)) * (4 * -(-block // 32) + 3 * item + 1) if rows else 0
    return vocab * known + most_columns(share, vocab) * 8 * block * item


def block_bytes(device: torch.device) -> int:
    """Most bytes that pay for the gathered weights of one product."""
    return 256 << 20 if device.type == "cuda" else 16 << 20


def most_columns(share: float, vocab: int) -> int:
    """For which a GPU has room."""
    most = min(vocab, math.ceil(share * vocab + DEVIATIONS * math.sqrt(share * vocab)))
    return -(-most // ALIGNMENT) * ALIGNMENT


class Sampler:
    """Draws the columns of each block, runs the products of what is drawn and adds up their noise.

    Args:
        sampling: the call's.
        head: the student's.
        shards: over which it is split, or None.
        plan: of the pass.
        like: of the compute dtype.
        impl: whose operations run, "torch" or "triton".
    """

    def __init__(
        self, sampling: Sampling, head: Head, shards: Shards | None, plan: ChunkPlan, like: Tensor, impl: str
    ) -> None:
        self.sampling, self.head, self.shards, self.like = sampling, head, shards, like
        self.tile_rows, self.block_bytes = plan.tile_rows, plan.block_bytes
        self.block_rows, self.kernels = block_rows(like.device), make_kernels(impl, head.vocab)
        weight = head.weight[: head.vocab]
        self.sizes = torch.linalg.vector_norm(weight[:, :WIDTH], dim=1, dtype=like.dtype)
        self.first = 0 if shards is None else shards.start
        self.operand = weight.dtype if half_gradient(weight, like.dtype) else like.dtype
        self.weight_variance, self.drawn = (like.new_zeros(()) for _ in range(2))
        self.moments: list[list[Tensor]] = []
        self.blocks = 0
        if self.kernels is not None:
            self.seed = self.kernels.seed_on_device(sampling.seed, like.device)
        else:
            self.touched = torch.zeros_like(self.sizes, dtype=torch.bool)
            self.ids = torch.arange(self.first, self.first + head.vocab, device=like.device)

    def draw(self, squares: Tensor, start: int, labels: Tensor | None = None, weighted: Tensor | None = None) -> Draw:
        """What is drawn for the block from computed row ``start`` on.

        Args:
            squares: [V] sums of squares of dZ's columns, or what is to stand for them.
            labels: [c] columns that are drawn in any case where ``weighted`` [c].
        """
        share, vocab = self.sampling.share, self.head.vocab
        pi = inclusion(squares.clamp(min=0.0).sqrt() * self.sizes, self.budget)
        if labels is not None and weighted is not None and vocab:
            pi.scatter_reduce_(0, labels, weighted.to(pi.dtype), "amax")
        keep = uniforms(self.ids, self.sampling.seed, start) < pi
        extra = 0 if labels is None else -(-labels.numel() // ALIGNMENT) * ALIGNMENT
        columns, inverse = self._columns(keep, pi, min(vocab, most_columns(share, vocab) + extra))
        self.drawn += (inverse > 0).sum()
        self.blocks += 1
        self.touched |= keep
        return Draw(columns, inverse, keep)

    @property
    def budget(self) -> float:
        """Expected number of drawn columns."""
        return max(1.0, self.sampling.share * self.head.vocab)

    def draw_blocks(
        self, squares: Tensor, start: int, labels: Tensor | None = None, table: Tensor | None = None
    ) -> list[Draw]:
        """What ``draw`` gives for each of the blocks from computed row ``start`` on, by kernels.

        Args:
            squares: [B, V rounded up], a dense tensor that is overwritten; 0 in columns that do not exist.
            labels: [c] int64, columns or -1; drawn in any case where LABEL_SCALE is not 0.
            table: [FIELDS, c] of the student; read with ``labels`` only.
        """
        assert self.kernels is not None
        vocab = self.head.vocab
        squares[:, :vocab].clamp_(min=0.0).sqrt_().mul_(self.sizes)
        extra = 0 if labels is None else min(self.block_rows, labels.numel())
        most = -(-min(vocab, most_columns(self.sampling.share, vocab) + extra) // ALIGNMENT) * ALIGNMENT
        found = self.kernels.draw(
            squares, vocab, self.budget, self.seed, start, self.block_rows, self.first, most, labels, table
        )
        self.drawn += found.counts.sum()
        self.blocks += len(squares)
        known = found.known[:, :vocab]
        return [Draw(*parts) for parts in zip(found.columns, found.inverse, known, strict=True)]

    def _columns(self, keep: Tensor, pi: Tensor, most: int) -> tuple[Tensor, Tensor]:
        """The kept columns and 1 / pi; on a GPU ``most`` places, so that the host does not wait."""
        if not keep.is_cuda:
            columns = torch.nonzero(keep)[:, 0]
            return columns, pi[columns].reciprocal().to(self.like.dtype)
        places = torch.nonzero_static(keep, size=most, fill_value=-1)[:, 0]
        columns = places.clamp(min=0)
        return columns, torch.where(places >= 0, pi[columns].reciprocal(), 0.0).to(self.like.dtype)

    def add(self, gradient: HeadGradient, dz: Tensor, hidden: Tensor, start: int, stop: int) -> None:
        """As ``HeadGradient.add``, of dZ whose columns are all known."""
        gradient.add_bias(dz)
        if not (gradient.wants.hidden or gradient.wants.weight):
            return
        draws: list[Draw] = []
        for first, last in spans(dz.shape[0], self.block_rows):
            block, states = dz[first:last], hidden[first:last]
            if self.kernels is None:
                draws = [self.draw(column_squares(block, self.tile_rows, self.like), start + first)]
            elif not draws:
                together = dz[first : first + DRAWN_TOGETHER * self.block_rows]
                draws = self.draw_blocks(self.kernels.squares_of_dz(together, self.block_rows), start + first)
            draw = draws.pop(0)
            self.products(gradient, draw, *self.scaled(block, draw), states, start + first, start + last)

    def scaled(self, dz: Tensor, draw: Draw) -> tuple[Tensor, Tensor]:
        """([c, k] the drawn columns of ``dz``, divided by their pi; [1, k] as ``products`` takes it)."""
        if self.kernels is not None:
            found: tuple[Tensor, Tensor] = self.kernels.scaled(dz, draw.columns, draw.inverse, self.operand)
            return found
        scaled = dz.index_select(1, draw.columns).to(self.like.dtype).mul_(draw.inverse)
        return scaled, (scaled.square().sum(0) * draw.spread)[None]

    def products(
        self,
        gradient: HeadGradient,
        draw: Draw,
        dz: Tensor,
        sums: Tensor,
        hidden: Tensor,
        start: int,
        stop: int,
    ) -> None:
        """Add the gradients of a block from its drawn columns ``dz`` [c, k], which pi has divided.

        ``sums`` [1 or 2, k] has the sums of the squares of dZ's columns times 1 - pi, and, where dZ holds an E_p[g]
        from the same draw, the weights of the columns in E_p[W]: what a column adds to the noise is then
        dZ_v (W_v - E_p[W]), to first order.
        """
        weight, wants = self.head.weight, gradient.wants
        dz, hidden = dz.to(self.operand), hidden.to(self.operand)
        moments, rows = Moments(sums, weight.shape[1]), None
        for left, right in self.pieces(draw, weight.shape[1], self._bytes()):
            part, columns = dz[:, left:right], draw.columns[left:right]
            if wants.hidden:
                own, sizes = self._take(columns)
                rows = multiplied(part, own, self.like.dtype, rows)
                moments.add(own, sizes, left, right)
                del own
            if wants.weight:
                self._add_weight(gradient, part, hidden, draw, left, right)
        if wants.hidden:
            self.moments.append(moments.known())
            if rows is None:  # a shard without columns
                rows = self.like.new_zeros(dz.shape[0], weight.shape[1])
            gradient.put_hidden(rows, start, stop)

    def _take(self, columns: Tensor) -> tuple[Tensor, Tensor]:
        """(rows of the weight as the products take them, their squared 2-norms)."""
        if self.kernels is not None:
            found: tuple[Tensor, Tensor] = self.kernels.take(self.head.weight, columns, self.operand)
            return found
        own = self.head.weight.index_select(0, columns).to(self.operand)
        return own, torch.linalg.vector_norm(own, dim=1, dtype=self.like.dtype).square_()

    def _add_weight(
        self, gradient: HeadGradient, dz: Tensor, hidden: Tensor, draw: Draw, left: int, right: int
    ) -> None:
        """Add to the weight's gradient, and to its noise, what the drawn columns ``left:right`` give."""
        added, target = gradient.weight_rows(dz, hidden), gradient.weight_accumulator(dz)
        columns, inverse = draw.columns[left:right], draw.inverse[left:right]
        if self.kernels is not None:
            self.weight_variance += self.kernels.add_rows(added, columns, inverse, target).sum()
            return
        target.index_add_(0, columns, added)
        sizes = torch.linalg.vector_norm(added, dim=1).square_()
        self.weight_variance += (draw.spread[left:right] * sizes).sum()

    def pieces(self, draw: Draw, width: int, item: int) -> list[tuple[int, int]]:
        """Places of the drawn columns whose rows of ``width`` elements of ``item`` bytes are gathered together."""
        return list(spans(draw.columns.numel(), self._step(width, item)))

    def _bytes(self) -> int:
        """Of an element of the weight and of what is added to its gradient."""
        return 3 * self.like.itemsize if self.kernels is None else self.operand.itemsize + self.like.itemsize

    def _step(self, width: int, item: int) -> int:
        step = max(ALIGNMENT, self.block_bytes // (item * width))
        return step - step % ALIGNMENT

    def _size(self, weight: Tensor) -> Tensor:
        """Squared 2-norm of a gradient of the weight."""
        if self.kernels is not None:
            whole: Tensor = torch.linalg.vector_norm(weight[: self.head.vocab], dtype=self.like.dtype)
            return whole.square()
        drawn, none = torch.nonzero(self.touched)[:, 0], self.like.new_zeros(())
        parts = drawn.split(self._step(weight.shape[1], 3 * self.like.itemsize))
        dtype = self.like.dtype
        return sum((torch.linalg.vector_norm(weight.index_select(0, x), dtype=dtype).square() for x in parts), none)

    def report(self, hidden: Tensor | None, weight: Tensor | None, unscale: Tensor | None) -> Tensor:
        """[3] share of the columns that were drawn, and the relative noise of the finished gradients ``hidden`` and
        ``weight``, NaN for what is None; ``unscale`` as in ``HeadGradient``."""
        variances = torch.stack([total_variance(self.moments, self.shards, self.like), self.weight_variance])
        if unscale is not None:
            variances = variances * unscale.square()
        none, unknown = self.like.new_zeros(()), self.like.new_full((), math.nan)
        size = [none if hidden is None else row_norms(hidden, self.like.dtype).square().sum(), none]
        if weight is not None:
            size[1] = self._size(weight)
        counts = torch.stack([self.drawn, self.like.new_full((), float(self.blocks * self.head.vocab))])
        if self.shards is not None:
            # Every rank has the sum of the hidden states' gradient.
            sums = self.shards.sum_(torch.cat([variances, counts, size[1][None]]))
            variances, counts, size[1] = sums[:2], sums[2:4], sums[4]
        signal = (torch.stack(size) - variances).clamp(min=0.0)
        relative = torch.where(variances > 0, (variances / signal).sqrt(), 0.0)
        known = [unknown if x is None else y for x, y in zip((hidden, weight), relative, strict=True)]
        return torch.stack([counts[0] / counts[1].clamp(min=1.0), *known])


def make_kernels(impl: str, vocab: int) -> Any:
    """``triton_columns`` where its kernels run, else None."""
    if impl != "triton" or vocab == 0:
        return None
    from . import triton_columns

    return triton_columns


def row_norms(matrix: Tensor, dtype: torch.dtype) -> Tensor:
    """[n] 2-norms of the rows of a matrix, in ``dtype``, without a copy of it in another one."""
    step = max(1, WEIGHT_TILE_BYTES // (matrix.shape[1] * dtype.itemsize))
    parts = [torch.linalg.vector_norm(x, dim=1, dtype=dtype) for x in matrix.split(step)]
    return torch.cat(parts) if parts else matrix.new_empty(0, dtype=dtype)


def column_squares(dz: Tensor, tile_rows: int, like: Tensor) -> Tensor:
    """[V] sums of squares of the columns of ``dz`` [c, V], in the dtype of ``like``."""
    out = like.new_zeros(dz.shape[1])
    for start, stop in spans(dz.shape[0], tile_rows):
        out += dz[start:stop].to(out.dtype).square().sum(0)
    return out


class Moments:
    """What is known of a block's sum over columns of a_v ||W_v - mean||^2 with the mean of W under other weights, from
    parts of W.

    Args:
        sums: [1, k] a, or [2, k] with the weights of the mean, which are not negative; without them it is 0.
        width: d.
    """

    def __init__(self, sums: Tensor, width: int) -> None:
        self.sizes, self.totals, self.width = sums[0], sums.sum(1), width
        self.shares: Tensor | None = None
        if len(sums) > 1:
            self.shares = sums / self.totals.clamp(min=torch.finfo(sums.dtype).tiny)[:, None]
        self.means: Tensor | None = None
        self.square: Tensor | None = None

    def add(self, weight: Tensor, squares: Tensor, left: int, right: int) -> None:
        """Rows ``left:right`` of W, ``weight``, and their squared norms."""
        square = self.sizes[left:right] @ squares
        self.square = square if self.square is None else self.square + square
        if self.shares is not None:
            shares = self.shares[:, left:right].to(weight.dtype)
            self.means = multiplied(shares, weight, self.sizes.dtype, self.means)

    def known(self) -> list[Tensor]:
        """Sum of a ||W||^2, [1 or 2] sums of the rows of ``sums``, and with weights [2, d] the means of W."""
        zeros = self.sizes.new_zeros
        found = [zeros(()) if self.square is None else self.square, self.totals]
        if self.shares is not None:
            found.append(zeros(2, self.width) if self.means is None else self.means)
        return found


def total_variance(blocks: list[list[Tensor]], shards: Shards | None, like: Tensor) -> Tensor:
    """The sum of the sums of blocks, each from ``Moments.known``; with ``shards`` a mean is over all columns."""
    if not blocks:
        return like.new_zeros(())
    square, totals, *means = (torch.stack(parts) for parts in zip(*blocks, strict=True))
    if means:
        mean, mass = means[0][:, 1], totals[:, 1:]
        if shards is not None:
            sums = shards.sum_(torch.cat([mean * mass, mass], 1))
            mean = sums[:, :-1] / sums[:, -1:].clamp(min=torch.finfo(sums.dtype).tiny)
        square = square + totals[:, 0] * ((mean - 2.0 * means[0][:, 0]) * mean).sum(1)
    return square.clamp(min=0.0).sum()
