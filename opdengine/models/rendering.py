"""This module finds out what a chat template prints: the text of a chat, what opens an answer and what ends it."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from opdengine.models.surrogates import without_surrogates
from opdengine.models.thoughts import open_thought
from opdengine.types import Image, Message, images_of

Tools = Sequence[Mapping[str, Any]]

REPLY = "\u2042reply\u2042"
"""Stands for an assistant's message while the text around it is looked up."""

MARK = "TextOfAMessage"
"""Stands for another message; plain letters, which templates neither strip nor escape."""

TASK = "\u2042task\u2042"
"""Stands for the words of a message with pictures while the place of those is looked up."""

THOUGHT = re.compile(
    r"[<\[◁](?P<end>/|\|?end)?[^<>\[\]◁▷/]*(think|thought|reason|analysis|scratchpad)[^<>\[\]◁▷]*[>\]▷]", re.I
)
"""Markup around thoughts: <think>, [THINK], <|START_THINKING|>, <|begin_of_thought|> and their ends."""


def text_of(content: Any) -> str:
    """A message's content as one string: the text itself, or the joined parts of a list of parts without its pictures.

    Raises:
        ValueError: a part is neither text nor a picture that has been read.
    """
    if content is None or isinstance(content, str):
        return content or ""
    if not isinstance(content, (list, tuple)):
        raise ValueError(f"message content of type {type(content).__name__}; use a string or a list of text parts")
    texts = []
    for part in content:
        if isinstance(part, Mapping) and isinstance(part.get("image"), Image):
            continue
        text = part.get("text") if isinstance(part, Mapping) and part.get("type", "text") == "text" else part
        if not isinstance(text, str):
            kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
            raise ValueError(f"message part of type {kind!r}; only text can be used")
        texts.append(text)
    return "".join(texts)


def plain_message(message: Message) -> dict[str, Any]:
    """The message with its content as one string, unless it has pictures: many templates misprint lists of parts."""
    content = message.get("content")
    if content is None:
        return dict(message)
    if images_of([message]):
        return {**message, "content": parts_of(content)}
    return {**message, "content": text_of(content)}


def text_part(text: str) -> dict[str, Any]:
    """A part of a message's content."""
    return {"type": "text", "text": text}


def image_part(image: Image) -> dict[str, Any]:
    """A part of a message's content."""
    return {"type": "image", "image": image}


def parts_of(content: Any) -> list[dict[str, Any]]:
    """A message's content as texts and pictures in their order."""
    if content is None or isinstance(content, str):
        return [text_part(content)] if content else []
    pictures = [part.get("image") if isinstance(part, Mapping) else None for part in content]
    return [
        image_part(image) if isinstance(image, Image) else text_part(text_of([part]))
        for part, image in zip(content, pictures, strict=True)
    ]


def rewritten(content: Any, write: Callable[[str], str]) -> Any:
    """A message's content in other words; its pictures stand where its own words are told first.

    Args:
        content: of a message.
        write: its words -> others, with these among them.
    """
    if not images_of([{"content": content}]):
        return write(text_of(content))
    before, _, after = write(TASK).partition(TASK)
    return [text_part(before), *parts_of(content), text_part(after.replace(TASK, text_of(content)))]


def apply_template(
    tokenizer: Any,
    messages: Sequence[Message],
    tools: Tools = (),
    template_kwargs: Mapping[str, Any] | None = None,
    *,
    what: str = "a chat",
    **how: Any,
) -> Any:
    """Return the text that the chat template makes of a chat.

    Args:
        what: is rendered, for the error.
        how: further arguments of ``apply_chat_template``.

    Raises:
        ValueError: the template refuses the chat, whatever it raises, or a message holds more than text.
    """
    chat: list[Message] = [plain_message(message) for message in messages]
    if images_of(chat) and not reads_images(tokenizer):
        raise ValueError(
            f"the chat template cannot render {what} with a picture, because the model is given none: set its images "
            "to 'text' for a text in their place or to 'omit', or take a model that sees"
        )
    if images_of(chat) or content_form(tokenizer, template_kwargs) == "parts":
        chat = [_in_parts(message) for message in chat]
    if any(message.get("tool_calls") for message in chat):
        form = arguments_form(tokenizer, template_kwargs)
        chat = [_with_arguments(message, form) for message in chat]
    return _apply(tokenizer, chat, tools, template_kwargs, what, how)


