"""Log-probabilities and statistics from hidden states: ``linear_logprob`` and ``token_stats``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import library
from .call import prepare, student_arguments, wanted
from .logprob_call import STATS_OPTIONS, LinearLogprob, compute_stats, prepare_logprob
from .reference import reference_logprob
from .types import LMHead, LogprobOutput, TeacherHead, TokenStats

__all__ = ["linear_logprob", "token_stats"]


def token_stats(
    student_hidden: Tensor,
    student_weight: Tensor | LMHead,
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
    student = student_arguments(student_hidden, student_weight, student_bias, student_logit_scale, student_softcap)
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
        return library.stats(student, teachers, options)
    return compute_stats(prepare(student, teachers, **STATS_OPTIONS, **options))


def linear_logprob(
    hidden: Tensor,
    weight: Tensor | LMHead,
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
        weight: [V, d], same dtype, or float32 as in ``linear_divergence``; or an ``LMHead``, instead
            of ``bias``, ``logit_scale`` and ``softcap``.
        labels: [N] or [N, L] int64 token ids in [0, V); L ids per row share the row's logits.
        bias: [V] or None.
        logit_scale: positive factor of the logits.
        softcap: positive cap of the logits, or None.
        temperature: divides the logits.
        impl: "torch", "reference", "triton" or "auto"; "triton" takes labels [N] without ``tail``, where
            "auto" uses "torch".
        workspace_bytes: budget for temporaries, default as in ``linear_divergence``.
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
        RuntimeError: in the backward pass, as ``linear_divergence``.
    """
    hidden, weight, bias, logit_scale, softcap = student_arguments(hidden, weight, bias, logit_scale, softcap)
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
        return library.logprob(hidden, weight, bias, labels, wanted(hidden, weight, bias), options)
    call = prepare_logprob(hidden, weight, bias, labels, **options)
    if call.impl == "reference":
        return reference_logprob(call.head, labels, tail)
    wants = wanted(hidden, weight, bias)
    values = LinearLogprob.apply(hidden, weight, bias, call, wants)  # type: ignore[no-untyped-call]
    logprob, mass, entropy, top1_prob = values
    return LogprobOutput(logprob if labels.dim() == 2 else logprob[:, 0], entropy, top1_prob, mass if tail else None)
