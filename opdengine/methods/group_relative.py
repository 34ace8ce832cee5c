"""The group-relative policy gradient (GRPO, arXiv 2402.03300): rewards as advantages, beside a distillation.

A rollout's advantage is its reward less the mean of its prompt's rollouts, over their standard deviation; all its
tokens have it, times PPO's clipped ratio of the policy now to the policy that sampled. ``grpo.weight`` adds it to the
weights of any method; the method ``grpo`` has nothing else, and needs no teacher.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from opdengine.config.method_sections import GrpoConfig
from opdengine.config.train import TrainConfig
from opdengine.distributed import Ranks
from opdengine.errors import ConfigError
from opdengine.loss.importance import clipped
from opdengine.methods.checks import Check
from opdengine.methods.method import Method
from opdengine.methods.paper import Paper
from opdengine.methods.policy_gradient import check_ratio, warn_of_sampling
from opdengine.methods.room import Need
from opdengine.methods.unused import refuse_unused
from opdengine.metrics import Mean
from opdengine.types import Batch, Prompt, Sample

PAPER = Paper(
    arxiv="2402.03300",
    defaults={
        "loss_normalization": ("sequence", "equation 3"),
        "num_generations": (64, "section 4.2"),
        "learning_rate": (1e-6, "section 4.2"),
        "grpo.weight": (1.0, "equation 3"),
    },
    choices={"max_completion_length": "1024", "prompts_per_step": "16"},
)

LEAST_DEVIATION = 1e-4
"""Is added to the standard deviation, as in TRL."""

LEAST_SPREAD = 1e-9
"""Rewards of a prompt that differ by less are equal: only the rounding of a sum lies between."""

NEEDS = frozenset({"policy_logratio"})
"""The measures that the clip needs."""

CHECKS = (
    Check(
        "grpo/no_spread", "grpo/rollouts", "rollouts have the reward of all others of their prompt, and no advantage",
        "raise num_generations, or take prompts that are neither too easy nor too hard", share=1.0,
    ),
    Check(
        "grpo/unknown", "grpo/rollouts", "rollouts of older weights have no log-probs of the sampler, so no ratio is "
        "known and nothing clips their advantage", "sample with what tells log-probs, or set max_staleness to 0",
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
        if np.ptp(values[members]) > LEAST_SPREAD:  # the mean of equal ones may be rounded to another number
            centred[members] = values[members] - values[members].mean()
        if scale == "group":
            deviation[members] = values[members].std(ddof=1) if members.sum() > 1 else 0.0
    return centred / (deviation + LEAST_DEVIATION)


def add_advantages(batch: Batch, ranks: Ranks, settings: GrpoConfig, weight: float) -> None:
    """Add ``weight`` times the group-relative advantage to that of every token. All processes call this.

    Rollouts that are left out of the update count in the mean and the deviation of their prompt: what they were worth
    is known, and who is left out (the longest ones, say) would move the others' advantages.

    Args:
        batch: weighed samples.
        ranks: of the run: a batch's deviation is that of the whole step.
        settings: scale and clip.
        weight: of this term.
    """
    graded = [sample for sample in batch.samples if sample.reward is not None]
    rewarded = [sample for sample in graded if not sample.drop]
    mine = {_rollout(s): (s.group or s.id, float(s.reward or 0.0)) for s in graded}  # the states of one count once
    rows = ranks.join(list(mine.values()))
    every = advantages([group for group, _ in rows], [reward for _, reward in rows], settings.scale_rewards)
    own = dict(zip(mine, every[ranks.own(len(mine))].tolist(), strict=True))
    for sample in rewarded:
        advantage = own[_rollout(sample)]
        given = np.zeros(len(sample.target_ids)) if sample.advantage is None else sample.advantage
        term = weight * _ratio(sample, advantage, settings) * advantage
        sample.advantage = (given + term).astype(np.float32)
    batch.metrics["grpo/rollouts"] = float(len(mine))
    batch.metrics["grpo/no_spread"] = float(sum(value == 0 for value in own.values()))
    if unknown := len({_rollout(sample) for sample in rewarded if sample.policy_logratio is None}):
        batch.metrics["grpo/unknown"] = float(unknown)
    if mine:
        batch.metrics["grpo/reward"] = Mean(float(np.mean([reward for _, reward in mine.values()])), len(mine))


class RewardTerm(Method):
    """Is put before a method whose run has a ``grpo.weight``: its weights, and the rewards' beside them."""

    needs_reward = True

    def __init__(self, config: TrainConfig, **options: Any) -> None:
        super().__init__(config, **options)
        setting = f"grpo.weight={config.grpo.weight}"
        need_rollouts(config, setting)
        check_ratio(config, setting, "grpo.weight to 0")
        warn_of_sampling(config, setting)
        self.needs = self.needs | NEEDS

    @property
    def checks(self) -> tuple[Check, ...]:
        """The run warns where rewards tell no rollout from another."""
        return (*super().checks, *CHECKS)

    def weigh(self, batch: Batch) -> None:
        """The method's weights and ``grpo.weight`` times the group-relative advantage."""
        super().weigh(batch)
        add_advantages(batch, self.ranks, self.config.grpo, self.config.grpo.weight)


class GRPO(Method):
    """Rewards alone. A teacher, where there is one, is not asked."""

    paper = PAPER

    teachers_per_prompt = 0
    diverges = False

    def __init__(self, config: TrainConfig) -> None:
        super().__init__(config)
        if config.grpo.weight == 0:
            raise ConfigError("grpo.weight=0 is not possible with method 'grpo', which has no other term; use 1")
        if config.teachers:
            raise ConfigError(
                f"method 'grpo' asks no teacher, but {[t.name for t in config.teachers]} are given; leave them out, "
                "or take method 'opd' with grpo.weight"
            )
        if config.teacher_prompt_template is not None:
            raise ConfigError(
                "teacher_prompt_template is not possible with method 'grpo', which asks no teacher; leave it out"
            )

    def room(self, prompt: Prompt) -> list[Need]:
        """No teacher reads anything."""
        return []

    async def annotate(self, batch: Batch) -> None:
        """No teacher judges."""

    def weigh(self, batch: Batch) -> None:
        """No divergence."""
        for sample in batch:
            sample.kl_weight = np.zeros(len(sample.target_ids), dtype=np.float32)


def _rollout(sample: Sample) -> str:
    return sample.trajectory or sample.id


def _ratio(sample: Sample, advantage: float, settings: GrpoConfig) -> np.ndarray:
    difference = sample.policy_logratio
    if difference is None:  # the sampler told no log-probs: see ``grpo/unknown``
        difference = np.zeros(len(sample.target_ids))
    high = settings.epsilon if settings.epsilon_high is None else settings.epsilon_high
    return clipped(difference, np.full(len(difference), advantage), settings.epsilon, high)


def refuse_unweighed(config: TrainConfig, setting: str, remedy: str) -> None:
    """Raise ConfigError where ``grpo`` says how rewards are weighed and ``setting`` gives them no weight."""
    unused = ("grpo.scale_rewards", "grpo.epsilon", "grpo.epsilon_high")
    refuse_unused(config, unused, f"{setting}, which gives rewards no weight", f"{remedy}, or leave it out")


def need_rollouts(config: TrainConfig, setting: str) -> None:
    """Raise ConfigError where a rollout would be compared with itself alone."""
    if config.num_generations < 2:
        raise ConfigError(
            f"num_generations={config.num_generations} is not possible with {setting}: rewards are compared with those "
            "of the same prompt's other rollouts; use at least 2"
        )
