"""Generated tasks of reasoning-gym and their verifier (``pip install "opdengine[reasoning-gym]"``).

Data: ``reasoning_gym:NAMES?size=1000&seed=0&split=train``, with options of the data sets after that. Every question
belongs to one split by a hash of its text, so that no seed or size makes training and evaluation share one.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from urllib.parse import parse_qsl

from opdengine.data import GENERATED
from opdengine.sandbox.plain import decode, encode
from opdengine.thoughts import answer_part
from opdengine.types import Message
from opdengine.verifiers.score import NO_ANSWER, Score, VerifierSettings, as_score

THRESHOLD = 0.99
"""Scores from here on count as right. Many scorers give up to 0.5 or more for an answer that merely contains the
right one or comes near it; such credit can be collected without solving anything."""
SPLITS = ("train", "eval")
EVAL_SHARE = 5
"""One question in so many belongs to the evaluation split."""
ROUNDS = 40

DENIED = {
    "game_of_life_halting": 'it takes every non-empty answer for "True" and so for right half of the time or more',
    "coin_flip": 'it accepts the beginning of the right number, so that "0" is always right',
    "time_intervals": "it gives credit for times and dates that are merely near",
    "complex_arithmetic": 'it accepts "nan"',
    "composite": "name its members instead",
}
"""Data sets that are refused, because their scorers reward answers that are wrong."""

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


def generate(path: str) -> Iterator[dict[str, Any]]:
    """Rows of data.

    Args:
        path: ``reasoning_gym:NAMES?OPTIONS``; names are separated by commas; options are ``size`` (rows of each
            data set, default 1000), ``seed`` (default 0), ``split`` ("train" or "eval", default "train") and those
            of the data sets.

    Raises:
        ValueError: reasoning-gym is missing; a name, an option or a value is impossible; or there are not as many
            different questions.
    """
    library = _library()
    names, _, query = path.removeprefix(GENERATED).partition("?")
    options = {key: _value(text) for key, text in parse_qsl(query, strict_parsing=bool(query))}
    size, seed, split = options.pop("size", 1000), options.pop("seed", 0), options.pop("split", SPLITS[0])
    for option, value, least in (("size", size, 1), ("seed", seed, 0)):
        if type(value) is not int or value < least:
            raise ValueError(f"{option}={value!r} is not possible; it is a whole number from {least} on")
    if split not in SPLITS:
        raise ValueError(f"split={split!r} is not possible; choose one of {list(SPLITS)}")
    for name in filter(None, names.split(",")):
        _check_name(library, name)
        yield from _generate(library, name, size, seed, split, options)


def _generate(
    library: Any, name: str, size: int, seed: int, split: str, options: dict[str, Any]
) -> Iterator[dict[str, Any]]:
    seen: set[str] = set()
    for round_ in range(ROUNDS):
        try:
            tasks = library.create_dataset(name, size=size, seed=seed + round_ * size, **options)
        except (TypeError, AssertionError, ValueError) as error:
            raise ValueError(f"reasoning_gym {name!r} with {options} and size={size}: {error}") from error
        for index in range(size):
            task = tasks[index]
            question = task["question"]
            if split_of(question) != split or question in seen:
                continue
            seen.add(question)
            entry = encode(dict(task))
            yield {"prompt": question, "answer": {"dataset": name, "entry": entry}, "data_source": "reasoning_gym"}
            if len(seen) == size:
                return
    raise ValueError(
        f"reasoning_gym {name!r} has only {len(seen)} different questions in split={split!r} among "
        f"{ROUNDS * size}; lower size={size} or widen its options"
    )


def split_of(question: str) -> str:
    """The split that a question belongs to."""
    number = int.from_bytes(hashlib.sha256(question.encode()).digest()[:8], "big")
    return SPLITS[number % EVAL_SHARE == 0]


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
        self._library = _library()
        self._scorers: dict[str, Callable[[str, Any], float]] = {}

    def __call__(self, text: str, answer: Any, messages: Sequence[Message]) -> Score:
        """Grade one completion; a scorer that an answer makes fail has not been convinced by it."""
        if answer_part(text) is None:
            return as_score(NO_ANSWER)
        name = answer["dataset"]
        if name not in self._scorers:
            _check_name(self._library, name)
            self._scorers[name] = self._library.get_score_answer_fn(name)
        found = extract_answer(text)
        if name in EVALUATED and not EVALUATED[name].fullmatch(found):
            return Score(0.0, detail="the answer is no plain expression")
        try:
            value = float(self._scorers[name](found, decode(answer["entry"])))
        except Exception as error:
            return Score(0.0, detail=f"the scorer raised {type(error).__name__}: {error}")
        return Score(float(THRESHOLD <= value <= 1), detail=f"scored {value:.3f}")


def allowed() -> list[str]:
    """Names of all data sets that may be used."""
    from reasoning_gym.factory import DATASETS

    return sorted(set(DATASETS) - set(DENIED))


def _library() -> Any:
    try:
        import reasoning_gym
    except ImportError as error:
        raise ValueError('reasoning_gym tasks need a package: pip install "opdengine[reasoning-gym]"') from error
    return reasoning_gym


def _check_name(library: Any, name: str) -> None:
    if name in DENIED:
        raise ValueError(f"reasoning_gym {name!r} cannot be used to judge answers: {DENIED[name]}")
    if name not in library.factory.DATASETS:
        raise ValueError(f"reasoning_gym has no data set {name!r}; it has {', '.join(allowed())}")


def _value(text: str) -> Any:
    """An option's value: JSON where it is that, else text."""
    try:
        return json.loads(text)
    except ValueError:
        return text
