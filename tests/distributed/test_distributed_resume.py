"""Runs on two processes: resumed on as many or on one, and ended by one process that fails or is killed."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from ranks_helpers import ROOT, each_to_its_end, torchrun
from safetensors.torch import load_file

from opdengine.models.checkpoint import list_checkpoints
from opdengine.training.writer import read_metrics

WORKER = str(Path(__file__).with_name("train_worker.py"))
STEPS = 4


@pytest.fixture(scope="module")
def world(models: dict[str, str], prompt_file: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of two processes in ``whole``, and its configuration."""
    root = tmp_path_factory.mktemp("resume")
    settings = {
        "model": models["student"],
        "teachers": [{"model": models["big"]}, {"model": models["small"]}],
        "train_data": [prompt_file],
        "eval_data": [prompt_file],
        "eval_max_prompts": 3,
        "method": "mt_opd",
        "per_device_train_batch_size": 2,
        "max_completion_length": 5,
        "max_steps": STEPS,
        "save_steps": 2,
        "learning_rate": 3e-3,
        "adam_epsilon": 1e-2,
    }
    (root / "run.yaml").write_text(yaml.safe_dump(settings))
    done = train(root, 2, "whole")
    assert done.returncode == 0, done.stderr[-4000:]
    return root


def train(
    root: Path,
    processes: int,
    folder: str,
    *arguments: str,
    start: Callable[..., Any] = torchrun,
    **environment: str,
) -> Any:
    where = ("--config", str(root / "run.yaml"), "--output_dir", str(root / folder))
    return start(processes, WORKER, *where, *arguments, **environment)


def half(root: Path, folder: str) -> None:
    """The whole run as it was when its checkpoint of step 2 had been written."""
    shutil.copytree(root / "whole", root / folder)
    shutil.rmtree(root / folder / "final")
    shutil.rmtree(root / folder / "checkpoints" / "step_4")


def final(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "final" / "model.safetensors")


def prompts(folder: Path, steps: int = STEPS) -> list[list[str]]:
    """Prompts of every step, in order."""
    files = [folder / "rollouts" / f"step_{step}.jsonl" for step in range(1, steps + 1)]
    return [[json.loads(line)["prompt_id"] for line in file.read_text().splitlines()] for file in files]


def test_the_first_process_writes_for_all(world: Path) -> None:
    folder = world / "whole"
    assert [line["step"] for line in read_metrics(folder / "metrics.jsonl")] == list(range(STEPS + 1))
    assert all(len(step) == 4 for step in prompts(folder))
    assert len((folder / "evaluations" / f"step_{STEPS}.jsonl").read_text().splitlines()) == 3
    assert [p.name for p in list_checkpoints(folder / "checkpoints")] == ["step_2", "step_4"]


def test_resumed_on_as_many_processes_the_weights_are_the_same_bits(world: Path) -> None:
    half(world, "again")
    assert train(world, 2, "again", "--resume_from_checkpoint", "latest").returncode == 0
    one, other = final(world / "whole"), final(world / "again")
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.slow
def test_on_a_pretend_device_a_resumed_run_ends_as_one_that_was_not_stopped(
    world: Path, models: dict[str, str]
) -> None:
    """With teachers and vocabulary split, bfloat16, evaluation and checkpoints: no tensor is left on the CPU."""
    settings = yaml.safe_load((world / "run.yaml").read_text())
    settings["teachers"] = [{"model": models[name], "shard": True} for name in ("big", "small")]
    (world / "device.yaml").write_text(yaml.safe_dump({**settings, "vocab_parallel_head": True, "bf16": True}))
    device = str(Path(__file__).with_name("on_pretend_device.py"))

    def train_there(*arguments: str) -> None:
        where = ("--config", str(world / "device.yaml"), "--output_dir", str(world / "device"), *arguments)
        done = torchrun(2, device, WORKER, *where)
        assert done.returncode == 0, done.stderr[-4000:]

    train_there()
    whole = final(world / "device")
    assert len(list_checkpoints(world / "device" / "checkpoints")) == 2
    assert len((world / "device" / "evaluations" / f"step_{STEPS}.jsonl").read_text().splitlines()) == 3
    shutil.rmtree(world / "device" / "final")
    shutil.rmtree(world / "device" / "checkpoints" / "step_4")
    train_there("--resume_from_checkpoint", "latest")
    again = final(world / "device")
    assert all(torch.equal(whole[name], again[name]) for name in whole)


