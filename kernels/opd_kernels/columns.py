"""Triton kernels of sampled columns (``sampling``, ``sampled``): draw them, take them, and add up what they give.

Symbols: c rows of a block, B blocks that are drawn together, V columns of the vocabulary, k places for drawn columns, d
a hidden size. k is a multiple of ``STEP``; a place that holds no column has an ``inverse`` of 0 and names column 0.
Nothing is added to from two programs, so that a call gives the same bits again.
"""

# Triton's own types exist while it compiles only: its functions have none here.
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False, disallow-untyped-decorators=False
# mypy: disallow-untyped-calls=False, disable-error-code=assignment
from __future__ import annotations

import triton
import triton.language as tl

from .rows_gradient import softcap_slope
from .rows_math import LABEL_SCALE, LOG, SCALE, STEP, TOP, VALUE, columns, entry, exp, kernel
from .splitmix import FIRST, GOLDEN, SECOND, signed

SWEEP = 8192
"""Columns that the only program of a block looks at together; it has ``SWEEP_WARPS`` warps."""
SWEEP_WARPS = 32
PLACES = 1024
"""Drawn columns of a row that a program works on."""
WIDTH = 1024
"""Components of a row of a weight that a program moves together."""
ROWS = 16
"""Rows whose drawn columns a program adds up."""

X_GOLDEN, X_FIRST, X_SECOND = (tl.constexpr(signed(word)) for word in (GOLDEN, FIRST, SECOND))
LEAST_MASS = tl.constexpr(1.1754943508222875e-38)
"""The smallest normal float32."""


@triton.jit
def shifted(x, PLACES: tl.constexpr):
    """int64 bits moved to the right, zeros from the left."""
    return (x >> PLACES) & ((1 << (64 - PLACES)) - 1)


@triton.jit
def scrambled(x):
    """The finaliser of SplitMix64, as ``splitmix.scrambled``; int64."""
    x = (x ^ shifted(x, 30)) * X_FIRST
    x = (x ^ shifted(x, 27)) * X_SECOND
    return x ^ shifted(x, 31)


@triton.jit
def places_of(split, count, BLOCK: tl.constexpr):
    """(places [BLOCK] among the drawn columns, those that exist); ``count`` is k in units of STEP."""
    places = split * BLOCK + tl.arange(0, BLOCK)
    return places, places < count * STEP


@kernel
def inclusion_kernel(
    score_ptr, factor_ptr, vocab, stride, ROUNDS: tl.constexpr, TILES: tl.constexpr, BLOCK: tl.constexpr
):
    """The constant in pi = min(1, factor score), [B] float64, in place of the budget of each block; minus the pi of
    all columns where a score is not finite. One program for each block; ``score`` [B, V rounded up to STEP, there 0] is
    float32, all sums are float64, and the rounds end when none finds another column that is certain."""
    block = tl.program_id(0).to(tl.int64)
    line = score_ptr + block * stride * STEP
    budget = tl.load(factor_ptr + block)
    factor = budget * 0.0
    left = budget * 0.0
    certain = tl.full([], 0, tl.int32)
    turn = tl.full([], 0, tl.int32)
    width = (vocab + STEP - 1) // STEP * STEP
    while turn < ROUNDS:
        rest = tl.zeros([BLOCK], tl.float64)
        count = tl.zeros([BLOCK], tl.int32)
        for tile in range(TILES):
            cols = tile * BLOCK + tl.arange(0, BLOCK)
            score = tl.load(line + cols, mask=cols < width, other=0.0).to(tl.float64)
            sure = score * factor >= 1.0
            rest += tl.where(sure, 0.0, score)
            count += sure.to(tl.int32)
        left = tl.sum(rest, 0)
        found = tl.sum(count, 0)
        # Nothing is left where every column with a score is certain.
        some = left > 0.0
        next_factor = (budget - found) / tl.where(some, left, 1.0)
        factor = tl.where(some & (next_factor > factor), next_factor, factor)
        turn = tl.where((turn > 0) & (found == certain), ROUNDS, turn + 1)
        certain = found
    tl.store(factor_ptr + block, tl.where(left < float("inf"), factor, -budget / vocab))


