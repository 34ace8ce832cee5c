"""On-policy distillation from one teacher (OPD) or from several with fixed weights (MT-OPD).

Teachers judge the student's own tokens under the plain prompt. OPD: Agarwal et al.,
arXiv 2306.13649. MT-OPD: the baseline of MAD-OPD, arXiv 2605.01347, section 5.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import pairwise

import numpy as np

from opdengine.config import ConfigError, TrainConfig
from opdengine.recipe import Annotations, Note, Recipe, distill, route
from opdengine.room import Need, length
from opdengine.teachers import Teacher
from opdengine.types import Message, Prompt, Rollout, TeacherContext

MAX_TEACHERS = 8


class PlainContexts:
    """Every routed teacher reads the prompt in its own chat template, weighted by ``weight``."""

    async def annotate(self, rollouts: Sequence[Rollout], teachers: Sequence[Teacher]) -> Annotations:
        return Annotations([plain_note(r, route(teachers, r.prompt.key)) for r in rollouts])


def plain_note(rollout: Rollout, teachers: Sequence[Teacher]) -> Note:
    """The rollout under the plain prompt of every teacher, fixed relative weights."""
    contexts = tuple(read_by(t, rollout, rollout.prompt.messages) for t in teachers)
    weights = np.array([t.weight for t in teachers], dtype=np.float32)
    return Note(contexts=contexts, mix=weights / weights.sum())


def read_by(teacher: Teacher, rollout: Rollout, messages: Sequence[Message]) -> TeacherContext:
    """The rollout as a teacher reads it: ``messages`` in place of its prompt.

    All that the student has not written is rendered in the teacher's chat template: the prompt and, in an
    episode, every answer of the environment.
    """
    tools = rollout.prompt.tools
    answers = {
        i: teacher.encode_answer(turn.messages, tools, before.token_ids.tolist())
        for i, (before, turn) in enumerate(pairwise(rollout.turns), start=1)
        if turn.role == "environment" and turn.messages
    }
    return TeacherContext.replace_prompt(rollout, teacher.name, teacher.encode(messages, tools), answers)


def plain_room(config: TrainConfig, prompt: Prompt, teachers: Sequence[Teacher]) -> list[Need]:
    """Every routed teacher reads the plain prompt and the longest completion."""
    return [
        answer_need(config, teacher, length(teacher, prompt.messages, prompt.tools))
        for teacher in route(teachers, prompt.key)
    ]


def answer_need(config: TrainConfig, teacher: Teacher, before: int, what: str = "a prompt") -> Need:
    """Room for the longest completion (in an environment: the longest turn) behind ``before`` tokens."""
    count = config.max_completion_length
    return Need(
        teacher,
        before + count,
        f"{what} of {before} tokens with max_completion_length={count}",
        "lower max_completion_length or shorten the prompts",
    )


def opd(config: TrainConfig) -> Recipe:
    """One teacher per prompt: a single teacher, or several routed by key."""
    need_teachers(config, 1)
    shared = [t.name for t in config.teachers if not t.key]
    if len(config.teachers) > 1 and shared:
        raise ConfigError(
            f"method 'opd' uses one teacher per prompt, but {shared} have no routing key beside "
            "other teachers; give every teacher a key, keep one teacher, or use 'mt_opd'"
        )
    claimed = [key for t in config.teachers for key in set(t.key)]
    if doubles := sorted({key for key in claimed if claimed.count(key) > 1}):
        raise ConfigError(
            f"method 'opd' uses one teacher per prompt, but several teachers have the key {doubles}; "
            "give every key to one teacher, or use 'mt_opd'"
        )
    return Recipe("opd", PlainContexts(), (distill,), room=partial(plain_room, config))


def mt_opd(config: TrainConfig) -> Recipe:
    """K teachers, sum of their divergences with fixed weights."""
    need_teachers(config, 2)
    return Recipe("mt_opd", PlainContexts(), (distill,), room=partial(plain_room, config))


def need_teachers(config: TrainConfig, count: int) -> None:
    """Raise ConfigError unless enough teachers with usable weights are configured."""
    if len(config.teachers) < count:
        raise ConfigError(
            f"method {config.method!r} needs at least {count} teacher(s), "
            f"{len(config.teachers)} given; add them under 'teachers'"
        )
    if len(config.teachers) > MAX_TEACHERS:
        raise ConfigError(f"{len(config.teachers)} teachers given; the fused loss takes at most {MAX_TEACHERS}")
    for teacher in config.teachers:
        if not 0 < teacher.weight < float("inf"):
            raise ConfigError(
                f"teacher {teacher.name!r} has weight {teacher.weight}; it must be positive (leave "
                "a teacher out to switch it off)"
            )