def _apply(
    tokenizer: Any,
    chat: Sequence[Message],
    tools: Tools,
    template_kwargs: Mapping[str, Any] | None,
    what: str,
    how: Mapping[str, Any],
) -> Any:
    arguments = {"add_generation_prompt": True, "return_dict": False, **how, **(template_kwargs or {})}
    try:
        return tokenizer.apply_chat_template(chat, tools=[dict(tool) for tool in tools] or None, **arguments)
    except Exception as error:  # a template is a program of somebody else
        roles = [str(message.get("role")) for message in chat]
        cut = without_surrogates(chat) is not chat
        reason = "a text in it holds half of a character (a lone surrogate)" if cut else error
        raise ValueError(f"the chat template cannot render {what} of the roles {roles}: {reason}") from error


def render(
    tokenizer: Any,
    messages: Sequence[Message],
    tools: Tools = (),
    template_kwargs: Mapping[str, Any] | None = None,
    **how: Any,
) -> str:
    """The text of a chat; see :func:`apply_template`."""
    return str(apply_template(tokenizer, messages, tools, template_kwargs, tokenize=False, **how))


def reads_images(tokenizer: Any) -> bool:
    """Whether the model of a tokenizer is given pictures; see :func:`opdengine.models.processor.give_eyes`."""
    return getattr(tokenizer, "vision", None) is not None


def _in_parts(message: Message) -> Message:
    """The message as templates of models that see expect it: without the pictures themselves."""
    if message.get("content") is None:
        return message
    return {
        **message,
        "content": [part if part["type"] == "text" else {"type": "image"} for part in parts_of(message["content"])],
    }


def content_form(tokenizer: Any, template_kwargs: Mapping[str, Any] | None = None) -> str:
    """Return how the chat template takes content: as "text", or in "parts", as some models that see want all of it."""
    key = (str(getattr(tokenizer, "chat_template", "")), repr(template_kwargs))
    if key not in _contents:
        _contents[key] = _find_content(tokenizer, template_kwargs)
    return _contents[key]


_contents: dict[tuple[str, str], str] = {}


def _find_content(tokenizer: Any, template_kwargs: Mapping[str, Any] | None) -> str:
    for form, content in (("text", MARK), ("parts", [text_part(MARK)])):
        try:
            text = _apply(
                tokenizer, [{"role": "user", "content": content}], (), template_kwargs, "a text", {"tokenize": False}
            )
        except ValueError:
            continue
        if str(text).count(MARK) == 1 and repr(MARK) not in str(text):
            return form
    return "text"


def arguments_form(tokenizer: Any, template_kwargs: Mapping[str, Any] | None = None) -> str:
    """Return how the chat template takes the arguments of tool calls: as a "mapping", or as "text" of JSON.

    A template that writes JSON would quote a text once more; one that pastes text would print a mapping in Python's
    words. "" where neither comes out right: then they are handed over as they are.
    """
    key = (str(getattr(tokenizer, "chat_template", "")), repr(template_kwargs))
    if key not in _forms:
        _forms[key] = _find_form(tokenizer, template_kwargs)
    return _forms[key]


_forms: dict[tuple[str, str], str] = {}


def _find_form(tokenizer: Any, template_kwargs: Mapping[str, Any] | None) -> str:
    arguments = {MARK: "Value"}
    shown = json.dumps(arguments)
    for form, value in (("mapping", arguments), ("text", shown)):
        call = {"id": "123456789", "type": "function", "function": {"name": "f", "arguments": value}}
        chat: list[Message] = [
            {"role": "user", "content": "?"},
            {"role": "assistant", "content": "", "tool_calls": [call]},
            {"role": "tool", "content": "?", "name": "f", "tool_call_id": "123456789"},
        ]
        try:
            text = str(_apply(tokenizer, chat, (), template_kwargs, "a tool call", {"tokenize": False}))
        except ValueError:
            continue
        if shown in text or (form == "mapping" and MARK in text and repr(MARK) not in text):
            return form
    return ""


