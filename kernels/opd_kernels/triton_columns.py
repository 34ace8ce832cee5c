"""What samples columns on a GPU: launches of the kernels of ``columns``. Symbols as there.

Every buffer is float32 and has rows that are a multiple of ``ALIGNMENT`` elements long, except dZ [c, k] in the dtype
of the products' operands. Each function stands for torch operations of ``sampling`` or ``sampled``.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from . import columns, rows
from .chunk import Chunk
from .chunking import ALIGNMENT
from .splitmix import WORD, signed
from .triton_impl import TritonRowOps, device_of

ROUNDS = 64
"""Most rounds of ``inclusion_kernel``, which ends before them when no further column becomes certain."""


def squares_of_p(ops: TritonRowOps, chunk: Chunk, factor: Tensor, block_rows: int) -> Tensor:
    """[B, V rounded up] sums of ``factor`` [c] p^2 for every ``block_rows`` rows, whose statistics are known."""
    return ops.squares_of_blocks(chunk, factor, block_rows)


def squares_of_dz(dz: Tensor, block_rows: int) -> Tensor:
    """[B, V rounded up] sums of squares of the columns of ``dz`` [c, V], for every ``block_rows`` rows."""
    count, vocab = dz.shape
    blocks, parts = triton.cdiv(count, block_rows), triton.cdiv(min(block_rows, count), rows.ROWS)
    splits = triton.cdiv(vocab, rows.BLOCK)
    partial = torch.empty(blocks, parts, splits * rows.BLOCK, dtype=torch.float32, device=dz.device)
    with device_of(dz):
        columns.dz_squares_kernel[(blocks * parts * splits,)](
            dz,
            partial,
            count,
            splits,
            vocab,
            dz.stride(0) // ALIGNMENT,
            block_rows,
            parts,
            ROWS=rows.ROWS,
            BLOCK=rows.BLOCK,
            **rows.options(0),
        )
    return partial.sum(1)


@dataclass(frozen=True)
class Drawn:
    """``columns`` [B, k] int64, ``inverse`` [B, k] their 1 / pi or 0, ``known`` [B, V] the same at every column, and
    ``counts`` [B, splits] int32 of the drawn ones."""

    columns: Tensor
    inverse: Tensor
    known: Tensor
    counts: Tensor


def seed_on_device(seed: int, device: torch.device) -> Tensor:
    """Filled there, so that the host does not wait."""
    return torch.full((1,), signed(seed & WORD), dtype=torch.int64, device=device)


def draw(
    score: Tensor,
    vocab: int,
    budget: float,
    seed: Tensor,
    start: int,
    block_rows: int,
    first: int,
    most: int,
    labels: Tensor | None = None,
    table: Tensor | None = None,
) -> Drawn:
    """As ``Sampler.draw``, for all blocks at once, in float64 but for the scores.

    Args:
        score: [B, V rounded up] of the columns of every block, dense; 0 in columns that do not exist.
        budget: expected number of drawn columns.
        seed: from ``seed_on_device``.
        start: computed row that names the first block; the others follow ``block_rows`` later.
        first: global id of column 0.
        most: places for drawn columns, a multiple of ``ALIGNMENT``.
        labels: [c] int64 columns or -1, drawn in any case where LABEL_SCALE in ``table`` [FIELDS, c] is not 0.
    """
    blocks, device, stride = score.shape[0], score.device, score.shape[1] // ALIGNMENT
    assert score.is_contiguous() and score.shape[1] % ALIGNMENT == 0 and most % ALIGNMENT == 0
    splits = triton.cdiv(-(-vocab // ALIGNMENT) * ALIGNMENT, rows.BLOCK)
    factor = torch.full((blocks,), budget, dtype=torch.float64, device=device)
    known = torch.empty_like(score)
    counts = torch.empty(blocks, splits, dtype=torch.int32, device=device)
    found = torch.zeros(blocks, most, dtype=torch.int64, device=device)
    inverse = torch.zeros(blocks, most, dtype=torch.float32, device=device)
    forced = score
    with device_of(score):
        columns.inclusion_kernel[(blocks,)](
            score,
            factor,
            vocab,
            stride,
            ROUNDS=ROUNDS,
            TILES=triton.cdiv(vocab, columns.SWEEP),
            BLOCK=columns.SWEEP,
            num_warps=columns.SWEEP_WARPS,
        )
        if labels is not None:
            assert table is not None
            forced = torch.zeros(score.shape, dtype=torch.int8, device=device)
            columns.mark_kernel[(triton.cdiv(labels.numel(), 128),)](
                labels, table, forced, labels.numel(), block_rows, table.stride(0), stride, BLOCK=128, num_warps=4
            )
        columns.keep_kernel[(blocks * splits,)](
            score,
            factor,
            forced,
            seed,
            known,
            counts,
            start,
            block_rows,
            first,
            splits,
            vocab,
            stride,
            FORCED=labels is not None,
            BLOCK=rows.BLOCK,
            num_warps=4,
        )
        columns.compact_kernel[(blocks * splits,)](
            known,
            counts,
            found,
            inverse,
            most // ALIGNMENT,
            splits,
            vocab,
            stride,
            SPLITS=triton.next_power_of_2(splits),
            BLOCK=rows.BLOCK,
            num_warps=4,
        )
    return Drawn(found, inverse, known, counts)


def pick(
    chunk: Chunk, column: Tensor, inverse: Tensor, total: Tensor, gap: Tensor, single: bool
) -> tuple[Tensor, Tensor]:
    """(z [c, k], sums [c, 4]), see ``columns.pick_kernel``; turns the teachers' logits in ``gap`` [c, k] into g.

    Args:
        chunk: the rows of a block.
        total: [c] sum of the weights of a row's teachers.
        single: ``gap`` holds the logits of the only teacher of all rows, not a weighted sum.
    """
    count, places = gap.shape
    splits = triton.cdiv(places, columns.PLACES)
    z = torch.empty_like(gap)
    partial = gap.new_empty(count, 4, splits)
    with device_of(gap):
        columns.pick_kernel[(count * splits,)](
            chunk.logits,
            chunk.table,
            column,
            inverse,
            total,
            z,
            gap,
            partial,
            places // ALIGNMENT,
            splits,
            chunk.logits.stride(1) // ALIGNMENT,
            chunk.table.stride(1),
            SINGLE=single,
            BLOCK=columns.PLACES,
            num_warps=4,
        )
    return z, partial.sum(2)


def ratio(
    chunk: Chunk,
    column: Tensor,
    inverse: Tensor,
    factor: Tensor,
    z: Tensor,
    gap: Tensor,
    sums: Tensor,
    operand: torch.dtype,
    softcap: float | None,
    label_term: bool,
    bias: bool,
) -> tuple[Tensor, Tensor]:
    """(dZ [c, k] in dtype ``operand``, sums over the rows [2, k] or with ``bias`` [3, k]), see ``ratio_kernel``.

    Args:
        factor: [c] squares of what the rows of dZ are multiplied with.
        z, gap, sums: from ``pick``, ``sums`` over all shards.
    """
    count, places = gap.shape
    splits, parts = triton.cdiv(places, columns.PLACES), triton.cdiv(count, columns.ROWS)
    out = torch.empty(count, places, dtype=operand, device=gap.device)
    partial = gap.new_empty(parts, 3 if bias else 2, places)
    with device_of(gap):
        columns.ratio_kernel[(parts * splits,)](
            z,
            gap,
            sums,
            chunk.table,
            column,
            inverse,
            factor,
            chunk.labels if label_term else chunk.table,
            out,
            partial,
            1.0 if softcap is None else softcap,
            count,
            places // ALIGNMENT,
            splits,
            chunk.table.stride(1),
            LABELS=label_term,
            CAP=softcap is not None,
            BIAS=bias,
            ROWS=columns.ROWS,
            BLOCK=columns.PLACES,
            num_warps=4,
        )
    return out, partial.sum(0)


def scaled(dz: Tensor, column: Tensor, inverse: Tensor, operand: torch.dtype) -> tuple[Tensor, Tensor]:
    """(drawn columns of ``dz`` [c, V] divided by pi, [c, k] in dtype ``operand``; sums of their squares times 1 - pi,
    [1, k])."""
    count, places = dz.shape[0], column.numel()
    splits, parts = triton.cdiv(places, columns.PLACES), triton.cdiv(count, columns.ROWS)
    out = torch.empty(count, places, dtype=operand, device=dz.device)
    partial = inverse.new_empty(parts, 1, places)
    with device_of(dz):
        columns.scaled_kernel[(parts * splits,)](
            dz,
            column,
            inverse,
            out,
            partial,
            count,
            places // ALIGNMENT,
            splits,
            dz.stride(0) // ALIGNMENT,
            ROWS=columns.ROWS,
            BLOCK=columns.PLACES,
            num_warps=4,
        )
    return out, partial.sum(0)


def take(weight: Tensor, column: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(rows ``column`` [n] of ``weight`` [V, d] in ``dtype``, their squared 2-norms [n] in float32)."""
    count, width = column.numel(), weight.shape[1]
    out = torch.empty(count, width, dtype=dtype, device=weight.device)
    sizes = torch.empty(count, dtype=torch.float32, device=weight.device)
    with device_of(weight):
        columns.take_kernel[(count,)](
            weight,
            column,
            out,
            sizes,
            weight.stride(0),
            width,
            TILES=triton.cdiv(width, columns.WIDTH),
            BLOCK=columns.WIDTH,
            num_warps=4,
        )
    return out, sizes


def add_rows(own: Tensor, column: Tensor, inverse: Tensor, weight: Tensor) -> Tensor:
    """Add ``own`` [n, d] to rows ``column`` of ``weight`` [V, d], both float32; returns the squared 2-norms of what was
    added times 1 - pi, [n]. Nothing is added at places whose ``inverse`` is 0."""
    count, width = own.shape
    sizes = torch.empty(count, dtype=torch.float32, device=own.device)
    tiles = triton.cdiv(width, columns.WIDTH)
    with device_of(own):
        columns.add_rows_kernel[(count,)](
            own, column, inverse, weight, sizes, width, TILES=tiles, BLOCK=columns.WIDTH, num_warps=4
        )
    return sizes
