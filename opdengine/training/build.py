"""From a configuration to an engine: loads the student; :mod:`.build_teachers` has the teachers."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from opd_kernels import LMHead
from opdengine.config.sections import SELF
from opdengine.config.train import TrainConfig
from opdengine.distributed import Ranks
from opdengine.environments.setup import open_episodes
from opdengine.errors import ConfigError
from opdengine.loss.vocab_parallel import VocabParallel
from opdengine.methods.method import Method
from opdengine.models.backbone import Backbone, choose_attention, default_device, load_model, read_dtype, read_window
from opdengine.models.chat import shared_vocabulary, stop_token_ids
from opdengine.models.given import is_given
from opdengine.models.lora import add_adapter, architecture, base_of, freeze_head, load_adapter, require_peft
from opdengine.models.quantised import refuse_quantised
from opdengine.models.rendering import thought_opening
from opdengine.models.sharding import Sharded
from opdengine.models.vision_tower import freeze_vision_tower, tower, vision_layers
from opdengine.rollout import Sampler
from opdengine.rollout.vllm.weight_names import find_naming
from opdengine.teachers.own import follow
from opdengine.teachers.shard import Session
from opdengine.training.build_teachers import (
    align_tokenizers,
    attach,
    load_teachers,
    reach_teachers,
    serve_teachers,
    teacher_tokenizer,
)
from opdengine.training.optimizer import build_optimizer, build_scheduler
from opdengine.training.step import Engine

if TYPE_CHECKING:
    from opdengine.verifiers.grader import Grader

logger = logging.getLogger(__name__)

NO_FLOAT16 = (
    "gives the student float16 parameters, in which AdamW breaks down; set dtype: float32 (and bf16: true on a GPU "
    "that has it)"
)


def build_engine(
    config: TrainConfig,
    method: Method,
    tokenizer: Any,
    checkpoint: Path | None = None,
    ranks: Ranks | None = None,
    tokenizers: Sequence[Any] | None = None,
    schedule_begin: int = 0,
) -> Engine:
    """Load student, teachers and sampler.

    Args:
        config: of the run.
        method: of the run.
        tokenizer: the student's.
        checkpoint: take the student's weights from here.
        ranks: split the student's parameters.
        tokenizers: of the teachers, in their order; None loads them.
        schedule_begin: the step after which the learning rate's schedule begins.

    Raises:
        ValueError: a teacher does not share the tokenizer, or a head is narrower than it.
    """
    if config.lora is not None:
        require_peft()
    ranks = ranks or Ranks()
    refuse_quantised(config, ranks.world_size)
    device = default_device()
    tokenizers = tokenizers or [teacher_tokenizer(config, teacher) for teacher in config.teachers]
    vocab_size = shared_vocabulary(tokenizer, tokenizers)
    alignments = align_tokenizers(config, tokenizer, tokenizers)
    served = serve_teachers(config, tokenizers, judges=not method.writes)
    remote = reach_teachers(config, tokenizers, served, device, judges=not method.writes)
    many = ranks.world_size > 1
    split_head = many and config.vocab_parallel_head
    mesh = ranks.mesh(device) if many else None

    own = [its for teacher, its in zip(config.teachers, tokenizers, strict=True) if teacher.model == SELF]
    vision = next((found for t in (tokenizer, *own) if (found := getattr(t, "vision", None)) is not None), None)

    def load() -> tuple[Any, Sharded | None]:
        model = load_student(config, device, checkpoint, on_host=many, sees=vision is not None)
        head = "rows" if split_head else "gathered"
        return model, Sharded(model, ranks, device, config.bf16, head, mesh) if many else None

    model, sharded = ranks.in_turn(load)
    student = Backbone(model, "student", config.max_tokens_per_batch, sharded, config.bf16, vision)
    session = Session(ranks) if many and any(t.shard for t in config.teachers) else None
    teachers = load_teachers(config, tokenizers, student, student_dtype(config), served, remote, device, session, ranks)
    attach(teachers, alignments, stop_token_ids(tokenizer, model, config.chat_template_kwargs))
    if not method.writes:
        check_switch(config, student.regimes.switch)
    _require_rows("student", student.head, vocab_size)
    for teacher in teachers:
        its = alignments.get(teacher.name)
        _require_rows(teacher.name, teacher.head, vocab_size if its is None else its.vocabulary)
    optimizer = build_optimizer(config, model)
    follow(teachers, optimizer)
    method.episodes = open_episodes(config, tokenizer, student.window) if config.environment.name else None
    return Engine(
        config=config,
        method=method,
        student=student,
        tokenizer=tokenizer,
        teachers=teachers,
        sampler=build_sampler(config, model, tokenizer, ranks, vocab_size, sees=vision is not None),
        optimizer=optimizer,
        ranks=ranks,
        scheduler=build_scheduler(config, optimizer, schedule_begin),
        vocab_size=vocab_size,
        episodes=method.episodes,
        grader=build_grader(config, tokenizer) if method.needs_reward and not config.environment.name else None,
        session=session,
        vocabulary=VocabParallel(ranks) if split_head else None,
    )


def _require_rows(name: str, head: LMHead | None, known: int) -> None:
    """Raise ConfigError where a head has no row for some of the ``known`` ids of its model's tokenizer."""
    if head is not None and (rows := head.weight.shape[0]) < known:
        raise ConfigError(
            f"{name}: its head has {rows} rows, but the tokenizer knows {known} ids; model and tokenizer do not belong "
            "together"
        )