def _with_arguments(message: Message, form: str) -> Message:
    """The message with the arguments of its tool calls in a form."""
    if not form or not isinstance(message.get("tool_calls"), (list, tuple)):
        return message
    return {**message, "tool_calls": [_call_with_arguments(call, form) for call in message["tool_calls"]]}


def _call_with_arguments(call: Any, form: str) -> Any:
    if isinstance(call, Mapping) and isinstance(call.get("function"), Mapping):
        return {**call, "function": _call_with_arguments(call["function"], form)}
    arguments = call.get("arguments") if isinstance(call, Mapping) else None
    if form == "text" and isinstance(arguments, Mapping):
        return {**call, "arguments": json.dumps(arguments, ensure_ascii=False)}
    if form == "mapping" and isinstance(arguments, str):
        try:
            read = json.loads(arguments)
        except (ValueError, RecursionError):
            return call
        return {**call, "arguments": read} if isinstance(read, Mapping) else call
    return call


def opening(tokenizer: Any, template_kwargs: Mapping[str, Any] | None = None) -> str:
    """Return the text between the words of a user and the answer."""
    text = render(tokenizer, [{"role": "user", "content": MARK}], (), template_kwargs)
    return text.rpartition(MARK)[2]


def preamble(tokenizer: Any, template_kwargs: Mapping[str, Any] | None = None) -> str:
    """Return the text before the first words of a user, with the system message that a template writes by itself."""
    return render(tokenizer, [{"role": "user", "content": MARK}], (), template_kwargs).partition(MARK)[0]


def thought_opening(tokenizer: Any, template_kwargs: Mapping[str, Any] | None = None) -> str:
    """The thought that the chat template leaves open before an answer, as ``<think>``; "" where it opens none."""
    return open_thought(opening(tokenizer, template_kwargs))


def opens_thought(text: str) -> bool:
    """Whether a text leaves a thought open."""
    marks = list(THOUGHT.finditer(text))
    return bool(marks) and not marks[-1]["end"]


def closes_thought(text: str) -> bool:
    """Whether a text ends a thought."""
    marks = list(THOUGHT.finditer(text))
    return bool(marks) and bool(marks[-1]["end"])


def shared_start(one: Sequence[Any], other: Sequence[Any]) -> int:
    """Length of the longest common beginning."""
    pairs = zip(one, other, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))


def turn_end(tokenizer: Any, template_kwargs: Mapping[str, Any] | None = None) -> int | None:
    """The token with which the chat template ends an assistant's message; None: it prints none.

    It need not be the tokenizer's eos: ChatML on a base model ends turns with ``<|im_end|>`` and texts with
    ``<|endoftext|>``. Looked up behind a message at the end of a chat and behind one that is answered: what both
    print is the end; else what closes the chat (gpt-oss), else what opens the answer (GLM).
    """
    chat = [{"role": "user", "content": "?"}, {"role": "assistant", "content": REPLY}]
    last = _tokens_behind_reply(tokenizer, chat, template_kwargs, add_generation_prompt=False)
    answered = _tokens_behind_reply(tokenizer, [*chat, {"role": "user", "content": "?"}], template_kwargs)
    ends = last[: shared_start(last, answered)] or last or answered[:1]
    return ends[-1] if ends else None


def _tokens_behind_reply(
    tokenizer: Any, chat: Sequence[Message], template_kwargs: Mapping[str, Any] | None, **how: Any
) -> list[int]:
    """Ids of the added tokens that follow an assistant's message at once, white space before them aside."""
    try:
        _, reply, text = render(tokenizer, chat, (), template_kwargs, **how).rpartition(REPLY)
    except ValueError:  # where it matters, the chat itself is refused
        return []
    if not reply:
        return []
    text = text.lstrip()
    special = tokenizer.all_special_tokens  # not all of them were added
    known = {**dict(zip(special, tokenizer.convert_tokens_to_ids(special), strict=True)), **tokenizer.get_added_vocab()}
    added = sorted(((token, i) for token, i in known.items() if i is not None), key=lambda item: -len(item[0]))
    ids = []
    while found := next(((token, i) for token, i in added if token and text.startswith(token)), None):
        ids.append(found[1])
        text = text[len(found[0]) :]
    return ids
