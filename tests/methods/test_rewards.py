"""Rewards beside distillation, scaled rewards, and baselines that choose tokens: against float64 and closed forms."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from engine_helpers import ScriptedTeacher, full_logprobs, make_config, make_engine, make_samples
from method_helpers import make_batch, make_rollout

from opd_kernels import LMHead
from opdengine.config.loading import from_mapping
from opdengine.config.train import ConfigError, TrainConfig
from opdengine.data.prompts import load_prompts
from opdengine.distributed import Ranks
from opdengine.loss.objective import Objective, set_scales
from opdengine.loss.statistics import Statistics
from opdengine.methods import build_method
from opdengine.methods.group_relative import advantages
from opdengine.methods.token_selection import uncertain
from opdengine.training.run import train
from opdengine.types import Batch, Hidden

Models = dict[str, str]
EXACT: dict[str, Any] = {"g_opd": {"reference": "self"}, "advantage": {"kl_mode": "full_vocab"}}
EVEN = f"{Path(__file__).parents[1] / 'engine' / 'even_verifier.py'}:even"


def built(method: str, teachers: Sequence[dict[str, Any]] = ({"model": "t"},), **settings: Any) -> Any:
    given = {"model": "m", "output_dir": "o", "train_data": ["d.jsonl"], "method": method, "teachers": list(teachers)}
    return build_method(from_mapping(TrainConfig, {**given, **settings}))


# ------------------------------------------------------------------------------------------------ scaled rewards


@pytest.mark.parametrize("scale", [0.5, 1.0, 1.25, 2.0])
def test_the_advantage_gives_the_gradient_of_a_scaled_reward(scale: float) -> None:
    """Over all tokens, float64: the mean of A(y) d log p(y) is the gradient of lambda E[log q/r] - KL(p || r)."""
    draw = torch.Generator().manual_seed(0)
    logits = torch.randn(7, dtype=torch.float64, generator=draw, requires_grad=True)
    teacher, reference = (torch.randn(7, dtype=torch.float64, generator=draw).log_softmax(0) for _ in range(2))
    student = logits.log_softmax(0)
    p = student.exp()
    goal = scale * (p * (teacher - reference)).sum() - (p * (student - reference)).sum()
    (expected,) = torch.autograd.grad(goal, logits, retain_graph=True)
    method = built(
        "g_opd", [{"model": "t", "weight": 3.0}, {"model": "u"}, {"model": "self", "weights": "base"}],
        g_opd={"reference": "self", "reward_scale": scale},
    )  # fmt: skip
    method.teachers = [ScriptedTeacher(name, []) for name in ("t", "u", "self")]
    method.teachers[0].weight = 3.0
    sample = make_rollout("r", list(range(7)))
    batch = Batch(samples=[sample])
    asyncio.run(method.annotate(batch))
    np.testing.assert_allclose(sample.mix, [0.75 * scale, 0.25 * scale, 1 - scale], rtol=1e-6, atol=1e-7)
    sample.teacher_targets = (Hidden(torch.zeros(7, 1)),) * 3
    sample.student_logprob = student.detach().float().numpy()
    sample.teacher_logprob = torch.stack([teacher, teacher, reference], 1).float().numpy()
    method.weigh(batch)
    advantage = torch.from_numpy(np.asarray(sample.advantage, dtype=np.float64))
    (found,) = torch.autograd.grad((p.detach() * advantage * student).sum(), logits)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    assert not np.any(sample.kl_weight)


@pytest.mark.parametrize("scale", [0.5, 1.0, 1.25, 2.0])
def test_the_exact_form_has_the_gradient_of_a_scaled_reward(scale: float) -> None:
    """Through the fused loss, in hidden states and head: that of KL(p || r) - lambda E[log q/r] in float64."""
    draw = torch.Generator().manual_seed(1)
    rows, width, vocab = 6, 5, 11

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=draw)

    hidden, weight = normal(rows, width), normal(vocab, width)
    heads = {name: (normal(rows, width), normal(vocab, width)) for name in ("t", "self")}
    method = built(
        "g_opd", [{"model": "t"}, {"model": "self", "weights": "base"}],
        g_opd={"reference": "self", "reward_scale": scale}, advantage={"kl_mode": "full_vocab"},
    )  # fmt: skip
    method.teachers = [ScriptedTeacher(name, []) for name in ("t", "self")]
    samples = [make_rollout("a", [1, 2, 3, 4]), make_rollout("b", [5, 6])]
    batch = Batch(samples=samples)
    asyncio.run(method.annotate(batch))
    start = 0
    for sample in samples:
        end = start + len(sample.target_ids)
        sample.teacher_targets = tuple(Hidden(heads[name][0][start:end].float()) for name in ("t", "self"))
        start = end
    method.weigh(batch)
    set_scales(samples, "token", Ranks())
    assert method.diverges and not any(np.any(sample.advantage) for sample in samples)
    given = [x.float().requires_grad_() for x in (hidden, weight)]
    statistics = Statistics(["a", "b"])
    objective = Objective({name: LMHead(w.float()) for name, (_, w) in heads.items()}, lambda key: "reverse_kl")
    loss = objective(given[0], LMHead(given[1]), samples, statistics)
    found = torch.autograd.grad(loss, given)
    exact = [x.clone().requires_grad_() for x in (hidden, weight)]
    student = (exact[0] @ exact[1].T).log_softmax(-1)
    teacher, reference = ((h @ w.T).log_softmax(-1) for h, w in heads.values())
    goal = scale * (student.exp() * (teacher - reference)).sum(1) - (student.exp() * (student - reference)).sum(1)
    expected = torch.autograd.grad(-goal.mean(), exact)
    assert float(loss.detach()) == pytest.approx(-float(goal.mean().detach()), rel=1e-5, abs=1e-6)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-4, atol=1e-6)
    noted = np.concatenate([statistics.tokens[sample.id]["divergence"] for sample in samples])
    np.testing.assert_allclose(noted, -goal.detach().numpy(), rtol=1e-4, atol=1e-5)
    for name, judge in (("t", teacher), ("self", reference)) if scale != 1 else (("t", teacher),):
        kl = (student.exp() * (student - judge)).sum(1).detach().numpy()
        np.testing.assert_allclose(statistics.get(f"teacher_kl/{name}"), kl, rtol=1e-4)
    assert len(statistics.get("student_entropy")) == rows


def test_a_run_goes_beyond_its_teacher_over_the_whole_vocabulary(
    models: Models, prompt_file: str, tmp_path: Path
) -> None:
    """The base model under an adapter is the reference; the loss of the first step is lambda times the teacher's KL."""
    config = make_config(
        models, prompt_file, tmp_path, method="g_opd", lora={"r": 2}, g_opd={"reference": "self", "reward_scale": 1.5},
        teachers=[{"model": models["big"]}, {"model": "self", "weights": "base"}], advantage={"kl_mode": "full_vocab"},
    )  # fmt: skip
    result = train(config, progress=False)
    first = result.history[0]
    assert first["loss"] == pytest.approx(1.5 * first["teacher_kl/big"], rel=1e-4)
    assert first["teacher_kl/self"] == pytest.approx(0, abs=1e-6) and result.metrics["teacher_kl/self"] > 0


