"""What is known about the rows of a problem, and how parts of the vocabulary merge into it.

A table is a tensor [1 + K, FIELDS, n]: head 0 is the student, head 1 + j the j-th teacher of the row, and a
column belongs to a computed row. The fields up to ``MERGED`` are statistics of logits. They merge: those of
blocks of columns into those of a rank's shard (``rows.merge_kernel``), those of shards into those of the whole
vocabulary (``merge``), by the same formulas. With z the student's logits, p its softmax, t and q a teacher's,
g = z - t and y the label:

    TOP     max z                       LOG     log sum exp(z - TOP), so that log p = (z - TOP) - LOG
    DOT     E_p[z - TOP]                ARG     the column of the largest logit
    LABEL   z_y, 0 in a part without y  REF     g at the student's largest logit   (teachers)
    MEAN_P  E_p[g - REF]  (teachers)    MEAN_Q  E_q[g]                             (teachers)

TOP and LOG are kept apart because their sum would round at the size of the logits. REF keeps E_p[g] from
cancelling where p is almost one-hot: there g - REF is exactly 0 on nearly all of the mass.

The student's REF and MEAN_P hold what a second sweep adds up, VALUE, the divergence, and MEAN, the weighted
E_p[a - a at the largest logit]. Above ``MERGED`` lie inputs: the student's SCALE, the factor of a row's
divergence in the loss, and LABEL_SCALE, that of -log p(y); and a teacher's WEIGHT.
"""

from __future__ import annotations

import torch
from torch import Tensor

TOP, LOG, DOT, ARG, LABEL, REF, MEAN_P, MEAN_Q = range(8)
VALUE, MEAN = REF, MEAN_P
MERGED = 8
WEIGHT = SCALE = 8
LABEL_SCALE = 9
FIELDS = 10

# TOP of a part without columns; finite, so that 0 times it is 0.
NO_COLUMN = -1.0e30


def clear(table: Tensor) -> None:
    """The statistics of a part of the vocabulary without columns."""
    table[:, :MERGED] = 0.0
    table[:, TOP] = NO_COLUMN


def merge(parts: Tensor) -> Tensor:
    """[1 + K, MERGED, n] of the whole from [R, 1 + K, MERGED, n] of its parts."""
    tops = parts[:, :, TOP]
    top, best = tops.max(0)
    below = tops - top
    mass = below + parts[:, :, LOG]
    log = mass.logsumexp(0)
    share = (mass - log).exp()
    out = torch.empty_like(parts[0])
    out[:, TOP], out[:, LOG] = top, log
    out[:, DOT] = (share * (parts[:, :, DOT] + below)).sum(0)
    out[:, ARG] = parts[:, :, ARG].gather(0, best[None])[0]
    out[:, LABEL] = parts[:, :, LABEL].sum(0)
    refs = parts[:, :, REF]
    ref = refs.gather(0, best[None, :1].expand_as(refs[:1]))[0]
    out[:, REF] = ref
    out[:, MEAN_P] = (share[:, :1] * (parts[:, :, MEAN_P] + (refs - ref))).sum(0)
    out[:, MEAN_Q] = (share * parts[:, :, MEAN_Q]).sum(0)
    return out


def log_ratio(table: Tensor, head: int) -> Tensor:
    """[n] log sum exp of the student's logits minus that of ``head``'s."""
    return (table[0, TOP] - table[head, TOP]) + (table[0, LOG] - table[head, LOG])


def logprob(table: Tensor, head: int) -> Tensor:
    """[n] log-prob of the labels."""
    return (table[head, LABEL] - table[head, TOP]) - table[head, LOG]


def entropy(table: Tensor, head: int) -> Tensor:
    """[n] nats."""
    return table[head, LOG] - table[head, DOT]


def reverse_kl(table: Tensor, head: int) -> Tensor:
    """[n] KL(p || q)."""
    return table[head, MEAN_P] + (table[head, REF] - log_ratio(table, head))


def forward_kl(table: Tensor, head: int) -> Tensor:
    """[n] KL(q || p)."""
    return log_ratio(table, head) - table[head, MEAN_Q]


def mixture_at_top(table: Tensor) -> Tensor:
    """[n] log q_m - log p at the student's largest logit, q_m the weighted mixture of all teachers."""
    teachers = table[1:]
    weight = teachers[:, WEIGHT].clamp(min=1.0e-37).log()
    own = (table[0, TOP] - teachers[:, REF]) - teachers[:, TOP]
    return torch.logsumexp(own + (weight - teachers[:, LOG]), 0) + table[0, LOG]
