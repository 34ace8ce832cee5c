"""The baselines that CaMOPD is compared with (arXiv 2605.27115, section 4): which tokens learn, and how much.

Relaxed OPD (Ko et al., arXiv 2603.11137) takes the log-ratio of teacher and student as the reward of a token, bounds it
from below as the log-ratio to a mixture of both is, and trains on the tokens of which the student is least certain.
SelecTKD (Huang et al., arXiv 2510.24021) has the student's token verified by the teacher as in speculative decoding:
an accepted one has the whole divergence, a rejected one a part of it or none.
"""

from __future__ import annotations

import math

import numpy as np

from opdengine.config.train import TrainConfig
from opdengine.errors import ConfigError
from opdengine.methods.checks import Check
from opdengine.methods.method import Method, need_teachers
from opdengine.methods.opd import OPD
from opdengine.methods.paper import Paper
from opdengine.methods.policy_gradient import CHECKS, gap_of, policy_gradient
from opdengine.metrics import Mean
from opdengine.types import Batch, Sample

RELAXED = Paper(
    arxiv="2603.11137",
    defaults={
        "divergence": ("reverse_kl", "the log-ratio is its sample"),
        "advantage.importance": ("clip", "unstated: as in PPO"),
        "advantage.max_gap": (float("inf"), "unstated: rewards are bounded from below instead"),
        "loss_normalization": ("token", "unstated: every token counts alike"),
    },
)

SELECTIVE = Paper(
    arxiv="2510.24021",
    defaults={"loss_normalization": ("token", "unstated: every token counts alike")},
    choices={"divergence": "any: the paper has forward, reverse and skew KL"},
)


class RelaxedOPD(Method):
    """Rewards bounded from below, on the tokens with the largest entropy."""

    paper = RELAXED

    def __init__(self, config: TrainConfig) -> None:
        super().__init__(config)
        need_teachers(config, 1)
        self.settings = config.relaxed_opd
        if config.advantage.kl_mode == "full_vocab":
            raise ConfigError(
                "advantage.kl_mode='full_vocab' is not possible with method 'relaxed_opd', which bounds the reward of "
                "each sampled token from below; use 'sampled'"
            )
        self.gradient = policy_gradient(config, RELAXED)
        self.needs = self.gradient.needs | {"student_entropy"}
        self.diverges = self.gradient.exact

    @property
    def checks(self) -> tuple[Check, ...]:
        """The ways in which gaps can fail without an error."""
        return (*super().checks, *CHECKS)

    def weigh(self, batch: Batch) -> None:
        """Advantage ``max(gap, log(m / (1 - m)))`` where the entropy is among the largest of the rollout, else 0."""
        share = self.settings.mixture
        floor = math.log(share / (1 - share))
        gaps, kept, clipped, count = [], 0, 0, 0
        for sample in batch:
            gap, chosen = gap_of(sample), uncertain(sample, self.settings.entropy_share)
            kept, clipped, count = kept + int(chosen.sum()), clipped + int((gap < floor).sum()), count + len(gap)
            gaps.append(np.maximum(gap, floor) * chosen)
        self.gradient.weigh(batch, self.ranks, gaps)
        batch.metrics["relaxed/kept"] = Mean(kept / max(count, 1), count)
        batch.metrics["relaxed/clipped"] = Mean(clipped / max(count, 1), count)


class SelecTKD(OPD):
    """Weight 1 on tokens that the teacher accepts, ``rejected_weight`` on the others."""

    paper = SELECTIVE
    needs = frozenset({"student_logprob", "teacher_logprob", "teacher_top1"})

    def weigh(self, batch: Batch) -> None:
        """Multiply the weights of tokens by what became of them."""
        super().weigh(batch)
        settings, accepted, count = self.config.selectkd, 0, 0
        for sample in batch:
            good = self._accepted(sample, batch.number)
            assert sample.kl_weight is not None
            sample.kl_weight = sample.kl_weight * np.where(good, 1.0, settings.rejected_weight).astype(np.float32)
            accepted, count = accepted + int(good.sum()), count + len(good)
        batch.metrics["selectkd/accepted"] = Mean(accepted / max(count, 1), count)

    def _accepted(self, sample: Sample, number: int) -> np.ndarray:
        """bool [T]: with probability min(1, q(y) / p(y)), or where y is the teacher's likeliest token."""
        if sample.teacher_logprob is None or sample.teacher_top1 is None:
            return np.zeros(len(sample.target_ids), dtype=bool)
        teacher = sample.teacher_logprob[:, 0].astype(np.float64)
        if self.config.selectkd.verify == "greedy":
            likeliest: np.ndarray = np.exp(teacher) >= sample.teacher_top1[:, 0] * (1 - 1e-5)
            return likeliest
        place = int.from_bytes(sample.id.encode()[:32], "big")
        draws = np.random.default_rng([self.config.seed, number, place]).random(len(teacher))
        assert sample.student_logprob is not None
        passed: np.ndarray = np.log(draws) < teacher - sample.student_logprob
        return passed


def uncertain(sample: Sample, share: float) -> np.ndarray:
    """bool [T]: the ``share`` of a rollout's tokens on which the student's entropy is largest, at least one."""
    if sample.student_entropy is None:
        return np.zeros(len(sample.target_ids), dtype=bool)
    entropy = sample.student_entropy
    least = np.sort(entropy)[::-1][max(math.ceil(share * len(entropy)), 1) - 1] if len(entropy) else 0.0
    chosen: np.ndarray = entropy >= least
    return chosen