def test_a_rollout_that_only_some_have_judged_is_left_out() -> None:
    method = built(
        "g_opd", [{"model": "t"}, {"model": "self", "weights": "base"}], g_opd={"reference": "self"}
    )  # fmt: skip
    method.teachers = [ScriptedTeacher(name, []) for name in ("t", "self")]
    samples = [make_rollout("a", [1, 2]), make_rollout("b", [1, 2])]
    batch = make_batch(samples, [[1.0, 2.0]] * 2)
    asyncio.run(method.annotate(batch))
    for sample, names in zip(samples, (("t", "self"), ("self",)), strict=True):
        sample.keep_teachers(names)
        sample.teacher_targets = (Hidden(torch.zeros(2, 1)),) * len(names)
        sample.teacher_logprob = np.zeros((2, len(names)), dtype=np.float32)
    method.weigh(batch)
    assert [s.drop for s in samples] == ["", "teacher_failure"]


# ------------------------------------------------------------------------------------------------ rewards


def test_rewards_are_added_to_a_distillation(models: Models, prompt_file: str, tmp_path: Path) -> None:
    """The loss is that of the distillation, and weight times the mean of -A log p over tokens, then rollouts."""
    settings: dict[str, Any] = {
        "method": "opd", "teachers": [{"model": models["big"]}], "num_generations": 4, "verifier": EVEN,
        "loss_normalization": "sequence",
    }  # fmt: skip
    losses, terms = [], 0.0
    for weight in (0.0, 0.7):
        engine = make_engine(make_config(models, prompt_file, tmp_path, **settings, grpo={"weight": weight}))
        samples = make_samples(engine, load_prompts([prompt_file]).prompts[:3])
        engine._optimizer_step = lambda loss, norm: {"loss": loss}  # type: ignore[method-assign]
        losses.append(engine.update(Batch(samples=samples)).metrics["loss"])
        if weight:
            rewards = np.array([s.reward for s in samples]).reshape(-1, 4)
            assert 0 < rewards.mean() < 1
            centred = rewards - rewards.mean(1, keepdims=True)
            advantages = (centred / (rewards.std(1, ddof=1, keepdims=True) + 1e-4)).ravel()
            for sample, advantage in zip(samples, advantages, strict=True):
                rows = full_logprobs(models["student"], sample.token_ids, sample.target_positions, engine.vocab_size)
                own = rows.gather(1, torch.from_numpy(sample.target_ids)[:, None])
                terms -= weight * advantage * float(own.mean()) / len(samples)
    assert losses[1] - losses[0] == pytest.approx(terms, rel=1e-3, abs=1e-6)


