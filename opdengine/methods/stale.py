"""Importance weights of a divergence: rollouts that older weights have sampled count by how likely they are now.

The mean over rollouts of the present policy of a token's divergence is the mean over those of an older one, times the
ratio r of the two policies (of the token itself, as in PPO; the tokens before it are left as they were sampled). It is
truncated, which bounds its variance, and carries no gradient: SDFT and SDPO (arXiv 2601.20802) have min(r, 2).
"""

from __future__ import annotations

from typing import Any

import numpy as np

from opdengine.config.train import TrainConfig
from opdengine.errors import ConfigError
from opdengine.loss.importance import truncated
from opdengine.methods.checks import SAMPLED, Check
from opdengine.methods.method import Method
from opdengine.methods.policy_gradient import check_ratio
from opdengine.metrics import Mean
from opdengine.types import Batch

CHECKS = (
    Check(
        "stale/unknown", SAMPLED, "rollouts of older weights have no log-probs of the sampler, so no ratio is known "
        "and their divergence counts in full", "leave distillation_is_clip out if that is meant",
    ),
)  # fmt: skip


class StaleWeights(Method):
    """Is put before a method whose run has a ``distillation_is_clip``."""

    def __init__(self, config: TrainConfig, **options: Any) -> None:
        super().__init__(config, **options)
        setting = f"distillation_is_clip={config.distillation_is_clip}"
        if not self.diverges:
            raise ConfigError(
                f"{setting} is not possible with method {config.method!r} as it is set: there is no divergence "
                "here that it could multiply; leave it out (advantages have advantage.importance)"
            )
        check_ratio(config, setting, "distillation_is_clip to null")
        self.needs = self.needs | {"policy_logratio"}

    @property
    def checks(self) -> tuple[Check, ...]:
        """The run warns where the sampler tells no log-probs."""
        return (*super().checks, *CHECKS)

    def weigh(self, batch: Batch) -> None:
        """Multiply ``kl_weight`` by ``min(r, distillation_is_clip)``."""
        super().weigh(batch)
        clip = self.config.distillation_is_clip
        assert clip is not None
        unknown, total, count = 0, 0.0, 0
        for sample in batch:
            if sample.policy_logratio is None:
                unknown += 1
                continue
            weight = truncated(sample.policy_logratio, clip)
            assert sample.kl_weight is not None
            sample.kl_weight = (sample.kl_weight * weight).astype(np.float32)
            total, count = total + float(weight.sum()), count + len(weight)
        batch.metrics["stale/weight"] = Mean(total / max(count, 1), count)
        if unknown:
            batch.metrics["stale/unknown"] = float(unknown)
