"""The gate that needs no GPU: every row kernel compiled ahead of time, its machine code inspected."""

from __future__ import annotations

import itertools
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

from opd_kernels import columns, rows

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks" / "gpu"))

from predictions import COUNTED, H100, H200, floor, seconds, table
from problems import KINDS, S1, S2

GATE = Path(__file__).with_name("aot_gate.py")
KERNELS = Path(__file__).parents[2] / "kernels"
# Four programs of 128 threads, or two of 256, share a multiprocessor's 65536 registers.
MOST_REGISTERS = 128
MOST_SHARED = 16 * 1024
# Triton 3.6 keeps two numbers of each thread in memory where nine heads' statistics are taken at once: eight bytes of
# stack and two loads.
SPILLED = {("3.6.0", "statistics_kernel", 80): 10}


def run_gate(*arguments: str) -> list[dict]:
    environment = {**os.environ, "PYTHONPATH": str(KERNELS)}
    environment.pop("TRITON_INTERPRET", None)
    run = subprocess.run([sys.executable, GATE, *arguments], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-4000:]
    return [json.loads(line) for line in run.stdout.splitlines()]


def buffers_read(result: dict) -> int | None:
    """[c, V] buffers that one variant reads; None where its loads are not counted."""
    variant = result["variant"]
    one = {
        "logprob_gradient_kernel": 1,
        "finish_kernel": 1,
        "merge_kernel": 0,
        "scale_kernel": None,
        "squares_kernel": 1,
    }
    one |= dict.fromkeys(name for name in vars(columns) if name.endswith("_kernel"))
    return one.get(result["kernel"], 1 + variant.get("TEACHERS", 0))


def resident(result: dict) -> int:
    """Programs that the registers of a multiprocessor hold, which gives every warp a multiple of 256."""
    return 64 * 1024 // (result["warps"] * 256 * math.ceil(32 * result["registers"] / 256))


def check(results: list[dict]) -> None:
    assert results
    for result in results:
        variant, teachers = result["variant"], result["variant"].get("TEACHERS", 0)
        place = result["triton"], result["kernel"], result["capability"]
        assert result["spilled"] <= SPILLED.get(place, 0), result
        assert result["shared"] <= MOST_SHARED, result
        if result["kernel"] == "one_read_kernel":
            # What ``triton_impl.one_read`` counts on where programs wait for each other.
            assert resident(result) >= (1 if teachers >= rows.MANY_TEACHERS else 2), result
        if teachers <= 2 and not variant.get("FULL"):
            assert result["registers"] <= MOST_REGISTERS, result
        # Every logit comes in 16-byte loads, or wider ones on newer architectures.
        warps, read = rows.options(teachers)["num_warps"], buffers_read(result)
        if result["capability"] < 100 and read is not None:
            wide = rows.BLOCK // (4 * 32 * warps)
            assert result["loads"].get("LDG.E.128", 0) == wide * read, result
        if read is not None and variant.get("out_ptr") == "*bf16" and warps == 4:
            assert result["stores"].get("STG.E.128", 0) == rows.BLOCK // (8 * 32 * warps), result
        limit = COUNTED.get((kind_of(variant), teachers), {}).get(result["kernel"].removesuffix("_kernel"))
        plain = not any(variant.get(flag) for flag in ("FULL", "MIXTURE", "CAP"))
        if plain and limit is not None and result["capability"] == 90:
            # What the predictions count with, on any version of the compiler.
            assert result["per_logit"] <= 1.05 * limit[0] and result["special_per_logit"] <= 1.05 * limit[1], result


def kind_of(variant: dict) -> str:
    """The divergence of a variant; the statistics know theirs by what it needs of them."""
    asked = {"P": "reverse_kl", "Q": "forward_kl", "DOTS": "jsd"}
    return variant.get("KIND") or next((kind for flag, kind in asked.items() if variant.get(flag)), "")


@pytest.mark.parametrize(("capability", "quick"), [(80, True), (90, False), (100, True)])
def test_machine_code(capability, quick):
    check(run_gate("--capability", str(capability), *(["--quick"] if quick else [])))


@pytest.mark.parametrize("capability", [80, 90, 100])
def test_machine_code_of_the_gpu_session(capability):
    """The GEMM runs on tensor cores; some of its settings spill, and lose against the others."""
    results = run_gate("--session", "--quick", "--capability", str(capability))
    assert results and all(result["tensor_cores"] for result in results)


def test_predicted_share_of_the_floor():
    """By counted bytes and instructions; the table is in the notes."""
    for device, shape, kind in itertools.product((H100, H200), (S1, S2), KINDS):
        assert floor(device, shape) / seconds(device, shape, kind) >= 0.6, (device, shape.name, kind)
    notes = (Path(__file__).parents[2] / "benchmarks" / "NOTES.md").read_text()
    for line in table():
        assert line in notes, "run benchmarks/gpu/predictions.py and put its table into benchmarks/NOTES.md"
