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

from .rows_math import (
    ABSENT,
    ACC_SIDE,
    ARGMAX,
    CLAMP,
    ENTROPY,
    FORWARD_KL,
    GAP_PART,
    LOG,
    LOGPROB,
    LSE,
    MEAN_GAP,
    Q_AGREES,
    Q_ENTROPY,
    Q_LOGPROB,
    Q_PART,
    Q_TOP1,
    REVERSE_KL,
    SIDE_LOG,
    SIDE_TOP,
    SIDE_WEIGHT,
    T_SIDE,
    TOP,
    finish,
    jsd_log,
    locate,
    merge,
    normaliser,
    side_log,
    skew_ratio,
    softcap_slope,
    summarise,
    term,
)

# Small programs: about five of them share a multiprocessor, so that some load while others reduce.
BLOCK = 2048
OPTIONS = {"num_warps": 4, "enable_fp_fusion": True}
ALIGNMENT = 16


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
