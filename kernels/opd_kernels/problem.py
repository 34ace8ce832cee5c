"""The normalised problem that the implementations solve.

Shapes: N tokens, V vocabulary columns, K teachers, d a hidden size.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .shards import Shards


@dataclass(frozen=True)
class Head:
    """A validated head bound to its hidden states: logits = cap(scale * (hidden W^T + bias)) /
    temperature.

    ``vocab`` is the number of leading rows of ``weight`` in use. ``floor`` says that the bias
    holds -inf; ``stored`` is the dtype of the caller's weight where ``weight`` is a copy.
    """

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    scale: float
    softcap: float | None
    temperature: float
    vocab: int
    floor: bool = False
    stored: torch.dtype | None = None

    @property
    def gradient_dtype(self) -> torch.dtype:
        """Of the weight as the caller has it; ``weight`` may be a half-precision copy of a float32 one."""
        return self.weight.dtype if self.stored is None else self.stored

    @property
    def factor(self) -> float:
        """d logits / d (hidden W^T) before the softcap's own slope."""
        return self.scale / self.temperature

    def switched_off(self) -> Tensor | None:
        """[vocab] columns whose bias is -inf, or None where there is none."""
        return torch.isneginf(self.bias[: self.vocab]) if self.floor and self.bias is not None else None

    def with_tensors(self, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Head:
        bias = None if bias is None else bias.contiguous()
        return replace(self, hidden=hidden, weight=weight.to(self.weight.dtype), bias=bias)


@dataclass(frozen=True)
class Rule:
    """Which divergence: ``kind`` of DIVERGENCES, M = beta q + (1 - beta) p for JSD, alpha for the
    skew KL."""

    kind: str
    beta: float = 0.5
    alpha: float = 0.1


KL = ("reverse_kl", "forward_kl")

STATS_ONLY = Rule("stats")
"""The rule of a call that wants statistics and no divergence."""


@dataclass(frozen=True)
class Sampling:
    """Gradients from a sample of the columns, see ``sampling``: the expected ``share`` of them, and the ``seed``."""

    share: float
    seed: int


@dataclass(frozen=True)
class Problem:
    """Validated arguments of one call.

    Attributes:
        mix: [N, K] weights in the compute dtype (maybe an expanded view); rows sum to 1 or 0 when
            ``mixture``.
        mix_is_uniform: every row has the same weights.
        known_teachers: where the host knows who works on every row, their bits; None: it has to read ``mix``.
        token_weight: [N] in the compute dtype, or None for ones.
        labels: [N] int64 or None; checked on the rows that are computed.
        logprob_weight: [N] in the compute dtype, or None: the loss has -logprob_weight * log p(label) too.
        impl: whose row operations run, "torch" or "triton".
        shards: how the vocabulary is split over ranks, or None when this process holds all of it.
        sampling: how columns are sampled for the gradients, or None for all of them.
    """

    student: Head
    teachers: tuple[Head, ...]
    rule: Rule
    mixture: bool
    mix: Tensor
    mix_is_uniform: bool
    token_weight: Tensor | None
    labels: Tensor | None
    logprob_weight: Tensor | None
    reduction: str
    stats: bool
    workspace_bytes: int
    compute_dtype: torch.dtype
    impl: str = "torch"
    shards: Shards | None = None
    sampling: Sampling | None = None
    known_teachers: int | None = None

    @property
    def rows(self) -> int:
        return self.student.hidden.shape[0]

    @property
    def teachers_sampled(self) -> bool:
        """Whether a sampled gradient needs the teachers' logits at the sampled columns only: that of the reverse KL
        to every teacher is p (g - E_p[g]), without their normalisers."""
        return self.sampling is not None and self.rule.kind == "reverse_kl" and not self.mixture
