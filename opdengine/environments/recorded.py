"""Recorded conversations, with tool calls or without, as training states and as an environment.

"teacher_forced": every assistant turn is a state of its own whose history is the record's (OPAD as MAD-OPD,
arXiv 2605.01347, released it); one turn is sampled. The same states as a file of prompts, for ``train_data``::

    python -m opdengine.environments.recorded RECORDS.json PROMPTS.jsonl

"replay": the student's own turns stay in the history, and each is answered with what the record has at that
place, whatever the student said. All messages pass through the chat template, so tool outputs carry its markup.

Rows are in ToolACE's layout (``system``, ``conversations`` of ``from`` and ``value``) or in OpenAI's
(``messages``, ``tools``).
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from opdengine.data.files import parse_json
from opdengine.data.rows import parse_tools
from opdengine.environments.actions import visible_text, with_tool_calls
from opdengine.environments.protocol import Observation, Step, Task
from opdengine.environments.rows import checked_rows, file_of
from opdengine.models.chat import plain_message
from opdengine.types import Message

ROLES = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
}
MODES = ("replay", "teacher_forced")


@dataclass(frozen=True)
class Options:
    """The options.

    Args:
        files: split -> file of records.
        mode: "replay" or "teacher_forced".
        data_source: type of records without a ``data_source`` of their own.
        skip_bad_rows: leave malformed records out (counted in the log) instead of refusing the file.
    """

    files: Mapping[str, str] = field(default_factory=dict)
    mode: str = "replay"
    data_source: str = "recorded"
    skip_bad_rows: bool = False

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise ValueError(f"recorded: mode={self.mode!r} is not possible; it must be one of {MODES}")


@dataclass(frozen=True)
class Record:
    """One conversation.

    Args:
        id: unique within its file.
        type: the routing key.
        messages: all of it; no assistant turn begins it or follows another.
        tools: schemas.
    """

    id: str
    type: str
    messages: tuple[Message, ...]
    tools: tuple[Mapping[str, Any], ...] = ()

    @property
    def turns(self) -> list[int]:
        """Return the places of the assistant's turns in the messages."""
        return [i for i, message in enumerate(self.messages) if message["role"] == "assistant"]


class Recorded:
    """The environment; see the module and :class:`Options`.

    The record decides the end. Nothing is known of a turn's worth but whether it equals the record's: the score is
    the share of turns that do (the same calls, or the same text up to white space), success means all of them.
    """

    option_class = Options

    def __init__(self, **options: Any) -> None:
        self.options = Options(**options)

    @classmethod
    def tasks(cls, split: str, **options: Any) -> Sequence[Task]:
        """One task per record, or per assistant turn in mode "teacher_forced".

        Raises:
            ValueError: the split has no file, or the file cannot be used.
        """
        chosen = Options(**options)
        path = file_of(split, chosen.files, "files")
        tasks = []
        for record in load_records(path, data_source=chosen.data_source, skip_bad_rows=chosen.skip_bad_rows):
            turns = record.turns
            forced = chosen.mode == "teacher_forced"
            spans = [(i, i + 1) for i in turns] if forced else [(turns[0], turns[-1] + 1)]
            tasks += [
                {
                    "id": f"{record.id}/{number}" if forced else record.id,
                    "type": record.type,
                    "start": list(record.messages[:begin]),
                    "rest": list(record.messages[begin:end]),
                    "tools": list(record.tools),
                }
                for number, (begin, end) in enumerate(spans)
            ]
        return tasks

    def reset(self, *, seed: int, task: Task) -> Observation:
        """Begin before the assistant's first turn; the seed changes nothing."""
        self._rest: list[Message] = list(task["rest"])
        self._equal: list[bool] = []
        last = task["start"][-1]
        goal = next(m for m in reversed(task["start"]) if m["role"] != "system")["content"]
        info = {"goal": goal, "type": task["type"], "observation": last["content"]}
        return Observation(tuple(task["start"]), tuple(task["tools"]), info)

    def step(self, message: Message) -> Step:
        """Answer with the record's messages up to the next assistant turn."""
        expected, *rest = self._rest
        following = next((i for i, m in enumerate(rest) if m["role"] == "assistant"), len(rest))
        answers, self._rest = rest[:following], rest[following:]
        said, failure = _said(message)
        self._equal.append(not failure and said == _said(expected)[0])
        info: dict[str, Any] = {
            "action": "" if failure else said,
            "failure": failure,
            "observation": "\n".join(str(m["content"]) for m in answers),
            "equal": self._equal[-1],
        }
        if not self._rest:
            info |= {"success": all(self._equal), "score": sum(self._equal) / len(self._equal)}
        return Step(tuple(answers), float(self._equal[-1]), terminated=not self._rest, info=info)

    def close(self) -> None:
        """There is nothing to give back."""

    def expert(self) -> Message:
        """The record's turn."""
        return self._rest[0]


