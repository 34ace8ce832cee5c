"""What the row kernels share: layouts, and device functions. Symbols as in ``rows``."""

# Triton's own types exist while it compiles only: its functions have none here.
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False, disallow-untyped-decorators=False
# mypy: disallow-untyped-calls=False, disable-error-code=assignment
from __future__ import annotations

import os

import triton
import triton.language as tl

from . import table
from .chunking import ALIGNMENT
from .types import FLOOR as FLOOR_LOGIT

INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")
"""Whether triton was told to interpret kernels on a CPU."""

# Strides are passed in units of it, so that they are known to be its multiples without a variant for every value.
STEP = tl.constexpr(ALIGNMENT)

# Stands in for a missing logit: exp gives exactly 0, differences stay finite.
ABSENT = tl.constexpr(table.NO_COLUMN)
NO_INDEX = tl.constexpr(2**31 - 1)
FLOOR_VALUE = tl.constexpr(FLOOR_LOGIT)
LEAST_WEIGHT = tl.constexpr(1.0e-37)
# exp of it is finite in float32; where it acts, the probability it multiplies is 0.
CLAMP = tl.constexpr(83.0)
LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)

# Fields of a head in the table. Partials [1 + K, MERGED, c, splits] have the same, with sums instead of means
# and of a logarithm; behind them lie [2, c, splits] partials of VALUE and MEAN.
TOP, LOG, DOT, ARG = (tl.constexpr(i) for i in (table.TOP, table.LOG, table.DOT, table.ARG))
LABEL, REF, MEAN_P, MEAN_Q = (tl.constexpr(i) for i in (table.LABEL, table.REF, table.MEAN_P, table.MEAN_Q))
VALUE, MEAN, SCALE = tl.constexpr(table.VALUE), tl.constexpr(table.MEAN), tl.constexpr(table.SCALE)
WEIGHT, LABEL_SCALE = tl.constexpr(table.WEIGHT), tl.constexpr(table.LABEL_SCALE)
MERGED = tl.constexpr(table.MERGED)

NUMBERS = ["rows", "splits", "vocab", "slot_stride", "stride", "head_stride", "field_stride", "out_stride", "first"]
NUMBERS += ["start", "block_rows", "parts", "count"]
VECTORS = ["label_ptr", "table_ptr", "entropy_scale_ptr", "bias_ptr", "factor_ptr", "total_ptr", "sums_ptr"]


def among(names: list[str], function) -> list[str]:
    """Those of ``names`` that are arguments of ``function``."""
    return [name for name in function.__code__.co_varnames[: function.__code__.co_argcount] if name in names]


def kernel(function):
    """A kernel with one variant for all sizes and strides."""
    return triton.jit(
        function,
        do_not_specialize=among(NUMBERS, function),
        do_not_specialize_on_alignment=among(VECTORS, function),
    )


if INTERPRETED:

    @triton.jit
    def exp(x):
        return tl.exp(x)

    @triton.jit
    def log(x):
        return tl.log(x)

    @triton.jit
    def reciprocal(x):
        return 1.0 / x

else:

    @triton.jit
    def exp(x):
        """One multiplication and one special-function instruction; denormals are 0."""
        return tl.inline_asm_elementwise(
            "ex2.approx.ftz.f32 $0, $1;", "=f,f", [x * LOG2_E], dtype=tl.float32, is_pure=True, pack=1
        )

    @triton.jit
    def log(x):
        """As ``exp``; absolute error 1e-7 where x is near 1."""
        return LN_2 * tl.inline_asm_elementwise(
            "lg2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )

    @triton.jit
    def reciprocal(x):
        """Within a unit of rounding in one instruction; a division takes several and many more registers."""
        return tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )


@triton.jit
def columns(split, vocab, BLOCK: tl.constexpr):
    """(columns [BLOCK] of a block, those that exist in memory, those of the vocabulary)."""
    cols = split * BLOCK + tl.arange(0, BLOCK)
    width = (vocab + STEP - 1) // STEP * STEP
    return cols, cols < width, cols < vocab


@triton.jit
def row_of(logits, slot, row):
    """Address of a row of a head's logits; ``logits`` is (pointer, stride of heads, stride of rows), the strides in
    units of ALIGNMENT."""
    return logits[0] + (slot * tl.cast(logits[1], tl.int64) + row * logits[2]) * STEP


