"""A Triton GEMM that writes student logits and the gap to a teacher from their float32 sums: how far
it stays behind the library decides whether storing the gap domain can pay."""

# mypy: disallow-untyped-defs=False
from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor


@triton.autotune(
    configs=[
        triton.Config({"BM": 128, "BN": 128, "BK": 64, "GROUP": 8}, num_warps=8, num_stages=3),
        triton.Config({"BM": 128, "BN": 256, "BK": 64, "GROUP": 8}, num_warps=8, num_stages=3),
        triton.Config({"BM": 128, "BN": 128, "BK": 64, "GROUP": 8}, num_warps=4, num_stages=4),
    ],
    key=["rows", "vocab", "z_width", "t_width"],
)
@triton.jit
def gap_kernel(
    x_ptr,
    w_ptr,
    y_ptr,
    v_ptr,
    z_ptr,
    gap_ptr,
    rows,
    vocab,
    z_width,
    t_width,
    out_stride,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    GROUP: tl.constexpr,
):
    """z = x w^T and gap = z - y v^T, both from float32 accumulators."""
    program = tl.program_id(0)
    row_blocks = tl.cdiv(rows, BM)
    # Programs that run together share blocks of the weight.
    group = program // (GROUP * row_blocks)
    first = group * GROUP
    width = tl.minimum(tl.cdiv(vocab, BN) - first, GROUP)
    inside = program % (GROUP * row_blocks)
    column_block, row_block = first + inside % width, inside // width
    m = row_block * BM + tl.arange(0, BM)
    n = column_block * BN + tl.arange(0, BN)
    z = product(tl.zeros((BM, BN), dtype=tl.float32), x_ptr, w_ptr, m % rows, n % vocab, z_width, BK)
    # From the block's first element, where 32 bits are enough and half as many registers.
    corner = (row_block * BM).to(tl.int64) * out_stride + column_block * BN
    place = tl.arange(0, BM)[:, None] * out_stride + tl.arange(0, BN)[None, :]
    inside_both = (m < rows)[:, None] & (n < vocab)[None, :]
    tl.store(z_ptr + corner + place, z.to(z_ptr.dtype.element_ty), mask=inside_both)
    # One accumulator: two would not fit in the registers.
    gap = -product(-z, y_ptr, v_ptr, m % rows, n % vocab, t_width, BK)
    tl.store(gap_ptr + corner + place, gap.to(gap_ptr.dtype.element_ty), mask=inside_both)


@triton.jit
def product(total, a_ptr, b_ptr, m, n, width, BK: tl.constexpr):
    """total + a b^T on the rows m of a and n of b."""
    k = tl.arange(0, BK)
    a = a_ptr + m.to(tl.int64)[:, None] * width + k[None, :]
    b = b_ptr + n.to(tl.int64)[None, :] * width + k[:, None]
    for _ in range(0, tl.cdiv(width, BK)):
        total = tl.dot(tl.load(a), tl.load(b), total)
        a += BK
        b += BK
    return total


def matmul_gap(x: Tensor, w: Tensor, y: Tensor, v: Tensor, z: Tensor, gap: Tensor) -> None:
    """x [M, d], w [V, d], y [M, e], v [V, e], z and gap [M, V]; d and e multiples of 64, contiguous."""
    rows, vocab = z.shape

    def grid(meta):
        return (triton.cdiv(rows, meta["BM"]) * triton.cdiv(vocab, meta["BN"]),)

    gap_kernel[grid](x, w, y, v, z, gap, rows, vocab, x.shape[1], y.shape[1], z.stride(0))
