"""Sequences laid out for one forward pass: many per row, restarting positions, no cross-talk.

With variable-length attention (flash-attn) a micro-batch is one row without padding. With a
block-diagonal mask (SDPA, flex, eager) attention costs the square of the row, so sequences fill
rows of about the longest sequence instead (first-fit decreasing). Rows of one sequence each, padded on the right, need
no mask at all. A model in which sequences change each other even so reads them alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from opdengine.types import Image

LAYOUTS = ("one_row", "rows", "padded", "alone")


@dataclass(frozen=True)
class Regimes:
    """Which lengths may share a pass of a model.

    Some position encodings (LongRoPE, dynamic NTK) are chosen for a whole pass by its longest sequence.

    Args:
        switch: longest sequence that is encoded as all short ones are; None: all lengths are.
        moving: beyond it every length has an encoding of its own, instead of one for all.
    """

    switch: int | None = None
    moving: bool = False

    def of(self, length: int) -> int:
        """The regime of a sequence of this length; short ones are in regime 0."""
        if self.switch is None or length <= self.switch:
            return 0
        return length if self.moving else 1


ONE_REGIME = Regimes()


@dataclass(frozen=True)
class Packed:
    """Some of the given sequences as one model input.

    Args:
        members: indices of the sequences in this batch, in the order of their targets.
        input_ids: int64 [B, L].
        position_ids: int64 [B, L], restarting at 0 with every sequence.
        offsets: for each member, where its first token stands in the flattened input.
        lengths: for each member, its number of tokens.
        images: for each member, the pictures of its image tokens; () where no sequence has any.
    """

    members: tuple[int, ...]
    input_ids: torch.Tensor
    position_ids: torch.Tensor
    offsets: tuple[int, ...]
    lengths: tuple[int, ...] = ()
    images: tuple[tuple[Image, ...], ...] = ()

    def predictors(self, target_positions: Sequence[np.ndarray]) -> torch.Tensor:
        """int64 [T]: flattened positions whose hidden states predict the members' targets.

        ``target_positions[i]`` are the positions of the i-th member's targets in its own sequence;
        the token at position p is predicted by the hidden state at p - 1.
        """
        shifted = [
            offset + np.asarray(positions, dtype=np.int64) - 1
            for offset, positions in zip(self.offsets, target_positions, strict=True)
        ]
        return torch.from_numpy(np.concatenate(shifted))


def _fill_rows(lengths: Sequence[int], members: Sequence[int], width: int) -> list[list[int]]:
    """First-fit decreasing: few rows of at most ``width`` tokens, each sequence whole."""
    rows: list[list[int]] = []
    room: list[int] = []
    for member in sorted(members, key=lambda i: -lengths[i]):
        row = next((r for r, left in enumerate(room) if left >= lengths[member]), None)
        if row is None:
            rows.append([])
            room.append(width)
            row = len(rows) - 1
        rows[row].append(member)
        room[row] -= lengths[member]
    return rows


def split_by_tokens(
    lengths: Sequence[int], max_tokens: int, *, padded: bool = False, regimes: Regimes = ONE_REGIME
) -> list[list[int]]:
    """Group sequence indices, longest first, so that each group stays within ``max_tokens`` and one regime.

    A single sequence longer than ``max_tokens`` forms a group of its own. ``padded`` counts every
    sequence as long as the longest of its group.
    """
    groups: list[list[int]] = []
    total = 0
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        cost = lengths[groups[-1][0]] if padded and groups else lengths[i]
        mixed = bool(groups) and regimes.of(lengths[i]) != regimes.of(lengths[groups[-1][0]])
        if not groups or mixed or total + cost > max_tokens:
            groups.append([])
            total, cost = 0, lengths[i]
        groups[-1].append(i)
        total += cost
    return groups


def pack(
    sequences: Sequence[np.ndarray],
    *,
    max_tokens: int,
    layout: str = "rows",
    regimes: Regimes = ONE_REGIME,
    images: Sequence[tuple[Image, ...]] = (),
    image_layout: str = "alone",
) -> list[Packed]:
    """Lay out sequences as micro-batches of at most about ``max_tokens`` tokens each.

    Sequences with pictures are in batches of their own: what a text says can look like an image token.

    Args:
        sequences: int64 [L_i] token ids each.
        max_tokens: token budget of a micro-batch.
        layout: "one_row" (variable-length attention), "rows" (block-diagonal mask), "padded" (one
            sequence per row and no mask), "alone" (one sequence per batch).
        regimes: which lengths may be in one batch.
        images: of each sequence; () where none has any.
        image_layout: of sequences with pictures.

    Raises:
        ValueError: a sequence is empty or the layout is unknown.
    """
    if any(images):
        texts = [i for i, own in enumerate(images) if not own]
        seen = [i for i, own in enumerate(images) if own]
        batches = []
        for members, chosen in ((texts, layout), (seen, image_layout)):
            part = [sequences[i] for i in members]
            for batch in pack(part, max_tokens=max_tokens, layout=chosen, regimes=regimes):
                own = tuple(members[i] for i in batch.members)
                batches.append(replace(batch, members=own, images=tuple(images[i] for i in own if images[i])))
        return batches
    if layout not in LAYOUTS:
        raise ValueError(f"layout {layout!r} is unknown; choose one of {LAYOUTS}")
    lengths = [len(s) for s in sequences]
    if lengths and min(lengths) == 0:
        raise ValueError(f"sequence {lengths.index(0)} is empty; it has nothing to predict")
    batches = []
    budget = 1 if layout == "alone" else max_tokens
    for group in split_by_tokens(lengths, budget, padded=layout == "padded", regimes=regimes):
        if layout == "one_row":
            rows = [group]
        elif layout == "rows":
            rows = _fill_rows(lengths, group, max(lengths[i] for i in group))
        else:
            rows = [[i] for i in group]
        batches.append(_layout(sequences, rows, alone=layout in ("padded", "alone")))
    return batches


def _layout(sequences: Sequence[np.ndarray], rows: Sequence[Sequence[int]], alone: bool) -> Packed:
    width = max(sum(len(sequences[i]) for i in row) for row in rows)
    input_ids = np.zeros((len(rows), width), dtype=np.int64)
    position_ids = np.zeros((len(rows), width), dtype=np.int64)
    members: list[int] = []
    offsets: list[int] = []
    for r, row in enumerate(rows):
        start = 0
        for i in row:
            end = start + len(sequences[i])
            input_ids[r, start:end] = sequences[i]
            position_ids[r, start:end] = np.arange(end - start)
            members.append(i)
            offsets.append(r * width + start)
            start = end
        # What is left of the row changes nothing else: it is a sequence of its own, or, where every row has one
        # sequence, its continuation, which that never sees; then there is no mask to build.
        position_ids[r, start:] = np.arange(start, width) if alone else np.arange(width - start)
    return Packed(
        members=tuple(members),
        input_ids=torch.from_numpy(input_ids),
        position_ids=torch.from_numpy(position_ids),
        offsets=tuple(offsets),
        lengths=tuple(len(sequences[i]) for i in members),
    )