def test_rewards_alone_train_without_a_teacher(models: Models, prompt_file: str, tmp_path: Path) -> None:
    config = make_config(
        models, prompt_file, tmp_path / "run", method="grpo", teachers=[], num_generations=4, verifier=EVEN,
        grpo={"weight": 1.0}, max_steps=1, warmup_ratio=0.0,
    )  # fmt: skip
    metrics = train(config, progress=False).metrics
    assert metrics["grad_norm"] > 0 and metrics["grpo/rollouts"] == 16 and 0 < metrics["grpo/reward"] < 1


def test_states_of_one_episode_count_once() -> None:
    method = built("opd", num_generations=2, grpo={"weight": 1.0, "scale_rewards": "none"})
    samples = [
        make_rollout("a", [1], group="g", reward=1.0, trajectory="one"),
        make_rollout("b", [1], group="g", reward=1.0, trajectory="one"),
        make_rollout("c", [1], group="g", reward=0.0, trajectory="two"),
    ]
    batch = Batch(samples=samples)
    method.weigh(batch)
    np.testing.assert_allclose([s.advantage[0] for s in samples], np.array([0.5, 0.5, -0.5]) / (1 + 1e-4), rtol=1e-6)
    assert batch.metrics["grpo/rollouts"] == 2 and batch.metrics["grpo/no_spread"] == 0


def test_what_is_left_out_counts_in_the_mean_of_its_prompt() -> None:
    """Rewards 1, 1, 0, 0 of which one 0 is left out: the others are above or below 1/2, not 2/3."""
    method = built("opd", num_generations=4, grpo={"weight": 1.0, "scale_rewards": "group"})
    rewards = [1.0, 1.0, 0.0, 0.0]
    samples = [make_rollout(str(i), [1], group="g", reward=reward) for i, reward in enumerate(rewards)]
    samples[3].drop = "teacher_window/t"
    batch = Batch(samples=samples)
    method.weigh(batch)
    expected = np.array([0.5, 0.5, -0.5]) / (np.std(rewards, ddof=1) + 1e-4)
    np.testing.assert_allclose([s.advantage[0] for s in samples[:3]], expected, rtol=1e-6)
    assert samples[3].advantage is None and batch.metrics["grpo/rollouts"] == 4


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (
            {"method": "gold", "advantage": {"kl_mode": "sampled"}},
            "advantage.kl_mode=sampled .* temperature=0.9, top_p",
        ),
        ({"method": "uni_opd", "num_generations": 2, "temperature": 0.7}, "kl_mode=sampled .*; set temperature: 1, or"),
        ({"method": "opd", "num_generations": 2, "top_k": 20, "grpo": {"weight": 1.0}}, "grpo.weight=1.0 .* top_k=20"),
        ({"method": "gold"}, ""),
        ({"method": "uni_opd", "num_generations": 2}, ""),
        ({"method": "opd", "temperature": 0.7}, ""),
    ],
)
def test_samples_of_another_distribution_than_the_gradients_are_pointed_out(
    settings: dict[str, Any], said: str, caplog: pytest.LogCaptureFixture
) -> None:
    """The mean of (log q - log p) d log p is the gradient of KL(p || q) over samples of p, and not of p at 0.7."""
    alignment = "spans" if settings["method"] == "gold" else "none"
    built(teachers=[{"model": "t", "tokenizer_alignment": alignment}], **settings)
    found = [r.getMessage() for r in caplog.records if "samples from another distribution" in r.getMessage()]
    assert len(found) == bool(said) and (not said or re.search(said, found[0]))


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_equal_rewards_have_no_advantage_however_their_mean_is_rounded(scale: str) -> None:
    """In float64 the mean of three times 0.1 is no 0.1, and 0.1 + 0.2 is no 0.3."""
    equal = [0.1, 0.1, 0.1, 0.3, 0.1 + 0.2, 0.3]
    assert np.mean(equal[:3]) != 0.1 and equal[3] != equal[4]
    found = advantages(["a"] * 3 + ["b"] * 3 + ["c"] * 2, [*equal, 0.0, 1.0], scale)
    assert not found[:6].any() and found[6] == -found[7] != 0


