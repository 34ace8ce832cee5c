"""The student's head split by vocabulary: every rank judges the rows of all ranks on its own part.

Instead of gathering the head [V, d] and reducing its gradient, the ranks gather the hidden states of a
micro-batch. No rank needs a whole head of the student for the update, nor its gradient, and the products
are the same ones, shared differently. It pays where V is large beside the tokens of a micro-batch, and
less with tied embeddings, whose matrix is still gathered to look the tokens up.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import distributed as dist

from opdengine.distributed import Ranks
from opdengine.loss.objective import Item, Objective
from opdengine.loss.statistics import Tally
from opdengine.models.backbone import Backbone, Head
from opdengine.training.optimizer_step import LossOf
from opdengine.types import Hidden, TeacherTargets


@dataclass(frozen=True)
class VocabParallel:
    """What the ranks exchange for a loss over a split vocabulary.

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
        tally: Tally,
        check: Callable[[torch.Tensor, Head, Sequence[Item]], None],
    ) -> LossOf:
        """The loss of a micro-batch of all ranks, for a student whose head is split; all ranks call it.

        Args:
            objective: with whole heads.
            student: has its rows of the head.
            tally: of the first rank, which collects the statistics of all.
            check: told the joined rows, this rank's rows of the head and the joined items.
        """
        own = self._rows_of(objective.heads, student.head_rows)
        objective = replace(objective, heads=own, group=self.group)
        kept = tally if self.ranks.is_first else Tally()

        def loss_of(hidden: torch.Tensor, members: Sequence[Item]) -> torch.Tensor:
            rows, everyone = self._join(hidden, members, own)
            head = student.head_rows
            check(rows, head, everyone)
            loss = objective(rows, head, everyone, kept)
            # Every rank has the whole value and its own part of the gradient.
            return loss - loss.detach() * (1 - 1 / self.ranks.world_size)

        return loss_of

    def _rows_of(self, heads: Mapping[str, Head], student: Head) -> dict[str, Head]:
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

    def _join(self, hidden: torch.Tensor, items: Sequence[Item], heads: Mapping[str, Head]) -> tuple[Any, list[Item]]:
        """Rows and items of all ranks, by rank; all ranks call this.

        Args:
            hidden: [T, d] of this rank's items; gradients of the joined rows come back to it as they are.
            items: of this rank, possibly none.
            heads: of the teachers that judge by hidden states.

        Returns:
            The rows [sum of T, d], and the items with all teachers' hidden states.
        """
        parts = self.ranks.gather([_without_states(item) for item in items])
        counts = [sum(len(item.rollout.targets) for item in part) for part in parts]
        rows = _JoinRows.apply(hidden, counts, self.ranks.rank)
        states = {name: self._states(name, head, items, parts, hidden.device) for name, head in heads.items()}
        joined = []
        for item in (item for part in parts for item in part):
            targets: list[TeacherTargets] = list(item.targets)
            for k, name in enumerate(item.teachers):
                if name in states and item.targets:
                    targets[k] = Hidden(states[name].pop(0))
            joined.append(replace(item, targets=tuple(targets)))
        return rows, joined

    def _states(
        self, name: str, head: Head, items: Sequence[Item], parts: Sequence[Sequence[Item]], device: torch.device
    ) -> list[torch.Tensor]:
        """A teacher's hidden states [T_i, d_k] of all items that it judges."""
        own = [_states_of(item, name).to(device, head.weight.dtype) for item in items if _judges(name, item)]
        lengths = [[len(item.rollout.targets) for item in part if _judges(name, item)] for part in parts]
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
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:  # type: ignore[override]
        return gradient[ctx.own], None, None


def _without_states(item: Item) -> Item:
    """The item as it travels: hidden states go by a collective of their own."""
    nothing = Hidden(torch.zeros(0, 0))
    return replace(item, targets=tuple(nothing if isinstance(t, Hidden) else t for t in item.targets))


def _judges(name: str, item: Item) -> bool:
    return bool(item.targets) and name in item.teachers


def _states_of(item: Item, name: str) -> torch.Tensor:
    targets = item.targets[item.teachers.index(name)]
    assert isinstance(targets, Hidden), "a teacher with a head judges by hidden states"
    return targets.states
