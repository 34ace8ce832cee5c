"""A response in a teacher's own tokens, and the spans of equal text between them and the student's.

The student's exact ids stay what is trained. The teacher reads their text in its tokenizer; wherever both have a
boundary at the same byte a span ends. Where the boundaries agree a span is one token on either side.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from opdengine.models.chat import stop_token_ids, vocabulary_size
from opdengine.models.rendering import turn_end
from opdengine.models.spans import Text, spans_of
from opdengine.models.token_bytes import TokenBytes, equal_tokens
from opdengine.types import Spans


class Alignment:
    """The tokens of a student and of a teacher with another tokenizer, side by side.

    Args:
        student, teacher: their tokenizers.
        name: of the teacher.
        student_kwargs, teacher_kwargs: of their chat templates.

    Attributes:
        ends: the student's tokens that end an answer; they stand for the teacher's own.
        end: the teacher's token that does.
        pairs: int64 [2, n] ids of student and teacher that stand for the same bytes, each at most once.
        vocabulary: ids of the teacher's tokenizer.

    Raises:
        ConfigError: the bytes of one side's tokens cannot be told.
    """

    def __init__(
        self,
        student: Any,
        teacher: Any,
        name: str,
        student_kwargs: Mapping[str, Any] | None = None,
        teacher_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        self.tokenizer = teacher
        self.own, self.theirs = TokenBytes(student, "the student"), TokenBytes(teacher, f"teacher {name!r}")
        self.ends = set(stop_token_ids(student, None, student_kwargs))
        last = turn_end(teacher, teacher_kwargs)
        self.end: int = teacher.eos_token_id if last is None else last
        own_last = turn_end(student, student_kwargs)
        first = (student.eos_token_id if own_last is None else own_last, self.end)
        self.pairs = equal_tokens(self.own, self.theirs, first)
        self.vocabulary = vocabulary_size(teacher)
        self._names = {token: i for i, token in self.theirs.special.items()}
        # A token of the student's own, such as <think>, is the teacher's special one also where it is not special.
        markup = {i: name for i, name in self.own.added.items() if name in self._names}
        self._named = {**self.own.special, **markup}

    def turn(self, ids: Sequence[int]) -> tuple[list[int], Spans]:
        """One answer of the student in the teacher's tokens.

        Args:
            ids: the student's, as they were sampled.

        Returns:
            The teacher's ids, and the spans of both.
        """
        ended = bool(len(ids)) and int(ids[-1]) in self.ends
        text = Text(self.own, [int(i) for i in (ids[:-1] if ended else ids)], ended, self._named)
        theirs, pieces = self._encode(text)
        own_span, their_span = spans_of(text, pieces)
        if ended:
            number = max(own_span, default=-1) + 1
            theirs, own_span, their_span = [*theirs, self.end], [*own_span, number], [*their_span, number]
        return theirs, Spans(np.array(own_span, dtype=np.int64), np.array(their_span, dtype=np.int64),
                             self.pairs, self.vocabulary)  # fmt: skip

    def _encode(self, text: Text) -> tuple[list[int], list[bytes]]:
        """The teacher's ids of a text and their bytes. A token with a name is the teacher's special one of that name;
        where it has none it is read as text, as is what the student has only spelt like a special token."""
        ids: list[int] = []
        pieces: list[bytes] = []
        for name, words in text.parts:
            if name in self._names:
                found, read = [self._names[name]], [name.encode()]
            else:
                found = self._ids(words)
                read = [self.theirs.values[i] for i in found]
                if _marked(read, words):
                    read[0] = read[0][1:]  # it is no text
            ids, pieces = ids + found, pieces + read
        return ids, pieces

    def _ids(self, words: str) -> list[int]:
        def encode(text: str) -> list[int]:
            options = {"add_special_tokens": False, "split_special_tokens": True}
            return list(self.tokenizer(text, **options)["input_ids"])

        found = encode(words)
        if not _marked([self.theirs.values[i] for i in found], words):
            return found
        before = encode("\n")  # behind a line's end SentencePiece marks no beginning
        whole = encode("\n" + words)
        return whole[len(before) :] if whole[: len(before)] == before else found


def _marked(pieces: Sequence[bytes], words: str) -> bool:
    """Whether a tokenizer of the SentencePiece kind has put a space, its mark of a beginning, before a text."""
    read, plain = b"".join(pieces), words.encode()
    return len(read) - len(read.lstrip(b" ")) == len(plain) - len(plain.lstrip(b" ")) + 1
