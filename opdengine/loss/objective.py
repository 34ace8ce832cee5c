"""Token signals become one scalar. The only place where losses are normalised.

Every reduction is expressed as token weights with denominators over the whole step, and the fused
op only sums; so the loss and its gradient do not depend on how a step is cut into micro-batches.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from opd_kernels import LMHead, LogprobOutput, TeacherHead, linear_divergence, linear_logprob, topk_divergence
from opdengine.config.method_sections import GoldConfig
from opdengine.distributed import Ranks
from opdengine.loss.gold import Gold
from opdengine.loss.statistics import Statistics
from opdengine.types import Hidden, Sample, TeacherTargets, TopK

LossOf = Callable[[torch.Tensor, Sequence[Sample]], torch.Tensor]
"""(hidden states [T, d] of the samples' targets, samples) -> this process's part of the loss."""


def set_scales(samples: Sequence[Sample], mode: str, ranks: Ranks) -> None:
    """Set the loss denominators, which are those of the whole step. All processes call this.

    Args:
        samples: all kept samples of this process.
        mode: "token": 1 / all targets of the step; "sequence": 1 / (samples of the step * own targets).
        ranks: of the run.

    Raises:
        ValueError: a sample has no weights.
    """
    for sample in samples:
        if sample.kl_weight is None:
            raise ValueError(f"sample {sample.id!r} has no kl_weight; 'weigh' sets it on every sample it keeps")
    lengths = ranks.join([len(sample.target_ids) for sample in samples])
    for sample in samples:
        own = len(lengths) * max(len(sample.target_ids), 1) if mode == "sequence" else max(sum(lengths), 1)
        sample.scale = 1 / own


@dataclass(frozen=True)
class Objective:
    """The loss of a micro-batch.

    Args:
        heads: the heads of the teachers that judge by hidden states, by name.
        divergence_of: divergence for a routing key.
        jsd_beta: weight of the teacher in the middle of the JSD.
        skew_alpha: weight of the teacher in the middle of the skew KL.
        teacher_reduction: "sum" of divergences or divergence to the "mixture" of teachers.
        temperature: divides both sides' logits in the divergence; log p(target) is the model's own.
        vocab_size: valid leading columns of every head.
        impl, workspace_bytes: of the fused op.
        vocab_sample: share of the columns from which gradients of exact divergences are computed; 0 is all.
        draw: names the draw of the columns; another one in every step.
        group: process group over which all heads are split by vocabulary, or None.
        gold: how teachers with another tokenizer are compared.
    """

    heads: dict[str, LMHead]
    divergence_of: Callable[[str], str]
    jsd_beta: float = 0.5
    skew_alpha: float = 0.1
    teacher_reduction: str = "sum"
    temperature: float = 1.0
    vocab_size: int | None = None
    impl: str = "auto"
    workspace_bytes: int | None = None
    vocab_sample: float = 0.0
    draw: str = ""
    group: Any = None
    gold: GoldConfig = field(default_factory=GoldConfig)

    def __call__(
        self, hidden: torch.Tensor, head: LMHead, samples: Sequence[Sample], statistics: Statistics | None = None
    ) -> torch.Tensor:
        """Sum of all weighted terms.

        Args:
            hidden: [T, d] student hidden states of the samples' targets, in order.
            head: the student's head.
            samples: those of the micro-batch.
            statistics: collects statistics when given.
        """
        loss = hidden.new_zeros((), dtype=torch.float32)
        starts = np.cumsum([0] + [len(sample.target_ids) for sample in samples])
        for (divergence, teachers), members in self._groups(samples).items():
            rows = torch.from_numpy(np.concatenate([np.arange(starts[i], starts[i + 1]) for i in members])).to(
                hidden.device
            )
            # index_select copies; the common case of one group needs none.
            part = hidden if len(rows) == len(hidden) else hidden.index_select(0, rows)
            chosen = [samples[i] for i in members]
            judged = bool(teachers) and any(np.any(kl_weight(sample)) for sample in chosen)
            advised = any(sample.advantage is not None and np.any(sample.advantage) for sample in chosen)
            # One pass serves both terms where they are about the same distribution.
            joined = judged and advised and self.temperature == 1.0 and bool(self._kinds(chosen)[0])
            for place, (kind, weighted) in enumerate(_by_kind(chosen, divergence) if judged else ()):
                loss = loss + self._divergence(part, head, weighted, kind, statistics, joined and not place)
            if advised and not joined:
                loss = loss + self._advantage(part, head, chosen, statistics)
        return loss

    def _groups(self, samples: Sequence[Sample]) -> dict[tuple[str, tuple[str, ...]], list[int]]:
        """Samples that share divergence and teachers go through one call."""
        groups: dict[tuple[str, tuple[str, ...]], list[int]] = {}
        for i, sample in enumerate(samples):
            divergence = self.divergence_of(sample.prompt.key) if sample.teachers else ""
            groups.setdefault((divergence, sample.teachers), []).append(i)
        # Rows keep their order within a group; a single group keeps all of them.
        return groups

    def _shape(self, divergence: str) -> dict[str, Any]:
        """The parameter of a divergence that has one."""
        shapes = {"jsd": {"jsd_beta": self.jsd_beta}, "skew_kl": {"skew_alpha": self.skew_alpha}}
        return shapes.get(divergence, {})

    def _divergence(
        self,
        hidden: torch.Tensor,
        head: LMHead,
        samples: Sequence[Sample],
        divergence: str,
        statistics: Statistics | None,
        advised: bool,
    ) -> torch.Tensor:
        """Sum over teachers: the exact divergence to those with a head, its lower bound to the others, and spans of
        text where tokenizers differ. With ``advised`` the weighted log-probs of the targets, too."""
        exact, listed, aligned = self._kinds(samples)
        loss = hidden.new_zeros((), dtype=torch.float32)
        if exact:
            loss = loss + self._exact(hidden, head, samples, exact, divergence, statistics, advised)
        if exact and any(np.any(sample.token_mix(len(sample.teachers))[:, exact] < 0) for sample in samples):
            loss = loss + self._exact(hidden, head, samples, exact, divergence, statistics, advised=False, sign=-1)
        if listed:
            loss = loss + self._listed(hidden, head, samples, listed, divergence, statistics)
        if aligned:
            loss = loss + self._aligned(hidden, head, samples, aligned, divergence, statistics)
        return loss

    def _kinds(self, samples: Sequence[Sample]) -> tuple[list[int], list[int], list[int]]:
        """Which teachers of these samples judge exactly, by lists, and in tokens of their own."""
        names, contexts = samples[0].teachers, samples[0].contexts
        aligned = [k for k in range(len(names)) if contexts[k].spans is not None]
        same = [k for k in range(len(names)) if k not in aligned]
        exact = [k for k in same if names[k] in self.heads]
        return exact, [k for k in same if k not in exact], aligned

    def _exact(
        self,
        hidden: torch.Tensor,
        head: LMHead,
        samples: Sequence[Sample],
        exact: Sequence[int],
        divergence: str,
        statistics: Statistics | None,
        advised: bool,
        sign: int = 1,
    ) -> torch.Tensor:
        """The teachers with positive weights, or with ``sign`` -1 those with negative ones, which the op takes in the
        weights of tokens."""
        device, names = hidden.device, [samples[0].teachers[k] for k in exact]
        mixes = [sample.token_mix(len(sample.teachers))[:, exact] for sample in samples]
        teachers = []
        for k, name in zip(exact, names, strict=True):
            their = self.heads[name]
            states = [_hidden(sample.teacher_targets[k]).to(device, their.weight.dtype) for sample in samples]
            teachers.append(TeacherHead.of(torch.cat(states), their))
        weights = _tensor([advantage(sample) for sample in samples], device) if advised else None
        output = linear_divergence(
            hidden,
            head,
            teachers,
            divergence=divergence,
            **self._shape(divergence),
            teacher_reduction=self.teacher_reduction,
            mix=_tensor([np.maximum(sign * mix, 0) for mix in mixes], device),
            token_weight=_tensor([sign * kl_weight(sample) for sample in samples], device),
            labels=_labels(samples, device),
            logprob_weight=weights,
            temperature=self.temperature,
            stats=statistics is not None,
            impl=self.impl,
            workspace_bytes=self.workspace_bytes,
            vocab_size=self.vocab_size,
            vocab_sample=self.vocab_sample,
            sample_seed=self._seed(samples),
            group=self.group,
        )
        if statistics is not None and output.stats is not None:
            statistics.add_divergence(names, samples, output.stats, sign)
            statistics.add_loss(samples, sign * output.token_loss, more=sign < 0)
            if output.sampling is not None:
                statistics.add_noise(output.sampling.hidden_noise)
            if weights is not None and output.logprob is not None:
                rows = weights.nonzero().squeeze(1)
                statistics.add_logprob(samples, output.logprob[rows], rows)
        return output.loss

    def _seed(self, samples: Sequence[Sample]) -> int:
        """Of the draw for these samples, wherever they are computed."""
        text = "\n".join([self.draw, *(sample.id for sample in samples)])
        return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=7).digest(), "little")

    def _listed(
        self,
        hidden: torch.Tensor,
        head: LMHead,
        samples: Sequence[Sample],
        listed: Sequence[int],
        divergence: str,
        statistics: Statistics | None,
    ) -> torch.Tensor:
        """Teachers of which only the likeliest tokens are known; the rest is one tail bucket."""
        device = hidden.device
        loss = hidden.new_zeros((), dtype=torch.float32)
        student, head = None, head.to(hidden.dtype)
        if statistics is not None:
            with torch.no_grad():
                student = self._logprob(hidden, head, _labels(samples, device))
            if not self._kinds(samples)[0]:  # else the exact part has noted them
                statistics.add_student(samples, student.logprob, student.entropy)
        mixes = [sample.token_mix(len(sample.teachers)).astype(np.float32) for sample in samples]
        for k in listed:
            ids, logprobs = (x.to(device) for x in _lists([sample.teacher_targets[k] for sample in samples]))
            output = topk_divergence(
                hidden,
                head.weight,
                ids,
                logprobs,
                divergence=divergence,
                **self._shape(divergence),
                token_weight=_tensor([kl_weight(s) * mix[:, k] for s, mix in zip(samples, mixes, strict=True)], device),
                temperature=self.temperature,
                student_bias=head.bias,
                student_logit_scale=head.logit_scale,
                student_softcap=head.softcap,
                impl="auto" if self.impl == "triton" else self.impl,  # there is no Triton form
                workspace_bytes=self.workspace_bytes,
                vocab_size=self.vocab_size,
                group=self.group,
            )
            loss = loss + output.loss
            if statistics is not None and student is not None:
                width = head.weight.shape[0] if self.vocab_size is None else self.vocab_size
                kl = output.token_loss if divergence == "reverse_kl" else None
                statistics.add_listed(samples[0].teachers[k], logprobs, width, student.logprob, kl, samples)
                statistics.add_loss(samples, output.token_loss, k)
        return loss

    def _aligned(
        self,
        hidden: torch.Tensor,
        head: LMHead,
        samples: Sequence[Sample],
        aligned: Sequence[int],
        divergence: str,
        statistics: Statistics | None,
    ) -> torch.Tensor:
        """Teachers with another tokenizer, compared over spans of equal text."""
        loss = hidden.new_zeros((), dtype=torch.float32)
        gold = Gold(self.gold, divergence, self.jsd_beta, self.temperature, self.vocab_size, self.workspace_bytes)
        if statistics is not None and len(aligned) == len(samples[0].teachers):
            with torch.no_grad():
                student = self._logprob(hidden, head.to(hidden.dtype), _labels(samples, hidden.device))
            statistics.add_student(samples, student.logprob, student.entropy)
        for k in aligned:
            mix = [sample.token_mix(len(sample.teachers))[:, k] for sample in samples]
            weights = np.concatenate([kl_weight(s) * own for s, own in zip(samples, mix, strict=True)])
            part, tokens = gold(hidden, head, self.heads[samples[0].teachers[k]], samples, k, weights)
            loss = loss + part
            if statistics is not None:
                statistics.add_loss(samples, torch.from_numpy(tokens), k)
        return loss

    def _advantage(
        self, hidden: torch.Tensor, head: LMHead, samples: Sequence[Sample], statistics: Statistics | None
    ) -> torch.Tensor:
        """Sum of -advantage * log p(target); only tokens that have an advantage go through the head."""
        device = hidden.device
        weights = _tensor([advantage(sample) for sample in samples], device)
        labels = _labels(samples, device)
        rows = None
        if not bool((weights != 0).all()):
            rows = weights.nonzero().squeeze(1)
            hidden, labels, weights = hidden.index_select(0, rows), labels[rows], weights[rows]
        logprob = self._logprob(hidden, head, labels).logprob
        if statistics is not None:
            statistics.add_logprob(samples, logprob.detach(), rows)
        return -(weights * logprob).sum()

    def _logprob(self, hidden: torch.Tensor, head: LMHead, labels: torch.Tensor) -> LogprobOutput:
        return linear_logprob(
            hidden,
            head,
            labels,
            impl=self.impl,
            workspace_bytes=self.workspace_bytes,
            vocab_size=self.vocab_size,
            group=self.group,
        )


def _by_kind(samples: Sequence[Sample], divergence: str) -> list[tuple[str, Sequence[Sample]]]:
    """Each divergence that some of these tokens have, and the samples with weight on these tokens alone.

    Args:
        samples: of one group.
        divergence: of tokens for which none was chosen.
    """
    kinds = [
        np.full(len(s.target_ids), divergence) if s.divergence_kind is None else s.divergence_kind for s in samples
    ]
    found = sorted({str(kind) for own in kinds for kind in own})
    if len(found) == 1:
        return [(found[0], samples)]
    parts: list[tuple[str, Sequence[Sample]]] = []
    for kind in found:
        copies = [copy.copy(sample) for sample in samples]
        for sample, own in zip(copies, kinds, strict=True):
            assert sample.kl_weight is not None
            sample.kl_weight = np.where(own == kind, sample.kl_weight, 0)
        parts.append((kind, copies))
    return parts


def kl_weight(sample: Sample) -> np.ndarray:
    """float32 [T]: the divergence's weight with the loss denominator in it."""
    assert sample.kl_weight is not None
    weight: np.ndarray = (sample.kl_weight * sample.scale).astype(np.float32)
    return weight


def advantage(sample: Sample) -> np.ndarray:
    """[T]: the weight of log p(target) with the loss denominator in it; 0 where there is none."""
    if sample.advantage is None:
        return np.zeros(len(sample.target_ids))
    weight: np.ndarray = sample.advantage * sample.scale
    return weight


def _tensor(arrays: Sequence[np.ndarray], device: torch.device) -> torch.Tensor:
    return torch.from_numpy(np.concatenate(arrays).astype(np.float32)).to(device)


def _labels(samples: Sequence[Sample], device: torch.device) -> torch.Tensor:
    return torch.from_numpy(np.concatenate([sample.target_ids for sample in samples])).to(device)


def _hidden(targets: TeacherTargets) -> torch.Tensor:
    assert isinstance(targets, Hidden), "a teacher with a head judges by hidden states"
    return targets.states


def _lists(targets: Sequence[TeacherTargets]) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and log-probs [T, k] of several contexts; every row keeps all that it lists."""
    lists = [t for t in targets if isinstance(t, TopK)]
    assert len(lists) == len(targets), "a teacher without a head judges by log-probs"
    width = max(t.ids.shape[1] for t in lists)
    wide = [t.widened(width) for t in lists]
    ids, logprobs = np.concatenate([t.ids for t in wide]), np.concatenate([t.logprobs for t in wide])
    return torch.from_numpy(ids), torch.from_numpy(logprobs)
