"""EOPD: the divergence is chosen for every token (Jin et al., Entropy-Aware On-Policy Distillation, arXiv 2603.07079).

The reverse KL seeks the teacher's mode, and is unstable where the teacher hesitates between several ways on. There,
where its entropy exceeds ``tau``, the forward KL takes the place of the configured divergence; it covers all of them.

This follows the abstract, the authors' announcement and accounts of others; the paper itself was not read. The
first two say that the forward KL is added to an objective of sampled tokens, the others that it takes the place of the
reverse KL, as here. ``tau`` is that of arXiv 2606.19659 (equation 26), which has weights in place of the forward KL
(method ``entropy_opd``).
"""

from __future__ import annotations

import numpy as np

from opdengine.config.train import TrainConfig
from opdengine.errors import ConfigError
from opdengine.methods.checks import Check
from opdengine.methods.opd import OPD
from opdengine.methods.paper import Paper
from opdengine.metrics import Mean
from opdengine.types import Batch

PAPER = Paper(
    arxiv="2603.07079",
    defaults={
        "divergence": ("reverse_kl", "abstract"),
        "loss_normalization": ("token", "unstated: every token counts alike"),
    },
)


class EOPD(OPD):
    """The forward KL where the teacher is uncertain, the configured divergence elsewhere."""

    paper = PAPER
    needs = frozenset({"teacher_entropy"})

    def __init__(self, config: TrainConfig) -> None:
        super().__init__(config)
        kinds = config.divergence if isinstance(config.divergence, dict) else {"": config.divergence}
        if "forward_kl" in kinds.values():
            raise ConfigError(
                f"divergence={config.divergence!r} is not possible with method 'eopd', which takes the forward KL "
                "where the teacher is uncertain: there would be nothing to choose; use reverse_kl, or method 'opd'"
            )

    @property
    def checks(self) -> tuple[Check, ...]:
        """The run warns where all tokens lie on one side of tau, because nothing is chosen then."""
        alike = Check(
            "eopd/alike", "eopd/tokens", f"tokens lie on one side of eopd.tau={self.config.eopd.tau:g}, so all have "
            "the same divergence", "choose a tau within the teacher's entropies (teacher_entropy/... in metrics.jsonl)",
            share=1.0,
        )  # fmt: skip
        return (*super().checks, alike)

    def weigh(self, batch: Batch) -> None:
        """Choose the divergence of every token by the teacher's entropy there."""
        super().weigh(batch)
        chosen, count = 0, 0
        for sample in batch:
            if sample.teacher_entropy is None:  # no teacher was asked about it
                continue
            uncertain = sample.teacher_entropy[:, 0] > self.config.eopd.tau
            sample.divergence_kind = np.where(uncertain, "forward_kl", self.config.divergence_of(sample.prompt.key))
            chosen, count = chosen + int(uncertain.sum()), count + len(uncertain)
        batch.metrics["eopd/forward"] = Mean(chosen / max(count, 1), count)
        sides = self.ranks.sum(chosen), self.ranks.sum(count - chosen)
        batch.metrics["eopd/alike"] = float(max(sides)) if self.ranks.is_first else 0.0
        batch.metrics["eopd/tokens"] = float(count)
