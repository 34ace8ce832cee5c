"""Whole runs on model folders: command line, run folder, checkpoints, resume."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from engine_helpers import PROMPTS
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import opd_kernels
import opdengine
from opdengine.cli import main
from opdengine.errors import ServiceError
from opdengine.models.checkpoint import list_checkpoints
from opdengine.training.step import Engine
from opdengine.training.writer import read_metrics

KILLER = '''
"""Grades like "numeric"; kills the training process at the call that the environment names."""
import os, pathlib, signal, time
calls = 0

def grade(text, answer, messages):
    global calls
    calls += 1
    if calls == int(os.environ.get("KILL_AT_CALL", "-1")):
        guard = pathlib.Path(f"/proc/{os.getppid()}/stat").read_text()
        os.kill(int(guard.rpartition(")")[2].split()[1]), signal.SIGKILL)
        time.sleep(60)
    return float(answer in text)
'''


@pytest.fixture(scope="module")
def world(models: dict[str, str], prompt_file: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A configuration file for three steps of MAD-OPD and its finished run."""
    root = tmp_path_factory.mktemp("runs")
    (root / "grade.py").write_text(KILLER)
    settings = {
        "model": models["student"],
        "teachers": [{"name": "expert", "model": models["big"]}, {"model": models["small"]}],
        "train_data": [prompt_file],
        "eval_data": [prompt_file],
        "eval_max_prompts": 3,
        "eval_steps": 2,
        "verifier": f"{root / 'grade.py'}:grade",
        "verifier_workers": 1,
        "output_dir": str(root / "whole"),
        "method": "mad_opd",
        "divergence": {"agentic": "jsd", "code": "reverse_kl"},
        "debate": {"max_tokens": 5, "prompts": PROMPTS},
        "per_device_train_batch_size": 4,
        "max_completion_length": 6,
        "max_steps": 3,
        "warmup_ratio": 0.3,
        "lr_scheduler_type": "cosine",
        "learning_rate": 3e-3,
        "save_steps": 1,
        "report_to": ["tensorboard"],
    }
    (root / "run.yaml").write_text(yaml.safe_dump(settings))
    finished = run(root, "train")
    assert finished.returncode == 0, finished.stderr
    return {"root": root, "settings": settings, "output": finished.stdout}


