"""Triton row kernels: sweeps over [1 + K, c, V] float32 logits of a student and K teachers.

A program works on one block of columns of one row. Sums over a row are therefore kept as partials, one per block,
and merged afterwards (``table``): a few rows still fill a GPU. Every stage is a kernel of its own.

Symbols: z student logits / T, p its softmax; t teacher logits / T, q its softmax; g = z - t; r = log q - log p; a = d
divergence / d p up to a constant per row, so that d divergence / d z = p (a - E_p[a]), a taken relative to its value
at the student's largest logit.

All arithmetic is float32; only dZ may be narrower. Rows of a buffer start at multiples of 16 elements and V rounded
up to 16 fits in them: loads are masked with that width, which keeps them vectorised, and columns from V on are
replaced. Numbers that vary from chunk to chunk do not make variants of a kernel.
"""

# Triton's own types exist while it compiles only: its functions have none here.
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False, disallow-untyped-decorators=False
# mypy: disallow-untyped-calls=False, disable-error-code=assignment
from __future__ import annotations

import triton
import triton.language as tl

from .rows_gradient import gaps_of, post_terms, softcap_slope, store_gradient, terms_of
from .rows_math import (
    DOT,
    FLOOR_VALUE,
    LABEL_SCALE,
    LOG,
    MERGED,
    STEP,
    TOP,
    columns,
    compare,
    entry,
    exp,
    kernel,
    label_logit,
    load,
    load_teachers,
    merge_row,
    probability,
    summarise,
    tanh,
)

# Small programs: about four of them share a multiprocessor, so that some load while others reduce.
BLOCK = 2048
ROWS = 32
"""Rows that a program of ``squares_kernel`` adds up."""
MANY_TEACHERS = 3
"""Teachers from which a program has twice the warps: it holds a row's logits of all of them."""


def options(teachers: int) -> dict[str, int | bool]:
    """How the kernels are compiled."""
    return {"num_warps": 4 if teachers < MANY_TEACHERS else 8, "enable_fp_fusion": True}


