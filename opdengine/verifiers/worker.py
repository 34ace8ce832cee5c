"""Inside a process that grades: questions and answers as lines of JSON (see :mod:`opdengine.verifiers.pool`)."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Any

from opdengine.verifiers import Verifier, load_verifier
from opdengine.verifiers.score import Score, VerifierSettings, as_score
from opdengine.workers.talk import answer_questions

DETAIL_CHARACTERS = 1000


def serve(channel: int) -> None:
    """Answer until the owner hangs up.

    Questions are ``{"settings": {...}}``, ``{"load": spec}`` and ``{"grade": [spec, text, answer, messages]}``;
    answers are ``{}`` or ``{"score": [value, failure, detail]}``. A verifier that cannot be loaded says so with
    every grade.

    Args:
        channel: file descriptor of the socket to the owner.
    """
    settings = VerifierSettings()
    verifiers: dict[str, Verifier] = {}

    def answer(question: Mapping[str, Any]) -> dict[str, Any]:
        nonlocal settings
        if "settings" in question:
            settings = VerifierSettings(**question["settings"])
        elif "load" in question:
            with contextlib.suppress(Exception, SystemExit):
                _load(question["load"], verifiers, settings)
        else:
            score = _grade(verifiers, settings, *question["grade"])
            return {"score": [score.value, score.failure, score.detail[:DETAIL_CHARACTERS]]}
        return {}

    answer_questions(channel, answer)


def _grade(
    verifiers: dict[str, Verifier], settings: VerifierSettings, spec: str, text: str, answer: Any, messages: Any
) -> Score:
    try:
        return as_score(_load(spec, verifiers, settings)(text, answer, messages), f"the verifier {spec!r}")
    except (Exception, SystemExit) as error:
        return Score(0.0, "error", f"{type(error).__name__}: {error}")


def _load(spec: str, verifiers: dict[str, Verifier], settings: VerifierSettings) -> Verifier:
    if spec not in verifiers:
        verifiers[spec] = load_verifier(spec, settings)
    return verifiers[spec]
