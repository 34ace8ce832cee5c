"""The score of one completion, and how long and where a verifier may work."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

FAILURES = ("timeout", "crash", "error", "sandbox")
"""Why a verifier failed: it took too long, its process ended, it raised, or the sandbox could not be set up."""


@dataclass(frozen=True)
class Score:
    """The grade of one completion.

    Args:
        value: in [0, 1].
        failure: empty, or one of :data:`FAILURES` when the *verifier* failed and says nothing about the
            completion. The value is 0 then.
        detail: for people: why it failed or what was wrong with the completion.
    """

    value: float
    failure: str = ""
    detail: str = ""


@dataclass(frozen=True)
class VerifierSettings:
    """The settings by which verifiers run.

    Args:
        timeout: seconds that one completion may take.
        workers: processes that grade at the same time.
        allow_unsandboxed: run programs of the model even where the system offers no isolation.
    """

    timeout: float = 30.0
    workers: int = 4
    allow_unsandboxed: bool = False


class Reasoned(float):
    """A score as a plain number that also says why.

    Args:
        value: in [0, 1].
        detail: for people.
    """

    detail: str

    def __new__(cls, value: float, detail: str = "") -> Reasoned:
        """The number with its reason."""
        made = super().__new__(cls, value)
        made.detail = detail
        return made


NO_ANSWER = Reasoned(0.0, "the thought has no end, so there is no answer")
"""The grade of a completion that was cut off, or ended, while it was thinking."""


def as_score(result: Any, source: str = "the verifier") -> Score:
    """Check what a verifier returned: a number in [0, 1] or a :class:`Score` of one.

    True and False, and numbers and arrays of one element of numpy and torch, are numbers; text is not.

    Args:
        result: what was returned.
        source: who returned it, for the message of a refusal.
    """
    score = result if isinstance(result, Score) else Score(result, detail=getattr(result, "detail", ""))
    try:
        if isinstance(score.value, (str, bytes, bytearray)):
            raise TypeError("text is no number")
        value = float(score.value.item() if hasattr(score.value, "item") else score.value)
    except (TypeError, ValueError, OverflowError, RuntimeError):
        return Score(0.0, "error", f"{source} returned {score.value!r:.200}, not a number")
    if not (math.isfinite(value) and 0 <= value <= 1):
        return Score(0.0, "error", f"{source} returned {value}, which is not in [0, 1]")
    if score.failure not in ("", *FAILURES):
        return Score(0.0, "error", f"{source} failed with {score.failure!r:.200}, which is none of {FAILURES}")
    return Score(0.0 if score.failure else value, score.failure, str(score.detail))
