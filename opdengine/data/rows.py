"""One row of data becomes one prompt, or what is wrong with it is said."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from opdengine.config.sections import DATA_COLUMNS, DataConfig
from opdengine.data.files import Undecodable, parse_json
from opdengine.data.images import Pictures
from opdengine.models.chat import plain_message, text_of
from opdengine.types import Message, Prompt, images_of

ROLES = ("system", "developer", "user", "assistant", "tool", "function", "ipython", "observation")
"""Who may speak in a chat; which of them a chat template knows is found out by rendering."""

CALLS = {"tool_calls": "tool calls", "function_call": "function calls"}
THOUGHTS = ("reasoning_content", "reasoning", "thinking")
SPOKEN = (*CALLS, *THOUGHTS)
"""A message may hold one of these in place of content; chat templates know some of the names."""

NO_PROMPT = "neither 'prompt' nor 'messages'"
ANSWERED = "the last message is the assistant's"

CHAT_TEXT = re.compile(r"""\s*\[\s*\{\s*(["'])(role|content|from|value)\1\s*:""")
MESSAGE_TEXT = re.compile(r"""\s*\{\s*"(role|content)"\s*:""")


def prompt_of(row: Any, default_id: str, pictures: Pictures | None = None) -> Prompt:
    """The prompt of a row in our columns.

    Args:
        row: of a file, or :class:`Undecodable`.
        default_id: where the row has no id.
        pictures: reads those of its source; None: below the working folder.

    Raises:
        ValueError: says what is wrong with the row.
    """
    if isinstance(row, Undecodable):
        raise ValueError(str(row))
    if not isinstance(row, Mapping):
        raise ValueError("not a JSON object")
    key = row.get("data_source")
    if not (key is None or isinstance(key, (str, int))):
        raise ValueError(f"'data_source' is of type {type(key).__name__}, not text")
    messages, tools = _messages(row, pictures or Pictures(DataConfig("."))), parse_tools(row.get("tools"))
    for name, value in (("messages", messages), ("tools", tools), ("answer", row.get("answer"))):
        if not _is_finite(value):
            raise ValueError(f"{name!r} holds a number that is NaN or infinite")
    return Prompt(
        id=str(row.get("id") if row.get("id") is not None else default_id),
        messages=messages,
        tools=tools,
        key="" if key is None else str(key),
        answer=row.get("answer"),
        extra={k: v for k, v in row.items() if k not in DATA_COLUMNS},
    )


def _messages(row: Mapping[str, Any], pictures: Pictures) -> tuple[Message, ...]:
    """The chat of a row.

    Raises:
        ValueError: there is none that the student could continue.
    """
    column = "messages" if row.get("messages") is not None else "prompt"
    content = row.get(column)
    if content is None:
        raise ValueError(f"{NO_PROMPT} (columns: {sorted(map(str, row))})")
    if isinstance(content, str):
        content = chat_of_text(content, column)
    if not isinstance(content, (list, tuple)) or not content:
        raise ValueError(f"{column!r} is neither text nor a non-empty list of messages")
    content = pictures.place(content, row.get("images"), row.get("image_text"))
    messages = tuple(_message(message) for message in content)
    last = messages[-1]
    if last["role"] == "assistant":
        raise ValueError(f"{ANSWERED}; the student is to write that one")
    if last["role"] == "user" and not text_of(last.get("content")).strip() and not images_of([last]):
        raise ValueError("empty prompt")
    return messages


def _message(message: Any) -> dict[str, Any]:
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
        raise ValueError("a message without 'role'")
    if message["role"] not in ROLES:
        raise ValueError(f"a message of the unknown role {message['role']!r} (roles are {', '.join(ROLES)})")
    if message.get("content") is None and not any(message.get(name) for name in SPOKEN):
        raise ValueError(f"a message without 'content' (role {message['role']!r})")
    # Templates print a field that is None as text, or fail where it is not a list.
    return plain_message({name: value for name, value in message.items() if value is not None})


def chat_of_text(text: str, column: str = "prompt") -> Any:
    """The chat that a text stands for: the one that it holds as JSON, else itself as the user's message.

    Args:
        text: of a column.
        column: its name; a list as JSON text under ``messages`` is never the user's own words.

    Raises:
        ValueError: it looks like a chat but cannot be read as one.
    """
    looks = CHAT_TEXT.match(text) is not None
    if not (looks or MESSAGE_TEXT.match(text) or (column == "messages" and text.lstrip().startswith("["))):
        return [{"role": "user", "content": text}]
    try:
        found = parse_json(text)
    except ValueError as error:
        if looks:
            raise ValueError(f"{column!r} looks like a chat written as JSON text, but is {error}") from error
        return [{"role": "user", "content": text}]
    if isinstance(found, list) and (looks or column == "messages"):
        return found
    if isinstance(found, Mapping) and "role" in found and {*found} <= {"role", "content", "name", *SPOKEN}:
        return [found]
    return [{"role": "user", "content": text}]


def parse_tools(tools: Any) -> tuple[Mapping[str, Any], ...]:
    """Tool schemas from a list, its JSON text, a list of JSON texts, or nothing.

    Raises:
        ValueError: it is none of these.
    """
    if isinstance(tools, str):
        tools = _parsed(tools, "'tools'") if tools.strip() else None
    if not tools:
        return ()
    if not isinstance(tools, (list, tuple)):
        raise ValueError("'tools' is not a list of JSON schemas")
    tools = [_parsed(tool, "a tool in 'tools'") if isinstance(tool, str) else tool for tool in tools]
    if not all(isinstance(tool, Mapping) for tool in tools):
        raise ValueError("'tools' is not a list of JSON schemas")
    return tuple(_with_parameters(tool) for tool in tools)


def _with_parameters(tool: Mapping[str, Any]) -> Mapping[str, Any]:
    """The schema with its parameters as a mapping; columns of one type hold them as JSON text."""
    if isinstance(tool.get("function"), Mapping):
        return {**tool, "function": _with_parameters(tool["function"])}
    if isinstance(tool.get("parameters"), str):
        return {**tool, "parameters": _parsed(tool["parameters"], "'parameters' of a tool")}
    return tool


def _parsed(text: str, name: str) -> Any:
    try:
        return parse_json(text)
    except ValueError as error:
        raise ValueError(f"{name} is {error}") from error


def _is_finite(value: Any) -> bool:
    if isinstance(value, float):
        return math.isfinite(value)
    if isinstance(value, Mapping):
        return all(map(_is_finite, value.values()))
    return not isinstance(value, (list, tuple)) or all(map(_is_finite, value))
