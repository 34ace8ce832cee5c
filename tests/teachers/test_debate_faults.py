"""Debates with teachers behind a server that fails: turns, weights, counts and the cache."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
from engine_helpers import PROMPTS
from teacher_helpers import Server, served

from opdengine.methods.debate.contexts import debate_metrics
from opdengine.methods.debate.debate import Debater
from opdengine.methods.debate.prompts import debate_prompts
from opdengine.teachers import TeacherError
from opdengine.types import Prompt, SamplingParams

PARAMS = SamplingParams(max_tokens=5, temperature=0.7)
SAY = "{seed} <<CONFIDENCE=90>>"


def debater(folder: Path, rounds: int = 2) -> Debater:
    return Debater(rounds=rounds, params=PARAMS, prompts_for=lambda key: debate_prompts(PROMPTS), cache_dir=folder)


def prompt(number: int = 0) -> Prompt:
    return Prompt(f"p{number}", ({"role": "user", "content": f"What is {number}?"},))


def debate(where: Debater, teachers: list[Any], *prompts: Prompt) -> Any:
    return asyncio.run(where.debate(list(prompts), [teachers] * len(prompts)))


def two(server: Server, tokenizer: Any, **settings: Any) -> list[Any]:
    """Teachers "a" and "b" behind one server, one call at a time."""
    return [
        served(server, tokenizer, name=name, **{"max_retries": 0, "max_concurrency": 1, **settings}) for name in "ab"
    ]


@pytest.mark.parametrize("kind", ["500", "hang", "half_json", "garbage"])
def test_a_teacher_that_fails_in_a_round_says_nothing_there(
    bigrams: Server, tokenizer: Any, tmp_path: Path, kind: str
) -> None:
    teachers = two(bigrams, tokenizer, timeout=1.5 if kind == "hang" else 20.0)
    bigrams.control(say=SAY, faults=[{"kind": kind, "after": 2, "times": 1}])  # one turn of round 2
    where = debater(tmp_path)
    (found,) = debate(where, teachers, prompt())
    assert not found.failed
    assert all(found.rounds[0]) and sorted(map(bool, found.rounds[1])) == [False, True]
    assert found.problems == {"empty_turn": 1, "missing_confidence": 1}
    assert found.weights(1.0).tolist() == [0.5, 0.5]
    metrics = debate_metrics([found], 1.0)
    assert metrics["debate/empty_turn"] == 1.0 and metrics["debate/failed"] == 0.0
    counts = {k: v for t in teachers for k, v in t.counts().items()}
    assert sum(counts.values()) == 1.0 and next(iter(counts)).startswith("teacher_failures/")
    # It is not kept: the next time the server answers, and that debate is.
    assert not list(tmp_path.rglob("*.json"))
    (whole,) = debate(where, teachers, prompt())
    assert not whole.problems and len(list(tmp_path.rglob("*.json"))) == 1
    assert whole.rounds[0] == found.rounds[0]
    assert debate(where, teachers, prompt()) == [whole] and where.generated == 2


def test_other_debates_of_the_batch_are_kept(bigrams: Server, tokenizer: Any, tmp_path: Path) -> None:
    teachers = two(bigrams, tokenizer)
    bigrams.control(say=SAY, faults=[{"kind": "500", "after": 5, "times": 1}])  # 6 turns in round 1
    found = debate(debater(tmp_path), teachers, *(prompt(i) for i in range(3)))
    assert sorted(bool(d.problems) for d in found) == [False, False, True]
    assert len(list(tmp_path.rglob("*.json"))) == 2


def test_without_any_teacher_there_is_no_debate(bigrams: Server, tokenizer: Any, tmp_path: Path) -> None:
    teachers = two(bigrams, tokenizer)
    bigrams.control(say=SAY, faults=[{"kind": "500", "after": 2}])
    (found,) = debate(debater(tmp_path), teachers, prompt())
    assert found.failed == "teacher_failure" and found.rounds == ()
    assert not list(tmp_path.rglob("*.json"))


def test_a_failure_ends_the_debate_where_it_should(bigrams: Server, tokenizer: Any, tmp_path: Path) -> None:
    teachers = two(bigrams, tokenizer, stop=True)
    bigrams.control(say=SAY, faults=[{"kind": "503", "after": 3}])
    with pytest.raises(TeacherError, match=r"teacher '[ab]' failed \(http_503\)"):
        debate(debater(tmp_path), teachers, prompt())
    assert not list(tmp_path.rglob("*.json"))


def test_a_teacher_without_a_confidence_and_one_that_loops(
    bigrams: Server, real_server: Server, tokenizer: Any, tmp_path: Path
) -> None:
    quiet, looping = two(bigrams, tokenizer)[0], two(real_server, tokenizer)[1]
    bigrams.control(say="I do not say how sure I am.")
    real_server.control()  # a random model writes until max_tokens
    (found,) = debate(debater(tmp_path), [quiet, looping], prompt())
    assert found.problems["missing_confidence"] == 2
    assert found.problems["truncated_turn"] >= 1
    assert found.weights(1.0).tolist() == [0.5, 0.5]
    assert debate_metrics([found], 1.0)["debate/parse_failures"] == 2.0
