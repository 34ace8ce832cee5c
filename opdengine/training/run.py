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
from opdengine.data.prompts import PromptSet, PromptStream, ScheduledStream, as_source, drop_long, load_prompts
from opdengine.data.templates import Reader, check_templates, readable, readers_of
from opdengine.distributed import Ranks, start
from opdengine.environments.setup import held_out_tasks, load_tasks
from opdengine.errors import ConfigError
from opdengine.methods import build_method
from opdengine.methods.method import Method
from opdengine.methods.room import check_room
from opdengine.metrics import write_jsonl
from opdengine.models.backbone import check_model_path, load_model, read_window
from opdengine.models.chat import encode_chat, load_tokenizer
from opdengine.models.checkpoint import copy_model, read_teachers, restore_optimizer, step_of, write_model
from opdengine.models.lora import restore_model
from opdengine.models.manifest import find_damage
from opdengine.models.processor import save_tokenizer
from opdengine.models.quantised import refuse_quantised
from opdengine.models.rendering import thought_opening
from opdengine.models.reply import encode_prompt
from opdengine.rollout.vllm.engine import require_vllm
from opdengine.teachers.own import restore_own
from opdengine.training.best import Best
from opdengine.training.build import build_engine, check_ranks, student_dtype, teacher_tokenizer
from opdengine.training.callbacks import Callbacks
from opdengine.training.diagnostics import gradient_diagnostics
from opdengine.training.evaluate import (
    Evaluation,
    answer_params,
    evaluate,
    evaluate_episodes,
    require_answers,
    turn_params,
    warn_of_overlap,
)
from opdengine.training.event_loop import run_coroutine
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
from opdengine.types import Prompt, images_of
from opdengine.verifiers.grader import Grader

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
    _check_needs(config)
    if config.num_train_epochs is None:
        require_updates(config)
    grader = Grader.from_config(config)
    closing.callback(grader.close)
    folder = RunFolder(config, ranks)
    held_out, episodes = _held_out(config), held_out_tasks(config.environment)
    if config.environment.name:
        prompts = load_tasks(config.environment, config.environment.train_split)
    else:
        prompts = load_prompts(config.train_data, skip_bad_rows=config.skip_bad_rows)
    check_ranks(config, ranks)
    check_routing(config, method, prompts)
    method.require(prompts.prompts)
    sees = check_pictures(config, [*prompts.prompts, *held_out], ranks)
    rewarded = prompts.prompts if method.needs_reward and not config.environment.name else ()
    grader.check([*held_out, *rewarded])
    tokenizer = load_tokenizer(
        config.model,
        trust_remote_code=config.trust_remote_code,
        chat_template=config.chat_template,
        images=config.images,
        sees=sees,
    )
    grader.opening = thought_opening(tokenizer, config.chat_template_kwargs)
    student_dtype(config)  # refuses what cannot be trained
    refuse_quantised(config, ranks.world_size)
    tokenizers = [teacher_tokenizer(config, teacher, sees) for teacher in config.teachers]
    prompts = _read_in_full(readers_of(config, tokenizer, tokenizers), config, prompts, held_out)
    if not config.environment.name:
        prompts = fit_prompts(config, tokenizer, prompts, held_out)
        prompts = method.fit(prompts, partial(encode_prompt, tokenizer, config.chat_template_kwargs))
    warn_of_overlap({**({"eval_data": held_out} if held_out else {}), **episodes}, prompts.prompts)
    if config.eval_steps and not held_out and not episodes:
        missing = "environment.eval_splits" if config.environment.name else "eval_data"
        logger.warning("eval_steps=%d evaluates nothing: name what to evaluate on with %s", config.eval_steps, missing)
    _warn_of_repeats(config.prompts_per_step * ranks.world_size, len(prompts.prompts))
    if config.num_train_epochs is not None:
        config = in_steps(config, len(prompts.prompts), ranks.world_size)
        require_updates(config)
        method = build_method(config)
    saved = folder.state
    begin = saved.get("step", 0)
    schedule_begin = folder.settle(config)
    stream = _open_stream(config, method, prompts, saved)
    best = _open_best(config, folder, saved)
    _seed_everything(config.seed)
    ranks.raise_on_all_ranks()  # everything that can be refused has been, on every rank
    for line in method.paper.report(config, ranks.world_size) if method.paper is not None else ():
        logger.info(line)
    with ranks.agree():
        if ranks.is_first:
            folder.look_at_models()
        repository = open_repository(config) if config.push_to_hub and ranks.is_first else None
    engine = build_engine(config, method, tokenizer, folder.checkpoint, ranks, tokenizers, schedule_begin)
    for part in (engine.sampler, engine.episodes, engine.grader):
        if part is not None:
            closing.callback(part.close)
    engine.diagnostics = gradient_diagnostics(method, prompts.prompts)
    if ranks.rank:
        _seed_everything(config.seed + ranks.rank)  # dropout differs between ranks, what is loaded does not
    if folder.checkpoint is not None:
        _restore(engine, folder.checkpoint, saved)
    last_step = begin if saved else -1
    writer: MetricsWriter | NoWriter = NoWriter()
    with ranks.agree():
        if ranks.is_first:
            closing.callback(folder.release)
            folder.claim()
            writer = MetricsWriter(folder.path, open_trackers(config, folder.path, last_step), last_step)
            closing.callback(writer.close)

    interrupts = Interrupts(ranks)
    loop = Loop(
        engine,
        stream,
        folder.path,
        writer,
        _evaluation(config, engine, held_out, episodes, grader, folder.path, writer),
        step=begin,
        metrics=dict(saved.get("metrics", {})),
        first=_dropped(prompts),
        interrupts=interrupts,
        inputs=InputFiles([as_source(d).path for d in config.train_data] if ranks.is_first else ()),
        notes={"settings": to_mapping(config), "models": folder.models, "schedule_begin": schedule_begin},
        best=best,
        callbacks=callbacks,
    )
    final = folder.path / "final"
    with interrupts, Progress(config, begin, enabled=progress) as bar:
        try:
            check_room(method.room, prompts.prompts)
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
    held_out: Sequence[Prompt],
    episodes: Mapping[str, Sequence[Prompt]],
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
                episodes,
                config.environment.eval_temperatures,
                turn_params(config),
                config.seed,
                engine.ranks,
            )
        elif held_out:
            result = evaluate(engine.sampler, held_out, engine.encode, grader, answer_params(config), engine.ranks)
            metrics = result.metrics()
            rows = _rows_of(held_out, result)
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


