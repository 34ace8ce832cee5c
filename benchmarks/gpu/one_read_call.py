"""The whole op with the one-read row kernel in place of the library's sweeps: what it would buy end to end.

For reverse and forward KL of one or two teachers that work on every row, without statistics and without
the check that teachers are finite.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import providers
import torch
from correctness import LIMIT
from measure import rotate, summary
from one_read import BLOCK, SETTINGS, OneRead
from problems import S1, S2, Shape, neighbours, strangers

from opd_kernels import driver
from opd_kernels.heads import gather

Case = tuple[str, Callable[[], dict[str, Any]]]


class OneReadPass(driver._Pass):
    """A chunk: every product, then one kernel that reads them all."""

    setting = (BLOCK, 4)

    def _chunk(self, start: int, stop: int) -> None:
        problem, index, count = self.problem, self.rows.index, stop - start
        z, *theirs = (x[:count] for x in (self.workspace.z, self.workspace.acc, self.workspace.t))
        theirs = theirs[: len(problem.teachers)]
        hidden = gather(problem.student.hidden, index, start, stop)
        self.ops.write_logits(problem.student, hidden, z, self.workspace.tile)
        for teacher, t in zip(problem.teachers, theirs, strict=True):
            self.ops.write_logits(teacher, gather(teacher.hidden, index, start, stop), t, self.workspace.tile)
        assert self.row_scale is not None
        scale = gather(self.row_scale, index, start, stop) * problem.student.factor
        weight = gather(problem.mix, index, start, stop).t().contiguous()
        out = self.sink.reserve(theirs[0])
        kernel = OneRead(count, problem.student.vocab, z, *self.setting)
        value = kernel(problem.rule.kind, z, theirs, weight, scale, out)
        self.rows.scatter(self.outcome.token_loss, value, start, stop)
        self.sink.commit(out, hidden, start, stop)


@contextmanager
def one_read_calls(block: int, warps: int) -> Iterator[None]:
    """Calls use the kernel within."""
    plain, OneReadPass.setting = driver._Pass, (block, warps)
    driver._Pass = OneReadPass  # type: ignore[misc]
    try:
        yield
    finally:
        driver._Pass = plain  # type: ignore[misc]


def step_of(problem: Any, kind: str, block: int, warps: int) -> providers.Step:
    plain = providers.ours(problem, kind, impl="triton")

    def step():
        with one_read_calls(block, warps):
            return plain()

    return step


def compare(shape: Shape, kind: str) -> dict[str, Any]:
    """Milliseconds beside the library's sweeps, and gradient errors against float64 at KL 2e-2."""
    small = neighbours(Shape(shape.name, 1024, shape.vocab, shape.width, shape.teachers), "cuda", torch.bfloat16, 0.2)
    _, exact = providers.float64(small, kind)
    out: dict[str, Any] = {"two reads": {}}
    for block, warps in SETTINGS:
        out[f"one read, {block} columns"] = providers.error(step_of(small, kind, block, warps)()[1], exact)
    del small, exact
    problem = strangers(shape, "cuda", torch.bfloat16)
    steps = {"two reads": providers.ours(problem, kind)}
    steps |= {f"one read, {block} columns": step_of(problem, kind, block, warps) for block, warps in SETTINGS}
    for name, times in rotate(steps, warmups=3, rounds=15).items():
        out[name] |= summary(times)
    wrong = [max(f["hidden"], f["weight"]) for f in out.values() if "hidden" in f]
    return out | {"passed": max(wrong) <= LIMIT}


def cases(smoke: bool) -> Iterator[Case]:
    if torch.cuda.is_available():
        for shape in (S1, S2):
            shape = shape.smaller() if smoke else shape
            yield f"{shape.name} reverse_kl", lambda s=shape: compare(s, "reverse_kl")
