"""The whole op with one read of the logits beside the same in stages: what the cooperative kernel buys end to end."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import providers
import torch
from correctness import LIMIT
from measure import rotate, summary
from problems import S1, S2, Shape, neighbours, strangers

from opd_kernels import triton_impl

Case = tuple[str, Callable[[], dict[str, Any]]]


@contextmanager
def stages() -> Iterator[None]:
    """Calls use one kernel for every stage within."""
    plain, triton_impl.one_read = triton_impl.one_read, lambda *_: False  # type: ignore[assignment]
    try:
        yield
    finally:
        triton_impl.one_read = plain


def step_of(problem: Any, kind: str, **options: Any) -> providers.Step:
    plain = providers.ours(problem, kind, **options)

    def step():
        with stages():
            return plain()

    return step


def compare(shape: Shape, kind: str) -> dict[str, Any]:
    """Milliseconds of both, and gradient errors against float64 at KL 2e-2."""
    small = neighbours(Shape(shape.name, 1024, shape.vocab, shape.width, shape.teachers), "cuda", torch.bfloat16, 0.2)
    _, exact = providers.float64(small, kind)
    makers = {"one read": providers.ours, "in stages": step_of}
    out = {name: providers.error(make(small, kind)()[1], exact) for name, make in makers.items()}
    del small, exact
    problem = strangers(shape, "cuda", torch.bfloat16)
    for name, times in rotate({n: m(problem, kind) for n, m in makers.items()}, warmups=3, rounds=15).items():
        out[name] |= summary(times)
    wrong = [max(f["hidden"], f["weight"]) for f in out.values()]
    return out | {"passed": max(wrong) <= LIMIT}


def cases(smoke: bool) -> Iterator[Case]:
    if torch.cuda.is_available():
        for shape, kind in ((S1, "reverse_kl"), (S2, "reverse_kl"), (S2, "jsd")):
            shape = shape.smaller() if smoke else shape
            yield f"{shape.name} {kind}", lambda s=shape, k=kind: compare(s, k)
