"""Large float32 matrix products of a CPU, by oneDNN where PyTorch carries it.

``torch.mm`` goes to MKL, which leaves AVX-512 unused on processors of other makers and repacks the
whole weight for every chunk of rows: 70 to 95 GFLOP/s on one core of an AMD EPYC where oneDNN reaches
130 to 160 (``benchmarks/NOTES.md``). PyTorch offers oneDNN's float32 product as the operator
``mkldnn::_linear_pointwise``, which its compiler uses; where that is missing, and for small or
float64 products, ``torch.mm`` runs.

The products go over blocks of vocabulary columns, so that a block of the weight and its result stay
in cache and no full-size result is copied. Shapes: c rows, V columns, d hidden size.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from .chunking import product_block_bytes, spans

BLOCK_COLUMNS = 4096
"""At most; some of oneDNN's kernels add them up one after the other."""


@functools.cache
def linear() -> Any:
    """The operator (x [c, d], w [V, d]) -> x w^T, or None."""
    if not torch.backends.mkldnn.is_available():
        return None
    found = getattr(torch.ops.mkldnn, "_linear_pointwise", None)
    return None if found is None else functools.partial(found, B=None, attr="none", scalars=[], algorithm="")


def blocks(matrix: Tensor, width: int) -> int | None:
    """Columns in a block of products with ``matrix`` [c, V] and hidden size ``width``; None where
    ``torch.mm`` is to be used."""
    most = product_block_bytes(4 * matrix.numel())
    if matrix.device.type != "cpu" or matrix.dtype != torch.float32 or most == 0 or linear() is None:
        return None
    return min(BLOCK_COLUMNS, max(1, most // 4 // max(width, matrix.shape[0])))


def logits(hidden: Tensor, weight: Tensor, out: Tensor) -> None:
    """``out`` [c, V] = hidden [c, d] weight^T."""
    block = blocks(out, weight.shape[1])
    if block is None:
        torch.mm(hidden, weight.t(), out=out)
        return
    product = linear()
    for start, stop in spans(out.shape[1], block):
        out[:, start:stop] = product(hidden, weight[start:stop])


def hidden_gradient(dz: Tensor, weight: Tensor, out: Tensor) -> None:
    """``out`` [c, d] = dz [c, V] weight."""
    block = blocks(dz, weight.shape[1])
    if block is None:
        torch.mm(dz, weight, out=out)
        return
    product = linear()
    out.zero_()
    for start, stop in spans(dz.shape[1], block):
        out.add_(product(dz[:, start:stop], weight[start:stop].t()))


def weight_gradient(dz: Tensor, hidden: Tensor, out: Tensor, add: bool) -> None:
    """``out`` [V, d] = dz [c, V]^T hidden [c, d], added to what is there with ``add``."""
    block = blocks(dz, hidden.shape[1])
    if block is None:
        if add:
            torch.addmm(out, dz.t(), hidden, out=out)
        else:
            torch.mm(dz.t(), hidden, out=out)
        return
    product, columns = linear(), hidden.t()
    for start, stop in spans(dz.shape[1], block):
        # Not bound to a name: it would live on while the next block is computed.
        if add:
            out[start:stop].add_(product(dz[:, start:stop].t(), columns))
        else:
            out[start:stop] = product(dz[:, start:stop].t(), columns)
