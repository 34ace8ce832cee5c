"""An environment takes chat messages and answers with chat messages; the words are Gymnasium's.

A class is an environment when it has the methods of :class:`Environment`; nothing need be inherited.
One object plays one episode at a time and lives in a worker process of its own
(:mod:`opdengine.environments.pool`), so it may use global state, signals or a JVM as it likes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

from opdengine.errors import ServiceError
from opdengine.types import Message

Task = Mapping[str, Any]
"""JSON-able description of one episode: ``id`` (unique), ``type`` (the routing key) and whatever the
environment needs to set it up again."""

FAILURES = ("empty", "unparseable", "invalid_action", "tool_error", "execution")
"""Words for ``info["failure"]``: the turn failed for a reason that needs no judge (SAGE-OPD, section 3.3)."""


@dataclass(frozen=True)
class Observation:
    """The start of an episode.

    Args:
        messages: the chat so far (system and user); the student writes the next message.
        tools: JSON schemas for the chat template.
        info: ``goal`` and ``type`` of the task, ``admissible`` actions (a list of strings, or absent where
            they cannot be listed), ``observation`` (the bare text, without instructions).
    """

    messages: tuple[Message, ...]
    tools: tuple[Mapping[str, Any], ...] = ()
    info: Mapping[str, Any] = field(default_factory=dict)


def check_number(name: str, value: Any, most: float = math.inf) -> None:
    """True and False, and numbers of numpy and torch, are numbers; text is not.

    Args:
        name: of the value, for the message.
        value: what an environment told.
        most: the largest that is possible; the least is 0 where there is one.

    Raises:
        ValueError: it is no finite number, or not in that range.
    """
    try:
        number = math.nan if isinstance(value, (str, bytes)) else float(getattr(value, "item", lambda: value)())
    except (TypeError, ValueError, OverflowError, RuntimeError):
        number = math.nan
    if not math.isfinite(number):
        raise ValueError(f"{name}={value!r:.200} is not a finite number")
    if most < math.inf and not 0 <= number <= most:
        raise ValueError(f"{name}={value!r:.200} is not in [0, {most:g}]")


@dataclass(frozen=True)
class Step:
    """The answer of an environment to one message of the student.

    Args:
        messages: the environment's answer ("user" or "tool" messages); may be empty at the end.
        reward: of this step.
        terminated: the task's own end was reached (success or failure).
        truncated: it was cut off by a limit of the environment.
        info: ``action`` (what was executed, "" if nothing), ``failure`` ("" or one of :data:`FAILURES`),
            ``admissible``, ``observation``; with the end also ``success`` (bool) and ``score`` in [0, 1]. A score
            that is told with every step counts where the caller ends the episode. ``raw_score``: the world's own.
            ``feedback``: what SDPO's teacher is shown of an episode that failed; default: the last ``observation``.

    Raises:
        ValueError: the reward or a score is not a finite number, the score is not in [0, 1], ``success`` is not true
            or false, or ``failure`` is none of the words.
    """

    messages: tuple[Message, ...]
    reward: float = 0.0
    terminated: bool = False
    truncated: bool = False
    info: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_number("reward", self.reward)
        if not isinstance(self.info, Mapping):
            raise ValueError(f"info is {type(self.info).__name__}, not a mapping")
        if "score" in self.info:
            check_number("info['score']", self.info["score"], most=1.0)
        if "raw_score" in self.info:
            check_number("info['raw_score']", self.info["raw_score"])
        if self.info.get("success", False) not in (False, True):
            raise ValueError(f"info['success']={self.info['success']!r:.200} is not true or false")
        if self.info.get("failure", "") not in ("", *FAILURES):
            raise ValueError(f"info['failure']={self.info['failure']!r:.200} is none of {FAILURES}")

    @property
    def done(self) -> bool:
        """Whether the episode is over."""
        return self.terminated or self.truncated


class InfrastructureError(ServiceError):
    """The environment itself broke: neither success nor failure of the student; never trained on."""


@runtime_checkable
class Environment(Protocol):
    """One episode at a time; the constructor takes the options of the configuration as keywords."""

    @classmethod
    def tasks(cls, split: str, **options: Any) -> Sequence[Task]:
        """The tasks of a split ("train", or a name for evaluation such as "valid_unseen").

        Raises:
            ValueError: the split is unknown or its files cannot be read; says which and what to do.
        """
        ...

    def reset(self, *, seed: int, task: Task) -> Observation:
        """Begin an episode; the same seed and task give the same episode. All rollouts of a group have one seed.

        Raises:
            InfrastructureError: it cannot be set up.
        """
        ...

    def step(self, message: Message) -> Step:
        """Answer one assistant message: ``content`` is its text, ``tool_calls`` (in OpenAI's form) is
        there where tools were offered and some were called. Bad messages are answered, not raised."""
        ...

    def close(self) -> None:
        """Give back processes and files; safe to call twice."""
        ...


@runtime_checkable
class HasExpert(Protocol):
    """An environment that knows a way to success."""

    def expert(self) -> Message:
        """The next message of a gold path from the present state."""
        ...


@dataclass(frozen=True)
class Broken:
    """In place of an observation or a step: the infrastructure failed.

    Args:
        reason: one word for the metrics: "start", "timeout", "crash", "error", "observation_too_long".
        detail: for people.
    """

    reason: str
    detail: str = ""
