"""What the row kernels share: layouts of their tables, and device functions. Symbols as in
``rows``."""

# mypy: disallow-untyped-defs=False
from __future__ import annotations

import triton
import triton.language as tl

from .types import FLOOR as FLOOR_LOGIT

# Stands in for a missing logit: exp gives exactly 0, differences stay finite.
ABSENT = tl.constexpr(-1.0e30)
FLOOR_VALUE = tl.constexpr(FLOOR_LOGIT)
LEAST_WEIGHT = tl.constexpr(1.0e-37)
# exp of it is finite in float32; where it acts, the probability it multiplies is 0.
CLAMP = tl.constexpr(83.0)

# Rows of the table [TABLE, c] that describes a chunk's rows; a side is a raw teacher buffer.
TOP, LOG, LSE, ENTROPY, LOGPROB, ARGMAX = (tl.constexpr(i) for i in range(6))
ACC_SIDE, T_SIDE = tl.constexpr(6), tl.constexpr(9)
SIDE_TOP, SIDE_LOG, SIDE_WEIGHT = (tl.constexpr(i) for i in range(3))
TABLE = 12

# Partials [PARTIALS, c, splits] of ``statistics_kernel``: for the student and, from Q_PART on, the
# teacher (max, sum e, sum e (x - max), arg max) with e = exp(x - max); sum e g of both.
MAX_PART, SUM_PART, DOT_PART, ARG_PART = (tl.constexpr(i) for i in range(4))
Q_PART, GAP_PART = tl.constexpr(4), tl.constexpr(8)
PARTIALS = 10

# Rows of the results [RESULTS, c] of one teacher. MEAN_GAP is E_p[g].
MEAN_GAP, REVERSE_KL, FORWARD_KL, Q_ENTROPY, Q_TOP1, Q_AGREES, Q_LOGPROB = (tl.constexpr(i) for i in range(7))
RESULTS = 7


@triton.jit
def locate(splits, vocab, width, BLOCK: tl.constexpr):
    """(row, block, columns [BLOCK], columns that exist in memory, columns of the vocabulary) of
    this program."""
    program = tl.program_id(0)
    split = program % splits
    cols = split * BLOCK + tl.arange(0, BLOCK)
    return (program // splits).to(tl.int64), split, cols, cols < width, cols < vocab


@triton.jit
def normaliser(table_ptr, table_stride, row, INDEX: tl.constexpr):
    """(top, log) of a row; INDEX is TOP or a side."""
    return tl.load(table_ptr + INDEX * table_stride + row), tl.load(table_ptr + (INDEX + 1) * table_stride + row)


@triton.jit
def finish(
    x, at, bias_ptr, cols, stored, valid, factor, cap, BIAS: tl.constexpr, CAP: tl.constexpr, FLOOR: tl.constexpr
):
    """Logits from a head's product, written back to ``at`` where they differ from it."""
    if BIAS:
        x += factor * tl.load(bias_ptr + cols, mask=valid, other=0.0).to(tl.float32)
    if CAP:
        x = cap * tanh(x / cap)
    if FLOOR:
        x = tl.where(x < FLOOR_VALUE, FLOOR_VALUE, x)
    if BIAS or CAP or FLOOR:
        tl.store(at, x, mask=stored)
    return x


@triton.jit
def summarise(x, place, field, start, FULL: tl.constexpr):
    """Store the partials of one block; return exp(x - max)."""
    if FULL:
        top, where = tl.max(x, 0, return_indices=True)
        tl.store(place + ARG_PART * field, (start + where).to(tl.float32))
    else:
        top = tl.max(x, 0)
    e = tl.exp(x - top)
    tl.store(place + MAX_PART * field, top)
    tl.store(place + SUM_PART * field, tl.sum(e, 0))
    tl.store(place + DOT_PART * field, tl.sum(e * (x - top), 0))
    return e


@triton.jit
def merge(place, field, present, split, FULL: tl.constexpr):
    """(max, sum e, sum e (x - max), each block's factor on its sums, arg max) of rows [ROWS] from
    blocks [ROWS, SPLITS]."""
    tops = tl.load(place + MAX_PART * field, mask=present, other=ABSENT)
    sums = tl.load(place + SUM_PART * field, mask=present, other=0.0)
    dots = tl.load(place + DOT_PART * field, mask=present, other=0.0)
    top = tl.max(tops, 1)
    share = tl.exp(tops - top[:, None])
    total = tl.sum(sums * share, 1)
    dot = tl.sum((dots + sums * (tops - top[:, None])) * share, 1)
    where = top
    if FULL:
        columns = tl.load(place + ARG_PART * field, mask=present, other=0.0)
        best = tl.argmax(tops, 1)
        where = tl.sum(tl.where(split[None, :] == best[:, None], columns, 0.0), 1)
    return top, total, dot, share, where


@triton.jit
def term(z, t, table_ptr, table_stride, row, parameter, KIND: tl.constexpr, SIDE: tl.constexpr):
    """What one teacher adds to ``acc``: w t (reverse KL, whose a is W z - acc), w q (forward KL),
    w a (the others)."""
    weight = tl.load(table_ptr + (SIDE + SIDE_WEIGHT) * table_stride + row)
    q_top, q_log = normaliser(table_ptr, table_stride, row, SIDE)
    if KIND == "reverse_kl":
        out = weight * t
    elif KIND == "forward_kl":
        out = weight * tl.exp((t - q_top) - q_log)
    else:
        top, log = normaliser(table_ptr, table_stride, row, TOP)
        r = (t - z) - ((q_top - top) + (q_log - log))
        weight *= parameter - 1.0
        if KIND == "jsd":
            out = weight * jsd_log(r, parameter)
        else:
            tl.static_assert(KIND == "skew_kl")
            out = weight / skew_ratio(r, parameter)
    return out


@triton.jit
def side_log(x, table_ptr, table_stride, row, SIDE: tl.constexpr):
    """log (w q) of a raw teacher; a weight of 0 is a tiny one, since two of them would make inf - inf."""
    top, log = normaliser(table_ptr, table_stride, row, SIDE)
    weight = tl.load(table_ptr + (SIDE + SIDE_WEIGHT) * table_stride + row)
    return (x - top) - (log - tl.log(tl.maximum(weight, LEAST_WEIGHT)))


@triton.jit
def jsd_log(r, beta):
    """log(m / p) = log(1 - beta + beta e^r) with m = beta q + (1 - beta) p."""
    return tl.log(1.0 + beta * (tl.exp(tl.minimum(r, CLAMP)) - 1.0))


@triton.jit
def skew_ratio(r, alpha):
    """m / q = alpha + (1 - alpha) e^-r with m = alpha q + (1 - alpha) p."""
    return 1.0 + (1.0 - alpha) * (tl.exp(tl.minimum(-r, CLAMP)) - 1.0)


@triton.jit
def softcap_slope(z, cap):
    """d cap tanh(x / cap) / d x at the finished logit z."""
    share = z / cap
    return 1.0 - share * share


@triton.jit
def tanh(x):
    """To a few units of float32 rounding: a series near 0, where the quotient would cancel."""
    size = tl.abs(x)
    far = 1.0 - 2.0 / (tl.exp(2.0 * size) + 1.0)
    y = x * x
    near = 1.0 + y * (-1.0 / 3.0 + y * (2.0 / 15.0 + y * (-17.0 / 315.0 + y * (62.0 / 2835.0))))
    return tl.where(size < 0.3, x * near, tl.where(x < 0.0, -far, far))
