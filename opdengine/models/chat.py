"""Chat templates and tokenizers: messages become token ids here and nowhere else."""

from __future__ import annotations

import copy
import json
import logging
import re
from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from opdengine.errors import ConfigError
from opdengine.models.given import find_given, is_given
from opdengine.models.hub import hub_problem
from opdengine.models.lfs import require_no_pointers
from opdengine.models.rendering import (
    MARK,
    REPLY,
    apply_template,
    closes_thought,
    opening,
    opens_thought,
    parts_of,
    plain_message,
    preamble,
    render,
    shared_start,
    text_of,
    turn_end,
)
from opdengine.models.thoughts import TAG
from opdengine.types import Encoded, Message, images_of
from opdengine.workers.printing import brief

__all__ = [
    "PROBES",
    "append_answer",
    "as_read",
    "encode_answer",
    "encode_behind",
    "encode_chat",
    "kept_marks",
    "load_tokenizer",
    "note_ends",
    "plain_message",
    "require_same_mode",
    "require_same_tokenizer",
    "shared_vocabulary",
    "stop_token_ids",
    "text_of",
    "text_of_completion",
    "vocabulary_size",
    "written",
]

logger = logging.getLogger(__name__)

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")

PAIRED = re.compile(r"</?[\w-]+>")
"""A mark such as <answer> or </answer>."""

PROBES = (
    "The quick brown fox jumps over 13 lazy dogs.",
    "  leading spaces,\ttabs\nand\n\nnew lines  ",
    "def f(x):\n    return {'a': [x ** 2, 0x1F, 1e-9]}  # comment",
    "naïve façade — “quotes” … €100, 50 %, ½",
    "你好，世界。 こんにちは Привет مرحبا",
    "🙂👩‍💻 \u200b zero width",
    "1234567890 98765.4321 -0.5",
    '<tool_call>{"name": "search"}</tool_call> \\boxed{42} $x^2$',
    "abcdefghijklmnopqrstuvwxyz ABCDEFGHIJKLMNOPQRSTUVWXYZ +-*/=()[]|",
)


def load_tokenizer(
    path: str,
    *,
    trust_remote_code: bool = False,
    chat_template: str | None = None,
    images: str = "image",
    sees: bool = True,
) -> Any:
    """Load a tokenizer that can render chats.

    Args:
        path: model folder or hub name; of an adapter's folder without a tokenizer, the base's is loaded.
        chat_template: Jinja text or a file that holds it; replaces the tokenizer's own.
        images: what the model is given where a message has a picture: the "image", the "text" in its place, or
            nothing ("omit"). With "image" the tokenizer of a model that sees has its processor as ``vision``.
        sees: whether pictures can reach the model; those of a server cannot.

    Raises:
        ValueError: it cannot be read, no chat template is known, or there is no end-of-sequence token.
    """
    from transformers import AutoTokenizer

    # Here: without the extra "train", doctor imports this module.
    from opdengine.models.lora import read_adapted
    from opdengine.models.processor import give_eyes

    if Path(path).is_dir():
        require_no_pointers(Path(path))
        base = read_adapted(path)
        if base and not any((Path(path) / name).is_file() for name in TOKENIZER_FILES):
            options: Any = {"chat_template": chat_template, "images": images, "sees": sees}
            return load_tokenizer(base, trust_remote_code=trust_remote_code, **options)
    try:
        if is_given(path):
            tokenizer = copy.copy(find_given(path).tokenizer)  # its template may be replaced
        else:
            tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
    except ConfigError:
        raise
    except Exception as error:  # tokenizers has no class of its own for a damaged file
        if not Path(path).is_dir() and (problem := hub_problem(path, error)):
            raise ValueError(f"the model {path!r} {problem}") from error
        place = f"the folder {path!r}" if Path(path).is_dir() else f"{path!r}, which is no folder here, as a hub name"
        raise ValueError(f"no tokenizer could be loaded from {place}: {error}") from error
    if chat_template is not None:
        tokenizer.chat_template = read_template(chat_template)
    tokenizer.images = images
    give_eyes(tokenizer, path, sees=sees and images == "image", trust_remote_code=trust_remote_code)
    if not tokenizer.chat_template:
        raise ValueError(
            f"the tokenizer of {path!r} has no chat template; set chat_template to a Jinja template "
            "or to a file that holds one"
        )
    if tokenizer.eos_token_id is None:
        raise ValueError(f"the tokenizer of {path!r} has no eos token; sampling could not stop")
    return tokenizer


