"""The verifier of reasoning-gym's tasks, which :mod:`opdengine.data.reasoning_tasks` generates."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

from opdengine.data.reasoning_tasks import check_name, reasoning_gym_library
from opdengine.models.thoughts import answer_part
from opdengine.types import Message
from opdengine.verifiers.score import NO_ANSWER, Score, VerifierSettings, as_score
from opdengine.workers.plain import decode

THRESHOLD = 0.99
"""Scores from here on count as right. Many scorers give up to 0.5 or more for an answer that merely contains the
right one or comes near it; such credit can be collected without solving anything."""
_NAME = r"(?:[a-zA-Z]|sin|cos|tan|asin|acos|atan|sinh|cosh|tanh|exp|log|ln|sqrt|pi)"
_EXPRESSION = re.compile(rf"(?:\b{_NAME}\b|[\d+\-*/^().\s])+")
_ARITHMETIC = re.compile(r"(?:[\d+\-/().\s]|\*(?!\*))+")
_LISTS = re.compile(r"[\w\s,\-\[\]'\"]*")
EVALUATED = {
    "countdown": _ARITHMETIC,
    "puzzle24": _ARITHMETIC,
    "simple_integration": _EXPRESSION,
    "intermediate_integration": _EXPRESSION,
    "polynomial_multiplication": _EXPRESSION,
    "binary_matrix": _LISTS,
    "n_queens": _LISTS,
    "spiral_matrix": _LISTS,
    "string_insertion": _LISTS,
}
"""Data sets whose scorers evaluate the answer as Python: what else than this would be code of the model's."""


def extract_answer(text: str) -> str:
    """The answer in a completion: behind its thoughts, the last ``<answer>...</answer>``, else all of it."""
    text = answer_part(text) or ""
    before, end, _ = text.rpartition("</answer>")
    _, start, tagged = before.rpartition("<answer>")
    return (tagged if start and end else text).strip()


class ReasoningGymVerifier:
    """1 when the data set's own scorer gives at least :data:`THRESHOLD`, else 0.

    Args:
        settings: not used; every verifier is made with them.

    Raises:
        ValueError: reasoning-gym is not installed.
    """

    def __init__(self, settings: VerifierSettings) -> None:
        self._library = reasoning_gym_library()
        self._scorers: dict[str, Callable[[str, Any], float]] = {}

    def __call__(self, text: str, answer: Any, messages: Sequence[Message]) -> Score:
        """Grade one completion; a scorer that an answer makes fail has not been convinced by it."""
        if answer_part(text) is None:
            return as_score(NO_ANSWER)
        name = answer["dataset"]
        if name not in self._scorers:
            check_name(self._library, name)
            self._scorers[name] = self._library.get_score_answer_fn(name)
        found = extract_answer(text)
        if name in EVALUATED and not EVALUATED[name].fullmatch(found):
            return Score(0.0, detail="the answer is no plain expression")
        try:
            value = float(self._scorers[name](found, decode(answer["entry"])))
        except Exception as error:
            return Score(0.0, detail=f"the scorer raised {type(error).__name__}: {error}")
        return Score(float(THRESHOLD <= value <= 1), detail=f"scored {value:.3f}")
