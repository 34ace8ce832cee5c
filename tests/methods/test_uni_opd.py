"""Balancing and margins: rules by hand, laws by enumeration, and what reaches the teachers."""

from __future__ import annotations

import asyncio
import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from engine_helpers import make_config, make_engine
from method_helpers import make_batch, make_rollout

from opdengine.config.loading import from_mapping
from opdengine.config.method_sections import UniOPDConfig
from opdengine.config.train import ConfigError, TrainConfig
from opdengine.data.prompts import load_prompts
from opdengine.methods.policy_gradient import PolicyGradient
from opdengine.methods.uni_opd import (
    UniOPD,
    balanced_counts,
    capped_counts,
    choose,
    consistency,
    margin,
    narrowing,
    sets,
    shifts,
)
from opdengine.models.chat import encode_chat, load_tokenizer
from opdengine.training.inputs import check_routing
from opdengine.training.step import Engine
from opdengine.types import Batch, Prompt, Sample, Turn

INF = math.inf


@pytest.mark.parametrize(
    ("counts", "ratio", "kept"),
    [
        ((3, 5), 1.0, (3, 3)),
        ((6, 2), 1.0, (2, 2)),
        ((4, 4), 1.0, (4, 4)),
        ((8, 0), 1.0, (8, 0)),
        ((0, 8), 1.0, (0, 8)),
        ((6, 2), 2.0, (4, 2)),
        ((2, 6), 0.5, (2, 4)),
        ((7, 1), 0.5, (7, 1)),  # half a correct one is none, and 14 incorrect ones there are not
        ((3, 5), 0.0, (0, 5)),
        ((3, 5), INF, (3, 0)),
        ((8, 0), 0.0, (8, 0)),
        ((33, 99), 0.55, (33, 60)),  # where 33 / 0.55 is a little less than 60
        ((99, 90), 0.7, (63, 90)),
    ],
)
def test_balanced_counts(counts: tuple[int, int], ratio: float, kept: tuple[int, int]) -> None:
    assert balanced_counts(*counts, ratio) == kept


@pytest.mark.parametrize("ratio", [0.5, 0.75, 1.0, 1.2, 2.0])
def test_balancing_never_adds_never_empties_and_reaches_the_ratio(ratio: float) -> None:
    for correct in range(17):
        for incorrect in range(17):
            c, i = balanced_counts(correct, incorrect, ratio)
            assert c <= correct and i <= incorrect and (c == correct or i == incorrect)
            assert bool(c) == bool(correct) and bool(i) == bool(incorrect)
            if (c, i) != (correct, incorrect):
                assert c in (math.floor(i * ratio), correct) and i in (math.floor(c / ratio), incorrect)


@pytest.mark.parametrize(
    ("counts", "most", "kept"),
    [
        ((4, 4), 4, (2, 2)),
        ((8, 0), 4, (4, 0)),
        ((1, 9), 4, (1, 3)),
        ((9, 1), 4, (3, 1)),
        ((2, 2), 8, (2, 2)),
        ((2, 2), None, (2, 2)),
        ((1, 1), 1, (0, 1)),
    ],
)
def test_capped_counts(counts: tuple[int, int], most: int | None, kept: tuple[int, int]) -> None:
    assert capped_counts(*counts, most) == kept


def method(config: UniOPDConfig | None = None) -> UniOPD:
    """The method with some settings, without any model."""
    base = from_mapping(
        TrainConfig,
        {"model": "m", "teachers": [{"model": "t"}], "output_dir": "o", "train_data": ["d"], "method": "uni_opd"},
    )
    return UniOPD(dataclasses.replace(base, uni_opd=config or UniOPDConfig()))


def outcomes(**groups: str) -> tuple[list[Sample], list[bool]]:
    """``a="110"``: a group of two correct and one incorrect rollout."""
    rollouts = [make_rollout(f"{g}{i}", [i + 1], group=g) for g, labels in groups.items() for i in range(len(labels))]
    return rollouts, [label == "1" for labels in groups.values() for label in labels]


def kept_counts(rollouts: Sequence[Sample], correct: Sequence[bool], stays: Sequence[bool]) -> dict[str, tuple]:
    found = {}
    for group, members in sets([r.group for r in rollouts], "group").items():
        labels = [correct[i] for i in members if stays[i]]
        found[group] = (sum(labels), len(labels) - sum(labels))
    return found


