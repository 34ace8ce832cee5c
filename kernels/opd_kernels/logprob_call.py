"""One call of ``linear_logprob`` or ``token_stats``, from its validated arguments to autograd."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from .call import Unchanged, cast_gradients, exact_products, recorded
from .heads import Wants
from .label_sets import LabelSets, SingleLabel, Upstream
from .problem import STATS_ONLY, Problem
from .reference import reference_divergence
from .row_ops import choose_impl
from .run import run_divergence
from .selection import plan_rows
from .types import TokenStats
from .validation import (
    check_impl,
    check_labels,
    check_positive,
    compute_dtype_of,
    make_head,
    make_workspace_bytes,
    split_vocabularies,
)

STATS_OPTIONS: dict[str, Any] = {
    "divergence": "reverse_kl",
    "jsd_beta": 0.5,
    "skew_alpha": 0.1,
    "teacher_reduction": "sum",
    "reduction": "sum",
    "stats": True,
    "vocab_sample": 0.0,
    "sample_seed": 0,
    "logprob_weight": None,
}
"""The options of ``prepare`` that statistics do not depend on."""


def compute_stats(problem: Problem) -> TokenStats:
    """Statistics of a prepared problem; nothing else of it is computed."""
    with torch.no_grad(), exact_products(problem.student.hidden.device):
        if problem.impl == "reference":
            stats = reference_divergence(problem).stats
        else:
            known = problem.known_teachers
            rows = plan_rows(problem.mix, problem.mix_is_uniform, problem.token_weight, known=known)
            outcome = run_divergence(replace(problem, rule=STATS_ONLY), rows, None, Wants())
            outcome.check()
            stats = outcome.stats
    assert stats is not None
    return stats


def prepare_logprob(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    *,
    logit_scale: float,
    softcap: float | None,
    temperature: float,
    impl: str,
    workspace_bytes: int | None,
    vocab_size: int | None,
    tail: bool,
    group: Any,
) -> LabelSets:
    """Validate the arguments of ``linear_logprob`` and choose the implementation."""
    check_impl(impl)
    check_positive("temperature", temperature)
    head = make_head("", hidden, weight, bias, logit_scale, softcap, temperature)
    budget = make_workspace_bytes(workspace_bytes, hidden.device)
    (head,), shards = split_vocabularies((head,), vocab_size, group, (tail, budget, "linear_logprob"))
    labels = check_labels(labels, head.vocab if shards is None else shards.vocab, hidden)
    chosen = choose_impl(impl, hidden.device.type, compute_dtype_of((head,)), shards is not None)
    single = labels.dim() == 1 and not tail
    if impl == "triton" and not single:
        raise ValueError("impl='triton' takes labels [N] without tail: use impl='auto' or 'torch'")
    if chosen == "triton" and not single:
        chosen = "torch"
    make = SingleLabel if single else LabelSets
    return make(head, labels if labels.dim() == 2 else labels[:, None], tail, budget, shards, chosen)


class LinearLogprob(torch.autograd.Function):
    """(log-probs [N, L], log-mass of the tail [N], entropy [N], largest probability [N]) of ``call``;
    the last is not differentiable."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, call: LabelSets, wants: Wants
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        with exact_products(hidden.device):
            logprob, tail, entropy, top1_prob = call.forward()
        ctx.call, ctx.wants = call, wants
        ctx.constants = Unchanged({"labels": call.labels})
        ctx.dtypes = (hidden.dtype, weight.dtype, None if bias is None else bias.dtype)
        ctx.save_for_backward(hidden, weight, bias, tail)
        ctx.mark_non_differentiable(top1_prob)
        ctx.set_materialize_grads(False)
        return logprob, tail, entropy, top1_prob

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor | None) -> tuple[Any, ...]:
        if all(gradient is None for gradient in upstream):
            return None, None, None, None, None
        with torch.no_grad():
            gradients = LinearLogprob._gradients(ctx, upstream)
        return *recorded(ctx, gradients, upstream), None, None

    @staticmethod
    def _gradients(ctx: Any, upstream: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
        ctx.constants.check()
        hidden, weight, bias, tail = ctx.saved_tensors
        call: LabelSets = replace(ctx.call, head=ctx.call.head.with_tensors(hidden, weight, bias))
        with exact_products(hidden.device):
            grad_logprob, grad_tail, grad_entropy, _ = upstream
            gradients = Upstream.of(grad_logprob, grad_entropy, grad_tail, like=call.labels, dtype=tail.dtype)
            outcome = call.backward(tail, gradients, ctx.wants)
        return cast_gradients(ctx, outcome)
