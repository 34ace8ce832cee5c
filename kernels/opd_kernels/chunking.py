"""From a byte budget to chunk sizes.

Everything the drivers allocate besides outputs and gradients is counted: the [c, V] buffers, the
scratch of the row sweeps, gathered hidden states and up-cast tiles of a weight. Not counted,
because it holds a gradient: the float32 accumulator of a half-precision weight gradient.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

ALIGNMENT = 16
"""Elements: rows of a GPU's buffer, and blocks of columns in half precision, are padded to multiples of it."""
DEFAULT_WORKSPACE_BYTES = 1 << 30
# A sixteenth of a GPU's memory, up to this: room for the float32 logits of about 1000 rows and for dZ of 8192
# rows of a vocabulary of 150,000, so that the weight and its gradient are read and written once.
LARGEST_DEFAULT_BYTES = 4 << 30
SCRATCH_TILES = 3

# On a CPU a matrix product nears its peak at 64 rows, and a larger chunk of logits would only cost
# memory.
CPU_CHUNK_ROWS = 64
CPU_CHUNK_ELEMENTS = 10 << 20
# Rows of a chunk on a GPU are a multiple of this: a matrix product works on tiles of 64 or 128 rows, and
# one that is only partly filled costs as much as a full one.
CUDA_TILE_ROWS = 64
# Rows of a chunk that must fit beside a dZ of all rows.
WHOLE_CHUNK_ROWS = 512
# Weight or result of one block of a CPU's matrix product, see ``cpu_gemm``.
PRODUCT_BLOCK_BYTES = 8 << 20
# From logits of this size on, 32 rows of a vocabulary of 32,768, such blocks pay.
LARGE_BYTES = 4 << 20
# Elements of one row-sweep tile: on a CPU small enough to stay in the last-level cache between
# sweeps.
TILE_ELEMENTS = {"cpu": 1 << 19, "cuda": 1 << 25}
WEIGHT_TILE_BYTES = 32 << 20
ROW_OVERHEAD_BYTES = 4096