def test_balance_in_groups_and_over_the_step() -> None:
    rollouts, correct = outcomes(a="1110", b="0001", c="1111", d="0000")
    by_group = choose(rollouts, correct, UniOPDConfig(), seed=0)
    assert kept_counts(rollouts, correct, by_group) == {"a": (1, 1), "b": (1, 1), "c": (4, 0), "d": (0, 4)}
    rollouts, correct = outcomes(a="1111", b="1100", c="1111")
    everywhere = choose(rollouts, correct, UniOPDConfig(balance="global"), seed=0)
    assert sum(everywhere) == 4 and sum(c for c, s in zip(correct, everywhere, strict=True) if s) == 2
    assert all(choose(rollouts, correct, UniOPDConfig(balance="none"), seed=0))


def test_oversampling_makes_up_for_what_balancing_drops() -> None:
    """Three right answers in sixteen: eight samples would hold about one pair, the cap of eight keeps three."""
    rollouts, correct = outcomes(a="1110000000000000", b="1111111111110000", c="1" * 16)
    stays = choose(rollouts, correct, UniOPDConfig(keep_per_prompt=8), seed=0)
    assert kept_counts(rollouts, correct, stays) == {"a": (3, 3), "b": (4, 4), "c": (8, 0)}


def test_the_choice_depends_on_the_samples_and_the_seed_only() -> None:
    rollouts, correct = outcomes(a="11111111000", b="1000000")
    config = UniOPDConfig(balance_ratio=1.0)
    first = {r.id for r, s in zip(rollouts, choose(rollouts, correct, config, 3), strict=True) if s}
    order = np.random.default_rng(0).permutation(len(rollouts))
    mixed, labels = [rollouts[i] for i in order], [correct[i] for i in order]
    again = {r.id for r, s in zip(mixed, choose(mixed, labels, config, 3), strict=True) if s}
    assert first == again
    others = [
        {r.id for r, s in zip(rollouts, choose(rollouts, correct, config, seed), strict=True) if s}
        for seed in range(4, 9)
    ]
    assert any(other != first for other in others)


def test_only_rollouts_that_teachers_can_judge_are_balanced() -> None:
    """Two right and three wrong answers: the one wrong answer too many is not removed twice."""
    labels = {"a": 1.0, "b": 1.0, "c": 0.0, "d": 0.0, "e": 0.0}
    rollouts = [make_rollout(id, [i + 1], group="g", reward=reward) for i, (id, reward) in enumerate(labels.items())]
    rollouts[-1].drop = "teacher_window/t"
    batch = Batch(samples=rollouts)
    method().select(batch)
    assert [r.drop for r in rollouts] == ["", "", "", "", "teacher_window/t"]
    assert batch.metrics == {"balance/correct_before": 0.5, "balance/correct_after": 0.5}
    rollouts[-1].drop = ""
    method().select(batch)
    assert [r.drop for r in rollouts].count("balance") == 1


def test_steps_of_an_episode_stay_or_go_together() -> None:
    rollouts = [
        make_rollout(f"{e}.{step}", range(1, 2 + step), group="g", trajectory=f"episode{e}")
        for e in range(4)
        for step in range(3)
    ]
    stays = choose(rollouts, [r.trajectory == "episode0" for r in rollouts], UniOPDConfig(), seed=1)
    kept = [r.trajectory for r, s in zip(rollouts, stays, strict=True) if s]
    assert len(kept) == 6 and len(set(kept)) == 2 and "episode0" in kept


# ------------------------------------------------------------------------------------- margins


RNG = np.random.default_rng(5)


@pytest.mark.parametrize("statistic", ["mean", "minmax"])
@pytest.mark.parametrize("direction", ["lift", "spread", "push_down"])
def test_a_shift_makes_the_margin_exactly_delta(statistic: str, direction: str) -> None:
    for _ in range(50):
        returns, correct = RNG.normal(-0.3, 0.3, 7), RNG.random(7) < 0.5
        shift = shifts(returns, correct, 0.4, statistic, direction)
        if correct.all() or not correct.any():
            assert not shift.any()
            continue
        before = margin(returns[correct], returns[~correct], statistic)
        after = margin((returns + shift)[correct], (returns + shift)[~correct], statistic)
        assert after == pytest.approx(max(before, 0.4))
        assert (shift[correct] >= 0).all() and (shift[~correct] <= 0).all()
        if direction == "lift":
            assert not shift[~correct].any()
        if direction == "push_down":
            assert not shift[correct].any()
        if direction == "spread":
            np.testing.assert_allclose(np.abs(shift), np.abs(shift[0]))


