"""Steps that train nothing are said aloud and end the run, and what the settings alone show is refused."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_helpers import make_config
from safetensors.torch import load_file

from opdengine.cli import main
from opdengine.config.train import ConfigError
from opdengine.errors import NothingTrainedError, ServiceError
from opdengine.methods.checks import GENERAL, Check, Watch, stall_of
from opdengine.models.checkpoint import list_checkpoints
from opdengine.training.optimizer import build_optimizer
from opdengine.training.run import train
from opdengine.training.step import Engine
from opdengine.training.writer import read_metrics
from opdengine.types import Batch

Models = dict[str, str]

MOVED = {"completions/sampled": 4.0, "completions/kept": 4.0, "grad_norm": 1.0}
SKIPPED = {"completions/sampled": 4.0, "completions/kept": 1.0, "skipped_steps": 1.0, "dropped/debate_too_long": 3.0}
BAD = {**MOVED, "bad_steps": 1.0}
FLAT = {**MOVED, "grad_norm": 0.0, "loss": 0.0}
BROKEN = {"completions/sampled": 0.0, "skipped_steps": 1.0, "episodes/begun": 4.0, "dropped/environment/error": 4.0}


def watch(folder: Path, *checks: Check, **changes: Any) -> Watch:
    return Watch(checks, folder, **{"limit": 2, **changes})


# ------------------------------------------------------------------------------------- the watch


@pytest.mark.parametrize(
    ("metrics", "stall"),
    [
        (MOVED, ""),
        ({**MOVED, "lost_updates": 1.0}, "lost"),
        (SKIPPED, "nothing"),
        (BAD, "not_finite"),
        (FLAT, "no_gradient"),
        (BROKEN, "broken"),
    ],
)
def test_what_a_step_has_trained(metrics: dict[str, float], stall: str) -> None:
    assert stall_of(metrics) == stall


@pytest.mark.parametrize(
    ("row", "error", "message"),
    [
        ([SKIPPED] * 3, NothingTrainedError, r"3 steps in a row, up to step 4 trained nothing \(3 of no rollout with"),
        ([BAD] * 3, FloatingPointError, r"not finite in 3 steps in a row, up to step 4 \(max_bad_steps=2\)"),
        ([BROKEN] * 3, ServiceError, r"every episode of 3 steps in a row broke, up to step 4.*environment/error 4"),
        ([FLAT] * 3, NothingTrainedError, r"gradient exactly 0: .* Is a teacher the student itself\?"),
        ([SKIPPED, BAD, BROKEN], NothingTrainedError, "1 of a loss or gradient that is not finite, 1 of no episode"),
    ],
)
def test_more_in_a_row_than_allowed_end_the_run(
    tmp_path: Path, row: Sequence[dict[str, float]], error: type[Exception], message: str
) -> None:
    """Whatever the reasons are: a run that alternates between two of them trains nothing either."""
    seen = watch(tmp_path)
    seen.look(1, MOVED)
    for step, metrics in enumerate(row[:-1], start=2):
        seen.look(step, metrics)
    with pytest.raises(error, match=message):
        seen.look(4, row[-1])


def test_a_step_that_trains_begins_the_count_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    seen = watch(tmp_path)
    for step, metrics in enumerate([SKIPPED, SKIPPED, MOVED, SKIPPED, SKIPPED, MOVED], start=1):
        seen.look(step, metrics)
    seen.finish(6)
    assert caplog.messages[-1].startswith("4 of the 6 steps trained nothing")
    assert sum("trains nothing" in message for message in caplog.messages) == 1


def test_the_warning_counts_the_reasons_and_names_the_remedy(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    watch(tmp_path).look(1, SKIPPED)
    (message,) = caplog.messages
    assert message.startswith(
        "WARNING, step 1 trains nothing: of 4 rollouts 3 were dropped (dropped/debate_too_long 3)"
    )
    for part in ("1 have no token with any weight", "lower debate.max_tokens or debate.rounds", "max_bad_steps=2"):
        assert part in message


def test_a_run_of_which_no_step_trains_has_failed(tmp_path: Path) -> None:
    short, resumed = watch(tmp_path), watch(tmp_path, trained=True)
    for seen in (short, resumed):
        seen.look(1, SKIPPED)
    with pytest.raises(NothingTrainedError, match=r"none of the 1 steps of this run .*debate_too_long"):
        short.finish(1)
    resumed.finish(1)


def test_a_check_speaks_once_from_its_share_on(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    check = Check("x/failed/", "x/all", "things are lost", "find them", "things/step_{step}.jsonl")
    seen = watch(tmp_path, check)
    for step, failed in enumerate([0, 1, 2, 4], start=1):
        seen.look(step, {**MOVED, "x/failed/a": failed / 2, "x/failed/b": failed / 2, "x/all": 4.0})
    seen.look(5, {**MOVED, "x/failed/a": 3.0})  # without a total nothing was counted
    file = tmp_path / "things" / "step_3.jsonl"
    assert caplog.messages == [f"WARNING, step 3: 2 of 4 things are lost; find them; look at {file}"]
    caplog.clear()
    watch(tmp_path, check, speaks=False).look(1, {**SKIPPED, "x/failed/a": 4.0, "x/all": 4.0})
    assert not caplog.messages  # of several processes the first one speaks
    assert len({c.failed for c in GENERAL}) == len(GENERAL)


# --------------------------------------------------------------------------------- before step 0


@pytest.mark.parametrize(
    "changes",
    [
        {"learning_rate": 0.0},
        {"warmup_ratio": 1.0, "max_steps": 1},
        {"warmup_ratio": 1.0, "max_steps": 1, "lr_scheduler_type": "constant_with_warmup"},
    ],
)
def test_a_learning_rate_of_0_throughout_is_refused(
    models: Models, prompt_file: str, tmp_path: Path, changes: dict[str, Any]
) -> None:
    with pytest.raises(ConfigError, match=r"learning_rate=.* is 0 in every step"):
        train(make_config(models, prompt_file, tmp_path / "run", **changes), progress=False)
    assert not (tmp_path / "run").exists()


def test_a_student_without_a_parameter_to_train_is_refused(models: Models, prompt_file: str, tmp_path: Path) -> None:
    frozen = torch.nn.Linear(2, 2).requires_grad_(False)
    with pytest.raises(ConfigError, match="has no parameter to train"):
        build_optimizer(make_config(models, prompt_file, tmp_path), frozen)


def tight(tiny: Any, tokenizer: Any, folder: Path, window: int) -> str:
    return tiny.make_model(folder / f"window{window}", tokenizer, seed=2, window=window)


@pytest.mark.parametrize(
    ("method", "window", "changes", "message"),
    [
        ("opd", 16, {}, r"a prompt of \d+ tokens with max_completion_length=6"),
        ("mt_opd", 16, {}, r"a prompt of \d+ tokens with max_completion_length=6"),
        ("mt_seqkd", 16, {}, r"a prompt of \d+ tokens with max_completion_length=6"),
        ("opd", 64, {"max_completion_length": 60}, "lower max_completion_length"),
        ("mad_opd", 300, {"debate": {"max_tokens": 280}}, r"with debate.max_tokens=280.*lower debate.max_tokens"),
        ("mad_opd", 400, {"max_completion_length": 380}, "a prompt with its transcript of"),
        ("uni_opd", 300, {"debate": {"max_tokens": 280}, "contexts": "debate"}, "debate.max_tokens=280"),
        ("uni_opd", 16, {}, r"a prompt of \d+ tokens"),
    ],
)
def test_windows_that_hold_no_rollout_are_refused(
    models: Models, prompt_file: str, tiny: Any, tokenizer: Any, tmp_path: Path, method: str, window: int,
    changes: dict[str, Any], message: str,
) -> None:  # fmt: skip
    small = tight(tiny, tokenizer, tmp_path, window)
    teachers = [{"model": small}] if method == "opd" else [{"model": models["big"]}, {"model": small}]
    if method == "mt_seqkd":
        teachers = [{"model": small}]
    changes = {"num_generations": 2, **changes} if method == "uni_opd" else changes
    config = make_config(models, prompt_file, tmp_path / "run", method=method, teachers=teachers, **changes)
    with pytest.raises(ConfigError, match=rf"no prompt .*fits the window of teacher 'window{window}'.*{message}"):
        train(config, progress=False)
    assert read_metrics(tmp_path / "run" / "metrics.jsonl") == []


def test_each_branch_needs_room_at_its_own_teacher(
    models: Models, prompt_file: str, tiny: Any, tokenizer: Any, tmp_path: Path
) -> None:
    teachers = [
        {"model": models["big"], "key": ["agentic"]},
        {"model": tight(tiny, tokenizer, tmp_path, 16), "key": ["code"]},
    ]
    changes: dict[str, Any] = {"teachers": teachers, "camopd": {"domain": ["code"]}, "method": "camopd"}
    with pytest.raises(ConfigError, match="no prompt of data_source 'code' fits the window of teacher 'window16'"):
        train(make_config(models, prompt_file, tmp_path / "run", **changes), progress=False)


def test_one_prompt_that_fits_is_enough(
    models: Models, tiny: Any, tokenizer: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The others are counted step by step."""
    data = tmp_path / "p.jsonl"
    texts = ["a long question, asked at length and in many words " * 3] * 3 + ["hi"]
    data.write_text("".join(json.dumps({"prompt": f"{text} {i}"}) + "\n" for i, text in enumerate(texts)))
    config = make_config(
        models, str(data), tmp_path / "run", method="opd", max_steps=1,
        teachers=[{"model": tight(tiny, tokenizer, tmp_path, 64)}],
    )  # fmt: skip
    metrics = train(config, progress=False).metrics
    assert metrics["dropped/teacher_window/window64"] == 3 and metrics["completions/kept"] == 1
    assert "WARNING, step 1: 3 of 4 rollouts exceed a teacher's window" in caplog.text


