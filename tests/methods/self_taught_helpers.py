"""Runs of SDFT, SDPO and OPSD on the tiny models, and a step of SDPO whose rewards are given."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

from engine_helpers import make_config

from opdengine.types import Batch, Sample

SELF = [{"model": "self", "weights": "base"}]
SHOWN = "{prompt}\n\n{privileged_context}"
REWARDS = [1.0, 0.0, 0.4, 0.0, 0.0, 0.0, 0.2, 0.0]
"""Of the second prompt none succeeds: three of the first and none of the second are told anything."""


def config_of(models: dict[str, str], file: str, folder: Path, method: str, **changes: Any) -> Any:
    settings: dict[str, Any] = {"method": method, "teachers": SELF}
    if method != "sdpo":
        settings["teacher_prompt_template"] = SHOWN
    else:
        settings |= {"num_generations": 4, "verifier": "numeric"}
    return make_config(models, file, folder, **{**settings, **changes})


def graded(engine: Any, prompts: Any, rewards: list[float]) -> list[Sample]:
    """Samples of a step whose rollouts got these rewards."""

    async def run() -> list[Sample]:
        batch = await engine.rollout(prompts, 0)
        for sample, reward in zip(batch, rewards, strict=True):
            sample.reward = reward
        engine.method.split(batch)
        await engine.annotate(batch)
        await engine.score(batch)
        engine.measure(batch)
        engine.weigh(batch)
        return list(batch)

    return asyncio.run(run())


def our_loss(engine: Any, samples: list[Sample]) -> float:
    """Of one update, which moves nothing."""
    engine._optimizer_step = lambda loss, norm: {"loss": loss}
    return float(engine.update(Batch(samples=samples)).metrics["loss"])
