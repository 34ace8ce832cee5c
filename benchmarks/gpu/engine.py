"""The engine on the device: three steps on the bundled tiny models, beside the same run on the CPU.

Both draw the same rollouts from the same random streams, so that the first losses agree but for rounding.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
STEPS = 3
SECONDS = 100
AGREE = 0.05
"""Largest relative difference of the first losses; bfloat16 in one of them."""

Case = tuple[str, Callable[[], dict[str, Any]]]
RUNS: dict[str, dict[str, Any]] = {
    "mad_opd": {},
    "mad_opd, bf16, teachers offloaded, gradient checkpointing": {
        "bf16": True,
        "gradient_checkpointing": True,
        "offload": True,
    },
    "mt_opd, JSD": {"arm": "mt_opd", "divergence": "jsd"},
    "mt_opd, LoRA, plain torch loss": {"arm": "mt_opd", "lora": {"r": 4}, "loss_impl": "torch"},
}


def settings(change: dict[str, Any], folder: Path) -> dict[str, Any]:
    """A configuration of the demo with some of it changed."""
    from opdengine.metrics import write_jsonl
    from tiny import task
    from tiny.demo import STUDENT, arms

    change = dict(change)
    arm, offload = change.pop("arm", "mad_opd"), change.pop("offload", False)
    chosen = next(a for a in arms() if a.name == arm)
    rows = [row for skill in task.SKILLS for row in task.prompts("train", skill, 16, seed=0)]
    write_jsonl(folder / "train.jsonl", [{k: v for k, v in row.items() if k != "answer"} for row in rows])
    own = {
        "model": STUDENT,
        "dtype": "float32",
        "train_data": [str(folder / "train.jsonl")],
        "max_completion_length": 14,
        "per_device_train_batch_size": 12,
        "max_steps": STEPS,
        "learning_rate": 1e-3,
        "divergence": "reverse_kl",
    }
    teachers = [{**teacher, "dtype": "float32", "offload": offload} for teacher in chosen.settings["teachers"]]
    return own | dict(chosen.settings) | change | {"teachers": teachers}


def train(config: dict[str, Any], folder: Path, device: str) -> list[dict[str, float]]:
    """The metrics of a run in a process of its own, which sees the device or none."""
    output = folder / device
    config = {**config, "output_dir": str(output)}
    if "debate" in config:
        config["debate"] = {**config["debate"], "cache_dir": str(folder / f"debates {device}")}
    file = folder / f"{device}.yaml"
    file.write_text(json.dumps(config))  # which is YAML too
    paths = [str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")]
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    if device == "cpu":
        env |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "4"}
    command = [sys.executable, "-m", "opdengine", "train", "--config", str(file)]
    run = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True, timeout=SECONDS)
    if run.returncode:
        raise RuntimeError(f"on {device}: {(run.stdout + run.stderr)[-500:]}")
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def compare(change: dict[str, Any]) -> dict[str, Any]:
    sys.path.insert(0, str(ROOT / "examples"))
    with tempfile.TemporaryDirectory() as name, ThreadPoolExecutor(2) as pool:
        folder = Path(name)
        config = settings(change, folder)
        jobs = [pool.submit(train, config, folder, device) for device in ("device", "cpu")]
        device, cpu = ([line for line in job.result() if "loss" in line] for job in jobs)
    first = abs(device[0]["loss"] - cpu[0]["loss"]) / abs(cpu[0]["loss"])
    finite = all(math.isfinite(line["loss"]) for line in device)
    return {
        "losses": [round(line["loss"], 5) for line in device],
        "losses_on_cpu": [round(line["loss"], 5) for line in cpu],
        "tokens_per_second": device[-1].get("perf/tokens_per_second"),
        "logprob_difference": device[0].get("sampling/logprob_difference"),
        "passed": len(device) == STEPS and finite and first <= AGREE,
    }


def cases(smoke: bool) -> Iterator[Case]:
    for name, change in list(RUNS.items())[: 1 if smoke else None]:
        yield name, lambda change=change: compare(change)
