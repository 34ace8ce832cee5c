"""Log-probabilities and statistics from hidden states: ``linear_logprob`` and ``token_stats``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from .divergence import cast_gradients, exact_products, prepare, wanted
from .driver import run_divergence
from .heads import Wants
from .label_sets import LabelSets, SingleLabel, Upstream
from .row_ops import choose_impl
from .selection import plan_rows
from .types import STATS_ONLY, LogprobOutput, Problem, TeacherHead, TokenStats
from .validation import (
    check_impl,
    check_labels,
    check_positive,
    compute_dtype_of,
    make_head,
    make_workspace_bytes,
    split_vocabularies,
)

__all__ = ["LogprobOutput", "linear_logprob", "token_stats"]


def token_stats(
    student_hidden: Tensor,
    student_weight: Tensor,
    teachers: Sequence[TeacherHead],
    *,
    labels: Tensor | None = None,
    mix: Tensor | Sequence[float] | None = None,
    token_weight: Tensor | None = None,
    temperature: float = 1.0,
    impl: str = "auto",
    workspace_bytes: int | None = None,
    vocab_size: int | None = None,
    student_bias: Tensor | None = None,
    student_logit_scale: float = 1.0,
    student_softcap: float | None = None,
    group: Any = None,
) -> TokenStats:
    """Per-token statistics of a student and K teachers, forward only; nothing of size V is kept.

    Arguments mean what they mean in ``linear_divergence``. ``mix`` and ``token_weight`` only
    select: where either is 0 nothing is computed and the statistics are NaN.

    Returns:
        ``TokenStats``, detached.

    Raises:
        ValueError: an argument is invalid, or a teacher's logits hold NaN or inf on a computed row.
    """
    student = (student_hidden, student_weight, student_bias, student_logit_scale, student_softcap)
    options: dict[str, Any] = {
        "mix": mix,
        "token_weight": token_weight,
        "labels": labels,
        "temperature": temperature,
        "impl": impl,
        "workspace_bytes": workspace_bytes,
        "vocab_size": vocab_size,
        "group": group,
    }
    if torch.compiler.is_compiling() and impl != "reference":
        from . import library

        return library.stats(student, teachers, options)
    return compute_stats(prepare(student, teachers, **STATS_OPTIONS, **options))


STATS_OPTIONS: dict[str, Any] = {
    "divergence": "reverse_kl",
    "jsd_beta": 0.5,
    "skew_alpha": 0.1,
    "teacher_reduction": "sum",
    "reduction": "sum",
    "stats": True,
    "backward_tolerance": 0.0,
}
"""The options of ``prepare`` that statistics do not depend on."""


def compute_stats(problem: Problem) -> TokenStats:
    """Statistics of a prepared problem; nothing else of it is computed."""
    with torch.no_grad(), exact_products(problem.student.hidden.device):
        if problem.impl == "reference":
            from .reference import reference_divergence

            stats = reference_divergence(problem).stats
        else:
            rows = plan_rows(problem.mix, problem.mix_is_uniform, problem.token_weight)
            stats = run_divergence(replace(problem, rule=STATS_ONLY), rows, None, Wants()).stats
    assert stats is not None
    return stats


def linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
    impl: str = "auto",
    workspace_bytes: int | None = None,
    vocab_size: int | None = None,
    tail: bool = False,
    group: Any = None,
) -> LogprobOutput:
    """Differentiable log p(label) and entropy of every row, without [N, V] logits.

    The backward pass recomputes the logits, since the upstream gradient (for example an importance
    ratio times an advantage) is unknown in forward; rows whose upstream gradients are 0 are left
    out of it.

    Args:
        hidden: [N, d] float32, bfloat16, float16 or float64, row-major.
        weight: [V, d], same dtype.
        labels: [N] or [N, L] int64 token ids in [0, V); L ids per row share the row's logits.
        bias: [V] or None.
        logit_scale: positive factor of the logits.
        softcap: positive cap of the logits, or None.
        temperature: divides the logits.
        impl: "torch", "reference", "triton" or "auto"; "triton" takes labels [N] without ``tail``
            or ``group``, where "auto" uses "torch".
        workspace_bytes: budget for temporaries, default 1 GiB.
        vocab_size: number of valid leading vocabulary rows, default all; with ``group``, of all
            ranks together.
        tail: also return the log of the probability that is not on a row's labels, summed over
            those columns themselves, so that a small tail keeps its precision.
        group: process group whose ranks hold consecutive vocabulary rows of ``weight`` and
            ``bias``, as in ``linear_divergence``; labels are global ids.

    Returns:
        ``LogprobOutput`` with ``logprob`` of the shape of ``labels``, ``entropy`` [N], ``top1_prob``
        [N] (the largest probability of a row, detached: no gradient flows through it) and ``tail``
        [N] or None, float32 (float64 for float64 inputs). A tail of no column is -inf.

    Raises:
        ValueError: an argument is invalid.
    """
    wants = wanted(hidden, weight, bias)
    options: dict[str, Any] = {
        "logit_scale": logit_scale,
        "softcap": softcap,
        "temperature": temperature,
        "impl": impl,
        "workspace_bytes": workspace_bytes,
        "vocab_size": vocab_size,
        "tail": tail,
        "group": group,
    }
    if torch.compiler.is_compiling() and impl != "reference":
        from . import library

        return library.logprob(hidden, weight, bias, labels, wants, options)
    call = prepare_logprob(hidden, weight, bias, labels, **options)
    if call.impl == "reference":
        from .reference import reference_logprob

        return reference_logprob(call.head, labels, tail)
    logprob, entropy, mass, top1_prob = _LinearLogprob.apply(hidden, weight, bias, call, wants)
    return LogprobOutput(logprob if labels.dim() == 2 else logprob[:, 0], entropy, top1_prob, mass if tail else None)


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
    budget = make_workspace_bytes(workspace_bytes)
    (head,), shards = split_vocabularies((head,), vocab_size, group, (tail, budget, "linear_logprob"))
    labels = check_labels(labels, head.vocab if shards is None else shards.vocab, hidden)
    chosen = choose_impl(impl, hidden.device.type, compute_dtype_of((head,)), shards is not None)
    single = labels.dim() == 1 and not tail and shards is None
    if impl == "triton" and not single:
        raise ValueError("impl='triton' takes labels [N] without tail: use impl='auto' or 'torch'")
    if chosen == "triton" and not single:
        chosen = "torch"
    make = SingleLabel if single else LabelSets
    return make(head, labels if labels.dim() == 2 else labels[:, None], tail, budget, shards, chosen)


class _LinearLogprob(torch.autograd.Function):
    """(log-probs [N, L], entropy [N], log-mass of the tail [N], largest probability [N]) of ``call``;
    the last is not differentiable."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, call: LabelSets, wants: Wants
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        with exact_products(hidden.device):
            logprob, entropy, tail, lse, top1_prob = call.forward()
        ctx.call, ctx.wants = call, wants
        ctx.dtypes = (hidden.dtype, weight.dtype, None if bias is None else bias.dtype)
        ctx.save_for_backward(hidden, weight, bias, entropy, tail, lse)
        ctx.mark_non_differentiable(top1_prob)
        ctx.set_materialize_grads(False)
        return logprob, entropy, tail, top1_prob

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *upstream: Tensor | None) -> tuple:
        if all(gradient is None for gradient in upstream):
            return None, None, None, None, None
        hidden, weight, bias, entropy, tail, lse = ctx.saved_tensors
        call: LabelSets = replace(ctx.call, head=ctx.call.head.with_tensors(hidden, weight, bias))
        with exact_products(hidden.device):
            gradients = Upstream.of(*upstream[:3], like=call.labels, dtype=entropy.dtype)
            outcome = call.backward(entropy, tail, lse, gradients, ctx.wants)
        return *cast_gradients(ctx, outcome), None, None