def check_ranks(config: TrainConfig, ranks: Ranks) -> None:
    """Raise ConfigError for what several processes cannot do."""
    size = config.vllm_tensor_parallel_size
    objects = [path for path in (config.model, *(t.model for t in config.teachers)) if is_given(path)]
    if ranks.world_size > 1 and objects:
        raise ConfigError(
            f"{objects[0]!r} cannot be split over {ranks.world_size} processes: save it with save_pretrained and name "
            "the folder"
        )
    if ranks.world_size == 1 or not config.use_vllm or config.vllm_mode == "server" or size == 1:
        return
    if ranks.local_world_size % size:
        raise ConfigError(
            f"vllm_tensor_parallel_size={size} is not possible with {ranks.local_world_size} processes on a machine, "
            "which share engines in groups of that size: use a divisor of their number"
        )
    if config.vllm_enable_sleep_mode:
        raise ConfigError(
            f"vllm_enable_sleep_mode is not possible with vllm_tensor_parallel_size={size} and several processes, one "
            "of which may still sample when another is done: lower vllm_gpu_memory_utilization instead"
        )


def check_switch(config: TrainConfig, switch: int | None) -> None:
    """Raise ConfigError where a rollout could pass the length at which the student's position encoding changes.

    Its first tokens would be sampled from one model, and be trained as those of another.
    """
    longest = _longest(config)
    if switch is None or (longest is not None and longest <= switch):
        return
    settings = "max_prompt_length + max_completion_length"
    raise ConfigError(
        f"the student's position encoding is another one in sequences of more than {switch} tokens "
        "(original_max_position_embeddings of LongRoPE), so what a longer rollout was sampled from is not what is "
        f"trained: set {'environment.max_trajectory_tokens' if config.environment.name else settings} to at most "
        f"{switch} (now {longest}), or use another student"
    )


def student_dtype(config: TrainConfig) -> str:
    """The dtype of the student's parameters: for "auto" the checkpoint's, or float32 where that is float16.

    Reads no weights.

    Raises:
        ConfigError: float16 was asked for.
    """
    if config.dtype == "float16":
        raise ConfigError(f"dtype='float16' {NO_FLOAT16}")
    if config.dtype != "auto":
        return config.dtype
    stored = read_dtype(config.model, trust_remote_code=config.trust_remote_code)
    return "float32" if stored == torch.float16 else "auto"


def load_student(
    config: TrainConfig,
    device: torch.device,
    checkpoint: Path | None = None,
    on_host: bool = False,
    sees: bool = False,
) -> Any:
    """The student as it is trained: its own weights, or an adapter on them.

    Args:
        config: of the run.
        device: where it will compute.
        checkpoint: take the weights from here.
        on_host: leave it on the CPU, to be split.
        sees: whether it is given pictures.

    Raises:
        ConfigError: float16 was asked for, or an adapter does not fit.
    """
    saved = None if checkpoint is None else checkpoint / "model"
    dtype = student_dtype(config)
    if dtype != config.dtype:
        logger.info("%s is stored in float16, in which AdamW breaks down: it is trained in float32", config.model)
    given_whole = is_given(config.model) and config.lora is None
    model = load_model(
        config.model if saved is None or config.lora is not None or given_whole else str(saved),
        dtype=dtype,
        attn_implementation=choose_attention(config.attn_implementation, device),
        trust_remote_code=config.trust_remote_code,
        device="cpu" if on_host else device,
        bf16=config.bf16,
        sees=sees,
    )
    if model.dtype == torch.float16:  # its configuration did not say so
        raise ConfigError(f"dtype={config.dtype!r} {NO_FLOAT16}")
    if model.dtype == torch.bfloat16 and config.lora is None:
        logger.warning(
            "the student's parameters are bfloat16: updates of less than about 1/256 of a weight are lost, which with "
            "learning_rate=%g is the fate of most (the metric weights_moved is the share that a step moves); "
            "dtype: float32 with bf16: true keeps them",
            config.learning_rate,
        )
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    if config.freeze_head:
        freeze_head(model)
    if saved is not None and given_whole:
        stored = load_model(str(saved), dtype=dtype, trust_remote_code=config.trust_remote_code, sees=sees)
        model.load_state_dict(stored.state_dict())
    if config.freeze_vision_tower:
        freeze_vision_tower(model)
    if config.lora is None:
        return model
    if saved is not None:
        return load_adapter(model, saved)
    return add_adapter(model, config.lora, vision_layers(model) if config.freeze_vision_tower else ())


def build_grader(config: TrainConfig, tokenizer: Any) -> Grader:
    """The verifiers of the run, for methods that grade rollouts."""
    from opdengine.verifiers.grader import Grader

    grader = Grader.from_config(config)
    grader.opening = thought_opening(tokenizer, config.chat_template_kwargs)
    return grader


