"""Prompt log-probs of servers without ``prompt_logprobs``: completions with ``echo`` and ``logprobs``.

Such an answer names tokens by text (the legacy format of OpenAI's completions). A text that stands for
exactly one token of the vocabulary is that token; every other text is left to the tail bucket, which
keeps the divergence a lower bound. The judged tokens themselves are known from what was sent.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from opdengine.teachers.endpoint import BadAnswer


@dataclass(frozen=True)
class Echo:
    """How one server names tokens.

    Args:
        names: text of every token id.
        ids: id of every text that no two tokens share.
    """

    names: Sequence[str]
    ids: Mapping[str, int]

    @staticmethod
    def fields(k: int) -> dict[str, Any]:
        """Of a request, in place of ``prompt_logprobs``."""
        return {"echo": True, "logprobs": k}

    @classmethod
    def found_in(cls, choice: Mapping[str, Any], token_ids: Sequence[int], tokenizer: Any) -> Echo | None:
        """The way of naming in which an answer repeats the tokens that were sent, if it is a known one."""
        for naming in _namings(tokenizer):
            names = [naming(i) for i in range(len(tokenizer))]
            count: dict[str, int] = {}
            for name in names:
                count[name] = count.get(name, 0) + 1
            echo = cls(names, {name: i for i, name in enumerate(names) if count[name] == 1})
            try:
                echo.translate(choice, token_ids)
            except BadAnswer:
                continue
            return echo
        return None

    def translate(self, choice: Mapping[str, Any], token_ids: Sequence[int]) -> dict[str, Any]:
        """The choice with ``prompt_logprobs`` as vLLM writes them.

        Raises:
            BadAnswer: "no_logprobs" or "wrong_ids".
        """
        table = choice.get("logprobs")
        columns = [table.get(name) if isinstance(table, Mapping) else None for name in _COLUMNS]
        if not all(isinstance(column, list) and len(column) >= len(token_ids) for column in columns):
            raise BadAnswer("no_logprobs", "the answer has no log-probs of the echoed prompt")
        texts, targets, others = (column[: len(token_ids)] for column in columns if column is not None)
        if texts != [self.names[i] for i in token_ids]:
            raise BadAnswer("wrong_ids", "the server echoes other tokens than were sent")
        rows: list[Any] = [None]
        for token, target, likeliest in list(zip(token_ids, targets, others, strict=True))[1:]:
            known = likeliest if isinstance(likeliest, Mapping) else {}
            row = {str(self.ids[text]): {"logprob": value} for text, value in known.items() if text in self.ids}
            rows.append({**row, str(token): {"logprob": target}})
        return {**choice, "prompt_logprobs": rows}


_COLUMNS = ("tokens", "token_logprobs", "top_logprobs")


def _namings(tokenizer: Any) -> list[Callable[[int], str]]:
    return [
        lambda i: f"token_id:{i}",
        lambda i: str(tokenizer.decode([i], clean_up_tokenization_spaces=False)),
        lambda i: str(tokenizer.convert_ids_to_tokens(i)),
    ]
