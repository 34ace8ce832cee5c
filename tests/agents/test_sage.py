"""SAGE-OPD: the worked numbers of the method, the judge, and what skipped turns cost."""

from __future__ import annotations

import asyncio
import dataclasses
import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from agent_helpers import context, make_rollout
from engine_helpers import ScriptedTeacher, make_config, make_engine
from torch.utils.flop_counter import FlopCounterMode

from opdengine.config.train import ConfigError, SageConfig, TcodConfig, TrainConfig
from opdengine.loss.objective import normalisers
from opdengine.loss.statistics import Statistics
from opdengine.methods import build_method
from opdengine.methods.agent_baselines import FirstTurns, KeptMean
from opdengine.methods.sage_judge import Judge, Verdict, turn_metrics
from opdengine.methods.method import Batch, Note, Stats
from opdengine.methods.opad import steps_of
from opdengine.methods.opd import PlainContexts
from opdengine.methods.sage_opd import Control, Intervention, Selective
from opdengine.training.step_result import Clock, Prepared, summarise
from opdengine.types import Sample

LENGTHS, KL, TOP1 = (4, 6, 10), (0.5, 0.2, 0.3), (0.9, 0.8, 0.6)
LABELS = (0.0, 0.5, 1.0)


def batch_of(rollouts: Sequence[Sample], weights: Sequence[Sequence[float]], top1: Sequence[Sequence[float]]) -> Batch:
    """Turn weights and teacher confidences of every trajectory, given per turn of the student."""
    notes, stats = [], []
    for rollout, of_turns, confidences in zip(rollouts, weights, top1, strict=True):
        per_turn = np.zeros(len(rollout.turns), dtype=np.float32)
        per_turn[1::2] = of_turns
        notes.append(Note((context(rollout),), np.ones(1, dtype=np.float32), per_turn))
        known = np.zeros(len(rollout.turns))
        known[1::2] = confidences
        stats.append(Stats(teacher_top1=known[rollout.target_turns][:, None].astype(np.float32)))
    return Batch(rollouts, notes, stats)


def loss_of(batch: Batch, config: SageConfig, kl: Sequence[Sequence[float]]) -> float:
    """The loss that the signals give when every token of a turn has the same divergence."""
    signals = Selective(config)(batch).signals
    scales = normalisers(batch.rollouts, "token")
    total = 0.0
    for rollout, signal, scale, of_turns in zip(batch.rollouts, signals, scales, kl, strict=True):
        per_turn = np.zeros(len(rollout.turns))
        per_turn[1::2] = of_turns
        total += scale * float((signal.kl_weight * per_turn[rollout.target_turns]).sum())
    return total


@pytest.mark.parametrize(
    ("changes", "weights", "expected"),
    [
        ({}, LABELS, 0.2714286),
        ({"normalization": "active_tokens"}, LABELS, 0.2171429),
        ({"normalization": "none"}, LABELS, 0.114),
        ({"use_confidence": False, "normalization": "none"}, LABELS, 0.18),
        ({"use_confidence": False, "normalization": "none"}, (1, 1, 1), 0.31),
        ({"use_confidence": False}, LABELS, (0.5 * 6 * 0.2 + 10 * 0.3) / 13),  # the arm the paper lacks
    ],
)
def test_the_worked_example(changes: dict[str, Any], weights: Sequence[float], expected: float) -> None:
    batch = batch_of([make_rollout(LENGTHS)], [weights], [TOP1])
    assert loss_of(batch, SageConfig(**changes), [KL]) == pytest.approx(expected, rel=1e-6)


def test_weights_of_the_worked_example() -> None:
    batch = batch_of([make_rollout(LENGTHS)], [LABELS], [TOP1])
    weighed = Selective(SageConfig())(batch)
    assert weighed.metrics["sage/z"] == pytest.approx(2.380952, rel=1e-6)
    weight = weighed.signals[0].kl_weight
    np.testing.assert_allclose(weight, np.repeat([0, 0.952381, 1.428571], LENGTHS), rtol=1e-6)
    assert weight.sum() == pytest.approx(20, rel=1e-6)


def test_all_strong_with_equal_confidence_is_plain_opd() -> None:
    batch = batch_of([make_rollout(LENGTHS)], [(1, 1, 1)], [(0.7, 0.7, 0.7)])
    assert loss_of(batch, SageConfig(), [KL]) == pytest.approx(0.31, rel=1e-6)


