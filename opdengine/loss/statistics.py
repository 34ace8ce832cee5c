"""Per-token statistics of a step, collected while its micro-batches run."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

import numpy as np
import torch

from opd_kernels import TokenStats
from opdengine.distributed import Ranks
from opdengine.types import Sample


class Statistics:
    """Collects per-token statistics over the micro-batches of a step.

    Args:
        keep: ids of the samples (of all ranks) whose statistics are also kept token by token, for the log.

    Attributes:
        tokens: id of a sample -> float32 [T] or [T, K] by name; NaN where nothing was computed. With a split vocabulary
            the first rank has those of all.
    """

    def __init__(self, keep: Collection[str] = ()) -> None:
        self.keep = frozenset(keep)
        self.tokens: dict[str, dict[str, np.ndarray]] = {}
        self._values: dict[str, list[np.ndarray]] = {}

    def add_divergence(self, names: Sequence[str], samples: Sequence[Sample], stats: TokenStats, sign: int = 1) -> None:
        """Add the statistics that the fused op returned for these samples; with ``sign`` -1 those of teachers alone."""
        if stats.gap is not None:
            self._extend("gap", stats.gap)
        for k, name in enumerate(names):
            self._extend(f"teacher_kl/{name}", stats.reverse_kl[:, k])
            self._extend(f"teacher_entropy/{name}", stats.teacher_entropy[:, k])
            self._note(samples, "teacher_logprob", stats.teacher_logprob, k, name)
            self._note(samples, "teacher_entropy", stats.teacher_entropy, k, name)
            self._note(samples, "teacher_top1", stats.teacher_top1_prob, k, name)
            self._note(samples, "reverse_kl", stats.reverse_kl, k, name)
        if sign < 0:
            return
        self._extend("student_entropy", stats.student_entropy)
        self._note(samples, "student_logprob", stats.student_logprob)
        self._note(samples, "student_entropy", stats.student_entropy)
        self._difference(samples, stats.student_logprob)

    def add_loss(
        self, samples: Sequence[Sample], token_loss: torch.Tensor, teacher: int | None = None, more: bool = False
    ) -> None:
        """Keep the divergence of every token, before its weight, for the log.

        Args:
            samples: whose targets the rows are.
            token_loss: [T], to all teachers, or to one; NaN where nothing was computed.
            teacher: index of that one, whose weight in the sum is the sample's mix.
            more: it comes to what is known already.
        """
        for sample, rows in self._kept(samples):
            own = token_loss[rows].detach().float().cpu().numpy()
            noted = self.tokens.setdefault(sample.id, {})
            if teacher is not None:
                own = np.nan_to_num(own) * sample.token_mix(len(sample.teachers))[:, teacher].astype(np.float32)
            if more or teacher is not None:
                own = np.nan_to_num(noted.get("divergence", np.zeros_like(own))) + np.nan_to_num(own)
            known = noted.get("divergence", own)
            noted["divergence"] = np.where(np.isnan(own), known, own)

    def add_student(self, samples: Sequence[Sample], logprob: torch.Tensor, entropy: torch.Tensor) -> None:
        """Add the student's own statistics where no exact divergence adds them."""
        self._extend("student_entropy", entropy)
        self._note(samples, "student_logprob", logprob)
        self._note(samples, "student_entropy", entropy)
        self._difference(samples, logprob)

    def add_listed(
        self,
        name: str,
        logprobs: torch.Tensor,
        vocab: int,
        student: torch.Tensor,
        kl: torch.Tensor | None,
        samples: Sequence[Sample] = (),
    ) -> None:
        """Add what is known from a teacher's truncated list.

        Args:
            name: of the teacher.
            logprobs: [T, k], the target's first; -inf where a row lists fewer.
            vocab: width of the whole distribution.
            student: [T] log p(target).
            kl: [T] lower bound of the reverse KL, where it was computed.
            samples: whose targets these are.
        """
        self._extend("gap", logprobs[:, 0] - student)
        if kl is not None:
            self._extend(f"teacher_kl/{name}", kl)
        # The entropy is at most this, and exactly this for a dead (uniform) teacher.
        known = logprobs.double().exp()
        tail = (1 - known.sum(1)).clamp(min=1e-12)
        unlisted = (vocab - torch.isfinite(logprobs).sum(1)).clamp(min=1).double()
        rest = tail * (unlisted.log() - tail.log())
        entropy = rest - torch.xlogy(known, known).sum(1)
        self._extend(f"teacher_entropy/{name}", entropy)
        noted = {"teacher_logprob": logprobs[:, 0], "teacher_entropy": entropy, "teacher_top1": known.amax(1)}
        for field, values in {**noted, "reverse_kl": kl}.items():
            self._note(samples, field, None if values is None else values[:, None], 0, name)

    def add_logprob(self, samples: Sequence[Sample], logprob: torch.Tensor, rows: torch.Tensor | None = None) -> None:
        """Add the log-probs of targets that have an advantage.

        Args:
            samples: whose targets these are.
            logprob: [n].
            rows: int64 [n] which of the targets they are; None for all.
        """
        self._extend("target_logprob", logprob)
        if rows is not None and self.keep:
            count = sum(len(sample.target_ids) for sample in samples)
            logprob = logprob.new_full((count,), float("nan")).index_copy(0, rows, logprob)
        self._note(samples, "student_logprob", logprob)

    def add_noise(self, noise: torch.Tensor) -> None:
        """Note the relative noise of a gradient from sampled columns."""
        self._extend("gradient_noise", noise)

    def add_measured(self, sample: Sample) -> None:
        """Add what was measured before the update, for steps that compute no divergence."""
        if sample.student_logprob is None:
            return
        if sample.sampler_logprob is not None:
            self._extend("logprob_difference", sample.student_logprob - sample.sampler_logprob)
        for k, name in enumerate(sample.teachers):
            if sample.teacher_logprob is not None:  # the mean gap is a sample of -KL
                self._extend(f"teacher_kl/{name}", sample.student_logprob - sample.teacher_logprob[:, k])
            if sample.teacher_entropy is not None:
                self._extend(f"teacher_entropy/{name}", sample.teacher_entropy[:, k])

    def _kept(self, samples: Sequence[Sample]) -> Iterator[tuple[Sample, slice]]:
        """The samples to keep token by token, and which rows are their targets."""
        start = 0
        for sample in samples if self.keep else ():
            stop = start + len(sample.target_ids)
            if sample.id in self.keep:
                yield sample, slice(start, stop)
            start = stop

    def _note(
        self,
        samples: Sequence[Sample],
        name: str,
        values: torch.Tensor | None,
        column: int = 0,
        teacher: str = "",
        over: bool = False,
    ) -> None:
        """Keep [T], or of a teacher's [T, k] one column, token by token; a known value stays, unless ``over``."""
        if values is None or not self.keep:
            return
        known = (values[:, column] if teacher else values).detach().float().cpu().numpy()
        for sample, rows in self._kept(samples):
            own = known[rows]
            noted = self.tokens.setdefault(sample.id, {})
            shape = (len(own), len(sample.teachers)) if teacher else own.shape
            place = noted.setdefault(name, np.full(shape, np.nan, dtype=np.float32))
            if teacher:
                place = place[:, sample.teachers.index(teacher)]
            place[:] = np.where(~np.isnan(own) if over else np.isnan(place), own, place)

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
        """Replace the values of this rank by those of all ranks; ``tokens`` stay this rank's."""
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