def test_how_far_the_policy_has_moved_is_known_without_a_teacher(
    models: Models, prompt_file: str, tmp_path: Path
) -> None:
    """0 where no update lies between; else the ratio of the weights now to those that sampled."""
    config = make_config(
        models, prompt_file, tmp_path, method="grpo", teachers=[], num_generations=2, verifier=EVEN,
        grpo={"weight": 1.0}, max_completion_length=4,
    )  # fmt: skip
    engine = make_engine(config)
    samples = make_samples(engine, load_prompts([prompt_file]).prompts[:2])
    assert all(not s.policy_logratio.any() for s in samples if s.policy_logratio is not None)
    for parameter in engine.student.model.parameters():
        parameter.data *= 1.1
    engine.version = 1
    batch = Batch(samples=samples)
    engine.measure(batch)
    engine.student.model.save_pretrained(tmp_path / "moved")
    for sample in samples:
        rows = full_logprobs(str(tmp_path / "moved"), sample.token_ids, sample.target_positions, engine.vocab_size)
        now = rows.gather(1, torch.from_numpy(sample.target_ids)[:, None])[:, 0].numpy()
        assert sample.policy_logratio is not None and sample.student_logprob is None
        np.testing.assert_allclose(sample.policy_logratio, now - sample.sampler_logprob, rtol=1e-3, atol=1e-3)


# ------------------------------------------------------------------------------------------------ tokens


def test_rewards_are_bounded_from_below_on_uncertain_tokens() -> None:
    """log(0.1 / 0.9) = -2.197 nats; half of five tokens are three."""
    method = built("relaxed_opd", relaxed_opd={"mixture": 0.1, "entropy_share": 0.5})
    sample = make_rollout("a", [1] * 5)
    batch = make_batch([sample], [[1.0, -1.0, -5.0, -2.0, -9.0]])
    sample.student_entropy = np.array([0.1, 0.5, 0.9, 0.2, 0.7], dtype=np.float32)
    sample.policy_logratio = np.zeros(5, dtype=np.float32)
    method.weigh(batch)
    floor = np.log(0.1 / 0.9)
    np.testing.assert_allclose(sample.advantage, [0, -1, floor, 0, floor], rtol=1e-5)
    assert batch.metrics["relaxed/kept"] == pytest.approx(0.6)
    assert batch.metrics["relaxed/clipped"] == pytest.approx(0.4)
    sample.student_entropy = np.zeros(5, dtype=np.float32)
    assert uncertain(sample, 0.5).all()  # none is more certain than another


def test_the_entropy_of_the_student_is_measured(models: Models, prompt_file: str, tmp_path: Path) -> None:
    config = make_config(models, prompt_file, tmp_path, method="relaxed_opd", teachers=[{"model": models["big"]}])
    engine = make_engine(config)
    sample = make_samples(engine, load_prompts([prompt_file]).prompts[:1])[0]
    rows = full_logprobs(models["student"], sample.token_ids, sample.target_positions, engine.vocab_size)
    np.testing.assert_allclose(sample.student_entropy, -(rows.exp() * rows).sum(1), rtol=1e-4)


