"""A step on 1, 2 and 4 CPU processes (one thread each); seconds and bytes of a checkpoint; seconds of a resume.

More processes than idle cores share them: the ratio to look at is that up to the number of cores.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "examples"))

from opdengine.build import build_optimizer, build_scheduler
from opdengine.chat import load_tokenizer
from opdengine.checkpoint import restore_optimizer, save_checkpoint
from opdengine.config import TrainConfig
from opdengine.metrics import write_jsonl
from opdengine.settings import from_mapping
from tiny import task
from tiny.demo import CONVERT, STUDENT

PROMPTS, STEPS = 32, 5


def launch(processes: int, *arguments: str) -> dict:
    """The JSON that the first process prints."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    worker = str(ROOT / "benchmarks" / "scaling_worker.py")
    done = subprocess.run(
        [sys.executable, *(torchrun if processes > 1 else []), worker, *arguments],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}"},
        capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(next(line for line in done.stdout.splitlines() if line.startswith("{")))


def test_step_on_processes(tmp_path, record):
    """The same 32 prompts on all numbers of processes."""
    rows = [r for skill in task.SKILLS for r in task.prompts("train", skill, PROMPTS // 3 + 1, seed=5)]
    write_jsonl(tmp_path / "train.jsonl", rows[:PROMPTS])
    found = {
        n: launch(n, str(tmp_path / "train.jsonl"), str(tmp_path / "run"), str(PROMPTS), str(STEPS)) for n in (1, 2, 4)
    }
    for n, figures in found.items():
        assert figures["loss"] == pytest.approx(found[1]["loss"], rel=1e-4)
        figures["over_one_process"] = figures["step_s"] / found[1]["step_s"]
        record(f"step_{n}_processes", {**figures, "cores": len(os.sched_getaffinity(0))})
        print(f"{n} processes: {figures['step_s']:.3f} s a step, {figures['over_one_process']:.2f} of one process")


def test_checkpoint(tmp_path, record):
    """Saved and loaded with AdamW's state; bytes over those of the model alone."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(STUDENT, dtype=torch.float32)
    config = from_mapping(
        TrainConfig, {"model": STUDENT, "teachers": [{"model": CONVERT}], "train_data": ["x"], "output_dir": "x"}
    )
    optimizer = build_optimizer(config, model)
    model(input_ids=torch.ones(1, 4, dtype=torch.long), labels=torch.ones(1, 4, dtype=torch.long)).loss.backward()
    optimizer.step()
    state = {"scheduler": build_scheduler(config, optimizer).state_dict()}
    saving, loading = [], []
    for step in range(5):
        start = time.perf_counter()
        path = save_checkpoint(
            tmp_path,
            step=step,
            model=model,
            tokenizer=load_tokenizer(STUDENT),
            optimizer=optimizer,
            state=state,
            keep=1,
        )
        saving.append(time.perf_counter() - start)
        start = time.perf_counter()
        again = AutoModelForCausalLM.from_pretrained(path / "model")
        restore_optimizer(path, again, build_optimizer(config, again))
        loading.append(time.perf_counter() - start)
    size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    figures = {
        "save_s": sorted(saving)[2],
        "resume_s": sorted(loading)[2],
        "bytes": size,
        "over_weights": size / weights,
    }
    print(figures)
    record("checkpoint", figures)
    assert 3 <= figures["over_weights"] < 4  # weights and two moments, and little else
