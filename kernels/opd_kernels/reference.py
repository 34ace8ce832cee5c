"""The same mathematics in plain torch, with [N, V] logits and autograd: what every other
implementation must equal.

Written from the definitions, sharing no arithmetic with the chunked path: log-softmax, explicit
mixtures, ``logsumexp``. Give it float64 inputs to get float64 results.
"""

from __future__ import annotations

import math
from dataclasses import fields

import torch
from torch import Tensor

from .problem import Head, Problem, Rule
from .types import FLOOR, DivergenceOutput, LogprobOutput, SampleReport, TokenStats


def reference_divergence(problem: Problem) -> DivergenceOutput:
    """Solve ``problem`` with materialised logits; autograd differentiates the loss."""
    mix, rows = problem.mix, problem.rows
    weight = mix.new_ones(rows) if problem.token_weight is None else problem.token_weight
    judged = torch.where(weight[:, None] != 0, mix, 0.0)
    active = torch.nonzero(
        (judged > 0).any(1) if problem.logprob_weight is None else (judged > 0).any(1) | (problem.logprob_weight != 0)
    )[:, 0]
    student = log_probs(problem.student, active, mix.dtype)
    pairs = [torch.nonzero(judged[active, k] > 0)[:, 0] for k in range(mix.shape[1])]
    teachers = []
    for k, (head, rows_k) in enumerate(zip(problem.teachers, pairs, strict=True)):
        teacher = log_probs(head, active[rows_k], mix.dtype).detach()
        check_teacher(k, teacher, active[rows_k])
        teachers.append(teacher)

    if problem.mixture:
        effective = student.new_full(student.shape, -math.inf)
        for k, (teacher, rows_k) in enumerate(zip(teachers, pairs, strict=True)):
            term = teacher + mix[active[rows_k], k, None].log()
            effective = effective.index_copy(0, rows_k, torch.logaddexp(effective[rows_k], term))
        some = torch.nonzero((judged[active] > 0).any(1))[:, 0]
        value = student.new_zeros(active.numel())
        value = value.index_copy(0, some, divergence_of(problem.rule, student[some], effective[some]))
    else:
        value = student.new_zeros(active.numel())
        for k, (teacher, rows_k) in enumerate(zip(teachers, pairs, strict=True)):
            term = mix[active[rows_k], k] * divergence_of(problem.rule, student[rows_k], teacher)
            value = value.index_add(0, rows_k, term)

    has_teacher = (judged[active] > 0).any(1)
    shown = torch.where(has_teacher, value.detach(), math.nan)
    token_loss = shown.new_full((rows,), math.nan).index_copy(0, active, shown)
    weighted, logprob = value * weight[active], None
    if problem.logprob_weight is not None:
        assert problem.labels is not None
        own = student.gather(1, problem.labels[active, None])[:, 0]
        logprob = shown.new_full((rows,), math.nan).index_copy(0, active, own.detach())
        weighted = weighted - problem.logprob_weight[active] * own
    if problem.reduction == "none":
        loss = student.new_zeros(rows).index_copy(0, active, weighted)
    elif problem.reduction == "mean":
        total = weight.sum()
        loss = weighted.sum() / (total if bool(total > 0) else 1.0)
    else:
        loss = weighted.sum()
    stats = _stats(problem, active, student.detach(), teachers, pairs) if problem.stats else None
    exact = loss.detach().new_tensor([1.0, 0.0, 0.0, 0.0])
    report = None if problem.sampling is None or not loss.requires_grad else SampleReport(*exact.unbind())
    return DivergenceOutput(loss, token_loss, stats, logprob, report)


