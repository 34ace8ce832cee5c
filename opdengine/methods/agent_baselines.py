"""The baselines that SAGE-OPD is compared with, in addition to plain OPD (arXiv 2606.19659, appendix A).

TCOD trains on the first turns of every trajectory, more of them as training goes on (equation 25); its loss is
the mean over the tokens of these turns, as if the trajectories ended there.
Entropy-aware OPD gives more weight to tokens on which the teacher is uncertain (equation 26).
"""

from __future__ import annotations

from typing import Literal

import numpy as np

from opdengine.config.method_sections import SageConfig
from opdengine.config.train import TrainConfig
from opdengine.environments.episodes import turns_of
from opdengine.errors import ConfigError
from opdengine.methods.checks import Check
from opdengine.methods.opd import OPD
from opdengine.methods.sage_opd import PAPER, normalise
from opdengine.metrics import Mean
from opdengine.types import Batch


class TCOD(OPD):
    """Turn-curriculum OPD, front to back: weight 1 on the first k = k_start + n * eta turns, else 0.

    n is the version of the weights that sampled the turns.
    """

    paper = PAPER

    def __init__(self, config: TrainConfig) -> None:
        if not config.environment.name:
            raise ConfigError("method 'tcod' needs the turns of an agent; set environment.name")
        super().__init__(config)

    async def annotate(self, batch: Batch) -> None:
        """Set the weights of the turns."""
        await super().annotate(batch)
        settings, kept, count = self.config.tcod, 0, 0
        for sample in batch:
            limit = int(settings.k_start + sample.policy_version * settings.eta)
            turns = [index for index, _, _ in turns_of(sample)]
            sample.turn_weight = np.zeros(len(sample.turns), dtype=np.float32)
            sample.turn_weight[turns[:limit]] = 1.0
            kept, count = kept + min(limit, len(turns)), count + len(turns)
        batch.metrics["tcod/turns_kept"] = Mean(kept / max(count, 1), count)

    def weigh(self, batch: Batch) -> None:
        """Take the mean over tokens of turns with weight, of the step or of each sample (``loss_normalization``)."""
        super().weigh(batch)
        scope: Literal["batch", "trajectory"] = "batch" if self.config.loss_normalization == "token" else "trajectory"
        normalise(batch, self.ranks, SageConfig(normalization_scope=scope))


class EntropyOPD(OPD):
    """Weight 1 + alpha where the entropy of the teacher (mean over teachers, nats) exceeds tau, else 1."""

    paper = PAPER
    needs = frozenset({"teacher_entropy"})

    @property
    def checks(self) -> tuple[Check, ...]:
        """The run warns where all tokens lie on one side of tau, because the method then does nothing."""
        alike = Check(
            "entropy_aware/alike",
            "entropy_aware/tokens",
            f"tokens lie on one side of entropy_opd.tau={self.config.entropy_opd.tau}, so all weigh alike: this is "
            "plain OPD",
            "choose a tau within the teacher's entropies (teacher_entropy/... in metrics.jsonl)",
            share=1.0,
        )
        return (*super().checks, alike)

    def weigh(self, batch: Batch) -> None:
        """Raise the weights of uncertain tokens."""
        super().weigh(batch)
        settings, weighted, count = self.config.entropy_opd, 0, 0
        for sample in batch:
            entropy = np.zeros(len(sample.target_ids))  # of a sample that no teacher was asked about
            if sample.teacher_entropy is not None:
                entropy = sample.teacher_entropy.mean(axis=1)
            uncertain = entropy > settings.tau
            assert sample.kl_weight is not None
            sample.kl_weight = sample.kl_weight * (1 + settings.alpha * uncertain).astype(np.float32)
            weighted, count = weighted + int(uncertain.sum()), count + len(uncertain)
        batch.metrics["entropy_aware/weighted"] = Mean(weighted / max(count, 1), count)
        sides = self.ranks.sum(weighted), self.ranks.sum(count - weighted)
        batch.metrics["entropy_aware/alike"] = float(max(sides)) if self.ranks.is_first else 0.0
        batch.metrics["entropy_aware/tokens"] = float(count)
