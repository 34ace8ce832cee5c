"""TRL's environments and ours, each played as the other.

TRL's ``environment_factory`` makes objects with ``reset(**row) -> str | None``, tools as typed and documented
methods and ``get_reward() -> float | None``. :func:`environment_factory` is one for an environment of ours;
:class:`TRLEnvironment` plays theirs here.
"""

from __future__ import annotations

import asyncio
import inspect
import json
import random
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import GenericAlias
from typing import Any

import numpy as np

from opdengine.environments.actions import visible_text, with_tool_calls
from opdengine.environments.pool import EnvironmentPool
from opdengine.environments.protocol import Broken, InfrastructureError, Observation, Step, Task, check_number
from opdengine.environments.registry import POOL_OPTIONS, load_environment
from opdengine.environments.rows import checked_rows, file_of
from opdengine.models.chat import text_of
from opdengine.plugins import load_object
from opdengine.types import Message

TYPES = {"string": str, "integer": int, "number": float, "boolean": bool, "array": list, "object": dict}
ACT = {
    "name": "act",
    "description": "Execute one action in the environment.",
    "parameters": {
        "type": "object",
        "properties": {"action": {"type": "string", "description": "The action."}},
        "required": ["action"],
    },
}
"""The one tool of an environment that takes text; its content is the whole message."""


def environment_factory(
    name: str,
    options: Mapping[str, Any] | None = None,
    *,
    split: str = "train",
    step_timeout: float = 60.0,
    reset_timeout: float = 120.0,
) -> Callable[[], Any]:
    """For ``GRPOTrainer(environment_factory=...)``, with the rows of :func:`dataset_rows`.

    Each object that it makes plays in a worker process of its own. Its tools are those that the environment offers
    at the start of the split's first task; an environment of text actions gets one tool, ``act(action)``
    (choose its format in which the message is the action). The reward is the final score, 0 for an episode that
    did not come to its end, and None, which TRL keeps out of the update, where the environment broke.

    Args:
        name: as in :func:`opdengine.environments.load_environment`.
        options: of the environment.
        split: where its tools are looked up.
        step_timeout, reset_timeout: seconds.

    Raises:
        InfrastructureError: the environment does not start.
        ValueError: a tool's schema cannot be said as a Python method.
    """

    def open_pool() -> EnvironmentPool:
        return EnvironmentPool(name, options, 1, step_timeout=step_timeout, reset_timeout=reset_timeout)

    kind = load_environment(name)
    with open_pool() as pool:
        start = pool.reset({0: (0, kind.tasks(split, **_own(options))[0])})[0]
    if isinstance(start, Broken):
        raise InfrastructureError(f"environment {name!r} broke at its first task ({start.reason}): {start.detail}")
    schemas = [tool.get("function", tool) for tool in start.tools] or [ACT]
    methods = {schema["name"]: _method(schema, native=bool(start.tools)) for schema in schemas}
    made = type(kind.__name__, (_Player,), {"__doc__": kind.__doc__, **methods})
    return lambda: made(open_pool)


def dataset_rows(name: str, split: str, options: Mapping[str, Any] | None = None) -> list[dict[str, Any]]:
    """The tasks of a split as rows of a data set for TRL.

    Returns:
        Rows with an empty ``prompt`` that the reset completes, ``task`` (JSON text) and ``seed``.
    """
    prompt = [{"role": "user", "content": ""}]
    tasks = load_environment(name).tasks(split, **_own(options))
    return [{"prompt": prompt, "task": json.dumps(task), "seed": number} for number, task in enumerate(tasks)]


def _own(options: Mapping[str, Any] | None) -> dict[str, Any]:
    return {k: v for k, v in (options or {}).items() if k not in POOL_OPTIONS}


class _Player:
    """One of our environments behind TRL's interface; subclasses add its tools."""

    def __init__(self, open_pool: Callable[[], EnvironmentPool]) -> None:
        self._open = open_pool
        self._pool: EnvironmentPool | None = None
        self._over = True
        self._reward: float | None = 0.0

    def reset(self, *, task: str | Mapping[str, Any], seed: int = 0, **row: Any) -> str:
        """Begin an episode.

        Returns:
            The text of the environment's first messages.
        """
        if self._pool is None:
            self._pool = self._open()
            weakref.finalize(self, self._pool.close)
        start = self._pool.reset({0: (int(seed), json.loads(task) if isinstance(task, str) else task)})[0]
        self._over, self._reward = isinstance(start, Broken), None if isinstance(start, Broken) else 0.0
        if isinstance(start, Broken):
            return f"The environment failed ({start.reason})."
        if any(message["role"] not in ("system", "user") for message in start.messages):
            raise ValueError("this episode begins with earlier turns, which TRL's reset cannot return")
        return "\n\n".join(str(message["content"]) for message in start.messages)

    def get_reward(self) -> float | None:
        """The score of the episode; None where the environment broke."""
        return self._reward

    def _play(self, message: Message) -> str:
        if self._over or self._pool is None:
            raise ValueError("The episode is over.")
        step = self._pool.step({0: message})[0]
        if isinstance(step, Broken):
            self._over, self._reward = True, None
            raise RuntimeError(f"The environment failed ({step.reason}).")
        if step.done:
            self._over, self._reward = True, float(step.info.get("score", bool(step.info.get("success"))))
        return "\n".join(str(answer["content"]) for answer in step.messages) or "The episode is over."


