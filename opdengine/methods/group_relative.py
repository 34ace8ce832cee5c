"""The group-relative policy gradient (GRPO, arXiv 2402.03300): rewards as advantages, beside a distillation.

A rollout's advantage is its reward less the mean of its prompt's rollouts, over their standard deviation; all its
tokens have it, times PPO's clipped ratio of the policy now to the policy that sampled.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from opdengine.config.method_sections import GrpoConfig
from opdengine.config.train import TrainConfig
from opdengine.distributed import Ranks
from opdengine.errors import ConfigError
from opdengine.loss.importance import clipped
from opdengine.methods.checks import SAMPLED, Check
from opdengine.metrics import Mean
from opdengine.types import Batch, Sample

LEAST_DEVIATION = 1e-4
"""Is added to the standard deviation, as in TRL."""

NEEDS = frozenset({"policy_logratio"})
"""The measures that the clip needs."""

CHECKS = (
    Check(
        "grpo/no_spread", SAMPLED, "rollouts have the reward of all others of their prompt, and no advantage",
        "raise num_generations, or take prompts that are neither too easy nor too hard", share=1.0,
    ),
)  # fmt: skip


def advantages(groups: Sequence[str], rewards: Sequence[float], scale: str) -> np.ndarray:
    """float64 [N]: of N rollouts, ``(r - mean of the group) / (deviation + 1e-4)``.

    Args:
        groups: the prompt of each rollout.
        rewards: of each.
        scale: over what the deviation (of a sample, n - 1) is taken: each "group", the whole "batch", or "none".
    """
    values, names = np.asarray(rewards, dtype=np.float64), np.asarray(groups)
    centred, deviation = np.zeros(len(values)), np.ones(len(values))
    if scale == "batch":
        deviation[:] = values.std(ddof=1) if len(values) > 1 else 0.0
    for name in dict.fromkeys(groups):
        members = names == name
        centred[members] = values[members] - values[members].mean()
        if scale == "group":
            deviation[members] = values[members].std(ddof=1) if members.sum() > 1 else 0.0
    return centred / (deviation + LEAST_DEVIATION)


def add_advantages(batch: Batch, ranks: Ranks, settings: GrpoConfig, weight: float) -> None:
    """Add ``weight`` times the group-relative advantage to that of every token. All processes call this.

    Args:
        batch: weighed samples.
        ranks: of the run: a batch's deviation is that of the whole step.
        settings: scale and clip.
        weight: of this term.
    """
    rewarded = [sample for sample in batch if sample.reward is not None]
    rows = ranks.join([(sample.group or sample.id, float(sample.reward or 0.0)) for sample in rewarded])
    every = advantages([group for group, _ in rows], [reward for _, reward in rows], settings.scale_rewards)
    own = every[ranks.own(len(rewarded))]
    for sample, advantage in zip(rewarded, own, strict=True):
        given = np.zeros(len(sample.target_ids)) if sample.advantage is None else sample.advantage
        term = weight * _ratio(sample, advantage, settings) * advantage * sample.target_turn_weight
        sample.advantage = (given + term).astype(np.float32)
    batch.metrics["grpo/no_spread"] = float(np.sum(own == 0))
    if rewarded:
        batch.metrics["grpo/reward"] = Mean(float(np.mean([s.reward for s in rewarded])), len(rewarded))


def _ratio(sample: Sample, advantage: float, settings: GrpoConfig) -> np.ndarray:
    difference = sample.policy_logratio
    if difference is None:  # the sampler told no log-probs: see ``advantage/without_sampler_logprobs``
        difference = np.zeros(len(sample.target_ids))
    high = settings.epsilon if settings.epsilon_high is None else settings.epsilon_high
    return clipped(difference, np.full(len(difference), advantage), settings.epsilon, high)


def need_rollouts(config: TrainConfig, setting: str) -> None:
    """Raise ConfigError where a rollout would be compared with itself alone."""
    if config.num_generations < 2:
        raise ConfigError(
            f"num_generations={config.num_generations} is not possible with {setting}: rewards are compared with those "
            "of the same prompt's other rollouts; use at least 2"
        )
