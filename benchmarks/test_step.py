"""A whole optimiser step on the bundled tiny models: where the time goes, and what it costs.

The unit is an update of the same rollouts with materialised logits in plain torch (both teachers
and the student through their own heads, K full-vocabulary KLs, backward), timed in turns with ours.
"""

from __future__ import annotations

import asyncio
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "examples"))

from opdengine.config.loading import from_mapping
from opdengine.config.train import TrainConfig
from opdengine.data.prompts import load_prompts
from opdengine.methods import build_method
from opdengine.metrics import write_jsonl
from opdengine.models.chat import load_tokenizer
from opdengine.training.build import build_engine
from opdengine.types import Batch
from tiny import task
from tiny.demo import COMPILE, CONVERT, STUDENT, _debate

PROMPTS = 64
ROUNDS = 7


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    file = tmp_path_factory.mktemp("data") / "train.jsonl"
    rows = [r for skill in task.SKILLS for r in task.prompts("train", skill, PROMPTS // 3 + 1, seed=5)]
    write_jsonl(file, rows[:PROMPTS])
    return str(file), load_prompts([str(file)]).prompts


def make_engine(method: str, file: str, folder: Path):
    config = from_mapping(
        TrainConfig,
        {
            "model": STUDENT,
            "dtype": "float32",
            "teachers": [{"model": m, "dtype": "float32"} for m in (CONVERT, COMPILE)],
            "method": method,
            "train_data": [file],
            "output_dir": str(folder),
            "temperature": 1.0,
            "top_p": 1.0,
            "top_k": 0,
            "repetition_penalty": 1.0,
            "max_completion_length": 14,
            "learning_rate": 0.0,
            "max_steps": 1000,
            "debate": _debate(rounds=2),
        },
    )
    return build_engine(config, build_method(config), load_tokenizer(STUDENT))


TIME_MARGIN = 0.3
"""Of a ratio of times in one run."""


@pytest.mark.parametrize("method", ["mt_opd", "mad_opd"])
def test_step(method, prompts, tmp_path, benchmark, record):
    """Median seconds of every phase of a step of 64 prompts; debates are cached after the first."""
    file, batch = prompts
    engine = make_engine(method, file, tmp_path)
    cold = asyncio.run(engine.step(batch)).metrics
    steps = []
    benchmark.pedantic(lambda: steps.append(asyncio.run(engine.step(batch)).metrics), rounds=ROUNDS, iterations=1)
    phases = {
        name: float(np.median([s[f"timing/{name}"] for s in steps]))
        for name in ("rollout", "debate", "score", "update", "sync")
    }
    record(
        f"step/{method}",
        {
            "prompts": PROMPTS,
            "threads": torch.get_num_threads(),
            "seconds": phases,
            "debate_seconds_uncached": cold["timing/debate"],
            "tokens_per_second": float(np.median([s["perf/tokens_per_second"] for s in steps])),
        },
    )
    if method == "mad_opd":
        assert steps[-1]["debate/generated"] == 0 and cold["debate/generated"] == PROMPTS


def test_update_against_materialised_logits(prompts, tmp_path, interleaved, record, guard):
    """Score and update of one batch, ours against logits of both teachers and the student."""
    file, batch = prompts
    engine = make_engine("mt_opd", file, tmp_path)
    rollouts = asyncio.run(engine.rollout(batch, 0)).samples
    engine.student.model.train()

    def ours():
        async def run():
            same = Batch(samples=[replace(sample) for sample in rollouts])
            await engine.annotate(same)
            await engine.score(same)
            engine.weigh(same)
            return same

        engine.sampler.policy_version = engine.version
        engine.update(asyncio.run(run()))

    def materialised():
        width = max(len(r.token_ids) for r in rollouts)
        ids = torch.zeros(len(rollouts), width, dtype=torch.long)
        mask = torch.zeros(len(rollouts), width, dtype=torch.bool)
        for i, r in enumerate(rollouts):
            ids[i, : len(r.token_ids)] = torch.from_numpy(r.token_ids)
            mask[i, r.target_positions - 1] = True
        with torch.no_grad():
            theirs = [t.backbone.model(input_ids=ids).logits[mask].log_softmax(-1) for t in engine.teachers]
        p = engine.student.model(input_ids=ids).logits[mask].log_softmax(-1)
        loss = sum((p.exp() * (p - q)).sum(-1).mean() / len(theirs) for q in theirs)
        engine.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(engine.student.model.parameters(), 1.0)
        engine.optimizer.step()

    seconds = interleaved({"ours": ours, "materialised": materialised}, rounds=ROUNDS)
    medians = {name: float(np.median(values)) for name, values in seconds.items()}
    ratio, tokens = medians["ours"] / medians["materialised"], sum(len(r.target_positions) for r in rollouts)
    record("update", {"seconds": medians, "ratio": ratio, "vocabulary": engine.vocab_size})
    guard("update", {"over_materialised": (ratio, TIME_MARGIN)}, tokens_per_second=tokens / medians["ours"])