# ------------------------------------------------------------------------------------ whole runs


def silence(monkeypatch: pytest.MonkeyPatch, steps: Sequence[int]) -> None:
    """In these steps, from 1, every rollout is dropped."""
    plain, calls = Engine.annotate, [0]

    async def annotate(self: Engine, batch: Batch) -> None:
        await plain(self, batch)
        calls[0] += 1
        for sample in batch.samples if calls[0] in steps else ():
            sample.drop = "debate_too_long"

    monkeypatch.setattr(Engine, "annotate", annotate)


def test_what_was_trained_before_the_run_ends_is_kept(
    models: Models, prompt_file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    silence(monkeypatch, [3, 4, 5])
    with pytest.raises(NothingTrainedError, match=r"3 steps in a row, up to step 5 .*debate_too_long 4"):
        train(make_config(models, prompt_file, tmp_path, max_steps=9, max_bad_steps=2), progress=False)
    assert "WARNING, step 3 trains nothing: of 4 rollouts 4 were dropped" in caplog.text
    (saved,) = list_checkpoints(tmp_path / "checkpoints")
    assert saved.name == "step_5" and json.loads((saved / "state.json").read_text())["version"] == 2
    before, after = (
        load_file(Path(models["student"]) / "model.safetensors"),
        load_file(saved / "model/model.safetensors"),
    )
    assert any(not torch.equal(before[name], after[name]) for name in after)
    assert not (tmp_path / "final").exists()


@pytest.mark.parametrize("steps", [2, 6])
def test_a_run_that_trains_nothing_does_not_finish(
    models: Models, prompt_file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str], steps: int,
) -> None:  # fmt: skip
    """Neither a run shorter than ``max_bad_steps`` nor a longer one; nothing is left to continue from."""
    silence(monkeypatch, range(1, 10))
    arguments = ["--model", models["student"], "--teachers", f"[{{model: {models['big']}}}]", "--method", "opd"]
    arguments += ["--train_data", f"[{prompt_file}]", "--output_dir", str(tmp_path / "run"), "--max_steps", str(steps)]
    assert main(["train", *arguments, "--max_completion_length", "4", "--per_device_train_batch_size", "2"]) == 2
    captured = capsys.readouterr()
    assert "finished" not in captured.out and "lower debate.max_tokens" in captured.err
    assert not list_checkpoints(tmp_path / "run" / "checkpoints") and not (tmp_path / "run" / "final").exists()


