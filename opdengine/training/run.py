"""From a configuration to a finished run: checks, models, resume; the steps are in :mod:`opdengine.training.loop`."""

from __future__ import annotations

import logging
import math
import random
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from opdengine.config.loading import to_mapping
from opdengine.config.train import TrainConfig
from opdengine.data.prompts import PromptSet, PromptStream, ScheduledStream, as_source
from opdengine.distributed import Ranks, start
from opdengine.methods import METHODS, build_method
from opdengine.methods.method import Method
from opdengine.methods.room import check_room
from opdengine.methods.unused import unread
from opdengine.metrics import write_jsonl
from opdengine.models.backbone import check_model_path, load_model
from opdengine.models.chat import note_ends, stop_token_ids
from opdengine.models.checkpoint import copy_model, read_teachers, restore_optimizer, step_of, write_model
from opdengine.models.given import is_given
from opdengine.models.lora import restore_model
from opdengine.models.manifest import find_damage
from opdengine.models.processor import save_tokenizer
from opdengine.rollout.vllm.engine import require_vllm
from opdengine.teachers.own import restore_own
from opdengine.teachers.stored import unknown_weights
from opdengine.training.best import Best
from opdengine.training.build import build_engine
from opdengine.training.build_student import student_dtype
from opdengine.training.callbacks import Callbacks
from opdengine.training.diagnostics import gradient_diagnostics
from opdengine.training.evaluate import Evaluation, answer_params, evaluate, evaluate_episodes, turn_params
from opdengine.training.event_loop import run_coroutine
from opdengine.training.inputs import Inputs, read_inputs
from opdengine.training.loop import Loop
from opdengine.training.model_card import write_card
from opdengine.training.optimizer import require_updates, restore_schedule
from opdengine.training.progress import Progress
from opdengine.training.publish import open_repository, push
from opdengine.training.run_folder import InputFiles, RunFolder, require_writable
from opdengine.training.signals import Interrupted, Interrupts
from opdengine.training.step import Engine
from opdengine.training.trackers import open_trackers, require_trackers
from opdengine.training.writer import MetricsWriter, NoWriter, read_metrics
from opdengine.types import Prompt
from opdengine.verifiers.grader import Grader
from opdengine.workers.printing import brief

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainResult:
    """What a finished run has left.

    Args:
        output_dir: its folder.
        final_model: the folder of its model.
        metrics: the last value of every metric.
        history: the metrics of every step that was written down, as in ``metrics.jsonl``; on the first process.
        step: the last step.
        model: the student with the weights of ``final_model``, and with its adapter: as the last step left it, or with
            ``load_best_model_at_end`` as it was at the best evaluation.
    """

    output_dir: Path
    final_model: Path
    metrics: dict[str, float]
    history: tuple[dict[str, Any], ...] = ()
    step: int = 0
    model: Any = field(default=None, repr=False)


def train(config: TrainConfig, *, progress: bool = True, callbacks: Callbacks | None = None) -> TrainResult:
    """Train a student as configured; everything that can be checked is checked first.

    Under ``torchrun`` every process calls this, and together they train one student.

    Raises:
        ConfigError, DataError, CheckpointError: before any model is loaded, where possible.
        PeerError: another process failed.
        HubError: the model is finished, and could not be pushed.
        Interrupted: SIGINT, SIGTERM or SIGHUP; the last finished step has been saved.
    """
    with start(config.ddp_timeout) as ranks, ExitStack() as closing:
        if not ranks.is_first:
            logging.getLogger("opdengine").setLevel(logging.WARNING)
        return _train(config, ranks, progress and ranks.is_first, callbacks or Callbacks(), closing)


