"""The sampled-token reverse KL as a policy gradient, shared by Uni-OPD and CaMOPD.

For a token y sampled from the student p, the mean of ``-(log q(y) - log p(y)) * d log p(y)`` is the gradient
of KL(p || q): that gap, detached, is the token's advantage (arXiv 2605.03677 and 2605.27115, equations
1 and 2). It needs no more of a teacher than the log-prob of the sampled token.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from opdengine.checks import ROLLOUTS, SAMPLED, Check
from opdengine.config import ConfigError, TrainConfig
from opdengine.importance import banded, clipped, truncated
from opdengine.recipe import Batch, Note, Stats, Weighed, Weigher, distill
from opdengine.types import TokenSignal

logger = logging.getLogger(__name__)

MEASURES = ("student_logprob", "teacher_logprob", "teacher_entropy")
"""What gaps are made of; the entropy shows a dead teacher."""

RATIOS = {"none": "", "truncated": "sampler_logratio", "band": "sampler_logratio", "clip": "policy_logratio"}
"""The ratio of each kind of importance weight, by its name in :class:`Stats`.

PPO clips how far the policy has moved since it sampled (1 with one update per rollout); the others bound how
far trainer and sampler are apart, whatever the reason.
"""

BOUNDS = {"none": (0.0, 0.0), "truncated": (0.0, 2.0), "band": (0.5, 2.0), "clip": (0.2, 0.28)}
"""Usual ``low`` and ``high`` of each kind of importance weight."""


@dataclass(frozen=True)
class PolicyGradient:
    """Turns gaps into the signals of a step. As a weigher it is the plain method.

    Its ``kl_weight`` is what a token's loss is multiplied with (0 where masked), so that it scales a
    divergence of another weigher of the recipe, and its own advantage adds to it.

    Args:
        use_gap: the gap is part of the advantage; off where the exact divergence takes its place.
        importance, low, high, max_gap: see :class:`opdengine.method_sections.AdvantageConfig`.
    """

    use_gap: bool = True
    importance: str = "none"
    low: float = 0.0
    high: float = 0.0
    max_gap: float = math.inf

    @property
    def measures(self) -> tuple[str, ...]:
        """The statistics that it needs."""
        return (*MEASURES, RATIOS[self.importance]) if self.importance != "none" else MEASURES

    def __call__(self, batch: Batch) -> Weighed:
        count = len(batch.rollouts)
        return self.signals(batch, gaps(batch), np.ones(count), np.zeros(count), [""] * count)

    def signals(
        self,
        batch: Batch,
        gap: Sequence[np.ndarray],
        scale: np.ndarray,
        shift: np.ndarray,
        reasons: Sequence[str],
    ) -> Weighed:
        """One signal per rollout: advantage ``w * (scale * gap + shift)`` and its metrics.

        Args:
            batch, gap: the step and its :func:`gaps`.
            scale: [N] multiplies the loss of a rollout.
            shift: [N] added to the advantage of each of its tokens.
            reasons: why a rollout is left out; empty to keep it.
        """
        signals, shown = [], []
        masked = weighted = unknown = 0
        for i, (rollout, note, stats) in enumerate(zip(batch.rollouts, batch.notes, batch.stats, strict=True)):
            open_ = np.abs(gap[i]) < self.max_gap
            advantage = np.where(open_, (scale[i] * gap[i] if self.use_gap else 0.0) + shift[i], 0.0)
            weight = np.ones(len(advantage))
            if self.importance != "none" and stats.student_logprob is not None:
                difference = getattr(stats, RATIOS[self.importance])
                if difference is None:
                    unknown += 1
                else:
                    weight = self._importance(difference, advantage)
            if note.turn_weight is not None:
                advantage = advantage * np.asarray(note.turn_weight)[rollout.target_turns]
            signals.append(
                TokenSignal(
                    kl_weight=(scale[i] * open_).astype(np.float32),
                    advantage=(weight * advantage).astype(np.float32),
                    keep=not reasons[i],
                    reason=reasons[i],
                )
            )
            if not reasons[i] and stats.student_logprob is not None:
                masked += int((~open_).sum())
                weighted += int((open_ & (weight == 0)).sum())
                shown.append(gap[i])
        metrics = {
            "advantage/tokens": float(sum(map(len, shown))),
            "advantage/no_gap": float(sum(int((g == 0).sum()) for g in shown)),
            "advantage/gap_masked": float(masked),
            "advantage/importance_masked": float(weighted),
        }
        metrics |= {"advantage/without_sampler_logprobs": float(unknown)} if unknown else {}
        if shown:
            every = np.concatenate(shown)
            metrics |= {"gap/mean": float(every.mean()), "gap/p95": float(np.quantile(np.abs(every), 0.95))}
        return Weighed(signals, metrics)

    def _importance(self, difference: np.ndarray, advantage: np.ndarray) -> np.ndarray:
        if self.importance == "clip":
            return clipped(difference, advantage, self.low, self.high)
        return (
            banded(difference, self.low, self.high) if self.importance == "band" else truncated(difference, self.high)
        )


CHECKS = (
    Check(
        "advantage/no_gap", "advantage/tokens", "tokens have a gap of exactly 0: teacher and student say the same",
        "see that no teacher is the student itself", share=1.0,
    ),
    Check(
        "advantage/gap_masked", "advantage/tokens", "tokens have a gap of advantage.max_gap or more and carry no loss",
        "check that teacher and student share template and skills (a gap of 10 nats is a factor of 22,000), or raise "
        "advantage.max_gap", ROLLOUTS,
    ),
    Check(
        "advantage/importance_masked", "advantage/tokens", "tokens have an importance ratio out of bounds and carry no "
        "loss", "lower learning_rate or max_staleness, or widen advantage.low and advantage.high "
        "(sampling/logprob_difference in metrics.jsonl shows how far trainer and sampler are apart)",
    ),
    Check(
        "advantage/without_sampler_logprobs", SAMPLED, "rollouts have no log-probs of the sampler, so no importance "
        "ratio is known and their weight is 1", "set advantage.importance to none if that is meant",
    ),
)  # fmt: skip
"""Of recipes with a :class:`PolicyGradient`."""


def gaps(batch: Batch) -> list[np.ndarray]:
    """float64 [T] of every rollout: ``sum_k w_k (log q_k(y) - log p(y))``; 0 where no teacher judged it."""
    return [_gap(n, s, len(r.targets)) for r, n, s in zip(batch.rollouts, batch.notes, batch.stats, strict=True)]


def _gap(note: Note, stats: Stats, count: int) -> np.ndarray:
    if stats.student_logprob is None or stats.teacher_logprob is None:
        return np.zeros(count)
    each = stats.teacher_logprob.astype(np.float64) - stats.student_logprob.astype(np.float64)[:, None]
    mix = np.full(each.shape[1], 1 / each.shape[1]) if note.mix is None else note.mix.astype(np.float64)
    return each @ mix


def no_divergence(batch: Batch) -> Weighed:
    """The weigher that switches the divergence off."""
    return Weighed([TokenSignal(np.zeros(len(r.targets), dtype=np.float32)) for r in batch.rollouts])


def resolve(config: TrainConfig, importance: str, max_gap: float) -> tuple[Weigher, PolicyGradient]:
    """The base weigher (a divergence or none) and the policy gradient on top of it.

    Args:
        config: of the run.
        importance, max_gap: of the method's paper, where ``advantage`` leaves them open.

    Raises:
        ConfigError: settings that the sampled form cannot have.
    """
    section = config.advantage
    kind, bounds = section.importance or importance, (section.low, section.high)
    low, high = (own if own is not None else usual for own, usual in zip(bounds, BOUNDS[kind], strict=True))
    if (kind == "band" and low > high) or (kind == "truncated" and high <= 0):
        raise ConfigError(f"advantage.low={low}, advantage.high={high} leaves no token any weight; raise high")
    gradient = PolicyGradient(
        section.kl_mode == "sampled", kind, low, high, max_gap if section.max_gap is None else section.max_gap
    )
    _check_ratio(config, kind)
    if section.kl_mode == "full_vocab":
        return distill, gradient
    need_reverse_kl(config, "advantage.kl_mode")
    return no_divergence, gradient


def _check_ratio(config: TrainConfig, kind: str) -> None:
    """Refuse importance weights between updates of what was not sampled from a density; point out their limit."""
    if kind == "none" or not config.max_staleness:
        return
    if config.temperature == 0:
        raise ConfigError(
            f"advantage.importance={kind!r} is not possible with temperature=0 and "
            f"max_staleness={config.max_staleness}: what is chosen greedily has no density, so no ratio corrects for "
            "an older policy; set temperature above 0, max_staleness to 0, or advantage.importance to none"
        )
    if config.top_p < 1 or config.top_k:
        logger.warning(
            "top_p=%g and top_k=%d with max_staleness=%d: importance weights compare what is left after them, and "
            "cannot correct for tokens that an older policy excluded",
            config.top_p,
            config.top_k,
            config.max_staleness,
        )


def need_reverse_kl(config: TrainConfig, setting: str) -> None:
    """Raise ConfigError where the divergence has no sampled form, which ``setting`` asks for."""
    for name, only in (("divergence", "reverse_kl"), ("divergence_temperature", 1.0)):
        if getattr(config, name) != only:
            raise ConfigError(
                f"{name}={getattr(config, name)!r} is not possible with {setting}=sampled, which is the "
                f"reverse KL at temperature 1; set {setting} to full_vocab"
            )
