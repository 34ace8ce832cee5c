"""From a configuration to the teachers of a run: their tokenizers, their servers, and the weights that are here."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

import numpy as np
import torch

from opdengine.config.sections import SELF, TeacherConfig
from opdengine.config.train import TrainConfig
from opdengine.distributed import Ranks
from opdengine.errors import ConfigError
from opdengine.models.alignment import Alignment
from opdengine.models.backbone import Backbone
from opdengine.models.chat import (
    PROBES,
    load_tokenizer,
    require_same_mode,
    require_same_tokenizer,
    tokenizer_differences,
    vocabulary_size,
)
from opdengine.teachers import Teacher
from opdengine.teachers.local import LocalTeacher
from opdengine.teachers.own import build_own
from opdengine.teachers.remote import RemoteTeacher
from opdengine.teachers.server import ServedTeacher
from opdengine.teachers.shard import Session
from opdengine.teachers.stored import identity_of, open_alone, open_stored
from opdengine.training.event_loop import run_coroutine

logger = logging.getLogger(__name__)


def teacher_tokenizer(config: TrainConfig, teacher: TeacherConfig, sees: bool = True) -> Any:
    """The tokenizer that belongs to a teacher's model, with its processor where there are pictures (``sees``).

    Raises:
        ConfigError: there is none under the name of a served model.
    """
    teacher = config.as_loaded(teacher)
    try:
        return load_tokenizer(
            teacher.tokenizer or teacher.model,
            trust_remote_code=config.trust_remote_code,
            chat_template=teacher.chat_template,
            images=teacher.images,
            sees=sees and teacher.base_url is None,
        )
    except ValueError as error:
        if teacher.is_here or teacher.tokenizer is not None:
            raise
        raise ConfigError(f"{error}; set 'tokenizer' of the teacher {teacher.name!r} to the model's folder") from error


def align_tokenizers(config: TrainConfig, student: Any, tokenizers: Sequence[Any]) -> dict[str, Alignment]:
    """By name the teachers that read the student's words in tokens of their own; all others read the same token ids.

    Args:
        config: of the run.
        student: its tokenizer.
        tokenizers: of all teachers, in their order.

    Raises:
        ValueError: a teacher has another tokenizer without ``tokenizer_alignment``, or thinks where the student does
            not.
    """
    found = {}
    for teacher, tokenizer in zip(map(config.as_loaded, config.teachers), tokenizers, strict=True):
        if teacher.tokenizer_alignment == "spans":
            found[teacher.name] = _align(config, teacher, student, tokenizer)
        else:
            require_same_tokenizer(student, tokenizer, teacher.name)
        require_same_mode(student, config.chat_template_kwargs, tokenizer, teacher.chat_template_kwargs, teacher.name)
    return found


def _align(config: TrainConfig, teacher: TeacherConfig, student: Any, tokenizer: Any) -> Alignment:
    """A teacher's tokenizer beside the student's; the log tells how much of probe texts they share."""
    kwargs = config.chat_template_kwargs, teacher.chat_template_kwargs
    alignment = Alignment(student, tokenizer, teacher.name, *kwargs)
    spans = [alignment.turn(student.encode(probe, add_special_tokens=False))[1] for probe in PROBES]
    if not tokenizer_differences(student, tokenizer, teacher.name):
        logger.warning(
            "teacher %r has the student's tokenizer: without tokenizer_alignment it is compared exactly", teacher.name
        )
    inside, single = (np.concatenate(x) for x in ([s.student >= 0 for s in spans], [s.one_to_one for s in spans]))
    logger.info(
        "teacher %r has another tokenizer: of probe texts it keeps %.0f %%, in tokens of equal bounds %.0f %%; %d of "
        "its %d tokens are the student's, too",
        teacher.name, 100 * inside.mean(), 100 * single.mean(), alignment.pairs.shape[1], alignment.vocabulary,
    )  # fmt: skip
    return alignment


def attach(teachers: Sequence[Teacher], alignments: Mapping[str, Alignment], ends: Sequence[int]) -> None:
    """Give teachers what :func:`align_tokenizers` found; ``ends`` are the ids that end an answer of the student."""
    for teacher in teachers:
        if (alignment := alignments.get(teacher.name)) is not None:
            alignment.ends.update(ends)
            teacher.alignment = alignment  # type: ignore[attr-defined]


def serve_teachers(config: TrainConfig, tokenizers: Sequence[Any], *, judges: bool) -> dict[str, ServedTeacher]:
    """The endpoints of the teachers by name, each asked whether it answers what will be needed.

    Args:
        config: of the run.
        tokenizers: of all teachers, in their order.
        judges: whether teachers score; else they only write, as the writer of a local teacher does.

    Raises:
        ConfigError: the variable of an API key is not set.
        ProbeError: a server cannot be reached, serves another model or lacks an ability.
    """
    stop = config.on_teacher_failure == "stop"
    teachers = [
        ServedTeacher(_as_served(teacher), tokenizer, vocabulary_size(tokenizer), stop_on_failure=stop)
        for teacher, tokenizer in zip(config.teachers, tokenizers, strict=True)
        if (teacher.base_url is not None and not teacher.stored_only) or teacher.writer_base_url is not None
    ]
    scoring = {t.name for t in config.teachers if judges and t.base_url is not None}

    async def probe() -> None:
        await asyncio.gather(*(teacher.probe(judges=teacher.name in scoring) for teacher in teachers))

    if teachers:
        run_coroutine(probe())
    return {teacher.name: teacher for teacher in teachers}


def reach_teachers(
    config: TrainConfig,
    tokenizers: Sequence[Any],
    served: Mapping[str, ServedTeacher],
    device: torch.device,
    *,
    judges: bool,
) -> dict[str, RemoteTeacher]:
    """The exact teachers on other machines by name, each asked what it is, and for its head if it ``judges``.

    Args:
        config: of the run.
        tokenizers: of all teachers, in their order.
        served: the endpoints that write for some of them.
        device: of the heads.
        judges: whether teachers score; else they only write.

    Raises:
        ConfigError: the variable of a token is not set.
        ProbeError: no endpoint answers, or one serves another model.
    """
    stop = config.on_teacher_failure == "stop"
    teachers = [
        RemoteTeacher(teacher, tokenizer, device=device, stop_on_failure=stop, writer=served.get(teacher.name))
        for teacher, tokenizer in zip(config.teachers, tokenizers, strict=True)
        if teacher.hidden_states_url
    ]

    async def probe() -> None:
        await asyncio.gather(*(t.probe(judges=judges and not t.config.stored_only) for t in teachers))

    if teachers:
        run_coroutine(probe())
    return {teacher.name: teacher for teacher in teachers}


def _as_served(teacher: TeacherConfig) -> TeacherConfig:
    """Return the settings by which a teacher is called at its endpoint."""
    if teacher.base_url is not None:
        return teacher
    here: dict[str, Any] = {"writer_base_url": None, "writer_model": None, "offload": False, "shard": False}
    here |= {"stored": None, "stored_dtype": "auto", "stored_only": False, "stored_max_bytes": None}
    there: dict[str, Any] = {"hidden_states_url": [], "hidden_states_dtype": "auto"}
    model, tokenizer = teacher.writer_model or teacher.model, teacher.tokenizer or teacher.model
    return replace(teacher, base_url=teacher.writer_base_url, model=model, tokenizer=tokenizer, **here, **there)


def load_teachers(
    config: TrainConfig,
    tokenizers: Sequence[Any],
    student: Backbone | None,
    own_dtype: str,
    served: Mapping[str, ServedTeacher],
    remote: Mapping[str, RemoteTeacher],
    device: torch.device,
    session: Session | None,
    ranks: Ranks,
) -> list[Teacher]:
    """All teachers in their order; those whose weights belong here are loaded.

    Args:
        config: of the run.
        tokenizers: of all teachers, in their order.
        student: that is trained, and may teach itself; None where no teacher is ``model: self``.
        own_dtype: in which it then teaches, unless the teacher's settings say another one.
        served, remote: the teachers on servers by name; see :func:`serve_teachers` and :func:`reach_teachers`.
        device: where the loaded ones compute.
        session: with the other processes, for teachers that are split over them.
        ranks: of the run; the first one finds out which weights a teacher with ``stored`` has.

    Raises:
        ConfigError: with ``stored_only`` nothing is stored of a teacher.
    """
    options: dict[str, Any] = {
        "device": device,
        "attn_implementation": config.attn_implementation,
        "trust_remote_code": config.trust_remote_code,
        "max_tokens": config.max_tokens_per_batch,
        "session": session,
    }

    def load(teacher: TeacherConfig, tokenizer: Any) -> Teacher:
        if teacher.base_url is not None:
            return served[teacher.name]
        if teacher.hidden_states_url:
            return remote[teacher.name]
        if teacher.model != SELF:
            return LocalTeacher(teacher, tokenizer=tokenizer, writer=served.get(teacher.name), **options)
        assert student is not None
        own = config.as_loaded(teacher)
        own = own if own.dtype != "auto" else replace(own, dtype=cast(Any, own_dtype))
        return build_own(own, student, config.shares_student(teacher), tokenizer, {**options, "bf16": config.bf16})

    def find(teacher: TeacherConfig, tokenizer: Any) -> Teacher:
        if teacher.stored is None:
            return load(teacher, tokenizer)
        identity: dict[str, str] | None = None
        with ranks.agree():
            if ranks.is_first:
                identity = identity_of(teacher, tokenizer, remote.get(teacher.name), config.trust_remote_code)
        known = cast(dict[str, str], ranks.gather(identity)[0])
        if teacher.stored_only:
            return open_alone(teacher, known, tokenizer, device, served.get(teacher.name))
        return open_stored(load(teacher, tokenizer), known)

    return [find(teacher, tokenizer) for teacher, tokenizer in zip(config.teachers, tokenizers, strict=True)]