def _check_needs(config: TrainConfig) -> None:
    """Packages and model folders that the run needs are here."""
    require_trackers(config.report_to)
    if config.debate.cache_dir is not None:
        require_writable("debate.cache_dir", config.debate.cache_dir)
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


def check_routing(config: TrainConfig, method: Method, prompts: PromptSet) -> None:
    """Every routing key of the data needs a divergence, debate prompts and enough teachers.

    Raises:
        ConfigError: names the key.
    """
    for key in prompts.keys:
        config.divergence_of(key)
        if config.debates:
            config.debate.prompts_of(key)
        routed = [t.name for t in config.teachers if not t.key or key in t.key]
        if len(routed) < method.teachers_per_prompt:
            raise ConfigError(
                f"method {config.method!r} needs {method.teachers_per_prompt} teacher(s) for every "
                f"prompt, but data_source {key!r} is answered by {routed or 'none'}; set the "
                "teachers' 'key'"
            )
    ungraded = [p.id for p in prompts.prompts if p.answer is None] if method.needs_reward else []
    if ungraded and not config.environment.name:
        raise ConfigError(
            f"method {config.method!r} grades rollouts, but {len(ungraded)} training prompts have no 'answer' (e.g. "
            f"{ungraded[:3]}); add the column or choose a method without outcomes"
        )
    named = {key for t in config.teachers for key in t.key}
    if isinstance(config.divergence, dict):
        named |= set(config.divergence) - {"default"}
    if unused := sorted(named - set(prompts.keys)):
        logger.warning("no prompt has the data_source %s named in the settings (it has %s)", unused, list(prompts.keys))


