"""OPAD: which steps become training states, the debates on them, and a whole run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from agent_helpers import make_rollout
from engine_helpers import make_config

from opdengine.cli import main
from opdengine.config.loading import from_mapping
from opdengine.config.train import ConfigError, TrainConfig
from opdengine.environments.episodes import Episodes
from opdengine.errors import ServiceError
from opdengine.methods import build_method
from opdengine.methods.opad import OPAD, steps_of, surprise
from opdengine.training.run import train
from opdengine.types import Batch, Sample, SamplingParams
from tiny.agents.house import HOUSE


def test_every_turn_becomes_a_state_with_its_true_prefix() -> None:
    rollout = make_rollout((2, 3, 1), texts=("open box", "take coin", "go den"))
    steps = steps_of(rollout)
    assert [len(s.target_ids) for s in steps] == [2, 3, 1]
    assert np.array_equal(np.concatenate([s.target_ids for s in steps]), rollout.target_ids)
    assert [m["content"] for m in steps[2].prompt.messages] == [
        "win the game",
        "open box",
        "see 0",
        "take coin",
        "see 1",
    ]
    assert steps[1].text == "take coin"
    assert len({s.id for s in steps}) == len({s.prompt.id for s in steps}) == 3
    assert all(s.trajectory == rollout.id and s.group == rollout.group for s in steps)


def opad(**settings: Any) -> OPAD:
    """The method with some settings, without any model."""
    data = {"model": "m", "teachers": [{"model": "t"}, {"model": "u"}], "output_dir": "o", "method": "opad"}
    return OPAD(from_mapping(TrainConfig, {**data, "environment": {"name": HOUSE}, "opad": settings}))


def test_sampled_steps() -> None:
    rollouts = [make_rollout((2,) * 8, name=str(i), seed=i) for i in range(40)]

    def chosen(number: int, **settings: Any) -> list[Sample]:
        batch = Batch(number, list(rollouts))
        opad(**settings).split(batch)
        assert batch.lost["not_chosen"] == 320 - len(batch.samples)
        return batch.samples

    assert len(chosen(0)) == 320
    uniform = {"sampling": "uniform", "steps_per_trajectory": 2}
    first, again, later = chosen(0, **uniform), chosen(0, **uniform), chosen(1, **uniform)
    assert len(first) == 80 and [s.id for s in first] == [s.id for s in again] != [s.id for s in later]
    for step in chosen(0)[:8]:
        logprobs = step.turns[-1].logprobs
        assert logprobs is not None
        assert surprise(step) == pytest.approx(-logprobs.mean())
    by_surprise = chosen(0, sampling="surprise", steps_per_trajectory=2)
    mean_all = np.mean([surprise(s) for s in chosen(0)])
    assert np.mean([surprise(s) for s in by_surprise]) > mean_all


def test_settings(models: dict[str, str], prompt_file: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"needs an environment"):
        build_method(make_config(models, prompt_file, tmp_path, method="opad"))
    with pytest.raises(ConfigError, match=r"opad\.sampling='some'"):
        make_config(models, prompt_file, tmp_path, opad={"sampling": "some"})


@pytest.mark.parametrize("method", ["opad", "sage_opd", "tcod", "entropy_opd", "opd"])
def test_a_run_in_an_environment(models: dict[str, str], tmp_path: Path, method: str) -> None:
    """Rollouts, annotation, update and evaluation, from the configuration alone."""
    teachers = [{"model": models["big"]}, {"model": models["small"]}]
    config = make_config(
        models,
        "",
        tmp_path / "run",
        method=method,
        teachers=teachers if method == "opad" else teachers[:1],
        divergence="jsd",
        max_steps=2,
        save_steps=1,
        per_device_train_batch_size=2,
        log_completions=True,
        opad={"sampling": "uniform", "steps_per_trajectory": 1},
        sage={"judge_max_tokens": 3, "judge_prompt": "{llm_text}", "use_failures": False},
        environment={
            "name": HOUSE,
            "num_environments": 2,
            "max_turns": 2,
            "max_trajectory_tokens": 400,
            "eval_splits": ["valid_unseen"],
            "eval_temperatures": [0.0],
            "eval_max_tasks": 2,
            "options": {"count": 6, "instructions": False},
        },
    )
    result = train(config, progress=False)
    metrics = [json.loads(line) for line in (result.output_dir / "metrics.jsonl").read_text().splitlines()]
    assert metrics[0]["step"] == 0 and "eval/valid_unseen/success" in metrics[0]
    assert metrics[-1]["episodes/turns"] == 2 and metrics[-1]["loss"] > 0
    assert (result.output_dir / "evaluations" / "step_2.jsonl").read_text().count("\n") == 2
    if method == "opad":
        assert metrics[-1]["debate/generated"] > 0 and metrics[-1]["completions/kept"] == 2
        assert metrics[-1]["dropped/not_chosen"] == 2  # one of two turns in each of two episodes
    if method == "sage_opd":
        assert metrics[-1]["sage/unparsed"] == 1
        assert metrics[-1]["sage/z"] > 1
        rows = [json.loads(x) for x in (result.output_dir / "verdicts" / "step_2.jsonl").read_text().splitlines()]
        places = [("0.0", 0), ("0.0", 1), ("1.0", 0), ("1.0", 1)]
        assert sorted((row["rollout_id"], row["turn"]) for row in rows) == places
        assert {(row["verdict"], row["weight"]) for row in rows} <= {("unparsed", 1.0), ("det_fail", 1.0)}
        assert not (result.output_dir / "debates").exists()
    if method == "tcod":
        assert metrics[-2]["tcod/turns_kept"] == 0.5 and metrics[-1]["tcod/turns_kept"] == 1.0


def test_the_eval_command_plays_episodes(models: dict[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [
        "eval", "--model", models["student"], "--output_dir", "unused", "--max_completion_length", "4",
        "--environment.name", HOUSE, "--environment.max_turns", "2", "--environment.num_environments", "2",
        "--environment.eval_max_tasks", "3", "--environment.options.count", "4",
    ]  # fmt: skip
    assert main(arguments) == 2
    assert "environment.eval_splits" in capsys.readouterr().err
    assert main([*arguments, "--environment.eval_splits", "[valid_seen]", "--max_prompt_length", "64"]) == 0
    metrics = json.loads(capsys.readouterr().out)
    assert metrics["eval/valid_seen/turns"] == 2 and metrics["eval/valid_seen/success_high"] < 1


def test_training_and_the_eval_command_sample_alike(
    models: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without the repetition penalty of the rollouts, which over an episode would punish the words of the prompt."""
    used: list[SamplingParams] = []
    plain = Episodes.play

    def play(self: Episodes, sampler: Any, jobs: Any, params: SamplingParams) -> Any:
        used.append(params)
        return plain(self, sampler, jobs, params)

    monkeypatch.setattr(Episodes, "play", play)
    environment = {
        "name": HOUSE, "num_environments": 2, "max_turns": 1, "eval_splits": ["valid_seen"], "eval_max_tasks": 1,
        "eval_temperatures": [0.0, 0.8], "options": {"count": 4}, "stop": ["."],
    }  # fmt: skip
    config = make_config(
        models, "", tmp_path / "run", method="opd", teachers=[{"model": models["big"]}], environment=environment,
        repetition_penalty=1.3, top_p=0.7, top_k=9, max_steps=1, per_device_train_batch_size=1,
    )  # fmt: skip
    train(config, progress=False)
    greedy, sampled, trained, *_ = used
    assert (trained.repetition_penalty, trained.temperature) == (1.3, 1.0)
    assert (greedy.temperature, greedy.top_p, greedy.top_k, greedy.repetition_penalty) == (0.0, 1.0, 0, 1.0)
    assert (sampled.temperature, sampled.top_p, sampled.top_k, sampled.repetition_penalty) == (0.8, 0.7, 9, 1.0)
    del used[:]
    assert main(["eval", "--config", str(tmp_path / "run" / "config.yaml"), "--model", models["student"]]) == 0
    assert used == [greedy, sampled]


def test_a_run_whose_episodes_all_break_ends(models: dict[str, str], tmp_path: Path) -> None:
    code = tmp_path / "broken.py"
    code.write_text(
        "from opdengine.environments import Observation\n"
        "class Broken:\n"
        "    @classmethod\n"
        "    def tasks(cls, split, **options):\n"
        "        return [{'id': str(i)} for i in range(4)]\n"
        "    def reset(self, *, seed, task):\n"
        "        return Observation(({'role': 'user', 'content': 'go'},))\n"
        "    def step(self, message):\n"
        "        raise RuntimeError('the engine is gone')\n"
        "    def close(self):\n"
        "        pass\n"
    )
    config = make_config(
        models, "", tmp_path / "run", method="opd", teachers=[{"model": models["big"]}], max_steps=9, max_bad_steps=1,
        per_device_train_batch_size=2, environment={"name": f"{code}:Broken", "num_environments": 2},
    )  # fmt: skip
    with pytest.raises(ServiceError, match=r"every episode of 2 steps in a row broke.*dropped/environment/error"):
        train(config, progress=False)
