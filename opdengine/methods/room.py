"""Before step 0: do the teachers' windows hold what the settings ask for?

A step drops what does not fit; where that is every rollout of some prompts, whatever the student writes, the run is
refused.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from opdengine.errors import ConfigError
from opdengine.teachers import Teacher
from opdengine.types import Message, Prompt


@dataclass(frozen=True)
class Need:
    """A sequence that a teacher has to read, with what it writes or judges.

    Args:
        teacher: reads it.
        tokens: its least length.
        what: names it, with the settings behind its length.
        remedy: what makes it shorter.
    """

    teacher: Teacher
    tokens: int
    what: str
    remedy: str

    @property
    def fits(self) -> bool:
        """Whether the teacher's window holds it."""
        return self.teacher.window is None or self.tokens <= self.teacher.window


def length(teacher: Teacher, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] = ()) -> int:
    """Tokens of a chat in a teacher's template; 0 where an environment has yet to write it."""
    return len(teacher.encode(messages, tools)) if messages else 0


def check_room(room: Callable[[Prompt], Iterable[Need]], prompts: Sequence[Prompt]) -> None:
    """Refuse a run of which some routing key has no prompt that fits.

    Args:
        room: what the method asks of the teachers for one prompt; all of it must fit.
        prompts: all training prompts.

    Raises:
        ConfigError: names the routing key, the teacher, the lengths and the remedy.
    """
    by_key: dict[str, list[Prompt]] = {}
    for prompt in prompts:
        by_key.setdefault(prompt.key, []).append(prompt)
    for key, members in by_key.items():
        first: Need | None = None
        for prompt in members:
            lacking = next((need for need in room(prompt) if not need.fits), None)
            if lacking is None:
                break
            first = first or lacking
        else:
            assert first is not None
            which = f"of data_source {key!r} " if len(by_key) > 1 else ""
            raise ConfigError(
                f"no prompt {which}fits the window of teacher {first.teacher.name!r}, which has {first.teacher.window} "
                f"tokens: {first.what} takes at least {first.tokens} (prompt {members[0].id!r}); {first.remedy}, or "
                "take a teacher with a longer window"
            )