def _train(config: TrainConfig, ranks: Ranks, progress: bool, callbacks: Callbacks, closing: ExitStack) -> TrainResult:
    """Check, load, train and write; what is open then is given to ``closing``, however the run ends."""
    config.require_train_data()
    method = build_method(config)
    check_needs(config)
    if config.num_train_epochs is None:
        require_updates(config)
    grader = Grader.from_config(config)
    closing.callback(grader.close)
    folder = RunFolder(config, ranks)
    given = read_inputs(config, method, grader, ranks)
    prompts = given.prompts.prompts
    if config.num_train_epochs is not None:
        config = in_steps(config, len(prompts), ranks.world_size)
        require_updates(config)
        method = build_method(config)
    saved = folder.state
    begin = saved.get("step", 0)
    schedule_begin = folder.settle(config)
    stream = _open_stream(config, method, given.prompts, saved)
    best = _open_best(config, folder, saved)
    _seed_everything(config.seed)
    ranks.raise_on_all_ranks()  # everything that can be refused has been, on every rank
    for line in method.paper.report(config, ranks.world_size) if method.paper is not None else ():
        logger.info(line)
    if config.method in METHODS and (idle := unread(config, method.paper)):
        shown = ", ".join(f"{setting}={brief(value, 80)}" for setting, value in idle.items())
        logger.warning("nothing in this run reads %s", shown)
    with ranks.agree():
        if ranks.is_first:
            folder.look_at_models()
        repository = open_repository(config) if config.push_to_hub and ranks.is_first else None
    engine = build_engine(config, method, given.tokenizer, folder.checkpoint, ranks, given.tokenizers, schedule_begin)
    for part in (engine.sampler, engine.episodes, engine.grader):
        if part is not None:
            closing.callback(part.close)
    engine.diagnostics = gradient_diagnostics(method, prompts)
    if ranks.rank:
        _seed_everything(config.seed + ranks.rank)  # dropout differs between ranks, what is loaded does not
    if folder.checkpoint is not None:
        _restore(engine, folder.checkpoint, saved)
    writer = _open_writer(config, folder, ranks, begin if saved else -1, closing)
    interrupts = Interrupts(ranks)
    loop = Loop(
        engine,
        stream,
        folder.path,
        writer,
        _evaluation(config, engine, given, grader, folder.path, writer),
        step=begin,
        metrics=dict(saved.get("metrics", {})),
        first=_dropped(given.prompts),
        interrupts=interrupts,
        inputs=InputFiles([as_source(d).path for d in config.train_data] if ranks.is_first else ()),
        notes={"settings": to_mapping(config), "models": folder.models, "schedule_begin": schedule_begin},
        best=best,
        callbacks=callbacks,
    )
    final = folder.path / "final"
    with interrupts, Progress(config, begin, enabled=progress) as bar:
        try:
            check_room(method.room, prompts)
            run_coroutine(loop.run(bar), lambda: not interrupts.is_whole)
        except Interrupted as signal:
            loop.rescue(str(signal))
            raise
    _write_final(config, loop, final)
    for line in bar.summary(folder.path) if progress else ():
        logger.info("%s", line)
    with ranks.agree():
        if repository is not None:
            push(final, repository, f"{config.method}: step {loop.step}")
    history = tuple(read_metrics(folder.path / "metrics.jsonl")) if ranks.is_first else ()
    return TrainResult(folder.path, final, loop.metrics, history, loop.step, engine.student.model)


def _write_final(config: TrainConfig, loop: Loop, final: Path) -> None:
    """Write the final model with its card: that of the last step, or of the best one where that was asked for.

    An adapter is written into its model, too, where ``lora.merge_final`` asks for it.
    """
    engine, step = loop.engine, loop.step
    best = _best_checkpoint(config, loop)
    if best is not None:
        step = step_of(best)

    def card(folder: Path) -> None:
        write_card(folder, config, loop.folder, config.prompts_per_step * engine.ranks.world_size, step)

    def rest(folder: Path) -> None:
        save_tokenizer(engine.tokenizer, folder)
        card(folder)

    if best is None:
        write_model(final, engine.student.model, engine.ranks, rest)
    else:
        copy_model(final, best, engine.ranks, card)
        student, trusted = engine.student.model, config.trust_remote_code
        engine.ranks.in_turn(lambda: restore_model(student, best / "model", trusted))
    if config.lora is not None and config.lora.merge_final and engine.ranks.is_first:
        merged = load_model(
            str(final),
            dtype=student_dtype(config),
            trust_remote_code=config.trust_remote_code,
            sees=engine.tokenizer.vision is not None,
        )
        note_ends(merged, stop_token_ids(engine.tokenizer, merged, config.chat_template_kwargs))
        write_model(final.with_name("merged"), merged, Ranks(), partial(save_tokenizer, engine.tokenizer))


def _best_checkpoint(config: TrainConfig, loop: Loop) -> Path | None:
    """The checkpoint that the final model is taken from; says so, or why it is none."""
    best, ranks = loop.best, loop.engine.ranks
    if best is None:
        return None
    if best.step is None:
        if config.load_best_model_at_end and ranks.is_first:
            logger.warning(
                "load_best_model_at_end: no evaluation after a step gave a number for %s, so final/ is the model of "
                "step %d, the last one",
                best.metric, loop.step,
            )  # fmt: skip
        return None
    checkpoint = loop.folder / "checkpoints" / f"step_{best.step}"
    with ranks.agree():
        damage = find_damage(checkpoint) if ranks.is_first and config.load_best_model_at_end else None
    damage = ranks.gather(damage)[0]
    if damage is not None:
        logger.error("%s is damaged (%s): final/ is the last step's model, not the best one", checkpoint, damage)
    kept = config.load_best_model_at_end and damage is None
    logger.info(
        "the best %s is %.4g, at step %d (%s); final/ is %s",
        best.metric, best.value, best.step, checkpoint, "its model" if kept else f"that of step {loop.step}",
    )  # fmt: skip
    return checkpoint if kept else None


