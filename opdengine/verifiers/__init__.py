"""Verifiers: a completion's text and the reference answer become a score in [0, 1]."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Sequence
from typing import Any

from opdengine.plugins import load_object
from opdengine.types import Message
from opdengine.verifiers.score import Score, VerifierSettings

Verifier = Callable[[str, Any, Sequence[Message]], float | Score]
"""``verify(text, answer, messages) -> score in [0, 1]``; called with the prompt's messages."""


def exact_match(text: str, answer: Any, messages: Sequence[Message]) -> float:
    """1 when the stripped text equals the answer (or one of a list of answers)."""
    answers = answer if isinstance(answer, (list, tuple)) else [answer]
    return float(text.strip() in {str(a).strip() for a in answers})


def numeric(text: str, answer: Any, messages: Sequence[Message]) -> float:
    """1 when the last number in the text equals the answer to a relative 1e-6."""
    numbers = re.findall(r"[-+]?(?:\d[\d,]*\.?\d*|\.\d+)(?:[eE][-+]?\d+)?", text)
    if not numbers:
        return 0.0
    target = float(str(answer).replace(",", ""))
    return float(abs(float(numbers[-1].replace(",", "")) - target) <= 1e-6 * max(1.0, abs(target)))


def choice(text: str, answer: Any, messages: Sequence[Message]) -> float:
    r"""1 when the letter that the text chooses is the answer ("C").

    Looked for after the last ``</think>``: the last ``\boxed{C}``, else the last "answer is C" or "answer: (C)",
    else a text that is or begins with "C", "(C)", "C." and the like.
    """
    text = text.rpartition("</think>")[2].strip()
    for pattern in (
        r"\\boxed\{(?:\\text\w*\{)?\s*\(?([A-Z])\b",
        r"(?i:answer|choice|option)\W{0,5}(?:(?i:is|would be)\W{0,5})?([A-Z])(?![\w'])",
        r"^\W{0,3}([A-Z])(?:[.:)*]|$)",
    ):
        if found := re.findall(pattern, text):
            return float(found[-1] == str(answer).strip())
    return 0.0


VERIFIERS: dict[str, Verifier] = {"exact_match": exact_match, "numeric": numeric, "choice": choice}
"""Cheap ones, called where they are needed."""

FACTORIES = {
    "math": "opdengine.verifiers.math_answer:MathVerifier",
    "reasoning_gym": "opdengine.verifiers.reasoning_tasks:ReasoningGymVerifier",
    "code": "opdengine.verifiers.program:CodeVerifier",
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
        return load_object(FACTORIES[spec])(settings or VerifierSettings())  # type: ignore[no-any-return]
    if ":" not in spec:
        raise ValueError(
            f"unknown verifier {spec!r}; use one of {sorted([*VERIFIERS, *FACTORIES])}, 'module:function' or "
            "'path/to/file.py:function'"
        )
    try:
        verifier = load_object(spec)
    except (ImportError, AttributeError, OSError, SyntaxError) as error:
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
    except ValueError:  # written in C without a signature
        pass
    return True
