"""Inside a process that grades: questions and answers as lines of JSON (see :mod:`opdengine.verifiers.pool`)."""

from __future__ import annotations

import contextlib
import json
import os
import socket
from typing import Any

from opdengine.verifiers import Verifier, load_verifier
from opdengine.verifiers.score import Score, VerifierSettings, as_score

DETAIL_CHARACTERS = 1000


def serve(channel: int) -> None:
    """Answer until the owner hangs up.

    Questions are ``{"settings": {...}}``, ``{"load": spec}`` and ``{"grade": [spec, text, answer, messages]}``;
    answers are ``{}`` or ``{"score": [value, failure, detail]}``, with the ``number`` of the question. A verifier
    that cannot be loaded says so with every grade.

    Args:
        channel: file descriptor of the socket to the owner.
    """
    settings = VerifierSettings()
    verifiers: dict[str, Verifier] = {}
    with socket.socket(fileno=channel) as owner, owner.makefile("rb") as lines:
        for line in lines:
            request = json.loads(line)
            answer: dict[str, Any] = {}
            if "settings" in request:
                settings = VerifierSettings(**request["settings"])
            elif "load" in request:
                with contextlib.suppress(Exception, SystemExit):
                    _load(request["load"], verifiers, settings)
            else:
                _start_log_anew()
                score = _grade(verifiers, settings, *request["grade"])
                answer = {"score": [score.value, score.failure, score.detail[:DETAIL_CHARACTERS]]}
            owner.sendall(json.dumps({**answer, "number": request["number"]}).encode() + b"\n")


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


def _start_log_anew() -> None:
    """Standard output and error go to a file in the worker's folder; it holds the last question's only."""
    with contextlib.suppress(OSError):
        os.ftruncate(1, 0)
