"""Verifiers: a completion's text and the reference answer become a score in [0, 1]."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

from opdengine.models.thoughts import answer_part
from opdengine.plugins import PluginError, import_object, load_object
from opdengine.types import Message
from opdengine.verifiers.multiple_choice import choice
from opdengine.verifiers.number import numeric
from opdengine.verifiers.score import NO_ANSWER, Score, VerifierSettings

Verifier = Callable[[str, Any, Sequence[Message]], float | Score]
"""``verify(text, answer, messages) -> score in [0, 1]``; called with the prompt's messages."""


def exact_match(text: str, answer: Any, messages: Sequence[Message]) -> float:
    """1 when the stripped text behind the thoughts equals the answer (or one of a list of answers).

    Raises:
        ValueError: the reference answer is empty, so that saying nothing would be right.
    """
    part = answer_part(text)
    if part is None:
        return NO_ANSWER
    answers = {form for a in (answer if isinstance(answer, (list, tuple)) else [answer]) for form in _written(a)}
    if not answers or "" in answers:
        raise ValueError(f"the reference answer {answer!r:.200} is empty")
    return float(part.strip() in answers)


def _written(answer: Any) -> set[str]:
    """An answer as text. 4.0 is also 4: a column of whole numbers of which one is missing is read as floats."""
    whole = {str(int(answer))} if isinstance(answer, float) and answer.is_integer() else set()
    return {str(answer).strip(), *whole}


VERIFIERS: dict[str, Verifier] = {"exact_match": exact_match, "numeric": numeric, "choice": choice}
"""Cheap ones, called where they are needed."""

FACTORIES = {
    "math": "opdengine.verifiers.math_answer:MathVerifier",
    "reasoning_gym": "opdengine.verifiers.reasoning_tasks:ReasoningGymVerifier",
    "code": "opdengine.verifiers.program:CodeVerifier",
    "evalplus": "opdengine.verifiers.evalplus:EvalPlusVerifier",
    "bfcl": "opdengine.verifiers.bfcl:BFCLVerifier",
}
"""Verifiers with requirements or limits, made with the :class:`VerifierSettings`."""


def load_verifier(spec: str, settings: VerifierSettings | None = None) -> Verifier:
    """A verifier by name, as ``package.module:function`` or as ``path/to/file.py:function``.

    Args:
        spec: the name.
        settings: for built-in verifiers that have limits.

    Raises:
        ValueError: nothing is found there that can be called with text, answer and messages.
    """
    if spec in VERIFIERS:
        return VERIFIERS[spec]
    if spec in FACTORIES:
        return import_object(FACTORIES[spec])(settings or VerifierSettings())  # type: ignore[no-any-return]
    if ":" not in spec:
        raise ValueError(
            f"unknown verifier {spec!r}; use one of {sorted([*VERIFIERS, *FACTORIES])}, 'module:function' or "
            "'path/to/file.py:function'"
        )
    try:
        verifier = load_object(spec)
    except PluginError as error:
        raise ValueError(f"verifier {spec!r} cannot be loaded: {error}") from error
    if not callable(verifier):
        raise ValueError(f"verifier {spec!r} is not callable")
    if not _takes_three(verifier):
        raise ValueError(f"verifier {spec!r} must take three arguments: text, answer, messages")
    return verifier  # type: ignore[no-any-return]


def _takes_three(function: Callable[..., Any]) -> bool:
    try:
        inspect.signature(function).bind("", None, ())
    except TypeError:
        return False
    except ValueError:
        return True  # Written in C without a signature: its first call shows it, whose failure is counted and logged.
    return True
