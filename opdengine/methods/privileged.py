"""What teachers read beyond the student's prompt: an answer, a demonstration or feedback in the user's last message."""

from __future__ import annotations

import json
import string
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from opdengine.data.rows import THOUGHTS
from opdengine.errors import ConfigError
from opdengine.models.chat import written
from opdengine.models.rendering import rewritten
from opdengine.types import Message, Prompt


class Privileged:
    """Prompts as the teachers read them (``teacher_prompt_template``).

    Args:
        template: a format string with ``{prompt}``, the user's last message, and columns of the row; None leaves
            prompts as they are.

    Raises:
        ConfigError: it is no format string, it leaves out the prompt, or it shows nothing else.
    """

    def __init__(self, template: str | None) -> None:
        self.template = template
        self.columns: tuple[str, ...] = ()
        if template is None:
            return
        where = f"teacher_prompt_template={template!r} is not possible;"
        try:
            parts = list(string.Formatter().parse(template))
        except ValueError as error:
            raise ConfigError(f"{where} it is no format string ({error}); write {{{{ and }}}} for braces") from error
        names = {name for _, name, _, _ in parts if name is not None}
        if bad := sorted(name for name in names if not name.isidentifier()):
            raise ConfigError(f"{where} {bad} are no names of columns; write {{{{ and }}}} for braces")
        if any(spec or conversion for _, _, spec, conversion in parts):
            raise ConfigError(f"{where} placeholders are plain names such as {{prompt}}, without format or conversion")
        if "prompt" not in names:
            raise ConfigError(f"{where} it leaves out {{prompt}}, the user's last message")
        self.columns = tuple(sorted(names - {"prompt"}))
        if not self.columns:
            raise ConfigError(f"{where} it shows no column, such as {{privileged_context}} or {{answer}}")

    def __call__(self, prompt: Prompt) -> Prompt:
        """The prompt as the teachers read it; one whose environment has yet to write it stays as it is.

        Raises:
            ConfigError: the row lacks a column.
        """
        if self.template is None or not prompt.messages:
            return prompt
        if problem := self.lack(prompt):
            raise ConfigError(problem)
        columns = {name: privileged_text(column(prompt, name)) for name in self.columns}
        return replace(prompt, messages=told(prompt.messages, self.template, columns))

    def lack(self, prompt: Prompt) -> str:
        """What a prompt lacks of all that the template shows, in a sentence; "" where it lacks nothing."""
        missing = [name for name in self.columns if not privileged_text(column(prompt, name)).strip()]
        if missing:
            return (
                f"{prompt.name} has nothing in the column {missing[0]!r}, which teacher_prompt_template shows "
                "to the teachers; fill the column in, or leave it out of the template"
            )
        return lack_of_user(prompt, "teacher_prompt_template") if self.columns else ""


def lack_of_user(prompt: Prompt, setting: str) -> str:
    """That a chat has no message of the user, which the template ``setting`` replaces, in a sentence; else ""."""
    if not prompt.messages or _place(prompt.messages) is not None:  # an environment has yet to write the chat
        return ""
    return f"{prompt.name} has no message of the user, which {setting} is to replace"


def told(messages: Sequence[Message], template: str, columns: Mapping[str, str]) -> tuple[Message, ...]:
    """The chat with the user's last message put into a template, as ``{prompt}`` beside ``columns``.

    Raises:
        ValueError: the user has said nothing.
    """
    place = _place(messages)
    if place is None:
        raise ValueError("the chat has no message of the user that a template could replace")
    content = rewritten(messages[place].get("content"), lambda words: template.format(prompt=words, **columns))
    return (*messages[:place], {**messages[place], "content": content}, *messages[place + 1 :])


def _place(messages: Sequence[Message]) -> int | None:
    """Index of the user's last message."""
    return next((i for i in reversed(range(len(messages))) if messages[i].get("role") == "user"), None)


def column(prompt: Prompt, name: str) -> Any:
    """A column of the row, or a field of the environment's task."""
    if name == "answer" and prompt.answer is not None:
        return prompt.answer
    task = prompt.extra.get("task")
    inner = task if isinstance(task, Mapping) else {}
    return prompt.extra.get(name, inner.get(name))


def privileged_text(value: Any) -> str:
    """A column as text: of a chat, what its messages think, say and call; of other lists and mappings, their JSON."""
    if value is None or isinstance(value, str):
        return value or ""
    if isinstance(value, Sequence) and value and all(isinstance(m, Mapping) and "content" in m for m in value):
        said = [text for m in value for text in (*(str(m.get(field) or "") for field in THOUGHTS), written(m))]
        return "\n".join(filter(None, said))
    return json.dumps(value, ensure_ascii=False, default=str) if isinstance(value, (Mapping, Sequence)) else str(value)
