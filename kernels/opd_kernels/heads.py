"""The matrix products of a head: logits into a buffer, and the gradients of hidden states, weight
and bias.

Every product accumulates and returns at least float32. On a GPU half-precision operands go to the
library GEMM with a float32 output; elsewhere the weight is up-cast one tile of vocabulary rows at
a time, so that no full-size copy of it ever exists.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from . import cpu_gemm
from .chunking import spans
from .problem import Head
from .selection import RowPlan
from .shards import Shards
from .types import FLOOR


def native_half(weight: Tensor, compute_dtype: torch.dtype) -> bool:
    """Whether the library multiplies this half-precision weight directly, with a float32 result."""
    return weight.is_cuda and weight.dtype in (torch.bfloat16, torch.float16) and compute_dtype == torch.float32


def half_gradient(weight: Tensor, compute_dtype: torch.dtype) -> bool:
    """Whether dZ is stored in the weight's dtype: float16 with a factor, see ``HeadGradient.choose_scale``."""
    return native_half(weight, compute_dtype)


def needs_upcast(weight: Tensor, compute_dtype: torch.dtype) -> bool:
    """Whether tiles of this weight are converted to the compute dtype."""
    return weight.dtype != compute_dtype and not native_half(weight, compute_dtype)


def gather(tensor: Tensor, index: Tensor | None, start: int, stop: int) -> Tensor:
    """Rows ``start:stop`` of the computed rows; ``index`` None means every row is computed, in
    order."""
    return tensor[start:stop] if index is None else tensor[index[start:stop]]


def write_logits(head: Head, hidden: Tensor, out: Tensor, tile: Tensor | None) -> None:
    """Fill ``out`` [c, V] (compute dtype) with the logits of ``hidden`` [c, d], temperature
    applied.

    ``tile`` is flat storage of the compute dtype for up-cast rows of the weight.
    """
    write_product(head, hidden, out, tile)
    if head.bias is not None:
        out.add_(head.bias[: head.vocab].to(out.dtype), alpha=head.factor)
    if head.softcap is not None:
        cap = head.softcap / head.temperature
        out.div_(cap).tanh_().mul_(cap)
    if head.floor:
        out.clamp_(min=FLOOR)


def write_product(head: Head, hidden: Tensor, out: Tensor, tile: Tensor | None) -> None:
    """``factor * hidden W^T`` into ``out`` [c, V]: the logits before bias, softcap and floor."""
    weight, factor = head.weight[: head.vocab], head.factor
    if weight.dtype == out.dtype:
        scaled = hidden if factor == 1.0 else hidden * factor
        cpu_gemm.logits(scaled, weight, out)
    elif native_half(weight, out.dtype):
        # The GEMM scales its float32 result on the way out; beta = 0 ignores what is in it.
        torch.addmm(out, hidden, weight.t(), out_dtype=out.dtype, beta=0.0, alpha=factor, out=out)
    else:
        assert tile is not None
        scaled = hidden.to(out.dtype).mul_(factor)
        for start, stop, part in upcast_tiles(weight, tile):
            torch.mm(scaled, part.t(), out=out[:, start:stop])


