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

import torch
from torch import Tensor

from .chunking import ALIGNMENT, WEIGHT_TILE_BYTES, ChunkPlan, spans
from .heads import HeadGradient, accumulate, half_gradient
from .problem import Head, Sampling
from .shards import Shards

BLOCK_ROWS = 256
"""Rows that share a draw: fewer need fewer columns for the same noise, more pay less for gathered weights."""
ROUNDS = 24
"""Of the search for the constant in pi; in each the columns that are certain can only grow in number."""
DEVIATIONS = 8
"""Standard deviations of the number of drawn columns for which a GPU has room: more come less than once in 10^14
draws, and would lose the last columns."""
WIDTH = 64
"""Components of W_v that stand for its size in pi: reading all of W would cost more than the better pi saves."""

WORD = (1 << 64) - 1
GOLDEN, FIRST, SECOND = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB


def signed(word: int) -> int:
    """The int64 with the bits of an unsigned 64-bit number."""
    return word - (1 << 64) if word >> 63 else word


def scrambled(word: int) -> int:
    """The finaliser of SplitMix64."""
    word = (word ^ word >> 30) * FIRST & WORD
    word = (word ^ word >> 27) * SECOND & WORD
    return word ^ word >> 31


def uniforms(ids: Tensor, seed: int, block: int) -> Tensor:
    """float64 numbers in [0, 1), one for every id (int64), by SplitMix64 as a counter."""
    key = scrambled((seed & WORD) ^ scrambled(block * GOLDEN + 1 & WORD))

    def shifted(x: Tensor, places: int) -> Tensor:
        return (x >> places) & ((1 << 64 - places) - 1)

    x = ids * signed(GOLDEN) + signed(key)
    x = (x ^ shifted(x, 30)) * signed(FIRST)
    x = (x ^ shifted(x, 27)) * signed(SECOND)
    return shifted(x ^ shifted(x, 31), 11).double() * 2.0**-53


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
        certain: [k] whether pi is 1.
        keep: [V] whether a column is drawn.
    """

    columns: Tensor
    inverse: Tensor
    certain: Tensor
    keep: Tensor

    @property
    def places(self) -> Tensor:
        """[V] where a drawn column is among them."""
        return self.keep.cumsum(0) - 1

    @property
    def spread(self) -> Tensor:
        """[k] 1 - pi."""
        return torch.where(self.inverse > 0, 1.0 - self.inverse.clamp(min=1.0).reciprocal(), 0.0)


def scratch_bytes(share: float, vocab: int, rows: int, item: int) -> int:
    """Bytes a sampler needs besides the blocks of its products: what it knows of columns, and about eight [c, k]."""
    return vocab * (3 * item + 48) + most_columns(share, vocab) * 8 * min(rows, BLOCK_ROWS) * item


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
    """

    def __init__(self, sampling: Sampling, head: Head, shards: Shards | None, plan: ChunkPlan, like: Tensor) -> None:
        self.sampling, self.head, self.shards, self.like = sampling, head, shards, like
        self.tile_rows, self.block_bytes = plan.tile_rows, plan.block_bytes
        weight = head.weight[: head.vocab]
        self.sizes = torch.linalg.vector_norm(weight[:, :WIDTH], dim=1, dtype=like.dtype)
        self.touched = torch.zeros_like(self.sizes, dtype=torch.bool)
        start = 0 if shards is None else shards.start
        self.ids = torch.arange(start, start + head.vocab, device=like.device)
        self.operand = weight.dtype if half_gradient(weight, like.dtype) else like.dtype
        self.hidden_variance, self.weight_variance, self.drawn = (like.new_zeros(()) for _ in range(3))
        self.blocks = 0

    def draw(self, squares: Tensor, start: int, labels: Tensor | None = None, weighted: Tensor | None = None) -> Draw:
        """What is drawn for the block from computed row ``start`` on.

        Args:
            squares: [V] sums of squares of dZ's columns, or what is to stand for them.
            labels: [c] columns that are drawn in any case where ``weighted`` [c].
        """
        share, vocab = self.sampling.share, self.head.vocab
        pi = inclusion(squares.clamp(min=0.0).sqrt() * self.sizes, max(1.0, share * vocab))
        if labels is not None and weighted is not None and vocab:
            pi.scatter_reduce_(0, labels, weighted.to(pi.dtype), "amax")
        keep = uniforms(self.ids, self.sampling.seed, start) < pi
        extra = 0 if labels is None else -(-labels.numel() // ALIGNMENT) * ALIGNMENT
        columns, inverse = self._columns(keep, pi, min(vocab, most_columns(share, vocab) + extra))
        self.drawn += (inverse > 0).sum()
        self.blocks += 1
        self.touched |= keep
        return Draw(columns, inverse, inverse == 1.0, keep)

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
        for first, last in spans(dz.shape[0], BLOCK_ROWS):
            block, states = dz[first:last], hidden[first:last]
            squares = column_squares(block, self.tile_rows, self.like)
            draw = self.draw(squares, start + first)
            self.products(gradient, draw, self.scaled(block, draw), states, start + first, start + last)

    def scaled(self, dz: Tensor, draw: Draw) -> Tensor:
        """[c, k] the drawn columns of ``dz``, divided by their pi."""
        return dz.index_select(1, draw.columns).to(self.like.dtype).mul_(draw.inverse)

    def products(
        self,
        gradient: HeadGradient,
        draw: Draw,
        dz: Tensor,
        hidden: Tensor,
        start: int,
        stop: int,
        weights: Tensor | None = None,
    ) -> None:
        """Add the gradients of a block from its drawn columns ``dz`` [c, k], which pi has divided.

        With ``weights`` [k], of the columns in E_p[W], dZ holds an E_p[g] from the same draw: what a column adds to
        the noise is then dZ_v (W_v - E_p[W]), to first order.
        """
        weight, count, wants = self.head.weight, dz.shape[0], gradient.wants
        moments = None
        if wants.hidden:
            moments = Moments(dz.square().sum(0) * draw.spread, weights, weight.shape[1])
        dz, hidden = dz.to(self.operand), hidden.to(self.operand)
        rows = self.like.new_zeros(count, weight.shape[1]) if wants.hidden else None
        for left, right in self.pieces(draw, weight.shape[1]):
            part, columns = dz[:, left:right], draw.columns[left:right]
            if rows is not None:
                own = weight.index_select(0, columns).to(self.operand)
                accumulate(part, own, rows)
                assert moments is not None
                moments.add(own, left, right)
                del own
            if wants.weight:
                added = gradient.add_weight_rows(part, hidden, columns)
                sizes = torch.linalg.vector_norm(added, dim=1).square_()
                self.weight_variance += (draw.spread[left:right] * sizes).sum()
        if moments is not None:
            self.hidden_variance += moments.variance(self.shards)
        if rows is not None:
            gradient.put_hidden(rows, start, stop)

    def pieces(self, draw: Draw, width: int) -> list[tuple[int, int]]:
        """Places of the drawn columns whose rows of weights of ``width`` are gathered together."""
        return list(spans(draw.columns.numel(), self._step(width)))

    def _step(self, width: int) -> int:
        step = max(ALIGNMENT, self.block_bytes // (3 * width * self.like.itemsize))
        return step - step % ALIGNMENT

    def _size(self, weight: Tensor, index: Tensor) -> Tensor:
        """Squared 2-norm of rows of a matrix."""
        size: Tensor = torch.linalg.vector_norm(weight.index_select(0, index), dtype=self.like.dtype)
        return size.square()

    def report(self, hidden: Tensor | None, weight: Tensor | None, unscale: Tensor | None) -> Tensor:
        """[3] share of the columns that were drawn, and the relative noise of the finished gradients ``hidden`` and
        ``weight``, NaN for what is None; ``unscale`` as in ``HeadGradient``."""
        variances = torch.stack([self.hidden_variance, self.weight_variance])
        if unscale is not None:
            variances = variances * unscale.square()
        none = self.like.new_zeros(())
        size = [none if hidden is None else row_norms(hidden, self.like.dtype).square().sum(), none]
        if weight is not None:
            drawn = torch.nonzero(self.touched)[:, 0]
            size[1] = sum((self._size(weight, part) for part in drawn.split(self._step(weight.shape[1]))), none)
        counts = torch.stack([self.drawn, self.like.new_tensor(float(self.blocks * self.head.vocab))])
        if self.shards is not None:
            # Every rank has the sum of the hidden states' gradient.
            sums = self.shards.sum_(torch.cat([variances, counts, size[1][None]]))
            variances, counts, size[1] = sums[:2], sums[2:4], sums[4]
        signal = (torch.stack(size) - variances).clamp(min=0.0)
        relative = torch.where(variances > 0, (variances / signal).sqrt(), 0.0)
        unknown = torch.tensor([x is None for x in (hidden, weight)], device=relative.device)
        share = counts[0] / counts[1].clamp(min=1.0)
        return torch.cat([share[None], torch.where(unknown, math.nan, relative)])


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
    """Sum over columns of a_v ||W_v - mean||^2 with the mean of W under other weights, from parts of W.

    Args:
        sizes: [k] a.
        weights: [k] of the mean, not negative; None for a mean of 0.
        width: d.
    """

    def __init__(self, sizes: Tensor, weights: Tensor | None, width: int) -> None:
        self.centred, tiny = weights is not None, torch.finfo(sizes.dtype).tiny
        weights = sizes.new_zeros(sizes.shape) if weights is None else weights
        self.sizes, self.total, self.mass = sizes, sizes.sum(), weights.sum()
        self.shares = torch.stack([sizes / self.total.clamp(min=tiny), weights / self.mass.clamp(min=tiny)])
        self.means, self.square = sizes.new_zeros(2, width), sizes.new_zeros(())

    def add(self, weight: Tensor, left: int, right: int) -> None:
        """Rows ``left:right`` of W, ``weight``."""
        norms = torch.linalg.vector_norm(weight, dim=1, dtype=self.sizes.dtype)
        self.square += self.sizes[left:right] @ norms.square()
        accumulate(self.shares[:, left:right].to(weight.dtype), weight, self.means)

    def variance(self, shards: Shards | None) -> Tensor:
        mean = self.means[1]
        if shards is not None and self.centred:
            sums = shards.sum_(torch.cat([mean * self.mass, self.mass[None]]))
            mean = sums[:-1] / sums[-1].clamp(min=torch.finfo(sums.dtype).tiny)
        return (self.square + self.total * (mean.square().sum() - 2.0 * self.means[0] @ mean)).clamp(min=0.0)
