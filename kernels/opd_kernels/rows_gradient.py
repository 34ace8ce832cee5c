"""Of a block of columns of a row: what it adds to the divergence, and its dZ. Symbols as in ``rows``."""

# Triton's own types exist while it compiles only: its functions have none here.
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False, disallow-untyped-decorators=False
# mypy: disallow-untyped-calls=False, disable-error-code=assignment
from __future__ import annotations

import triton
import triton.language as tl

from .rows_math import (
    LABEL_SCALE,
    LOG,
    MEAN,
    MEAN_P,
    REF,
    SCALE,
    STEP,
    TOP,
    WEIGHT,
    entry,
    exp,
    log_ratio,
    log_share,
    log_sum,
    probability,
    slope_of,
    value_of,
)


@triton.jit
def mixture(ts, z, table, row, TEACHERS: tl.constexpr):
    """(log q_m [BLOCK], r of it, r at the student's largest logit)."""
    z_top = entry(table, row, 0, TOP)
    z_log = entry(table, row, 0, LOG)
    out = log_share(ts[0], table, row, 1)
    at_top = log_share(z_top - entry(table, row, 1, REF), table, row, 1)
    for j in tl.static_range(1, TEACHERS):
        out = log_sum(out, log_share(ts[j], table, row, 1 + j))
        t_top = z_top - entry(table, row, 1 + j, REF)
        at_top = log_sum(at_top, log_share(t_top, table, row, 1 + j))
    return out, (out - (z - z_top)) + z_log, at_top + z_log


@triton.jit
def terms_of(
    z,
    ts,
    p,
    table,
    row,
    parameter,
    KIND: tl.constexpr,
    MIXTURE: tl.constexpr,
    TEACHERS: tl.constexpr,
):
    """(weighted a, or p - q_m for the forward KL of a mixture; what each column adds to the divergence), [BLOCK]."""
    a = tl.zeros_like(p)
    value = tl.zeros_like(p)
    if MIXTURE:
        log_q, r, at_top = mixture(ts, z, table, row, TEACHERS)
        q = exp(log_q)
        value = value_of(p, q, r, parameter, KIND)
        if KIND == "forward_kl":
            a = p - q
        else:
            a = slope_of(r, parameter, KIND) - slope_of(at_top, parameter, KIND)
    else:
        for j in tl.static_range(TEACHERS):
            w = entry(table, row, 1 + j, WEIGHT)
            shift = log_ratio(table, row, 1 + j)
            r = (ts[j] - z) + shift
            at_top = shift - entry(table, row, 1 + j, REF)
            q = probability(ts[j], table, row, 1 + j)
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
def gaps_of(z, ts, p, table, row, KIND: tl.constexpr, TEACHERS: tl.constexpr):
    """sum_k w_k (g_k - E_p[g_k]) of the reverse KL, sum_k w_k (p - q_k) of the forward KL."""
    a = tl.zeros_like(p)
    for j in tl.static_range(TEACHERS):
        w = entry(table, row, 1 + j, WEIGHT)
        if KIND == "reverse_kl":
            g = (z - ts[j]) - entry(table, row, 1 + j, REF)
            a += w * (g - entry(table, row, 1 + j, MEAN_P))
        else:
            tl.static_assert(KIND == "forward_kl")
            a += w * (p - probability(ts[j], table, row, 1 + j))
    return a


@triton.jit
def store_gradient(
    z,
    a,
    p,
    cols,
    stored,
    label_ptr,
    table,
    out,
    row,
    cap,
    KIND: tl.constexpr,
    TERMS: tl.constexpr,
    TEACHERS: tl.constexpr,
    LABELS: tl.constexpr,
    CAP: tl.constexpr,
):
    """dZ of one block from its ``a``, to the rows of ``out``, (pointer, stride)."""
    d = tl.zeros_like(p)
    if TEACHERS > 0:
        scale = entry(table, row, 0, SCALE)
        if TERMS and KIND != "forward_kl":
            a -= entry(table, row, 0, MEAN)
        if KIND == "forward_kl":
            d = scale * a
        else:
            d = (scale * p) * a
    if LABELS:
        up = entry(table, row, 0, LABEL_SCALE)
        d += up * p - tl.where(cols == tl.load(label_ptr + row), up, 0.0)
    if CAP:
        d *= softcap_slope(z, cap)
    tl.store(out[0] + row * out[1] * STEP + cols, d.to(out[0].dtype.element_ty), mask=stored)


@triton.jit
def softcap_slope(z, cap):
    """d cap tanh(x / cap) / d x at the finished logit z."""
    share = z / cap
    return 1.0 - share * share