def upcast_tiles(weight: Tensor, tile: Tensor) -> Iterator[tuple[int, int, Tensor]]:
    """Yield (start, stop, rows of ``weight`` in the dtype of ``tile``), reusing ``tile`` for
    each."""
    width = weight.shape[1]
    for start, stop in spans(weight.shape[0], tile.numel() // width):
        part = tile[: (stop - start) * width].view(stop - start, width)
        part.copy_(weight[start:stop])
        yield start, stop, part


def accumulate(left: Tensor, right: Tensor, out: Tensor) -> None:
    """``out += left @ right``; ``out`` may be of a wider dtype than the factors."""
    if left.dtype == out.dtype:
        torch.addmm(out, left, right, out=out)
    else:
        torch.addmm(out, left, right, out_dtype=out.dtype, out=out)


def multiplied(left: Tensor, right: Tensor, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
    """``left @ right`` in a dtype that may be wider than that of the factors, added to ``out`` if that is given."""
    if out is not None:
        accumulate(left, right, out)
        return out
    return torch.mm(left, right) if left.dtype == dtype else torch.mm(left, right, out_dtype=dtype)


@dataclass(frozen=True)
class Wants:
    """Which gradients are asked for."""

    hidden: bool = False
    weight: bool = False
    bias: bool = False

    def __bool__(self) -> bool:
        return self.hidden or self.weight or self.bias


LARGEST_SCALE = 8
"""log2 of a row's factor in a float16 dZ: entries up to 256 times the factor fit, and those from 2e-7 of it on
keep all their digits. What exceeds that is inf, which a loss scaler sees."""


class HeadGradient:
    """Accumulates the gradients of one head from chunks of dZ = d loss / d (hidden W^T).

    ``weight`` accumulates in the compute dtype (float32 for half-precision weights) and is cast once; where one
    block of a bfloat16 dZ holds every row, its product is rounded to bfloat16 once and no accumulator is needed.
    """

    def __init__(self, head: Head, wants: Wants, rows: RowPlan, compute_dtype: torch.dtype) -> None:
        self.head, self.wants, self.index, self.dtype = head, wants, rows.index, compute_dtype
        hidden_dtype, weight_dtype = (
            compute_dtype if dtype == torch.float16 else dtype for dtype in (head.hidden.dtype, head.gradient_dtype)
        )
        self.stored = weight_dtype
        self.count = rows.count
        self.unscale: Tensor | None = None
        self.hidden: Tensor | None = None
        self.weight: Tensor | None = None
        self.bias: Tensor | None = None
        if wants.hidden:
            every = rows.count == head.hidden.shape[0]
            make = torch.empty_like if every else torch.zeros_like
            self.hidden = make(head.hidden, dtype=hidden_dtype, memory_format=torch.contiguous_format)
        if wants.bias:
            self.bias = head.hidden.new_zeros(head.weight.shape[0], dtype=compute_dtype)

    def choose_scale(self, storage: torch.dtype | None, *factors: Tensor | None) -> Tensor | None:
        """The power of two that dZ is multiplied with where its ``storage`` is float16; chosen on the device from
        the rows' ``factors`` [N] in the loss. The gradients are divided by it again."""
        if storage != torch.float16:
            return None
        largest = torch.stack([x.abs().amax() for x in factors if x is not None]).amax() * self.head.factor
        _, exponent = torch.frexp(largest)  # an upper bound of log2
        exponent = torch.where(torch.isfinite(largest) & (largest > 0), exponent, LARGEST_SCALE)
        self.unscale = torch.ldexp(torch.ones_like(largest), exponent - LARGEST_SCALE)
        return self.unscale.reciprocal()

    def add(self, dz: Tensor, hidden: Tensor, start: int, stop: int, tile: Tensor | None) -> None:
        """Add the rows ``start:stop`` of the computed rows: ``dz`` [c, V], ``hidden`` [c, d]."""
        if self.wants.hidden:
            self._add_hidden(dz, start, stop, tile)
        if self.wants.weight:
            self._add_weight(dz, hidden)
        self.add_bias(dz)

    def add_bias(self, dz: Tensor) -> None:
        if self.bias is not None:
            self.bias[: self.head.vocab].add_(dz.sum(0, dtype=self.dtype))

    def put_hidden(self, rows: Tensor, start: int, stop: int) -> None:
        """The gradient of the computed rows ``start:stop`` is ``rows`` [c, d]."""
        assert self.hidden is not None
        if self.unscale is not None:
            rows = rows.mul_(self.unscale)
        if self.index is None:
            self.hidden[start:stop] = rows
        else:
            self.hidden[self.index[start:stop]] = rows.to(self.hidden.dtype)

    def weight_rows(self, dz: Tensor, hidden: Tensor) -> Tensor:
        """[k, d] what the columns of ``dz`` [c, k] add to as many rows of the weight; ``hidden`` [c, d] is of its
        dtype."""
        return multiplied(dz.t(), hidden, self.dtype)

    def weight_accumulator(self, like: Tensor) -> Tensor:
        """The weight's gradient in the compute dtype, zeros at first."""
        if self.weight is None:
            self.weight = like.new_zeros(self.head.weight.shape, dtype=self.dtype)
        return self.weight

    def add_bias_columns(self, sums: Tensor, index: Tensor) -> None:
        """Add the sums [k] of the columns ``index`` [k] of dZ."""
        if self.bias is not None:
            self.bias.index_add_(0, index, sums)

    def _add_hidden(self, dz: Tensor, start: int, stop: int, tile: Tensor | None) -> None:
        assert self.hidden is not None
        weight = self.head.weight[: self.head.vocab]
        if self.index is None and weight.dtype == self.hidden.dtype == dz.dtype == self.dtype:
            cpu_gemm.hidden_gradient(dz, weight, self.hidden[start:stop])
            return
        if dz.dtype != self.dtype:
            # A bfloat16 result would let the library round its partial sums over the vocabulary too.
            rows = torch.mm(dz, weight, out_dtype=self.dtype)
        elif weight.dtype == dz.dtype:
            rows = dz.new_empty(dz.shape[0], weight.shape[1])
            cpu_gemm.hidden_gradient(dz, weight, rows)
        else:
            assert tile is not None
            rows = dz.new_zeros(dz.shape[0], weight.shape[1])
            for first, last, part in upcast_tiles(weight, tile):
                torch.addmm(rows, dz[:, first:last], part, out=rows)
        self.put_hidden(rows, start, stop)

    def _add_weight(self, dz: Tensor, hidden: Tensor) -> None:
        rows, width = self.head.weight.shape
        used, hidden = self.head.vocab, hidden.to(dz.dtype)
        first = self.weight is None
        if self.weight is None:
            whole = dz.shape[0] == self.count and dz.dtype == self.stored == torch.bfloat16
            self.weight = dz.new_empty(rows, width, dtype=dz.dtype if whole else self.dtype)
            self.weight[used:].zero_()
        target = self.weight[:used]
        if dz.dtype == self.dtype:
            cpu_gemm.weight_gradient(dz, hidden, target, add=not first)
        elif target.dtype == dz.dtype:
            torch.mm(dz.t(), hidden, out=target)
        elif not first:
            accumulate(dz.t(), hidden, target)
        else:
            torch.mm(dz.t(), hidden, out_dtype=self.dtype, out=target)

    def finish(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Gradients of (hidden, weight, bias); zeros where no row contributed.

        In the dtype of the head, except for float16: its gradients stay in the compute dtype until
        the upstream gradient, usually a loss scaler's large factor, has been applied.
        """
        weight, bias = self.weight, self.bias
        if self.unscale is not None:
            for gradient in (weight, bias):
                if gradient is not None:
                    gradient.mul_(self.unscale)
        if self.wants.weight:
            like = self.head.weight
            weight = like.new_zeros(like.shape, dtype=self.stored) if weight is None else weight.to(self.stored)
        return self.hidden, weight, bias


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
