"""A worker's lines of JSON are read strictly here, since a process that went wrong may print anything."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from opdengine.environments.protocol import Broken, Observation, Step

REASONS = ("start", "timeout", "crash", "error", "observation_too_long")
"""Why an answer is :class:`Broken`: no start, no answer in time, process ended, exception, huge observation."""


def read_answer(answer: Mapping[str, Any], kind: str) -> Observation | Step | bool | Broken:
    """The answer to a question.

    Args:
        answer: the line.
        kind: of the question: "start" (answered with whether the worker has left the network), "reset" or "step".

    Returns:
        What was answered; :class:`Broken` where the worker says so, and where the line is malformed.
    """
    readers: dict[str, Callable[[Mapping[str, Any]], Observation | Step | bool]]
    readers = {"start": _read_ready, "reset": _read_observation, "step": _read_step}
    try:
        return _read_broken(answer["broken"]) if "broken" in answer else readers[kind](answer)
    except (KeyError, TypeError, ValueError) as error:
        why = f"{error} is missing" if isinstance(error, KeyError) else error
        return Broken("error", f"a malformed answer to {kind!r}: {why}")


def _read_broken(broken: Any) -> Broken:
    reason, detail = broken
    if reason not in REASONS:
        raise ValueError(f"the reason {reason!r:.200} is none of {REASONS}")
    return Broken(reason, str(detail))


def _read_ready(answer: Mapping[str, Any]) -> bool:
    return bool(_typed(answer["ready"]["isolated"], bool, "isolated"))


def _read_observation(answer: Mapping[str, Any]) -> Observation:
    start = _typed(answer["observation"], dict, "the observation")
    info = _typed(start["info"], dict, "info")
    return Observation(_mappings(start["messages"], "messages"), _mappings(start["tools"], "tools"), info)


def _read_step(answer: Mapping[str, Any]) -> Step:
    fields = _typed(answer["step"], dict, "the step")
    for name in ("terminated", "truncated"):
        _typed(fields[name], bool, name)
    return Step(**{**fields, "messages": _mappings(fields["messages"], "messages")})


def _mappings(value: Any, name: str) -> tuple[Any, ...]:
    return tuple(_typed(each, dict, f"one of {name}") for each in _typed(value, list, name))


def _typed(value: Any, kind: type, name: str) -> Any:
    if not isinstance(value, kind):
        raise TypeError(f"{name} is {type(value).__name__}, not {kind.__name__}")
    return value
