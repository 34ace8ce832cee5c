"""Per-token statistics of a step, collected while its micro-batches run."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from opd_kernels import TokenStats
from opdengine.distributed import Ranks
from opdengine.types import Sample


class Statistics:
    """Collects per-token statistics over the micro-batches of a step."""

    def __init__(self) -> None:
        self._values: dict[str, list[np.ndarray]] = {}

    def add_divergence(self, names: Sequence[str], samples: Sequence[Sample], stats: TokenStats) -> None:
        """Note what the fused op returned as statistics of these samples."""
        self._extend("student_entropy", stats.student_entropy)
        if stats.gap is not None:
            self._extend("gap", stats.gap)
        for k, name in enumerate(names):
            self._extend(f"teacher_kl/{name}", stats.reverse_kl[:, k])
            self._extend(f"teacher_entropy/{name}", stats.teacher_entropy[:, k])
        self._difference(samples, stats.student_logprob)

    def add_student(self, samples: Sequence[Sample], logprob: torch.Tensor, entropy: torch.Tensor) -> None:
        """Note the student's own statistics where no exact divergence does."""
        self._extend("student_entropy", entropy)
        self._difference(samples, logprob)

    def add_listed(
        self, name: str, logprobs: torch.Tensor, vocab: int, student: torch.Tensor, kl: torch.Tensor | None
    ) -> None:
        """Note what is known of a teacher's truncated list.

        Args:
            name: of the teacher.
            logprobs: [T, k], the target's first; -inf where a row lists fewer.
            vocab: width of the whole distribution.
            student: [T] log p(target).
            kl: [T] lower bound of the reverse KL, where it was computed.
        """
        self._extend("gap", logprobs[:, 0] - student)
        if kl is not None:
            self._extend(f"teacher_kl/{name}", kl)
        # The entropy is at most this, and exactly this for a dead (uniform) teacher.
        known = logprobs.double().exp()
        tail = (1 - known.sum(1)).clamp(min=1e-12)
        unlisted = (vocab - torch.isfinite(logprobs).sum(1)).clamp(min=1).double()
        rest = tail * (unlisted.log() - tail.log())
        self._extend(f"teacher_entropy/{name}", rest - torch.xlogy(known, known).sum(1))

    def add_logprob(self, logprob: torch.Tensor) -> None:
        """Note the log-probs of targets that have an advantage."""
        self._extend("target_logprob", logprob)

    def add_measured(self, sample: Sample) -> None:
        """Note what was measured before the update, for steps in which no divergence tells it."""
        if sample.student_logprob is None:
            return
        if sample.sampler_logprob is not None:
            self._extend("logprob_difference", sample.student_logprob - sample.sampler_logprob)
        for k, name in enumerate(sample.teachers):
            if sample.teacher_logprob is not None:  # the mean gap is a sample of -KL
                self._extend(f"teacher_kl/{name}", sample.student_logprob - sample.teacher_logprob[:, k])
            if sample.teacher_entropy is not None:
                self._extend(f"teacher_entropy/{name}", sample.teacher_entropy[:, k])

    def _difference(self, samples: Sequence[Sample], logprob: torch.Tensor | None) -> None:
        """Trainer minus sampler log-prob of the sampled tokens, where the sampler's are known."""
        if logprob is None:
            return
        rows = logprob.detach().float().cpu().numpy()
        start = 0
        for sample in samples:
            end = start + len(sample.target_ids)
            sampled = sample.sampler_logprob
            if sampled is not None:
                self._extend("logprob_difference", rows[start:end] - sampled)
            start = end

    def _extend(self, name: str, values: torch.Tensor | np.ndarray) -> None:
        if isinstance(values, torch.Tensor):
            values = values.detach().float().cpu().numpy()
        flat = values.ravel()
        self._values.setdefault(name, []).append(flat[~np.isnan(flat)])

    def join(self, ranks: Ranks) -> None:
        """Have the values of all ranks."""
        parts = ranks.gather({name: self.get(name) for name in self._values})
        self._values = {}
        for part in parts:
            for name, values in part.items():
                self._extend(name, values)

    def get(self, name: str) -> np.ndarray:
        """All values of one statistic; empty when there are none."""
        parts = self._values.get(name, [])
        return np.concatenate(parts) if parts else np.zeros(0, dtype=np.float32)

    def means(self, prefix: str) -> dict[str, float]:
        """Mean of every statistic whose name starts with ``prefix``."""
        return {
            name: float(self.get(name).mean())
            for name in sorted(self._values)
            if name.startswith(prefix) and len(self.get(name))
        }
