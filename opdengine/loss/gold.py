"""The divergence to a teacher with another tokenizer, over whole distributions: ULD and GOLD.

ULD (Boizard et al., arXiv 2402.12030) compares sorted probabilities, whatever token they belong to; GOLD (as in TRL)
compares tokens that both vocabularies have as such, and only the others sorted. Over a span of several tokens a side's
distribution is that of its last token times the probabilities of those before, by the chain rule: it does not sum to 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch.utils.checkpoint import checkpoint

from opd_kernels import LMHead, linear_logprob
from opdengine.config.method_sections import GoldConfig
from opdengine.types import Hidden, Sample, Spans

LEAST = -100.0
"""Of a log-probability, nats: a token that a head excludes stays finite."""
COPIES = 8
"""Arrays of a row's width that are alive at a time, about."""


@dataclass(frozen=True)
class Gold:
    """The loss of spans.

    Args:
        settings: of the run.
        divergence: over the tokens that both vocabularies have: "reverse_kl", "forward_kl" or "jsd".
        beta: weight of the teacher in the middle of the JSD.
        temperature: divides both sides' logits.
        vocab_size: valid leading columns of the student's head.
        workspace_bytes: for the distributions that are held at a time.
    """

    settings: GoldConfig
    divergence: str
    beta: float = 0.5
    temperature: float = 1.0
    vocab_size: int | None = None
    workspace_bytes: int | None = None

    def __call__(
        self,
        hidden: torch.Tensor,
        head: LMHead,
        teacher: LMHead,
        samples: Sequence[Sample],
        k: int,
        weights: np.ndarray,
    ) -> tuple[torch.Tensor, np.ndarray]:
        """The weighted sum over all spans, and each target's part of its span's loss.

        Args:
            hidden: [T, d] of the samples' targets, in order.
            head: the student's.
            teacher: the teacher's head.
            samples: that it judges.
            k: its place among their teachers.
            weights: [T] of the targets; a span has the mean of its targets'.

        Returns:
            The sum, and float32 [T]: the loss of a target's span over the number of its targets; NaN without one.
        """
        read = [found for s in samples if (found := s.contexts[k].spans) is not None]
        spans = Spans.joined(read, read[0].pairs, read[0].vocabulary)
        dtype, device = torch.promote_types(hidden.dtype, torch.float32), hidden.device
        states = torch.cat([_states(s, k) for s in samples]).to(device, teacher.weight.dtype)
        ids = np.concatenate([s.contexts[k].token_ids[s.contexts[k].target_positions] for s in samples])
        mean = spans.pooled(weights)[_last(spans.student)] / spans.lengths if len(spans.lengths) else np.zeros(0)
        open_ = np.flatnonzero(mean)
        labels = np.concatenate([s.target_ids for s in samples])
        own, own_rows = self._before(hidden, head.to(hidden.dtype), labels, spans.student, mean, self.vocab_size)
        with torch.no_grad():
            other, other_rows = self._before(states, teacher, ids, spans.teacher, mean, spans.vocabulary)
        rows = max(1, (self.workspace_bytes or 1 << 30) // (COPIES * 4 * (len(head.weight) + len(teacher.weight))))
        parts = []
        for start in range(0, len(open_), rows):
            chosen = torch.from_numpy(open_[start : start + rows])
            mine, theirs, chosen = (x.to(device) for x in (own_rows[chosen], other_rows[chosen], chosen))
            arguments = (hidden[mine], head, own[chosen], states[theirs], teacher, other[chosen], spans)
            parts.append(checkpoint(self._loss, *arguments, use_reentrant=False))
        loss = torch.cat(parts) if parts else hidden.new_zeros(0, dtype=dtype)
        total = (loss * torch.from_numpy(mean[open_]).to(device, loss.dtype)).sum() + 0.0 * hidden.sum()
        shown = np.full(len(mean) + 1, np.nan, dtype=np.float32)
        shown[open_] = loss.detach().float().cpu().numpy() / spans.lengths[open_]
        return total, shown[spans.student]

    def _before(
        self,
        hidden: torch.Tensor,
        head: LMHead,
        labels: np.ndarray,
        span: np.ndarray,
        mean: np.ndarray,
        width: int | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """[S] the log-probability of all tokens of a span but its last, and int64 [S] the row of that one."""
        count, last = len(mean), _last(span)
        early = np.flatnonzero((span >= 0) & ~np.isin(np.arange(len(span)), last) & (np.append(mean, 0.0)[span] != 0))
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        sums = hidden.new_zeros(count, dtype=dtype)
        if len(early):
            rows = torch.from_numpy(early).to(hidden.device)
            chosen = torch.from_numpy(labels[early]).to(hidden.device)
            options = {"temperature": self.temperature, "workspace_bytes": self.workspace_bytes, "vocab_size": width}
            found = linear_logprob(hidden.index_select(0, rows), head, chosen, **options).logprob  # type: ignore[arg-type]
            sums = sums.index_add(0, torch.from_numpy(span[early]).to(hidden.device), found.to(dtype))
        return sums, torch.from_numpy(last)

    def _loss(
        self, hidden: torch.Tensor, head: LMHead, before: torch.Tensor,
        states: torch.Tensor, teacher: LMHead, their_before: torch.Tensor, spans: Spans,
    ) -> torch.Tensor:  # fmt: skip
        """[n] of n spans, from the states that predict the last token of each."""
        own = self._merged(hidden, head.to(hidden.dtype), before, self.vocab_size)
        with torch.no_grad():
            theirs = self._merged(states, teacher, their_before, spans.vocabulary).to(own.dtype)
        if not self.settings.uld_use_hybrid_loss:
            return sorted_distance(own.exp(), theirs.exp())
        pairs = torch.from_numpy(spans.pairs).to(hidden.device)
        matched = divergence(self.divergence, own[:, pairs[0]], theirs[:, pairs[1]], self.beta)
        unmatched = sorted_distance(_without(own, pairs[0]).exp(), _without(theirs, pairs[1]).exp())
        share = pairs.shape[1] / max(spans.vocabulary, 1)
        one, other = self.settings.uld_hybrid_matched_weight, self.settings.uld_hybrid_unmatched_weight
        return (share if one is None else one) * matched + (1 - share if other is None else other) * unmatched

    def _merged(self, hidden: torch.Tensor, head: LMHead, before: torch.Tensor, width: int | None) -> torch.Tensor:
        """[n, V] the log-probabilities of spans that end with each token."""
        logits = head.logits(hidden)[:, :width].to(before.dtype) / self.temperature
        return logits.log_softmax(-1).clamp(min=LEAST) + before[:, None]


def divergence(kind: str, own: torch.Tensor, theirs: torch.Tensor, beta: float) -> torch.Tensor:
    """[n] from log-probabilities [n, V] that need not sum to 1, summed as they are.

    Raises:
        ValueError: there is no such divergence between spans.
    """

    def kl(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        return (one.exp() * (one - other)).sum(-1)

    if kind == "reverse_kl":
        return kl(own, theirs)
    if kind == "forward_kl":
        return kl(theirs, own)
    if kind != "jsd":
        raise ValueError(f"{kind!r} is not possible over spans of two tokenizers; use reverse_kl, forward_kl or jsd")
    middle = torch.logaddexp(own + float(np.log1p(-beta)), theirs + float(np.log(beta)))
    return beta * kl(theirs, middle) + (1 - beta) * kl(own, middle)


def sorted_distance(own: torch.Tensor, theirs: torch.Tensor) -> torch.Tensor:
    """[n]: the sum of the differences between both sides' probabilities, each from large to small (ULD, equation 6).

    Where one side has none there is nothing to compare.
    """
    if not own.shape[1] or not theirs.shape[1]:
        return own.sum(-1) * 0.0
    width = max(own.shape[1], theirs.shape[1])
    one, other = (
        torch.nn.functional.pad(side.sort(dim=-1, descending=True).values, (0, width - side.shape[1]))
        for side in (own, theirs)
    )
    return (one - other).abs().sum(-1)


def _without(values: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    keep = torch.ones(values.shape[1], dtype=torch.bool, device=values.device)
    keep[columns] = False
    return values[:, keep]


def _last(span: np.ndarray) -> np.ndarray:
    """int64 [S]: the last token of every span."""
    places = np.flatnonzero(span >= 0)
    found = np.zeros(int(span.max(initial=-1)) + 1, dtype=np.int64)
    found[span[places]] = places  # later ones overwrite earlier ones
    return found


def _states(sample: Sample, k: int) -> torch.Tensor:
    targets = sample.teacher_targets[k]
    assert isinstance(targets, Hidden), "whole distributions come from a teacher that judges by hidden states"
    return targets.states
