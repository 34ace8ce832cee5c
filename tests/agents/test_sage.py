"""SAGE-OPD: the worked numbers of the method, the judge, and what skipped turns cost."""

from __future__ import annotations

import asyncio
import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from agent_helpers import context, make_rollout
from engine_helpers import ScriptedTeacher, make_config, make_engine
from torch.utils.flop_counter import FlopCounterMode

from opdengine.config.loading import from_mapping
from opdengine.config.train import ConfigError, SageConfig, TrainConfig
from opdengine.distributed import Ranks
from opdengine.loss.objective import set_scales
from opdengine.methods import build_method
from opdengine.methods.agent_baselines import TCOD
from opdengine.methods.method import Method
from opdengine.methods.opad import steps_of
from opdengine.methods.sage_judge import Judge, Verdict, turn_metrics
from opdengine.methods.sage_opd import SAGEOPD
from opdengine.training.step_result import lengths_and_rewards
from opdengine.types import Batch, Sample
from tiny.agents.house import HOUSE

LENGTHS, KL, TOP1 = (4, 6, 10), (0.5, 0.2, 0.3), (0.9, 0.8, 0.6)
LABELS = (0.0, 0.5, 1.0)


BASE = from_mapping(
    TrainConfig,
    {
        "model": "m",
        "teachers": [{"model": "t"}],
        "output_dir": "o",
        "method": "sage_opd",
        "environment": {"name": HOUSE},
    },
)


def sage(teacher: Any = None, **settings: Any) -> SAGEOPD:
    """The method with some settings, without any model."""
    method = SAGEOPD(dataclasses.replace(BASE, sage=SageConfig(**settings)))
    method.teachers = [teacher]
    return method


def annotated(method: Method, rollouts: Sequence[Sample]) -> Batch:
    batch = Batch(samples=list(rollouts))
    asyncio.run(method.annotate(batch))
    return batch


def batch_of(rollouts: Sequence[Sample], weights: Sequence[Sequence[float]], top1: Sequence[Sequence[float]]) -> Batch:
    """Turn weights and teacher confidences of every trajectory, given per turn of the student."""
    for rollout, of_turns, confidences in zip(rollouts, weights, top1, strict=True):
        per_turn = np.zeros(len(rollout.turns), dtype=np.float32)
        per_turn[1::2] = of_turns
        rollout.contexts, rollout.mix, rollout.turn_weight = (context(rollout),), np.ones(1, np.float32), per_turn
        known = np.zeros(len(rollout.turns))
        known[1::2] = confidences
        rollout.teacher_top1 = known[rollout.target_turns][:, None].astype(np.float32)
    return Batch(samples=list(rollouts))


def loss_of(batch: Batch, kl: Sequence[Sequence[float]], **settings: Any) -> float:
    """The loss that the weights give when every token of a turn has the same divergence."""
    sage(**settings).weigh(batch)
    set_scales(batch.samples, "token", Ranks())
    total = 0.0
    for rollout, of_turns in zip(batch.samples, kl, strict=True):
        per_turn = np.zeros(len(rollout.turns))
        per_turn[1::2] = of_turns
        total += rollout.scale * float((rollout.kl_weight * per_turn[rollout.target_turns]).sum())
    return total


def weighed(batch: Batch, **settings: Any) -> Batch:
    sage(**settings).weigh(batch)
    return batch


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
    assert loss_of(batch, [KL], **changes) == pytest.approx(expected, rel=1e-6)


def test_weights_of_the_worked_example() -> None:
    batch = batch_of([make_rollout(LENGTHS)], [LABELS], [TOP1])
    weighed(batch)
    assert batch.metrics["sage/z"] == pytest.approx(2.380952, rel=1e-6)
    weight = batch.samples[0].kl_weight
    np.testing.assert_allclose(weight, np.repeat([0, 0.952381, 1.428571], LENGTHS), rtol=1e-6)
    assert weight.sum() == pytest.approx(20, rel=1e-6)


def test_all_strong_with_equal_confidence_is_plain_opd() -> None:
    batch = batch_of([make_rollout(LENGTHS)], [(1, 1, 1)], [(0.7, 0.7, 0.7)])
    assert loss_of(batch, [KL]) == pytest.approx(0.31, rel=1e-6)


def test_the_scale_of_the_confidences_does_not_matter() -> None:
    rollouts = [make_rollout(LENGTHS, name="a"), make_rollout((3, 5), name="b", seed=1)]
    weights, kl = [LABELS, (1, 0.5)], [KL, (0.1, 0.9)]
    full = loss_of(batch_of(rollouts, weights, [TOP1, (0.5, 0.3)]), kl)
    half = loss_of(batch_of(rollouts, weights, [np.array(TOP1) / 2, (0.25, 0.15)]), kl)
    assert full == pytest.approx(half, rel=1e-6)


def test_z_is_of_the_batch_or_of_each_trajectory() -> None:
    rollouts = [make_rollout((4,), name="weak"), make_rollout((4,), name="strong", seed=1)]
    batch = batch_of(rollouts, [(0.5,), (1.0,)], [(1,), (1,)])
    whole = [s.kl_weight[0] for s in weighed(batch)]
    np.testing.assert_allclose(whole, [2 / 3, 4 / 3], rtol=1e-6)
    each = [s.kl_weight[0] for s in weighed(batch, normalization_scope="trajectory")]
    np.testing.assert_allclose(each, [1, 1], rtol=1e-6)


