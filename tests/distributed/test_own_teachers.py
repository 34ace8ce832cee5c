"""The student as its own teacher on two processes, which split its weights (FSDP2)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from ranks_helpers import torchrun
from safetensors.torch import load_file

from opdengine.config.loading import from_mapping
from opdengine.config.train import TrainConfig
from opdengine.training.run import train

WORKER = str(Path(__file__).with_name("train_worker.py"))
AVERAGE = {"model": "self", "weights": "ema", "teacher_update_rate": 0.5, "name": "average"}
BASE = {"model": "self", "weights": "base", "name": "start"}
LIVE = {"model": "self", "weights": "live", "name": "now"}


@pytest.mark.parametrize(
    ("teachers", "lora"),
    [([BASE, LIVE, {**AVERAGE, "shard": True}], None), ([BASE, LIVE, AVERAGE], {"r": 4})],
    ids=["whole", "adapter"],
)
def test_two_processes_learn_what_one_learns_and_continue_it(
    models: dict[str, str], prompt_file: str, tmp_path: Path, teachers: list[dict[str, Any]], lora: Any
) -> None:
    settings = {
        "model": models["student"], "teachers": teachers, "train_data": [prompt_file], "method": "mt_opd",
        "teacher_prompt_template": "{prompt} It is {answer}.", "max_completion_length": 5, "max_steps": 3,
        "save_steps": 2, "learning_rate": 3e-3, "adam_epsilon": 1e-2, "lora": lora, "log_completions": False,
    }  # fmt: skip
    one = {**settings, "per_device_train_batch_size": 4, "output_dir": str(tmp_path / "one")}
    alone = train(from_mapping(TrainConfig, one), progress=False)
    file = tmp_path / "two.yaml"
    file.write_text(yaml.safe_dump({**settings, "per_device_train_batch_size": 2, "output_dir": str(tmp_path / "two")}))
    done = torchrun(2, WORKER, "--config", str(file))
    assert done.returncode == 0, done.stderr[-4000:]
    places = ["final/adapter_model.safetensors" if lora else "final/model.safetensors"]
    places.append("checkpoints/step_2/teachers.safetensors")
    for place in places:
        ours, theirs = load_file(alone.output_dir / place), load_file(tmp_path / "two" / place)
        assert ours.keys() == theirs.keys()
        for name, value in ours.items():
            torch.testing.assert_close(theirs[name], value, rtol=1e-4, atol=1e-5, msg=f"{place} {name}")
    # What two processes saved is continued by one.
    last = tmp_path / "two" / "checkpoints" / "step_2"
    again = {**one, "output_dir": str(tmp_path / "two"), "resume_from_checkpoint": str(last)}
    continued = train(from_mapping(TrainConfig, again), progress=False)
    for name, value in load_file(alone.output_dir / places[0]).items():
        torch.testing.assert_close(load_file(continued.output_dir / places[0])[name], value, rtol=1e-4, atol=1e-5)
