"""Divergence from a teacher of which only the k largest log-probs of every token are known, as an
inference server returns them.

Student and teacher are both reduced to k + 1 events: the k listed ids, and one tail bucket with
everything else. Merging events never increases an f-divergence (data-processing inequality), so the
result is a lower bound of the exact divergence, and equal to it when the list is the vocabulary or
when both models spread their tails alike. Without the bucket the truncated sum bounds nothing and can
be negative.

Rows may list different numbers of ids: the places of [N, k] that a row does not need hold :data:`UNLISTED`
and -inf. They are no events: what they could have named belongs to the tail.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .call import no_autocast, student_arguments
from .logprob import linear_logprob
from .problem import Rule
from .types import REDUCTIONS, DivergenceOutput, LMHead
from .validation import check_choice, check_constant, check_matrix, check_values, make_rule, make_token_weight

# How far above 1 the probabilities of a list may sum: what half-precision log-probs lose.
MASS_TOLERANCE = 1.0e-2

UNLISTED = -1
"""In place of an id: the row lists fewer than k ids. The log-prob there is -inf."""

# Log-prob of what is no event: exp of it is 0 in every dtype, and differences of it are finite.
NOTHING = -1.0e4


def topk_divergence(
    student_hidden: Tensor,
    student_weight: Tensor | LMHead,
    topk_ids: Tensor,
    topk_logprobs: Tensor,
    *,
    divergence: str = "reverse_kl",
    jsd_beta: float = 0.5,
    skew_alpha: float = 0.1,
    token_weight: Tensor | None = None,
    temperature: float = 1.0,
    reduction: str = "sum",
    impl: str = "auto",
    workspace_bytes: int | None = None,
    vocab_size: int | None = None,
    student_bias: Tensor | None = None,
    student_logit_scale: float = 1.0,
    student_softcap: float | None = None,
    group: Any = None,
) -> DivergenceOutput:
    """Divergence between a student and a teacher on k listed ids and one bucket for the rest.

    The student's tail is summed over its own columns and the gradient goes through k + 1 bounded
    terms per row, so that nothing is lost when a tail is tiny. The teacher's tail is
    ``log(1 - sum exp(topk_logprobs) + e)`` with e two machine epsilons of the list's dtype, its
    rounding error.

    Args:
        student_hidden: [N, d] float32, bfloat16, float16 or float64, row-major.
        student_weight: [V, d], or an ``LMHead``, as in ``linear_divergence``.
        topk_ids: [N, k] int64 ids, different within a row; -1 where a row lists fewer than k.
        topk_logprobs: [N, k] floating point, the teacher's log-probs of these ids, normalised over
            its whole vocabulary at the temperature of the loss; -inf where the id is -1.
        divergence, jsd_beta, skew_alpha: as in ``linear_divergence``.
        token_weight: [N] weight of each row in the loss, default 1. Rows with 0 are not computed.
        temperature: divides the student's logits only: a truncated list cannot be tempered.
        reduction: "sum" of token_weight * divergence, "mean" over sum(token_weight), or "none" for
            [N].
        impl, workspace_bytes, vocab_size, group: as in ``linear_logprob``.
        student_bias, student_logit_scale, student_softcap: as in ``linear_divergence``.

    Returns:
        ``DivergenceOutput`` without statistics: ``loss`` differentiable in the student's tensors,
        ``token_loss`` [N] with NaN on rows that were not computed.

    Raises:
        ValueError: an argument is invalid: an id twice in a row or outside the vocabulary, a row without
            any id, a log-prob that is not finite or above 0, probabilities of a row that sum to more
            than 1.01.
    """
    rule = make_rule(divergence, jsd_beta, skew_alpha)
    check_choice("reduction", reduction, REDUCTIONS)
    student = student_arguments(student_hidden, student_weight, student_bias, student_logit_scale, student_softcap)
    _, head_weight, bias, logit_scale, softcap = student
    check_matrix("student_hidden", student_hidden, "[N, d]")
    check_matrix("student_weight", head_weight, "[V, d]")
    rows, device = student_hidden.shape[0], student_hidden.device
    double = student_hidden.dtype == torch.float64
    dtype = torch.float64 if double else torch.float32
    weight = make_token_weight(token_weight, rows, dtype, device)
    check_values(torch.ones(rows, 1, device=device), weight, reduction, None, 0)
    used = None if weight is None else torch.nonzero(weight)[:, 0]
    width = head_weight.shape[0] if vocab_size is None and group is None else vocab_size
    check_topk(topk_ids, topk_logprobs, rows, device, used, width)

    token_loss = student_hidden.new_full((rows,), math.nan, dtype=dtype)
    hidden, ids, listed = student_hidden, topk_ids, topk_logprobs
    if used is not None and used.numel() < rows:
        hidden, ids, listed = hidden[used], ids[used], listed[used]
    else:
        used = None

    # An unused place repeats the row's largest id, which changes nothing of the tail, and is masked below.
    unlisted = ids == UNLISTED
    found = linear_logprob(
        hidden,
        head_weight,
        torch.where(unlisted, ids.amax(1, keepdim=True), ids),
        bias=bias,
        logit_scale=logit_scale,
        softcap=softcap,
        temperature=temperature,
        impl=impl,
        workspace_bytes=workspace_bytes,
        vocab_size=vocab_size,
        tail=ids.shape[1] != width or bool(unlisted.any()),
        group=group,
    )
    with no_autocast(device):
        p = found.logprob.masked_fill(unlisted, NOTHING)
        q = listed.detach().to(dtype).masked_fill(unlisted, NOTHING)
        if found.tail is not None:
            p = torch.cat((p, student_tail(found.tail)[:, None]), 1)
            q = torch.cat((q, teacher_tail(listed.detach(), dtype)[:, None]), 1)
        value = bucket_divergence(rule, p, q)
        scale = value.new_ones(rows) if weight is None else weight
        weighted = value * (scale if used is None else scale[used])
    if used is None:
        token_loss = value.detach()
    else:
        token_loss[used] = value.detach()
    if reduction == "none":
        loss = weighted if used is None else weighted.new_zeros(rows).index_copy(0, used, weighted)
    else:
        total = scale.sum()
        loss = weighted.sum() / torch.where(total > 0, total, 1.0) if reduction == "mean" else weighted.sum()
    return DivergenceOutput(loss, token_loss)


def bucket_divergence(rule: Rule, p: Tensor, q: Tensor) -> Tensor:
    """[n] divergence of finite log-probs ``p`` (student) and ``q``, both [n, events]."""
    if rule.kind == "reverse_kl":
        return (p.exp() * (p - q)).sum(1)
    if rule.kind == "forward_kl":
        return (q.exp() * (q - p)).sum(1)
    share = rule.beta if rule.kind == "jsd" else rule.alpha
    m = torch.logaddexp(q + math.log(share), p + math.log1p(-share))
    from_teacher = (q.exp() * (q - m)).sum(1)
    if rule.kind == "skew_kl":
        return from_teacher
    return share * from_teacher + (1.0 - share) * (p.exp() * (p - m)).sum(1)


def teacher_tail(listed: Tensor, dtype: torch.dtype) -> Tensor:
    """[n] log of the probability that a list [n, k] of log-probs leaves, plus the rounding error of
    the list: a tail below it would be noise, and could lift the reverse KL above the exact one."""
    error = 2.0 * max(torch.finfo(listed.dtype).eps, torch.finfo(dtype).eps)
    mass = listed.double().exp().sum(1)
    return torch.log1p(error - mass.clamp(max=1.0)).to(dtype)


def student_tail(tail: Tensor) -> Tensor:
    """[n] the tail, or epsilon as the teacher's where it has no column: neither counts then."""
    return torch.where(torch.isneginf(tail), math.log(torch.finfo(tail.dtype).eps), tail)


