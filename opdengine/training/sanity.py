"""Cheap checks that a run does what it says; each raises with an explanation.

Tokenizers are compared in :mod:`opdengine.models.chat`, heads and packing in :mod:`opdengine.models.backbone`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from opd_kernels import LMHead, TeacherHead, linear_divergence
from opdengine.errors import ProbeError
from opdengine.loss.importance import ratio
from opdengine.loss.statistics import Statistics
from opdengine.metrics import Mean
from opdengine.types import SamplingParams

MOST_OUTSIDE = 0.25
"""Rounding moves a few tokens over the edge of top-k or top-p; other weights move many."""


def self_distillation_is_zero(
    hidden: torch.Tensor, head: LMHead, divergence: str, vocab_size: int | None, impl: str, group: Any = None
) -> None:
    """A student that is its own teacher has a loss of about 0 (hidden: [n, d]; group: over which the head is split)."""
    hidden = hidden.detach()[:64]
    with torch.no_grad():
        head = head.to(hidden.dtype)
        loss = linear_divergence(
            hidden,
            head,
            [TeacherHead.of(hidden, head)],
            divergence=divergence,
            reduction="mean",
            vocab_size=vocab_size,
            impl=impl,
            group=group,
        ).loss.item()
    if not abs(loss) <= 1e-4:
        raise ProbeError(
            f"the {divergence} of the student to itself is {loss:.3g} instead of 0; the fused loss "
            "does not fit this model"
        )


def teachers_are_alive(statistics: Statistics, names: Sequence[str], vocab_size: int) -> None:
    """A teacher whose mean entropy is that of the uniform distribution teaches nothing."""
    for name in names:
        entropies = statistics.get(f"teacher_entropy/{name}")
        if len(entropies) and entropies.mean() > 0.99 * math.log(vocab_size):
            raise ProbeError(
                f"teacher {name!r} is dead: its mean entropy {entropies.mean():.3f} is that of the "
                f"uniform distribution over {vocab_size} tokens ({math.log(vocab_size):.3f}); check "
                "that its weights were loaded (a checkpoint without lm_head.weight?)"
            )


def samples_the_model(params: SamplingParams) -> bool:
    """Whether the sampling distribution is the model's own, so that log-probs can be compared."""
    return params.temperature == 1.0 and params.top_p == 1.0 and params.top_k == 0 and params.repetition_penalty == 1.0


def sampler_agrees(difference: np.ndarray, limit: float) -> dict[str, float]:
    """Bound trainer minus sampler log-probs of sampled tokens; returns the metrics.

    Args:
        difference: float [T] in nats; -inf where the trainer excludes what was sampled.
        limit: of the mean absolute difference.

    Raises:
        ProbeError: the mean exceeds the limit, or the trainer excludes a quarter of the tokens.
    """
    if not len(difference):
        return {}
    shared = difference[~np.isneginf(difference)]
    outside = 1 - len(shared) / len(difference)
    mean = float(np.abs(shared).mean()) if len(shared) else float("inf")
    if not mean <= limit or outside > MOST_OUTSIDE:
        raise ProbeError(
            f"sampler and trainer disagree about the sampled tokens: mean absolute log-prob "
            f"difference {mean:.3g} nats, allowed max_logprob_difference={limit:g}; {outside:.0%} of the tokens are "
            "outside the trainer's top-k or top-p; the sampler holds other weights or another dtype than the trainer, "
            "or (with max_staleness) the policy has moved that far since it sampled: lower learning_rate"
        )
    metrics = {
        "sampling/logprob_difference": mean,
        "sampling/logprob_difference_max": float(np.abs(shared).max()),
        "sampling/importance_ratio_max": float(ratio(shared).max()),
    }
    return metrics | ({"sampling/outside_support": outside} if outside else {})


def fresh(versions: Sequence[int], version: int, max_staleness: int) -> dict[str, float]:
    """No sample is older than allowed; returns the metric.

    Raises:
        ProbeError: a rollout was sampled more than ``max_staleness`` updates before ``version``, or by
            weights that do not exist yet.
    """
    versions = sorted(set(versions))
    stale = [v for v in versions if not 0 <= version - v <= max_staleness]
    if stale:
        raise ProbeError(
            f"rollouts of policy versions {stale} reached the update of version {version} (max_staleness="
            f"{max_staleness}); the sampler was not synchronised"
        )
    return {"sampling/staleness_max": Mean(float(version - versions[0]))} if versions else {}
