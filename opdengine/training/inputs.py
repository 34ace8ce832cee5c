"""The inputs of a run: prompts and tokenizers, read and checked before a model is loaded."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from opdengine.config.sections import SELF
from opdengine.config.train import TrainConfig
from opdengine.data.prompts import PromptSet, drop_long, load_prompts
from opdengine.data.templates import Reader, check_templates, readable, readers_of
from opdengine.distributed import Ranks
from opdengine.environments.setup import held_out_tasks, load_tasks
from opdengine.errors import ConfigError
from opdengine.methods.method import Method
from opdengine.models.backbone import read_window
from opdengine.models.chat import encode_chat, load_tokenizer
from opdengine.models.pictures import MOST_IMAGES
from opdengine.models.quantised import refuse_quantised
from opdengine.models.rendering import thought_opening
from opdengine.models.reply import encode_prompt
from opdengine.teachers.pictures import check_sendable
from opdengine.training.build import check_ranks
from opdengine.training.build_student import student_dtype
from opdengine.training.build_teachers import teacher_tokenizer
from opdengine.training.evaluate import require_answers, warn_of_overlap
from opdengine.types import Prompt, images_of
from opdengine.verifiers.grader import Grader

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Inputs:
    """What a run reads.

    Args:
        prompts: to train on.
        held_out: prompts of the evaluation; empty without one, and in environments.
        episodes: tasks of the evaluation in an environment, by split.
        tokenizer: the student's.
        tokenizers: the teachers', in their order.
    """

    prompts: PromptSet
    held_out: Sequence[Prompt]
    episodes: Mapping[str, Sequence[Prompt]]
    tokenizer: Any
    tokenizers: Sequence[Any]


def read_inputs(config: TrainConfig, method: Method, grader: Grader, ranks: Ranks) -> Inputs:
    """Read prompts and tokenizers, and leave out the prompts that cannot be trained on, which are counted.

    Raises:
        ConfigError, DataError: settings, models or data do not fit each other.
    """
    environment = config.environment
    held_out, episodes = _held_out(config), held_out_tasks(environment)
    if environment.name:
        prompts = load_tasks(environment, environment.train_split)
    else:
        prompts = load_prompts(config.train_data, skip_bad_rows=config.skip_bad_rows)
    check_ranks(config, ranks)
    check_routing(config, method, prompts)
    method.require(prompts.prompts)
    sees = check_pictures(config, [*prompts.prompts, *held_out], ranks)
    rewarded = prompts.prompts if method.needs_reward and not environment.name else ()
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
    if not environment.name:
        prompts = fit_prompts(config, tokenizer, prompts, held_out)
        prompts = method.fit(prompts, partial(encode_prompt, tokenizer, config.chat_template_kwargs))
    warn_of_overlap({**({"eval_data": held_out} if held_out else {}), **episodes}, prompts.prompts)
    if config.eval_steps and not held_out and not episodes:
        missing = "environment.eval_splits" if environment.name else "eval_data"
        logger.warning("eval_steps=%d evaluates nothing: name what to evaluate on with %s", config.eval_steps, missing)
    _warn_of_repeats(config.prompts_per_step * ranks.world_size, len(prompts.prompts))
    return Inputs(prompts, held_out, episodes, tokenizer, tokenizers)


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
    shared = ranks.world_size > 1 and config.vllm_tensor_parallel_size > 1
    student = "image" in (config.images, *(teacher.images for teacher in config.teachers if teacher.model == SELF))
    if config.use_vllm and student and (config.vllm_mode == "server" or shared):
        setting = "vllm_tensor_parallel_size: 1" if shared else "vllm_mode: colocate"
        raise ConfigError(
            "no pictures are sent to a vLLM server, which several processes share or which runs elsewhere: set "
            f"{setting}, use_vllm: false (the trainer's own model samples), or images to 'text' or 'omit'"
        )
    most = max(prompts, key=lambda prompt: len(images_of(prompt.messages)))
    if config.use_vllm and student and (count := len(images_of(most.messages))) > MOST_IMAGES:
        raise ConfigError(
            f"prompt {most.id!r} has {count} pictures, and vLLM is given {MOST_IMAGES} at most: leave it out, or set "
            "use_vllm to false"
        )
    for teacher in config.teachers:
        if teacher.images == "image" and (teacher.writer_base_url or teacher.base_url):
            raise ConfigError(
                f"teacher {teacher.name!r} is asked by base_url or writer_base_url, where no pictures are sent, but "
                "there are prompts with pictures: set its images to 'text' or 'omit', or take a teacher in this "
                "process or behind 'opdengine teacher-serve' (hidden_states_url)"
            )
        if teacher.images == "image" and teacher.hidden_states_url:
            check_sendable(teacher.name, prompts)
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


def _warn_of_repeats(per_step: int, prompts: int) -> None:
    if per_step > prompts:
        logger.warning(
            "a step takes %d prompts and there are only %d, so it has the same ones several times; lower "
            "per_device_train_batch_size or gradient_accumulation_steps",
            per_step,
            prompts,
        )
