"""Seconds of training steps on the processes that torchrun started; the first one prints JSON.

python -m torch.distributed.run --nproc-per-node 2 benchmarks/scaling_worker.py prompts.jsonl folder PROMPTS STEPS
"""

from __future__ import annotations

import asyncio
import json
import statistics
import sys
from collections import Counter
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "examples"))

from opdengine.build import build_engine
from opdengine.chat import load_tokenizer
from opdengine.config import TrainConfig
from opdengine.data import load_prompts
from opdengine.distributed import start
from opdengine.methods import build_recipe
from opdengine.settings import from_mapping
from tiny.demo import COMPILE, CONVERT, STUDENT


def main(file: str, folder: str, prompts: int, steps: int) -> None:
    torch.set_num_threads(1)
    config = from_mapping(
        TrainConfig,
        {
            "model": STUDENT,
            "dtype": "float32",
            "teachers": [{"model": m, "dtype": "float32"} for m in (CONVERT, COMPILE)],
            "method": "mt_opd",
            "train_data": [file],
            "output_dir": folder,
            "max_completion_length": 14,
            "learning_rate": 0.0,
            "max_steps": steps,
        },
    )
    with start() as ranks:
        engine = build_engine(config, build_recipe(config), load_tokenizer(STUDENT), ranks=ranks)
        batch = load_prompts([file]).prompts[:prompts]
        seconds: Counter[str] = Counter()
        totals = []
        for step in range(steps + 1):
            metrics = asyncio.run(engine.step(batch, 0)).metrics
            phases = {name.removeprefix("timing/"): v for name, v in metrics.items() if name.startswith("timing/")}
            if step:  # the first step warms up
                totals.append(sum(phases.values()))
                seconds.update(phases)
        if ranks.is_first:
            mean = {phase: total / steps for phase, total in seconds.items()}
            print(json.dumps({"step_s": statistics.median(totals), "phases_s": mean, "loss": metrics["loss"]}))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