def _method(schema: Mapping[str, Any], *, native: bool) -> Callable[..., str]:
    """A method whose signature and docstring say what the schema says."""
    name, parameters = schema["name"], schema.get("parameters") or {}
    properties, required = parameters.get("properties") or {}, parameters.get("required") or ()

    def tool(self: _Player, **arguments: Any) -> str:
        if not native:
            return self._play({"role": "assistant", "content": arguments.get("action", "")})
        call = {"type": "function", "function": {"name": name, "arguments": arguments}}
        return self._play({"role": "assistant", "content": "", "tool_calls": [call]})

    kind: Any
    annotations: dict[str, Any] = {}
    described, signature = [], [inspect.Parameter("self", inspect.Parameter.POSITIONAL_OR_KEYWORD)]
    try:
        for argument in sorted(properties, key=lambda a: a not in required):
            about = properties[argument]
            kind = TYPES[about["type"]]
            if kind is list and about.get("items", {}).get("type") in TYPES:
                kind = GenericAlias(list, (TYPES[about["items"]["type"]],))
            default = inspect.Parameter.empty if argument in required else None
            annotations[argument] = kind if argument in required else kind | None
            choices = f" (choices: {json.dumps(about['enum'])})" if "enum" in about else ""
            described.append(f"    {argument}: {about.get('description') or argument}{choices}")
            signature.append(
                inspect.Parameter(argument, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=kind)
            )
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"tool {name!r} cannot be made a Python method: {type(error).__name__}: {error}") from error
    lines = [schema.get("description") or name, "", *(["Args:", *described, ""] if described else [])]
    tool.__name__ = tool.__qualname__ = name
    tool.__doc__ = "\n".join([*lines, "Returns:", "    What happens."])
    tool.__annotations__ = {**annotations, "return": str}
    tool.__signature__ = inspect.Signature(signature, return_annotation=str)  # type: ignore[attr-defined]
    return tool


@dataclass(frozen=True)
class Options:
    """Options of :class:`TRLEnvironment`.

    Args:
        environment: what makes TRL's environment without arguments, as "module:Class" or "file.py:Class".
        files: split -> file of rows, as TRL's data sets have them; each row is given to ``reset``.
        data_source: type of the rows without a ``data_source`` of their own.
        max_turns: turns after which an episode is ended and scored; 0 leaves the end to the caller, and what the
            caller cuts off has no score.
        success_reward: an episode is a success from this reward on.
        skip_bad_rows: leave malformed rows out (counted in the log) instead of refusing the file.
    """

    environment: str = ""
    files: Mapping[str, str] = field(default_factory=dict)
    data_source: str = "trl"
    max_turns: int = 0
    success_reward: float = 1.0
    skip_bad_rows: bool = False

    def __post_init__(self) -> None:
        if not self.environment:
            raise ValueError("trl: environment='' is not possible; it must be 'module:Class' or 'file.py:Class'")
        if self.max_turns < 0:
            raise ValueError(f"trl: max_turns={self.max_turns} is not possible; it must be 0 (no limit) or positive")