@triton.jit
def label_logit(logits, slot, row, label, split, place, field, BLOCK: tl.constexpr):
    """Store the logit of the label where it lies in this block, else 0; before anything is written in place."""
    here = (label >= split * BLOCK) & (label < (split + 1) * BLOCK)
    tl.store(place + LABEL * field, tl.load(row_of(logits, slot, row) + label, mask=here, other=0.0))


@triton.jit
def load(logits, slot, row, cols, stored, valid):
    """Logits [BLOCK] of a head."""
    return tl.where(valid, tl.load(row_of(logits, slot, row) + cols, mask=stored, other=ABSENT), ABSENT)


@triton.jit
def load_teachers(logits, row, cols, stored, valid, TEACHERS: tl.constexpr):
    """A tuple of the logits [BLOCK] of every teacher."""
    ts = ()
    for j in tl.static_range(TEACHERS):
        ts = ts + (load(logits, 1 + j, row, cols, stored, valid),)  # noqa: RUF005
    return ts


@triton.jit
def summarise(x, cols, place, field, FULL: tl.constexpr, DOTS: tl.constexpr):
    """Store a head's partials of one block; return (exp(x - max), max)."""
    top = tl.max(x, 0)
    if FULL:
        where = tl.min(tl.where(x == top, cols, NO_INDEX), 0)
        tl.store(place + ARG * field, where.to(tl.float32))
    below = x - top
    e = exp(below)
    tl.store(place + TOP * field, top)
    tl.store(place + LOG * field, tl.sum(e, 0))
    if DOTS:
        tl.store(place + DOT * field, tl.sum(e * below, 0))
    return e, top


@triton.jit
def compare(z, t, top, e_p, e_q, place, field, P: tl.constexpr, Q: tl.constexpr):
    """Store what one block says about both models; ``top`` is the student's largest logit in it."""
    g = z - t
    ref = tl.max(tl.where(z == top, g, ABSENT), 0)
    tl.store(place + REF * field, ref)
    if P:
        tl.store(place + MEAN_P * field, tl.sum(e_p * (g - ref), 0))
    if Q:
        tl.store(place + MEAN_Q * field, tl.sum(e_q * g, 0))


@triton.jit
def gather(line, field, block, splits, INDEX: tl.constexpr, other):
    """A field of all blocks of a row; past the first-level cache, which may be stale."""
    return tl.load(line + INDEX * field + block, mask=block < splits, other=other, cache_modifier=".cg")