def test_margins_by_hand() -> None:
    right, wrong = np.array([-0.2, -0.6]), np.array([-0.5, -0.1])
    assert margin(right, wrong, "mean") == pytest.approx(-0.1)
    assert margin(right, wrong, "minmax") == pytest.approx(-0.5)


def test_narrowing_removes_the_rollouts_in_the_way() -> None:
    returns = np.array([1.0, 0.9, -5.0, 0.2, 0.1, 0.0])
    correct = np.array([True, True, True, False, False, False])
    assert narrowing(returns, correct, 0.5, "mean").tolist() == [False, False, True, False, False, False]
    assert not narrowing(returns, correct, -9.0, "mean").any()
    # Removing a correct one gains most each time, until one of three is left; then wrong ones go.
    assert narrowing(returns, correct, 9.0, "minmax").tolist() == [False, True, True, True, True, False]
    # Eight of a kind: a quarter, two of them, always stays.
    gone = narrowing(np.arange(16.0)[::-1], np.arange(16) >= 8, 99.0, "mean")
    assert (~gone[:8]).sum() == 2 and (~gone[8:]).sum() == 2
    # Eight wrong and four right ones: a quarter of each kind is counted by itself.
    gone = narrowing(np.arange(12.0)[::-1], np.arange(12) >= 8, 99.0, "mean")
    assert (~gone[:8]).sum() == 2 and (~gone[8:]).sum() == 1


def test_narrowing_never_touches_sets_of_one_kind_and_stops_where_nothing_helps() -> None:
    assert not narrowing(np.array([1.0, -1.0]), np.array([True, True]), 9.0, "mean").any()
    assert not narrowing(np.array([0.0, 0.0, 0.0, 0.0]), np.array([True, True, False, False]), 1.0, "mean").any()


def test_order_consistency_counts_groups_and_pairs() -> None:
    returns = np.array([0.5, 0.1, 0.2, 0.3, 0.0, 0.4, 0.6, 0.7])
    correct = np.array([True, False, True, False, True, True, False, False])
    groups = [[0, 1], [2, 3], [4, 5], [6, 7]]
    found = consistency(returns, correct, groups)
    assert (found["order/consistent"], found["order/violated"]) == (0.25, 0.25)
    assert (found["order/all_correct"], found["order/all_wrong"]) == (0.25, 0.25)
    assert found["order/inverted_pairs"] == 0.5
    assert found["order/return_correct"] == pytest.approx(1.1 / 4)


def weigh(config: UniOPDConfig, rollouts: Sequence[Sample], gaps: Sequence[Sequence[float]], **gradient: Any) -> Batch:
    made = method(config)
    made.gradient = PolicyGradient(**gradient)
    batch = make_batch([dataclasses.replace(r) for r in rollouts], gaps)
    made.weigh(batch)
    return batch


def test_the_shift_is_a_constant_on_every_token_of_the_group() -> None:
    rollouts = [
        make_rollout("a", [1, 2], group="g", reward=1.0),
        make_rollout("b", [1, 2, 3], group="g", reward=0.0),
        make_rollout("c", [1], group="h", reward=0.0),
        make_rollout("d", [1], group="g", reward=None),
    ]
    gaps = [[-1.0, 0.0], [-0.5, -0.2, 0.1], [-3.0], [-2.0]]
    weighed = weigh(UniOPDConfig(), rollouts, gaps)
    d = 0.4 - (-0.5 - -0.2)
    expected = [np.array(gaps[0]) + d / 2, np.array(gaps[1]) - d / 2, np.array(gaps[2]), np.array(gaps[3])]
    for signal, wanted in zip(weighed.samples, expected, strict=True):
        np.testing.assert_allclose(signal.advantage, wanted, rtol=1e-5)
    assert weighed.metrics["margin/shift"] == pytest.approx(d)
    # Over the whole step the statistics are of all rollouts with an outcome.
    wide = weigh(UniOPDConfig(margin_scope="global"), rollouts, gaps)
    d = 0.4 - (-0.5 - (-0.2 - 3.0) / 2)
    assert d < 0 and not wide.metrics["margin/shift"]
    np.testing.assert_allclose(wide.samples[1].advantage, gaps[1], rtol=1e-5)


