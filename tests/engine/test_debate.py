"""Debates with scripted teachers: who sees what, confidences, weights, cache."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from engine_helpers import PROMPTS, ScriptedTeacher, make_config, make_engine

from opdengine.config.loading import from_mapping
from opdengine.config.train import DebateConfig
from opdengine.data.prompts import load_prompts
from opdengine.methods.debate.contexts import DebateContexts
from opdengine.methods.debate.debate import Debate, Debater
from opdengine.methods.debate.prompts import FAMILIES, DebatePrompts, debate_prompts, parse_confidence
from opdengine.types import Batch, Prompt, Sample, SamplingParams, Turn


def prompt(text: str = "2 + 2?", **changes: Any) -> Prompt:
    return Prompt(text, ({"role": "user", "content": text},), **changes)


def speakers(count: int, rounds: int = 2) -> list[ScriptedTeacher]:
    return [
        ScriptedTeacher(f"t{k}", [f"t{k} says {r} <<CONFIDENCE={10 * k + r}>>" for r in range(rounds)])
        for k in range(count)
    ]


def debater(**changes: Any) -> Debater:
    settings: dict[str, Any] = {
        "rounds": 2, "params": SamplingParams(max_tokens=4), "prompts_for": lambda key: DebatePrompts(**PROMPTS),
    }  # fmt: skip
    return Debater(**{**settings, **changes})


def hold(debate: Debater, prompts: Sequence[Prompt], teachers: Sequence[ScriptedTeacher]) -> list[Debate]:
    return asyncio.run(debate.debate(prompts, [teachers] * len(prompts)))


# ------------------------------------------------------------------------------- who sees what


@pytest.mark.parametrize("count", [2, 3])
def test_round_one_is_blind_and_later_rounds_see_the_exact_transcript(count: int) -> None:
    teachers = speakers(count, rounds=3)
    (result,) = hold(debater(rounds=3), [prompt()], teachers)
    ask = DebatePrompts(**PROMPTS).confidence

    def entries(rounds: int) -> str:
        return "\n".join(
            f"[Expert {'ABC'[k]} Round {r + 1}]: t{k} says {r} <<CONFIDENCE={10 * k + r}>>"
            for r in range(rounds)
            for k in range(count)
        )

    for k, teacher in enumerate(teachers):
        assert len(teacher.calls) == 3
        assert teacher.asked(0) == f"<user>Q 2 + 2?{ask}<assistant>"
        for done in (1, 2):
            transcript = f"[Debate Start]\n{entries(done)}\n[Debate End]"
            assert teacher.asked(done) == f"<user>L 2 + 2? {'ABC'[k]} {transcript}{ask}<assistant>"
    assert result.rounds[2] == tuple(f"t{k} says 2 <<CONFIDENCE={10 * k + 2}>>" for k in range(count))
    assert result.confidences == tuple(10.0 * k + 2 for k in range(count))


def test_without_confidence_nobody_is_asked_for_it() -> None:
    teachers = speakers(2)
    (result,) = hold(debater(ask_confidence=False), [prompt()], teachers)
    assert all("CONFIDENCE=N" not in t.asked(r) for t in teachers for r in (0, 1))
    assert result.weights(1.0).tolist() == [0.5, 0.5]
    assert result.problems == {}


def test_equal_states_are_debated_once_and_all_states_of_a_round_at_once() -> None:
    teachers = speakers(2)
    results = hold(debater(), [prompt("a"), prompt("b"), prompt("a")], teachers)
    assert [len(call) for call in teachers[0].calls] == [2, 2]
    assert results[0] == results[2]
    seeds = [request.seed for t in teachers for call in t.calls for request in call]
    assert len(set(seeds)) == len(seeds)


def test_conversations_tools_and_tool_results_reach_the_teachers() -> None:
    messages = (
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "weather?"},
        {"role": "assistant", "content": "[call]"},
        {"role": "tool", "content": "rain"},
    )
    teachers = speakers(2)
    hold(debater(), [Prompt("x", messages, tools=({"name": "get_weather"},))], teachers)
    family = DebatePrompts(**PROMPTS)
    asked = teachers[1].asked(0)
    start = "<system>Be brief.<user>weather?<assistant>[call]<tool>rain"
    assert asked.startswith(f"{start}<user>Q {family.continuation}")
    assert "get_weather" in asked
    later = teachers[1].asked(1)
    assert later.startswith(f"{start}<user>L {family.continuation} B [Debate Start]")
    score = family.score_messages(messages, 0, [["u", "v"]])
    assert score[:-1] == list(messages)
    assert score[-1]["content"].startswith(f"S {family.continuation} | A | [Debate Start]")


def test_earlier_turns_are_kept_and_only_the_last_user_message_is_wrapped() -> None:
    messages = (
        {"role": "system", "content": "S0"},
        {"role": "user", "content": "u1"},
        {"role": "assistant", "content": "a1"},
        {"role": "user", "content": [{"type": "text", "text": "u2 "}, {"type": "text", "text": "{braces}"}]},
    )
    teachers = speakers(2)
    hold(debater(rounds=1), [Prompt("x", messages)], teachers)
    assert teachers[0].asked(0).startswith("<system>S0<user>u1<assistant>a1<user>Q u2 {braces}")


# -------------------------------------------------------------------------- confidence, weights


@pytest.mark.parametrize(
    ("text", "stated"),
    [
        ("<<CONFIDENCE=40>> then <<CONFIDENCE=70>>", 70),
        ("a << CONFIDENCE = 12.5 >> b", 12.5),
        ("<<CONFIDENCE=-3>>", -3),
        ("<<CONFIDENCE=250>>", 250),
        ("confidence 80", None),
        ("<<CONFIDENCE=high>>", None),
        ("<<CONFIDENCE=80>", None),
        ("", None),
        ("<think>I would say <<CONFIDENCE=20>>.</think> 4 <<CONFIDENCE=90>>", 90),
        ("<think>I would say <<CONFIDENCE=20>>.</think> 4", None),
        ("4 <<CONFIDENCE=90>> <think>or rather <<CONFIDENCE=20>>", None),
        ("I would say <<CONFIDENCE=20>>.</think> 4 <<CONFIDENCE=90>>", 90),
        ("[THINK]I would say <<CONFIDENCE=20>>", None),
    ],
)
def test_the_last_tag_outside_of_thoughts_is_the_confidence(text: str, stated: float | None) -> None:
    assert parse_confidence(text) == stated


def test_a_thought_that_the_prompt_opens_hides_a_confidence_until_it_ends() -> None:
    teachers = [
        ScriptedTeacher("a", ["x", "let me see, <<CONFIDENCE=50>>"], opening="<think>"),
        ScriptedTeacher("b", ["x", "<<CONFIDENCE=10>>?</think>y <<CONFIDENCE=70>>"], opening="<think>"),
    ]
    (result,) = hold(debater(), [prompt()], teachers)
    assert result.confidences == (None, 70.0)
    assert result.problems == {"missing_confidence": 1}


def test_confidences_out_of_range_are_clamped_and_counted() -> None:
    teachers = [
        ScriptedTeacher("a", ["<<CONFIDENCE=50>>", "x <<CONFIDENCE=300>>"]),
        ScriptedTeacher("b", ["<<CONFIDENCE=50>>", "y <<CONFIDENCE=-5>>"]),
    ]
    (result,) = hold(debater(), [prompt()], teachers)
    assert result.confidences == (100.0, 0.0)
    assert result.problems == {"clamped_confidence": 2}
    expected = np.exp([1.0, 0.0]) / np.exp([1.0, 0.0]).sum()
    np.testing.assert_allclose(result.weights(1.0), expected, rtol=1e-6)


def test_only_the_last_round_counts_and_a_missing_one_makes_all_weights_equal() -> None:
    teachers = [
        ScriptedTeacher("a", ["<<CONFIDENCE=10>>", "y <<CONFIDENCE=90>>"]),
        ScriptedTeacher("b", ["<<CONFIDENCE=90>>", "forgot"]),
        ScriptedTeacher("c", ["none", "z <<CONFIDENCE=20>>"]),
    ]
    (result,) = hold(debater(), [prompt()], teachers)
    assert result.confidences == (90.0, None, 20.0)
    assert result.problems == {"missing_confidence": 1}
    np.testing.assert_allclose(result.weights(1.0), [1 / 3] * 3, rtol=1e-6)


def test_an_empty_turn_is_counted_and_makes_all_weights_equal() -> None:
    teachers = [ScriptedTeacher("a", ["x", "y <<CONFIDENCE=90>>"]), ScriptedTeacher("b", ["x", "  "])]
    (result,) = hold(debater(), [prompt()], teachers)
    assert result.problems == {"missing_confidence": 1, "empty_turn": 1}
    assert result.weights(1.0).tolist() == [0.5, 0.5]


@pytest.mark.parametrize("tau", [0.1, 1.0, 7.0])
@pytest.mark.parametrize("stated", [(90, 80), (0, 100), (85, 60, 30), (5, 5, 5)])
def test_weights_are_equation_7(stated: tuple[float, ...], tau: float) -> None:
    names = tuple("abc"[: len(stated)])
    debate = Debate(names, (tuple("x" * len(stated)),), stated, {})
    raw = [np.exp(c / 100 / tau) for c in stated]
    np.testing.assert_allclose(debate.weights(tau), np.array(raw) / sum(raw), rtol=1e-5)


def test_an_infinite_tau_is_uniform_in_the_same_debates() -> None:
    """The control of the confidences that changes nothing of what the teachers are asked."""
    config = from_mapping(DebateConfig, {"tau": float("inf"), "prompts": PROMPTS})
    assert DebateContexts(config, None).debater.ask_confidence
    assert Debate(("a", "b"), (("x", "y"),), (100.0, 0.0), {}).weights(config.tau).tolist() == [0.5, 0.5]


def test_known_values_of_equation_7() -> None:
    for stated, weight in [((95, 90), 0.512), ((90, 80), 0.525), ((85, 60), 0.562), ((100, 0), 0.731)]:
        assert Debate(("a", "b"), (("x", "y"),), stated, {}).weights(1.0)[0] == pytest.approx(weight, abs=5e-4)


# -------------------------------------------------------------------------------------- cache


def files(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.json"))


def test_a_second_run_generates_nothing(tmp_path: Path) -> None:
    first = debater(cache_dir=tmp_path)
    before = hold(first, [prompt("a"), prompt("b")], speakers(2))
    assert (first.generated, first.cached) == (2, 0)
    silent = [ScriptedTeacher(f"t{k}", []) for k in range(2)]
    second = debater(cache_dir=tmp_path)
    assert hold(second, [prompt("a"), prompt("b")], silent) == before
    assert (second.generated, second.cached) == (0, 2)
    assert not any(t.calls for t in silent)


def test_a_debate_of_more_rounds_continues_the_stored_one(tmp_path: Path) -> None:
    hold(debater(cache_dir=tmp_path, rounds=1), [prompt()], speakers(2))
    teachers = [ScriptedTeacher(f"t{k}", [f"t{k} goes on"]) for k in range(2)]
    (longer,) = hold(debater(cache_dir=tmp_path, rounds=2), [prompt()], teachers)
    assert longer.rounds == (
        ("t0 says 0 <<CONFIDENCE=0>>", "t1 says 0 <<CONFIDENCE=10>>"),
        ("t0 goes on", "t1 goes on"),
    )
    assert "[Expert B Round 1]: t1 says 0" in teachers[0].asked(0)
    (shorter,) = hold(debater(cache_dir=tmp_path, rounds=1), [prompt()], [ScriptedTeacher(f"t{k}", []) for k in (0, 1)])
    assert shorter.rounds == longer.rounds[:1]
    assert shorter.confidences == (0.0, 10.0)


def test_what_a_debate_depends_on_is_in_its_key(tmp_path: Path) -> None:
    hold(debater(cache_dir=tmp_path), [prompt()], speakers(2))
    count = len(files(tmp_path))
    other_weights = speakers(2)
    other_weights[1].fingerprint = "fine-tuned"
    family = DebatePrompts(**{**PROMPTS, "later": "Go on: {task} {transcript}"})
    cases = [
        (debater(cache_dir=tmp_path, params=SamplingParams(max_tokens=4, seed=1)), prompt(), speakers(2)),
        (debater(cache_dir=tmp_path, params=SamplingParams(max_tokens=4, temperature=0.3)), prompt(), speakers(2)),
        (debater(cache_dir=tmp_path, prompts_for=lambda key: family), prompt(), speakers(2)),
        (debater(cache_dir=tmp_path, ask_confidence=False), prompt(), speakers(2)),
        (debater(cache_dir=tmp_path), prompt(tools=({"name": "f"},)), speakers(2)),
        (debater(cache_dir=tmp_path), prompt(), other_weights),
        (debater(cache_dir=tmp_path), prompt(), speakers(3)),
        (debater(cache_dir=tmp_path), prompt(), speakers(2)[::-1]),
    ]
    for number, (other, state, teachers) in enumerate(cases, start=1):
        hold(other, [state], teachers)
        assert other.generated == 1, number
        assert len(files(tmp_path)) == count + number
    # The answer and the id of a prompt are no part of its state.
    again = debater(cache_dir=tmp_path)
    hold(again, [dataclasses.replace(prompt(), id="renamed", answer="4")], speakers(2))
    assert again.generated == 0


def test_tau_is_applied_after_the_cache(tmp_path: Path) -> None:
    rollout = Sample("0", prompt(), (Turn("prompt", np.array([1, 2])), Turn("assistant", np.array([3]), trains=True)))
    mixes = []
    for tau, teachers in [(1.0, speakers(2)), (0.2, [ScriptedTeacher(f"t{k}", []) for k in range(2)])]:
        config = DebateConfig(tau=tau, prompts=PROMPTS, max_tokens=4)
        asyncio.run(DebateContexts(config, tmp_path)(Batch(samples=[rollout]), teachers))
        mixes.append(rollout.mix)
    for tau, mix in zip((1.0, 0.2), mixes, strict=True):
        raw = np.exp(np.array([1, 11]) / 100 / tau)
        np.testing.assert_allclose(mix, raw / raw.sum(), rtol=1e-5)


@pytest.mark.parametrize(
    "content", ['{"rounds": [["a"', "", "[1, 2]", '{"rounds": [[1, 2]], "truncated": [0]}', b"\xff"]
)
def test_an_unreadable_stored_debate_is_held_again(
    tmp_path: Path, content: str | bytes, caplog: pytest.LogCaptureFixture
) -> None:
    before = hold(debater(cache_dir=tmp_path), [prompt()], speakers(2))
    (file,) = files(tmp_path)
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    again = debater(cache_dir=tmp_path)
    with caplog.at_level(logging.WARNING):
        assert hold(again, [prompt()], speakers(2)) == before
    assert str(file) in caplog.text
    assert (again.generated, again.unreadable) == (1, 1)
    third = debater(cache_dir=tmp_path)
    hold(third, [prompt()], speakers(2))
    assert third.generated == 0  # it was repaired


def test_what_a_killed_run_left_half_written_is_ignored(tmp_path: Path) -> None:
    hold(debater(cache_dir=tmp_path), [prompt()], speakers(2))
    (file,) = files(tmp_path)
    file.rename(file.with_suffix(".123.tmp"))
    again = debater(cache_dir=tmp_path)
    hold(again, [prompt()], speakers(2))
    assert (again.generated, again.unreadable) == (1, 0)


# ------------------------------------------------------------------------------------- windows


def test_a_debate_that_outgrows_a_window_is_dropped_and_counted() -> None:
    roomy = ScriptedTeacher("a", lambda call, request: "long " * 60)
    narrow = ScriptedTeacher("b", lambda call, request: "x", window=400)
    rollout = Sample("0", prompt(), (Turn("prompt", np.array([1, 2])), Turn("assistant", np.array([3]), trains=True)))
    config = DebateConfig(prompts=PROMPTS, max_tokens=4)
    batch = Batch(samples=[rollout])
    asyncio.run(DebateContexts(config, None)(batch, [roomy, narrow]))
    assert rollout.drop == "debate_too_long"
    assert batch.metrics["debate/failed"] == 1
    assert len(narrow.calls) == 1  # round 2 was not asked for


def test_a_debate_that_did_not_fit_goes_on_with_a_larger_window(tmp_path: Path) -> None:
    """What a served teacher can read is decided where it is served; it is not part of the key."""
    teachers = [ScriptedTeacher(name, lambda call, request: "long " * 60) for name in "ab"]
    teachers[1].window = 400
    first = debater(cache_dir=tmp_path)
    (failed,) = hold(first, [prompt()], teachers)
    assert failed.failed == "debate_too_long" and first.generated == 1
    again = debater(cache_dir=tmp_path)
    assert hold(again, [prompt()], teachers)[0] == failed and (again.generated, again.cached) == (0, 0)
    teachers[1].window = 4000
    (held,) = hold(again, [prompt()], teachers)
    assert not held.failed and len(held.rounds) == 2 and again.generated == 1
    assert [len(teacher.calls) for teacher in teachers] == [2, 2]  # round 1 came from the cache


def test_dropped_debates_appear_in_the_metrics_of_the_step(
    models: dict[str, str], prompt_file: str, tmp_path: Path
) -> None:
    engine = make_engine(make_config(models, prompt_file, tmp_path, method="mad_opd"))
    engine.teachers[0].backbone.model.config.max_position_embeddings = 60
    metrics = asyncio.run(engine.step(load_prompts([prompt_file]).prompts[:3])).metrics
    assert metrics["dropped/debate_too_long"] == 3
    assert metrics["completions/kept"] == 0
    assert metrics["skipped_steps"] == 1


# ------------------------------------------------------------------------ independence of the student


def test_the_students_answer_enters_no_debate(models: dict[str, str], prompt_file: str, tmp_path: Path) -> None:
    engine = make_engine(make_config(models, prompt_file, tmp_path, method="mad_opd"))
    asked: list[list[int]] = []
    for teacher in engine.teachers:
        plain = teacher.generate

        async def generate(requests: Any, params: Any, plain: Any = plain) -> Any:
            asked.extend(list(r.token_ids) for r in requests)
            return await plain(requests, params)

        teacher.generate = generate
    prompts = load_prompts([prompt_file]).prompts[:4]
    result = asyncio.run(engine.step(prompts))
    assert len(asked) == 4 * 2 * 2

    def inside(short: list[int], long: list[int]) -> bool:
        return any(long[i : i + len(short)] == short for i in range(len(long)))

    for rollout in result.samples:
        assert not any(inside(rollout.target_ids.tolist(), ids) for ids in asked if len(rollout.target_ids) > 2)
    # Another student: other answers, and not one debate to generate.
    with torch.no_grad():
        for parameter in engine.student.model.parameters():
            parameter.mul_(1.5)
    again = asyncio.run(engine.step(prompts))
    assert [r.target_ids.tolist() for r in again.samples] != [r.target_ids.tolist() for r in result.samples]
    assert again.metrics["debate/generated"] == 0
    assert len(asked) == 4 * 2 * 2


# -------------------------------------------------------------------------------- prompt families


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_shows_the_task_and_the_transcript(family: str) -> None:
    prompts = debate_prompts(family)
    messages = prompt("THE TASK").messages
    first = prompts.first_messages(messages, 1, True)[-1]["content"]
    later = prompts.later_messages(messages, 1, [["said A", "said B"]], True)[-1]["content"]
    score = prompts.score_messages(messages, 1, [["said A", "said B"]])[-1]["content"]
    assert "THE TASK" in first and "<<CONFIDENCE=N>>" in first and "said A" not in first
    for text in (later, score):
        assert "THE TASK" in text and "Expert B" in text
        assert "[Expert A Round 1]: said A\n[Expert B Round 1]: said B" in text
    assert "<<CONFIDENCE=N>>" in later and "CONFIDENCE" not in score


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("chess", "unknown debate prompts 'chess'.*generic"),
        ({"first": "{task}", "later": "{task} {transcript}"}, "lack.*score"),
        ({**PROMPTS, "later": "{task}"}, "'later' lacks the placeholder.*transcript"),
        ({**PROMPTS, "score": "{task} {transcript} {answer}"}, "unknown placeholders.*answer"),
        ({**PROMPTS, "frist": "x"}, "no field.*frist"),
    ],
)
def test_bad_families_are_refused(spec: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        debate_prompts(spec)


def test_families_by_routing_key() -> None:
    config = DebateConfig(prompts={"code": "code", "default": PROMPTS})
    contexts = DebateContexts(config, None)
    assert contexts.prompts_for("code") == FAMILIES["code"]
    assert contexts.prompts_for("else") == DebatePrompts(**PROMPTS)


def test_debates_are_logged_with_their_weights(models: dict[str, str], prompt_file: str, tmp_path: Path) -> None:
    engine = make_engine(make_config(models, prompt_file, tmp_path, method="mad_opd"))
    records = asyncio.run(engine.step(load_prompts([prompt_file]).prompts[:2])).records
    assert [r["prompt_id"] for r in records] == ["p0", "p1"]
    for record in json.loads(json.dumps(records)):
        assert len(record["rounds"]) == 2 and len(record["rounds"][0]) == 2
        assert record["weights"] == [0.5, 0.5]
        assert record["problems"]["missing_confidence"] == 2