def run(root: Path, command: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """``python -m opdengine`` with the configuration file, in a process of its own."""
    places = [Path(opdengine.__file__).parents[1], Path(opd_kernels.__file__).parents[1]]
    return subprocess.run(
        [sys.executable, "-m", "opdengine", command, "--config", str(root / "run.yaml"), *arguments],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(map(str, places)), "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The message with which the command line ends; no model may be loaded."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(AutoModelForCausalLM, "from_pretrained", no_model)
        assert main(arguments) == 2
    message = capsys.readouterr().err
    assert "Traceback" not in message
    return message


def no_model(*args: Any, **kwargs: Any) -> None:
    raise AssertionError("a model was loaded before the settings were refused")


Train = Callable[..., str]


@pytest.fixture
def refuse(world: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> Train:
    return lambda *arguments: refused(capsys, "train", "--config", str(world["root"] / "run.yaml"), *arguments)


def test_the_result_is_a_model_folder(world: dict[str, Any], models: dict[str, str]) -> None:
    final = world["root"] / "whole" / "final"
    assert world["output"] == f"finished: {final}\n"
    model = AutoModelForCausalLM.from_pretrained(final)
    tokenizer = AutoTokenizer.from_pretrained(final)
    messages = [{"role": "user", "content": "What is 1 + 1?"}]
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt")
    assert model.generate(**ids, max_new_tokens=3).shape[1] > ids["input_ids"].shape[1]
    before = weights(Path(models["student"]))
    after = weights(final)
    assert before.keys() == after.keys()
    assert any(not torch.equal(before[name], after[name]) for name in before)


def test_the_folder_holds_what_was_promised(world: dict[str, Any]) -> None:
    folder = world["root"] / "whole"
    lines = read_metrics(folder / "metrics.jsonl")
    assert [line["step"] for line in lines] == [0, 1, 2, 3]
    assert all("loss" in line for line in lines[1:])
    assert ["eval/accuracy" in line for line in lines] == [True, False, True, True]
    assert {"eval/accuracy/code", "eval/accuracy/agentic"} <= lines[0].keys()
    for step in (1, 2, 3):
        rollouts = [json.loads(line) for line in (folder / f"rollouts/step_{step}.jsonl").read_text().splitlines()]
        assert len(rollouts) == 4
        assert {r["policy_version"] for r in rollouts} == {step - 1}
        debates = [json.loads(line) for line in (folder / f"debates/step_{step}.jsonl").read_text().splitlines()]
        assert [d["prompt_id"] for d in debates] == [r["prompt_id"] for r in rollouts]
        assert debates[0]["teachers"] == ["expert", "small"]
    assert (folder / "evaluations" / "step_2.jsonl").is_file()
    assert list((folder / "tensorboard").iterdir())
    assert [p.name for p in list_checkpoints(folder / "checkpoints")] == ["step_1", "step_2", "step_3"]
    config = yaml.safe_load((folder / "config.yaml").read_text())
    assert config["divergence"] == {"agentic": "jsd", "code": "reverse_kl"}
    assert config["debate"]["rounds"] == 2  # defaults are written down, too


def test_a_killed_and_resumed_run_ends_with_the_same_weights(world: dict[str, Any]) -> None:
    root, folder = world["root"], world["root"] / "killed"
    at = ("--output_dir", str(folder))
    killed = run(root, "train", *at, KILL_AT_CALL="5")  # in the evaluation after step 2
    assert killed.returncode == -signal.SIGKILL
    assert [p.name for p in list_checkpoints(folder / "checkpoints")] == ["step_1"]
    assert not (folder / "final").exists()
    (folder / "checkpoints" / ".step_2.77.partial").mkdir()  # what a kill in the middle of saving leaves
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "loss": 0.1')
    resumed = run(root, "train", *at, "--resume_from_checkpoint", "latest")
    assert resumed.returncode == 0, resumed.stderr
    whole, again = weights(root / "whole" / "final"), weights(folder / "final")
    assert all(torch.equal(whole[name], again[name]) for name in whole)
    one, other = read_metrics(root / "whole" / "metrics.jsonl"), read_metrics(folder / "metrics.jsonl")
    assert [line["step"] for line in other] == [0, 1, 2, 3]
    for a, b in zip(one, other, strict=True):
        for name in ("loss", "learning_rate", "grad_norm", "policy_version", "eval/accuracy"):
            assert a.get(name) == b.get(name), name
    for step in (1, 2, 3):
        ours, theirs = (root / name / f"rollouts/step_{step}.jsonl" for name in ("whole", "killed"))
        assert ours.read_text() == theirs.read_text()
    assert not list((folder / "checkpoints").glob(".*"))


def test_an_existing_run_is_refused(world: dict[str, Any], refuse: Train) -> None:
    message = refuse()
    assert "already holds a run" in message and "--resume_from_checkpoint latest" in message
    assert len(read_metrics(world["root"] / "whole" / "metrics.jsonl")) == 4


def test_a_run_without_a_checkpoint_is_not_told_to_resume(world: dict[str, Any], refuse: Train, tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 0}\n{"step": 1, "loss": 0.5}\n')
    message = refuse("--output_dir", str(tmp_path))
    assert "already holds a run" in message and "--resume_from_checkpoint" not in message
    assert "finished steps, but no checkpoint" in message and "save_steps" in message
    assert "no checkpoint" in refuse("--output_dir", str(tmp_path), "--resume_from_checkpoint", "latest")
    assert "not a checkpoint" in refuse("--output_dir", str(tmp_path / "x"), "--resume_from_checkpoint", "nowhere")
    assert not (tmp_path / "x").exists()


def test_what_is_started_again_is_the_same_run(world: dict[str, Any], refuse: Train, tmp_path: Path) -> None:
    """Interrupted before its first checkpoint; with other settings it is another one."""
    settings = yaml.safe_load((world["root"] / "whole" / "config.yaml").read_text())
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({**settings, "output_dir": str(tmp_path)}))
    again = ("--output_dir", str(tmp_path), "--resume_from_checkpoint", "latest")
    assert "seed: 0 then, 7 now" in refuse(*again, "--seed", "7", "--max_steps", "2")
    (tmp_path / "final").mkdir()
    assert "not an interrupted run" in refuse(*again)


def test_a_run_that_ended_in_its_first_step_leaves_its_folder_to_the_next(
    world: dict[str, Any], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    arguments = ["train", "--config", str(world["root"] / "run.yaml"), "--output_dir", str(tmp_path)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Engine, "finish", broken)
        assert main([*arguments, "--learning_rate", "1"]) == 2
    assert "the first step fails" in capsys.readouterr().err
    stored = {file: file.stat().st_mtime_ns for file in (tmp_path / "debate_cache").rglob("*.json")}
    assert stored
    assert main([*arguments, "--max_steps", "1"]) == 0  # with the setting mended
    assert [line["step"] for line in read_metrics(tmp_path / "metrics.jsonl")] == [0, 1]
    assert yaml.safe_load((tmp_path / "config.yaml").read_text())["learning_rate"] == world["settings"]["learning_rate"]
    assert {file: file.stat().st_mtime_ns for file in stored} == stored
    assert main(arguments) == 2
    assert "already holds a run" in capsys.readouterr().err


async def broken(*arguments: Any) -> None:
    raise ServiceError("the first step fails")


def test_a_file_as_output_folder_is_refused(refuse: Train, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert "is a file" in refuse("--output_dir", str(tmp_path / "file"))


def test_resuming_with_other_settings_shows_the_difference(refuse: Train) -> None:
    message = refuse("--resume_from_checkpoint", "latest", "--learning_rate", "1e-4", "--debate.tau", "0.5")
    assert "learning_rate: 0.003 then, 0.0001 now" in message
    assert "debate.tau: 1.0 then, 0.5 now" in message and "--allow_changes" in message
    assert "max_steps" not in message


def test_resuming_with_other_data_is_refused(
    world: dict[str, Any], prompt_file: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """The same path with another content."""
    data = tmp_path / "train.jsonl"
    data.write_text(Path(prompt_file).read_text())
    settings = {**world["settings"], "train_data": [str(data)], "eval_data": [], "output_dir": str(tmp_path / "run"),
                "max_steps": 1, "method": "mt_opd"}  # fmt: skip
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(settings))
    assert main(["train", "--config", str(tmp_path / "run.yaml")]) == 0
    data.write_text(data.read_text().replace("What is 3", "What was 3"))
    capsys.readouterr()
    arguments = ["train", "--config", str(tmp_path / "run.yaml"), "--resume_from_checkpoint", "latest"]
    assert "other training data" in refused(capsys, *arguments)


def test_a_checkpoint_of_another_run_starts_a_new_folder_under_the_same_settings(
    world: dict[str, Any], refuse: Train, tmp_path: Path
) -> None:
    checkpoint = str(world["root"] / "whole" / "checkpoints" / "step_2")
    new = str(tmp_path / "new")
    assert "learning_rate" in refuse(
        "--output_dir", new, "--resume_from_checkpoint", checkpoint, "--learning_rate", "1"
    )
    assert not Path(new).exists()
    finished = run(world["root"], "train", "--output_dir", new, "--resume_from_checkpoint", checkpoint)
    assert finished.returncode == 0, finished.stderr
    whole, again = weights(world["root"] / "whole" / "final"), weights(Path(new) / "final")
    assert all(torch.equal(whole[name], again[name]) for name in whole)
    assert (Path(new) / "config.yaml").is_file()
    # That folder is a run now; the other run's checkpoint may not continue in it.
    assert "holds another run" in refuse("--output_dir", new, "--resume_from_checkpoint", checkpoint)


def test_old_checkpoints_are_removed(world: dict[str, Any], tmp_path: Path) -> None:
    arguments = ["--output_dir", str(tmp_path), "--method", "mt_opd", "--save_total_limit", "2", "--eval_steps", "0"]
    assert main(["train", "--config", str(world["root"] / "run.yaml"), *arguments]) == 0
    assert [p.name for p in list_checkpoints(tmp_path / "checkpoints")] == ["step_2", "step_3"]


def test_left_out_rows_are_counted_even_without_evaluation(
    world: dict[str, Any], prompt_file: str, tmp_path: Path
) -> None:
    data = tmp_path / "data.jsonl"
    long = json.dumps({"prompt": "long " * 200, "data_source": "code"})
    data.write_text(Path(prompt_file).read_text() + "not json\n" + long + "\n")
    settings = {**world["settings"], "train_data": [str(data)], "eval_data": [], "output_dir": str(tmp_path / "run"),
                "max_steps": 1, "method": "mt_opd", "skip_bad_rows": True, "max_prompt_length": 100}  # fmt: skip
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(settings))
    assert main(["train", "--config", str(tmp_path / "run.yaml")]) == 0
    first = read_metrics(tmp_path / "run" / "metrics.jsonl")[0]
    assert first == {"step": 0, "data/dropped/not JSON": 1.0, "data/dropped/too_long": 1.0}


def test_eval_and_debate_commands(world: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    config = str(world["root"] / "run.yaml")
    assert main(["eval", "--config", config, "--model", str(world["root"] / "whole" / "final")]) == 0
    last = read_metrics(world["root"] / "whole" / "metrics.jsonl")[-1]
    shown = json.loads(capsys.readouterr().out)
    assert shown["eval/accuracy"] == last["eval/accuracy"]
    assert shown["eval/mean_length"] == last["eval/mean_length"]
    assert main(["debate", "--config", config, "--prompt", "What is 2 + 2?", "--data_source", "code"]) == 0
    text = capsys.readouterr().out
    for expected in ("round 1, expert", "round 1, small", "round 2, expert", "weight of small: 0.500"):
        assert expected in text
    assert main(["debate", "--config", config, "--prompt", "long " * 1500]) == 2
    assert "debate_too_long" in capsys.readouterr().err
    assert main(["doctor"]) == 0
    assert "torch" in capsys.readouterr().out