def load_records(path: str, *, data_source: str = "recorded", skip_bad_rows: bool = False) -> list[Record]:
    """The conversations of a file.

    Raises:
        DataError: the file cannot be used; names the rows.
    """
    stem = Path(path).stem
    return checked_rows(path, lambda n, row: _record(row, f"{stem}:{n}", data_source), skip_bad_rows=skip_bad_rows)


def prompt_rows(path: str, *, data_source: str = "recorded", skip_bad_rows: bool = False) -> list[dict[str, Any]]:
    """Every assistant turn of a file as a row of ``train_data``.

    Returns:
        Rows with ``id``, ``messages`` (the recorded history), ``tools`` and ``data_source``, and beside them
        ``conversation``, ``turn``, ``turns`` and ``reference`` (the recorded turn).
    """
    return [
        {
            "id": f"{record.id}/{number}",
            "messages": list(record.messages[:position]),
            "tools": list(record.tools),
            "data_source": record.type,
            "conversation": record.id,
            "turn": number,
            "turns": len(record.turns),
            "reference": record.messages[position],
        }
        for record in load_records(path, data_source=data_source, skip_bad_rows=skip_bad_rows)
        for number, position in enumerate(record.turns)
    ]


def _record(row: Mapping[str, Any], default_id: str, data_source: str) -> Record:
    turns = row.get("messages") if row.get("messages") is not None else row.get("conversations")
    turns = parse_json(turns) if isinstance(turns, str) and turns.strip() else turns  # columns of one type hold text
    if not isinstance(turns, (list, tuple)):
        raise ValueError("neither 'messages' nor 'conversations' is a list")
    messages = [_message(turn) for turn in turns]
    if isinstance(row.get("system"), str) and row["system"].strip():
        messages.insert(0, {"role": "system", "content": row["system"]})
    roles = [message["role"] for message in messages]
    if "assistant" not in roles:
        raise ValueError("no assistant turn")
    for before, role in zip(["nothing", *roles], roles, strict=False):
        if role == "assistant" and before not in ("user", "tool"):
            raise ValueError(f"an assistant turn follows {before} (a user or tool message is needed)")
        if role == "system" and before != "nothing":
            raise ValueError("a system message that is not the first")
    return Record(
        id=str(row.get("id") if row.get("id") is not None else default_id),
        type=str(row.get("data_source") or data_source),
        messages=tuple(messages),
        tools=parse_tools(row.get("tools")),
    )


def _message(turn: Any) -> Message:
    if not isinstance(turn, Mapping):
        raise ValueError("a turn that is not an object")
    role = ROLES.get(str(turn.get("role", turn.get("from"))))
    if role is None:
        raise ValueError(f"unknown role {turn.get('role', turn.get('from'))!r}")
    kept = {k: v for k, v in turn.items() if v is not None and k not in ("from", "value")}
    content = turn.get("value") if "from" in turn else turn.get("content")
    message = plain_message({**kept, "role": role, "content": content})
    if message["content"] is None and not message.get("tool_calls"):
        raise ValueError(f"a {role} turn without content")
    calls = [_with_mapping(call) for call in message.get("tool_calls") or ()]
    return {**message, "content": message["content"] or ""} | ({"tool_calls": calls} if calls else {})


def _with_mapping(call: Any) -> Any:
    """A tool call whose arguments are a mapping, as chat templates want it, and not its JSON text."""
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise ValueError("a tool call without a function's name")
    arguments = function.get("arguments") or {}
    try:
        arguments = json.loads(arguments) if isinstance(arguments, str) else arguments
    except json.JSONDecodeError as error:
        raise ValueError(f"tool call arguments that are not JSON ({error.msg})") from error
    if not isinstance(arguments, Mapping):
        raise ValueError("tool call arguments that are not an object")
    return {**call, "function": {**function, "arguments": dict(arguments)}}


def _said(message: Message) -> tuple[str, str]:
    """A turn's calls as JSON or else its text without extra white space, and why it is no turn."""
    if not isinstance(message, Mapping):
        return "", "unparseable"
    message = with_tool_calls(message)
    try:
        calls = [_with_mapping(call)["function"] for call in message.get("tool_calls") or ()]
        if calls:
            return json.dumps([{"name": c["name"], "arguments": c["arguments"]} for c in calls], sort_keys=True), ""
    except (TypeError, ValueError):
        return "", "unparseable"
    text = visible_text(message)
    if text is None or "<tool_call>" in text:
        return "", "unparseable"
    return " ".join(text.split()), "" if text else "empty"


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("usage: python -m opdengine.environments.recorded RECORDS PROMPTS.jsonl")
    from opdengine.metrics import write_jsonl

    prompts = prompt_rows(sys.argv[1])
    write_jsonl(Path(sys.argv[2]), prompts)
    sys.stdout.write(f"{len(prompts)} prompts\n")
