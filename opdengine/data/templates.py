"""This module finds what a chat template leaves out, by rendering with and without it, before a run loses it."""

from __future__ import annotations

import logging
import marshal
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from opdengine.data.prompts import DataError, PromptSet
from opdengine.data.rows import CALLS, SPOKEN
from opdengine.models.chat import as_read, encode_answer, encode_chat
from opdengine.models.rendering import MARK, image_part, parts_of, render, text_of, text_part, turn_end
from opdengine.types import Message, Prompt, images_of

if TYPE_CHECKING:
    from opdengine.config.train import TrainConfig

logger = logging.getLogger(__name__)

Tools = Sequence[Mapping[str, Any]]
REMEMBERED = 256
"""Chats whose token ids a reader keeps; a step has about as many prompts."""


class Reader:
    """A model's chat template, which must show the model all that a chat holds.

    Args:
        name: of the model, for messages.
        tokenizer: of the model.
        template_kwargs: handed to its chat template.
        keys: routing keys of the prompts that it reads; empty: all.
        debates: whether a user's message is put behind chats that end with another role.
    """

    def __init__(
        self,
        name: str,
        tokenizer: Any,
        template_kwargs: Mapping[str, Any] | None = None,
        keys: Sequence[str] = (),
        debates: bool = False,
    ) -> None:
        self.name = name
        self.tokenizer = tokenizer
        self.template_kwargs = dict(template_kwargs or {})
        self.keys = tuple(keys)
        self.debates = debates
        self._known: dict[Any, str] = {}
        self._said: set[str] = set()
        self._encoded: dict[bytes, tuple[int, ...]] = {}

    def encode(self, messages: Sequence[Message], tools: Tools = ()) -> list[int]:
        """Token ids of a chat; see :func:`opdengine.models.chat.encode_chat`.

        Some chats of plain text are remembered, because all samples of a prompt are judged under the same one; none is
        where the template tells the time.

        Raises:
            ValueError: the template cannot render the chat, or leaves something out.
        """
        if "strftime_now" in str(self.tokenizer.chat_template):
            return self._encode(messages, tools)
        try:
            chat = marshal.dumps((list(messages), list(tools)), 2)
        except ValueError:  # a picture, or an object of somebody's own
            return self._encode(messages, tools)
        if (known := self._encoded.get(chat)) is None:
            known = tuple(self._encode(messages, tools))
            if len(self._encoded) >= REMEMBERED:
                self._encoded.clear()
            self._encoded[chat] = known
        return list(known)

    def _encode(self, messages: Sequence[Message], tools: Tools) -> list[int]:
        if lost := self.left_out(as_read(messages, getattr(self.tokenizer, "images", "image")), tools):
            raise ValueError(f"the chat template of {self.name} {lost}; give it another chat_template")
        return encode_chat(self.tokenizer, messages, tools, self.template_kwargs)

    def left_out(self, messages: Sequence[Message], tools: Tools = ()) -> str:
        """Return what the template leaves out of such a chat, or ""; chats of the same shape are examined once."""
        shape = (
            *((m.get("role"), *_filled(m)) for m in messages),
            *(tuple(part["type"] for part in parts_of(m["content"])) for m in messages if images_of([m])),
            bool(tools),
        )
        if shape not in self._known:
            self._known[shape] = self._left_out(messages, tools)
        return self._known[shape]

    def lost(self, messages: Sequence[Message], tools: Tools = ()) -> str:
        """Return why the model cannot read a chat in full: an error of the template, or what it leaves out."""
        try:
            messages = as_read(messages, getattr(self.tokenizer, "images", "image"))
            render(self.tokenizer, messages, tools, self.template_kwargs)
            return self.left_out(messages, tools)
        except ValueError as error:
            return str(error).removeprefix("the chat template ")

    def unread(self, prompts: Iterable[Prompt]) -> dict[str, str]:
        """Return the prompts that cannot be read, as id -> reason."""
        found = {}
        for prompt in prompts:
            if self.keys and prompt.key not in self.keys:
                continue
            messages = list(prompt.messages)
            if self.debates and messages[-1].get("role") != "user":
                messages.append({"role": "user", "content": MARK})
            if problem := self.lost(messages, prompt.tools):
                found[prompt.id] = problem
        return found

    def _left_out(self, messages: Sequence[Message], tools: Tools) -> str:
        whole = self._text(messages, tools)
        if whole is None:
            return ""  # encoding says why
        marks = {i: f"{MARK}{i}End" for i, m in enumerate(messages) if text_of(m.get("content")).strip()}
        marked = self._text([_marked(m, marks[i]) if i in marks else m for i, m in enumerate(messages)], tools)
        lost = [messages[i] for i, mark in marks.items() if marked is not None and mark not in marked]
        if any(m.get("tool_calls") for m in lost):
            self._warn("the text of messages that call tools")
        if roles := sorted({str(m["role"]) for m in lost if not m.get("tool_calls")}):
            return f"leaves out messages of the roles {roles}"
        if tools and self._text(messages, ()) == whole:
            return "leaves out the tools"
        if (
            images_of(messages)
            and self._text([{**m, "content": text_of(m.get("content"))} for m in messages], tools) == whole
        ):
            return "leaves out the pictures"
        for field in SPOKEN:
            if not self._shows(field, messages, tools, whole):
                if field in CALLS:
                    return f"leaves out the {CALLS[field]}"
                if any(m.get(field) and not any(_filled(m, but=field)) for m in messages):
                    return f"leaves out messages that hold nothing but {field!r}"
                self._warn(f"the thoughts of earlier messages ({field!r})")
        return ""

    def _shows(self, field: str, messages: Sequence[Message], tools: Tools, whole: str) -> bool:
        """Whether a field of messages changes the text ``whole`` of their chat, if any of them has it."""
        if not any(m.get(field) for m in messages):
            return True
        silent = [{"content": "", **{k: v for k, v in m.items() if k != field}} for m in messages]
        return self._text(silent, tools) != whole

    def _warn(self, what: str) -> None:
        if what not in self._said:
            self._said.add(what)
            logger.warning("the chat template of %s leaves out %s", self.name, what)

    def _text(self, messages: Sequence[Message], tools: Tools) -> str | None:
        try:
            return render(self.tokenizer, messages, tools, self.template_kwargs)
        except ValueError:
            return None


