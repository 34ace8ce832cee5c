"""Losses and gradients that are not finite: skipped, counted, written down; too many in a row end the run."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_helpers import make_config
from safetensors.torch import load_file

from opdengine.errors import ProbeError
from opdengine.models.checkpoint import list_checkpoints
from opdengine.teachers.local import LocalTeacher
from opdengine.training.run import train
from opdengine.training.step import Engine
from opdengine.training.writer import read_metrics
from opdengine.types import Hidden, TeacherContext

Models = dict[str, str]


def break_losses(monkeypatch: pytest.MonkeyPatch, batches: Sequence[int]) -> None:
    """The loss is NaN in these batches, from 1."""
    plain, calls = Engine.objective, [0]

    def objective(self: Engine) -> Any:
        calls[0] += 1
        loss = plain(self)
        return (lambda *args: loss(*args) * float("nan")) if calls[0] in batches else loss

    monkeypatch.setattr(Engine, "objective", objective)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def test_a_bad_step_is_skipped_counted_and_written_down(
    models: Models, prompt_file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    break_losses(monkeypatch, [2])
    result = train(make_config(models, prompt_file, tmp_path, max_bad_steps=1), progress=False)
    lines = read_metrics(tmp_path / "metrics.jsonl")
    assert ["bad_steps" in line for line in lines] == [False, True, False]
    assert [line["policy_version"] for line in lines] == [1, 1, 2]
    assert "loss" not in lines[1] and lines[1]["completions/kept"] == 4
    assert all(torch.isfinite(tensor).all() for tensor in weights(result.final_model).values())
    (file,) = (tmp_path / "bad_steps").iterdir()
    assert file.name == "step_2.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert sorted(row["id"] for row in rows) == ["0.0", "1.0", "2.0", "3.0"]
    assert all({"prompt_id", "text", "token_ids", "kl_weight", "mix"} <= row.keys() for row in rows)
    assert not any(row["finite"] for row in rows)


def test_too_many_in_a_row_end_the_run_with_the_weights_before_them(
    models: Models, prompt_file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes: dict[str, Any] = {"max_steps": 6, "max_bad_steps": 2}
    with monkeypatch.context() as patch:
        break_losses(patch, [1, 3, 4, 5])
        with pytest.raises(FloatingPointError, match=r"3 steps in a row, up to step 5.*max_bad_steps=2"):
            train(make_config(models, prompt_file, tmp_path, **changes), progress=False)
    assert sorted(p.name for p in (tmp_path / "bad_steps").iterdir()) == [f"step_{i}.jsonl" for i in (1, 3, 4, 5)]
    (saved,) = list_checkpoints(tmp_path / "checkpoints")
    assert saved.name == "step_5"
    assert json.loads((saved / "state.json").read_text())["version"] == 1
    before, after = weights(Path(models["student"])), weights(saved / "model")
    assert all(torch.isfinite(tensor).all() for tensor in after.values())
    assert any(not torch.equal(before[name], after[name]) for name in after)
    resumed = make_config(models, prompt_file, tmp_path, **changes, resume_from_checkpoint="latest")
    assert train(resumed, progress=False).metrics["policy_version"] == 2


@pytest.mark.parametrize("broken", [1, 4])
def test_states_of_a_teacher_that_are_not_finite(
    models: Models, prompt_file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: int
) -> None:
    """On one rollout the other teacher goes on alone; a teacher that says nothing else is broken."""
    plain = LocalTeacher.score

    async def score(self: LocalTeacher, contexts: Sequence[TeacherContext]) -> list[Hidden]:
        found = await plain(self, contexts)
        if self.name == "big":
            found[:broken] = [Hidden(h.states * float("inf")) for h in found[:broken]]
        return found

    monkeypatch.setattr(LocalTeacher, "score", score)
    config = make_config(models, prompt_file, tmp_path, max_steps=1)
    if broken == 4:
        with pytest.raises(ProbeError, match=r"teacher 'big' is broken: .* on all 4 contexts"):
            train(config, progress=False)
        return
    metrics = train(config, progress=False).metrics
    assert metrics["dropped/teacher_not_finite/big"] == 1 and metrics["completions/kept"] == 4
    assert metrics["loss"] > 0 and "bad_steps" not in metrics


def test_a_gradient_that_is_not_finite_counts_like_a_loss(
    models: Models, prompt_file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from opdengine.training import optimizer_step as update

    plain, calls = update.gradient_norm, [0]

    def norm(model: Any) -> float:
        calls[0] += 1
        if calls[0] == 1:
            next(p for p in model.parameters() if p.grad is not None).grad.view(-1)[0] = float("inf")
        return plain(model)

    monkeypatch.setattr("opdengine.training.step.gradient_norm", norm)
    train(make_config(models, prompt_file, tmp_path, max_steps=2), progress=False)
    lines = read_metrics(tmp_path / "metrics.jsonl")
    assert ["bad_steps" in line for line in lines] == [True, False]
    rows = [json.loads(line) for line in (tmp_path / "bad_steps" / "step_1.jsonl").read_text().splitlines()]
    assert all(row["finite"] for row in rows)  # the loss was: it is the gradient
