"""Time, peak memory and launches of S1 to S7: ours beside the peers at their defaults and at their
best chunk, and ours with the memory that each of them takes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import providers
import torch
from measure import by_kernel, kernels, median_ms, release, rotate, summary, temporary_bytes
from problems import KINDS, S1, S2, S3, S4, S5, S6, S7, Problem, Shape, peaked, strangers

Case = tuple[str, Callable[[], dict[str, Any]]]
Step = providers.Step


def setting() -> tuple[str, torch.dtype]:
    return ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)


def steps_of(problem: Problem, kind: str, names: list[str]) -> dict[str, Callable[[], Step]]:
    """Makers of the named providers that are installed."""
    cuda = problem.device == "cuda"
    makers: dict[str, Callable[[], Step]] = {
        "ours": lambda: providers.ours(problem, kind),
        "gemms": lambda: providers.gemms(problem, kind),
        "one call per teacher": lambda: providers.one_call_per_teacher(problem, kind),
        "eager": lambda: providers.eager(problem, kind),
        "compile": lambda: providers.compiled(problem, kind),
        "trl": lambda: providers.trl(problem, kind),
        "liger": lambda: providers.liger(problem, kind, compile_=cuda),
    }
    there = providers.available()
    return {n: makers[n] for n in names if there.get(n, True)}


def tried(problem: Problem, kind: str, peer: str) -> dict[str, Callable[[], Step]]:
    """A peer at its default chunk and at others, by what they are called in the tables."""
    rows, vocab, cuda = problem.shape.rows, problem.shape.vocab, problem.device == "cuda"
    if peer == "trl":
        sizes = [(None, None), (rows // 4, None), (rows, None), (rows // 4, vocab), (None, vocab)]
        return {
            f"{t or 'default'} x {v or 'default'}": lambda t=t, v=v: providers.trl(problem, kind, t, v)
            for t, v in sizes
        }
    chunks = (1024, rows // 2, rows)
    return {f"{c} rows": lambda c=c: providers.liger(problem, kind, chunk=c, compile_=cuda) for c in chunks}


def made(makers: dict[str, Callable[[], Step]]) -> tuple[dict[str, Step], dict[str, Any]]:
    """The steps that can be made, and the error of each of the others: a peer may be installed and not
    importable."""
    steps, broken = {}, {}
    for name, make in makers.items():
        try:
            steps[name] = make()
        except Exception as found:
            broken[name] = {"error": providers.describe(found)}
    return steps, broken


def measure(
    problem: Problem, steps: dict[str, Step], ceiling: float | None, *, warmups: int, rounds: int
) -> dict[str, Any]:
    """Figures of every step; those that fail, by lack of memory say, carry their error."""
    out: dict[str, Any] = {}
    for name, step in steps.items():
        try:
            step()
            out[name] = {"peak_bytes": temporary_bytes(step, problem.gradient_bytes), **profiled(step)}
        except Exception as found:
            out[name] = {"error": providers.describe(found)}
        release()
    working = {name: step for name, step in steps.items() if "error" not in out[name]}
    for name, times in (rotate(working, warmups=warmups, rounds=rounds) if working else {}).items():
        out[name] |= summary(times)
        out[name]["tflops"] = problem.shape.flops / out[name]["ms"] / 1e9
        if ceiling:
            out[name]["of_floor"] = out[name]["tflops"] / ceiling
    return out


def profiled(step: Step) -> dict[str, Any]:
    """What one call puts on the device; a profiler that fails costs these figures only."""
    try:
        found = kernels(step)
    except Exception as error:
        return {"launches": None, "profiler": providers.describe(error)}
    return {"launches": None} if found is None else {"launches": len(found), "by_kernel": by_kernel(found)}


def rounds_of(smoke: bool) -> dict[str, int]:
    return {"warmups": 1, "rounds": 2} if smoke else {"warmups": 2, "rounds": 10}


def compare(shape: Shape, kind: str, names: list[str], ceiling: float | None, smoke: bool) -> dict[str, Any]:
    problem = strangers(shape, *setting())
    steps, broken = made(steps_of(problem, kind, names))
    out = measure(problem, steps, ceiling, **rounds_of(smoke)) | broken
    return out | at_their_memory(problem, kind, out, ceiling, smoke)


def at_their_memory(
    problem: Problem, kind: str, found: dict[str, Any], ceiling: float | None, smoke: bool
) -> dict[str, Any]:
    """Ours with the peak memory of each peer."""
    equal = {
        f"ours at the memory of {name}": providers.ours(
            problem, kind, workspace_bytes=workspace_for(problem, kind, figures["peak_bytes"])
        )
        for name, figures in found.items()
        if name.split(",")[0] in providers.PACKAGES and "error" not in figures
    }
    return measure(problem, equal, ceiling, **rounds_of(smoke)) if equal else {}


def workspace_for(problem: Problem, kind: str, peak: int) -> int:
    """The largest budget with which ours stays below ``peak`` bytes, as far as three tries tell."""
    budget = peak
    for _ in range(3):
        used = temporary_bytes(providers.ours(problem, kind, workspace_bytes=budget), problem.gradient_bytes)
        if used <= peak:
            break
        budget = max(1 << 20, budget - (used - peak))
    return budget


def at_their_best(shape: Shape, kind: str, ceiling: float | None, smoke: bool) -> dict[str, Any]:
    """Every peer at the fastest of several chunks; what was tried is kept."""
    problem, out = strangers(shape, *setting()), {}
    steps, _ = made(steps_of(problem, kind, ["ours", "gemms"]))
    for peer in [name for name, there in providers.available().items() if there]:
        times: dict[str, float] = {}
        for chunk, make in tried(problem, kind, peer).items():
            try:
                step = make()
                step()
                times[chunk] = median_ms(step, warmups=1, rounds=2 if smoke else 5)
            except Exception as found:
                out[f"{peer}, {chunk}"] = {"error": providers.describe(found)}
            release()
        if times:
            best = min(times, key=times.__getitem__)
            steps[f"{peer}, {best}"] = tried(problem, kind, peer)[best]()
            out[f"{peer} tried"] = {"ms_by_chunk": times}
    figures = measure(problem, steps, ceiling, **rounds_of(smoke))
    return out | figures | at_their_memory(problem, kind, figures, ceiling, smoke)


def memory(shape: Shape, kind: str) -> dict[str, Any]:
    """Peak of one call at small budgets, and the time of one at the default."""
    problem = strangers(shape, *setting())
    steps = {f"ours, {g} GiB": providers.ours(problem, kind, workspace_bytes=int(g * 2**30)) for g in (0.5, 1)}
    out: dict[str, Any] = {
        name: {"peak_bytes": temporary_bytes(step, problem.gradient_bytes)} for name, step in steps.items()
    }
    return out | measure(problem, {"ours": providers.ours(problem, kind)}, None, warmups=0, rounds=3)


def workspaces(shape: Shape, ceiling: float | None, smoke: bool) -> dict[str, Any]:
    """Ours at several budgets: what larger chunks would buy."""
    problem = strangers(shape, *setting())
    sizes = (0.5, 1, 2, 4) if not smoke else (0.001, 0.01)
    steps = {f"ours, {g} GiB": providers.ours(problem, "reverse_kl", workspace_bytes=int(g * 2**30)) for g in sizes}
    return measure(problem, steps, ceiling, **rounds_of(smoke))


def sampled(shape: Shape, kind: str, ceiling: float | None, smoke: bool) -> dict[str, Any]:
    """Gradients from sampled columns on distributions like those of trained models, beside dense ones."""
    problem = peaked(shape, *setting())
    shares = (0.0, 0.05, 0.1, 0.2)
    steps = {f"ours, share {share}": providers.ours(problem, kind, vocab_sample=share) for share in shares}
    out = measure(problem, {"gemms": providers.gemms(problem, kind), **steps}, ceiling, **rounds_of(smoke))
    exact = tuple(x.double() for x in steps["ours, share 0.0"]()[1])
    for name, step in steps.items():
        if "error" not in out[name]:
            out[name]["error_against_dense"] = providers.error(step()[1], exact)
    return out


def cases(smoke: bool, ceiling: float | None) -> Iterator[Case]:
    """Most important first: a run that ends early has the rest left out."""
    one, two, half, long = (s.smaller() if smoke else s for s in (S1, S2, S7, S6))
    mine = ["ours", "gemms"]
    for kind in KINDS:
        yield f"S1 {kind}", lambda kind=kind: compare(one, kind, [*mine, "trl", "eager"], ceiling, smoke)
    for kind in KINDS:
        yield f"S2 {kind}", lambda kind=kind: compare(two, kind, [*mine, "one call per teacher"], ceiling, smoke)
    yield "S7 reverse_kl", lambda: compare(half, "reverse_kl", [*mine, "trl"], ceiling, smoke)
    for shape in (one, two):
        yield f"{shape.name} workspaces", lambda s=shape: workspaces(s, ceiling, smoke)
    yield "S6 memory", lambda: memory(long, "reverse_kl")
    for shape, kind in ((one, "reverse_kl"), (one, "jsd"), (two, "reverse_kl")):
        yield f"{shape.name} {kind}, sampled", lambda s=shape, kind=kind: sampled(s, kind, ceiling, smoke)


def liger_cases(smoke: bool, ceiling: float | None) -> Iterator[Case]:
    """Apart from the others: TorchInductor compiles for it, up to a minute."""
    one, two = (s.smaller() if smoke else s for s in (S1, S2))
    for shape, kind in ((one, "reverse_kl"), (one, "jsd"), (two, "reverse_kl")):
        yield f"{shape.name} {kind}", lambda s=shape, k=kind: compare(s, k, ["ours", "liger"], ceiling, smoke)


def shape_cases(smoke: bool, ceiling: float | None) -> Iterator[Case]:
    """S3, S4 and S5."""
    for shape in (s.smaller() if smoke else s for s in (S3, S4, S5)):
        yield (
            f"{shape.name} reverse_kl",
            lambda s=shape: compare(s, "reverse_kl", ["ours", "gemms", "trl"], ceiling, smoke),
        )


def best_cases(smoke: bool, ceiling: float | None) -> Iterator[Case]:
    one = S1.smaller() if smoke else S1
    for kind in ("reverse_kl", "jsd"):
        yield f"S1 {kind}, peers at their best", lambda kind=kind: at_their_best(one, kind, ceiling, smoke)
    if not smoke:
        yield "S1 reverse_kl, torch.compile", lambda: compare(one, "reverse_kl", ["ours", "compile"], ceiling, smoke)
