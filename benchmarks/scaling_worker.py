"""Seconds of training steps on the processes that torchrun started; the first one prints JSON.

python -m torch.distributed.run --nproc-per-node 2 benchmarks/scaling_worker.py settings.json PROMPTS STEPS
"""

from __future__ import annotations

import asyncio
import json
import statistics
import sys
from collections import Counter
from pathlib import Path

import torch

from opdengine.config.loading import from_mapping
from opdengine.config.train import TrainConfig
from opdengine.data.prompts import load_prompts
from opdengine.distributed import start
from opdengine.methods import build_method
from opdengine.models.chat import load_tokenizer
from opdengine.training.build import build_engine


def main(file: str, prompts: int, steps: int) -> None:
    torch.set_num_threads(1)
    config = from_mapping(TrainConfig, json.loads(Path(file).read_text()))
    with start() as ranks:
        engine = build_engine(config, build_method(config), load_tokenizer(config.model), ranks=ranks)
        batch = load_prompts(config.train_data).prompts[:prompts]
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
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
