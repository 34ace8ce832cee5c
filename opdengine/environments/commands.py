"""Environments of text commands share this base: ReAct messages in, observations and command lists out."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from opdengine.environments.actions import FORMATS
from opdengine.environments.protocol import InfrastructureError, Observation, Step, Task
from opdengine.types import Message

LONGEST_COMMAND = 300
"""Characters; no engine knows a longer command, and a parser need not read a book."""

ANSWERS = {
    "react": "Write two lines and nothing else:\nThought: a short thought\nAction: one command",
    "action": "Write one command and nothing else.",
}
COMPLAINTS = {
    "empty": "Your message is empty.",
    "unparseable": "Your message holds no command.",
    "invalid_action": f"A command has at most {LONGEST_COMMAND} characters.",
}


@dataclass(frozen=True)
class CommandOptions:
    """Options of every environment of text commands.

    Args:
        format: "react" (lines ``Thought:`` and ``Action:``) or "action" (the message is the command).
        instructions: begin with a system message that explains the world and the format.
        admissible: each observation lists at most this many of the commands that work now, then "(+N more)";
            0 lists none. ``info["admissible"]`` always holds all of them.
        max_turns: turns after which an episode is cut off; 0 leaves that to the caller.
        count: tasks of a split; 0 takes the environment's own number.
        task_seed: another seed draws other tasks.
    """

    format: str = "react"
    instructions: bool = True
    admissible: int = 30
    max_turns: int = 0
    count: int = 0
    task_seed: int = 0

    def __post_init__(self) -> None:
        need(self.format in ANSWERS, "format", self.format, f"one of {sorted(ANSWERS)}")
        for name in ("admissible", "max_turns", "count"):
            need(getattr(self, name) >= 0, name, getattr(self, name), "0 or positive")


def need(holds: bool, option: str, value: Any, remedy: str) -> None:
    """
    Raises:
        ValueError: unless it holds; names the option, its value and the remedy.
    """
    if not holds:
        raise ValueError(f"{option}={value!r} is not possible; use {remedy}")


def optional(module: str, extra: str) -> Any:
    """Import a module of an optional package.

    Raises:
        ImportError: it is not installed; names the pip command.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(
            f'this environment needs {module.partition(".")[0]!r} ({error}): pip install "opdengine[{extra}]"'
        ) from error


@dataclass(frozen=True)
class View:
    """The text and state that an engine shows after a reset and after each command.

    Args:
        observation: its text.
        admissible: the commands that work now, the most telling ones first.
        score: reached so far, in [0, 1].
        ended: the task's own end was reached.
        success: it was reached in success.
        refused: the engine did not execute the command.
        info: of this engine alone.
    """

    observation: str
    admissible: Sequence[str] = ()
    score: float = 0.0
    ended: bool = False
    success: bool = False
    refused: bool = False
    info: Mapping[str, Any] | None = None


class CommandEnvironment:
    """The chat around an engine that executes one line of text per turn.

    A subclass sets ``options``, ``name`` and ``rules``, and has ``_begin``, ``_execute`` and ``_gold``.
    """

    name: str
    rules: str
    """Return what the system message says about the world and its commands."""
    demonstration: str = ""
    """An example that the system message ends with."""
    options: CommandOptions
    _view: View | None = None

    def _begin(self, task: Task) -> tuple[str, View]:
        """Set up a task; its goal in words and the first view."""
        raise NotImplementedError

    def _execute(self, command: str) -> View:
        raise NotImplementedError

    def _gold(self) -> str:
        """The next command on a way to success."""
        raise NotImplementedError

    def reset(self, *, seed: int, task: Task) -> Observation:
        """Begin; the task says everything, so the seed changes nothing.

        Raises:
            InfrastructureError: the game cannot be set up.
        """
        self._view = None
        try:
            goal, view = self._begin(task)
        except (InfrastructureError, ImportError):
            raise
        except (Exception, SystemExit) as error:  # the PDDL translator exits where others raise
            raise InfrastructureError(f"{self.name}: task {task.get('id')!r} cannot be set up: {error!r}") from error
        self._view, self._turns = view, 0
        messages: list[Message] = []
        if self.options.instructions:
            parts = (self.rules, ANSWERS[self.options.format], self.demonstration)
            messages.append({"role": "system", "content": "\n\n".join(filter(None, parts))})
        text = f"{view.observation}\n\nYour task: {goal}"
        messages.append({"role": "user", "content": text + self._listed(view)})
        info = {
            "goal": goal,
            "type": task.get("type", ""),
            "observation": view.observation,
            "admissible": list(view.admissible),
        }
        return Observation(tuple(messages), (), info)

    def step(self, message: Message) -> Step:
        """Execute the message's command; a message without one costs a turn and changes nothing.

        The reward is what the score rises by.

        Raises:
            RuntimeError: there is no episode, or it is over.
        """
        before = self._view
        if before is None or before.ended:
            raise RuntimeError(f"{self.name}: no episode is running; call reset first")
        action = FORMATS[self.options.format](message)
        command, failure = " ".join(action.name.split()), action.failure
        if len(command) > LONGEST_COMMAND:
            failure = "invalid_action"
        if failure:
            complaint = f"{COMPLAINTS[failure]} {ANSWERS[self.options.format]}"
            view = replace(before, observation=complaint, refused=True)
        else:
            view = self._execute(command)
            failure = "execution" if view.refused else ""
        self._turns += 1
        truncated = not view.ended and 0 < self.options.max_turns <= self._turns
        self._view = replace(view, ended=view.ended or truncated)
        info: dict[str, Any] = {
            "action": "" if failure else command,
            "failure": failure,
            "observation": view.observation,
            "admissible": [] if view.ended else list(view.admissible),
            "score": view.score,
            **(view.info or {}),
        }
        if view.ended or truncated:
            info["success"] = view.success
        listed = "" if self._view.ended else self._listed(view)
        answer: Message = {"role": "user", "content": f"Observation: {view.observation}{listed}"}
        return Step((answer,), view.score - before.score, view.ended, truncated, info)

    def expert(self) -> Message:
        """The next message on a way to success from the present state.

        Raises:
            InfrastructureError: there is no way any more, or none is known.
        """
        command = self._gold()
        thought = f"Thought: The next step is to {command}.\nAction: " if self.options.format == "react" else ""
        return {"role": "assistant", "content": f"{thought}{command}"}

    def close(self) -> None:
        """There is nothing to give back."""

    def _listed(self, view: View) -> str:
        if not self.options.admissible or not view.admissible:
            return ""
        shown = view.admissible[: self.options.admissible]
        more = len(view.admissible) - len(shown)
        return "\nCommands that work now: " + ", ".join(shown) + (f" (+{more} more)" if more else "")
