"""The tests of the engine on a GPU, run on the CPU: they hold there, too, and do what they say."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "gpu"))

import engine_cases
from engine_cases import Bench


@pytest.fixture
def bench(models: dict[str, str], prompt_file: str, tmp_path: Path) -> Bench:
    return Bench("cpu", models, prompt_file, tmp_path)


@pytest.mark.parametrize("bf16", [False, True])
def test_a_step_of_a_debate(bench: Bench, bf16: bool) -> None:
    engine_cases.a_step_of_a_debate(bench, bf16)


@pytest.mark.parametrize("bf16", [False, True])
def test_the_same_loss_as_on_the_cpu(bench: Bench, bf16: bool) -> None:
    engine_cases.the_same_loss_as_on_the_cpu(bench, bf16, divergence="forward_kl")


def test_checkpointing_changes_nothing(bench: Bench) -> None:
    engine_cases.checkpointing_changes_nothing(bench)


@pytest.mark.parametrize("bf16", [False, True])
def test_a_split_student_has_the_same_gradients(bench: Bench, bf16: bool) -> None:
    engine_cases.a_split_student_has_the_same_gradients(bench, bf16)


def test_a_resumed_run_goes_on(bench: Bench) -> None:
    engine_cases.a_resumed_run_goes_on(bench, bf16=True)


def test_offloaded_teachers_judge_the_same(bench: Bench) -> None:
    engine_cases.offloaded_teachers_judge_the_same(bench)


def test_an_adapter_learns(bench: Bench) -> None:
    engine_cases.an_adapter_learns(bench)


def test_every_method_of_weighing(bench: Bench) -> None:
    engine_cases.every_method_of_weighing(bench)
