"""The engine on CUDA devices. Needs the extra "train" and pytest, no network:

python -m pytest -m gpu tests/gpu/test_gpu_engine.py
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import engine_cases
import pytest
import torch
from engine_cases import Bench

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[1] / "distributed"))

from ranks_helpers import run_cases, same_steps
from test_distributed_step import CASES, settings

pytestmark = pytest.mark.gpu

WORLD = 2
EXACT_CASES = ("tied", "checkpointing", "split_vocabulary", "sharded_debate")
SHARED_CASES = (*EXACT_CASES, "bfloat16")


@pytest.fixture
def bench(models: dict[str, str], prompt_file: str, tmp_path: Path) -> Bench:
    assert torch.cuda.is_available(), "these tests need a CUDA device; leave them out with -m 'not gpu'"
    return Bench("cuda", models, prompt_file, tmp_path)


@pytest.mark.parametrize("bf16", [False, True])
def test_a_step_of_a_debate(bench: Bench, bf16: bool) -> None:
    engine_cases.a_step_of_a_debate(bench, bf16)


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("divergence", ["reverse_kl", "forward_kl", "jsd"])
def test_the_same_loss_as_on_the_cpu(bench: Bench, bf16: bool, divergence: str) -> None:
    engine_cases.the_same_loss_as_on_the_cpu(bench, bf16, divergence=divergence)


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_both_implementations_of_the_loss(bench: Bench, impl: str) -> None:
    here = bench.engine(loss_impl=impl)
    samples = engine_cases.make_samples(here, bench.prompts[:4])
    loss, _ = engine_cases.loss_and_gradient(here, samples)
    expected, _ = engine_cases.loss_and_gradient(bench.engine(loss_impl="reference"), samples)
    assert loss == pytest.approx(expected, rel=1e-4)


def test_checkpointing_changes_nothing(bench: Bench) -> None:
    engine_cases.checkpointing_changes_nothing(bench)


@pytest.mark.parametrize("bf16", [False, True])
def test_a_split_student_has_the_same_gradients(bench: Bench, bf16: bool) -> None:
    engine_cases.a_split_student_has_the_same_gradients(bench, bf16)


@pytest.mark.parametrize("bf16", [False, True])
def test_a_resumed_run_goes_on(bench: Bench, bf16: bool) -> None:
    engine_cases.a_resumed_run_goes_on(bench, bf16=bf16)


def test_offloaded_teachers_judge_the_same(bench: Bench) -> None:
    engine_cases.offloaded_teachers_judge_the_same(bench)


def test_an_adapter_learns(bench: Bench) -> None:
    pytest.importorskip("peft", reason="LoRA needs peft")
    engine_cases.an_adapter_learns(bench)


def test_every_method_of_weighing(bench: Bench) -> None:
    engine_cases.every_method_of_weighing(bench)


def test_memory_does_not_grow(bench: Bench) -> None:
    engine_cases.memory_does_not_grow(bench)


def test_attention_on_a_gpu_takes_no_mask(bench: Bench) -> None:
    student = bench.engine(attn_implementation="sdpa").student
    assert student.layout == "padded"


def test_two_gpus_take_the_same_steps_as_one(models: dict[str, str], prompt_file: str, tmp_path: Path) -> None:
    if torch.cuda.device_count() < WORLD:
        pytest.skip(f"needs {WORLD} GPUs, there are {torch.cuda.device_count()}")
    visible = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(WORLD)))
    found: dict[int, Any] = {}
    for world in (1, WORLD):
        cases = {
            name: {**CASES[name], "config": settings(CASES[name], models, prompt_file, tmp_path / f"{name}-{world}")}
            for name in SHARED_CASES
        }
        found[world] = run_cases(cases, world, tmp_path, CUDA_VISIBLE_DEVICES=visible)
    for name in EXACT_CASES:
        same_steps(found[1][name], found[WORLD][name], 1e-3)
    # Kernels round bfloat16 by the shape of the batch, and a tie may then be drawn the other way.
    for one, many in zip(*(found[world]["bfloat16"]["metrics"] for world in (1, WORLD)), strict=True):
        assert many["loss"] == pytest.approx(one["loss"], rel=0.2) and many["grad_norm"] > 0