def test_the_scale_of_the_confidences_does_not_matter() -> None:
    rollouts = [make_rollout(LENGTHS, name="a"), make_rollout((3, 5), name="b", seed=1)]
    weights, kl = [LABELS, (1, 0.5)], [KL, (0.1, 0.9)]
    full = loss_of(batch_of(rollouts, weights, [TOP1, (0.5, 0.3)]), SageConfig(), kl)
    half = loss_of(batch_of(rollouts, weights, [np.array(TOP1) / 2, (0.25, 0.15)]), SageConfig(), kl)
    assert full == pytest.approx(half, rel=1e-6)


def test_z_is_of_the_batch_or_of_each_trajectory() -> None:
    rollouts = [make_rollout((4,), name="weak"), make_rollout((4,), name="strong", seed=1)]
    batch = batch_of(rollouts, [(0.5,), (1.0,)], [(1,), (1,)])
    whole = [s.kl_weight[0] for s in Selective(SageConfig())(batch).signals]
    np.testing.assert_allclose(whole, [2 / 3, 4 / 3], rtol=1e-6)
    each = [s.kl_weight[0] for s in Selective(SageConfig(normalization_scope="trajectory"))(batch).signals]
    np.testing.assert_allclose(each, [1, 1], rtol=1e-6)


def test_z_can_be_bounded() -> None:
    batch = batch_of([make_rollout((1, 99))], [(1, 0)], [(1, 1)])
    assert Selective(SageConfig())(batch).metrics["sage/z"] == pytest.approx(100)
    assert Selective(SageConfig(z_max=5.0))(batch).metrics["sage/z"] == pytest.approx(5)


@pytest.mark.parametrize(
    ("reply", "label", "weight"),
    [
        ("skip.", "skip", 0.0),
        ("Strong", "strong", 1.0),
        ("weak", "weak", 0.5),
        ("SKIP or WEAK", "unparsed", 1.0),
        ("", "unparsed", 1.0),
        ("<think>SKIP? no</think>\nWEAK", "weak", 0.5),
        ("<think>never ends, SKIP", "unparsed", 1.0),
        ("STRONGLY", "unparsed", 1.0),
        ("SKIP? no, it is worse</think>\nWEAK", "weak", 0.5),
    ],
)
def test_what_the_judge_says(reply: str, label: str, weight: float) -> None:
    teacher = ScriptedTeacher("t", [reply])
    rollout = make_rollout((2,))
    annotator = Intervention(SageConfig(), PlainContexts())
    found = asyncio.run(annotator.annotate([rollout], [teacher]))
    assert found.notes[0].turn_weight is not None
    assert found.notes[0].turn_weight[1] == pytest.approx(weight)
    assert found.metrics[f"sage/{label}"] == 1


def test_failures_are_not_put_to_the_judge() -> None:
    rollout = make_rollout((2, 2, 2), failures=("", "execution", ""))
    teacher = ScriptedTeacher("t", lambda call, request: "SKIP")
    found = asyncio.run(Intervention(SageConfig(), PlainContexts()).annotate([rollout], [teacher]))
    assert [len(call) for call in teacher.calls] == [2]
    assert found.notes[0].turn_weight is not None
    np.testing.assert_array_equal(found.notes[0].turn_weight[1::2], [0, 1, 0])
    assert found.metrics["sage/det_fail"] == pytest.approx(1 / 3)


def test_a_turn_that_is_empty_or_cut_off_is_a_failure_whatever_the_environment_made_of_it() -> None:
    rollout = make_rollout((2, 2, 2, 1), texts=("look", "go", "take", " "))
    for turn, reason in zip(rollout.turns[1::2], ("stop", "length", "stop", "stop"), strict=True):
        turn.info["stop_reason"] = reason  # type: ignore[index]
    teacher = ScriptedTeacher("t", lambda call, request: "SKIP")
    found = asyncio.run(Intervention(SageConfig(), PlainContexts()).annotate([rollout], [teacher]))
    assert [len(call) for call in teacher.calls] == [2]
    assert found.notes[0].turn_weight is not None
    np.testing.assert_array_equal(found.notes[0].turn_weight[1::2], [0, 1, 0, 1])
    assert found.metrics["sage/det_fail"] == 0.5
    assert summarise([rollout, make_rollout((2,))], Tally())["completions/clipped_ratio"] == 0.5


