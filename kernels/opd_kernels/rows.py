"""Triton row kernels: sweeps over [1 + K, c, V] float32 logits of a student and K teachers.

A program works on one block of columns of one row. Sums over a row are therefore kept as partials, one per block,
and merged afterwards (``table``): a few rows still fill a GPU. ``one_read_kernel`` does everything in one read: the
programs of a row post their partials, wait for each other and go on with the logits that they still hold. The other
kernels are its stages one by one, for ranks that exchange partials in between, for rows that do not fit on the
device together, and where no gradient is asked for.

Symbols: z student logits / T, p its softmax; t teacher logits / T, q its softmax; g = z - t; r = log q - log p; a = d
divergence / d p up to a constant per row, so that d divergence / d z = p (a - E_p[a]), a taken relative to its value
at the student's largest logit.

All arithmetic is float32; only dZ may be narrower. Rows of a buffer start at multiples of 16 elements and V rounded
up to 16 fits in them: loads are masked with that width, which keeps them vectorised, and columns from V on are
replaced. Numbers that vary from chunk to chunk do not make variants of a kernel.
"""

# mypy: disable-error-code=assignment, disallow-untyped-defs=False
# mypy: disallow-untyped-decorators=False, disallow-untyped-calls=False
from __future__ import annotations

import triton
import triton.language as tl

from .rows_math import (
    DOT,
    FLOOR_VALUE,
    LABEL_SCALE,
    LOG,
    MEAN,
    MEAN_P,
    MERGED,
    REF,
    SCALE,
    STEP,
    TOP,
    VALUE,
    WEIGHT,
    columns,
    compare,
    entry,
    exp,
    label_logit,
    load,
    log_ratio,
    log_share,
    log_sum,
    merge_row,
    probability,
    slope_of,
    summarise,
    tanh,
    value_of,
)

# Small programs: about four of them share a multiprocessor, so that some load while others reduce.
BLOCK = 2048
ROWS = 32
"""Rows that a program of ``squares_kernel`` adds up."""
MANY_TEACHERS = 3
"""Teachers from which a program has twice the warps: it holds a row's logits of all of them."""
NUMBERS = ["rows", "splits", "vocab", "slot_stride", "stride", "head_stride", "field_stride", "out_stride", "first"]
VECTORS = ["label_ptr", "table_ptr", "entropy_scale_ptr", "bias_ptr", "factor_ptr"]


