"""Chat templates and tokenizers: messages become token ids here and nowhere else."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from opdengine.types import Message

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


def load_tokenizer(path: str, *, trust_remote_code: bool = False, chat_template: str | None = None) -> Any:
    """Load a tokenizer that can render chats.

    Args:
        path: model folder or hub name.
        chat_template: Jinja text or a file that holds it; replaces the tokenizer's own.

    Raises:
        ValueError: no chat template is known, or there is no end-of-sequence token.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
    except OSError as error:
        raise ValueError(f"no tokenizer could be loaded from {path!r}: {error}") from error
    if chat_template is not None:
        is_file = len(chat_template) < 4096 and Path(chat_template).is_file()
        tokenizer.chat_template = Path(chat_template).read_text() if is_file else chat_template
    if not tokenizer.chat_template:
        raise ValueError(
            f"the tokenizer of {path!r} has no chat template; set chat_template to a Jinja template "
            "or to a file that holds one"
        )
    if tokenizer.eos_token_id is None:
        raise ValueError(f"the tokenizer of {path!r} has no eos token; sampling could not stop")
    return tokenizer


def encode_chat(
    tokenizer: Any,
    messages: Sequence[Message],
    tools: Sequence[Mapping[str, Any]] = (),
    template_kwargs: Mapping[str, Any] | None = None,
) -> list[int]:
    """Token ids of a chat, ready for the next assistant message."""
    return list(
        tokenizer.apply_chat_template(
            [dict(message) for message in messages],
            tools=[dict(tool) for tool in tools] or None,
            add_generation_prompt=True,
            tokenize=True,
            return_dict=False,
            **(template_kwargs or {}),
        )
    )


def vocabulary_size(tokenizer: Any) -> int:
    """Number of ids that the tokenizer can produce (heads may be padded beyond it)."""
    return max(tokenizer.get_vocab().values()) + 1


def stop_token_ids(tokenizer: Any, model: Any = None) -> tuple[int, ...]:
    """Every id that ends a completion: the tokenizer's eos and the generation config's."""
    ids = {tokenizer.eos_token_id}
    generation = getattr(model, "generation_config", None)
    more = getattr(generation, "eos_token_id", None)
    if more is not None:
        ids.update([more] if isinstance(more, int) else more)
    return tuple(sorted(ids))


def require_same_tokenizer(student: Any, teacher: Any, name: str) -> None:
    """Prove that a teacher reads the student's token ids as the student means them.

    Encodes probe strings and every token that was added to either vocabulary (chat markup, tool
    markup, end of sequence) with both; equal widths prove nothing.

    Raises:
        ValueError: some string is encoded differently; shows the first of them.
    """
    if student is teacher:
        return
    added = {*student.get_added_vocab(), *teacher.get_added_vocab()}
    differing = []
    for probe in (*PROBES, *sorted(added)):
        ours = student.encode(probe, add_special_tokens=False)
        theirs = teacher.encode(probe, add_special_tokens=False)
        if ours != theirs:
            differing.append(f"  {probe!r}: student {ours[:12]}, {name} {theirs[:12]}")
    if student.eos_token_id != teacher.eos_token_id:
        differing.append(f"  eos: student {student.eos_token_id}, {name} {teacher.eos_token_id}")
    if differing:
        shown = "\n".join(differing[:5])
        raise ValueError(
            f"teacher {name!r} does not share the student's tokenizer, so it cannot judge the "
            f"student's token ids; {len(differing)} probes differ:\n{shown}\n"
            "Use a teacher of the same family."
        )
