"""Bandwidth of each sweep of the Triton row kernels, over block sizes and warps.

    PYTHONPATH=kernels python benchmarks/gpu_rows.py [--rows 512] [--vocab 151936]

Prints one JSON object per sweep and setting: milliseconds, and TB/s of the bytes the sweep has to
move. ``rows.BLOCK`` and ``rows.OPTIONS`` hold the setting that the library uses.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable, Iterator

import torch

from opd_kernels import rows
from opd_kernels.triton_impl import TritonRowOps
from opd_kernels.types import Head, Rule

DEVICE = "cuda"
SETTINGS = [(1024, 4), (2048, 4), (2048, 8), (4096, 4), (4096, 8), (8192, 8), (8192, 16)]
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


def sweeps(count: int, vocab: int) -> Iterator[tuple[str, int, Callable[[], object]]]:
    """(name, bytes per logit, call) of every sweep."""
    width = -(-vocab // rows.ALIGNMENT) * rows.ALIGNMENT
    z, acc, t = torch.randn(3, count, width, device=DEVICE)[..., :vocab]
    dz = torch.empty(count, width, device=DEVICE, dtype=torch.bfloat16)[:, :vocab]
    one, labels = torch.ones(count, device=DEVICE), torch.arange(count, device=DEVICE) % vocab
    head = Head(z, z, None, 1.0, None, 1.0, vocab)
    ops = TritonRowOps(vocab)
    full = ops.student_rows(head, z, labels, True, joint=False)
    known = ops.student_rows(head, z, None, False, joint=False)
    joint = ops.student_rows(head, z, labels, False, joint=True)

    def teacher(kind: str, student, before: int) -> None:
        ops.teacher_rows(
            Rule(kind),
            head,
            head,
            z,
            t if before else acc,
            student,
            acc=acc,
            before=before,
            last=True,
            weight=one,
            labels=labels if student is full else None,
            full=student is full,
        )

    def gradient(kind: str, teachers: int) -> None:
        ops.gradient_rows(
            Rule(kind),
            z,
            acc,
            t,
            known,
            teachers=teachers,
            acc_mean=one,
            total_weight=one,
            row_scale=one,
            softcap=None,
            out=dz,
        )

    teacher("reverse_kl", known, 0)  # the gradients read what is known about the first teacher
    yield "student statistics", 4, lambda: ops.student_rows(head, z, labels, True, joint=False)
    yield "student and first teacher", 8, lambda: teacher("reverse_kl", joint, 0)
    yield "another teacher", 8, lambda: teacher("reverse_kl", known, 1)
    yield "another teacher, every statistic", 8, lambda: teacher("reverse_kl", full, 1)
    for kind in KINDS[2:]:
        yield f"another teacher and value, {kind}", 12, lambda kind=kind: teacher(kind, known, 1)
    for kind in KINDS:
        yield f"gradient of one teacher, {kind}", 10, lambda kind=kind: gradient(kind, 1)
        yield f"gradient of two teachers, {kind}", 14, lambda kind=kind: gradient(kind, 2)


def two_reads(
    kind: str,
    z: torch.Tensor,
    teachers: list[torch.Tensor],
    weight: torch.Tensor,
    scale: torch.Tensor,
    out: torch.Tensor,
) -> torch.Tensor:
    """The library's row work on the logits [c, V] of a student and one or two teachers: [c] divergences;
    the gradient goes to ``out``. ``weight`` [K, c], ``scale`` [c]."""
    vocab, rule = z.shape[1], Rule(kind)
    head, ops = Head(z, z, None, 1.0, None, 1.0, vocab), TritonRowOps(vocab)
    student = ops.student_rows(head, z, None, False, joint=True)
    value, mean = z.new_zeros(2, z.shape[0])
    for k, t in enumerate(teachers):
        found = ops.teacher_rows(
            rule,
            head,
            head,
            z,
            t,
            student,
            acc=teachers[0],
            before=k,
            last=k == len(teachers) - 1,
            weight=weight[k],
            labels=None,
            full=False,
        )
        value += weight[k] * found.value
        if found.acc_mean is not None:
            mean += weight[k] * found.acc_mean
    ops.gradient_rows(
        rule,
        z,
        teachers[0],
        teachers[-1],
        student,
        teachers=len(teachers),
        acc_mean=mean,
        total_weight=weight.sum(0),
        row_scale=scale,
        softcap=None,
        out=out,
    )
    return value


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=512)
    parser.add_argument("--vocab", type=int, default=151936)
    parser.add_argument("--repetitions", type=int, default=20)
    options = parser.parse_args()
    for block, warps in SETTINGS:
        rows.BLOCK, rows.OPTIONS = block, {**rows.OPTIONS, "num_warps": warps}
        for name, size, call in sweeps(options.rows, options.vocab):
            time = milliseconds(call, options.repetitions)
            rate = size * options.rows * options.vocab / time / 1e9
            print(json.dumps({"block": block, "warps": warps, "sweep": name, "ms": time, "TB/s": rate}), flush=True)


if __name__ == "__main__":
    main()