def _filled(message: Message, but: str = "") -> tuple[bool, ...]:
    """Whether a message has words, and each of the fields beside them; ``but`` is passed over."""
    fields = (bool(message.get(field)) for field in SPOKEN if field != but)
    return (bool(text_of(message.get("content")).strip()), *fields)


def _marked(message: Message, mark: str) -> Message:
    """The message with other words, and its pictures before them."""
    pictures = [image_part(image) for image in images_of([message])]
    return {**message, "content": [*pictures, text_part(mark)] if pictures else mark}


def readers_of(config: TrainConfig, tokenizer: Any, teacher_tokenizers: Sequence[Any] = ()) -> list[Reader]:
    """The student and the teachers of a run.

    Args:
        config: of the run.
        tokenizer: the student's.
        teacher_tokenizers: in the order of the teachers.
    """
    teachers = [
        Reader(f"teacher {teacher.name!r}", its, teacher.chat_template_kwargs, teacher.key, config.debates)
        for teacher, its in zip(map(config.as_loaded, config.teachers), teacher_tokenizers, strict=True)
    ]
    return [Reader("the student", tokenizer, config.chat_template_kwargs), *teachers]


def readable(prompts: PromptSet, readers: Sequence[Reader], *, skip_bad_rows: bool = False) -> PromptSet:
    """The prompts that all models read in full.

    Args:
        prompts: of the data.
        readers: models; those with the same template as an earlier one are not asked again.
        skip_bad_rows: leave the others out, counted, instead of refusing the data.

    Raises:
        DataError: some are not; says what is missing where, and what to do.
    """
    asked: list[tuple[Any, ...]] = []
    unread: dict[str, str] = {}
    for reader in readers:
        template = (str(reader.tokenizer.chat_template), reader.template_kwargs, reader.keys, reader.debates)
        if template not in asked:
            asked.append(template)
            found = reader.unread(prompts.prompts)
            unread = {id: f"the chat template of {reader.name} {problem}" for id, problem in found.items()} | unread
    if not unread:
        return prompts
    kept = tuple(p for p in prompts.prompts if p.id not in unread)
    lines = [f"  {_some(unread, problem)}: {problem}" for problem in dict.fromkeys(unread.values())]
    shown = "\n".join(lines[:10]) + ("\n  ..." if len(lines) > 10 else "")
    if not skip_bad_rows or not kept:
        raise DataError(
            f"{len(unread)} of {len(prompts.prompts)} prompts cannot be read in full:\n{shown}\nGive the model another "
            "chat_template, change the prompts, or leave them out with --skip_bad_rows."
        )
    logger.warning("left out %d of %d prompts:\n%s", len(unread), len(prompts.prompts), shown)
    return PromptSet(kept, {**prompts.dropped, "chat_template": len(unread)})


def check_templates(readers: Sequence[Reader], *, converses: bool, judges: bool = False) -> None:
    """Return what is known of templates without data.

    Args:
        readers: the student, then the teachers.
        converses: whether a chat goes on behind an answer.
        judges: whether teachers are asked with a system message.

    Raises:
        ValueError: a template cannot render a user's message, what follows an answer, or the judge's instructions.
    """
    question = {"role": "user", "content": "?"}
    for place, reader in enumerate(readers):
        _warn_of_bos(reader, reader.encode([question]))
        if judges and place and (lost := reader.lost([{"role": "system", "content": "?"}, question])):
            raise ValueError(
                f"the chat template of {reader.name} {lost}, with which a judge is instructed; give it another "
                "chat_template, or a judge_prompt of your own, which needs none"
            )
        if converses:
            try:
                encode_answer(reader.tokenizer, [question], (), reader.template_kwargs)
            except ValueError as error:
                raise ValueError(f"{reader.name}: {error}") from error
        if turn_end(reader.tokenizer, reader.template_kwargs) is None:
            logger.warning(
                "the chat template of %s ends answers without a token of their own, so sampling stops at the eos token "
                "%r alone",
                reader.name,
                reader.tokenizer.eos_token,
            )


def _warn_of_bos(reader: Reader, ids: Sequence[int]) -> None:
    """Point out a chat that does not begin with one bos where the tokenizer puts it before texts, as in training."""
    bos = reader.tokenizer.bos_token_id
    if bos is None or list(reader.tokenizer.encode("?"))[:1] != [bos]:
        return
    count = next((place for place, i in enumerate(ids) if i != bos), len(ids))
    if count != 1:
        logger.warning(
            "the chat template of %s begins a chat with %s %r, which its tokenizer puts before every text once: models "
            "answer worse where it differs from their training; see to {{ bos_token }} in the chat_template",
            reader.name,
            "no" if not count else f"{count} times",
            reader.tokenizer.bos_token,
        )


def _some(unread: Mapping[str, str], problem: str) -> str:
    ids = [id for id, found in unread.items() if found == problem]
    return f"prompt {ids[0]!r}" + (f" and {len(ids) - 1} more" if len(ids) > 1 else "")