def read_template(text: str) -> str:
    """The chat template that a setting holds, as text or in a file.

    Raises:
        ValueError: it is neither.
    """
    try:
        is_file = "\n" not in text and Path(text).is_file()
    except OSError:  # longer than a path can be
        is_file = False
    if is_file:
        try:
            return Path(text).read_text("utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"chat_template={text!r} is no text file in UTF-8 ({error}); name a template") from None
    if "{" not in text:
        raise ValueError(f"chat_template={brief(text)} is neither a file nor a Jinja template; correct the path")
    return text


def written(message: Message) -> str:
    """All that a message says as one string: its text, then its tool calls in the markup of Hermes and Qwen."""
    calls = [json.dumps(call.get("function", call), ensure_ascii=False) for call in message.get("tool_calls") or ()]
    parts = [text_of(message.get("content")), *(f"<tool_call>\n{call}\n</tool_call>" for call in calls)]
    return "\n".join(part for part in parts if part)


def encode_chat(
    tokenizer: Any,
    messages: Sequence[Message],
    tools: Sequence[Mapping[str, Any]] = (),
    template_kwargs: Mapping[str, Any] | None = None,
) -> Encoded:
    """Token ids of a chat, ready for the next assistant message, with the pictures that the model is given.

    Raises:
        ValueError: the template refuses the chat, a picture has no text in its place where that is asked for, or a
            message holds what the model cannot be given.
    """
    read = as_read(messages, getattr(tokenizer, "images", "image"))
    if images_of(read) and (vision := getattr(tokenizer, "vision", None)) is not None:
        encoded: Encoded = vision.encode(read, tools, template_kwargs)
        return encoded
    return Encoded(apply_template(tokenizer, read, tools, template_kwargs, tokenize=True))


def as_read(messages: Sequence[Message], images: str) -> Sequence[Message]:
    """A chat as a model reads it that is given the "image", the "text" in its place, or nothing ("omit").

    Raises:
        ValueError: a picture has no text in its place.
    """
    if images == "image" or not images_of(messages):
        return messages
    written = {i: _in_words(m, images) for i, m in enumerate(messages) if images_of([m])}
    return [{**m, "content": written[i]} if i in written else m for i, m in enumerate(messages)]


def _in_words(message: Message, images: str) -> str:
    """The content of a message with pictures as one text, in which what stands for a picture has lines of its own."""
    if images == "omit":
        return text_of(message["content"])
    whole, behind = "", False
    for part in parts_of(message["content"]):
        words = part["text"] if part["type"] == "text" else part["image"].text
        if words is None:
            raise ValueError(
                "the chat template cannot render a picture without a text in its place: give the row an 'image_text', "
                "or set images to 'omit'"
            )
        apart = behind or part["type"] == "image"
        line = "\n" if apart and whole and words and not whole.endswith("\n") and not words.startswith("\n") else ""
        whole, behind = whole + line + words, part["type"] == "image"
    return whole


def encode_answer(
    tokenizer: Any,
    messages: Sequence[Message],
    tools: Sequence[Mapping[str, Any]] = (),
    template_kwargs: Mapping[str, Any] | None = None,
    sampled: Sequence[int] = (),
) -> list[int]:
    """Token ids between a sampled assistant message and the next one: its end, then ``messages``.

    The template is applied to the new messages only, behind a stand-in for the assistant's, so what was
    sampled keeps its exact ids even where the template would rewrite earlier turns (for example
    strip their reasoning). The first ids close the assistant's message, unless ``sampled`` has done so.

    Args:
        messages: what the environment answered ("user" or "tool").
        sampled: the ids of the assistant's message.

    Raises:
        ValueError: the template cannot render them, leaves one out, or rewrites the assistant's message.
    """
    text = _render_answer(tokenizer, messages, tools, template_kwargs)
    before, found, after = text.partition(REPLY)
    if not found:
        raise ValueError(
            "the chat template leaves out the assistant's messages, so a conversation cannot go on; "
            "give another chat_template"
        )
    if not all(text_of(message.get("content")).strip() in after for message in messages):
        marked = [{**message, "content": MARK} for message in messages]  # the template may escape their text
        if _render_answer(tokenizer, marked, tools, template_kwargs).count(MARK) < len(messages):
            roles = [str(message.get("role")) for message in messages]
            raise ValueError(
                f"the chat template leaves out messages of the roles {roles} behind the assistant's, so a model would "
                "not read what the environment answers; give another chat_template, or do without tool messages"
            )
    answer = encode_behind(tokenizer, before + found, after)
    if len(sampled) and sampled[-1] in answer:
        place = answer.index(sampled[-1])
        if not str(tokenizer.decode(answer[:place])).strip():  # some templates print a space before the end
            answer = answer[place:]
    return append_answer(sampled, answer)


def encode_behind(tokenizer: Any, before: str, text: str) -> list[int]:
    """The ids that ``text`` has behind ``before``.

    A text on its own may have others: tokenizers of the SentencePiece kind mark its beginning as that of a word.
    Where a token spans both, the text is encoded on its own after all.
    """
    whole, prefix = (list(tokenizer.encode(t, add_special_tokens=False)) for t in (before + text, before))
    if whole[: len(prefix)] == prefix:
        return whole[len(prefix) :]
    return list(tokenizer.encode(text, add_special_tokens=False))


def _render_answer(
    tokenizer: Any,
    messages: Sequence[Message],
    tools: Sequence[Mapping[str, Any]],
    template_kwargs: Mapping[str, Any] | None,
) -> str:
    """A chat whose assistant said :data:`REPLY` and was answered with ``messages``."""
    chat = [{"role": "user", "content": "?"}, {"role": "assistant", "content": REPLY}, *messages]
    return render(tokenizer, chat, tools, template_kwargs, what="an answer")


def append_answer(sampled: Sequence[int], answer: Sequence[int]) -> list[int]:
    """The ids of :func:`encode_answer` that follow ``sampled``: without the end that was sampled already."""
    closed = bool(sampled) and bool(answer) and sampled[-1] == answer[0]
    return list(answer[1:] if closed else answer)


def text_of_completion(tokenizer: Any, ids: Sequence[int], stop_ids: Sequence[int]) -> str:
    """Return the text of a completion, without special tokens and without the token that ended it.

    Those of :func:`kept_marks` stay: without them nobody could tell the thought from the answer, or find a call.
    """
    said = list(ids[:-1] if len(ids) and ids[-1] in stop_ids else ids)
    marks = kept_marks(tokenizer)
    parts = [list(part) for _, part in groupby(said, key=lambda i: marks.get(i, ""))]
    plain: Any = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}  # which would change programs
    texts = [marks[p[0]] * len(p) if p[0] in marks else tokenizer.decode(p, **plain) for p in parts]
    return "".join(map(str, texts))