def _evaluation(
    config: TrainConfig,
    engine: Engine,
    given: Inputs,
    grader: Grader,
    folder: Path,
    writer: MetricsWriter | NoWriter,
) -> Callable[[int], dict[str, float]]:
    """A function of the step: the metrics of its evaluation, whose answers it writes down."""

    def measure(step: int) -> dict[str, float]:
        if engine.episodes is not None:
            metrics, rows = evaluate_episodes(
                engine.episodes,
                engine.sampler,
                given.episodes,
                config.environment.eval_temperatures,
                turn_params(config),
                config.seed,
                engine.ranks,
            )
        elif given.held_out:
            result = evaluate(
                engine.sampler, given.held_out, engine.encode, grader, answer_params(config), engine.ranks
            )
            metrics = result.metrics()
            rows = _rows_of(given.held_out, result)
        else:
            return {}
        with engine.ranks.agree():
            if engine.ranks.is_first:
                write_jsonl(folder / "evaluations" / f"step_{step}.jsonl", rows)
                writer.table("evaluations", step, rows)
        return metrics

    return measure


def _rows_of(prompts: Sequence[Prompt], result: Evaluation) -> list[dict[str, Any]]:
    """One row for each answer, for the log."""
    return [
        {"prompt_id": p.id, "data_source": p.key, "score": score, "text": text,
         "prompt": [dict(message) for message in p.messages], "answer": p.answer}
        for p, scores, texts in zip(prompts, result.scores.tolist(), result.texts, strict=True)
        for score, text in zip(scores, texts, strict=True)
    ]  # fmt: skip


def check_needs(config: TrainConfig) -> None:
    """Packages and model folders that the run needs are here."""
    require_trackers(config.report_to)
    if config.debate.cache_dir is not None:
        require_writable("debate.cache_dir", config.debate.cache_dir)
    for i, teacher in enumerate(config.teachers):
        if teacher.stored is not None and is_given(teacher.model):
            raise unknown_weights(teacher)
        if teacher.stored is not None and not teacher.stored_only:
            require_writable(f"teachers.{i}.stored", teacher.stored)
    if config.use_vllm and config.vllm_mode == "colocate":
        require_vllm("set use_vllm to false to sample without it")
    for path in [config.model, *(config.as_loaded(t).model for t in config.teachers if t.is_here)]:
        check_model_path(path)


def _open_best(config: TrainConfig, folder: RunFolder, saved: Mapping[str, Any]) -> Best | None:
    """The best evaluation so far, if one is looked for.

    Raises:
        ConfigError: the saved run's evaluations did not measure its metric.
    """
    best = Best.from_config(config)
    if best is None:
        return None
    best.restore(saved.get("best"), folder.path / "checkpoints")
    if measured := {name: value for name, value in saved.get("metrics", {}).items() if name.startswith("eval/")}:
        best.require(measured)
    return best


def _open_stream(
    config: TrainConfig, method: Method, prompts: PromptSet, saved: Mapping[str, Any]
) -> PromptStream | ScheduledStream:
    """The order of the prompts, from where the saved run stopped."""
    stream: PromptStream | ScheduledStream = PromptStream(prompts, config.seed)
    if method.streams:
        stream = ScheduledStream(prompts, config.seed, method)
    if saved:
        stream.load_state_dict(saved["stream"])
    return stream


def _open_writer(
    config: TrainConfig, folder: RunFolder, ranks: Ranks, last_step: int, closing: ExitStack
) -> MetricsWriter | NoWriter:
    """Claim the folder and open its metrics; both are given up by ``closing``. Only the first rank writes."""
    writer: MetricsWriter | NoWriter = NoWriter()
    with ranks.agree():
        if ranks.is_first:
            closing.callback(folder.release)
            folder.claim()
            writer = MetricsWriter(folder.path, open_trackers(config, folder.path, last_step), last_step)
            closing.callback(writer.close)
    return writer


def _restore(engine: Engine, checkpoint: Path, saved: Mapping[str, Any]) -> None:
    """Versions, schedule, optimiser and random states of a checkpoint; its weights are loaded already."""
    engine.version = saved["version"]
    restore_schedule(engine.scheduler, saved["scheduler"])
    restore_optimizer(checkpoint, engine.student.model, engine.optimizer, engine.ranks)
    restore_own(engine.teachers, read_teachers(checkpoint), saved.get("teachers", {}), engine.version)


def in_steps(config: TrainConfig, prompts: int, processes: int) -> TrainConfig:
    """The settings with ``max_steps`` in place of ``num_train_epochs``; the last step may go on into the next pass.

    Args:
        config: of the run.
        prompts: of one pass.
        processes: that share the prompts of a step.
    """
    assert config.num_train_epochs is not None
    per_step = config.prompts_per_step * processes
    steps = max(1, math.ceil(config.num_train_epochs * prompts / per_step - 1e-9))
    logger.info(
        "num_train_epochs=%g: %d steps of %d prompts for %d prompts", config.num_train_epochs, steps, per_step, prompts
    )
    return replace(config, max_steps=steps, num_train_epochs=None)


def _seed_everything(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def _dropped(prompts: PromptSet) -> dict[str, float]:
    return {f"data/dropped/{reason}": float(n) for reason, n in prompts.dropped.items()}
