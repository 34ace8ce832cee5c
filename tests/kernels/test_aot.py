"""The gate that needs no GPU: every row kernel compiled ahead of time, its machine code inspected."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from opd_kernels import rows

GATE = Path(__file__).with_name("aot_gate.py")
KERNELS = Path(__file__).parents[2] / "kernels"
OTHER_TRITON = "3.6.0"
# Four programs of 128 threads share a multiprocessor's 65536 registers.
MOST_REGISTERS = 128
MOST_SHARED = 16 * 1024


def run_gate(*arguments: str, path: str = "") -> list[dict]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, (path, str(KERNELS))))}
    environment.pop("TRITON_INTERPRET", None)
    run = subprocess.run([sys.executable, GATE, *arguments], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-4000:]
    return [json.loads(line) for line in run.stdout.splitlines()]


def buffers_read(result: dict) -> int:
    """[c, V] buffers that one variant reads."""
    variant = result["variant"]
    if result["kernel"] == "statistics_kernel":
        return variant["TEACHER"] + (variant["STUDENT"] or variant["CROSS"])
    if result["kernel"] == "fold_kernel":
        return 3 if variant["KIND"] in ("jsd", "skew_kl") else 2
    if result["kernel"] == "gradient_kernel":
        return 2 + variant["HAS_T"]
    return {"value_kernel": 2, "logprob_gradient_kernel": 1, "merge_kernel": 0}[result["kernel"]]


def check(results: list[dict]) -> None:
    assert results
    wide = rows.BLOCK // (4 * 32 * rows.OPTIONS["num_warps"])
    for result in results:
        assert result["spilled"] == 0, result
        assert result["registers"] <= MOST_REGISTERS, result
        assert result["shared"] <= MOST_SHARED, result
        # Every logit comes in 16-byte loads, or wider ones on newer architectures.
        if result["capability"] < 100:
            assert result["loads"].get("LDG.E.128", 0) == wide * buffers_read(result), result
        if result["variant"].get("out_ptr") == "*bf16":
            assert set(result["stores"]) == {"STG.E.128"}, result


@pytest.mark.parametrize(("capability", "quick"), [(80, True), (90, False), (100, True)])
def test_machine_code(capability, quick):
    check(run_gate("--capability", str(capability), *(["--quick"] if quick else [])))


@pytest.mark.parametrize("capability", [80, 90, 100])
def test_machine_code_of_the_gpu_session(capability):
    """The one-read kernel loads each logit once and keeps it in registers; the GEMM runs on tensor cores."""
    for result in run_gate("--session", "--quick", "--capability", str(capability)):
        variant = result["variant"]
        if result["kernel"] in ("gap_kernel", "dropped_kernel"):
            assert result["tensor_cores"], result
        if result["kernel"] == "gap_kernel":
            continue  # some of its settings spill, and lose against the others
        assert result["spilled"] == 0 and result["registers"] <= MOST_REGISTERS, result
        if result["kernel"] != "one_read_kernel":
            continue
        wide = variant["BLOCK"] // (4 * 32 * variant["num_warps"])
        assert result["loads"]["LDG.E.128"] == wide * (2 + variant["TWO"]), result


@pytest.mark.slow
def test_machine_code_on_the_oldest_triton(tmp_path):
    """The Triton of current GPU images; downloads it."""
    install = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", tmp_path]
    subprocess.run([*install, f"triton=={OTHER_TRITON}"], check=True)
    results = run_gate(path=str(tmp_path))
    assert {result["triton"] for result in results} == {OTHER_TRITON}
    check(results)
