"""The training loop."""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from opdengine.backbone import check_model_path
from opdengine.build import build_engine
from opdengine.chat import load_tokenizer
from opdengine.checkpoint import restore_optimizer, save_checkpoint
from opdengine.config import ConfigError, TrainConfig
from opdengine.data import PromptSet, PromptStream, drop_long, load_prompts
from opdengine.engine import Engine, StepResult
from opdengine.evaluate import evaluate
from opdengine.methods import build_recipe
from opdengine.metrics import MetricsWriter, write_jsonl
from opdengine.progress import Progress
from opdengine.recipe import Recipe
from opdengine.run_folder import RunFolder
from opdengine.types import Prompt
from opdengine.verifiers import load_verifier

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainResult:
    """Where a finished run is and how it ended."""

    output_dir: Path
    final_model: Path
    metrics: dict[str, float]


def train(config: TrainConfig, *, progress: bool = True) -> TrainResult:
    """Train a student as configured; everything that can be checked is checked first.

    Raises:
        ConfigError, DataError, CheckpointError: before any model is loaded, where possible.
    """
    recipe = build_recipe(config)
    verifier = load_verifier(config.verifier)
    for path in [config.model, *(t.model for t in config.teachers)]:
        check_model_path(path)
    prompts = load_prompts(config.train_data, skip_bad_rows=config.skip_bad_rows)
    held_out = _held_out(config)
    check_routing(config, recipe, prompts)
    tokenizer = load_tokenizer(
        config.model,
        trust_remote_code=config.trust_remote_code,
        chat_template=config.chat_template,
    )
    folder = RunFolder(config)
    _seed_everything(config.seed)
    engine = build_engine(config, recipe, tokenizer, folder.checkpoint)
    prompts = drop_long(prompts, lambda p: len(engine.encode(p)), config.max_prompt_length)
    stream = PromptStream(prompts, config.seed)
    start = 0
    if folder.checkpoint is not None:
        start = folder.state["step"]
        engine.version = folder.state["version"]
        engine.sampler.load_policy(engine.version, engine.student.model.state_dict().items())
        engine.scheduler.load_state_dict(folder.state["scheduler"])
        stream.load_state_dict(folder.state["stream"])
        restore_optimizer(folder.checkpoint, engine.optimizer)
    writer = MetricsWriter(folder.path, config.report_to, last_step=start)
    metrics: dict[str, float] = dict(folder.state.get("metrics", {}))

    def measure(step: int) -> dict[str, float]:
        if not held_out:
            return {}
        result = evaluate(engine.sampler, held_out, engine.encode, verifier, config.max_completion_length)
        rows = [
            {"prompt_id": p.id, "score": s, "text": t}
            for p, s, t in zip(held_out, result.scores.tolist(), result.texts, strict=True)
        ]
        write_jsonl(folder.path / "evaluations" / f"step_{step}.jsonl", rows)
        return result.metrics()

    try:
        with Progress(config, start, enabled=progress) as bar, asyncio.Runner() as runner:
            if start == 0 and held_out:
                metrics |= measure(0)
                writer.write(0, {**metrics, **_dropped(prompts)})
            for step in range(start + 1, config.max_steps + 1):
                result = runner.run(engine.step(stream.next(config.prompts_per_step)))
                metrics = metrics | result.metrics
                line = dict(result.metrics)
                if _due(step, config.eval_steps) or step == config.max_steps:
                    line |= measure(step)
                    metrics |= line
                if _due(step, config.logging_steps) or len(line) > len(result.metrics):
                    writer.write(step, line)
                if config.log_completions:
                    _log_completions(folder.path, step, result)
                bar.advance(step, metrics)
                if _due(step, config.save_steps):
                    _save(folder.path / "checkpoints", step, engine, stream, metrics)
        final = folder.path / "final"
        engine.student.model.save_pretrained(final)
        tokenizer.save_pretrained(final)
    finally:
        writer.close()
        engine.sampler.close()
    return TrainResult(folder.path, final, metrics)


def check_routing(config: TrainConfig, recipe: Recipe, prompts: PromptSet) -> None:
    """Every routing key of the data needs a divergence and enough teachers.

    Raises:
        ConfigError: names the key.
    """
    for key in prompts.keys:
        config.divergence_of(key)
        routed = [t.name for t in config.teachers if not t.key or key in t.key]
        if len(routed) < recipe.teachers_per_prompt:
            raise ConfigError(
                f"method {config.method!r} needs {recipe.teachers_per_prompt} teacher(s) for every "
                f"prompt, but data_source {key!r} is answered by {routed or 'none'}; set the "
                "teachers' 'key'"
            )


def _held_out(config: TrainConfig) -> Sequence[Prompt]:
    if not config.eval_data:
        return ()
    prompts = load_prompts(config.eval_data, skip_bad_rows=config.skip_bad_rows).prompts
    without = [p.id for p in prompts if p.answer is None]
    if without:
        raise ConfigError(
            f"{len(without)} evaluation prompts have no 'answer' (e.g. {without[:3]}); evaluation compares with it"
        )
    return prompts[: config.eval_max_prompts]


def _seed_everything(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def _dropped(prompts: PromptSet) -> dict[str, float]:
    return {f"data/dropped/{reason}": float(n) for reason, n in prompts.dropped.items()}


def _save(checkpoints: Path, step: int, engine: Engine, stream: PromptStream, metrics: dict[str, float]) -> None:
    save_checkpoint(
        checkpoints,
        step=step,
        model=engine.student.model,
        tokenizer=engine.tokenizer,
        optimizer=engine.optimizer,
        state={
            "version": engine.version,
            "scheduler": engine.scheduler.state_dict(),
            "stream": stream.state_dict(),
            "metrics": metrics,
        },
        keep=engine.config.save_total_limit,
    )


def _log_completions(folder: Path, step: int, result: StepResult) -> None:
    rows = [
        {
            "id": r.id,
            "prompt_id": r.prompt.id,
            "data_source": r.prompt.key,
            "text": r.text,
            "tokens": len(r.targets),
            "stop_reason": r.stop_reason,
            "policy_version": r.policy_version,
        }
        for r in result.rollouts
    ]
    write_jsonl(folder / "rollouts" / f"step_{step}.jsonl", rows)
    if result.records:
        write_jsonl(folder / "debates" / f"step_{step}.jsonl", [dict(r) for r in result.records])
