"""All row work of a gradient in one read of the logits: the programs of a row post their partials, wait for each other
and go on with the logits that they still hold. Symbols as in ``rows``.
"""

# Triton's own types exist while it compiles only: its functions have none here.
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False, disallow-untyped-decorators=False
# mypy: disallow-untyped-calls=False, disable-error-code=assignment
from __future__ import annotations

import triton
import triton.language as tl

from .rows_gradient import gaps_of, post_terms, store_gradient, terms_of
from .rows_math import (
    MEAN,
    MERGED,
    VALUE,
    columns,
    compare,
    kernel,
    label_logit,
    load,
    load_teachers,
    merge_row,
    probability,
    summarise,
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


@triton.jit
def merge_terms(partial_ptr, table, row, field, splits, SPLITS: tl.constexpr):
    """VALUE and MEAN of a row from those of its blocks."""
    block = tl.arange(0, SPLITS)
    line = partial_ptr + row * splits + block
    values = tl.load(line, mask=block < splits, other=0.0, cache_modifier=".cg")
    means = tl.load(line + field, mask=block < splits, other=0.0, cache_modifier=".cg")
    to = table[0] + row
    tl.store(to + VALUE * table[2], tl.sum(values, 0))
    tl.store(to + MEAN * table[2], tl.sum(means, 0))


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
    logits = (logits_ptr, slot_stride, stride)
    table = (table_ptr, head_stride, field_stride)
    program = tl.atomic_add(ticket_ptr, 1)
    row, split = (program // splits).to(tl.int64), program % splits
    cols, stored, valid = columns(split, vocab, BLOCK)
    field = tl.cast(rows, tl.int64) * splits
    place = partial_ptr + row * splits + split
    z = load(logits, 0, row, cols, stored, valid)
    ts = load_teachers(logits, row, cols, stored, valid, TEACHERS)
    e_p, top = summarise(z, cols, place, field, FULL, DOTS)
    for j in tl.static_range(TEACHERS):
        own = place + (1 + j) * MERGED * field
        e_q, _ = summarise(ts[j], cols, own, field, FULL, DOTS)
        compare(z, ts[j], top, e_p, e_q, own, field, P, Q)
    if LABELS:
        label = tl.load(label_ptr + row)
        for j in tl.static_range(TEACHERS + 1):
            own = place + j * MERGED * field
            label_logit(logits, j, row, label, split, own, field, BLOCK)
    post(ticket_ptr + 1 + row)
    wait(ticket_ptr + 1 + row, splits, WAIT)
    NORMS: tl.constexpr = TERMS or KIND == "forward_kl"
    P_MEAN: tl.constexpr = KIND == "reverse_kl" and not TERMS
    merge_row(partial_ptr, table, row, rows, splits, 0, TEACHERS, NORMS, P_MEAN, False, False, False, False, SPLITS)
    tl.debug_barrier()
    p = probability(z, table, row, 0)
    if TERMS:
        a, value = terms_of(z, ts, p, table, row, parameter, KIND, MIXTURE, TEACHERS)
        post_terms(a, value, p, place + (1 + TEACHERS) * MERGED * field, field, KIND)
        post(ticket_ptr + 1 + rows + row)
        wait(ticket_ptr + 1 + rows + row, splits, WAIT)
        merge_terms(partial_ptr + (1 + TEACHERS) * MERGED * field, table, row, field, splits, SPLITS)
        tl.debug_barrier()
    else:
        a = gaps_of(z, ts, p, table, row, KIND, TEACHERS)
    if WRITE:
        out = (out_ptr, out_stride)
        store_gradient(z, a, p, cols, stored, label_ptr, table, out, row, cap, KIND, TERMS, TEACHERS, LABEL_TERM, CAP)
