"""What enters and leaves the public ops, and the normalised problem the implementations solve.

Shapes: N tokens, V vocabulary columns, K teachers, d a hidden size, c rows of one chunk.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .shards import Shards

DIVERGENCES = ("reverse_kl", "forward_kl", "jsd", "skew_kl")
TEACHER_REDUCTIONS = ("sum", "mixture")
REDUCTIONS = ("sum", "mean", "none")
IMPLS = ("auto", "triton", "torch", "reference")
MAX_TEACHERS = 8

FLOOR = -1.0e6
"""Logits of -inf (a bias that switches columns off) are raised to this: probability exactly 0,
differences finite."""


@dataclass(frozen=True)
class TeacherHead:
    """One teacher: its hidden states and its language-model head, both constants of the op.

    Logits are ``logit_scale * (hidden @ weight.T + bias)``, then ``softcap * tanh(logits /
    softcap)`` when a softcap is given, then divided by the temperature of the call.

    Attributes:
        hidden: [N, d_k] float32, bfloat16, float16 or float64, rows aligned with the student's.
        weight: [V_k, d_k], dtype of ``hidden``.
        bias: [V_k] floating point, or None.
        logit_scale: positive factor (for example Cohere's ``logit_scale``).
        softcap: positive cap (for example Gemma's ``final_logit_softcapping``), or None.
    """

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None = None
    logit_scale: float = 1.0
    softcap: float | None = None


@dataclass(frozen=True)
class TokenStats:
    """Detached per-token statistics; NaN where a row, or a teacher of a row, was not computed.

    float32 (float64 for float64 inputs). The three label statistics are None when no ``labels``
    were given.

    Attributes:
        student_logprob: [N] log p(label).
        teacher_logprob: [N, K] log q_k(label).
        gap: [N, K] ``teacher_logprob - student_logprob``.
        student_entropy: [N] entropy of p, nats.
        teacher_entropy: [N, K] entropy of q_k, nats.
        teacher_top1_prob: [N, K] largest probability of q_k.
        top1_agreement: [N, K] 1.0 where student and teacher share the arg max, else 0.0.
        reverse_kl: [N, K] KL(p || q_k).
        forward_kl: [N, K] KL(q_k || p).
        dropped_mass: [N] share of the row's gradient that ``backward_tolerance`` dropped, in the
            1-norm of d loss / d logits; None without a tolerance.
    """

    student_logprob: Tensor | None
    teacher_logprob: Tensor | None
    gap: Tensor | None
    student_entropy: Tensor
    teacher_entropy: Tensor
    teacher_top1_prob: Tensor
    top1_agreement: Tensor
    reverse_kl: Tensor
    forward_kl: Tensor
    dropped_mass: Tensor | None = None

    @classmethod
    def empty(cls, rows: int, teachers: int, labels: bool, like: Tensor, dropped: bool = False) -> TokenStats:
        """Statistics of ``rows`` tokens, all NaN: nothing is computed yet."""

        def unset(name: str) -> Tensor | None:
            if name in ("student_logprob", "teacher_logprob", "gap") and not labels:
                return None
            if name == "dropped_mass" and not dropped:
                return None
            shape = (rows,) if name.startswith("student_") or name == "dropped_mass" else (rows, teachers)
            return like.new_full(shape, float("nan"))

        return cls(**{f.name: unset(f.name) for f in fields(cls)})  # type: ignore[arg-type]

    def fill_gap(self) -> None:
        """``gap`` from the two log-probs; NaN where either is."""
        if self.gap is not None and self.teacher_logprob is not None and self.student_logprob is not None:
            torch.sub(self.teacher_logprob, self.student_logprob[:, None], out=self.gap)


@dataclass(frozen=True)
class DivergenceOutput:
    """Result of ``linear_divergence``.

    Attributes:
        loss: scalar, or [N] with ``reduction="none"``; differentiable; 0 where nothing was
            computed.
        token_loss: [N] detached, before ``token_weight``; NaN where nothing was computed.
        stats: the statistics when ``stats=True``, else None.
    """

    loss: Tensor
    token_loss: Tensor
    stats: TokenStats | None = None


@dataclass(frozen=True)
class LogprobOutput:
    """Result of ``linear_logprob``, in nats; differentiable but for ``top1_prob``.

    Attributes:
        logprob: [N] or [N, L] log p(label).
        entropy: [N].
        top1_prob: [N] detached largest probability of the row, at the temperature of the call.
        tail: [N] log of the probability outside a row's labels; None unless asked for.
    """

    logprob: Tensor
    entropy: Tensor
    top1_prob: Tensor
    tail: Tensor | None = None


@dataclass(frozen=True)
class Head:
    """A validated head bound to its hidden states: logits = cap(scale * (hidden W^T + bias)) /
    temperature.

    ``vocab`` is the number of leading rows of ``weight`` in use. ``floor`` says that the bias
    holds -inf.
    """

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    scale: float
    softcap: float | None
    temperature: float
    vocab: int
    floor: bool = False

    @property
    def factor(self) -> float:
        """d logits / d (hidden W^T) before the softcap's own slope."""
        return self.scale / self.temperature

    def with_tensors(self, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Head:
        return replace(self, hidden=hidden, weight=weight, bias=None if bias is None else bias.contiguous())


@dataclass(frozen=True)
class Rule:
    """Which divergence: ``kind`` of DIVERGENCES, M = beta q + (1 - beta) p for JSD, alpha for the
    skew KL."""

    kind: str
    beta: float = 0.5
    alpha: float = 0.1


STATS_ONLY = Rule("stats")
"""The rule of a call that wants statistics and no divergence."""


@dataclass(frozen=True)
class Problem:
    """Validated arguments of one call.

    Attributes:
        mix: [N, K] weights in the compute dtype (maybe an expanded view); rows sum to 1 or 0 when
            ``mixture``.
        mix_is_uniform: every row has the same weights.
        token_weight: [N] in the compute dtype, or None for ones.
        labels: [N] int64 or None; checked on the rows that are computed.
        impl: whose row operations run, "torch" or "triton".
        shards: how the vocabulary is split over ranks, or None when this process holds all of it.
        backward_tolerance: see ``compaction``; 0 for dense gradients.
    """

    student: Head
    teachers: tuple[Head, ...]
    rule: Rule
    mixture: bool
    mix: Tensor
    mix_is_uniform: bool
    token_weight: Tensor | None
    labels: Tensor | None
    reduction: str
    stats: bool
    workspace_bytes: int
    compute_dtype: torch.dtype
    impl: str = "torch"
    shards: Shards | None = None
    backward_tolerance: float = 0.0

    @property
    def rows(self) -> int:
        return self.student.hidden.shape[0]
