"""Time, peak memory and launches of S1 to S7, ours beside the peers at equal memory and at defaults."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import providers
import torch
from measure import launches, rotate, summary, temporary_bytes
from problems import KINDS, S1, S2, S3, S4, S5, S6, S7, Problem, Shape, peaked, strangers

Case = tuple[str, Callable[[], dict[str, Any]]]
Step = providers.Step


def setting() -> tuple[str, torch.dtype]:
    return ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)


def steps_of(problem: Problem, kind: str, names: list[str]) -> dict[str, Callable[[], Step]]:
    """Makers of the named providers; the peers' best chunks are the largest that were found to help."""
    rows, cuda = problem.shape.rows, problem.device == "cuda"
    makers: dict[str, Callable[[], Step]] = {
        "ours": lambda: providers.ours(problem, kind),
        "gemms": lambda: providers.gemms(problem, kind),
        "one call per teacher": lambda: providers.one_call_per_teacher(problem, kind),
        "eager": lambda: providers.eager(problem, kind),
        "compile": lambda: providers.compiled(problem, kind),
        "trl": lambda: providers.trl(problem, kind),
        "trl, whole batch": lambda: providers.trl(problem, kind, token_chunk=rows),
        "liger": lambda: providers.liger(problem, kind, compile_=cuda),
        "liger, whole batch": lambda: providers.liger(problem, kind, chunk=rows, compile_=cuda),
    }
    there = providers.available()
    return {n: makers[n] for n in names if there.get(n.split(",")[0], True)}


def measure(
    problem: Problem, steps: dict[str, Step], ceiling: float | None, *, warmups: int, rounds: int
) -> dict[str, Any]:
    """Figures of every step; those that fail, by lack of memory say, carry their error."""
    out: dict[str, Any] = {}
    for name, step in steps.items():
        try:
            step()
            out[name] = {
                "peak_bytes": temporary_bytes(step, problem.gradient_bytes),
                "launches": launches(step),
            }
        except Exception as problem_found:
            out[name] = {"error": f"{type(problem_found).__name__}: {problem_found}"[:300]}
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    working = {name: step for name, step in steps.items() if "error" not in out[name]}
    for name, times in rotate(working, warmups=warmups, rounds=rounds).items():
        out[name] |= summary(times)
        out[name]["tflops"] = problem.shape.flops / out[name]["ms"] / 1e9
        if ceiling:
            out[name]["of_floor"] = out[name]["tflops"] / ceiling
    return out


def compare(shape: Shape, kind: str, names: list[str], ceiling: float | None, smoke: bool) -> dict[str, Any]:
    problem = strangers(shape, *setting())
    steps = {name: make() for name, make in steps_of(problem, kind, names).items()}
    rounds = {"warmups": 1, "rounds": 2} if smoke else {"warmups": 5, "rounds": 20}
    out = measure(problem, steps, ceiling, **rounds)
    # Ours with the memory of each peer, where that differs from its own.
    budgets = {
        f"ours at the memory of {name}": figures["peak_bytes"]
        for name, figures in out.items()
        if name in ("trl", "liger") and "error" not in figures
    }
    equal = {n: providers.ours(problem, kind, workspace_bytes=max(b, 1 << 20)) for n, b in budgets.items()}
    return out | (measure(problem, equal, ceiling, **rounds) if equal else {})


def memory(shape: Shape, kind: str) -> dict[str, Any]:
    problem = strangers(shape, *setting())
    step = providers.ours(problem, kind)
    return {"ours": {"peak_bytes": temporary_bytes(step, problem.gradient_bytes)}}


def compaction(shape: Shape, ceiling: float | None, smoke: bool) -> dict[str, Any]:
    """The compacted backward on distributions like those of trained models."""
    problem = peaked(shape, *setting())
    tolerances = (0.0, 1e-3, 1e-2)
    steps = {f"ours, tolerance {t}": providers.ours(problem, "reverse_kl", backward_tolerance=t) for t in tolerances}
    rounds = {"warmups": 1, "rounds": 2} if smoke else {"warmups": 3, "rounds": 10}
    out = measure(problem, steps, ceiling, **rounds)
    dense = steps["ours, tolerance 0.0"]()[1]
    exact = tuple(x.double() for x in dense)
    for name, step in steps.items():
        if "error" not in out[name]:
            out[name]["error_against_dense"] = providers.error(step()[1], exact)
    return out


def cases(smoke: bool, ceiling: float | None) -> Iterator[Case]:
    """Most important first: a run that ends early has the rest left out."""
    one, two, short, narrow, llama, long, half = (s.smaller() if smoke else s for s in (S1, S2, S3, S4, S5, S6, S7))
    peers = ["ours", "gemms", "trl", "liger", "eager"]
    for kind in KINDS:
        yield f"S1 {kind}", lambda kind=kind: compare(one, kind, peers, ceiling, smoke)
    several = ["ours", "gemms", "one call per teacher", "trl", "liger"]
    for kind in KINDS:
        yield f"S2 {kind}", lambda kind=kind: compare(two, kind, several, ceiling, smoke)
    yield "S7 reverse_kl", lambda: compare(half, "reverse_kl", peers[:4], ceiling, smoke)
    yield "S6 memory", lambda: memory(long, "reverse_kl")
    yield "S1 compacted", lambda: compaction(one, ceiling, smoke)
    for shape in (short, narrow, llama):
        yield f"{shape.name} reverse_kl", lambda s=shape: compare(s, "reverse_kl", peers[:4], ceiling, smoke)
    best = ["ours", "trl, whole batch", "liger, whole batch"] + ([] if smoke else ["compile"])
    yield "S1 reverse_kl, peers at their best", lambda: compare(one, "reverse_kl", best, ceiling, smoke)