def test_masked_tokens_get_no_shift_and_the_fixed_control_ignores_the_margin() -> None:
    rollouts = [make_rollout("a", [1, 2], group="g", reward=1.0), make_rollout("b", [1, 2], group="g", reward=0.0)]
    gaps = [[5.0, -12.0], [-2.0, -2.0]]
    fixed = weigh(UniOPDConfig(margin="fixed"), rollouts, gaps, max_gap=10.0)
    np.testing.assert_allclose(fixed.samples[0].advantage, [5.2, 0], rtol=1e-5)
    np.testing.assert_allclose(fixed.samples[1].advantage, [-2.2, -2.2], rtol=1e-5)
    alone = weigh(UniOPDConfig(margin="fixed"), rollouts[:1], gaps[:1])
    np.testing.assert_allclose(alone.samples[0].advantage, gaps[0], rtol=1e-5)
    plain = weigh(UniOPDConfig(margin="none"), rollouts, gaps)
    np.testing.assert_allclose(plain.samples[1].advantage, gaps[1], rtol=1e-5)


def test_the_greedy_mask_drops_rollouts() -> None:
    rollouts = [make_rollout(str(i), [1], group="g", reward=float(i < 2)) for i in range(4)]
    weighed = weigh(UniOPDConfig(margin="mask"), rollouts, [[0.5], [-5.0], [0.0], [0.0]])
    assert [not s.drop for s in weighed.samples] == [True, False, True, True]
    assert weighed.samples[1].drop == "margin"


def test_full_vocabulary_leaves_only_the_shift_in_the_advantage() -> None:
    rollouts = [make_rollout("a", [1], group="g", reward=1.0), make_rollout("b", [1], group="g", reward=0.0)]
    weighed = weigh(UniOPDConfig(), rollouts, [[-1.0], [-1.0]], exact=True)
    np.testing.assert_allclose([s.advantage[0] for s in weighed.samples], [0.2, -0.2], rtol=1e-5)
    assert all(s.kl_weight[0] == 1 for s in weighed.samples)


# --------------------------------------------------------------------------------- in the engine


class Parity:
    """Grades by the place of a sample: only every fourth is right."""

    def grade(self, texts: Sequence[str], prompts: Sequence[Prompt]) -> list[SimpleNamespace]:
        return [SimpleNamespace(value=float(i % 4 == 0), detail="") for i in range(len(texts))]

    def counts(self) -> dict[str, float]:
        return {"verifier/graded": 1.0}


def uni_config(models: dict[str, str], prompt_file: str, folder: Path, **changes: Any) -> TrainConfig:
    teachers = [{"model": models["big"], "key": ["agentic"]}, {"model": models["small"], "key": ["code"]}]
    return make_config(
        models, prompt_file, folder, **{"method": "uni_opd", "num_generations": 4, "teachers": teachers, **changes}
    )


def uni_engine(*arguments: Any, **changes: Any) -> Engine:
    engine = make_engine(uni_config(*arguments, **changes))
    engine.grader = Parity()
    return engine


@pytest.mark.parametrize("kl_mode", ["sampled", "full_vocab"])
def test_dropped_rollouts_are_shown_to_no_teacher(
    models: dict[str, str], prompt_file: str, tmp_path: Path, kl_mode: str
) -> None:
    engine = uni_engine(models, prompt_file, tmp_path, advantage={"kl_mode": kl_mode})
    shown: dict[str, list[str]] = {}
    for teacher in engine.teachers:
        plain = teacher.score

        async def score(contexts: Any, name: str = teacher.name, plain: Any = plain) -> Any:
            shown.setdefault(name, []).extend(c.sample_id for c in contexts)
            return await plain(contexts)

        teacher.score = score
    prompts = load_prompts([prompt_file]).prompts[:4]
    metrics = asyncio.run(engine.step(prompts)).metrics
    assert metrics["dropped/balance"] == 8 and metrics["completions/kept"] == 8
    assert metrics["balance/correct_before"] == 0.25 and metrics["balance/correct_after"] == 0.5
    assert metrics["reward/mean"] == 0.25 and metrics["policy_version"] == 1
    assert sorted(i.split(".")[0] for i in shown["small"]) == ["0", "0", "2", "2"]  # routed by key
    assert sorted(i.split(".")[0] for i in shown["big"]) == ["1", "1", "3", "3"]
    assert {"order/inverted_pairs", "margin/shift", "gap/mean"} <= metrics.keys()