def kept_marks(tokenizer: Any) -> dict[int, str]:
    """The special tokens that a text keeps; most models have ordinary ones in their place.

    They begin and end thoughts, as those of Magistral and Command A, or are pairs such as <answer> and </answer>, which
    environments and verifiers read.
    """
    added = getattr(tokenizer, "added_tokens_decoder", {})
    special = {i: token.content for i, token in added.items() if token.special}
    roles = {getattr(tokenizer, f"{role}_token", None) for role in ("bos", "eos", "unk", "sep", "pad", "cls", "mask")}
    pairs = {mark for mark in {*special.values()} - roles if PAIRED.fullmatch(mark)}
    pairs = {mark for mark in pairs if {mark.replace("</", "<"), f"</{mark.strip('</')}"} <= pairs}
    return {i: mark for i, mark in special.items() if mark in pairs or TAG.fullmatch(mark)}


def vocabulary_size(tokenizer: Any) -> int:
    """Number of ids that the tokenizer can produce (heads may be padded beyond it)."""
    return int(max(tokenizer.get_vocab().values())) + 1


def stop_token_ids(
    tokenizer: Any, model: Any = None, template_kwargs: Mapping[str, Any] | None = None
) -> tuple[int, ...]:
    """Every id that ends a completion: the tokenizer's eos, the generation config's, and the end of a turn in the
    chat template (:func:`opdengine.models.rendering.turn_end`). Without a tokenizer only the second is known."""
    ids = set() if tokenizer is None else {tokenizer.eos_token_id}
    generation = getattr(model, "generation_config", None)
    more = getattr(generation, "eos_token_id", None)
    if more is not None:
        ids.update([more] if isinstance(more, int) else more)
    if tokenizer is not None and (end := turn_end(tokenizer, template_kwargs)) is not None:
        ids.add(end)
    return tuple(sorted(ids))


def note_ends(model: Any, ends: Sequence[int]) -> None:
    """Have the generation config of a model, which is saved with it, know all tokens that end an answer.

    That of a base model knows the end of a text alone: whoever generates with it would go on behind the answer.
    """
    generation = getattr(model, "generation_config", None)
    known = getattr(generation, "eos_token_id", None)
    if generation is not None and not {*ends} <= {*([known] if isinstance(known, int) else known or ())}:
        generation.eos_token_id = list(ends)


def require_same_tokenizer(student: Any, teacher: Any, name: str) -> None:
    """Prove that a teacher reads the student's token ids as the student means them.

    Raises:
        ValueError: some string is encoded differently; shows the first of them.
    """
    if differing := tokenizer_differences(student, teacher, name):
        shown = "\n".join(differing[:5])
        raise ValueError(
            f"teacher {name!r} does not share the student's tokenizer, so it cannot judge the "
            f"student's token ids; {len(differing)} probes differ:\n{shown}\n"
            "Use a teacher of the same family, or set its tokenizer_alignment to spans."
        )


