"""Triton row kernels: sweeps over [c, V] buffers of float32 logits.

A program works on one block of columns of one row. Sums over a row are therefore kept as partials,
one per block, and merged afterwards: a few rows still fill a GPU, and no block waits for another.
Logits are read as they are and never written back, except once to finish them (bias, softcap,
floor) in the sweep that first reads them.

Symbols: z student logits / T, p its softmax; t teacher logits / T, q its softmax; g = z - t; r =
log q - log p; a = d divergence / d p up to a constant per row, so that d divergence / d z = p (a -
E_p[a]). A normaliser is a pair (top, log): log sum exp(x) = top + log with top = max x, kept apart
because their sum would round at the size of the logits.

``acc`` is either raw (logits of the row's first teacher, nothing was written) or folded (the
weighted terms of all teachers so far, see ``term``); ``t`` holds raw logits of the last teacher.

All arithmetic is float32; only the output of the gradient kernels may be narrower. Rows of a
buffer start at multiples of 16 elements and ``width``, V rounded up to 16, fits in them: loads are
masked with ``width``, which keeps them vectorised, and columns from V on are replaced.
"""

# mypy: disallow-untyped-defs=False
from __future__ import annotations

import triton
import triton.language as tl

from .types import FLOOR as FLOOR_LOGIT

# Small programs: about five of them share a multiprocessor, so that some load while others reduce.
BLOCK = 2048
OPTIONS = {"num_warps": 4, "enable_fp_fusion": True}
ALIGNMENT = 16

# Stands in for a missing logit: exp gives exactly 0, differences stay finite.
ABSENT = tl.constexpr(-1.0e30)
FLOOR_VALUE = tl.constexpr(FLOOR_LOGIT)
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


