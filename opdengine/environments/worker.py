"""Inside a worker process: one environment object, questions and answers as lines of JSON."""

from __future__ import annotations

import json
import traceback
from collections.abc import Mapping
from typing import Any

from opdengine.environments.protocol import Observation, Step
from opdengine.environments.registry import load_environment
from opdengine.workers.isolation import leave_network
from opdengine.workers.talk import answer_questions

Answer = dict[str, Any]


def serve(channel: int) -> None:
    """Answer until the owner hangs up.

    The first question is the configuration (``name``, ``options``, ``network``, ``max_observation_chars``); its
    answer is ``{"ready": {"isolated": bool}}``. Then come ``{"reset": [seed, task]}``, ``{"step": message}`` and
    ``{"close": null}``; an answer is ``{"observation": ...}``, ``{"step": ...}`` or
    ``{"broken": [reason, detail]}``.

    Args:
        channel: file descriptor of the socket to the owner.
    """
    environment: Any = None
    limit = 0

    def answer(question: Mapping[str, Any]) -> Answer | None:
        nonlocal environment, limit
        if environment is not None:
            return None if "close" in question else _answer(environment, question, limit)
        try:
            isolated = not question["network"] and leave_network()
            environment = load_environment(question["name"])(**question["options"])
            limit = question["max_observation_chars"]
        except (Exception, SystemExit) as error:
            return _broken("start", error)
        return {"ready": {"isolated": isolated}}

    answer_questions(channel, answer)
    if environment is not None:
        environment.close()


def _answer(environment: Any, request: Mapping[str, Any], limit: int) -> Answer:
    answer: Answer
    try:
        if "reset" in request:
            seed, task = request["reset"]
            answer = {"observation": _plain(environment.reset(seed=seed, task=task), Observation)}
        else:
            step = environment.step(request["step"])
            answer = {"step": _plain(step, Step)}
        length = sum(len(json.dumps(m, ensure_ascii=False)) for m in next(iter(answer.values()))["messages"])
    except Exception as error:
        return _broken("error", error)
    if length > limit:
        return {"broken": ["observation_too_long", f"{length} characters; the limit is {limit}"]}
    return answer


def _plain(value: Any, kind: type) -> dict[str, Any]:
    """The dataclass as JSON data, numpy scalars included.

    Raises:
        TypeError: it is no ``kind``, or something in it cannot be said in JSON.
    """
    if not isinstance(value, kind):
        raise TypeError(f"the environment answered with {type(value).__name__}, not {kind.__name__}")
    return json.loads(json.dumps(vars(value), default=_scalar))  # type: ignore[no-any-return]


def _scalar(value: Any) -> Any:
    if isinstance(value, Mapping):
        return dict(value)
    if hasattr(value, "item"):
        return value.item()
    raise TypeError(f"{type(value).__name__} in an answer of the environment; use plain data")


def _broken(reason: str, error: BaseException) -> Answer:
    trace = "".join(traceback.format_exception(error))[-4000:]
    return {"broken": [reason, f"{type(error).__name__}: {error}\n{trace}"]}