def test_what_the_judge_is_shown() -> None:
    rollout = make_rollout((2, 2), texts=("open box", "take coin"))

    def shown(**changes: Any) -> list[str]:
        teacher = ScriptedTeacher("t", lambda call, request: "SKIP")
        asyncio.run(Intervention(SageConfig(**changes), PlainContexts()).annotate([rollout], [teacher]))
        return [teacher.asked(0, place) for place in (0, 1)]

    first, second = shown()
    assert "win" in first and first.count("a room") == 2 and "look, go" in first and "open box" in first
    assert "see 0" not in first and "take coin" not in first  # neither the outcome nor the future
    assert "see 0" in second and "do 0, wait" in second and "take coin" in second
    assert "Where it began: a room\n" in second
    assert "open box" not in second  # no history
    assert "agent: open box" in shown(judge_history=True)[1]
    assert "What happened: see 0" in shown(judge_next_observation=True)[0]
    assert shown(judge_prompt="{llm_text}?")[0] == "<user>open box?<assistant>"
    assert "look, go" not in shown(admissible_count=1)[0]


def test_the_judge_sees_tool_calls() -> None:
    rollout = make_rollout((2, 2), texts=("I look.", ""))
    call = {"type": "function", "function": {"name": "take", "arguments": {"thing": "coin"}}}
    for turn in rollout.turns[1::2]:
        turn.messages[0]["tool_calls"] = [call]  # type: ignore[index]
    teacher = ScriptedTeacher("t", lambda call, request: "SKIP")
    asyncio.run(Intervention(SageConfig(judge_history=True), PlainContexts()).annotate([rollout], [teacher]))
    said = '<tool_call>\n{"name": "take", "arguments": {"thing": "coin"}}\n</tool_call>'
    assert f"What the agent wrote: I look.\n{said}\n" in teacher.asked(0, 0)
    assert f"What the agent wrote: {said}\n" in teacher.asked(0, 1)
    assert f"agent: I look.\n{said}\nenvironment: see 0" in teacher.asked(0, 1)
    assert [step.text for step in steps_of(rollout)] == [f"I look.\n{said}", said]


def test_a_judge_that_is_sampled_draws_anew_for_every_turn_and_step() -> None:
    rollouts = [make_rollout((2, 2), name=name) for name in "ab"]
    teacher = ScriptedTeacher("t", lambda call, request: "SKIP")
    for version in (0, 1):
        now = [dataclasses.replace(r, policy_version=version) for r in rollouts]
        asyncio.run(Intervention(SageConfig(judge_temperature=1.0), PlainContexts()).annotate(now, [teacher]))
    assert len({request.seed for call in teacher.calls for request in call}) == 8


def test_a_question_beyond_the_judges_window_falls_back_and_is_counted() -> None:
    config = SageConfig(judge_max_tokens=8)
    teacher = ScriptedTeacher("t", lambda call, request: "SKIP", window=100)
    verdicts = asyncio.run(Judge(config).ask([(make_rollout((2,)), 1, make_rollout((2,)).turns[1], ())], [teacher]))
    assert teacher.calls == [] and verdicts[0].label == "judge_window" and verdicts[0].weight == 1.0
    assert turn_metrics(verdicts, [0])["sage/judge_window"] == 1


def test_controls_keep_the_weights_and_move_them() -> None:
    rollouts = [make_rollout((1,) * 6, name=str(i), seed=i) for i in range(6)]
    places = iter(range(100))
    teacher = ScriptedTeacher("t", lambda call, request: ("SKIP", "WEAK", "STRONG")[next(places) % 3])
    notes = list(asyncio.run(Intervention(SageConfig(), PlainContexts()).annotate(rollouts, [teacher])).notes)
    notes[2] = Note(drop="teacher_window/t")

    def weights(notes: Sequence[Note]) -> np.ndarray:
        return np.concatenate([n.turn_weight[1::2] for n in notes if n.turn_weight is not None])

    def moved(intervention: str, step: int = 0) -> np.ndarray:
        found, _ = Control(intervention, 0)(rollouts, notes, step)
        assert found[2] is notes[2]
        return weights(found)

    judged, random, inverted = weights(notes), moved("random"), moved("inverted")
    for control in (random, inverted):
        np.testing.assert_array_equal(np.sort(control), np.sort(judged))
    assert not np.array_equal(random, judged) and not np.array_equal(random, moved("random", 1))
    np.testing.assert_array_equal(random, moved("random"))
    np.testing.assert_array_equal(inverted, 1 - judged)