@kernel
def finish_kernel(
    logits_ptr,
    bias_ptr,
    factor,
    cap,
    splits,
    vocab,
    stride,
    BIAS: tl.constexpr,
    CAP: tl.constexpr,
    FLOOR: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Logits of one head from its product: bias, softcap and floor, in place."""
    row, split = (tl.program_id(0) // splits).to(tl.int64), tl.program_id(0) % splits
    cols, stored, valid = columns(split, vocab, BLOCK)
    at = logits_ptr + row * stride * STEP + cols
    x = tl.load(at, mask=stored, other=0.0)
    if BIAS:
        x += factor * tl.load(bias_ptr + cols, mask=valid, other=0.0).to(tl.float32)
    if CAP:
        x = cap * tanh(x / cap)
    if FLOOR:
        x = tl.where(x < FLOOR_VALUE, FLOOR_VALUE, x)
    tl.store(at, x, mask=stored)


@kernel
def statistics_kernel(
    logits_ptr,
    label_ptr,
    partial_ptr,
    rows,
    splits,
    vocab,
    slot_stride,
    stride,
    TEACHERS: tl.constexpr,
    P: tl.constexpr,
    Q: tl.constexpr,
    DOTS: tl.constexpr,
    FULL: tl.constexpr,
    LABELS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Partials of every head. P and Q add the means of g under p and q, DOTS that of the logits, FULL the arg max."""
    logits = (logits_ptr, slot_stride, stride)
    row, split = (tl.program_id(0) // splits).to(tl.int64), tl.program_id(0) % splits
    cols, stored, valid = columns(split, vocab, BLOCK)
    place, field = partial_ptr + row * splits + split, tl.cast(rows, tl.int64) * splits
    z = load(logits, 0, row, cols, stored, valid)
    e_p, top = summarise(z, cols, place, field, FULL, DOTS)
    if LABELS:
        label = tl.load(label_ptr + row)
        label_logit(logits, 0, row, label, split, place, field, BLOCK)
    for j in tl.static_range(TEACHERS):
        t = load(logits, 1 + j, row, cols, stored, valid)
        own = place + (1 + j) * MERGED * field
        if LABELS:
            label_logit(logits, 1 + j, row, label, split, own, field, BLOCK)
        e_q, _ = summarise(t, cols, own, field, FULL, DOTS)
        compare(z, t, top, e_p, e_q, own, field, P, Q)


@kernel
def merge_kernel(
    partial_ptr,
    table_ptr,
    rows,
    splits,
    head_stride,
    field_stride,
    first,
    TEACHERS: tl.constexpr,
    P: tl.constexpr,
    Q: tl.constexpr,
    DOTS: tl.constexpr,
    FULL: tl.constexpr,
    LABELS: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """The table of a row from the partials of its blocks; ``first`` is the global id of column 0."""
    table = (table_ptr, head_stride, field_stride)
    row = tl.program_id(0).to(tl.int64)
    merge_row(partial_ptr, table, row, rows, splits, first, TEACHERS, True, P, Q, DOTS, FULL, LABELS, SPLITS)


@kernel
def squares_kernel(
    logits_ptr,
    table_ptr,
    factor_ptr,
    partial_ptr,
    rows,
    splits,
    vocab,
    stride,
    field_stride,
    block_rows,
    parts,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Sums [B * parts, splits * BLOCK] over ROWS rows each of factor p^2, of B blocks of ``block_rows`` rows with
    ``parts`` sums each."""
    logits = (logits_ptr, 0, stride)
    table = (table_ptr, 0, field_stride)
    part, split = (tl.program_id(0) // splits).to(tl.int64), tl.program_id(0) % splits
    cols, stored, valid = columns(split, vocab, BLOCK)
    begin = part // parts * block_rows + part % parts * ROWS
    end = tl.minimum((part // parts + 1) * block_rows, rows)
    total = tl.zeros([BLOCK], tl.float32)
    for i in range(ROWS):
        row = tl.minimum(begin + i, rows - 1)
        z = load(logits, 0, row, cols, stored, valid)
        p = probability(z, table, row, 0)
        total += tl.where(begin + i < end, tl.load(factor_ptr + row) * p * p, 0.0)
    tl.store(partial_ptr + (part * splits + split) * BLOCK + tl.arange(0, BLOCK), total)


@kernel
def terms_kernel(
    logits_ptr,
    table_ptr,
    partial_ptr,
    parameter,
    rows,
    splits,
    vocab,
    slot_stride,
    stride,
    head_stride,
    field_stride,
    KIND: tl.constexpr,
    MIXTURE: tl.constexpr,
    TEACHERS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Partials [2, c, splits] of VALUE and MEAN, all normalisers known."""
    logits = (logits_ptr, slot_stride, stride)
    table = (table_ptr, head_stride, field_stride)
    row, split = (tl.program_id(0) // splits).to(tl.int64), tl.program_id(0) % splits
    cols, stored, valid = columns(split, vocab, BLOCK)
    z = load(logits, 0, row, cols, stored, valid)
    ts = load_teachers(logits, row, cols, stored, valid, TEACHERS)
    p = probability(z, table, row, 0)
    a, value = terms_of(z, ts, p, table, row, parameter, KIND, MIXTURE, TEACHERS)
    post_terms(a, value, p, partial_ptr + row * splits + split, tl.cast(rows, tl.int64) * splits, KIND)


@kernel
def gradient_kernel(
    logits_ptr,
    label_ptr,
    table_ptr,
    out_ptr,
    parameter,
    cap,
    splits,
    vocab,
    slot_stride,
    stride,
    head_stride,
    field_stride,
    out_stride,
    KIND: tl.constexpr,
    MIXTURE: tl.constexpr,
    TEACHERS: tl.constexpr,
    LABELS: tl.constexpr,
    CAP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """dZ, the table complete."""
    logits = (logits_ptr, slot_stride, stride)
    table = (table_ptr, head_stride, field_stride)
    row, split = (tl.program_id(0) // splits).to(tl.int64), tl.program_id(0) % splits
    cols, stored, valid = columns(split, vocab, BLOCK)
    z = load(logits, 0, row, cols, stored, valid)
    ts = load_teachers(logits, row, cols, stored, valid, TEACHERS)
    p = probability(z, table, row, 0)
    TERMS: tl.constexpr = MIXTURE or (KIND != "reverse_kl" and KIND != "forward_kl")
    if TERMS:
        a, _ = terms_of(z, ts, p, table, row, parameter, KIND, MIXTURE, TEACHERS)
    else:
        a = gaps_of(z, ts, p, table, row, KIND, TEACHERS)
    out = (out_ptr, out_stride)
    store_gradient(z, a, p, cols, stored, label_ptr, table, out, row, cap, KIND, TERMS, TEACHERS, LABELS, CAP)


@kernel
def logprob_gradient_kernel(
    logits_ptr,
    label_ptr,
    table_ptr,
    entropy_scale_ptr,
    out_ptr,
    cap,
    splits,
    vocab,
    stride,
    field_stride,
    out_stride,
    HAS_ENTROPY: tl.constexpr,
    CAP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """dZ of -LABEL_SCALE log p(label) - entropy_scale * entropy: of the latter p (log p + H)."""
    logits = (logits_ptr, 0, stride)
    table = (table_ptr, 0, field_stride)
    row, split = (tl.program_id(0) // splits).to(tl.int64), tl.program_id(0) % splits
    cols, stored, valid = columns(split, vocab, BLOCK)
    z = load(logits, 0, row, cols, stored, valid)
    below = z - entry(table, row, 0, TOP)
    up = entry(table, row, 0, LABEL_SCALE)
    factor = up
    if HAS_ENTROPY:
        factor = up + tl.load(entropy_scale_ptr + row) * (below - entry(table, row, 0, DOT))
    p = exp(below - entry(table, row, 0, LOG))
    d = p * factor - tl.where(cols == tl.load(label_ptr + row), up, 0.0)
    if CAP:
        d *= softcap_slope(z, cap)
    tl.store(out_ptr + row * out_stride * STEP + cols, d.to(out_ptr.dtype.element_ty), mask=stored)


@triton.jit(do_not_specialize=["count"])
def scale_kernel(x_ptr, factor_ptr, count, BLOCK: tl.constexpr):
    """Multiply ``count`` numbers by a float32 on the device; nothing is read or written where it is 1."""
    factor = tl.load(factor_ptr)
    if factor != 1.0:
        at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        x = tl.load(x_ptr + at, mask=at < count, other=0.0).to(tl.float32) * factor
        tl.store(x_ptr + at, x.to(x_ptr.dtype.element_ty), mask=at < count)
