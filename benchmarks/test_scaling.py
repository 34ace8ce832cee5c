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

from opdengine.config.loading import from_mapping
from opdengine.config.train import TrainConfig
from opdengine.metrics import write_jsonl
from opdengine.models.chat import load_tokenizer
from opdengine.models.checkpoint import restore_optimizer, save_checkpoint
from opdengine.training.optimizer import build_optimizer, build_scheduler
from tiny import task
from tiny.demo import STUDENT

PROMPTS, STEPS = 64, 3
TIME_MARGIN = 0.3
"""Of a ratio of times in one run."""
SPLITS = {
    "": {},
    "split_head": {"vocab_parallel_head": True},
    "sharded_teacher": {"shard": True},
}


def make_model(folder: Path, hidden: int, layers: int) -> str:
    """A random Qwen3 with the bundled tokenizer and a head that is padded far beyond it."""
    from transformers import AutoModelForCausalLM, Qwen3Config

    tokenizer = load_tokenizer(STUDENT)
    config = Qwen3Config(
        vocab_size=16384, hidden_size=hidden, intermediate_size=3 * hidden, num_hidden_layers=layers,
        num_attention_heads=hidden // 64, num_key_value_heads=hidden // 128, head_dim=64, tie_word_embeddings=False,
        max_position_embeddings=1024, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
    )  # fmt: skip
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def launch(processes: int, *arguments: str) -> dict:
    """The JSON that the first process prints."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    worker = str(ROOT / "benchmarks" / "scaling_worker.py")
    done = subprocess.run(
        [sys.executable, *(torchrun if processes > 1 else []), worker, *arguments],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}"},
        capture_output=True, text=True, timeout=900, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(next(line for line in done.stdout.splitlines() if line.startswith("{")))


def test_step_on_processes(tmp_path, record, guard):
    """The same 64 prompts on all numbers of processes; with two also a split head, and a teacher that is split."""
    rows = [r for skill in task.SKILLS for r in task.prompts("train", skill, PROMPTS // 3 + 1, seed=5)]
    write_jsonl(tmp_path / "train.jsonl", rows[:PROMPTS])
    student, teacher = make_model(tmp_path / "student", 384, 6), make_model(tmp_path / "teacher", 512, 8)
    settings = {
        "model": student,
        "teachers": [{"model": teacher, "name": "teacher"}],
        "method": "opd",
        "train_data": [str(tmp_path / "train.jsonl")],
        "output_dir": str(tmp_path / "run"),
        "max_completion_length": 48,
        "learning_rate": 0.0,
        "max_steps": STEPS,
        "max_tokens_per_batch": 8192,
    }
    found: dict[int, dict] = {}
    for processes, split in ((1, ""), (2, ""), (4, ""), (2, "split_head"), (2, "sharded_teacher")):
        changed = {**settings, **SPLITS[split]}
        if changed.pop("shard", False):
            changed["teachers"] = [{**settings["teachers"][0], "shard": True}]
        file = tmp_path / "settings.json"
        file.write_text(json.dumps(changed))
        figures = launch(processes, str(file), str(PROMPTS), str(STEPS))
        found.setdefault(processes, figures)
        assert figures["loss"] == pytest.approx(found[1]["loss"], rel=1e-4)
        figures["over_one_process"] = figures["step_s"] / found[1]["step_s"]
        name = f"step_{processes}_processes" + (f"_{split}" if split else "")
        record(name, {**figures, "cores": len(os.sched_getaffinity(0))})
        if processes > 1:
            guard(name, {"over_one_process": (figures["over_one_process"], TIME_MARGIN)})
        print(f"{name}: {figures['step_s']:.3f} s a step, {figures['over_one_process']:.2f} of one process")


def test_checkpoint(tmp_path, record, guard):
    """Saved and loaded with AdamW's state; bytes over those of the model alone."""
    from transformers import AutoModelForCausalLM

    folder = make_model(tmp_path / "student", 384, 6)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    config = from_mapping(
        TrainConfig, {"model": folder, "teachers": [{"model": folder}], "train_data": ["x"], "output_dir": "x"}
    )
    optimizer = build_optimizer(config, model)
    model(input_ids=torch.ones(1, 4, dtype=torch.long), labels=torch.ones(1, 4, dtype=torch.long)).loss.backward()
    optimizer.step()
    state = {"scheduler": build_scheduler(config, optimizer).state_dict()}
    saving, loading = [], []
    for step in range(5):
        start = time.perf_counter()
        path = save_checkpoint(
            tmp_path / "checkpoints",
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
        "parameters": sum(p.numel() for p in model.parameters()),
    }
    print(figures)
    record("checkpoint", figures)
    guard("checkpoint", {"over_weights": (figures["over_weights"], 0.05)})
    assert 3 <= figures["over_weights"] < 4  # weights and two moments, and little else
