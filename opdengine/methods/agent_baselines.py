"""What SAGE-OPD is compared with beside plain OPD over all turns (arXiv 2606.19659, appendix A).

TCOD trains on the first turns of every trajectory, more of them as training goes on (equation 25); its loss is
the mean over the tokens of these turns, as if the trajectories ended there.
Entropy-aware OPD gives more weight to tokens on which the teacher is uncertain (equation 26).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from opdengine.checks import Check
from opdengine.config import ConfigError, SageConfig, TcodConfig, TrainConfig
from opdengine.methods.opd import PlainContexts, opd
from opdengine.methods.sage_opd import Selective
from opdengine.metrics import Mean
from opdengine.recipe import Annotations, Batch, Note, Recipe, Weighed, distill
from opdengine.rollout.episodes import turns_of
from opdengine.teachers import Teacher
from opdengine.types import Rollout, TokenSignal


class FirstTurns:
    """Turn weight 1 on the first k = k_start + n * eta turns, n the version that sampled them, else 0."""

    def __init__(self, config: TcodConfig) -> None:
        self.config = config
        self.contexts = PlainContexts()

    async def annotate(self, rollouts: Sequence[Rollout], teachers: Sequence[Teacher]) -> Annotations:
        found = await self.contexts.annotate(rollouts, teachers)
        notes, kept, count = [], 0, 0
        for rollout, note in zip(rollouts, found.notes, strict=True):
            limit = int(self.config.k_start + rollout.policy_version * self.config.eta)
            weight = np.zeros(len(rollout.turns), dtype=np.float32)
            turns = [index for index, _, _ in turns_of(rollout)]
            weight[turns[:limit]] = 1.0
            kept, count = kept + min(limit, len(turns)), count + len(turns)
            notes.append(Note(note.contexts, note.mix, weight, note.drop))
        return Annotations(notes, {"tcod/turns_kept": Mean(kept / max(count, 1), count)})


class KeptMean:
    """Makes the loss the mean over the tokens of turns with weight.

    Args:
        normalization: of the loss: of all such tokens ("token"), or of each rollout's ("sequence").
    """

    def __init__(self, normalization: str) -> None:
        scope = "batch" if normalization == "token" else "trajectory"
        self.selective = Selective(SageConfig(use_confidence=False, normalization_scope=scope))

    def __call__(self, batch: Batch) -> Weighed:
        return Weighed(self.selective(batch).signals)


class Uncertain:
    """kl_weight 1 + alpha where the entropy of a teacher (mean over teachers, nats) exceeds tau, else 1."""

    def __init__(self, alpha: float, tau: float) -> None:
        self.alpha = alpha
        self.tau = tau

    def __call__(self, batch: Batch) -> Weighed:
        signals, share = [], []  # of tokens with more weight
        for stats, rollout in zip(batch.stats, batch.rollouts, strict=True):
            count = len(rollout.targets)
            entropy = np.zeros(count) if stats.teacher_entropy is None else stats.teacher_entropy.mean(axis=1)
            share.append(entropy > self.tau)
            signals.append(TokenSignal((1 + self.alpha * share[-1]).astype(np.float32)))
        every = np.concatenate(share) if share else np.zeros(0, dtype=bool)
        alike = max(int(every.sum()), int((~every).sum()))
        return Weighed(
            signals,
            {
                "entropy_aware/weighted": float(every.mean()) if len(every) else 0.0,
                "entropy_aware/alike": float(alike),
                "entropy_aware/tokens": float(len(every)),
            },
        )


def tcod(config: TrainConfig) -> Recipe:
    """Turn-curriculum OPD, front to back."""
    if not config.environment.name:
        raise ConfigError("method 'tcod' needs the turns of an agent; set environment.name")
    plain = opd(config)  # its checks
    return replace(
        plain, name="tcod", annotator=FirstTurns(config.tcod), weighers=(KeptMean(config.loss_normalization),)
    )


def entropy_opd(config: TrainConfig) -> Recipe:
    """Entropy-aware OPD."""
    plain = opd(config)
    weigher = Uncertain(config.entropy_opd.alpha, config.entropy_opd.tau)
    alike = Check(
        "entropy_aware/alike",
        "entropy_aware/tokens",
        f"tokens lie on one side of entropy_opd.tau={config.entropy_opd.tau}, so all weigh alike: this is plain OPD",
        "choose a tau within the teacher's entropies (teacher_entropy/... in metrics.jsonl)",
        share=1.0,
    )
    measures = ("teacher_entropy",)
    return replace(plain, name="entropy_opd", weighers=(distill, weigher), measures=measures, checks=(alike,))
