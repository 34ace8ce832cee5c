"""Checkpoints: whole or not there, whatever happens while they are written; what they hold comes back."""

from __future__ import annotations

import dataclasses
import errno
import json
import logging
import os
import random
import resource
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from engine_helpers import make_config
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from opdengine.data.prompts import DataError
from opdengine.errors import WriteError
from opdengine.models import checkpoint as module
from opdengine.models import manifest
from opdengine.models.checkpoint import (
    CheckpointError,
    list_checkpoints,
    read_state,
    restore_optimizer,
    save_checkpoint,
)
from opdengine.models.random_state import random_state, set_random_state
from opdengine.training import loop
from opdengine.training.run import train
from opdengine.training.run_folder import InputFiles
from opdengine.training.step import Engine

ROOT = Path(__file__).parents[2]


class Killed(BaseException):
    """Stands for SIGKILL: nothing may be tidied up after it."""


@pytest.fixture
def trained(models: dict[str, str], tokenizer: Any) -> dict[str, Any]:
    """A model, and AdamW after one step."""
    model = AutoModelForCausalLM.from_pretrained(models["student"])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    step(model, optimizer)
    return {"model": model, "tokenizer": tokenizer, "optimizer": optimizer, "state": {"version": 1}}


def step(model: Any, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    model(input_ids=torch.arange(12)[None], labels=torch.arange(12)[None]).loss.backward()
    optimizer.step()


def names(folder: Path) -> list[str]:
    return [path.name for path in list_checkpoints(folder)]


def kill_at(monkeypatch: pytest.MonkeyPatch, number: int) -> list[int]:
    """End the process, so to speak, at the n-th call that changes something on the disk."""
    calls = [0]
    places = [
        (module, "save_file"), (module, "flush"), (manifest, "flush"), (Path, "rename"), (shutil, "rmtree"),
        (Path, "write_text"),
    ]  # fmt: skip
    for owner, name in places:
        plain = getattr(owner, name)

        def counted(*args: Any, plain: Any = plain, **kwargs: Any) -> Any:
            calls[0] += 1
            if calls[0] == number:
                raise Killed
            return plain(*args, **kwargs)

        monkeypatch.setattr(owner, name, counted)
    return calls


@pytest.mark.parametrize("again", [False, True], ids=["a new step", "a step that was saved before"])
def test_a_kill_at_any_moment_leaves_a_whole_checkpoint(trained: dict[str, Any], tmp_path: Path, again: bool) -> None:
    """Writing step 3, in place of another step 3 where a run went back to step 2."""
    ready = tmp_path / "ready"
    for number in (1, 2, *([3] if again else [])):
        save_checkpoint(ready, step=number, **trained)
    size = {p.relative_to(ready / "step_2"): p.stat().st_size for p in (ready / "step_2").rglob("*") if p.is_file()}
    moment, done = 0, False
    while not done:
        moment += 1
        folder = tmp_path / f"killed_{moment}"
        shutil.copytree(ready, folder)
        with pytest.MonkeyPatch.context() as patch:
            kill_at(patch, moment)
            try:
                save_checkpoint(folder, step=3, keep=2, **trained)
                done = True
            except Killed:
                pass
        assert names(folder)[-1] in ("step_2", "step_3")
        for path in list_checkpoints(folder)[-1:]:
            found = {p.relative_to(path): p.stat().st_size for p in path.rglob("*") if p.is_file()}
            assert found.keys() == size.keys()
            assert all(found[p] == size[p] for p in found if p.suffix == ".safetensors")
            assert read_state(path)["version"] == 1
        save_checkpoint(folder, step=3, keep=2, **trained)  # the next life
        assert names(folder) == ["step_2", "step_3"]
        assert not [p for p in folder.iterdir() if p.name.startswith(".")]
        shutil.rmtree(folder)
    assert moment > 15


def test_the_newest_are_kept_and_later_ones_of_an_abandoned_line_go(trained: dict[str, Any], tmp_path: Path) -> None:
    for number in (1, 2, 3, 4, 5):
        save_checkpoint(tmp_path, step=number, keep=3, **trained)
    assert names(tmp_path) == ["step_3", "step_4", "step_5"]
    save_checkpoint(tmp_path, step=4, keep=2, **trained)  # continued from step 3
    assert names(tmp_path) == ["step_3", "step_4"]


@pytest.mark.parametrize("fault", [OSError(errno.ENOSPC, "No space left on device"), Exception("in its own words")])
def test_a_failed_save_says_so_and_leaves_the_one_before(
    trained: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: Exception
) -> None:
    save_checkpoint(tmp_path, step=1, **trained)

    def full(*args: Any) -> None:
        raise fault

    monkeypatch.setattr(module, "save_file", full)
    with pytest.raises(WriteError, match=r"step_2.*could not be written.*--resume_from_checkpoint latest"):
        save_checkpoint(tmp_path, step=2, keep=1, **trained)
    assert names(tmp_path) == ["step_1"] == [p.name for p in tmp_path.iterdir()]


def test_optimizer_and_random_states_come_back(trained: dict[str, Any], tmp_path: Path) -> None:
    random.gauss(0, 1), np.random.standard_normal(), torch.rand(3)  # half of a pair is kept for the next call
    path = save_checkpoint(tmp_path, step=1, **trained)
    expected = [random.gauss(0, 1), random.random(), np.random.standard_normal(3).tolist(), torch.rand(3).tolist()]
    step(trained["model"], trained["optimizer"])
    model = AutoModelForCausalLM.from_pretrained(path / "model")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    restore_optimizer(path, model, optimizer)
    found = [random.gauss(0, 1), random.random(), np.random.standard_normal(3).tolist(), torch.rand(3).tolist()]
    assert found == expected
    step(model, optimizer)
    for ours, theirs in zip(model.parameters(), trained["model"].parameters(), strict=True):
        assert torch.equal(ours, theirs)
    assert not [p for p in path.rglob("*") if p.suffix in (".pt", ".pkl", ".bin")]


def test_random_state_is_all_of_the_state() -> None:
    state = random_state()
    expected = (random.random(), np.random.random(), torch.rand(()).item())
    set_random_state(state)
    assert (random.random(), np.random.random(), torch.rand(()).item()) == expected


def test_another_model_is_refused(trained: dict[str, Any], models: dict[str, str], tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, step=1, **trained)
    other = AutoModelForCausalLM.from_pretrained(models["big"])
    with pytest.raises(CheckpointError, match=r"optimiser state .* fits no parameter of this model"):
        restore_optimizer(path, other, torch.optim.AdamW(other.parameters()))


def test_a_full_disk_ends_the_run_with_a_usable_checkpoint(
    models: dict[str, str], prompt_file: str, tmp_path: Path
) -> None:
    """The system refuses files above a size, which it reports like a full disk."""
    settings = {
        "model": models["student"], "teachers": [{"model": models["big"]}], "method": "opd", "max_steps": 2,
        "train_data": [prompt_file], "output_dir": str(tmp_path / "run"), "save_steps": 1,
        "per_device_train_batch_size": 2, "max_completion_length": 4,
    }  # fmt: skip
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(settings))
    weights = (Path(models["student"]) / "model.safetensors").stat().st_size

    def run(limit: int) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}"}
        code = "import sys; from opdengine.cli import main; sys.exit(main(sys.argv[1:]))"
        arguments = ["train", "--config", str(tmp_path / "run.yaml"), "--resume_from_checkpoint", "latest"]
        return subprocess.run(
            [sys.executable, "-c", code, *arguments], env=environment, capture_output=True, text=True, check=False,
            timeout=300, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
        )  # fmt: skip

    (tmp_path / "run").mkdir()
    stopped = run(weights + 4096)  # the optimiser's file is about twice as large
    assert stopped.returncode == 2
    assert "step_1' could not be written" in stopped.stderr and "Traceback" not in stopped.stderr
    assert list_checkpoints(tmp_path / "run" / "checkpoints") == []
    done = run(resource.RLIM_INFINITY)
    assert done.returncode == 0, done.stderr[-3000:]
    assert names(tmp_path / "run" / "checkpoints") == ["step_1", "step_2"]
    state = load_file(tmp_path / "run" / "checkpoints" / "step_2" / "optimizer.safetensors")
    assert "model.embed_tokens.weight.exp_avg" in state


