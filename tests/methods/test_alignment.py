"""Spans of equal text between the tokens of two tokenizers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from tokenizers import AddedToken
from tokenizers_of_tests import byte_level, sentencepiece, word_piece

from opdengine.errors import ConfigError
from opdengine.models.alignment import Alignment
from opdengine.types import Spans


@pytest.fixture(scope="module")
def kinds(tokenizer: Any) -> dict[str, Any]:
    return {"tests": tokenizer, "bytes": byte_level(), "pieces": sentencepiece()}


@pytest.fixture(scope="module")
def alignments(kinds: dict[str, Any]) -> dict[tuple[str, str], Alignment]:
    return {(a, b): Alignment(kinds[a], kinds[b], b) for a in kinds for b in kinds}


PAIRS = [(a, b) for a in ("tests", "bytes", "pieces") for b in ("tests", "bytes", "pieces")]


def words(alignment: Alignment, ids: list[int], theirs: list[int], spans: Spans) -> list[tuple[bytes, bytes]]:
    """What the two sides of every span say."""
    return [
        tuple(
            b"".join(side.values[i] for i, n in zip(tokens, of, strict=True) if n == number)
            for side, tokens, of in ((alignment.own, ids, spans.student), (alignment.theirs, theirs, spans.teacher))
        )
        for number in range(len(spans.lengths))
    ]  # type: ignore[misc]


LETTERS = [*"the answer is  forty two\n\t.0123456789<|_", "\u00e9", "\u4f60", "\U0001f642", "\u200b"]


@pytest.mark.parametrize("pair", PAIRS)
@pytest.mark.parametrize("seed", range(20))
def test_spans_hold_the_same_bytes(alignments: Any, kinds: Any, pair: tuple[str, str], seed: int) -> None:
    """Any text is covered; spans come in order, have tokens on both sides and end wherever both have a boundary."""
    random = np.random.default_rng(seed)
    text, ended = "".join(random.choice(LETTERS, size=random.integers(30))), bool(seed % 2)
    alignment, student = alignments[pair], kinds[pair[0]]
    ids = student.encode(text, add_special_tokens=False, split_special_tokens=True)
    theirs, spans = alignment.turn([*ids, student.eos_token_id] if ended else ids)
    said = words(alignment, ids + [student.eos_token_id] * ended, theirs, spans)
    if ended:
        assert theirs[-1] == kinds[pair[1]].eos_token_id == alignment.end
        assert spans.student[-1] == spans.teacher[-1] == len(said) - 1
        said = said[:-1]
    if said and said[0][0] != said[0][1]:  # where SentencePiece marks the beginning
        assert "pieces" in pair and {*said[0]} == {min(said[0], key=len), b" " + min(said[0], key=len)}
    assert all(one == other for one, other in said[1:])
    assert b"".join(one for one, _ in said).decode() in (text, f" {text}")
    for side in (spans.student, spans.teacher):
        assert (side >= 0).all() and (np.diff(side) >= 0).all() and (np.diff(side) <= 1).all()
    if pair[0] == pair[1] != "pieces":
        assert spans.one_to_one.all() and theirs[: len(ids)] == ids


def test_boundaries_that_agree_cut(alignments: Any, kinds: Any) -> None:
    alignment = alignments["tests", "bytes"]
    ids = kinds["tests"].encode("the answer", add_special_tokens=False)
    theirs, spans = alignment.turn(ids)
    assert [alignment.theirs.values[i] for i in theirs] == [b"the", b" answer"]
    assert words(alignment, ids, theirs, spans) == [(b"the", b"the"), (b" answer", b" answer")]
    assert spans.lengths.tolist() == [spans.student.tolist().count(0), spans.student.tolist().count(1)]


def test_parts_of_characters(alignments: Any, kinds: Any) -> None:
    """What was cut off inside of a character is read by nobody; inside of a text it is U+FFFD, and not judged."""
    alignment = alignments["tests", "pieces"]
    ids = kinds["tests"].encode("a\U0001f642", add_special_tokens=False)
    theirs, spans = alignment.turn(ids[:-1])
    assert spans.student.tolist() == [0, -1, -1, -1]
    assert [alignment.theirs.values[i] for i in theirs] in ([b"a"], [b" a"])
    more = kinds["tests"].encode("b", add_special_tokens=False)
    for end in ([], [kinds["tests"].eos_token_id]):
        theirs, spans = alignment.turn([*ids[:-1], *more, *end])
        assert spans.student.tolist() == [0, -1, -1, -1, *range(1, 2 + len(end))]
        assert b"\xef\xbf\xbd" in b"".join(alignment.theirs.values[i] for i in theirs)
    theirs, spans = alignment.turn([*ids[:-1], *end])
    assert spans.student.tolist() == [0, -1, -1, -1, 1] and (spans.teacher == -1).sum() == 3


def test_no_token_has_no_span(alignments: Any) -> None:
    for alignment in alignments.values():
        theirs, spans = alignment.turn([])
        assert theirs == [] and len(spans.student) == len(spans.lengths) == 0
        assert len(spans.pooled(np.zeros(0))) == len(spans.shared(np.zeros(0))) == 0


def test_special_tokens_by_role_and_by_name(kinds: Any) -> None:
    """The end is the other's end; a special token is the other's of that name, else text; spelt ones stay text."""
    one, other = byte_level(), kinds["tests"]
    spelt = one.encode("<think></s>", add_special_tokens=False, split_special_tokens=True)
    think = one.convert_tokens_to_ids("<think>")
    same = Alignment(one, sentencepiece(), "t")
    theirs, spans = same.turn([think, *spelt, one.eos_token_id])
    assert theirs[0] == same.tokenizer.convert_tokens_to_ids("<think>") and theirs[-1] == same.tokenizer.eos_token_id
    assert not {theirs[0], theirs[-1]} & set(theirs[1:-1]) and spans.student[0] == 0 and spans.teacher[0] == 0
    theirs, spans = Alignment(one, other, "t").turn([think, one.eos_token_id])
    assert len(theirs) > 2 and spans.teacher.tolist() == [0] * (len(theirs) - 1) + [1]
    assert [one.eos_token_id, other.eos_token_id] in Alignment(one, other, "t").pairs.T.tolist()


def test_markup_is_one_token_where_only_one_side_calls_it_special() -> None:
    """<think> of Qwen is an added token that is not special: a teacher whose own is special reads that, no letters."""
    kinds = []
    for special in (True, False):
        tokenizer = byte_level()
        tokenizer.add_tokens([AddedToken("<call>", special=special, normalized=False)])
        kinds.append(tokenizer)
    for one, other in (kinds, kinds[::-1]):
        alignment, own = Alignment(one, other, "t"), one.convert_tokens_to_ids("<call>")
        theirs, spans = alignment.turn([*one.encode("fox ", add_special_tokens=False), own, one.eos_token_id])
        there = other.convert_tokens_to_ids("<call>")
        assert theirs[-2:] == [there, other.eos_token_id] and spans.one_to_one[-2:].all()
        assert [own, there] in alignment.pairs.T.tolist()


def test_a_tokenizer_that_changes_the_text_says_nothing_of_what_it_changed(kinds: Any) -> None:
    alignment = Alignment(kinds["tests"], byte_level(lower=True), "t")
    ids = kinds["tests"].encode("ab X cd Y ef", add_special_tokens=False)
    theirs, spans = alignment.turn(ids)
    assert b"".join(alignment.theirs.values[i] for i in theirs) == b"ab x cd y ef"
    kept = b"".join(alignment.own.values[i] for i, n in zip(ids, spans.student, strict=True) if n >= 0)
    assert kept == b"ab  ef" or kept == b"ab ef"
    assert (spans.shared(np.ones(len(theirs)))[spans.student < 0] != 0).all()  # NaN


def test_pairs_are_tokens_of_equal_bytes(alignments: Any) -> None:
    for pair, alignment in alignments.items():
        own, theirs = alignment.pairs
        assert len(set(own.tolist())) == len(own) and len(set(theirs.tolist())) == len(theirs)
        for i, j in alignment.pairs.T.tolist()[1:]:
            assert alignment.own.values[i] == alignment.theirs.values[j] != b""
        if pair[0] == pair[1]:
            named = [i for i, value in enumerate(alignment.own.values) if value]
            assert sorted(own.tolist()) == sorted(theirs.tolist()) == named
    pieces = alignments["tests", "pieces"]
    assert len(pieces.pairs[0]) >= 256  # every byte has a token on both sides


def test_sums_over_spans() -> None:
    spans = Spans(np.array([0, 0, -1, 1]), np.array([0, 1, 1, -1]), np.zeros((2, 0), dtype=np.int64), 9)
    assert spans.pooled(np.array([1.0, 2.0, np.nan, 4.0])).tolist() == [3, 3, 0, 4]
    np.testing.assert_array_equal(spans.shared(np.array([1.0, 2.0, 3.0, 9.0])), [0.5, 0.5, np.nan, 5])
    assert spans.one_to_one.tolist() == [False, False, False, False]
    both = Spans.joined([spans, spans], spans.pairs, 9)
    assert both.student.tolist() == [0, 0, -1, 1, 2, 2, -1, 3] and both.teacher.tolist() == [0, 1, 1, -1, 2, 3, 3, -1]


def test_what_cannot_be_told_is_refused(tokenizer: Any) -> None:
    with pytest.raises(ConfigError, match=r"teacher 't'.*WordPiece.*use another model"):
        Alignment(tokenizer, word_piece(), "t")

    class Slow:
        pass

    with pytest.raises(ConfigError, match="the student: its tokenizer Slow is not a fast one"):
        Alignment(Slow(), tokenizer, "t")