def tokenizer_differences(student: Any, teacher: Any, name: str) -> list[str]:
    """What a teacher reads otherwise than the student means it, one line each.

    Encodes probe strings and every token that was added to either vocabulary (chat markup, tool
    markup, end of sequence) with both, and compares the ids of all tokens that both know; equal
    widths prove nothing. Other eos tokens are no difference where both templates end turns alike.
    """
    if student is teacher:
        return []
    ours, theirs = student.get_vocab(), teacher.get_vocab()
    added = {*student.get_added_vocab(), *teacher.get_added_vocab()}
    if student_or_teacher_sees(student, teacher):  # what marks pictures stands in prompts alone
        taken = {*ours.values()} & {*theirs.values()}
        added -= {t for t in added if (t not in ours or t not in theirs) and ours.get(t, theirs.get(t)) not in taken}
    differing = []
    for probe in (*PROBES, *sorted(added)):
        one = student.encode(probe, add_special_tokens=False)
        other = teacher.encode(probe, add_special_tokens=False)
        if one != other:
            differing.append(f"  {probe!r}: student {one[:12]}, {name} {other[:12]}")
    moved = [token for token, i in ours.items() if theirs.get(token, i) != i]
    differing += [f"  token {token!r}: student {ours[token]}, {name} {theirs[token]}" for token in sorted(moved)]
    # A base model's eos is often another than that of the chat model beside it: chats end as their templates end them.
    ends = [t.eos_token_id if (end := turn_end(t)) is None else end for t in (student, teacher)]
    if student.eos_token_id != teacher.eos_token_id and ends[0] != ends[1]:
        differing.append(f"  eos: student {student.eos_token_id}, {name} {teacher.eos_token_id}")
    return differing


def student_or_teacher_sees(student: Any, teacher: Any) -> bool:
    """Whether one of two models is given pictures, for which its tokenizer may have tokens of its own."""
    return any(getattr(tokenizer, "vision", None) is not None for tokenizer in (student, teacher))


def shared_vocabulary(student: Any, teachers: Sequence[Any]) -> int:
    """Number of leading ids over which student and teachers are compared.

    Those of the student; where one of two models sees, only those that both know, without tokens that mark pictures
    behind them.
    """
    sizes = [vocabulary_size(student)]
    sizes += [vocabulary_size(teacher) for teacher in teachers if student_or_teacher_sees(student, teacher)]
    return min(sizes)


def require_same_mode(
    student: Any, student_kwargs: Mapping[str, Any], teacher: Any, teacher_kwargs: Mapping[str, Any], name: str
) -> None:
    """Refuse two templates of which one begins an answer in another mode than the other.

    Where only one side opens a thought, by a setting or by the template itself, the teacher expects a thought where the
    student's answer begins, or reads one that nothing has opened. Other differences are pointed out in the log, and
    settings that both sides state are meant.

    Raises:
        ValueError: names the setting, or shows both openings.
    """
    sides = (
        (f"teacher {name!r}", teacher, teacher_kwargs, "the student", student_kwargs),
        ("the student", student, student_kwargs, f"teacher {name!r}", teacher_kwargs),
    )
    for who, tokenizer, own, whose, others in sides:
        for key in sorted(set(others) - set(own)):
            before, after = opening(tokenizer, own), opening(tokenizer, {**own, key: others[key]})
            if before != after:
                raise ValueError(
                    f"chat_template_kwargs of {who} lack {key!r}, which {whose} has ({others[key]!r}): an answer "
                    f"begins with {before[-60:]!r}, and would with {after[-60:]!r}; set {key} there as well, to the "
                    "value that you mean"
                )
    ours, theirs = preamble(student, student_kwargs), preamble(teacher, teacher_kwargs)
    if ours != theirs:
        logger.warning(
            "the chat templates differ: without a system message a chat begins with %s for the student, and with %s "
            "for teacher %r, which judges under that",
            brief(ours),
            brief(theirs),
            name,
        )
    ours, theirs = opening(student, student_kwargs), opening(teacher, teacher_kwargs)
    if ours == theirs:
        return
    both = {**student_kwargs, **teacher_kwargs}
    meant = opening(student, both) == opening(teacher, both)  # the settings differ, and both sides state them
    shared = shared_start(ours, theirs)
    only_one = [rest for rest in (ours[shared:], theirs[shared:]) if rest.strip()]
    written = len(only_one) == 1 and not closes_thought(only_one[0])
    openings = f"an answer of the student begins behind {ours[-60:]!r}, of teacher {name!r} behind {theirs[-60:]!r}"
    if not meant and (opens_thought(ours) != opens_thought(theirs) or written):
        raise ValueError(
            f"the chat templates open answers differently: {openings}, so the teacher would judge the student's tokens "
            "in another mode than they were written in; give both the same chat_template (a file will do), or "
            "chat_template_kwargs that print the same"
        )
    logger.warning("the chat templates differ: %s", openings)