def test_resumed_on_one_process_the_data_go_on_in_the_same_order(world: Path) -> None:
    half(world, "alone")
    shutil.rmtree(world / "alone" / "rollouts")
    (world / "alone" / "rollouts").mkdir()
    for step in (1, 2):
        shutil.copy(world / "whole" / "rollouts" / f"step_{step}.jsonl", world / "alone" / "rollouts")
    refused = train(world, 1, "alone", "--resume_from_checkpoint", "latest")
    assert refused.returncode == 2 and "had 4 prompts in a step, this one has 2" in refused.stderr
    larger = ("--per_device_train_batch_size", "4")
    assert train(world, 1, "alone", "--resume_from_checkpoint", "latest", *larger).returncode == 0
    assert prompts(world / "alone") == prompts(world / "whole")
    one, other = final(world / "whole"), final(world / "alone")
    assert one.keys() == other.keys()
    for name in one:
        torch.testing.assert_close(other[name], one[name], rtol=0, atol=1e-3 * 3e-3)


def test_when_one_process_fails_all_stop_with_a_checkpoint(world: Path) -> None:
    failed = train(world, 2, "failed", start=each_to_its_end, FAIL_AT="2")
    assert failed.returncode != 0
    assert "(rank 1): the service of one rank is gone" in failed.stderr
    assert "(rank 0): rank 1 failed (ServiceError): the service of one rank is gone" in failed.stderr
    assert [p.name for p in list_checkpoints(world / "failed" / "checkpoints")] == ["step_1"]
    assert train(world, 2, "failed", "--resume_from_checkpoint", "latest").returncode == 0
    one, other = final(world / "whole"), final(world / "failed")
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_where_teachers_are_split_the_others_do_not_wait_for_one_that_failed(world: Path) -> None:
    split = [word for k in (0, 1) for word in (f"--teachers.{k}.shard", "true")]
    failed = train(world, 2, "split", *split, start=each_to_its_end, FAIL_AT="2")
    assert failed.returncode != 0
    assert "(rank 0): rank 1 failed (ServiceError): the service of one rank is gone" in failed.stderr
    assert [p.name for p in list_checkpoints(world / "split" / "checkpoints")] == ["step_1"]


def test_when_one_sampler_cannot_be_updated_all_stop_with_a_checkpoint(world: Path) -> None:
    failed = train(world, 2, "unsynced", start=each_to_its_end, SYNC_FAIL_AT="2")
    assert failed.returncode != 0
    assert "(rank 0): rank 1 failed (ServiceError): the sampler of one rank is gone" in failed.stderr
    assert [p.name for p in list_checkpoints(world / "unsynced" / "checkpoints")][-1] == "step_2"
    assert [line["step"] for line in read_metrics(world / "unsynced" / "metrics.jsonl")] == [0, 1, 2]
    assert len(prompts(world / "unsynced", 2)) == 2


def test_when_one_process_is_killed_the_others_do_not_wait_for_it(world: Path) -> None:
    killed = train(world, 2, "killed", "--save_steps", "1", KILL_AT="3")
    assert killed.returncode != 0 and "another process has ended" in killed.stderr
    assert [p.name for p in list_checkpoints(world / "killed" / "checkpoints")] == ["step_1", "step_2"]
    assert not (world / "killed" / "final").exists()


