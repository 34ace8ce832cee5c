"""This module reads the action out of a student's message; whatever the message holds, nothing here raises.

Formats: a bare action; ReAct lines (arXiv 2210.03629); search tags as in SAGE-OPD (arXiv 2606.19659, App. C);
tool calls in the markup of the Hermes and Qwen chat templates. Thoughts in ``<think>`` are put aside first.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from opdengine.data.files import parse_json
from opdengine.models.chat import text_of
from opdengine.models.thoughts import without_thoughts
from opdengine.types import Message

REACT = re.compile(r"^[ \t]*action[ \t]*:[ \t]*(.*)$", re.IGNORECASE | re.MULTILINE)
SEARCH = re.compile(r"<action>\s*(search|answer)\s*\[", re.IGNORECASE)
SEARCH_END = re.compile(r"\]\s*(?:</action>|$)", re.IGNORECASE)
CALL, CALL_END = "<tool_call>", "</tool_call>"


@dataclass(frozen=True)
class Action:
    """An action to execute, or the reason why there is none.

    Args:
        name: the action's text; for search "search" or "answer"; for a tool call the tool's name.
        arguments: of a tool call; for search ``{"text": ...}``.
        failure: "" or a word of :data:`opdengine.environments.FAILURES`.
    """

    name: str = ""
    arguments: Mapping[str, Any] = field(default_factory=dict)
    failure: str = ""


def visible_text(message: Message) -> str | None:
    """The message's text without its thoughts; None if it holds no text or the thought has no end."""
    try:
        text = without_thoughts(text_of(message.get("content"))) if isinstance(message, Mapping) else None
    except ValueError:
        return None
    return None if text is None else text.strip()


def plain_action(message: Message) -> Action:
    """The whole text as one action; more than one line is no action."""
    text = visible_text(message)
    if text is None or "\n" in text:
        return Action(failure="unparseable")
    return Action(text) if text else Action(failure="empty")


def react_action(message: Message) -> Action:
    """The text behind the first ``Action:``."""
    text = visible_text(message)
    if text == "":
        return Action(failure="empty")
    found = REACT.search(text or "")
    action = found.group(1).strip() if found else ""
    return Action(action) if action else Action(failure="unparseable")


def search_action(message: Message) -> Action:
    """The first ``<action>search[...]</action>`` or ``<action>answer[...]</action>``."""
    text = visible_text(message)
    if text == "":
        return Action(failure="empty")
    found = SEARCH.search(text or "")
    end = SEARCH_END.search(text or "", found.end()) if found else None
    if found is None or end is None:  # where one has no end, what follows it has none either
        return Action(failure="unparseable")
    return Action(found.group(1).lower(), {"text": (text or "")[found.end() : end.start()].strip()})


def with_tool_calls(message: Message) -> Message:
    """The message with the calls in its text as ``tool_calls`` (OpenAI's form, arguments as a mapping).

    Text around the calls stays as ``content``. A message in which any call cannot be read is returned as it
    is, so that the environment sees what was written.
    """
    text = visible_text(message)
    if not text or message.get("tool_calls") or CALL not in text:
        return message
    rest, calls, place = "", [], 0
    while (start := text.find(CALL, place)) >= 0:
        end = text.find(CALL_END, start)
        call = _call(text[start + len(CALL) : end]) if end >= 0 else None
        if call is None:
            return message
        calls.append(call)
        rest, place = rest + text[place:start], end + len(CALL_END)
    rest += text[place:]
    return {**message, "content": rest.strip(), "tool_calls": [{"type": "function", "function": c} for c in calls]}


def tool_action(message: Message) -> Action:
    """The message's one tool call, from ``tool_calls`` or from its text; several are a "tool_error"."""
    if not isinstance(message, Mapping):
        return Action(failure="unparseable")
    message = with_tool_calls(message)
    calls = message.get("tool_calls")
    if not calls:
        return Action(failure="empty" if visible_text(message) == "" else "unparseable")
    if not isinstance(calls, (list, tuple)):
        return Action(failure="unparseable")
    if len(calls) > 1:
        return Action(failure="tool_error")
    function = calls[0].get("function") if isinstance(calls[0], Mapping) else None
    call = _call(function)
    return Action(call["name"], call["arguments"]) if call else Action(failure="unparseable")


def _call(value: Any) -> dict[str, Any] | None:
    """``{"name": str, "arguments": dict}`` from JSON text or a mapping; None if it is no call."""
    if isinstance(value, str):
        value = _json(value)
    if not isinstance(value, Mapping):
        return None
    name, arguments = value.get("name"), value.get("arguments", {})
    if isinstance(arguments, str):
        arguments = _json(arguments) if arguments.strip() else {}
    if not isinstance(name, str) or not name or not isinstance(arguments, Mapping):
        return None
    return {"name": name, "arguments": dict(arguments)}


def _json(text: str) -> Any:
    try:
        return parse_json(text)
    except ValueError:
        return None


FORMATS: dict[str, Callable[[Message], Action]] = {
    "action": plain_action,
    "react": react_action,
    "search": search_action,
    "tools": tool_action,
}
"""The readers by name."""