def reference_logprob(head: Head, labels: Tensor, tail: bool = False) -> LogprobOutput:
    """log p(label), entropy and the log-mass of all other columns, differentiable by autograd, and
    the largest probability, detached."""
    every = torch.arange(labels.shape[0], device=labels.device)
    dtype = torch.float64 if head.weight.dtype == torch.float64 else torch.float32
    logp = log_probs(head, every, dtype)
    columns = labels if labels.dim() == 2 else labels[:, None]
    logprob, entropy = logp.gather(1, columns), -(logp.exp() * logp).sum(1)
    others, off = torch.ones_like(logp, dtype=torch.bool).scatter_(1, columns, False), head.switched_off()
    if off is not None:
        others &= ~off
    mass = torch.where(others, logp, -math.inf).logsumexp(1) if tail else None
    top1_prob = logp.detach().amax(1).exp()
    return LogprobOutput(logprob if labels.dim() == 2 else logprob[:, 0], entropy, top1_prob, mass)


def log_probs(head: Head, rows: Tensor, dtype: torch.dtype) -> Tensor:
    """[n, V] normalised log-probabilities of the given rows."""
    hidden, weight = head.hidden[rows].to(dtype), head.weight[: head.vocab].to(dtype)
    logits = hidden @ weight.t()
    if head.bias is not None:
        logits = logits + head.bias[: head.vocab].to(dtype)
    logits = logits * head.scale
    if head.softcap is not None:
        logits = head.softcap * torch.tanh(logits / head.softcap)
    logits = logits / head.temperature
    if head.floor:
        logits = logits.clamp(min=FLOOR)
    return torch.log_softmax(logits, 1)


def divergence_of(rule: Rule, p: Tensor, q: Tensor) -> Tensor:
    """[n] divergence of student log-probs ``p`` and teacher log-probs ``q``, both [n, V]."""
    if rule.kind == "reverse_kl":
        return kl(p, q)
    if rule.kind == "forward_kl":
        return kl(q, p)
    share = rule.beta if rule.kind == "jsd" else rule.alpha
    m = torch.logaddexp(q + math.log(share), p + math.log1p(-share))
    if rule.kind == "skew_kl":
        return kl(q, m)
    return share * kl(q, m) + (1.0 - share) * kl(p, m)


def kl(p: Tensor, q: Tensor) -> Tensor:
    """KL(p || q) of log-probabilities, over the last axis."""
    return (p.exp() * (p - q)).sum(-1)


def check_teacher(k: int, teacher: Tensor, rows: Tensor) -> None:
    """Raise ValueError, with the first row, where logits [n, V] of teacher k are not finite; rows [n] number them."""
    bad = ~torch.isfinite(teacher).all(1)
    if bool(bad.any()):
        row = int(rows[torch.nonzero(bad)[0, 0]])
        raise ValueError(f"teachers[{k}] has NaN or inf logits, first at row {row}")


def _stats(
    problem: Problem, active: Tensor, student: Tensor, teachers: list[Tensor], pairs: list[Tensor]
) -> TokenStats:
    labels = problem.labels
    stats = TokenStats.empty(problem.rows, len(teachers), labels is not None, student)
    stats.student_entropy[active] = -(student.exp() * student).sum(1)
    if labels is not None and stats.student_logprob is not None:
        stats.student_logprob[active] = student.gather(1, labels[active, None])[:, 0]
    for k, (teacher, rows_k) in enumerate(zip(teachers, pairs, strict=True)):
        rows, mine = active[rows_k], student[rows_k]
        values = {
            "teacher_entropy": -(teacher.exp() * teacher).sum(1),
            "teacher_top1_prob": teacher.amax(1).exp(),
            "top1_agreement": (teacher.argmax(1) == mine.argmax(1)).to(teacher.dtype),
            "reverse_kl": kl(mine, teacher),
            "forward_kl": kl(teacher, mine),
        }
        if labels is not None and stats.student_logprob is not None:
            values["teacher_logprob"] = teacher.gather(1, labels[rows, None])[:, 0]
            values["gap"] = values["teacher_logprob"] - stats.student_logprob[rows]
        for field in fields(TokenStats):
            if field.name in values:
                getattr(stats, field.name)[rows, k] = values[field.name]
    return stats
