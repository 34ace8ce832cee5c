"""Spans of equal text between a student's tokens and those in which a teacher reads them, by the bytes of both."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise

import numpy as np

from opdengine.models.rendering import shared_start
from opdengine.models.token_bytes import TokenBytes

REPLACEMENT = "\ufffd".encode()
"""What a teacher reads in place of bytes that are no character."""


class Text:
    """What a teacher reads of a student's tokens.

    Args:
        own: the bytes of the student's tokens.
        ids: of an answer, without the token that ended it.
        ended: whether it was ended; else its last bytes may be the beginning of a character, which nobody reads.
        named: ids of the tokens that have a name; default: the special ones.

    Attributes:
        parts: (name, text) in order; tokens with a name have that as text, too.
        whole: all of it in bytes.
        edges: for every token, how many bytes of ``whole`` lie before its end; -1 inside of what is no character.
        broken: for every token, whether some of its bytes are no character.
    """

    def __init__(
        self, own: TokenBytes, ids: Sequence[int], ended: bool, named: Mapping[int, str] | None = None
    ) -> None:
        named = own.special if named is None else named
        self.parts: list[tuple[str, str]] = []
        self.whole = b""
        self.edges: list[int] = []
        self.broken: list[bool] = []
        pieces = [own.values[i] if i < len(own.values) else b"" for i in ids]
        if pieces and own.strips_space and ids[0] not in named:
            pieces[0] = pieces[0].removeprefix(b" ")
        start = 0
        for place in range(len(ids) + 1):
            if place < len(ids) and ids[place] not in named:
                continue
            if start < place:
                self._add_words(pieces[start:place], last=place == len(ids) and not ended)
            if place < len(ids):
                self._add_words([pieces[place]], last=False, name=named[ids[place]])
            start = place + 1

    def _add_words(self, pieces: Sequence[bytes], *, last: bool, name: str = "") -> None:
        """Add tokens; ``last``: of an answer that was cut off."""
        raw, begin, text = b"".join(pieces), len(self.whole), b""
        edges = np.full(len(raw) + 1, -1)  # bytes of the tokens -> bytes of the text
        broken = np.zeros(len(raw), dtype=bool)
        place = edges[0] = 0
        while place < len(raw):
            try:
                raw[place:].decode()
                good, bad, cut = len(raw) - place, 0, False
            except UnicodeDecodeError as error:
                good, bad = error.start, error.end - error.start
                cut = last and place + error.end == len(raw) and error.reason == "unexpected end of data"
            edges[place : place + good + 1] = len(text) + np.arange(good + 1)
            text += raw[place : place + good] + (REPLACEMENT if bad and not cut else b"")
            broken[place + good : place + good + bad] = True
            place += good + bad
            edges[place] = -1 if cut else len(text)
        self.whole += text
        self.parts.append((name, text.decode()))
        ends = np.cumsum([0, *map(len, pieces)])
        self.edges += [int(edge) if edge < 0 else begin + int(edge) for edge in edges[ends[1:]]]
        self.broken += [bool(broken[first:end].any()) for first, end in pairwise(ends.tolist())]


def spans_of(text: Text, pieces: Sequence[bytes]) -> tuple[list[int], list[int]]:
    """The span of each of the student's and of the teacher's tokens, -1 where there is none.

    Args:
        text: of the student's tokens.
        pieces: bytes of the teacher's; where its tokenizer has changed the text (normalised it, or replaced what it
            does not know), what lies between the first and the last difference is in no span.
    """
    read = b"".join(pieces)
    same = shared_start(text.whole, read)
    most = min(len(text.whole), len(read)) - same
    behind = shared_start(text.whole[::-1][:most], read[::-1][:most])
    shift, last = len(text.whole) - len(read), len(text.whole) - behind

    def placed(end: int) -> int:
        return end if end <= same else end + shift if end >= len(read) - behind else -1

    their_edges = [placed(int(end)) for end in np.cumsum([len(piece) for piece in pieces])]
    own_at = {edge: i for i, edge in enumerate(text.edges) if edge >= 0}
    their_at = {edge: i for i, edge in enumerate(their_edges) if edge >= 0}
    own_span, their_span = [-1] * len(text.edges), [-1] * len(pieces)
    number, at, own, their = 0, 0, 0, 0
    for edge in sorted(own_at.keys() & their_at.keys()):
        own_end, their_end = own_at[edge] + 1, their_at[edge] + 1
        equal = edge <= same or at >= last
        if equal and own < own_end and their < their_end and not any(text.broken[own:own_end]):
            own_span[own:own_end] = [number] * (own_end - own)
            their_span[their:their_end] = [number] * (their_end - their)
            number += 1
        at, own, their = edge, own_end, their_end
    return own_span, their_span
