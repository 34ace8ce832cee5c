"""Prompts and recorded answers as the student's token ids, as if it had read the one and sampled the other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from opdengine.models.chat import as_read, encode_behind, encode_chat, stop_token_ids
from opdengine.models.rendering import opening, render, thought_opening, turn_end
from opdengine.models.thoughts import answer_part
from opdengine.types import Prompt


def encode_prompt(
    tokenizer: Any,
    template_kwargs: Mapping[str, Any] | None,
    prompt: Prompt,
    answer: str | None = None,
    *,
    ended: bool | None = None,
) -> list[int]:
    """Token ids of a prompt, ready for the student's answer; with ``answer`` those of that answer behind it.

    A recorded answer ends with the token that ends a turn. Where the chat template opens a thought, it goes on in it.

    Args:
        tokenizer, template_kwargs: of the student.
        prompt: is read with its tools and pictures.
        answer: in words.
        ended: of an answer that a teacher wrote, which stays as it is (:func:`own_turn`). None: it is a recorded one.

    Raises:
        ValueError: the template refuses the chat, or opens a thought that the recorded answer does not close.
    """
    if answer is None:
        return encode_chat(tokenizer, prompt.messages, prompt.tools, template_kwargs)
    if ended is not None:
        return own_turn(tokenizer, template_kwargs, answer, None, ended=ended)
    if opened := thought_opening(tokenizer, template_kwargs):
        begins = next((tag for tag in (opened, opened.strip()) if answer.lstrip().startswith(tag)), "")
        answer = answer.lstrip().removeprefix(begins) if begins else answer
        if answer_part(opened + answer) is None:
            raise ValueError(
                f"the chat template begins every answer with {opened.strip()}, and the recorded one of {prompt.name} "
                "does not end that thought; write the thought before the answer, or switch thinking off with "
                "chat_template_kwargs"
            )
    messages = as_read(prompt.messages, getattr(tokenizer, "images", "image"))
    before = render(tokenizer, messages, prompt.tools, template_kwargs)
    ids, end = encode_behind(tokenizer, before, answer), turn_end(tokenizer, template_kwargs)
    end = tokenizer.eos_token_id if end is None else end
    return ids if ids and ids[-1] == end else [*ids, end]


def own_turn(
    tokenizer: Any, template_kwargs: Mapping[str, Any] | None, text: str, ids: Sequence[int] | None, *, ended: bool
) -> list[int]:
    """A turn that another model wrote, as the student's token ids.

    Args:
        tokenizer, template_kwargs: of the student.
        text: of the turn.
        ids: the writer's, kept where its tokenizer is the student's; None: it has another one.
        ended: whether the writer ended the turn with a token. In its place (or behind the others, where a server does
            not tell it) stands the one that ends the student's, unless that knows the writer's as an end.
    """
    ends = stop_token_ids(tokenizer, template_kwargs=template_kwargs)
    last = turn_end(tokenizer, template_kwargs)
    end = tokenizer.eos_token_id if last is None else last
    if ids is None:
        said = encode_behind(tokenizer, opening(tokenizer, template_kwargs), text)
        return [*said, end] if ended and not (said and said[-1] in ends) else said
    if not ended or not len(ids) or ids[-1] in ends:
        return list(ids)
    markup = {*tokenizer.all_special_ids, *tokenizer.get_added_vocab().values()}
    return [*(ids[:-1] if ids[-1] in markup else ids), end]