def check_topk(
    ids: Tensor, logprobs: Tensor, rows: int, device: torch.device, used: Tensor | None, vocab: int | None
) -> None:
    """Shapes, dtypes and values of a teacher's list, the values on the rows ``used`` only; ``vocab``: of the ids."""
    for name, tensor in (("topk_ids", ids), ("topk_logprobs", logprobs)):
        if not isinstance(tensor, Tensor) or tensor.dim() != 2 or tensor.shape[0] != rows or tensor.shape[1] == 0:
            shape = list(tensor.shape) if isinstance(tensor, Tensor) else type(tensor).__name__
            raise ValueError(f"{name} must be a tensor [N, k] = [{rows}, k], got {shape}")
        if tensor.device != device:
            raise ValueError(f"{name} is on {tensor.device}, the student on {device}: move it there")
    if ids.shape != logprobs.shape:
        raise ValueError(
            f"topk_ids is {list(ids.shape)}, topk_logprobs {list(logprobs.shape)}: pass one log-prob an id"
        )
    if ids.dtype != torch.int64:
        raise ValueError(f"topk_ids has dtype {ids.dtype}: pass int64 token ids")
    if not logprobs.is_floating_point():
        raise ValueError(f"topk_logprobs has dtype {logprobs.dtype}: pass floating point log-probs")
    check_constant("topk_logprobs", logprobs)
    if used is not None:
        ids, logprobs = ids[used], logprobs[used]
    places = torch.arange(ids.shape[0], device=device) if used is None else used
    ordered, unlisted = ids.sort(1).values, ids == UNLISTED
    outside = (ids < UNLISTED).any(1)
    if vocab is not None:
        outside |= (ids >= vocab).any(1)
    twice = ((ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] != UNLISTED)).any(1)
    empty = unlisted.all(1)
    marked = (unlisted & ~torch.isneginf(logprobs)).any(1)
    bad = ~(unlisted | torch.isfinite(logprobs) & (logprobs <= 0)).all(1)
    mass = logprobs.double().exp().sum(1)
    heavy = mass > 1.0 + MASS_TOLERANCE
    if not bool((outside | twice | empty | marked | bad | heavy).any()):
        return
    for flag, message in (
        (
            outside,
            f"holds an id outside the vocabulary of {vocab}: pass token ids, and -1 for a place that is not used",
        ),
        (empty, "lists no id: leave such rows out with token_weight 0"),
        (marked, "has a log-prob at the id -1, which marks a place that is not used: give it the log-prob -inf"),
        (bad, "holds a log-prob that is NaN, infinite or above 0: leave such rows out with token_weight 0"),
        (twice, "lists an id twice: merge the entries, or its probability would count twice"),
        (heavy, "sums to a probability above 1: pass log-probs normalised over the whole vocabulary"),
    ):
        if bool(flag.any()):
            raise ValueError(f"row {int(places[torch.nonzero(flag)[0, 0]])} of the teacher's list {message}")