def test_outcomes_change_the_update(models: dict[str, str], prompt_file: str, tmp_path: Path) -> None:
    """A margin far beyond the gaps raises right answers and lowers wrong ones."""
    engine = uni_engine(
        models, prompt_file, tmp_path, uni_opd={"margin_delta": 30.0}, learning_rate=3e-3, warmup_ratio=0.0
    )
    prompts = load_prompts([prompt_file]).prompts[:4]
    result = asyncio.run(engine.step(prompts))
    drift: dict[float, list[float]] = {0.0: [], 1.0: []}
    for r in result.samples:
        states = engine.student.score([r.token_ids], [r.target_positions])[0]
        after = engine.student.head.logits(states).detach().log_softmax(-1)[range(len(r.target_ids)), r.target_ids]
        drift[r.reward].append(float(after.mean() - r.sampler_logprob.mean()))
    assert np.mean(drift[1.0]) > np.mean(drift[0.0]) + 0.01


def test_prompts_without_answers_are_refused(models: dict[str, str], prompt_file: str, tmp_path: Path) -> None:
    from opdengine.methods import build_method

    config = uni_config(models, prompt_file, tmp_path)
    prompts = load_prompts([prompt_file])
    open_ = dataclasses.replace(prompts, prompts=(dataclasses.replace(prompts.prompts[0], answer=None),))
    with pytest.raises(ConfigError, match="have no 'answer'"):
        check_routing(config, build_method(config), open_)


# ---------------------------------------------------------------------------- template bridging


THINK = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)


def test_the_empty_think_block_is_the_students_alone(tiny: Any, tmp_path: Path, prompt_file: str) -> None:
    """Proved by ids: the teacher reads its own prompt, then exactly the student's tokens."""
    tokenizer = tiny.make_tokenizer(("<think>", "</think>"))
    tokenizer.chat_template = THINK
    folders = {
        name: tiny.make_model(tmp_path / name, tokenizer, seed=i, hidden=16 * (i + 1))
        for i, name in enumerate(["student", "big", "small"])
    }
    teachers = [
        {"model": folders[name], "key": [key], "chat_template_kwargs": {"enable_thinking": True}}
        for name, key in (("big", "agentic"), ("small", "code"))
    ]
    engine = uni_engine(
        folders, prompt_file, tmp_path / "run", chat_template_kwargs={"enable_thinking": False}, teachers=teachers
    )
    prompt = load_prompts([prompt_file]).prompts[0]
    block = tokenizer.encode("<think>\n\n</think>\n\n", add_special_tokens=False)
    own = engine.encode(prompt)
    assert own[-len(block) :] == block
    answer = [*block, 40, 41, *block, tokenizer.eos_token_id]  # the same ids within the response stay
    rollout = Sample("r", prompt, (Turn("prompt", np.array(own)), Turn("assistant", np.array(answer), trains=True)))
    asyncio.run(engine.annotate(Batch(samples=[rollout])))
    (context,) = rollout.contexts
    plain = encode_chat(load_tokenizer(folders["small"]), prompt.messages)
    assert plain == own[: -len(block)]
    assert context.token_ids.tolist() == plain + answer
    assert context.token_ids[context.target_positions].tolist() == answer
    scored = asyncio.run(engine.teachers[1].score([context]))[0]
    assert len(scored) == len(answer)


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"balance": "sample"}, "uni_opd.balance='sample' is not possible; choose one of"),
        ({"margin_direction": "up"}, "uni_opd.margin_direction='up'"),
        ({"keep_per_prompt": 0}, "uni_opd.keep_per_prompt=0"),
        ({"balance_ratio": -1}, "uni_opd.balance_ratio=-1"),
        ({"margin_detla": 0.4}, "did you mean 'margin_delta'"),
    ],
)
def test_impossible_settings_are_refused(section: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        from_mapping(UniOPDConfig, section)