def check_pictures(config: TrainConfig, prompts: Sequence[Prompt], ranks: Ranks) -> bool:
    """Whether there are prompts with pictures; they are refused for what is only sent token ids.

    Raises:
        ConfigError: names the setting.
    """
    if not any(images_of(prompt.messages) for prompt in prompts):
        return False
    if ranks.world_size > 1 and "image" in (config.images, *(teacher.images for teacher in config.teachers)):
        raise ConfigError(
            f"{ranks.world_size} processes are not possible yet where models are given pictures: train with one, or "
            "set images to 'text' or 'omit' for the student and every teacher"
        )
    if config.use_vllm and config.images == "image":
        raise ConfigError(
            "use_vllm is not possible yet where the student is given pictures: leave it out (the trainer's own model "
            "samples), or set images to 'text' or 'omit'"
        )
    for teacher in config.teachers:
        if teacher.images == "image" and (teacher.writer_base_url or not teacher.is_here):
            raise ConfigError(
                f"teacher {teacher.name!r} is asked over a network, where no pictures are sent, but there are prompts "
                "with pictures: set its images to 'text' or 'omit', or take a teacher in this process"
            )
    return True


def _read_in_full(
    readers: Sequence[Reader], config: TrainConfig, prompts: PromptSet, held_out: Sequence[Prompt]
) -> PromptSet:
    """The prompts of which no chat template leaves anything out; those of the evaluation all must be such."""
    if not config.environment.name:
        prompts = readable(prompts, readers, skip_bad_rows=config.skip_bad_rows)
        readable(PromptSet(tuple(held_out), {}), readers[:1])
    judges = config.method == "sage_opd" and config.sage.use_judge and config.sage.judge_prompt is None
    check_templates(readers, converses=bool(config.environment.name), judges=judges)
    return prompts


def fit_prompts(config: TrainConfig, tokenizer: Any, prompts: PromptSet, held_out: Sequence[Prompt]) -> PromptSet:
    """Leave out prompts that are too long for the settings or the student's window.

    Raises:
        ConfigError: the completion alone fills the window, or an evaluation prompt does not fit.
        DataError: no prompt is left.
    """
    limit, reason = config.max_prompt_length, "max_prompt_length"
    window = read_window(config.model, trust_remote_code=config.trust_remote_code)
    if window is not None and window - config.max_completion_length < limit:
        limit = window - config.max_completion_length
        reason = f"the student's window of {window} less max_completion_length={config.max_completion_length}"
    if limit < 1:
        raise ConfigError(
            f"max_completion_length={config.max_completion_length} is not possible; the student's "
            f"window has {window} tokens for prompt and completion together"
        )

    def length_of(prompt: Prompt) -> int:
        return len(encode_chat(tokenizer, prompt.messages, prompt.tools, config.chat_template_kwargs))

    if too_long := [p.id for p in held_out if length_of(p) > limit]:
        raise ConfigError(
            f"{len(too_long)} evaluation prompts are longer than {limit} tokens ({reason}), e.g. "
            f"{too_long[:3]}; raise the limit or leave them out of eval_data"
        )
    return drop_long(prompts, length_of, limit, reason)


def _held_out(config: TrainConfig) -> Sequence[Prompt]:
    if not config.eval_data:
        return ()
    prompts = load_prompts(config.eval_data, skip_bad_rows=config.skip_bad_rows).prompts
    return require_answers(prompts)[: config.eval_max_prompts]


def _seed_everything(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def _warn_of_repeats(per_step: int, prompts: int) -> None:
    if per_step > prompts:
        logger.warning(
            "a step takes %d prompts and there are only %d, so it has the same ones several times; lower "
            "per_device_train_batch_size or gradient_accumulation_steps",
            per_step,
            prompts,
        )


def _dropped(prompts: PromptSet) -> dict[str, float]:
    return {f"data/dropped/{reason}": float(n) for reason, n in prompts.dropped.items()}