@kernel
def mark_kernel(label_ptr, table_ptr, forced_ptr, rows, block_rows, field_stride, stride, BLOCK: tl.constexpr):
    """1 in ``forced`` [B, V] at the labels whose log-prob has a weight."""
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    here = row < rows
    label = tl.load(label_ptr + row, mask=here, other=-1)
    up = tl.load(table_ptr + LABEL_SCALE * field_stride + row, mask=here, other=0.0)
    block = (row // block_rows).to(tl.int64)
    one = tl.full([BLOCK], 1, tl.int8)
    tl.store(forced_ptr + block * stride * STEP + label, one, mask=(label >= 0) & (up != 0.0))


@kernel
def keep_kernel(
    score_ptr,
    factor_ptr,
    forced_ptr,
    seed_ptr,
    known_ptr,
    count_ptr,
    start,
    block_rows,
    first,
    splits,
    vocab,
    stride,
    FORCED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """1 / pi where a column is drawn and else 0, ``known`` [B, V], and how many are, ``count`` [B, splits].

    A block's number is its first row, ``start`` that of the first block; ``first`` is the global id of column 0.
    """
    block, split = (tl.program_id(0) // splits).to(tl.int64), tl.program_id(0) % splits
    cols, stored, valid = columns(split, vocab, BLOCK)
    line = block * stride * STEP + cols
    factor = tl.load(factor_ptr + block)
    score = tl.load(score_ptr + line, mask=stored, other=0.0).to(tl.float64)
    pi = score * factor
    pi = tl.where(pi < 1.0, pi, 1.0)
    pi = tl.where(factor < 0.0, -factor, pi)
    if FORCED:
        pi = tl.where(tl.load(forced_ptr + line, mask=stored, other=0) != 0, 1.0, pi)
    number = scrambled((start + block * block_rows) * X_GOLDEN + 1)
    key = scrambled(tl.load(seed_ptr) ^ number)
    bits = scrambled((first + cols).to(tl.int64) * X_GOLDEN + key)
    uniform = shifted(bits, 11).to(tl.float64) * (1.0 / 9007199254740992.0)
    keep = valid & (uniform < pi)
    inverse = tl.where(keep, 1.0 / tl.where(keep, pi, 1.0), 0.0)
    tl.store(known_ptr + line, inverse.to(tl.float32), mask=stored)
    tl.store(count_ptr + block * splits + split, tl.sum(keep.to(tl.int32), 0))


@kernel
def compact_kernel(
    known_ptr,
    count_ptr,
    column_ptr,
    inverse_ptr,
    count,
    splits,
    vocab,
    stride,
    SPLITS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The drawn columns in their order, ``column`` [B, k] int64, and their 1 / pi, ``inverse`` [B, k]; what has no
    place is left out."""
    block, split = (tl.program_id(0) // splits).to(tl.int64), tl.program_id(0) % splits
    cols, stored, _ = columns(split, vocab, BLOCK)
    known = tl.load(known_ptr + block * stride * STEP + cols, mask=stored, other=0.0)
    earlier = tl.arange(0, SPLITS)
    counts = tl.load(count_ptr + block * splits + earlier, mask=earlier < split, other=0)
    keep = known > 0.0
    place = tl.sum(counts, 0) + tl.cumsum(keep.to(tl.int32), 0) - 1
    to = block * count * STEP + place
    put = keep & (place < count * STEP)
    tl.store(column_ptr + to, cols.to(tl.int64), mask=put)
    tl.store(inverse_ptr + to, known, mask=put)


@kernel
def dz_squares_kernel(
    x_ptr, partial_ptr, rows, splits, vocab, stride, block_rows, parts, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    """Sums [B * parts, splits * BLOCK] over ROWS rows each of dZ^2, ``x`` is [c, V]; as ``squares_kernel``."""
    part, split = (tl.program_id(0) // splits).to(tl.int64), tl.program_id(0) % splits
    cols, stored, valid = columns(split, vocab, BLOCK)
    begin = part // parts * block_rows + part % parts * ROWS
    end = tl.minimum((part // parts + 1) * block_rows, rows)
    total = tl.zeros([BLOCK], tl.float32)
    for i in range(ROWS):
        row = tl.minimum(begin + i, rows - 1)
        x = tl.load(x_ptr + row * stride * STEP + cols, mask=stored, other=0.0).to(tl.float32)
        total += tl.where(valid & (begin + i < end), x * x, 0.0)
    tl.store(partial_ptr + (part * splits + split) * BLOCK + tl.arange(0, BLOCK), total)


@kernel
def pick_kernel(
    logits_ptr,
    table_ptr,
    column_ptr,
    inverse_ptr,
    total_ptr,
    z_ptr,
    gap_ptr,
    partial_ptr,
    count,
    splits,
    stride,
    field_stride,
    SINGLE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The student's logits in the drawn columns, ``z`` [c, k], and g, which replaces in ``gap`` [c, k] the weighted sum
    of the teachers' logits, or with SINGLE the logits of the only one; ``total`` [c] is the sum of the weights.

    Of a row it stores four sums, ``partial`` [c, 4, splits]: of p and of p g, over columns that are certain and over
    the others, there divided by pi.
    """
    table = (table_ptr, 0, field_stride)
    row, split = (tl.program_id(0) // splits).to(tl.int64), tl.program_id(0) % splits
    places, valid = places_of(split, count, BLOCK)
    cols = tl.load(column_ptr + places, mask=valid, other=0)
    inverse = tl.load(inverse_ptr + places, mask=valid, other=0.0)
    used = inverse > 0.0
    z = tl.load(logits_ptr + row * stride * STEP + cols, mask=used, other=0.0)
    at = row * count * STEP + places
    other = tl.load(gap_ptr + at, mask=valid, other=0.0)
    total = tl.load(total_ptr + row)
    if SINGLE:
        g = total * (z - other)
    else:
        g = total * z - other
    p = tl.where(used, exp((z - entry(table, row, 0, TOP)) - entry(table, row, 0, LOG)), 0.0)
    g = tl.where(used, g, 0.0)
    tl.store(z_ptr + at, z, mask=valid)
    tl.store(gap_ptr + at, g, mask=valid)
    sure = tl.where(inverse == 1.0, p, 0.0)
    drawn = tl.where(inverse == 1.0, 0.0, p * inverse)
    to = partial_ptr + row * 4 * splits + split
    tl.store(to, tl.sum(sure, 0))
    tl.store(to + splits, tl.sum(drawn, 0))
    tl.store(to + 2 * splits, tl.sum(sure * g, 0))
    tl.store(to + 3 * splits, tl.sum(drawn * g, 0))


@triton.jit
def spread_of(inverse):
    """1 - pi; 0 for places that hold no column."""
    return tl.where(inverse > 1.0, 1.0 - 1.0 / tl.maximum(inverse, 1.0), 0.0)


@kernel
def ratio_kernel(
    z_ptr,
    gap_ptr,
    sums_ptr,
    table_ptr,
    column_ptr,
    inverse_ptr,
    factor_ptr,
    label_ptr,
    out_ptr,
    partial_ptr,
    cap,
    rows,
    count,
    splits,
    field_stride,
    LABELS: tl.constexpr,
    CAP: tl.constexpr,
    BIAS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """dZ of the reverse KL in the drawn columns, divided by pi, ``out`` [c, k], from what ``pick_kernel`` left and its
    ``sums`` [c, 4]; the formula is that of ``sampled``. E goes to VALUE.

    Of every column it stores two or with BIAS three sums over ROWS rows, ``partial`` [parts, 2 or 3, k]: of dZ^2 times
    1 - pi, of p / pi times the root of ``factor`` [c], and of dZ.
    """
    table = (table_ptr, 0, field_stride)
    part, split = (tl.program_id(0) // splits).to(tl.int64), tl.program_id(0) % splits
    places, valid = places_of(split, count, BLOCK)
    inverse = tl.load(inverse_ptr + places, mask=valid, other=0.0)
    used = inverse > 0.0
    if LABELS:
        cols = tl.load(column_ptr + places, mask=valid, other=0)
    squares = tl.zeros([BLOCK], tl.float32)
    shares = tl.zeros([BLOCK], tl.float32)
    if BIAS:
        total = tl.zeros([BLOCK], tl.float32)
    for i in range(ROWS):
        here = part * ROWS + i < rows  # else the last row again, which is not added up
        row = tl.minimum(part * ROWS + i, rows - 1)
        at = row * count * STEP + places
        z = tl.load(z_ptr + at, mask=valid, other=0.0)
        g = tl.load(gap_ptr + at, mask=valid, other=0.0)
        mass = tl.load(sums_ptr + 4 * row)
        rest = tl.load(sums_ptr + 4 * row + 1)
        certain = tl.load(sums_ptr + 4 * row + 2)
        chance = tl.load(sums_ptr + 4 * row + 3)
        middle = tl.where(mass > 0.0, certain / tl.maximum(mass, LEAST_MASS), 0.0)
        drift = chance - middle * rest
        p = tl.where(used, exp((z - entry(table, row, 0, TOP)) - entry(table, row, 0, LOG)), 0.0)
        share = p * inverse
        d = ((p * (inverse - 1.0) + 1.0) * (g - middle) - drift) * share * entry(table, row, 0, SCALE)
        if LABELS:
            up = entry(table, row, 0, LABEL_SCALE)
            d += up * (share - tl.where(cols == tl.load(label_ptr + row), 1.0, 0.0))
        if CAP:
            d *= softcap_slope(z, cap)
        d = tl.where(used, d, 0.0)
        tl.store(out_ptr + at, d.to(out_ptr.dtype.element_ty), mask=valid)
        if split == 0:
            tl.store(table_ptr + VALUE * field_stride + row, middle + drift)
        d = tl.where(here, d, 0.0)
        squares += d * d
        shares += tl.where(here, tl.sqrt(tl.load(factor_ptr + row)), 0.0) * share
        if BIAS:
            total += d
    SUMS: tl.constexpr = 3 if BIAS else 2
    to = partial_ptr + part * SUMS * count * STEP + places
    tl.store(to, squares * spread_of(inverse), mask=valid)
    tl.store(to + count * STEP, shares, mask=valid)
    if BIAS:
        tl.store(to + 2 * count * STEP, total, mask=valid)


@kernel
def scaled_kernel(
    x_ptr,
    column_ptr,
    inverse_ptr,
    out_ptr,
    partial_ptr,
    rows,
    count,
    splits,
    stride,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The drawn columns of dZ, ``x`` [c, V], divided by pi, ``out`` [c, k], and sums over ROWS rows of their squares
    times 1 - pi, ``partial`` [parts, k]."""
    part, split = (tl.program_id(0) // splits).to(tl.int64), tl.program_id(0) % splits
    places, valid = places_of(split, count, BLOCK)
    cols = tl.load(column_ptr + places, mask=valid, other=0)
    inverse = tl.load(inverse_ptr + places, mask=valid, other=0.0)
    squares = tl.zeros([BLOCK], tl.float32)
    for i in range(ROWS):
        here = part * ROWS + i < rows  # else the last row again, which is not added up
        row = tl.minimum(part * ROWS + i, rows - 1)
        x = tl.load(x_ptr + row * stride * STEP + cols, mask=inverse > 0.0, other=0.0).to(tl.float32) * inverse
        tl.store(out_ptr + row * count * STEP + places, x.to(out_ptr.dtype.element_ty), mask=valid)
        squares += tl.where(here, x * x, 0.0)
    tl.store(partial_ptr + part * count * STEP + places, squares * spread_of(inverse), mask=valid)


@triton.jit
def take_kernel(weight_ptr, column_ptr, out_ptr, size_ptr, pitch, width, TILES: tl.constexpr, BLOCK: tl.constexpr):
    """Rows ``column`` [n] of a weight [V, d] whose rows lie ``pitch`` elements apart, ``out`` [n, d], and their squared
    2-norms, ``size`` [n]."""
    place = tl.program_id(0).to(tl.int64)
    line = weight_ptr + tl.load(column_ptr + place) * pitch
    squares = tl.zeros([BLOCK], tl.float32)
    for tile in range(TILES):
        at = tile * BLOCK + tl.arange(0, BLOCK)
        x = tl.load(line + at, mask=at < width, other=0.0)
        tl.store(out_ptr + place * width + at, x.to(out_ptr.dtype.element_ty), mask=at < width)
        x = x.to(tl.float32)
        squares += x * x
    tl.store(size_ptr + place, tl.sum(squares, 0))


@triton.jit
def add_rows_kernel(
    own_ptr, column_ptr, inverse_ptr, weight_ptr, size_ptr, width, TILES: tl.constexpr, BLOCK: tl.constexpr
):
    """Add ``own`` [n, d] to rows ``column`` [n] of a float32 gradient ``weight`` [V, d], and store in ``size`` [n] the
    squared 2-norms of what was added times 1 - pi. The columns differ, except at places that hold none."""
    place = tl.program_id(0).to(tl.int64)
    inverse = tl.load(inverse_ptr + place)
    line = weight_ptr + tl.load(column_ptr + place) * width
    squares = tl.zeros([BLOCK], tl.float32)
    if inverse > 0.0:
        for tile in range(TILES):
            at = tile * BLOCK + tl.arange(0, BLOCK)
            x = tl.load(own_ptr + place * width + at, mask=at < width, other=0.0)
            tl.store(line + at, tl.load(line + at, mask=at < width, other=0.0) + x, mask=at < width)
            squares += x * x
    tl.store(size_ptr + place, tl.sum(squares, 0) * spread_of(inverse))
