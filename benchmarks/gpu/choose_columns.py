"""The choice of a compacted backward's columns by kernels that read dZ three times.

``opd_kernels.compaction`` chooses with plain torch operations, which read or write dZ and scratch of
its size about eleven times. Not part of the library: what that saves has to be measured.
"""

# mypy: disallow-untyped-defs=False
from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import triton
import triton.language as tl
from torch import Tensor

from opd_kernels import driver
from opd_kernels.compaction import LEVELS, Compactor
from opd_kernels.triton_impl import device_of

BLOCK = 2048
GROUPS = 16
"""Row groups whose column maxima are taken apart."""
TILE_ROWS, TILE_COLUMNS, TILES = 16, 128, 64
"""Rows, columns and column tiles of a program that adds up what thresholds drop."""
OPTIONS = {"num_warps": 4}


@triton.jit
def locate(splits, vocab, width, BLOCK: tl.constexpr):
    """(row, block, columns [BLOCK], columns that exist in memory, columns of the vocabulary) of
    this program."""
    program = tl.program_id(0)
    split = program % splits
    cols = split * BLOCK + tl.arange(0, BLOCK)
    return (program // splits).to(tl.int64), split, cols, cols < width, cols < vocab


@triton.jit
def mass_kernel(dz_ptr, partial_ptr, splits, vocab, width, stride, BLOCK: tl.constexpr):
    """Sums of abs(dZ) of one block of columns of one row."""
    row, split, cols, stored, valid = locate(splits, vocab, width, BLOCK)
    x = tl.load(dz_ptr + row * stride + cols, mask=stored, other=0.0).to(tl.float32)
    tl.store(partial_ptr + row * splits + split, tl.sum(tl.where(valid, tl.abs(x), 0.0), 0))


@triton.jit(do_not_specialize=["rows"])
def score_kernel(
    dz_ptr, inverse_ptr, out_ptr, rows, vocab, width, stride, out_stride, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    """Column maxima of abs(dZ) / mass over ROWS rows."""
    cols = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    group = tl.program_id(1)
    best = tl.zeros((BLOCK,), dtype=tl.float32)
    for i in range(ROWS):
        row = tl.minimum(group * ROWS + i, rows - 1).to(tl.int64)  # the last one again does no harm
        x = tl.load(dz_ptr + row * stride + cols, mask=cols < width, other=0.0).to(tl.float32)
        best = tl.maximum(best, tl.abs(x) * tl.load(inverse_ptr + row))
    tl.store(out_ptr + group * out_stride + cols, best, mask=cols < vocab)


@triton.jit(do_not_specialize=["rows"])
def dropped_kernel(
    dz_ptr,
    below_ptr,
    partial_ptr,
    rows,
    vocab,
    width,
    stride,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    TILES: tl.constexpr,
    LEVELS: tl.constexpr,
):
    """abs(dZ) times ``below`` [LEVELS, V]: what each threshold drops of ROWS rows in TILES tiles of columns."""
    row, level = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, LEVELS)
    first = tl.program_id(1) * TILES * COLUMNS
    line = dz_ptr + row.to(tl.int64)[:, None] * stride
    total = tl.zeros((ROWS, LEVELS), dtype=tl.float32)
    for i in range(TILES):
        cols = first + i * COLUMNS + tl.arange(0, COLUMNS)
        there = (row < rows)[:, None] & (cols < width)[None, :]
        x = tl.abs(tl.load(line + cols[None, :], mask=there, other=0.0).to(tl.float32))
        x = tl.where((cols < vocab)[None, :], x, 0.0)
        below = tl.load(below_ptr + level[None, :] * vocab + cols[:, None], mask=(cols < vocab)[:, None], other=0)
        # Exact: dZ is bfloat16, the other factor 0 or 1.
        total = tl.dot(x, below.to(tl.float32), total, input_precision="tf32")
    place = partial_ptr + (tl.program_id(1) * rows + row)[:, None].to(tl.int64) * LEVELS + level[None, :]
    tl.store(place, total, mask=(row < rows)[:, None])


class FusedCompactor(Compactor):
    """As ``Compactor``, for bfloat16 dZ whose rows start at multiples of 16 elements."""

    def _mass(self, dz: Tensor) -> Tensor:
        width = aligned(dz)
        splits = triton.cdiv(width, BLOCK)
        partial = self.dropped.new_empty(dz.shape[0], splits)
        with device_of(dz):
            mass_kernel[(dz.shape[0] * splits,)](
                dz, partial, splits, dz.shape[1], width, dz.stride(0), BLOCK=BLOCK, **OPTIONS
            )
        return partial.sum(1)

    def _score(self, dz: Tensor, mass: Tensor) -> Tensor:
        width = aligned(dz)
        inverse = torch.where(mass > 0, mass.reciprocal(), torch.zeros_like(mass))
        rows = triton.next_power_of_2(triton.cdiv(dz.shape[0], GROUPS))
        groups = triton.cdiv(dz.shape[0], rows)
        out = self.dropped.new_empty(groups, width)
        with device_of(dz):
            score_kernel[(triton.cdiv(width, BLOCK), groups)](
                dz,
                inverse,
                out,
                dz.shape[0],
                dz.shape[1],
                width,
                dz.stride(0),
                out.stride(0),
                ROWS=rows,
                BLOCK=BLOCK,
                **OPTIONS,
            )
        return out[:, : dz.shape[1]].amax(0)

    def _dropped(self, dz: Tensor, below: Tensor) -> Tensor:
        splits = triton.cdiv(dz.shape[1], TILES * TILE_COLUMNS)
        partial = self.dropped.new_empty(splits, dz.shape[0], LEVELS)
        with device_of(dz):
            dropped_kernel[(triton.cdiv(dz.shape[0], TILE_ROWS), splits)](
                dz,
                below.view(torch.uint8),
                partial,
                dz.shape[0],
                dz.shape[1],
                aligned(dz),
                dz.stride(0),
                ROWS=TILE_ROWS,
                COLUMNS=TILE_COLUMNS,
                TILES=TILES,
                LEVELS=LEVELS,
                **OPTIONS,
            )
        return partial.sum(0)


def aligned(dz: Tensor) -> int:
    """Columns that exist in memory."""
    return -(-dz.shape[1] // 16) * 16


@contextmanager
def fused_choice() -> Iterator[None]:
    """Compacted calls choose their columns with these kernels within."""
    driver.Compactor = FusedCompactor  # type: ignore[misc]
    try:
        yield
    finally:
        driver.Compactor = Compactor  # type: ignore[misc]