def test_tokens_are_verified_as_in_speculative_decoding() -> None:
    """Accepted with probability min(1, q / p): always where the teacher likes them more, here else in 1 of 4."""
    method = built("selectkd", selectkd={"rejected_weight": 0.25})
    count = 4000
    sample = make_rollout("a", [1] * count)
    gaps = np.where(np.arange(count) % 2, 0.5, np.log(0.25))
    batch = make_batch([sample], [gaps.tolist()])
    sample.teacher_top1 = np.ones((count, 1), dtype=np.float32)
    method.weigh(batch)
    assert (sample.kl_weight[1::2] == 1).all()
    accepted = sample.kl_weight[::2] == 1
    assert abs(accepted.mean() - 0.25) < 4 * np.sqrt(0.25 * 0.75 / (count / 2))
    assert set(sample.kl_weight[::2].tolist()) == {0.25, 1.0}
    first = sample.kl_weight.copy()
    method.weigh(batch)
    assert np.array_equal(sample.kl_weight, first)  # a resumed step draws the same
    greedy = built("selectkd", selectkd={"verify": "greedy"})
    sample.teacher_top1 = np.exp(sample.teacher_logprob)
    sample.teacher_top1[0] += 0.01
    greedy.weigh(batch)
    assert sample.kl_weight[0] == 0 and (sample.kl_weight[1:] == 1).all()


@pytest.mark.parametrize(
    ("method", "settings", "words"),
    [
        ("g_opd", {"g_opd": {"reference": "x"}}, r"g_opd.reference='x' is no teacher; name one of \['self', 't'\]"),
        ("g_opd", {**EXACT, "divergence": "jsd"}, "full_vocab' is not possible with divergence='jsd'"),
        ("g_opd", {**EXACT, "divergence": {"a": "reverse_kl", "default": "forward_kl"}}, "divergence={'a'"),
        ("g_opd", {**EXACT, "teacher_reduction": "mixture"}, "full_vocab' is not possible with teacher_reduction"),
        *(("g_opd", {**EXACT, "teachers": [{"model": "t", **other}, {"model": "self", "weights": "base"}]},
           r"full_vocab' is not possible with the teachers \['t'\]")
          for other in ({"base_url": "http://h/v1", "tokenizer": "t"}, {"tokenizer_alignment": "spans"})),
        ("g_opd", {"g_opd": {"reference": "self", "reward_scale": 0}}, "g_opd.reward_scale=0.0 is not possible"),
        ("g_opd", {"g_opd": {"reference": "self"}, "teachers": [{"model": "t"}]}, "needs at least 2 teacher"),
        ("opd", {"grpo": {"weight": 1.0}, "teachers": [{"model": "t"}]}, "num_generations=1 is not possible with grpo"),
        ("opd", {"grpo": {"weight": -1.0}}, "grpo.weight=-1.0 is not possible"),
        ("grpo", {"grpo": {"weight": 0.0}, "teachers": []}, "grpo.weight=0 is not possible with method 'grpo'"),
        ("grpo", {"teachers": [{"model": "t"}]}, "method 'grpo' asks no teacher"),
        ("grpo", {"teachers": [], "teacher_prompt_template": "{prompt} {a}"}, "asks no teacher"),
        ("relaxed_opd", {"advantage": {"kl_mode": "full_vocab"}}, "method 'relaxed_opd', which bounds"),
        ("opd", {"grpo": {"scale_rewards": "batch"}}, "grpo.scale_rewards='batch' has no effect with grpo.weight=0"),
        ("opd", {"grpo": {"epsilon": 0.1}}, "grpo.epsilon=0.1 has no effect with grpo.weight=0"),
        ("sdpo", {"grpo": {"weight": 1.0}, "teachers": [{"model": "self", "weights": "ema"}]}, "1 - sdpo.distill"),
        ("relaxed_opd", {"relaxed_opd": {"mixture": 1.0}}, "relaxed_opd.mixture=1.0 is not possible"),
        ("relaxed_opd", {"relaxed_opd": {"entropy_share": 0}}, "relaxed_opd.entropy_share=0.0 is not possible"),
        ("selectkd", {"selectkd": {"verify": "top"}}, "selectkd.verify='top' is not possible"),
        ("selectkd", {"selectkd": {"rejected_weight": 2}}, "selectkd.rejected_weight=2.0 is not possible"),
    ],
)  # fmt: skip
def test_settings_that_do_not_fit_are_refused(method: str, settings: dict[str, Any], words: str) -> None:
    two = [{"model": "t"}, {"model": "self", "weights": "base"}]
    with pytest.raises(ConfigError, match=words):
        built(method, **{"teachers": two, **settings})