@triton.jit
def merge_row(
    partial_ptr,
    table,
    row,
    rows,
    splits,
    first,
    TEACHERS: tl.constexpr,
    NORMS: tl.constexpr,
    P: tl.constexpr,
    Q: tl.constexpr,
    DOTS: tl.constexpr,
    FULL: tl.constexpr,
    LABELS: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """Statistics of a row from those of its blocks, by the formulas of ``table.merge``: the student's normaliser
    and the REF of teachers, and what the flags name; NORMS are the teachers' normalisers."""
    block = tl.arange(0, SPLITS)
    field = tl.cast(rows, tl.int64) * splits
    line = partial_ptr + row * splits
    out, field_stride = table[0] + row, table[2]
    tops = gather(line, field, block, splits, TOP, ABSENT)
    sums = gather(line, field, block, splits, LOG, 0.0)
    top = tl.max(tops, 0)
    share = tl.exp(tops - top)
    total = tl.sum(sums * share, 0)
    for head in tl.static_range(TEACHERS + 1):
        own = line + head * MERGED * field
        to = out + head * table[1]
        if head == 0 or NORMS:
            h_tops = gather(own, field, block, splits, TOP, ABSENT)
            h_sums = gather(own, field, block, splits, LOG, 0.0)
            h_top = tl.max(h_tops, 0)
            h_share = tl.exp(h_tops - h_top)
            h_total = tl.sum(h_sums * h_share, 0)
            tl.store(to + TOP * field_stride, h_top)
            tl.store(to + LOG * field_stride, tl.log(h_total))
            if DOTS:
                dots = gather(own, field, block, splits, DOT, 0.0)
                dot = tl.sum((dots + h_sums * (h_tops - h_top)) * h_share, 0) / h_total
                tl.store(to + DOT * field_stride, dot)
            if FULL:
                places = gather(own, field, block, splits, ARG, 0.0)
                best = tl.argmax(h_tops, 0)
                where = tl.sum(tl.where(block == best, places, 0.0), 0)
                tl.store(to + ARG * field_stride, where + first)
            if Q and head > 0:
                g_q = gather(own, field, block, splits, MEAN_Q, 0.0)
                tl.store(to + MEAN_Q * field_stride, tl.sum(g_q * h_share, 0) / h_total)
        if LABELS:
            tl.store(to + LABEL * field_stride, tl.sum(gather(own, field, block, splits, LABEL, 0.0), 0))
        if head > 0:
            refs = gather(own, field, block, splits, REF, 0.0)
            ref = tl.max(tl.where(tops == top, refs, ABSENT), 0)
            tl.store(to + REF * field_stride, ref)
            if P:
                g_p = gather(own, field, block, splits, MEAN_P, 0.0)
                mean = tl.sum((g_p + sums * (refs - ref)) * share, 0) / total
                tl.store(to + MEAN_P * field_stride, mean)


@triton.jit
def entry(table, row, head, INDEX: tl.constexpr):
    """A number of the table, which is (pointer, stride of heads, stride of fields)."""
    return tl.load(table[0] + head * table[1] + INDEX * table[2] + row)


@triton.jit
def log_ratio(table, row, head):
    """log sum exp of the student's logits minus that of a teacher's."""
    tops = entry(table, row, 0, TOP)
    tops -= entry(table, row, head, TOP)
    logs = entry(table, row, 0, LOG)
    logs -= entry(table, row, head, LOG)
    return tops + logs


@triton.jit
def probability(x, table, row, head):
    """softmax of a row's logits x, from its largest and its log-sum in the table."""
    top = entry(table, row, head, TOP)
    return exp((x - top) - entry(table, row, head, LOG))


@triton.jit
def log_share(x, table, row, head):
    """log (w q) of a teacher; a weight of 0 is a tiny one, since two of them would make inf - inf."""
    weight = entry(table, row, head, WEIGHT)
    norm = entry(table, row, head, LOG) - tl.log(tl.maximum(weight, LEAST_WEIGHT))
    return (x - entry(table, row, head, TOP)) - norm


@triton.jit
def log_sum(x, y):
    """log(e^x + e^y)"""
    return tl.maximum(x, y) + log(1.0 + exp(-tl.abs(x - y)))


@triton.jit
def slope_of(r, parameter, KIND: tl.constexpr):
    """a = d divergence / d p up to a constant, from r = log q - log p."""
    if KIND == "reverse_kl":
        a = -r
    elif KIND == "jsd":
        a = (parameter - 1.0) * jsd_log(r, parameter)
    else:
        tl.static_assert(KIND == "skew_kl")
        a = (parameter - 1.0) * reciprocal(skew_ratio(r, parameter))
    return a


@triton.jit
def value_of(p, q, r, parameter, KIND: tl.constexpr):
    """What a column adds to the divergence."""
    if KIND == "reverse_kl":
        value = -p * r
    elif KIND == "forward_kl":
        value = q * r
    elif KIND == "jsd":
        excess = jsd_log(r, parameter)
        value = parameter * q * (tl.minimum(r, CLAMP) - excess) + (parameter - 1.0) * p * excess
    else:
        tl.static_assert(KIND == "skew_kl")
        value = -q * log(skew_ratio(r, parameter))
    return value


@triton.jit
def jsd_log(r, beta):
    """log(m / p) = log(1 - beta + beta e^r) with m = beta q + (1 - beta) p."""
    return log(1.0 + beta * (exp(tl.minimum(r, CLAMP)) - 1.0))


@triton.jit
def skew_ratio(r, alpha):
    """m / q = alpha + (1 - alpha) e^-r with m = alpha q + (1 - alpha) p."""
    return 1.0 + (1.0 - alpha) * (exp(tl.minimum(-r, CLAMP)) - 1.0)


@triton.jit
def tanh(x):
    """To a few units of float32 rounding: a series near 0, where the quotient would cancel."""
    size = tl.abs(x)
    far = 1.0 - 2.0 / (tl.exp(2.0 * size) + 1.0)
    y = x * x
    near = 1.0 + y * (-1.0 / 3.0 + y * (2.0 / 15.0 + y * (-17.0 / 315.0 + y * (62.0 / 2835.0))))
    return tl.where(size < 0.3, x * near, tl.where(x < 0.0, -far, far))