def build_sampler(
    config: TrainConfig,
    model: Any,
    tokenizer: Any,
    ranks: Ranks | None = None,
    vocab_size: int | None = None,
    sees: bool = False,
) -> Sampler:
    """The student's sampler: vLLM where asked, else the trainer's own model, or a copy where that is split.

    The trainer's own model samples the first ``vocab_size`` ids alone; default: all of the tokenizer's. ``sees``:
    the model was loaded with its tower, and so is a copy of it.
    """
    ranks = ranks or Ranks()
    # Under autocast the trainer's own forward pass is bfloat16 as well.
    dtype = "bfloat16" if config.bf16 else str(model.dtype).removeprefix("torch.")
    stop_ids = stop_token_ids(tokenizer, model, config.chat_template_kwargs)
    if config.use_vllm:
        find_naming(architecture(config.model), config.trust_remote_code, sees)  # refuses before an engine starts
    if config.use_vllm and config.vllm_mode == "server":
        from opdengine.rollout.vllm.opening import open_server

        return open_server(
            config.vllm_server_base_url,
            tokenizer,
            dtype=dtype,
            sync_dir=config.vllm_sync_dir,
            response_timeout=config.vllm_response_timeout,
            ranks=ranks,
            stop_ids=stop_ids,
        )
    size = config.vllm_tensor_parallel_size
    if config.use_vllm and ranks.world_size > 1 and size > 1:
        from opdengine.rollout.vllm.opening import open_shared

        return open_shared(
            architecture(config.model),
            tokenizer,
            ranks=ranks,
            size=size,
            devices=_gpus(ranks, size),
            dtype=dtype,
            max_model_len=_longest(config),
            gpu_memory_utilization=config.vllm_gpu_memory_utilization,
            seed=config.seed,
            trust_remote_code=config.trust_remote_code,
            response_timeout=config.vllm_response_timeout,
            stop_ids=stop_ids,
        )
    if config.use_vllm:
        from opdengine.rollout.vllm.opening import open_child

        return open_child(
            architecture(config.model),
            tokenizer,
            dtype=dtype,
            trust_remote_code=config.trust_remote_code,
            seed=config.seed,
            max_model_len=_longest(config),
            gpu_memory_utilization=config.vllm_gpu_memory_utilization,
            tensor_parallel_size=size,
            enable_sleep_mode=config.vllm_enable_sleep_mode,
            response_timeout=config.vllm_response_timeout,
            devices=_gpus(ranks, 1),
            stop_ids=stop_ids,
            sees=sees,
            fixed=_fixed_weights(config, model) if sees else [],
        )
    from opdengine.rollout.transformers import TransformersSampler

    sampled = base_of(model)
    if ranks.world_size > 1:
        sampled = ranks.in_turn(lambda: load_copy(config, sees))
    sampler = TransformersSampler(
        sampled, tokenizer, 4 * config.max_tokens_per_batch, config.bf16, config.chat_template_kwargs
    )
    sampler.vocabulary = vocab_size or sampler.vocabulary
    sampler.prove()
    return sampler


def _fixed_weights(config: TrainConfig, model: Any) -> list[str]:
    """Beginnings of the names of weights that stay those of the checkpoint which an engine loads: a frozen tower's."""
    if not config.freeze_vision_tower or architecture(config.model) != config.model:  # an adapter may have moved it
        return []
    return [f"{name}." for name, _ in tower(base_of(model))]


def load_copy(config: TrainConfig, sees: bool = False) -> Any:
    """The student for sampling alone: where the trained one is split, or nothing is trained."""
    model = load_model(
        config.model,
        dtype=student_dtype(config),
        attn_implementation=config.attn_implementation,
        trust_remote_code=config.trust_remote_code,
        device=default_device(),
        bf16=config.bf16,
        sees=sees,
    ).requires_grad_(False)
    if config.bf16:
        halve_products(model)
    return model


def halve_products(model: Any) -> None:
    """Keep weights of linear layers in bfloat16, as autocast casts them in every pass: the results stay the same."""
    embedding = model.get_input_embeddings().weight
    for layer in model.modules():
        if isinstance(layer, torch.nn.Linear) and layer.weight is not embedding:
            layer.to(torch.bfloat16)


def _gpus(ranks: Ranks, size: int) -> str | None:
    """CUDA_VISIBLE_DEVICES of the engine of this rank's group of ``size`` neighbours; None: this process's."""
    if ranks.world_size == 1 or not torch.cuda.is_available():
        return None
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = visible.split(",") if visible else [str(i) for i in range(ranks.local_world_size)]
    first = ranks.local_rank - ranks.local_rank % size
    return ",".join(names[first : first + size])


def _longest(config: TrainConfig) -> int | None:
    """Most tokens of one sequence of the student; None is unbounded. vLLM refuses more than the model's window."""
    longest: int | None = config.max_prompt_length + config.max_completion_length
    if config.environment.name:
        longest = config.environment.max_trajectory_tokens
    window = read_window(config.model, trust_remote_code=config.trust_remote_code)
    return min((limit for limit in (longest, window) if limit is not None), default=None)
