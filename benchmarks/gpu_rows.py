"""Bandwidth of each sweep of the Triton row kernels, over block sizes and warps.

    PYTHONPATH=kernels python benchmarks/gpu_rows.py [--rows 512] [--vocab 151936]

Prints one JSON object per sweep and setting: milliseconds, and TB/s of the bytes the sweep has to
move. ``rows.BLOCK`` and ``rows.options`` hold the setting that the library uses.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable, Iterator
from dataclasses import replace

import torch

from opd_kernels import rows
from opd_kernels import table as fields
from opd_kernels.chunk import Chunk, Task
from opd_kernels.chunking import ALIGNMENT
from opd_kernels.problem import Rule
from opd_kernels.triton_impl import TritonRowOps

DEVICE = "cuda"
SETTINGS = [(1024, 4), (2048, 4), (2048, 8), (4096, 8), (8192, 16)]
KINDS = ("reverse_kl", "forward_kl", "jsd", "skew_kl")


def milliseconds(call: Callable[[], object], repetitions: int) -> float:
    """Median time of one call on the device."""
    for _ in range(3):
        call()
    times = []
    for _ in range(repetitions):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        stop.record()
        stop.synchronize()
        times.append(start.elapsed_time(stop))
    return statistics.median(times)


def problem(count: int, vocab: int, teachers: int, half: bool = True) -> Chunk:
    """Random logits of ``count`` rows, and where dZ goes."""
    width = -(-vocab // ALIGNMENT) * ALIGNMENT
    logits = torch.randn(1 + teachers, count, width, device=DEVICE)[..., :vocab]
    table = torch.zeros(1 + teachers, fields.FIELDS, count, device=DEVICE)
    table[1:, fields.WEIGHT], table[0, fields.SCALE] = 1.0 / max(1, teachers), 1.0
    out = torch.empty(count, width, device=DEVICE, dtype=torch.bfloat16 if half else torch.float32)[:, :vocab]
    return Chunk(logits, table, torch.arange(count, device=DEVICE) % vocab, out)


def operations(kind: str, chunk: Chunk, full: bool = False) -> TritonRowOps:
    return TritonRowOps(Task(Rule(kind), full=full, gradient=True), chunk.logits.shape[2])


def sweeps(count: int, vocab: int) -> Iterator[tuple[str, int, Callable[[], object]]]:
    """(name, bytes per logit of the student, call) of every sweep, and of all of them."""
    for teachers in (1, 2):
        chunk, read = problem(count, vocab, teachers), 4 * (1 + teachers)
        for kind in KINDS:
            ops, name = operations(kind, chunk), f"{kind}, K={teachers}"
            ops.solve(chunk)  # the later stages read what the earlier ones leave
            if kind in KINDS[:2]:
                yield f"statistics, {name}", read, lambda o=ops, c=chunk: o.statistics(c)
            else:
                yield f"terms, {name}", read, lambda o=ops, c=chunk: o.terms(c)
            yield f"gradient, {name}", read + 2, lambda o=ops, c=chunk: o.gradient(c)
            passes = 2 if kind in KINDS[:2] else 3
            yield f"all stages, {name}", passes * read + 2, lambda o=ops, c=chunk: o.solve(c)
            every = operations(kind, chunk, full=True)
            yield f"all stages, every statistic, {name}", passes * read + 2, lambda o=every, c=chunk: o.solve(c)
    alone = replace(problem(count, vocab, 0), out=None)
    yield "student statistics", 4, lambda: operations("reverse_kl", alone, full=True).statistics(alone)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=512)
    parser.add_argument("--vocab", type=int, default=151936)
    parser.add_argument("--repetitions", type=int, default=20)
    options = parser.parse_args()
    for block, warps in SETTINGS:
        rows.BLOCK, rows.options = block, lambda teachers, warps=warps: {"num_warps": warps, "enable_fp_fusion": True}
        for name, size, call in sweeps(options.rows, options.vocab):
            time = milliseconds(call, options.repetitions)
            rate = size * options.rows * options.vocab / time / 1e9
            print(json.dumps({"block": block, "warps": warps, "sweep": name, "ms": time, "TB/s": rate}), flush=True)


if __name__ == "__main__":
    main()