@triton.jit(do_not_specialize=["rows"])
def statistics_kernel(
    z_ptr,
    t_ptr,
    z_bias_ptr,
    t_bias_ptr,
    table_ptr,
    partial_ptr,
    z_factor,
    t_factor,
    z_cap,
    t_cap,
    rows,
    splits,
    vocab,
    width,
    z_stride,
    t_stride,
    table_stride,
    STUDENT: tl.constexpr,
    TEACHER: tl.constexpr,
    CROSS: tl.constexpr,
    FULL: tl.constexpr,
    Z_BIAS: tl.constexpr,
    Z_CAP: tl.constexpr,
    Z_FLOOR: tl.constexpr,
    T_BIAS: tl.constexpr,
    T_CAP: tl.constexpr,
    T_FLOOR: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Partials of the student (STUDENT), the teacher (TEACHER) and of both (CROSS) in one read.

    Without STUDENT its normaliser is taken from the table. FULL adds the arg max.
    """
    row, split, cols, stored, valid = locate(splits, vocab, width, BLOCK)
    place = partial_ptr + row * splits + split
    field = tl.cast(rows, tl.int64) * splits
    start = split * BLOCK
    if STUDENT or CROSS:
        at = z_ptr + row * z_stride + cols
        z = tl.load(at, mask=stored, other=ABSENT)
        if STUDENT:
            z = finish(z, at, z_bias_ptr, cols, stored, valid, z_factor, z_cap, Z_BIAS, Z_CAP, Z_FLOOR)
        z = tl.where(valid, z, ABSENT)
        if STUDENT:
            e_p = summarise(z, place, field, start, FULL)
        else:
            top, log = normaliser(table_ptr, table_stride, row, TOP)
            e_p = tl.exp((z - top) - log)
    if TEACHER:
        at = t_ptr + row * t_stride + cols
        t = tl.load(at, mask=stored, other=ABSENT)
        t = finish(t, at, t_bias_ptr, cols, stored, valid, t_factor, t_cap, T_BIAS, T_CAP, T_FLOOR)
        t = tl.where(valid, t, ABSENT)
        e_q = summarise(t, place + Q_PART * field, field, start, FULL)
    if CROSS:
        g = z - t
        tl.store(place + GAP_PART * field, tl.sum(e_p * g, 0))
        tl.store(place + (GAP_PART + 1) * field, tl.sum(e_q * g, 0))


@triton.jit(do_not_specialize=["rows"])
def merge_kernel(
    partial_ptr,
    z_ptr,
    t_ptr,
    label_ptr,
    weight_ptr,
    table_ptr,
    result_ptr,
    finite_ptr,
    rows,
    splits,
    z_stride,
    t_stride,
    weight_stride,
    table_stride,
    result_stride,
    STUDENT: tl.constexpr,
    TEACHER: tl.constexpr,
    CROSS: tl.constexpr,
    FULL: tl.constexpr,
    LABELS: tl.constexpr,
    SIDE: tl.constexpr,
    ROWS: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """Merge the partials of ROWS rows into the table (student, normaliser and weight of the
    teacher's SIDE) and into the teacher's results; flag teachers that are not finite."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    there = row < rows
    split = tl.arange(0, SPLITS)
    place = partial_ptr + row[:, None].to(tl.int64) * splits + split[None, :]
    present = there[:, None] & (split < splits)[None, :]
    field = tl.cast(rows, tl.int64) * splits
    table = table_ptr + row
    if LABELS:
        label = tl.load(label_ptr + row, mask=there, other=0)

    if STUDENT:
        top, total, dot, share, where = merge(place, field, present, split, FULL)
        log = tl.log(total)
        tl.store(table + TOP * table_stride, top, mask=there)
        tl.store(table + LOG * table_stride, log, mask=there)
        tl.store(table + LSE * table_stride, top + log, mask=there)
        tl.store(table + ENTROPY * table_stride, log - dot / total, mask=there)
        if LABELS:
            z_label = tl.load(z_ptr + row.to(tl.int64) * z_stride + label, mask=there, other=0.0)
            tl.store(table + LOGPROB * table_stride, (z_label - top) - log, mask=there)
        if FULL:
            tl.store(table + ARGMAX * table_stride, where, mask=there)
    elif TEACHER:
        top = tl.load(table + TOP * table_stride, mask=there, other=0.0)
        log = tl.load(table + LOG * table_stride, mask=there, other=0.0)
        if FULL:
            where = tl.load(table + ARGMAX * table_stride, mask=there, other=0.0)

    if TEACHER:
        q_top, q_total, q_dot, q_share, q_where = merge(place + Q_PART * field, field, present, split, FULL)
        q_log = tl.log(q_total)
        side = table + SIDE * table_stride
        tl.store(side + SIDE_TOP * table_stride, q_top, mask=there)
        tl.store(side + SIDE_LOG * table_stride, q_log, mask=there)
        weight = tl.load(weight_ptr + row * weight_stride, mask=there, other=0.0)
        tl.store(side + SIDE_WEIGHT * table_stride, weight, mask=there)
        # A logit of -inf leaves the sum finite and makes 0 * inf in the dot product.
        check = (q_top + q_total) + q_dot
        tl.store(finite_ptr + row, check - check == 0.0, mask=there)
        result = result_ptr + row
        if CROSS:
            shift = (top - q_top) + (log - q_log)
            g_p = tl.load(place + GAP_PART * field, mask=present, other=0.0)
            g_q = tl.load(place + (GAP_PART + 1) * field, mask=present, other=0.0)
            if STUDENT:
                mean_p = tl.sum(g_p * share, 1) / total
            else:
                mean_p = tl.sum(g_p, 1)
            mean_q = tl.sum(g_q * q_share, 1) / q_total
            tl.store(result + MEAN_GAP * result_stride, mean_p, mask=there)
            tl.store(result + REVERSE_KL * result_stride, mean_p - shift, mask=there)
            tl.store(result + FORWARD_KL * result_stride, shift - mean_q, mask=there)
        if FULL:
            tl.store(result + Q_ENTROPY * result_stride, q_log - q_dot / q_total, mask=there)
            tl.store(result + Q_TOP1 * result_stride, 1.0 / q_total, mask=there)
            tl.store(result + Q_AGREES * result_stride, (q_where == where).to(tl.float32), mask=there)
            if LABELS:
                t_label = tl.load(t_ptr + row.to(tl.int64) * t_stride + label, mask=there, other=0.0)
                tl.store(result + Q_LOGPROB * result_stride, (t_label - q_top) - q_log, mask=there)


@triton.jit(do_not_specialize=["rows"])
def value_kernel(
    z_ptr,
    t_ptr,
    table_ptr,
    partial_ptr,
    parameter,
    rows,
    splits,
    vocab,
    width,
    z_stride,
    t_stride,
    table_stride,
    KIND: tl.constexpr,
    SIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Partials [2, c, splits] of the divergence and of E_p[a], both normalisers known."""
    row, split, cols, stored, valid = locate(splits, vocab, width, BLOCK)
    z = tl.where(valid, tl.load(z_ptr + row * z_stride + cols, mask=stored, other=ABSENT), ABSENT)
    t = tl.where(valid, tl.load(t_ptr + row * t_stride + cols, mask=stored, other=ABSENT), ABSENT)
    top, log = normaliser(table_ptr, table_stride, row, TOP)
    q_top, q_log = normaliser(table_ptr, table_stride, row, SIDE)
    p = tl.exp((z - top) - log)
    q = tl.exp((t - q_top) - q_log)
    r = (t - z) - ((q_top - top) + (q_log - log))
    if KIND == "reverse_kl":
        value = -p * r
        mean = p * (z - t)
    elif KIND == "forward_kl":
        value = q * r
        mean = value
    elif KIND == "jsd":
        excess = jsd_log(r, parameter)
        mean = (parameter - 1.0) * p * excess
        value = parameter * q * (tl.minimum(r, CLAMP) - excess) + mean
    else:
        tl.static_assert(KIND == "skew_kl")
        ratio = skew_ratio(r, parameter)
        value = -q * tl.log(ratio)
        mean = (parameter - 1.0) * p / ratio
    place = partial_ptr + row * splits + split
    tl.store(place, tl.sum(value, 0))
    tl.store(place + tl.cast(rows, tl.int64) * splits, tl.sum(mean, 0))


@triton.jit
def fold_kernel(
    z_ptr,
    acc_ptr,
    t_ptr,
    table_ptr,
    parameter,
    splits,
    vocab,
    width,
    z_stride,
    acc_stride,
    t_stride,
    table_stride,
    KIND: tl.constexpr,
    RAW: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Add the term of the teacher in ``t`` to ``acc``, which is RAW or folded. KIND "mixture"
    makes it log sum_k w_k q_k."""
    row, _, cols, stored, _ = locate(splits, vocab, width, BLOCK)
    at = acc_ptr + row * acc_stride + cols
    acc = tl.load(at, mask=stored, other=0.0)
    t = tl.load(t_ptr + row * t_stride + cols, mask=stored, other=0.0)
    if KIND == "jsd" or KIND == "skew_kl":
        z = tl.load(z_ptr + row * z_stride + cols, mask=stored, other=0.0)
    else:
        z = t
    if KIND == "mixture":
        if RAW:
            acc = side_log(acc, table_ptr, table_stride, row, ACC_SIDE)
        y = side_log(t, table_ptr, table_stride, row, T_SIDE)
        out = tl.maximum(acc, y) + tl.log(1.0 + tl.exp(-tl.abs(acc - y)))
    else:
        if RAW:
            acc = term(z, acc, table_ptr, table_stride, row, parameter, KIND, ACC_SIDE)
        out = acc + term(z, t, table_ptr, table_stride, row, parameter, KIND, T_SIDE)
    tl.store(at, out, mask=stored)


@triton.jit
def gradient_kernel(
    z_ptr,
    acc_ptr,
    t_ptr,
    table_ptr,
    mean_ptr,
    weight_ptr,
    scale_ptr,
    out_ptr,
    parameter,
    cap,
    splits,
    vocab,
    width,
    z_stride,
    acc_stride,
    t_stride,
    table_stride,
    out_stride,
    KIND: tl.constexpr,
    RAW: tl.constexpr,
    HAS_T: tl.constexpr,
    CAP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """scale * slope * d divergence / d z of the teachers in ``acc`` (RAW or folded) and, with
    HAS_T, in ``t``.

    ``mean`` is the weighted sum of E_p[a] and ``weight`` the sum of the weights, both [c].
    """
    row, _, cols, stored, _ = locate(splits, vocab, width, BLOCK)
    z = tl.load(z_ptr + row * z_stride + cols, mask=stored, other=0.0)
    a = tl.load(acc_ptr + row * acc_stride + cols, mask=stored, other=0.0)
    if RAW:
        a = term(z, a, table_ptr, table_stride, row, parameter, KIND, ACC_SIDE)
    if HAS_T:
        t = tl.load(t_ptr + row * t_stride + cols, mask=stored, other=0.0)
        a += term(z, t, table_ptr, table_stride, row, parameter, KIND, T_SIDE)
    top, log = normaliser(table_ptr, table_stride, row, TOP)
    p = tl.exp((z - top) - log)
    if KIND == "reverse_kl":
        d = p * ((tl.load(weight_ptr + row) * z - a) - tl.load(mean_ptr + row))
    elif KIND == "forward_kl":
        d = tl.load(weight_ptr + row) * p - a
    else:
        d = p * (a - tl.load(mean_ptr + row))
    d *= tl.load(scale_ptr + row)
    if CAP:
        d *= softcap_slope(z, cap)
    tl.store(out_ptr + row * out_stride + cols, d.to(out_ptr.dtype.element_ty), mask=stored)


@triton.jit
def logprob_gradient_kernel(
    z_ptr,
    label_ptr,
    table_ptr,
    entropy_ptr,
    logprob_scale_ptr,
    entropy_scale_ptr,
    out_ptr,
    cap,
    splits,
    vocab,
    width,
    z_stride,
    table_stride,
    out_stride,
    HAS_ENTROPY: tl.constexpr,
    CAP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """slope * d (logprob_scale * log p(label) + entropy_scale * entropy) / d z: 1_y - p and -p
    (log p + H)."""
    row, _, cols, stored, _ = locate(splits, vocab, width, BLOCK)
    z = tl.load(z_ptr + row * z_stride + cols, mask=stored, other=0.0)
    top, log = normaliser(table_ptr, table_stride, row, TOP)
    log_p = (z - top) - log
    up = tl.load(logprob_scale_ptr + row)
    factor = up
    if HAS_ENTROPY:
        factor = up + tl.load(entropy_scale_ptr + row) * (log_p + tl.load(entropy_ptr + row))
    d = tl.where(cols == tl.load(label_ptr + row), up, 0.0) - tl.exp(log_p) * factor
    if CAP:
        d *= softcap_slope(z, cap)
    tl.store(out_ptr + row * out_stride + cols, d.to(out_ptr.dtype.element_ty), mask=stored)


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
    """log (w q) of a raw teacher."""
    top, log = normaliser(table_ptr, table_stride, row, SIDE)
    return (x - top) - (log - tl.log(tl.load(table_ptr + (SIDE + SIDE_WEIGHT) * table_stride + row)))


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
