"""Generated tasks of reasoning-gym (``pip install "opdengine[reasoning-gym]"``).

``reasoning_gym:NAMES?size=1000&seed=0&split=train``, with options of the data sets after that. Every question
belongs to one split by a hash of its text, so that no seed or size makes training and evaluation share one.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from typing import Any
from urllib.parse import parse_qsl

from opdengine.workers.plain import encode

GENERATED = "reasoning_gym:"
"""The paths of generated tasks begin with this."""

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
    library = reasoning_gym_library()
    names, _, query = path.removeprefix(GENERATED).partition("?")
    options = {key: _value(text) for key, text in parse_qsl(query, strict_parsing=bool(query))}
    size, seed, split = options.pop("size", 1000), options.pop("seed", 0), options.pop("split", SPLITS[0])
    for option, value, least in (("size", size, 1), ("seed", seed, 0)):
        if type(value) is not int or value < least:
            raise ValueError(f"{option}={value!r} is not possible; it is a whole number from {least} on")
    if split not in SPLITS:
        raise ValueError(f"split={split!r} is not possible; choose one of {list(SPLITS)}")
    for name in filter(None, names.split(",")):
        check_name(library, name)
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


def allowed() -> list[str]:
    """Names of all data sets that may be used."""
    from reasoning_gym.factory import DATASETS

    return sorted(set(DATASETS) - set(DENIED))


def reasoning_gym_library() -> Any:
    """The package; ValueError says how to install it."""
    try:
        import reasoning_gym
    except ImportError as error:
        raise ValueError('reasoning_gym tasks need a package: pip install "opdengine[reasoning-gym]"') from error
    return reasoning_gym


def check_name(library: Any, name: str) -> None:
    """Raise ValueError for a data set that does not exist or whose scorer rewards wrong answers."""
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