def test_moved_weights_decide_who_is_shown_to_teachers(agent_config: TrainConfig) -> None:
    """An episode judged SKIP throughout and one judged STRONG change places: only the first is scored."""
    engine = make_engine(dataclasses.replace(agent_config, sage=SageConfig(intervention="inverted")))
    assert engine.episodes is not None
    engine.episodes.close()
    engine.config.__dict__["max_logprob_difference"] = 1e9  # these tokens were not sampled
    weights = {"skipped": Verdict("skip", 0.0), "strong": Verdict("strong", 1.0)}
    rollouts = [make_rollout(LENGTHS, name=name, seed=i) for i, name in enumerate(weights)]
    shown: list[str] = []
    score = engine.teachers[0].score

    async def ask(queries: Sequence[Any], judges: Sequence[Any]) -> list[Verdict]:
        return [weights[rollout.id] for rollout, *_ in queries]

    async def watched(contexts: Any) -> Any:
        shown.extend(c.rollout_id for c in contexts)
        return await score(contexts)

    engine.recipe.annotator.judge.ask = ask  # type: ignore[attr-defined]
    engine.teachers[0].score = watched  # type: ignore[method-assign]

    async def run() -> dict[str, float]:
        notes, found = await engine.annotate(rollouts)
        return (await engine.finish(Prepared(rollouts, notes, found, dict(found.metrics), Clock()))).metrics

    metrics = asyncio.run(run())
    assert shown == ["skipped"]
    assert metrics["sage/skip"] == metrics["sage/strong"] == 0.5 and metrics["completions/kept"] == 2
    assert metrics["loss"] > 0


@pytest.fixture
def agent_config(models: dict[str, str], tmp_path: Path) -> TrainConfig:
    return make_config(
        models,
        "",
        tmp_path,
        method="sage_opd",
        environment={"name": "house", "num_environments": 1},
        teachers=[{"model": models["big"], "name": "big"}],
    )


def test_settings(agent_config: TrainConfig, models: dict[str, str], prompt_file: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"set environment\.name"):
        build_method(make_config(models, prompt_file, tmp_path, method="sage_opd"))
    with pytest.raises(ConfigError, match=r"sage.confidence_temperature.*use_confidence"):
        make_config(models, prompt_file, tmp_path, sage={"confidence_temperature": 0})
    for prompt, message in (
        ("{llm_txt}", r"sage\.judge_prompt.*no placeholder \['llm_txt'\].*'llm_text'"),
        ("{last_obs}", r"must see \{llm_text\}"),
        ('{llm_text} as {"word": 1}', "no placeholder"),
        ("{llm_text} {", r"no format string.*write \{\{ and \}\}"),
    ):
        with pytest.raises(ConfigError, match=message):
            make_config(models, prompt_file, tmp_path, sage={"judge_prompt": prompt})
    with pytest.raises(ConfigError, match=r"divergence='jsd'.*sage.kl_mode=sampled.*set sage.kl_mode to full_vocab"):
        build_method(dataclasses.replace(agent_config, divergence="jsd", sage=SageConfig(kl_mode="sampled")))
    served = [{"model": "m", "base_url": "http://127.0.0.1:1/v1"}]
    warm = dataclasses.replace(agent_config, sage=SageConfig(confidence_temperature=0.5))
    assert build_method(warm).top1_temperature == 0.5
    with pytest.raises(ConfigError, match=r"confidence_temperature=0.5.*served teachers \['m'\].*use 1.0"):
        build_method(
            make_config(
                models, "", tmp_path, method="sage_opd", environment={"name": "house"}, teachers=served,
                sage={"confidence_temperature": 0.5},
            )
        )  # fmt: skip
    assert build_method(agent_config).measures == ("teacher_top1",)