def default_workspace_bytes(device: torch.device) -> int:
    """The budget of a call that names none; the same in every call on a device."""
    if device.type != "cuda":
        return DEFAULT_WORKSPACE_BYTES
    total = torch.cuda.get_device_properties(device).total_memory
    return max(DEFAULT_WORKSPACE_BYTES, min(LARGEST_DEFAULT_BYTES, total // 16))


@dataclass(frozen=True)
class ChunkPlan:
    """Sizes of one pass.

    Attributes:
        chunk_rows: rows whose logits are alive together.
        tile_rows: rows one sweep of the torch row operations touches.
        weight_rows: vocabulary rows of a weight that are up-cast together (0: no weight is
            up-cast).
        gradient_rows: rows of dZ gathered in the weight's dtype before the gradient GEMMs (0: dZ
            stays in place).
        block_bytes: what sampled gradients may use for one block of columns.
    """

    chunk_rows: int
    tile_rows: int
    weight_rows: int
    gradient_rows: int
    block_bytes: int = 0


def plan_chunks(
    *,
    rows: int,
    vocab: int,
    hidden_sizes: tuple[int, ...],
    buffers: int,
    scratch_tiles: int,
    upcast: bool,
    half_gradient: bool,
    dtype: torch.dtype,
    device: torch.device,
    workspace_bytes: int,
    fixed_bytes: int = 0,
    block_bytes: int = 0,
    block_rows: int = 0,
) -> ChunkPlan:
    """Largest chunks whose temporaries fit ``workspace_bytes``.

    Args:
        rows: tokens to compute.
        vocab: columns of the logits, padding included.
        hidden_sizes: hidden size of every head; the widest one bounds the gathers.
        buffers: [c, V] buffers alive at once in ``dtype`` (student, teacher, accumulator).
        scratch_tiles: [tile, V] scratch buffers of the row operations.
        upcast: some weight is converted to ``dtype`` tile by tile.
        half_gradient: dZ is gathered in half precision for the gradient GEMMs.
        dtype: compute dtype.
        device: where the work runs.
        workspace_bytes: the budget.
        fixed_bytes: part of it that sampled gradients need; 0 without them.
        block_bytes: most that it may use for a block of columns, an eighth of the budget if that is
            less.
        block_rows: rows that share a sample of columns; a CPU's chunk has as many if they fit, a GPU's
            whole blocks where they are drawn from its logits.

    Raises:
        ValueError: one row does not fit; states the bytes that are needed.
    """
    item = dtype.itemsize
    widest = max(hidden_sizes)
    logits_row = buffers * vocab * item + 4 * widest * item + ROW_OVERHEAD_BYTES
    scratch_row = scratch_tiles * vocab * item
    # Besides dZ: hidden states and results in half precision, the product in ``dtype``.
    gradient_row = 2 * vocab + (4 + item) * widest if half_gradient else 0
    weight_row = widest * item if upcast else 0

    minimum = logits_row + scratch_row + gradient_row + weight_row + fixed_bytes
    blocks = min(block_bytes, workspace_bytes // 8)
    if workspace_bytes - blocks < minimum:
        raise ValueError(
            f"workspace_bytes={workspace_bytes} cannot hold one row of {vocab} logits: "
            f"pass workspace_bytes >= {minimum + min(block_bytes, minimum // 7 + 1)}"
        )

    budget = workspace_bytes - blocks - fixed_bytes
    if device.type == "cpu":
        budget -= product_block_bytes(budget)
    tile_rows = max(1, min(rows, TILE_ELEMENTS.get(device.type, 1 << 19) // vocab, budget // 8 // max(1, scratch_row)))
    budget -= tile_rows * scratch_row
    weight_rows = 0
    if upcast:
        weight_rows = max(1, min(vocab, WEIGHT_TILE_BYTES // weight_row, budget // 4 // weight_row))
        budget -= weight_rows * weight_row
    most = rows
    if device.type == "cpu":
        most = min(rows, max(CPU_CHUNK_ROWS, CPU_CHUNK_ELEMENTS // vocab, block_rows))
    step = CUDA_TILE_ROWS if device.type == "cuda" else 1
    # In half precision dZ of all rows is one block where that leaves room for chunks that fill the products
    # (the weight gradient is then one product); else it gathers about four chunks of logits.
    whole = half_gradient and budget - rows * gradient_row >= min(rows, WHOLE_CHUNK_ROWS) * logits_row
    fitting = (budget - rows * gradient_row) // logits_row if whole else budget // (logits_row + 4 * gradient_row)
    largest = max(1, min(most, fitting))
    if device.type == "cuda" and not half_gradient and 0 < block_rows <= largest:
        step = block_rows
    chunk_rows = balanced(rows, largest, step)
    gradient_rows = rows if whole else 0
    if half_gradient and not whole:
        fitting = (budget - chunk_rows * logits_row) // (chunk_rows * gradient_row)
        gradient_rows = chunk_rows * max(1, min(8, fitting, -(-rows // chunk_rows)))
    return ChunkPlan(chunk_rows, tile_rows, weight_rows, gradient_rows, blocks)


def product_block_bytes(whole: int) -> int:
    """Most bytes of one block of a product on a CPU whose logits, or the budget that they must fit, have ``whole``;
    0 where blocks do not pay."""
    return 0 if whole < LARGE_BYTES else min(PRODUCT_BLOCK_BYTES, whole // 4)


def balanced(rows: int, largest: int, step: int = 1) -> int:
    """Chunk size of about as many chunks as ``largest`` gives, without a thin last one; a multiple of
    ``step`` where there are several chunks and one fits."""
    if rows <= largest:
        return rows
    largest = largest - largest % step or largest
    even = -(-rows // -(-rows // largest))
    return min(largest, -(-even // step) * step)


def spans(stop: int, step: int) -> Iterator[tuple[int, int]]:
    """(start, stop) pairs that cover ``range(stop)`` in steps of ``step``."""
    for start in range(0, stop, step):
        yield start, min(start + step, stop)
