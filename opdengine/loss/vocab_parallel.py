"""The student's head split by vocabulary: every rank judges the rows of all ranks on its own part.

Instead of gathering the head [V, d] and reducing its gradient, the ranks gather the hidden states of a
micro-batch. No rank needs a whole head of the student for the update, nor its gradient, and the products
are the same ones, shared differently. It pays where V is large compared with the tokens of a micro-batch, and
less with tied embeddings, whose matrix is still gathered to look the tokens up.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import distributed as dist

from opd_kernels import LMHead
from opdengine.distributed import Ranks
from opdengine.loss.objective import LossOf, Objective
from opdengine.loss.statistics import Statistics
from opdengine.models.backbone import Backbone
from opdengine.types import Hidden, Prompt, Sample, TeacherTargets, Turn


@dataclass(frozen=True)
class VocabParallel:
    """The exchange between ranks for a loss over a split vocabulary.

    Args:
        ranks: all of them hold rows of the head, in their order.
    """

    ranks: Ranks

    @property
    def group(self) -> Any:
        """The process group of the fused op."""
        return dist.group.WORLD

    def loss(
        self,
        objective: Objective,
        student: Backbone,
        statistics: Statistics,
        check: Callable[[torch.Tensor, LMHead, Sequence[Sample]], None],
    ) -> LossOf:
        """The loss of a micro-batch of all ranks, for a student whose head is split; all ranks call it.

        Args:
            objective: with whole heads.
            student: has its rows of the head.
            statistics: of the first rank, which collects the statistics of all.
            check: told the joined rows, this rank's rows of the head and the joined samples.
        """
        own = self._rows_of(objective.heads, student.head_rows)
        objective = replace(objective, heads=own, group=self.group)
        kept = statistics if self.ranks.is_first else Statistics()

        def loss_of(hidden: torch.Tensor, members: Sequence[Sample]) -> torch.Tensor:
            rows, everyone = self._join(hidden, members, own)
            head = student.head_rows
            check(rows, head, everyone)
            loss = objective(rows, head, everyone, kept)
            # Every rank has the whole value and its own part of the gradient.
            return loss - loss.detach() * (1 - 1 / self.ranks.world_size)

        return loss_of

    def _rows_of(self, heads: Mapping[str, LMHead], student: LMHead) -> dict[str, LMHead]:
        """Views of this rank's rows of whole heads.

        Args:
            heads: the teachers', each with at least the tokenizer's rows.
            student: this rank's rows of the student's head; the others' are cut at the same ids.
        """
        counts = self.ranks.gather(student.weight.shape[0])
        start = sum(counts[: self.ranks.rank])
        # What a teacher has beyond the student's rows is padding; it belongs to the last rank.
        stop = None if self.ranks.rank + 1 == self.ranks.world_size else start + counts[self.ranks.rank]
        return {
            name: replace(
                head, weight=head.weight[start:stop], bias=None if head.bias is None else head.bias[start:stop]
            )
            for name, head in heads.items()
        }

    def _join(
        self, hidden: torch.Tensor, samples: Sequence[Sample], heads: Mapping[str, LMHead]
    ) -> tuple[Any, list[Sample]]:
        """Rows and samples of all ranks, by rank; all ranks call this.

        Args:
            hidden: [T, d] of this rank's samples; gradients of the joined rows come back to it as they are.
            samples: of this rank, possibly none.
            heads: of the teachers that judge by hidden states.

        Returns:
            The rows [sum of T, d], and the samples with all teachers' hidden states.
        """
        parts = self.ranks.gather([without_tokens(sample) for sample in samples])
        counts = [sum(len(sample.target_ids) for sample in part) for part in parts]
        rows: torch.Tensor = _JoinRows.apply(hidden, counts, self.ranks.rank)  # type: ignore[no-untyped-call]
        states = {name: self._states(name, head, samples, parts, hidden.device) for name, head in heads.items()}
        joined = []
        for sample in (sample for part in parts for sample in part):
            targets: list[TeacherTargets] = list(sample.teacher_targets)
            for k, name in enumerate(sample.teachers):
                if name in states and sample.teacher_targets:
                    targets[k] = Hidden(states[name].pop(0))
            joined.append(replace(sample, teacher_targets=tuple(targets)))
        return rows, joined

    def _states(
        self,
        name: str,
        head: LMHead,
        samples: Sequence[Sample],
        parts: Sequence[Sequence[Sample]],
        device: torch.device,
    ) -> list[torch.Tensor]:
        """A teacher's hidden states [T_i, d_k] of all samples that it judges."""
        own = [_states_of(sample, name).to(device, head.weight.dtype) for sample in samples if _judges(name, sample)]
        lengths = [[len(sample.target_ids) for sample in part if _judges(name, sample)] for part in parts]
        if not any(lengths):
            return []
        rows = torch.cat(own) if own else head.weight.new_zeros(0, head.weight.shape[1], device=device)
        everyone = gather_rows(rows, [sum(part) for part in lengths])
        return list(everyone.split([length for part in lengths for length in part]))


def gather_rows(rows: torch.Tensor, counts: Sequence[int]) -> torch.Tensor:
    """[sum(counts), d] the rows of all ranks; this one has ``counts[rank]`` of them."""
    most = max(counts)
    padded = rows.new_zeros(most, *rows.shape[1:])
    padded[: len(rows)] = rows
    parts = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(parts, padded)
    return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])


class _JoinRows(torch.autograd.Function):
    """Rows of all ranks. Every rank computes the whole gradient of all rows, so each takes its own."""

    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, counts: Sequence[int], rank: int) -> torch.Tensor:
        ctx.own = slice(sum(counts[:rank]), sum(counts[: rank + 1]))
        return gather_rows(rows.detach(), counts)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return gradient[ctx.own], None, None


def without_tokens(sample: Sample) -> Sample:
    """Return the part of a sample that travels to other ranks: no prompt, and hidden states travel separately."""
    none = np.zeros(0, dtype=np.int64)
    targets = Turn("assistant", sample.target_ids, sample.sampler_logprob, trains=True)
    return Sample(
        sample.id,
        Prompt(sample.prompt.id, (), key=sample.prompt.key),
        (Turn("prompt", none), targets),
        contexts=tuple(replace(c, token_ids=none, target_positions=none, images=()) for c in sample.contexts),
        mix=sample.mix,
        teacher_targets=tuple(
            Hidden(torch.zeros(0, 0)) if isinstance(t, Hidden) else t for t in sample.teacher_targets
        ),
        kl_weight=sample.kl_weight,
        divergence_kind=sample.divergence_kind,
        advantage=sample.advantage,
        scale=sample.scale,
    )


def _judges(name: str, sample: Sample) -> bool:
    return bool(sample.teacher_targets) and name in sample.teachers


def _states_of(sample: Sample, name: str) -> torch.Tensor:
    targets = sample.teacher_targets[sample.teachers.index(name)]
    assert isinstance(targets, Hidden), "a teacher with a head judges by hidden states"
    return targets.states