class TRLEnvironment:
    """An environment that was written for TRL; see :class:`Options`.

    As in TRL, the episode goes on while the student calls tools, several in one turn if it likes, and a tool that
    raises is answered with the error. ``random`` and ``numpy.random`` are seeded before each reset, since TRL's
    reset knows no seed. The score, which methods with rewards train on, is the reward limited to [0, 1]; the metric
    ``episodes/raw_score`` is the mean of what it was.
    """

    option_class = Options

    def __init__(self, **options: Any) -> None:
        from transformers.utils.chat_template_utils import get_json_schema

        self.options = Options(**options)
        self._environment = load_object(self.options.environment)()
        names = [n for n, _ in inspect.getmembers(type(self._environment), inspect.isfunction)]
        missing = sorted({"reset", "get_reward"} - set(names))
        if missing:
            raise ValueError(f"trl: {self.options.environment!r} has no method {' and no '.join(missing)}")
        public = [n for n in names if not n.startswith("_") and n not in ("reset", "get_reward")]
        self._tools = {n: getattr(self._environment, n) for n in public}
        self._schemas = tuple(get_json_schema(tool) for tool in self._tools.values())
        self._loop = asyncio.new_event_loop()

    @classmethod
    def tasks(cls, split: str, **options: Any) -> Sequence[Task]:
        """One task per row of the split's file.

        Raises:
            ValueError: the split has no file, or the file cannot be used.
        """
        chosen = Options(**options)
        path = file_of(split, chosen.files, "files")

        def task(number: str, row: Mapping[str, Any]) -> Task:
            _prompt(row)
            name = row.get("id") if row.get("id") is not None else f"{Path(path).stem}:{number}"
            return {"id": str(name), "type": str(row.get("data_source") or chosen.data_source), "row": dict(row)}

        return checked_rows(path, task, skip_bad_rows=chosen.skip_bad_rows)

    def reset(self, *, seed: int, task: Task) -> Observation:
        """Give the row to the environment; what it returns completes the last user message."""
        random.seed(seed)
        np.random.seed(seed % 2**32)
        self._turns = 0
        told = self._await(self._environment.reset(**task["row"]))
        messages = _prompt(task["row"])
        try:
            told = text_of(told)
        except ValueError as error:
            raise InfrastructureError(f"reset returned more than text: {error}") from error
        messages[-1] = {**messages[-1], "content": text_of(messages[-1].get("content")) + told}
        goal = messages[-1]["content"]
        return Observation(tuple(messages), self._schemas, {"goal": goal, "type": task["type"], "observation": goal})

    def step(self, message: Message) -> Step:
        """Call the message's tools in order; without any the episode is over."""
        message = with_tool_calls(message) if isinstance(message, Mapping) else {}
        calls = message.get("tool_calls")
        self._turns += 1
        if not calls or not isinstance(calls, (list, tuple)):
            text = visible_text(message)
            failure = (
                "" if text and "<tool_call>" not in text else "empty" if text == "" and not calls else "unparseable"
            )
            return self._end(Step((), terminated=True, info={"action": "", "failure": failure, "observation": ""}))
        results = [self._call(call) for call in calls]
        answers = tuple({"role": "tool", "name": name, "content": text} for name, text, _ in results)
        failure = next((failure for *_, failure in results if failure), "")
        info = {
            "action": "" if failure else json.dumps([call["function"] for call in calls], sort_keys=True, default=str),
            "failure": failure,
            "observation": "\n".join(text for _, text, _ in results),
        }
        step = Step(answers, truncated=0 < self.options.max_turns <= self._turns, info=info)
        return self._end(step) if step.done else step

    def close(self) -> None:
        """End the event loop of asynchronous tools."""
        self._loop.close()

    def _call(self, call: Any) -> tuple[str, str, str]:
        """Name, answer and failure of one call."""
        function = call.get("function") if isinstance(call, Mapping) else None
        name = str(function.get("name")) if isinstance(function, Mapping) else "unknown"
        try:
            if name not in self._tools:
                raise ValueError(f"Tool {name} not found.")
            arguments = function["arguments"]  # type: ignore[index]
            arguments = json.loads(arguments) if isinstance(arguments, str) else arguments
            return name, str(self._await(self._tools[name](**arguments))), ""
        except Exception as error:  # whatever a tool raises is its answer
            return name, str({"error": str(error)}), "tool_error"

    def _end(self, step: Step) -> Step:
        reward = self._await(self._environment.get_reward())
        try:
            check_number("get_reward()", reward)
        except ValueError as error:
            raise InfrastructureError(f"get_reward gave no number, {error}: this episode cannot be scored") from error
        reward = float(reward)
        score = min(max(reward, 0.0), 1.0)
        more = {"success": reward >= self.options.success_reward, "score": score, "raw_score": reward}
        return Step(step.messages, reward, step.terminated, step.truncated, {**step.info, **more})

    def _await(self, value: Any) -> Any:
        return self._loop.run_until_complete(value) if inspect.isawaitable(value) else value


def _prompt(row: Mapping[str, Any]) -> list[Message]:
    """The row's chat, which ends with a user message."""
    prompt = row.get("prompt", "")
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    if not isinstance(messages, (list, tuple)) or not messages or not all(isinstance(m, Mapping) for m in messages):
        raise ValueError("'prompt' is neither text nor a list of messages")
    if messages[-1].get("role") != "user":
        raise ValueError("'prompt' does not end with a user message")
    return [dict(message) for message in messages]