def test_z_can_be_bounded() -> None:
    batch = batch_of([make_rollout((1, 99))], [(1, 0)], [(1, 1)])
    assert weighed(batch).metrics["sage/z"] == pytest.approx(100)
    assert weighed(batch, z_max=5.0).metrics["sage/z"] == pytest.approx(5)


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
    found = annotated(sage(teacher), [rollout])
    assert rollout.turn_weight is not None
    assert rollout.turn_weight[1] == pytest.approx(weight)
    assert found.metrics[f"sage/{label}"] == 1


@pytest.mark.parametrize(
    ("reply", "label"), [("It may be WEAK", "unparsed"), ("WEAK? No.</think>SKIP", "skip"), ("SKIP", "unparsed")]
)
def test_a_judge_whose_prompt_opens_a_thought_is_read_behind_it(reply: str, label: str) -> None:
    teacher = ScriptedTeacher("t", [reply], opening="<think>\n")
    assert annotated(sage(teacher), [make_rollout((2,))]).metrics[f"sage/{label}"] == 1


def test_failures_are_not_put_to_the_judge() -> None:
    rollout = make_rollout((2, 2, 2), failures=("", "execution", ""))
    teacher = ScriptedTeacher("t", lambda call, request: "SKIP")
    found = annotated(sage(teacher), [rollout])
    assert [len(call) for call in teacher.calls] == [2]
    assert rollout.turn_weight is not None
    np.testing.assert_array_equal(rollout.turn_weight[1::2], [0, 1, 0])
    assert found.metrics["sage/det_fail"] == pytest.approx(1 / 3)


def test_a_turn_that_is_empty_or_cut_off_is_a_failure_whatever_the_environment_made_of_it() -> None:
    rollout = make_rollout((2, 2, 2, 1), texts=("look", "go", "take", " "))
    for turn, reason in zip(rollout.turns[1::2], ("stop", "length", "stop", "stop"), strict=True):
        turn.info["stop_reason"] = reason  # type: ignore[index]
    teacher = ScriptedTeacher("t", lambda call, request: "SKIP")
    found = annotated(sage(teacher), [rollout])
    assert [len(call) for call in teacher.calls] == [2]
    assert rollout.turn_weight is not None
    np.testing.assert_array_equal(rollout.turn_weight[1::2], [0, 1, 0, 1])
    assert found.metrics["sage/det_fail"] == 0.5
    assert lengths_and_rewards([rollout, make_rollout((2,))])["completions/clipped_ratio"] == 0.5


def test_what_the_judge_is_shown() -> None:
    rollout = make_rollout((2, 2), texts=("open box", "take coin"))

    def shown(**changes: Any) -> list[str]:
        teacher = ScriptedTeacher("t", lambda call, request: "SKIP")
        annotated(sage(teacher, **changes), [rollout])
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
    annotated(sage(teacher, judge_history=True), [rollout])
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
        annotated(sage(teacher, judge_temperature=1.0), now)
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
    annotated(sage(teacher), rollouts)
    rollouts[2].drop = "teacher_window/t"

    def weights(batch: Batch) -> np.ndarray:
        return np.concatenate([s.turn_weight[1::2] for s in batch if s.turn_weight is not None])

    def moved(intervention: str, step: int = 0) -> np.ndarray:
        copies = [dataclasses.replace(r, turn_weight=np.array(r.turn_weight)) for r in rollouts]
        batch = Batch(step, copies)
        sage(intervention=intervention).select(batch)
        np.testing.assert_array_equal(copies[2].turn_weight, rollouts[2].turn_weight)
        return weights(batch)

    judged, random, inverted = weights(Batch(samples=rollouts)), moved("random"), moved("inverted")
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
        shown.extend(c.sample_id for c in contexts)
        return await score(contexts)

    engine.method.judge.ask = ask  # type: ignore[attr-defined]
    engine.teachers[0].score = watched  # type: ignore[method-assign]

    async def run() -> dict[str, float]:
        batch = Batch(samples=rollouts)
        await engine.annotate(batch)
        return (await engine.finish(batch)).metrics

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
        environment={"name": HOUSE, "num_environments": 1},
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
                models, "", tmp_path, method="sage_opd", environment={"name": HOUSE}, teachers=served,
                sage={"confidence_temperature": 0.5},
            )
        )  # fmt: skip
    assert build_method(agent_config).needs == {"teacher_top1"}


def step_on(config: TrainConfig, rollouts: Sequence[Sample], verdicts: str) -> tuple[Any, dict[str, float], int]:
    """One update on given trajectories whose judge always says the same: engine, metrics, FLOPs."""
    engine = make_engine(config)
    try:
        engine.method.judge.ask = fixed(verdicts)  # type: ignore[attr-defined]

        async def run() -> dict[str, float]:
            batch = Batch(samples=[dataclasses.replace(r) for r in rollouts])
            await engine.annotate(batch)
            await engine.score(batch)
            engine.measure(batch)
            engine.weigh(batch)
            assert len(batch) == len(rollouts) and not batch.dropped
            return engine.update(batch).metrics

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
    method = TCOD(dataclasses.replace(BASE, method="tcod", loss_normalization=normalization))
    method.teachers = [ScriptedTeacher("t", [])]
    batch = annotated(method, rollouts)
    method.weigh(batch)
    set_scales(rollouts, normalization, Ranks())
    for rollout, weight in zip(rollouts, expected, strict=True):
        first = rollout.target_turns == 1
        assert rollout.kl_weight is not None
        np.testing.assert_allclose(rollout.scale * rollout.kl_weight[first], weight, rtol=1e-6)
        assert not rollout.kl_weight[~first].any()