def options(teachers: int) -> dict[str, int | bool]:
    """How the kernels are compiled."""
    return {"num_warps": 4 if teachers < MANY_TEACHERS else 8, "enable_fp_fusion": True}


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
    row, split = (tl.program_id(0) // splits).to(tl.int64), tl.program_id(0) % splits
    cols, stored, valid = columns(split, vocab, BLOCK)
    place, field = partial_ptr + row * splits + split, tl.cast(rows, tl.int64) * splits
    z = load(logits_ptr, 0, slot_stride, row, stride, cols, stored, valid)
    e_p, top = summarise(z, cols, place, field, FULL, DOTS)
    if LABELS:
        label = tl.load(label_ptr + row)
        label_logit(logits_ptr, 0, slot_stride, row, stride, label, split, place, field, BLOCK)
    for j in tl.static_range(TEACHERS):
        t = load(logits_ptr, 1 + j, slot_stride, row, stride, cols, stored, valid)
        own = place + (1 + j) * MERGED * field
        if LABELS:
            label_logit(logits_ptr, 1 + j, slot_stride, row, stride, label, split, own, field, BLOCK)
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
    row = tl.program_id(0).to(tl.int64)
    merge_row(
        partial_ptr,
        table_ptr,
        row,
        rows,
        splits,
        head_stride,
        field_stride,
        first,
        TEACHERS,
        True,
        P,
        Q,
        DOTS,
        FULL,
        LABELS,
        SPLITS,
    )


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
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Sums [parts, splits * BLOCK] over ROWS rows each of factor p^2."""
    part, split = (tl.program_id(0) // splits).to(tl.int64), tl.program_id(0) % splits
    cols, stored, valid = columns(split, vocab, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for i in range(ROWS):
        row = tl.minimum(part * ROWS + i, rows - 1)
        z = load(logits_ptr, 0, 0, row, stride, cols, stored, valid)
        p = probability(z, table_ptr, row, 0, 0, field_stride)
        total += tl.where(part * ROWS + i < rows, tl.load(factor_ptr + row), 0.0) * p * p
    tl.store(partial_ptr + (part * splits + split) * BLOCK + tl.arange(0, BLOCK), total)


@triton.jit
def mixture(ts, z, table_ptr, row, head_stride, field_stride, TEACHERS: tl.constexpr):
    """(log q_m [BLOCK], r of it, r at the student's largest logit)."""
    z_top = entry(table_ptr, row, 0, head_stride, field_stride, TOP)
    z_log = entry(table_ptr, row, 0, head_stride, field_stride, LOG)
    out = log_share(ts[0], table_ptr, row, 1, head_stride, field_stride)
    at_top = log_share(
        z_top - entry(table_ptr, row, 1, head_stride, field_stride, REF), table_ptr, row, 1, head_stride, field_stride
    )
    for j in tl.static_range(1, TEACHERS):
        out = log_sum(out, log_share(ts[j], table_ptr, row, 1 + j, head_stride, field_stride))
        t_top = z_top - entry(table_ptr, row, 1 + j, head_stride, field_stride, REF)
        at_top = log_sum(at_top, log_share(t_top, table_ptr, row, 1 + j, head_stride, field_stride))
    return out, (out - (z - z_top)) + z_log, at_top + z_log


@triton.jit
def terms_of(
    z,
    ts,
    p,
    table_ptr,
    row,
    head_stride,
    field_stride,
    parameter,
    KIND: tl.constexpr,
    MIXTURE: tl.constexpr,
    TEACHERS: tl.constexpr,
):
    """(weighted a, or p - q_m for the forward KL of a mixture; what each column adds to the divergence), [BLOCK]."""
    a = tl.zeros_like(p)
    value = tl.zeros_like(p)
    if MIXTURE:
        log_q, r, at_top = mixture(ts, z, table_ptr, row, head_stride, field_stride, TEACHERS)
        q = exp(log_q)
        value = value_of(p, q, r, parameter, KIND)
        if KIND == "forward_kl":
            a = p - q
        else:
            a = slope_of(r, parameter, KIND) - slope_of(at_top, parameter, KIND)
    else:
        for j in tl.static_range(TEACHERS):
            w = entry(table_ptr, row, 1 + j, head_stride, field_stride, WEIGHT)
            shift = log_ratio(table_ptr, row, 1 + j, head_stride, field_stride)
            r = (ts[j] - z) + shift
            at_top = shift - entry(table_ptr, row, 1 + j, head_stride, field_stride, REF)
            q = probability(ts[j], table_ptr, row, 1 + j, head_stride, field_stride)
            value += w * value_of(p, q, r, parameter, KIND)
            a += w * (slope_of(r, parameter, KIND) - slope_of(at_top, parameter, KIND))
    return a, value


@triton.jit
def post_terms(a, value, p, place, field, KIND: tl.constexpr):
    """Store the partials of VALUE and MEAN of one block."""
    tl.store(place, tl.sum(value, 0))
    if KIND == "forward_kl":
        tl.store(place + field, 0.0)
    else:
        tl.store(place + field, tl.sum(p * a, 0))


@triton.jit
def gaps_of(z, ts, p, table_ptr, row, head_stride, field_stride, KIND: tl.constexpr, TEACHERS: tl.constexpr):
    """sum_k w_k (g_k - E_p[g_k]) of the reverse KL, sum_k w_k (p - q_k) of the forward KL."""
    a = tl.zeros_like(p)
    for j in tl.static_range(TEACHERS):
        w = entry(table_ptr, row, 1 + j, head_stride, field_stride, WEIGHT)
        if KIND == "reverse_kl":
            g = (z - ts[j]) - entry(table_ptr, row, 1 + j, head_stride, field_stride, REF)
            a += w * (g - entry(table_ptr, row, 1 + j, head_stride, field_stride, MEAN_P))
        else:
            tl.static_assert(KIND == "forward_kl")
            a += w * (p - probability(ts[j], table_ptr, row, 1 + j, head_stride, field_stride))
    return a


@triton.jit
def store_gradient(
    z,
    a,
    p,
    cols,
    stored,
    label_ptr,
    table_ptr,
    out_ptr,
    row,
    head_stride,
    field_stride,
    out_stride,
    cap,
    KIND: tl.constexpr,
    TERMS: tl.constexpr,
    TEACHERS: tl.constexpr,
    LABELS: tl.constexpr,
    CAP: tl.constexpr,
):
    """dZ of one block from its ``a``."""
    d = tl.zeros_like(p)
    if TEACHERS > 0:
        scale = entry(table_ptr, row, 0, head_stride, field_stride, SCALE)
        if TERMS and KIND != "forward_kl":
            a -= entry(table_ptr, row, 0, head_stride, field_stride, MEAN)
        if KIND == "forward_kl":
            d = scale * a
        else:
            d = (scale * p) * a
    if LABELS:
        up = entry(table_ptr, row, 0, head_stride, field_stride, LABEL_SCALE)
        d += up * p - tl.where(cols == tl.load(label_ptr + row), up, 0.0)
    if CAP:
        d *= softcap_slope(z, cap)
    tl.store(out_ptr + row * out_stride * STEP + cols, d.to(out_ptr.dtype.element_ty), mask=stored)


@triton.jit
def softcap_slope(z, cap):
    """d cap tanh(x / cap) / d x at the finished logit z."""
    share = z / cap
    return 1.0 - share * share


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
    row, split = (tl.program_id(0) // splits).to(tl.int64), tl.program_id(0) % splits
    cols, stored, valid = columns(split, vocab, BLOCK)
    z = load(logits_ptr, 0, slot_stride, row, stride, cols, stored, valid)
    ts = ()
    for j in tl.static_range(TEACHERS):
        ts = ts + (load(logits_ptr, 1 + j, slot_stride, row, stride, cols, stored, valid),)  # noqa: RUF005
    p = probability(z, table_ptr, row, 0, head_stride, field_stride)
    a, value = terms_of(z, ts, p, table_ptr, row, head_stride, field_stride, parameter, KIND, MIXTURE, TEACHERS)
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
    row, split = (tl.program_id(0) // splits).to(tl.int64), tl.program_id(0) % splits
    cols, stored, valid = columns(split, vocab, BLOCK)
    z = load(logits_ptr, 0, slot_stride, row, stride, cols, stored, valid)
    ts = ()
    for j in tl.static_range(TEACHERS):
        ts = ts + (load(logits_ptr, 1 + j, slot_stride, row, stride, cols, stored, valid),)  # noqa: RUF005
    p = probability(z, table_ptr, row, 0, head_stride, field_stride)
    TERMS: tl.constexpr = MIXTURE or (KIND != "reverse_kl" and KIND != "forward_kl")
    if TERMS:
        a, _ = terms_of(z, ts, p, table_ptr, row, head_stride, field_stride, parameter, KIND, MIXTURE, TEACHERS)
    else:
        a = gaps_of(z, ts, p, table_ptr, row, head_stride, field_stride, KIND, TEACHERS)
    store_gradient(
        z,
        a,
        p,
        cols,
        stored,
        label_ptr,
        table_ptr,
        out_ptr,
        row,
        head_stride,
        field_stride,
        out_stride,
        cap,
        KIND,
        TERMS,
        TEACHERS,
        LABELS,
        CAP,
    )


@triton.jit
def post(counter_ptr):
    """Say that this program's partials are stored."""
    tl.debug_barrier()  # every thread has stored before one of them says so
    tl.atomic_add(counter_ptr, 1, sem="release", scope="gpu")


@triton.jit
def wait(counter_ptr, count, WAIT: tl.constexpr):
    """Until ``count`` programs have posted."""
    if WAIT:
        while tl.load(counter_ptr, volatile=True) < count:
            pass
    tl.atomic_add(counter_ptr, 0, sem="acquire", scope="gpu")
    tl.debug_barrier()


@kernel
def one_read_kernel(
    logits_ptr,
    label_ptr,
    table_ptr,
    partial_ptr,
    ticket_ptr,
    out_ptr,
    parameter,
    cap,
    rows,
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
    TERMS: tl.constexpr,
    P: tl.constexpr,
    Q: tl.constexpr,
    DOTS: tl.constexpr,
    FULL: tl.constexpr,
    LABELS: tl.constexpr,
    LABEL_TERM: tl.constexpr,
    CAP: tl.constexpr,
    WAIT: tl.constexpr,
    WRITE: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """All stages with one read: statistics, wait, with TERMS the terms and another wait, dZ.

    ``ticket`` [1 + 2 c], zeros, counts the programs that began and the posted blocks of every row in both stages.
    Programs take their places by ticket, so that they wait for programs that began before them or get the next
    free places: a row has to fit on the device. Every program of a row merges what dZ needs of its partials and
    stores the same numbers in the table, from which it reads them; ``merge_kernel`` adds the rest afterwards.
    """
    program = tl.atomic_add(ticket_ptr, 1)
    row, split = (program // splits).to(tl.int64), program % splits
    cols, stored, valid = columns(split, vocab, BLOCK)
    field = tl.cast(rows, tl.int64) * splits
    place = partial_ptr + row * splits + split
    z = load(logits_ptr, 0, slot_stride, row, stride, cols, stored, valid)
    ts = ()
    for j in tl.static_range(TEACHERS):
        ts = ts + (load(logits_ptr, 1 + j, slot_stride, row, stride, cols, stored, valid),)  # noqa: RUF005
    e_p, top = summarise(z, cols, place, field, FULL, DOTS)
    for j in tl.static_range(TEACHERS):
        own = place + (1 + j) * MERGED * field
        e_q, _ = summarise(ts[j], cols, own, field, FULL, DOTS)
        compare(z, ts[j], top, e_p, e_q, own, field, P, Q)
    if LABELS:
        label = tl.load(label_ptr + row)
        for j in tl.static_range(TEACHERS + 1):
            own = place + j * MERGED * field
            label_logit(logits_ptr, j, slot_stride, row, stride, label, split, own, field, BLOCK)
    post(ticket_ptr + 1 + row)
    wait(ticket_ptr + 1 + row, splits, WAIT)
    merge_row(
        partial_ptr,
        table_ptr,
        row,
        rows,
        splits,
        head_stride,
        field_stride,
        0,
        TEACHERS,
        TERMS or KIND == "forward_kl",
        KIND == "reverse_kl" and not TERMS,
        False,
        False,
        False,
        False,
        SPLITS,
    )
    tl.debug_barrier()
    p = probability(z, table_ptr, row, 0, head_stride, field_stride)
    if TERMS:
        a, value = terms_of(z, ts, p, table_ptr, row, head_stride, field_stride, parameter, KIND, MIXTURE, TEACHERS)
        post_terms(a, value, p, place + (1 + TEACHERS) * MERGED * field, field, KIND)
        post(ticket_ptr + 1 + rows + row)
        wait(ticket_ptr + 1 + rows + row, splits, WAIT)
        block = tl.arange(0, SPLITS)
        line = partial_ptr + (1 + TEACHERS) * MERGED * field + row * splits + block
        values = tl.load(line, mask=block < splits, other=0.0, cache_modifier=".cg")
        means = tl.load(line + field, mask=block < splits, other=0.0, cache_modifier=".cg")
        tl.store(table_ptr + VALUE * field_stride + row, tl.sum(values, 0))
        tl.store(table_ptr + MEAN * field_stride + row, tl.sum(means, 0))
        tl.debug_barrier()
    else:
        a = gaps_of(z, ts, p, table_ptr, row, head_stride, field_stride, KIND, TEACHERS)
    if WRITE:
        store_gradient(
            z,
            a,
            p,
            cols,
            stored,
            label_ptr,
            table_ptr,
            out_ptr,
            row,
            head_stride,
            field_stride,
            out_stride,
            cap,
            KIND,
            TERMS,
            TEACHERS,
            LABEL_TERM,
            CAP,
        )


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
    row, split = (tl.program_id(0) // splits).to(tl.int64), tl.program_id(0) % splits
    cols, stored, valid = columns(split, vocab, BLOCK)
    z = load(logits_ptr, 0, 0, row, stride, cols, stored, valid)
    below = z - entry(table_ptr, row, 0, 0, field_stride, TOP)
    up = entry(table_ptr, row, 0, 0, field_stride, LABEL_SCALE)
    factor = up
    if HAS_ENTROPY:
        factor = up + tl.load(entropy_scale_ptr + row) * (below - entry(table_ptr, row, 0, 0, field_stride, DOT))
    p = exp(below - entry(table_ptr, row, 0, 0, field_stride, LOG))
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