def step_on(config: TrainConfig, rollouts: Sequence[Sample], verdicts: str) -> tuple[Any, dict[str, float], int]:
    """One update on given trajectories whose judge always says the same: engine, metrics, FLOPs."""
    engine = make_engine(config)
    try:
        engine.recipe.annotator.judge.ask = fixed(verdicts)  # type: ignore[attr-defined]

        async def run() -> dict[str, float]:
            dropped = Counter[str]()
            notes, _ = await engine.annotate(rollouts)
            judged = await engine.judge(rollouts, notes, dropped)
            items, metrics = engine.weigh(judged, engine.measure(judged), dropped)
            assert len(items) == len(rollouts) and not dropped
            return metrics | engine.update(items, Tally())

        engine.probed = True
        engine.config.__dict__["max_logprob_difference"] = 1e9  # these tokens were not sampled
        with FlopCounterMode(display=False) as counter:
            metrics = asyncio.run(run())
        return engine, metrics, counter.get_total_flops()
    finally:
        assert engine.episodes is not None
        engine.episodes.close()


def fixed(labels: str) -> Any:
    """A judge that gives the same labels to every trajectory, turn by turn."""
    weight = {"K": ("skip", 0.0), "W": ("weak", 0.5), "S": ("strong", 1.0)}

    async def ask(queries: Sequence[Any], judges: Sequence[Any]) -> list[Verdict]:
        places = [sum(t.role == "assistant" for t in rollout.turns[:index]) for rollout, index, *_ in queries]
        return [Verdict(*weight[labels[place]]) for place in places]

    return ask


def test_an_all_skip_batch_moves_nothing_and_runs_no_model(agent_config: TrainConfig) -> None:
    rollouts = [make_rollout(LENGTHS, name=str(i), seed=i) for i in range(2)]
    before = [p.detach().clone() for p in make_engine_parameters(agent_config)]
    engine, metrics, flops = step_on(agent_config, rollouts, "KKK")
    assert metrics["skipped_steps"] == 1 and engine.version == 0
    for old, new in zip(before, engine.student.model.parameters(), strict=True):
        assert torch.equal(old, new)
    assert flops < 1e6  # the probes at load are not counted; nothing else is run


def make_engine_parameters(config: TrainConfig) -> list[torch.nn.Parameter]:
    engine = make_engine(config)
    assert engine.episodes is not None
    engine.episodes.close()
    return list(engine.student.model.parameters())


def test_skipped_turns_cost_nothing_in_the_loss(agent_config: TrainConfig) -> None:
    """The heads run over the tokens of turns with weight only: FLOPs by count."""
    rollouts = [make_rollout((30, 30), name=str(i), seed=i) for i in range(2)]
    _, _, both = step_on(agent_config, rollouts, "SS")
    engine, metrics, one = step_on(agent_config, rollouts, "KS")
    assert math.isfinite(metrics["loss"]) and metrics["loss"] > 0
    student, teacher = engine.student.head.weight, engine.teachers[0].head.weight
    rows = 2 * 30  # the skipped turns of both trajectories
    vocab = engine.vocab_size
    # Three products of the student, and two of the teacher: its statistics and its side of the loss.
    saved = 2 * rows * vocab * (3 * student.shape[1] + 2 * teacher.shape[1])
    assert both - one == pytest.approx(saved, rel=0.1)


@pytest.mark.parametrize(("normalization", "expected"), [("token", (1 / 6, 1 / 6)), ("sequence", (1 / 8, 1 / 4))])
def test_tcod_is_the_mean_over_the_turns_that_it_keeps(normalization: str, expected: tuple[float, float]) -> None:
    rollouts = [make_rollout((4, 90), name="a"), make_rollout((2, 10, 10), name="b", seed=1)]
    found = asyncio.run(FirstTurns(TcodConfig()).annotate(rollouts, [ScriptedTeacher("t", [])]))
    signals = KeptMean(normalization)(Batch(rollouts, found.notes, [Stats()] * 2)).signals
    scales = normalisers(rollouts, normalization)
    for rollout, signal, scale, weight in zip(rollouts, signals, scales, expected, strict=True):
        first = rollout.target_turns == 1
        np.testing.assert_allclose(scale * signal.kl_weight[first], weight, rtol=1e-6)
        assert not signal.kl_weight[~first].any()
