"""The examples of docs/extend run as they stand."""

from __future__ import annotations

import asyncio
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from engine_helpers import make_config

from opdengine.data.prompts import load_prompts

PAGES = Path(__file__).parents[2] / "docs" / "extend"


def blocks(page: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (PAGES / page).read_text(), re.DOTALL)


def test_the_environment_plays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    game, trial = blocks("environment.md")
    monkeypatch.chdir(tmp_path)
    Path("guess.py").write_text(game)
    exec(trial, {})


def test_the_verifier_grades(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    verifier, trial = blocks("verifier.md")
    monkeypatch.chdir(tmp_path)
    Path("fields.py").write_text(verifier)
    exec(trial, {})


def test_the_teacher_judges_and_is_approached(models: dict[str, str], prompt_file: str, tmp_path: Path) -> None:
    kind, use = blocks("teacher.md")
    names: dict[str, Any] = {}
    exec(kind + use, names)
    config = make_config(models, prompt_file, tmp_path, method="opd", teachers=[{"model": models["big"]}])
    text = "aaaabbc" * 20
    engine = names["with_teacher"](config, text)
    (teacher,) = engine.teachers
    prompts = load_prompts([prompt_file]).prompts[:4]
    batch = asyncio.run(engine.prepare(prompts, 0))
    asyncio.run(engine.score(batch))
    for sample in batch:
        (said,) = sample.teacher_targets
        counts = np.bincount(teacher.tokenizer.encode(text, add_special_tokens=False), minlength=len(teacher.tokenizer))
        expected = np.log((counts + 1) / (counts + 1).sum())
        np.testing.assert_array_equal(said.ids[:, 0], sample.target_ids)
        np.testing.assert_allclose(said.logprobs, expected[said.ids], rtol=1e-5)
        assert all(len(set(row)) == 8 for row in said.ids.tolist())
    losses = [asyncio.run(engine.step(prompts)).metrics["loss"] for _ in range(12)]
    assert losses[-1] < losses[0] and torch.isfinite(torch.tensor(losses)).all()