def test_a_data_file_that_changes_under_the_run_is_noticed_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data = tmp_path / "train.jsonl"
    data.write_text(json.dumps({"prompt": "a"}) + "\n")
    files = InputFiles([str(data), "hub/dataset:train"])
    with caplog.at_level(logging.WARNING, logger="opdengine"):
        files.check()
        assert not caplog.records
        data.write_text(json.dumps({"prompt": "longer"}) + "\n")
        files.check()
        files.check()
        assert [r.getMessage().split(" while")[0] for r in caplog.records] == [f"{data} has changed"]
        data.unlink()
        files.check()
        assert "has disappeared" in caplog.records[-1].getMessage()


def test_a_full_disk_while_logging_ends_the_run_with_the_remedy(
    models: dict[str, str], prompt_file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config(models, prompt_file, tmp_path, log_completions=True, save_steps=1)
    plain, calls = loop.write_jsonl, [0]

    def full(path: Path, rows: Any) -> None:
        calls[0] += 1
        if calls[0] == 2:
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        plain(path, rows)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "write_jsonl", full)
        with pytest.raises(WriteError, match=r"No space left.*step_2.jsonl.*--resume_from_checkpoint latest"):
            train(config, progress=False)
    assert names(tmp_path / "checkpoints") == ["step_1"]
    resumed = dataclasses.replace(config, resume_from_checkpoint="latest")
    assert train(resumed, progress=False).metrics["policy_version"] == 3


def test_data_that_change_during_a_run_are_reported_and_refused_at_resume(
    models: dict[str, str], prompt_file: str, tmp_path: Path, caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    data = tmp_path / "train.jsonl"
    data.write_text(Path(prompt_file).read_text())
    config = make_config(models, str(data), tmp_path / "run", max_steps=1, save_steps=1)
    plain = Engine.finish

    async def finish(self: Engine, prepared: Any) -> Any:
        data.write_text(data.read_text().replace('"answer": "0"', '"answer": "none"'))
        return await plain(self, prepared)

    monkeypatch.setattr(Engine, "finish", finish)
    with caplog.at_level(logging.WARNING, logger="opdengine"):
        train(config, progress=False)
    assert sum(f"{data} has changed" in r.getMessage() for r in caplog.records) == 1
    with pytest.raises(DataError, match="other training data"):
        train(dataclasses.replace(config, resume_from_checkpoint="latest"), progress=False)
