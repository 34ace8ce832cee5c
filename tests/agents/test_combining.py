"""Methods that take over a debate: the weights of one paper under the contexts of another."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from agent_helpers import make_rollout
from engine_helpers import PROMPTS, ScriptedTeacher, make_config

from opdengine.config.train import ConfigError
from opdengine.methods import build_method
from opdengine.training.run import train
from opdengine.types import Batch
from tiny.agents.house import HOUSE


def test_a_gatekept_agent_under_a_debate(models: dict[str, str], tmp_path: Path) -> None:
    """SAGE's turn weights, MAD's transcript and confidences."""
    config = make_config(
        models, "", tmp_path, method="sage_opd", contexts="debate", environment={"name": HOUSE},
        sage={"use_failures": False}, debate={"rounds": 1},
    )  # fmt: skip
    teachers = [
        ScriptedTeacher("a", ["open it <<CONFIDENCE=100>>", "SKIP"]),
        ScriptedTeacher("b", ["no <<CONFIDENCE=0>>"]),
    ]
    method, sample = build_method(config), make_rollout((2,))
    method.teachers = teachers
    found = Batch(samples=[sample])
    asyncio.run(method.annotate(found))
    assert sample.mix is not None and sample.turn_weight is not None
    np.testing.assert_allclose(sample.mix, [np.e / (1 + np.e), 1 / (1 + np.e)], rtol=1e-6)
    assert sample.turn_weight[1] == 0 and found.metrics["sage/skip"] == 1 and found.metrics["debate/generated"] == 1
    read = "".join(map(chr, sample.contexts[1].token_ids[: sample.contexts[1].target_positions[0]]))
    assert "open it" in read and "no" in read


def test_calibrated_margins_under_a_debate(models: dict[str, str], prompt_file: str, tmp_path: Path) -> None:
    config = make_config(
        models, prompt_file, tmp_path / "run", method="uni_opd", contexts="debate", num_generations=2, max_steps=1,
        debate={"rounds": 1, "max_tokens": 5, "prompts": PROMPTS},
    )  # fmt: skip
    result = train(config, progress=False)
    metrics: list[dict[str, Any]] = [
        json.loads(x) for x in (result.output_dir / "metrics.jsonl").read_text().splitlines()
    ]
    assert metrics[-1]["debate/generated"] == 4 and metrics[-1]["balance/correct_before"] == 0
    assert "teacher_weight/big" in metrics[-1] and "margin/shift" not in metrics[-1]


def test_every_task_needs_two_that_can_debate(models: dict[str, str], tmp_path: Path) -> None:
    teachers = [{"model": models["big"]}, {"model": models["small"], "key": ["bring"]}]
    config = make_config(
        models, "", tmp_path / "run", method="sage_opd", contexts="debate", teachers=teachers,
        environment={"name": HOUSE, "options": {"count": 6}},
    )  # fmt: skip
    with pytest.raises(ConfigError, match=r"needs 2 teacher.*'(find|open)' is answered by \['big'\]"):
        train(config, progress=False)


def test_settings(models: dict[str, str], prompt_file: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"contexts='debate'.*only 'sage_opd', 'uni_opd', 'sdft' and 'opsd'"):
        make_config(models, prompt_file, tmp_path, method="mt_opd", contexts="debate")
    with pytest.raises(ConfigError, match="at least 2 teacher"):
        build_method(
            make_config(
                models, prompt_file, tmp_path, method="uni_opd", contexts="debate", teachers=[{"model": models["big"]}]
            )
        )
