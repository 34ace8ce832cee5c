"""What a verifier says about one completion, and how long and where it may work."""

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
    """How verifiers run.

    Args:
        timeout: seconds that one completion may take.
        workers: processes that grade at the same time.
        allow_unsandboxed: run programs of the model even where the system offers no isolation.
    """

    timeout: float = 30.0
    workers: int = 4
    allow_unsandboxed: bool = False


def as_score(result: Any) -> Score:
    """What a verifier returned, checked: a number in [0, 1] or a :class:`Score`."""
    if isinstance(result, Score):
        return result
    try:
        value = float(result)
    except (TypeError, ValueError):
        return Score(0.0, "error", f"the verifier returned {result!r:.200}, not a number")
    if not (math.isfinite(value) and 0 <= value <= 1):
        return Score(0.0, "error", f"the verifier returned {value}, which is not in [0, 1]")
    return Score(value)
