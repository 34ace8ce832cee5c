"""The fused loss against torch eager, TRL's chunked divergence, two single-teacher calls and its own
GEMMs: time in turns on the same data, and peak memory beyond inputs and gradients.

On a CPU: N = 256, V = 151936, hidden sizes 512 <- 1024, 768, float32. On a GPU ``make gpu`` measures
more; this file then runs its short case.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent / "gpu"))

import providers
from measure import rotate, temporary_bytes
from problems import CPU1, CPU2, KINDS, S3, peaked, strangers

CUDA = torch.cuda.is_available()
DEVICE, DTYPE = ("cuda", torch.bfloat16) if CUDA else ("cpu", torch.float32)
SHAPES = {"K=1": S3 if CUDA else CPU1} | ({} if CUDA else {"K=2": CPU2})
ROUNDS = 5

MEMORY_MARGIN = 0.05
TIME_MARGIN = 0.3
"""Of the ratio to the GEMMs of the same run; shared machines spread by about half of it."""


@pytest.fixture(scope="module", params=SHAPES)
def problem(request):
    return strangers(SHAPES[request.param], DEVICE, DTYPE)


def makers(problem, kind):
    """Steps of all providers that are installed and have a place in this case."""
    steps = {
        "gemms": providers.gemms(problem, kind),
        "ours": providers.ours(problem, kind),
        "eager": providers.eager(problem, kind),
    }
    if len(problem.teachers) > 1:
        steps["one call per teacher"] = providers.one_call_per_teacher(problem, kind)
    elif providers.available()["trl"]:
        steps["trl"] = providers.trl(problem, kind)
    return steps


def figures(problem, steps, rounds=ROUNDS):
    """Median milliseconds, ratio to the GEMMs round by round, and peak memory of every step."""
    peaks = {name: temporary_bytes(step, problem.gradient_bytes) for name, step in steps.items()}
    times = rotate(steps, warmups=0, rounds=rounds)
    out = {}
    for name, values in times.items():
        low, middle, high = np.percentile(values, [25, 50, 75])
        ratio = float(np.median(np.array(values) / np.array(times["gemms"])))
        out[name] = {"ms": middle, "iqr": high - low, "ratio_to_gemms": ratio, "peak_bytes": peaks[name]}
    return out


@pytest.mark.parametrize("kind", KINDS)
def test_loss(problem, kind, benchmark, record, guard):
    steps = makers(problem, kind)
    found = figures(problem, steps)
    benchmark.pedantic(steps["ours"], rounds=1)
    name = f"{problem.shape.name} {kind}"
    record(name, found)
    ours = found["ours"]
    guard(
        name,
        {
            "peak_bytes": (ours["peak_bytes"], MEMORY_MARGIN),
            "ratio_to_gemms": (ours["ratio_to_gemms"], TIME_MARGIN),
        },
        tokens_per_second=1e3 * problem.shape.rows / ours["ms"],
    )
    assert ours["peak_bytes"] <= 0.15 * found["eager"]["peak_bytes"] or len(problem.teachers) > 1


def test_sampled_columns(benchmark, record, guard):
    """Distributions like a trained model's: 20 live columns a row, Zipf-distributed."""
    problem = peaked(SHAPES["K=1"], DEVICE, DTYPE)
    steps = {"gemms": providers.gemms(problem, "reverse_kl")}
    for share in (0.0, 0.05, 0.1):
        steps[f"share {share}"] = providers.ours(problem, "reverse_kl", vocab_sample=share)
    found = figures(problem, steps)
    exact = tuple(x.double() for x in steps["share 0.0"]()[1])
    for name, step in steps.items():
        if name != "gemms":
            found[name]["error_against_dense"] = providers.error(step()[1], exact)
    benchmark.pedantic(steps["share 0.1"], rounds=1)
    record("sampled", found)
    tenth = found["share 0.1"]
    rate = 1e3 * problem.shape.rows / tenth["ms"]
    guard("sampled", {"ratio_to_gemms": (tenth["ratio_to_gemms"], TIME_MARGIN)}, tokens_per_second=rate)
