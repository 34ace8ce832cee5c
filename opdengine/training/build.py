"""From a configuration to an engine: student, teachers, sampler, optimiser; each has a module of its own."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from opd_kernels import LMHead
from opdengine.config.sections import SELF
from opdengine.config.train import TrainConfig
from opdengine.distributed import Ranks
from opdengine.environments.setup import open_episodes
from opdengine.errors import ConfigError
from opdengine.loss.vocab_parallel import VocabParallel
from opdengine.methods.method import Method
from opdengine.models.backbone import Backbone, default_device
from opdengine.models.chat import note_ends, shared_vocabulary, stop_token_ids
from opdengine.models.given import is_given
from opdengine.models.lora import base_of, require_peft
from opdengine.models.quantised import refuse_quantised
from opdengine.models.rendering import thought_opening
from opdengine.models.sharding import Sharded
from opdengine.teachers.own import follow
from opdengine.teachers.shard import Session
from opdengine.training.build_sampler import build_sampler
from opdengine.training.build_student import check_switch, load_student, student_dtype
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
    ends = stop_token_ids(tokenizer, model, config.chat_template_kwargs)
    note_ends(base_of(model), ends)
    attach(teachers, alignments, ends)
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


def build_grader(config: TrainConfig, tokenizer: Any) -> Grader:
    """The verifiers of the run, for methods that grade rollouts."""
    from opdengine.verifiers.grader import Grader

    grader = Grader.from_config(config)
    grader.opening = thought_opening(tokenizer, config.chat_template_kwargs)
    return grader
