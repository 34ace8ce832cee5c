"""A vocabulary split over the ranks of a process group: who holds which columns, and the two
collectives that the sharded ops use."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .types import MAX_TEACHERS

# The name since torch 2.13, and the one before.
all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


@dataclass(frozen=True)
class Shards:
    """Columns ``offsets[r]:offsets[r + 1]`` of the vocabulary lie on rank r.

    Attributes:
        group: the process group.
        rank: this process in it.
        offsets: R + 1 global ids; the last one is the number of valid columns.
    """

    group: Any
    rank: int
    offsets: tuple[int, ...]

    @property
    def vocab(self) -> int:
        """Valid columns of all ranks."""
        return self.offsets[-1]

    @property
    def start(self) -> int:
        """Global id of this rank's first column."""
        return self.offsets[self.rank]

    @property
    def local(self) -> int:
        """Valid columns of this rank."""
        return self.offsets[self.rank + 1] - self.start

    @property
    def widest(self) -> int:
        """Valid columns of the rank that has most: chunk sizes follow from it, equal on all
        ranks."""
        return max(stop - start for start, stop in zip(self.offsets, self.offsets[1:], strict=False))

    def gather(self, values: Tensor) -> Tensor:
        """[R, ...] the ``values`` of every rank; one collective."""
        return gather_from(self.group, values)

    def sum_(self, values: Tensor) -> Tensor:
        """Sum ``values`` over the ranks, in place; one collective."""
        dist.all_reduce(values, group=self.group)
        return values

    def localise(self, labels: Tensor) -> tuple[Tensor, Tensor]:
        """(column of this shard for every global id, whether the id is here); 0 where it is not."""
        columns = labels - self.start
        here = (columns >= 0) & (columns < self.local)
        return torch.where(here, columns, 0), here


def check_group(group: object) -> bool:
    """Whether ``group`` splits the vocabulary over more than one process."""
    if group is None:
        return False
    if not dist.is_available() or not isinstance(group, dist.ProcessGroup):
        raise ValueError(
            f"group is {type(group).__name__}: pass a torch.distributed.ProcessGroup, for example dist.group.WORLD or "
            "device_mesh.get_group('tp'), or None"
        )
    if dist.get_rank(group) < 0:
        raise ValueError("this process is not a member of group: call the op on the members only")
    return dist.get_world_size(group) > 1


def gather_from(group: Any, values: Tensor) -> Tensor:
    """[R, ...] the ``values`` of every rank of ``group``."""
    values = values.contiguous()
    out = values.new_empty(dist.get_world_size(group), *values.shape)
    all_gather(out.flatten(0, 1), values, group=group)
    return out


def make_shards(
    group: Any, widths: Sequence[int], vocab_size: int | None, rows: int, settings: object, device: torch.device
) -> Shards:
    """Agree on the split: one collective of a few integers per call.

    Args:
        group: the process group.
        widths: vocabulary rows of this rank's shard of the student's weight and of every
            teacher's.
        vocab_size: valid columns of all ranks together, or None for all of them.
        rows: tokens.
        settings: everything else that must be the same on every rank; compared by its ``repr``.
        device: where the collectives run.

    Raises:
        ValueError: on every rank, when the ranks disagree or the shards of the heads do not hold
            the same columns.
    """
    padding = [0] * (MAX_TEACHERS + 1 - len(widths))
    mine = [rows, len(widths) - 1, zlib.crc32(repr(settings).encode()), *widths, *padding]
    everyone = gather_from(group, torch.tensor(mine, dtype=torch.int64, device=device)).tolist()
    for place, name in enumerate(("rows", "teachers")):
        values = [header[place] for header in everyone]
        if len(set(values)) > 1:
            raise ValueError(f"the ranks of group disagree on the number of {name}, {values}: pass the same everywhere")
    if len({header[2] for header in everyone}) > 1:
        raise ValueError(
            "the ranks of group disagree on an option, a dtype, a hidden size or on which tensors require a gradient: "
            f"pass the same everywhere; here {settings!r}"
        )
    table = [header[3 : 3 + len(widths)] for header in everyone]
    return Shards(group, dist.get_rank(group), column_offsets(table, vocab_size))


def column_offsets(table: Sequence[Sequence[int]], vocab_size: int | None) -> tuple[int, ...]:
    """Offsets of the ranks' valid columns.

    Args:
        table: [R][1 + K] vocabulary rows of every head's shard on every rank.
        vocab_size: valid columns, or None when the heads have no padding.

    Raises:
        ValueError: the shards of two heads hold different columns, or too few.
    """
    totals = [sum(column) for column in zip(*table, strict=True)]
    if vocab_size is None and len(set(totals)) > 1:
        raise ValueError(
            f"the heads have different vocabulary widths over all ranks, student {totals[0]}, teachers {totals[1:]}: "
            "pass vocab_size= with the number of valid columns of all ranks"
        )
    vocab = min(totals) if vocab_size is None else vocab_size
    if isinstance(vocab, bool) or not isinstance(vocab, int) or not 1 <= vocab <= min(totals):
        raise ValueError(
            f"vocab_size={vocab_size!r} must be an integer in [1, {min(totals)}], the narrowest head over all ranks"
        )
    offsets = [0]
    for rank, widths in enumerate(table):
        stops = {min(offsets[-1] + width, vocab) for width in widths}
        if len(stops) > 1:
            raise ValueError(
                f"rank {rank} holds {widths[0]} vocabulary rows of the student and {list(widths[1:])} of the teachers: "
                "every rank must hold the same ids of every head; split all heads at the same boundaries (only "
                "padding beyond vocab_size may differ)"
            )
        offsets.append(stops.pop())
    return tuple(offsets)
