"""What the fused loss should take on a GPU, from counted products, bytes and instructions.

    python benchmarks/gpu/predictions.py        the table of NOTES.md

Bytes are what the row kernels have to move, instructions what the compiler makes of them for sm_90 (``COUNTED``,
held by ``tests/kernels/test_aot.py``), chunks those of ``opd_kernels.chunking``. A product takes its FLOPs at the
ceiling, or its bytes; a row kernel its bytes or its instructions; nothing overlaps.
"""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[2] / "kernels")]

import torch
from problems import KINDS, S1, S2, Shape

from opd_kernels.chunking import LARGEST_DEFAULT_BYTES, ChunkPlan, plan_chunks

COUNTED = {
    ("reverse_kl", 1): {"statistics": (41, 2.1), "gradient": (25, 1.1)},
    ("reverse_kl", 2): {"statistics": (68, 3.1), "gradient": (32, 1.1)},
    ("forward_kl", 1): {"statistics": (42, 2.1), "gradient": (24, 2.1)},
    ("forward_kl", 2): {"statistics": (64, 3.1), "gradient": (35, 3.1)},
    ("jsd", 1): {"statistics": (45, 2.1), "terms": (44, 4.2), "gradient": (34, 3.2)},
    ("jsd", 2): {"statistics": (68, 3.1), "terms": (71, 7.3), "gradient": (49, 5.3)},
}
"""(instructions, special-function instructions) of every stage for each logit of the student, by kind and teachers."""

TILE, WIDE_TILE = 128, 256
FLOAT32_RESULT = 0.96
"""Rate of a product whose result is float32 over one in half precision."""
STAGE = 1.2
"""Time of a stage over that of its bytes or instructions."""
LAUNCH = 3e-6
SMALL_LAUNCHES = 8
"""Of a chunk: gathers, the merge."""
HOST = 2e-3
"""Seconds in which the device waits for the host: before the first product, and after the last one."""


@dataclass(frozen=True)
class Device:
    """Rates of one GPU: products in half precision (FLOP/s), ``flops`` of ten in a row and ``sustained`` while it draws
    all the power it may; memory (bytes/s), clock of its multiprocessors then."""

    name: str
    flops: float = 790e12
    sustained: float = 690e12
    memory: float = 3.0e12
    clock: float = 1.53e9
    multiprocessors: int = 132


H100, H200 = Device("H100"), Device("H200", memory=4.3e12)


def plan(shape: Shape, budget: int = LARGEST_DEFAULT_BYTES) -> ChunkPlan:
    return plan_chunks(
        rows=shape.rows,
        vocab=shape.vocab,
        hidden_sizes=(shape.width, *shape.teachers),
        buffers=1 + len(shape.teachers),
        scratch_tiles=0,
        upcast=False,
        half_gradient=True,
        dtype=torch.float32,
        device=torch.device("cuda"),
        workspace_bytes=budget,
    )


def product(device: Device, rows: int, columns: int, inner: int, result_bytes: int) -> float:
    """Seconds of a product; the last wave of tiles is as long as a full one."""
    tiles = math.ceil(rows / TILE) * math.ceil(columns / WIDE_TILE)
    waves = math.ceil(tiles / device.multiprocessors) * device.multiprocessors / tiles
    padded = math.ceil(rows / TILE) * TILE / rows
    rate = device.sustained * (FLOAT32_RESULT if result_bytes == 4 else 1.0)
    moved = 2 * inner * (rows + columns) + result_bytes * rows * columns
    return max(2 * rows * columns * inner / rate * max(padded, waves), moved / device.memory)


def row_work(device: Device, shape: Shape, kind: str) -> float:
    """Seconds of the row kernels over all rows."""
    logits, read = shape.rows * shape.vocab, 4 * (1 + len(shape.teachers))
    lanes, total = device.multiprocessors * device.clock, 0.0
    for stage, (instructions, special) in COUNTED[kind, len(shape.teachers)].items():
        moved = (read + 2 * (stage == "gradient")) * logits / device.memory
        total += STAGE * max(moved, instructions * logits / (128 * lanes), special * logits / (16 * lanes))
    return total


def seconds(device: Device, shape: Shape, kind: str, budget: int = LARGEST_DEFAULT_BYTES) -> float:
    """Of forward and backward."""
    sizes = plan(shape, budget)
    chunks = math.ceil(shape.rows / sizes.chunk_rows)
    total = HOST + row_work(device, shape, kind) + chunks * (SMALL_LAUNCHES + 2 * len(shape.teachers)) * LAUNCH
    for width in (shape.width, *shape.teachers):
        total += chunks * product(device, shape.rows // chunks, shape.vocab, width, 4)
    blocks = math.ceil(shape.rows / sizes.gradient_rows)
    total += blocks * product(device, shape.rows // blocks, shape.width, shape.vocab, 4)
    total += blocks * product(device, shape.vocab, shape.width, shape.rows // blocks, 2 if blocks == 1 else 4)
    if blocks > 1:  # the accumulator is read, too, and rounded at the end
        weight = shape.vocab * shape.width
        total += (4 * (blocks - 1) + 6) * weight / device.memory
    return total


def floor(device: Device, shape: Shape) -> float:
    return shape.flops / device.flops


def table() -> list[str]:
    """Milliseconds and shares of the floor, as Markdown."""
    out = ["| case | floor, ms | H100, ms | of the floor | H200, ms | of the floor |", "|---|---:|---:|---:|---:|---:|"]
    for shape in (S1, S2):
        for kind in KINDS:
            cells = [f"{1e3 * floor(H100, shape):.1f}"]
            for device in (H100, H200):
                time = seconds(device, shape, kind)
                cells += [f"{1e3 * time:.1f}", f"{100 * floor(device, shape) / time:.0f} %"]
            out.append(f"| {shape.name} {kind} | " + " | ".join(cells) + " |")
    return out


if __name__ == "__main__":
    print("\n".join(table()))
