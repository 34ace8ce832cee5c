"""G-OPD: on-policy distillation with a scaled reward (Yang et al., arXiv 2602.12125); above 1 it extrapolates (ExOPD).

Distillation is reinforcement learning with the reward log q(y) - log r(y), where r is a reference, and a KL to r.
Scaled by lambda, ``lambda * (log q - log r) - KL(p || r)``, it has the policy gradient of the advantage
``lambda * (log q(y) - log p(y)) + (1 - lambda) * (log r(y) - log p(y))``: teachers mixed with the weights lambda and
1 - lambda, of which the second is negative where the student is to go beyond its teacher. Over the whole vocabulary
(``advantage.kl_mode: full_vocab``) the loss is ``lambda KL(p || q) + (1 - lambda) KL(p || r)``, whose gradient is the
mean of that: the student goes to the distribution in proportion to ``q^lambda r^(1 - lambda)``.
"""

from __future__ import annotations

import numpy as np

from opdengine.config.train import TrainConfig
from opdengine.errors import ConfigError
from opdengine.methods.checks import Check
from opdengine.methods.method import Method, need_teachers, route
from opdengine.methods.paper import Paper
from opdengine.methods.policy_gradient import CHECKS, policy_gradient
from opdengine.types import Batch

PAPER = Paper(
    arxiv="2602.12125",
    defaults={
        "divergence": ("reverse_kl", "equation of J_G-OPD"),
        "advantage.importance": ("none", "unstated: one update per rollout"),
        "advantage.max_gap": (float("inf"), "unstated: no bound"),
        "loss_normalization": ("token", "unstated: every token counts alike"),
        "temperature": (1.0, "unstated: samples of the student itself"),
    },
    choices={"g_opd.reference": "the student as it began, or the teacher before its reinforcement learning"},
)


class GOPD(Method):
    """Teachers and a reference whose weight makes up for theirs."""

    paper = PAPER

    teachers_per_prompt = 2

    def __init__(self, config: TrainConfig) -> None:
        super().__init__(config)
        need_teachers(config, 2)
        self.settings = config.g_opd
        names = {t.name: t for t in config.teachers}
        if self.settings.reference not in names:
            raise ConfigError(
                f"g_opd.reference={self.settings.reference!r} is no teacher; name one of {sorted(names)}, such as "
                "{model: self, weights: base}"
            )
        if names[self.settings.reference].key:
            raise ConfigError(
                f"teacher {self.settings.reference!r} is g_opd.reference and judges every prompt; leave its key out"
            )
        if config.advantage.kl_mode == "full_vocab":
            need_exact(config)
        self.gradient = policy_gradient(config, PAPER)
        self.needs, self.diverges = self.gradient.needs, self.gradient.exact

    @property
    def checks(self) -> tuple[Check, ...]:
        """The ways in which gaps can fail without an error."""
        return (*super().checks, *CHECKS)

    async def annotate(self, batch: Batch) -> None:
        """The teachers share lambda in proportion to their weights; the reference has the rest."""
        await super().annotate(batch)
        scale = self.settings.reward_scale
        for sample in batch:
            is_reference = np.array([c.teacher == self.settings.reference for c in sample.contexts])
            assert sample.mix is not None
            shares = np.where(is_reference, 0.0, sample.mix)
            mix = scale * shares / shares.sum() + (1 - scale) * is_reference
            sample.mix = mix.astype(np.float32)

    def weigh(self, batch: Batch) -> None:
        """Advantages of rollouts that the reference and every teacher have judged."""
        for sample in batch:
            if len(sample.teachers) < len(route(self.teachers, sample.prompt.key)):
                sample.drop = "teacher_failure"  # what is left would have another weight
        self.gradient.weigh(batch, self.ranks)


def need_exact(config: TrainConfig) -> None:
    """Raise ConfigError where the scaled reward has no form over the whole vocabulary."""
    kinds = config.divergence.values() if isinstance(config.divergence, dict) else (config.divergence,)
    partial = [t.name for t in config.teachers if t.base_url is not None or t.tokenizer_alignment != "none"]
    for ok, setting, remedy in (
        (
            set(kinds) == {"reverse_kl"},
            f"divergence={config.divergence!r}",
            "the reward is one of reverse KLs: use that",
        ),
        (
            config.teacher_reduction == "sum",
            "teacher_reduction='mixture'",
            "no mixture has a negative share: use 'sum'",
        ),
        (not partial, f"the teachers {partial}", "of a served one, or of other tokens, only a part of q is known"),
    ):
        if not ok:
            raise ConfigError(
                f"method 'g_opd' with advantage.kl_mode='full_vocab' is not possible with {setting}; {remedy}, or "
                "kl_mode 'sampled'"
            )
