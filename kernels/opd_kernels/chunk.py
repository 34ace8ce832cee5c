"""What row operations work on."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Protocol

from torch import Tensor

from .problem import KL, STATS_ONLY, Head, Rule


@dataclass(frozen=True)
class Task:
    """What is to be computed for every row of a call.

    Attributes:
        rule: the divergence.
        mixture: from the mixture of a row's teachers, not the sum over them.
        full: also every statistic.
        gradient: dZ follows.
        label_term: part of the loss is -LABEL_SCALE * log p(label).
        softcap: the student's cap divided by the temperature, or None.
        first_column: global id of this process's first column.
        first_rank: this process holds the first part of the vocabulary.
    """

    rule: Rule
    mixture: bool = False
    full: bool = False
    gradient: bool = False
    label_term: bool = False
    softcap: float | None = None
    first_column: int = 0
    first_rank: bool = True

    @property
    def kind(self) -> str:
        return self.rule.kind

    @property
    def parameter(self) -> float:
        """The number in the divergence's definition."""
        return self.rule.alpha if self.rule.kind == "skew_kl" else self.rule.beta

    @property
    def one_sweep(self) -> bool:
        """Whether the statistics give the divergence; else its terms need the normalisers first."""
        return self.kind == STATS_ONLY.kind or (self.kind in KL and not self.mixture)

    def needs(self, kind: str) -> bool:
        """Whether the statistics are to give this KL of every teacher."""
        return self.full or (self.kind == kind and not self.mixture)


@dataclass(frozen=True)
class Chunk:
    """Rows whose logits are alive together and that have the same K teachers.

    Attributes:
        logits: [1 + K, c, V] of the student and of the teachers.
        table: [1 + K, FIELDS, c], see ``table``.
        labels: [c] int64 columns, -1 where the label's column is not here; or None.
        out: [c, V] where dZ goes, of any floating dtype; may be ``logits[1]`` or, without teachers,
            ``logits[0]``. None without a gradient.
    """

    logits: Tensor
    table: Tensor
    labels: Tensor | None = None
    out: Tensor | None = None

    @property
    def rows(self) -> int:
        return self.logits.shape[1]

    @property
    def teachers(self) -> int:
        return self.logits.shape[0] - 1

    def part(self, start: int, stop: int) -> Chunk:
        """Rows ``start:stop``."""
        return replace(
            self,
            logits=self.logits[:, start:stop],
            table=self.table[:, :, start:stop],
            labels=None if self.labels is None else self.labels[start:stop],
            out=None if self.out is None else self.out[start:stop],
        )


class RowOps(Protocol):
    """Operations on the logits of a chunk. Each stage fills part of the table and may overwrite logits that
    no later stage of the same rows needs."""

    def write_logits(self, head: Head, hidden: Tensor, out: Tensor, tile: Tensor | None) -> None:
        """Fill ``out`` [c, V] with the logits of ``hidden`` [c, d]; ``tile`` as in ``heads``."""

    def statistics(self, chunk: Chunk) -> None:
        """The fields up to ``MERGED`` of the columns that are here."""

    def squares(self, chunk: Chunk, factor: Tensor, out: Tensor, fresh: bool) -> None:
        """Add to ``out`` [V] the sums over the rows of ``factor`` [c] p^2; with ``fresh``, where every column is
        here, after ``statistics``."""

    def terms(self, chunk: Chunk) -> None:
        """VALUE and MEAN of the columns that are here; the statistics are those of the whole rows."""

    def gradient(self, chunk: Chunk) -> None:
        """dZ into ``chunk.out``; the table is that of the whole rows."""

    def solve(self, chunk: Chunk) -> None:
        """All stages, where every column is here."""

    def logprob_gradient(self, chunk: Chunk, entropy_scale: Tensor | None) -> None:
        """dZ of -LABEL_SCALE * log p(label) - entropy_scale * entropy, of a chunk without teachers."""
