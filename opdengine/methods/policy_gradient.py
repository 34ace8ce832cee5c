"""The sampled-token reverse KL as a policy gradient: what the methods with a section ``advantage`` share.

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

from opdengine.config.train import TrainConfig
from opdengine.distributed import Ranks
from opdengine.errors import ConfigError
from opdengine.loss.importance import banded, clipped, truncated
from opdengine.methods.checks import ROLLOUTS, SAMPLED, Check
from opdengine.methods.paper import Paper
from opdengine.methods.unused import refuse_unused
from opdengine.metrics import Mean
from opdengine.types import Batch, Sample

logger = logging.getLogger(__name__)

OF_GAP = frozenset({"student_logprob", "teacher_logprob", "teacher_entropy"})
"""The measures that a gap needs. The entropy is there because it shows a dead teacher."""

RATIOS = {"none": "", "truncated": "sampler_logratio", "band": "sampler_logratio", "clip": "policy_logratio"}
"""The ratio of each kind of importance weight: a field of :class:`opdengine.types.Sample`.

PPO clips how far the policy has moved since it sampled (1 with one update per rollout); the others bound how
far trainer and sampler are apart, whatever the reason.
"""

BOUNDS = {"none": (0.0, 0.0), "truncated": (0.0, 2.0), "band": (0.5, 2.0), "clip": (0.2, 0.28)}
"""Usual ``low`` and ``high`` of each kind of importance weight."""

UNREAD = {"none": ("advantage.low", "advantage.high"), "truncated": ("advantage.low",)}
"""Bounds that a kind of importance weight does not read."""


@dataclass(frozen=True)
class PolicyGradient:
    """Turns gaps into the weights of a step.

    Args:
        exact: a divergence over the whole vocabulary takes the place of the gap (``kl_mode: full_vocab``).
        importance, low, high, max_gap: see :class:`opdengine.config.method_sections.AdvantageConfig`.
    """

    exact: bool = False
    importance: str = "none"
    low: float = 0.0
    high: float = 0.0
    max_gap: float = math.inf

    @property
    def needs(self) -> frozenset[str]:
        """The measures that it needs."""
        return OF_GAP | ({RATIOS[self.importance]} if self.importance != "none" else set())

    def weigh(
        self,
        batch: Batch,
        ranks: Ranks,
        gap: Sequence[np.ndarray] | None = None,
        scale: Sequence[float] | None = None,
        shift: Sequence[float] | None = None,
    ) -> None:
        """Set ``kl_weight`` and ``advantage = importance * (scale * gap + shift)`` of every kept sample.

        Where the gap is masked both are 0. All processes call this.

        Args:
            batch: measured samples.
            ranks: for the metrics of the whole step.
            gap: float64 [T] of each kept sample; default: :func:`gap_of`.
            scale: multiplies the loss of each kept sample; default 1.
            shift: is added to the advantage of each token of a kept sample; default 0.
        """
        samples = list(batch)
        gap = [gap_of(s) for s in samples] if gap is None else gap
        scale = [1.0] * len(samples) if scale is None else scale
        shift = [0.0] * len(samples) if shift is None else shift
        shown = [np.zeros(0)]
        masked = weighted = unknown = 0
        for sample, own, factor, extra in zip(samples, gap, scale, shift, strict=True):
            open_ = np.abs(own) < self.max_gap
            advantage = np.where(open_, (0.0 if self.exact else factor * own) + extra, 0.0)
            weight = np.ones(len(advantage))
            if self.importance != "none" and sample.student_logprob is not None:
                difference = getattr(sample, RATIOS[self.importance])
                if difference is None:
                    unknown += 1
                else:
                    weight = self._importance(difference, advantage)
            turns = sample.target_turn_weight
            sample.kl_weight = (turns if self.exact else np.zeros_like(turns)) * (factor * open_).astype(np.float32)
            sample.advantage = (weight * advantage * turns).astype(np.float32)
            if sample.student_logprob is not None:
                masked += int((~open_).sum())
                weighted += int((open_ & (weight == 0)).sum())
                shown.append(own)
        batch.metrics["advantage/tokens"] = float(sum(map(len, shown)))
        batch.metrics["advantage/no_gap"] = float(sum(int((g == 0).sum()) for g in shown))
        batch.metrics["advantage/gap_masked"] = float(masked)
        batch.metrics["advantage/importance_masked"] = float(weighted)
        if unknown:
            batch.metrics["advantage/without_sampler_logprobs"] = float(unknown)
        every = np.concatenate(ranks.gather(np.concatenate(shown)))
        if len(every):
            batch.metrics["gap/mean"] = Mean(float(every.mean()))
            batch.metrics["gap/p95"] = Mean(float(np.quantile(np.abs(every), 0.95)))

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
"""The checks of every method that has a :class:`PolicyGradient`."""


def gap_of(sample: Sample) -> np.ndarray:
    """float64 [T]: ``sum_k w_k (log q_k(y) - log p(y))``; 0 where no teacher judged the sample.

    Of a teacher with another tokenizer every token has the gap of its whole span: ``gap * sum d log p(y)`` over the
    span is then the sample of its gradient.
    """
    if sample.student_logprob is None or sample.teacher_logprob is None:
        return np.zeros(len(sample.target_ids))
    each = sample.teacher_logprob.astype(np.float64) - sample.student_logprob.astype(np.float64)[:, None]
    for k, context in enumerate(sample.contexts):
        if context.spans is not None:
            each[:, k] = context.spans.pooled(each[:, k])
    gap: np.ndarray = (each * sample.token_mix(each.shape[1])).sum(axis=1)
    return gap


def policy_gradient(config: TrainConfig, paper: Paper) -> PolicyGradient:
    """The policy gradient with the settings of a run.

    Args:
        config: of the run.
        paper: of the method, whose ``importance`` and ``max_gap`` are taken where ``advantage`` leaves them open.

    Raises:
        ConfigError: settings that the sampled form cannot have, or bounds that its importance weight does not read.
    """
    section = config.advantage
    kind, bounds = section.importance or paper["advantage.importance"], (section.low, section.high)
    refuse_unused(config, UNREAD.get(kind, ()), f"advantage.importance={kind!r}", paper=paper)
    low, high = (own if own is not None else usual for own, usual in zip(bounds, BOUNDS[kind], strict=True))
    if (kind == "band" and low > high) or (kind == "truncated" and high <= 0):
        raise ConfigError(f"advantage.low={low}, advantage.high={high} leaves no token any weight; raise high")
    if kind != "none":
        check_ratio(config, f"advantage.importance={kind!r}", "advantage.importance to none")
    exact = section.kl_mode == "full_vocab"
    if not exact:
        need_reverse_kl(config, "advantage.kl_mode")
        warn_of_sampling(config, "advantage.kl_mode=sampled", "take full_vocab")
    max_gap = paper["advantage.max_gap"] if section.max_gap is None else section.max_gap
    return PolicyGradient(exact, kind, low, high, max_gap)


def check_ratio(config: TrainConfig, setting: str, off: str) -> None:
    """Refuse importance weights between updates of what was not sampled from a density; point out their limit.

    Args:
        config: of the run.
        setting: that asks for them, with its value.
        off: what to set for none.

    Raises:
        ConfigError: rollouts of older weights are chosen greedily.
    """
    if not config.max_staleness:
        return
    if config.temperature == 0:
        raise ConfigError(
            f"{setting} is not possible with temperature=0 and "
            f"max_staleness={config.max_staleness}: what is chosen greedily has no density, so no ratio corrects for "
            f"an older policy; set temperature above 0, max_staleness to 0, or {off}"
        )
    if config.top_p < 1 or config.top_k:
        logger.warning(
            "top_p=%g and top_k=%d with max_staleness=%d and %s: importance weights compare what is left after them, "
            "and cannot correct for tokens that an older policy excluded",
            config.top_p,
            config.top_k,
            config.max_staleness,
            setting,
        )


def warn_of_sampling(config: TrainConfig, setting: str, other: str = "") -> None:
    """Point out that tokens are not sampled from the distribution whose log-probs a policy gradient has.

    Args:
        config: of the run.
        setting: that asks for the policy gradient, with its value.
        other: what else there is; follows "or".
    """
    plain = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "repetition_penalty": 1.0}
    if changed := {name: value for name in plain if (value := getattr(config, name)) != plain[name]}:
        said = ", ".join(f"{name}={value:g}" for name, value in changed.items())
        asked = ", ".join(f"{name}: {plain[name]:g}" for name in changed)
        logger.warning(
            "%s takes log-probs of the model itself, and %s samples from another distribution: the mean over such "
            "samples is not the gradient that it stands for; set %s%s",
            setting, said, asked, f", or {other}" if other else "",
        )  # fmt: skip


def need_reverse_kl(config: TrainConfig, setting: str) -> None:
    """Raise ConfigError where the divergence has no sampled form, which ``setting`` asks for."""
    for name, only in (("divergence", "reverse_kl"), ("divergence_temperature", 1.0)):
        if getattr(config, name) != only:
            raise ConfigError(
                f"{name}={getattr(config, name)!r} is not possible with {setting}=sampled, which is the "
                f"reverse KL at temperature 1; set {setting} to full_vocab"
            )
