"""This module defines what a method of distillation is. The training loop knows this class and no paper.

A paper overrides what it changes, in one file. In a step the hooks are called in the order in which they stand here;
each changes the samples of a :class:`opdengine.types.Batch` in place.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Protocol

import numpy as np

from opdengine.config.train import TrainConfig
from opdengine.data.prompts import PromptSet
from opdengine.distributed import Ranks
from opdengine.environments.episodes import Episodes
from opdengine.errors import ConfigError
from opdengine.methods.checks import Check
from opdengine.methods.paper import Paper
from opdengine.methods.privileged import Privileged
from opdengine.methods.room import Need, length
from opdengine.teachers import Teacher
from opdengine.teachers.aligned import read_aligned
from opdengine.types import Batch, Message, Prompt, Sample, TeacherContext

MAX_TEACHERS = 8


class Contexts(Protocol):
    """An object that chooses what teachers read and how they are weighted. It may ask them to write."""

    @property
    def checks(self) -> tuple[Check, ...]:
        """The ways in which these contexts can fail without an error."""
        ...

    async def __call__(self, batch: Batch, teachers: Sequence[Teacher]) -> None:
        """Set ``contexts`` and ``mix`` of every kept sample, or its ``drop``; no communication between processes."""
        ...

    def room(self, prompt: Prompt, teachers: Sequence[Teacher]) -> list[Need]:
        """The tokens that the teachers' windows must hold for one prompt."""
        ...


class Method:
    """On-policy distillation as it is without any paper; the base of all methods.

    Several processes: every hook sees the samples of its own process. ``self.ranks`` exchanges numbers where a rule
    spans the whole step; only :meth:`select` and :meth:`weigh` may use it, and every process must use it alike.

    Args:
        config: of the run.

    Attributes:
        paper: the settings of the method's paper, taken where the user says nothing; None for a method without one.
        needs: which of :data:`opdengine.types.MEASURES` the samples must have in :meth:`weigh`.
        needs_reward: whether samples are graded by the verifier first (an episode's reward is its environment's).
        teachers_per_prompt: least number of teachers that every prompt needs.
        top1_temperature: of the distributions behind ``teacher_top1``.
        streams: names of the data streams that :meth:`schedule` draws from; empty: all data are one.
        writes: whether :meth:`write` makes all sequences, instead of the student; see :meth:`is_written` for some.
        mixes: whether :meth:`write` makes some of the sequences.
        diverges: whether :meth:`weigh` gives a divergence any weight; settings of it are refused where nothing does.
        contexts: what :meth:`annotate` asks.
        view: a prompt as the teachers read it.
        teachers, ranks, episodes: of the run; set before the first step. ``episodes`` is None without an environment.

    Raises:
        ConfigError: the settings do not fit the method. No model has been loaded yet.
    """

    paper: Paper | None = None
    needs: frozenset[str] = frozenset()
    needs_reward = False
    teachers_per_prompt = 1
    top1_temperature = 1.0
    streams: tuple[str, ...] = ()
    writes = False
    mixes = False
    diverges = True

    def __init__(self, config: TrainConfig) -> None:
        self.config = config
        self.view = Privileged(config.teacher_prompt_template)
        self.contexts: Contexts = PlainContexts(config)
        self.teachers: Sequence[Teacher] = ()
        self.ranks = Ranks()
        self.episodes: Episodes | None = None

    # Before the first step.

    @property
    def checks(self) -> tuple[Check, ...]:
        """The ways in which the method can fail without an error; the run warns at the first step that shows one."""
        return self.contexts.checks

    def lack(self, prompt: Prompt) -> str:
        """What the method reads and a prompt does not have, in a sentence; "" where it has all."""
        return self.view.lack(prompt)

    def require(self, prompts: Sequence[Prompt]) -> None:
        """Raise ConfigError unless every prompt has what the method reads; names the first that does not."""
        lacking = [problem for prompt in prompts if (problem := self.lack(prompt))]
        if lacking:
            raise ConfigError(f"{len(lacking)} of {len(prompts)} prompts: {lacking[0]}")

    def fit(self, prompts: PromptSet, encode: Callable[..., list[int]]) -> PromptSet:
        """The prompts that the method can use, before any model is loaded; what it leaves out is counted.

        ``encode(prompt)`` gives the student's prompt ids, ``encode(prompt, answer)`` those of an answer behind it.
        """
        return prompts

    def room(self, prompt: Prompt) -> list[Need]:
        """The tokens that the teachers' windows must hold for one prompt; all of them must fit."""
        return self.contexts.room(prompt, self.teachers)

    # Which data a step draws.

    def stream_of(self, prompt: Prompt) -> str:
        """The data stream that a prompt belongs to, one of :attr:`streams`."""
        return ""

    def schedule(self, step: int) -> Mapping[str, float]:
        """The share of the prompts of a step (from 0) that comes from each stream; the shares sum to 1."""
        return {}

    # Before the teachers score. These three may run ahead, while an earlier batch is updated.

    def is_written(self, prompt: Prompt, number: int) -> bool:
        """Whether :meth:`write` makes the sequence of a prompt in batch ``number``, instead of the student."""
        return self.writes

    async def write(self, prompts: Sequence[Prompt], encode: Callable[..., list[int]]) -> Batch:
        """One sequence for each of these prompts that the student does not sample; ``encode`` as in :meth:`fit`."""
        raise TypeError(f"{type(self).__name__}.writes or mixes is set, but the class does not define 'write'")

    def split(self, batch: Batch) -> None:
        """Make several samples of one, or leave samples out."""

    async def annotate(self, batch: Batch) -> None:
        """Say what each teacher reads, how teachers are weighted, and what each turn weighs."""
        await self.contexts(batch, self.teachers)

    # On the whole step: these two may use ``self.ranks``.

    def select(self, batch: Batch) -> None:
        """Drop samples, or move turn weights, before any teacher scores."""

    def weigh(self, batch: Batch) -> None:
        """Set ``kl_weight`` and ``advantage`` of every sample, or its ``drop``."""
        for sample in batch:
            sample.kl_weight = sample.target_turn_weight


