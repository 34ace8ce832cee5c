"""What enters and leaves the public ops.

Shapes: N tokens, V vocabulary columns, K teachers, d a hidden size, c rows of one chunk.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

DIVERGENCES = ("reverse_kl", "forward_kl", "jsd", "skew_kl")
TEACHER_REDUCTIONS = ("sum", "mixture")
REDUCTIONS = ("sum", "mean", "none")
IMPLS = ("auto", "triton", "torch", "reference")
MAX_TEACHERS = 8

FLOOR = -1.0e6
"""Logits of -inf (a bias that switches columns off) are raised to this: probability exactly 0,
differences finite."""


@dataclass(frozen=True)
class LMHead:
    """A language-model head: logits are ``logit_scale * (hidden @ weight.T + bias)``, then ``softcap *
    tanh(logits / softcap)`` when a softcap is given.

    Attributes:
        weight: [V, d] float32, bfloat16, float16 or float64.
        bias: [V] floating point, or None.
        logit_scale: positive factor (for example Cohere's ``logit_scale``).
        softcap: positive cap (for example Gemma's ``final_logit_softcapping``), or None.
    """

    weight: Tensor
    bias: Tensor | None = None
    logit_scale: float = 1.0
    softcap: float | None = None

    def logits(self, hidden: Tensor) -> Tensor:
        """[n, d] -> [n, V], all of them at once; for checks of a few rows."""
        logits = torch.nn.functional.linear(hidden, self.weight, self.bias) * self.logit_scale
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)

    def to(self, dtype: torch.dtype) -> LMHead:
        """The same head in another dtype; gradients reach its parameters."""
        return replace(self, weight=self.weight.to(dtype), bias=None if self.bias is None else self.bias.to(dtype))


@dataclass(frozen=True)
class TeacherHead:
    """One teacher: its hidden states and its language-model head, both constants of the op.

    Logits are those of ``LMHead``, divided by the temperature of the call.

    Attributes:
        hidden: [N, d_k] float32, bfloat16, float16 or float64, rows aligned with the student's.
        weight: [V_k, d_k], dtype of ``hidden``, or float32 beside half-precision ``hidden``.
        bias: [V_k] floating point, or None; -inf as in the student's.
        logit_scale: positive factor (for example Cohere's ``logit_scale``).
        softcap: positive cap (for example Gemma's ``final_logit_softcapping``), or None.
    """

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None = None
    logit_scale: float = 1.0
    softcap: float | None = None

    @classmethod
    def of(cls, hidden: Tensor, head: LMHead) -> TeacherHead:
        """``head`` on hidden states [N, d_k]."""
        return cls(hidden, head.weight, head.bias, head.logit_scale, head.softcap)


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

    @classmethod
    def empty(cls, rows: int, teachers: int, labels: bool, like: Tensor) -> TokenStats:
        """Statistics of ``rows`` tokens, all NaN: nothing is computed yet."""

        def unset(name: str) -> Tensor | None:
            if name in ("student_logprob", "teacher_logprob", "gap") and not labels:
                return None
            shape = (rows,) if name.startswith("student_") else (rows, teachers)
            return like.new_full(shape, float("nan"))

        return cls(**{f.name: unset(f.name) for f in fields(cls)})  # type: ignore[arg-type]

    def fill_gap(self) -> None:
        """``gap`` from the two log-probs; NaN where either is."""
        if self.gap is not None and self.teacher_logprob is not None and self.student_logprob is not None:
            torch.sub(self.teacher_logprob, self.student_logprob[:, None], out=self.gap)


@dataclass(frozen=True)
class SampleReport:
    """What a gradient from sampled columns is worth; scalars in the dtype of the loss.

    The noise is that of one draw in the 2-norm, over the size of the exact gradient: predicted from the draw
    itself. NaN where there is no such gradient, or none yet (``reduction="none"``, which fills it in with the
    backward pass).

    Attributes:
        columns: share of the columns that was drawn.
        hidden_noise: of the hidden states' gradient.
        weight_noise: of the weight's.
        loss_error: standard error of ``loss``; 0 where the loss is exact.
    """

    columns: Tensor
    hidden_noise: Tensor
    weight_noise: Tensor
    loss_error: Tensor


@dataclass(frozen=True)
class DivergenceOutput:
    """Result of ``linear_divergence``.

    Attributes:
        loss: scalar, or [N] with ``reduction="none"``, in nats; differentiable; 0 where nothing was
            computed.
        token_loss: [N] in nats, detached, before ``token_weight``; NaN where nothing was computed.
        stats: the statistics when ``stats=True``, else None.
        logprob: [N] detached log p(label) with ``logprob_weight``, else None; NaN where nothing was computed.
        sampling: with ``vocab_sample``, where a gradient is wanted; else None.
    """

    loss: Tensor
    token_loss: Tensor
    stats: TokenStats | None = None
    logprob: Tensor | None = None
    sampling: SampleReport | None = None


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