def test_when_one_process_is_stopped_the_others_end_with_a_sentence(world: Path) -> None:
    """Without torchrun, which would end the others itself."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        place = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    arguments = ["--config", str(world / "run.yaml"), "--output_dir", str(world / "stopped"), "--save_steps", "1"]
    paths = f"{ROOT}{os.pathsep}{ROOT / 'kernels'}"
    shared = {**os.environ, **place, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths, "STOP_AT": "3"}
    processes = [
        subprocess.Popen(
            [sys.executable, WORKER, *arguments, "--ddp_timeout", "30"],
            env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}, stderr=subprocess.PIPE, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    try:
        error = processes[0].communicate(timeout=300)[1]
    finally:
        for process in processes:
            process.kill()
            process.wait()
            process.stderr.close()
    assert processes[0].returncode == 2 and "Traceback" not in error
    assert "opdengine (rank 0): another process did not answer within ddp_timeout=30 seconds: it hangs" in error
    assert [p.name for p in list_checkpoints(world / "stopped" / "checkpoints")] == ["step_1", "step_2"]


def test_when_one_process_is_told_to_end_all_end_with_a_checkpoint_of_that_step(world: Path) -> None:
    told = train(world, 2, "told", TERM_AT="3")
    assert told.returncode != 0 and "SIGTERM: the run ends; continue it from" in told.stderr
    assert [p.name for p in list_checkpoints(world / "told" / "checkpoints")] == ["step_2", "step_3"]
    assert train(world, 2, "told", "--resume_from_checkpoint", "latest").returncode == 0
    one, other = final(world / "whole"), final(world / "told")
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_the_best_checkpoint_and_an_early_stop_are_those_of_all_processes(world: Path) -> None:
    """The mean over the processes decides: the answers of the first one alone are best at step 3 and go on."""
    settings = {
        "eval_max_prompts": 2, "eval_steps": 1, "metric_for_best_model": "accuracy", "load_best_model_at_end": True,
        "early_stopping_patience": 2, "save_steps": 1, "save_total_limit": 1, "max_steps": 9,
    }  # fmt: skip
    words = [word for name, value in settings.items() for word in (f"--{name}", str(value).lower())]
    done = train(world, 2, "best", *words, GRADES="1/1 0.2/0.2 0.1/0.9 0.9/0 0.6/0.3")
    assert done.returncode == 0, done.stderr[-4000:]
    folder = world / "best"
    lines = read_metrics(folder / "metrics.jsonl")
    assert [line["eval/accuracy"] for line in lines] == pytest.approx([1.0, 0.2, 0.5, 0.45, 0.45])
    assert [p.name for p in list_checkpoints(folder / "checkpoints")] == ["step_2", "step_4"]
    best, last = (load_file(folder / "checkpoints" / f"step_{i}" / "model" / "model.safetensors") for i in (2, 4))
    kept = final(folder)
    assert all(torch.equal(best[name], kept[name]) for name in kept)
    assert any(not torch.equal(last[name], kept[name]) for name in kept)
    assert all(f"rank {rank} has the model of step_2" in done.stderr for rank in (0, 1))
    again = train(world, 2, "best", *words, "--resume_from_checkpoint", "latest")  # ends where it is
    assert again.returncode == 0, again.stderr[-4000:]
    assert len(read_metrics(folder / "metrics.jsonl")) == 5


def test_what_falls_apart_is_counted_over_all_processes_and_said_by_one(world: Path) -> None:
    """Every grade fails and every gap is masked: the first process speaks, and both end."""
    verifier = world / "broken.py"
    verifier.write_text("def grade(text, answer, messages):\n    raise KeyError('solution')\n")
    settings = ["--method", "uni_opd", "--num_generations", "2", "--verifier", f"{verifier}:grade", "--max_steps", "1"]
    ended = train(world, 2, "apart", *settings, "--advantage.max_gap", "1e-6")
    assert ended.returncode != 0 and "finished" not in ended.stdout
    (line,) = [line for line in ended.stderr.splitlines() if line.startswith("WARNING, step 1")]
    assert "8 of 8 completions could not be graded" in line
    assert "none of the 1 steps of this run has trained anything" in ended.stderr
    assert not (world / "apart" / "final").exists()