def route(teachers: Sequence[Teacher], key: str) -> list[Teacher]:
    """The teachers that answer for prompts with this routing key, in their configured order."""
    return [t for t in teachers if not t.keys or key in t.keys]


class PlainContexts:
    """Every routed teacher reads the prompt in its own chat template, with its fixed weight.

    With ``teacher_prompt_template`` it reads that in place of the user's last message.

    Args:
        config: of the run.
    """

    checks: tuple[Check, ...] = ()

    def __init__(self, config: TrainConfig) -> None:
        self.config = config
        self.view = Privileged(config.teacher_prompt_template)

    async def __call__(self, batch: Batch, teachers: Sequence[Teacher]) -> None:
        for sample in batch:
            judged_by(sample, route(teachers, sample.prompt.key), self.view(sample.prompt).messages)

    def room(self, prompt: Prompt, teachers: Sequence[Teacher]) -> list[Need]:
        """Every routed teacher reads the plain prompt and the longest completion."""
        return plain_room(self.config, self.view(prompt), route(teachers, prompt.key))


def judged_by(sample: Sample, teachers: Sequence[Teacher], messages: Sequence[Message]) -> None:
    """Let some teachers judge a sample under ``messages``, with their fixed relative weights."""
    sample.contexts = tuple(read_by(t, sample, messages) for t in teachers)
    weights = np.array([t.weight for t in teachers], dtype=np.float32)
    sample.mix = weights / weights.sum()


def read_by(teacher: Teacher, sample: Sample, messages: Sequence[Message]) -> TeacherContext:
    """The sample as a teacher reads it: ``messages`` in place of its prompt.

    All that the student has not written is rendered in the teacher's chat template: the prompt and, in an
    episode, every answer of the environment. A teacher with another tokenizer reads the student's words in its own
    tokens.
    """
    if (alignment := getattr(teacher, "alignment", None)) is not None:
        return read_aligned(teacher, alignment, sample, messages)
    tools = sample.prompt.tools
    answers = {
        i: teacher.encode_answer(turn.messages, tools, before.token_ids.tolist())
        for i, (before, turn) in enumerate(pairwise(sample.turns), start=1)
        if turn.role == "environment" and turn.messages
    }
    return TeacherContext.replace_prompt(sample, teacher.name, teacher.encode(messages, tools), answers)


def plain_room(config: TrainConfig, prompt: Prompt, teachers: Sequence[Teacher]) -> list[Need]:
    """These teachers read the plain prompt and the longest completion."""
    return [
        answer_need(config.max_completion_length, teacher, length(teacher, prompt.messages, prompt.tools))
        for teacher in teachers
    ]


def answer_need(longest: int, teacher: Teacher, before: int, what: str = "a prompt") -> Need:
    """Room for the longest completion (in an environment: the longest turn) behind ``before`` tokens."""
    return Need(
        teacher,
        before + longest,
        f"{what} of {before} tokens with max_completion_length={longest}",
        "lower max_completion_length or shorten the prompts",
    )


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
