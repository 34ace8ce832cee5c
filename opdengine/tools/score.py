"""Teachers judge all given answers of the training data before a run, which then asks them nothing (``stored``)."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

from opdengine.config.sections import SELF
from opdengine.config.train import TrainConfig
from opdengine.distributed import Ranks, start
from opdengine.errors import ConfigError
from opdengine.methods import build_method
from opdengine.methods.method import Method
from opdengine.methods.room import check_room
from opdengine.models.backbone import default_device, read_generation
from opdengine.models.chat import shared_vocabulary, stop_token_ids
from opdengine.teachers.shard import Session
from opdengine.teachers.stored import StoredTeacher
from opdengine.training.build_teachers import align_tokenizers, attach, load_teachers, reach_teachers, serve_teachers
from opdengine.training.event_loop import run_coroutine
from opdengine.training.inputs import Inputs, read_inputs
from opdengine.training.run import check_needs
from opdengine.training.step import Engine
from opdengine.verifiers.grader import Grader

logger = logging.getLogger(__name__)


def score_given(config: TrainConfig, progress: Callable[[str], None] = lambda text: None) -> dict[str, float]:
    """Store what the teachers say about the recorded answers of ``train_data``, a step's prompts at a time.

    What is stored already is not asked again, so a call that was interrupted goes on where it was. Under ``torchrun``
    the processes share the prompts. The student is not loaded.

    Args:
        config: of the run; ``gkd.lmbda`` counts as 0, and ``stored_only`` as false.
        progress: is told how far it is.

    Returns:
        Metrics by name: answers, ``stored/hits/NAME``, ``stored/misses/NAME``, and ``dropped/...`` by reason.

    Raises:
        ConfigError, DataError: before any model is loaded, where possible.
    """
    if not any(teacher.stored for teacher in config.teachers):
        raise ConfigError("no teacher has a folder to store what it says; name one with teachers.0.stored")
    if any(teacher.model == SELF for teacher in config.teachers):
        raise ConfigError("a teacher is the student itself, which is not loaded to score; leave it out")
    if config.gkd.seq_kd:
        raise ConfigError("gkd.seq_kd=True is not possible; the answers are yet to be written, and are no data")
    teachers = [replace(teacher, stored_only=False) for teacher in config.teachers]
    config = replace(config, teachers=teachers, gkd=replace(config.gkd, lmbda=0.0), max_staleness=0)
    config.require_train_data()
    with start(config.ddp_timeout) as ranks:
        method = build_method(config)
        check_needs(config)
        with Grader.from_config(config) as grader:
            given = read_inputs(config, method, grader, ranks)
        ranks.raise_on_all_ranks()
        return run_coroutine(_score(_engine(config, method, given, ranks), given, progress))


def _engine(config: TrainConfig, method: Method, given: Inputs, ranks: Ranks) -> Engine:
    """An engine whose student neither samples nor learns."""
    device, tokenizer, tokenizers = default_device(), given.tokenizer, given.tokenizers
    vocab_size = shared_vocabulary(tokenizer, tokenizers)
    alignments = align_tokenizers(config, tokenizer, tokenizers)
    served = serve_teachers(config, tokenizers, judges=True)
    remote = reach_teachers(config, tokenizers, served, device, judges=True)
    session = Session(ranks) if ranks.world_size > 1 and any(t.shard for t in config.teachers) else None
    teachers = load_teachers(config, tokenizers, None, "auto", served, remote, device, session, ranks)
    student = SimpleNamespace(generation_config=read_generation(config.model, config.trust_remote_code))
    attach(teachers, alignments, stop_token_ids(tokenizer, student, config.chat_template_kwargs))
    nobody: Any = SimpleNamespace(vision=tokenizer.vision, policy_version=0, generate=lambda *_: ())
    return Engine(
        config, method, nobody, tokenizer, teachers, nobody, nobody, nobody, vocab_size, ranks=ranks, session=session
    )


async def _score(engine: Engine, given: Inputs, progress: Callable[[str], None]) -> dict[str, float]:
    prompts, counts = given.prompts.prompts, Counter[str]()
    check_room(engine.method.room, prompts)
    size = engine.config.prompts_per_step * engine.ranks.world_size
    keeping = [teacher.name for teacher in engine.teachers if isinstance(teacher, StoredTeacher)]
    for begin in range(0, len(prompts), size):
        batch = await engine.prepare(prompts[begin : begin + size], begin // size)
        for sample in batch:
            sample.keep_teachers(keeping)  # nobody would read what the others say
        await engine.ranks.agreed(engine.score(batch))
        counts["answers"] += len(batch)
        counts.update({f"dropped/{reason}": number for reason, number in batch.dropped.items()})
        for teacher in engine.teachers:
            counts.update(cast(Any, teacher.counts()))
        if engine.ranks.is_first:
            progress(f"{min(begin + size, len(prompts))} of {len(prompts)} prompts")
    total = sum(map(Counter, engine.ranks.gather(dict(counts))), Counter())
    bytes_ = {f"stored/bytes/{t.name}": t.store.size for t in engine.teachers if isinstance(t, StoredTeacher)}
    return {**total, **bytes_}