def test_a_student_that_is_its_own_teacher_has_nothing_to_learn(
    models: Models, prompt_file: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = make_config(
        models, prompt_file, tmp_path, method="camopd", camopd={"domain": ["code"]}, max_steps=2, max_bad_steps=0,
        teachers=[{"model": models["student"], "name": "a", "key": ["agentic"]},
                  {"model": models["student"], "name": "b", "key": ["code"]}],
    )  # fmt: skip
    with pytest.raises(NothingTrainedError, match=r"tokens have a gap of exactly 0"):
        train(config, progress=False)


@pytest.mark.parametrize(("dtype", "rate"), [("bfloat16", 1e-9), ("float32", 1e-18)])
def test_updates_that_rounding_loses_train_nothing(
    models: Models, prompt_file: str, tmp_path: Path, dtype: str, rate: float
) -> None:
    changes: dict[str, Any] = {"dtype": dtype, "learning_rate": rate, "lr_scheduler_type": "constant", "max_steps": 2}
    with pytest.raises(NothingTrainedError, match=rf"learning_rate={rate:g}, changes no weight: .* dtype: float32"):
        train(make_config(models, prompt_file, tmp_path, **changes), progress=False)


def test_the_first_step_of_a_warm_up_counts_as_trained(models: Models, prompt_file: str, tmp_path: Path) -> None:
    """Its learning rate is 0, as in transformers, and that of the next one is not."""
    config = make_config(models, prompt_file, tmp_path, max_steps=2, warmup_ratio=0.5, max_bad_steps=0)
    train(config, progress=False)
    first, second = read_metrics(tmp_path / "metrics.jsonl")
    assert first["learning_rate"] == 0 and second["learning_rate"] > 0 and "lost_updates" not in first
