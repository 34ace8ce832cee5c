"""The policy-gradient form of the reverse KL against the exact one, and the tokens that it leaves out."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from engine_helpers import assert_same_gradients, loss_and_gradient, make_config, make_engine
from method_helpers import make_batch, make_rollout

import opdengine.loss.objective
from opd_kernels import LMHead
from opdengine.config.train import ConfigError
from opdengine.data.prompts import load_prompts
from opdengine.distributed import Ranks
from opdengine.loss.objective import Objective
from opdengine.methods import build_method
from opdengine.methods.method import Method
from opdengine.methods.policy_gradient import PolicyGradient, gap_of
from opdengine.training.step import Engine
from opdengine.types import Batch, Sample

VOCAB, WIDTH = 7, 5
Models = dict[str, str]


def logprobs(seed: int, shape: tuple[int, ...] = (VOCAB,)) -> np.ndarray:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).double().log_softmax(-1).numpy()


def every_token(student: np.ndarray, teachers: np.ndarray, mix: np.ndarray, behaviour: np.ndarray) -> Batch:
    """One sample of a single token for each token of the vocabulary."""
    samples = [make_rollout(str(y), [y], logprobs=[behaviour[y]]) for y in range(VOCAB)]
    for y, sample in enumerate(samples):
        sample.mix = mix.astype(np.float32)
        sample.student_logprob, sample.teacher_logprob = student[[y]], teachers[:, [y]].T
        sample.sampler_logratio = student[[y]] - behaviour[[y]]
    return Batch(samples=samples)


def weighed(gradient: PolicyGradient, batch: Batch) -> Batch:
    gradient.weigh(batch, Ranks())
    return batch


@pytest.mark.parametrize("mix", [(1.0,), (0.7, 0.3), (0.2, 0.3, 0.5)])
@pytest.mark.parametrize("off_policy", [False, True])
def test_expected_gradient_is_that_of_the_exact_reverse_kl(mix: tuple[float, ...], off_policy: bool) -> None:
    """All tokens, weighted by the distribution that samples them; off policy the ratio corrects for it."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(1, WIDTH, generator=generator, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(VOCAB, WIDTH, generator=generator, dtype=torch.float64, requires_grad=True)
    teachers, weights = logprobs(1, (len(mix), VOCAB)), np.array(mix)
    student = (hidden @ weight.T).log_softmax(-1)
    p = student.detach().numpy()[0]
    behaviour = logprobs(2) if off_policy else p
    gradient = PolicyGradient(importance="truncated", high=1e9) if off_policy else PolicyGradient()

    batch = every_token(p, teachers, weights, behaviour)
    samples = weighed(gradient, batch).samples
    for y, sample in enumerate(samples):
        sample.scale = float(np.exp(behaviour[y]))
    objective = Objective(heads={}, divergence_of=lambda key: "reverse_kl", impl="torch")
    loss = objective(hidden.repeat(VOCAB, 1), LMHead(weight, None, 1.0, None), samples)
    ours = torch.autograd.grad(loss, [hidden, weight])

    exact = sum(w * (student.exp() * (student - torch.from_numpy(q))).sum() for w, q in zip(mix, teachers, strict=True))
    for mine, theirs in zip(ours, torch.autograd.grad(exact, [hidden, weight]), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)


def test_large_gaps_carry_no_loss_and_are_counted() -> None:
    rollouts = [make_rollout("a", [1, 2, 3, 4]), make_rollout("b", [1, 2])]
    batch = make_batch(rollouts, [[1.0, -10.0, 9.99, 12.0], [-11.0, 0.5]])
    one, two = weighed(PolicyGradient(max_gap=10.0), batch).samples
    np.testing.assert_allclose(one.advantage, [1, 0, 9.99, 0], rtol=1e-6)
    np.testing.assert_allclose(two.advantage, [0, 0.5], rtol=1e-6)
    assert batch.metrics["advantage/gap_masked"] == 3
    weighed(PolicyGradient(exact=True, max_gap=10.0), batch)
    np.testing.assert_array_equal(one.kl_weight, [1, 0, 1, 0])
    assert weighed(PolicyGradient(), batch).metrics["advantage/gap_masked"] == 0


@pytest.mark.parametrize(
    ("kind", "low", "high", "expected"),
    [
        ("none", 0, 0, [1, 1, 1, 1]),
        ("band", 0.5, 2.0, [0, 0.6, 1.5, 0]),
        ("truncated", 0, 2.0, [0.25, 0.6, 1.5, 2]),
        ("clip", 0.2, 0.28, [0.25, 0.6, 0, 0]),  # the advantages are positive: only upward moves are spent
    ],
)
def test_importance_weights_multiply_the_advantage(kind: str, low: float, high: float, expected: list[float]) -> None:
    r = np.array([0.25, 0.6, 1.5, 4.0])
    student = -np.ones(4)
    rollout = make_rollout("a", [1, 2, 3, 4], logprobs=student - np.log(r))
    batch = weighed(PolicyGradient(False, kind, low, high), make_batch([rollout], [[2.0] * 4], [student]))
    np.testing.assert_allclose(rollout.advantage, 2 * np.array(expected), rtol=1e-5)
    assert batch.metrics["advantage/importance_masked"] == expected.count(0)


def test_rollouts_without_sampler_logprobs_are_counted_and_weigh_one() -> None:
    batch = make_batch([make_rollout("a", [1, 2])], [[1.0, -1.0]])
    weighed(PolicyGradient(False, "band", 0.5, 2.0), batch)
    np.testing.assert_allclose(batch.samples[0].advantage, [1, -1])
    assert batch.metrics["advantage/without_sampler_logprobs"] == 1


def test_unjudged_rollouts_have_no_gap_and_no_statistics() -> None:
    sample = make_rollout("a", [1, 2])
    sample.turn_weight = np.zeros(2)
    batch = weighed(PolicyGradient(max_gap=1.0), Batch(samples=[sample]))
    assert not np.any(sample.advantage)
    assert "gap/mean" not in batch.metrics


def test_turn_weights_multiply_the_advantage() -> None:
    batch = make_batch([make_rollout("a", [1, 2])], [[1.0, 3.0]])
    batch.samples[0].turn_weight = np.array([0.0, 0.5])
    np.testing.assert_allclose(weighed(PolicyGradient(), batch).samples[0].advantage, [0.5, 1.5])


# ------------------------------------------------------------------------------- with real models


def cut(rollout: Sample, length: int) -> Sample:
    prompt, answer = rollout.turns
    answer = dataclasses.replace(answer, token_ids=answer.token_ids[:length], logprobs=answer.logprobs[:length])
    return dataclasses.replace(rollout, turns=(prompt, answer))


Weigher = Callable[[Engine, Batch], None]


def gather(engine: Engine, prompt_file: str, weigh: Weigher) -> list[Sample]:
    """The samples of one step under other weights, of different lengths."""

    async def run() -> list[Sample]:
        batch = await engine.rollout(load_prompts([prompt_file]).prompts[:4], 0)
        batch.samples = [cut(s, 2 + i) for i, s in enumerate(batch)]
        await engine.annotate(batch)
        await engine.score(batch)
        engine.method.needs = frozenset({"student_logprob", "teacher_logprob"})
        engine.measure(batch)
        engine.method.weigh = lambda batch: weigh(engine, batch)  # type: ignore[method-assign]
        engine.weigh(batch)
        return list(batch)

    return asyncio.run(run())


def distill(engine: Engine, batch: Batch) -> None:
    Method.weigh(engine.method, batch)


def sampled_form(engine: Engine, batch: Batch) -> None:
    PolicyGradient().weigh(batch, engine.ranks)


def both_terms(engine: Engine, batch: Batch) -> None:
    sampled_form(engine, batch)
    distill(engine, batch)


@pytest.fixture
def engine(models: Models, prompt_file: str, tmp_path: Path) -> Engine:
    return make_engine(make_config(models, prompt_file, tmp_path / "run"))


def test_both_terms_of_one_method_sum(engine: Engine, prompt_file: str) -> None:
    parts = [
        loss_and_gradient(engine, gather(engine, prompt_file, weigh)) for weigh in (distill, sampled_form, both_terms)
    ]
    (divergence, one), (sampled, two), (both, three) = parts
    assert divergence != 0 and sampled != 0
    assert both == pytest.approx(divergence + sampled, rel=1e-5)
    assert_same_gradients({n: one[n] + two[n] for n in one}, three)


@pytest.mark.parametrize("normalization", ["token", "sequence"])
def test_loss_is_the_mean_of_weighted_logprobs(
    models: Models, prompt_file: str, tmp_path: Path, normalization: str
) -> None:
    """Against the logits of the whole models: -mean(gap * log p), per token or per rollout."""
    from transformers import AutoModelForCausalLM

    engine = make_engine(make_config(models, prompt_file, tmp_path / "run", loss_normalization=normalization))
    samples = gather(engine, prompt_file, sampled_form)
    student = AutoModelForCausalLM.from_pretrained(models["student"], dtype=torch.float64)
    teachers = [AutoModelForCausalLM.from_pretrained(models[n], dtype=torch.float64) for n in ("big", "small")]
    vocab, parts = engine.vocab_size, []
    for sample in samples:
        ids, places = torch.from_numpy(sample.token_ids)[None], sample.target_positions
        rows, targets = torch.from_numpy(places - 1), torch.from_numpy(sample.target_ids)

        def read(model: Any, ids: torch.Tensor = ids, rows: Any = rows, targets: Any = targets) -> torch.Tensor:
            logits = model(input_ids=ids).logits[0][rows, :vocab]
            return logits.log_softmax(-1).gather(1, targets[:, None])[:, 0]

        own = read(student)
        with torch.no_grad():
            gap = 0.75 * read(teachers[0]) + 0.25 * read(teachers[1]) - own
        parts.append(-gap * own)
    expected = torch.cat(parts).mean() if normalization == "token" else torch.stack([x.mean() for x in parts]).mean()
    expected.backward()
    loss, gradients = loss_and_gradient(engine, samples)
    assert len({len(p) for p in parts}) > 1  # else both means are equal
    assert loss == pytest.approx(expected.item(), rel=1e-4)
    theirs = {n: p.grad.float() for n, p in student.named_parameters() if p.grad is not None}
    assert_same_gradients(gradients, theirs, rtol=1e-3)


def test_only_tokens_with_an_advantage_go_through_the_head(
    engine: Engine, prompt_file: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    samples = gather(engine, prompt_file, sampled_form)
    sparse = [
        dataclasses.replace(i, advantage=np.where(np.arange(len(i.advantage)) % 2, i.advantage, 0)) for i in samples
    ]
    rows = []
    plain = opdengine.loss.objective.linear_logprob
    monkeypatch.setattr(
        opdengine.loss.objective, "linear_logprob", lambda h, *a, **k: (rows.append(len(h)), plain(h, *a, **k))[1]
    )
    monkeypatch.setattr(
        opdengine.loss.objective, "linear_divergence", lambda *a, **k: pytest.fail("no divergence asked")
    )
    _, ours = loss_and_gradient(engine, sparse)
    assert sum(rows) == sum(len(i.advantage) // 2 for i in samples)
    whole = [dataclasses.replace(i, advantage=np.where(i.advantage == 0, 1e-30, i.advantage)) for i in sparse]
    _, theirs = loss_and_gradient(engine, whole)
    assert_same_gradients(ours, theirs)


def test_sampled_steps_still_report_teachers_and_sampler(models: Models, prompt_file: str, tmp_path: Path) -> None:
    config = make_config(
        models, prompt_file, tmp_path / "run", method="camopd", camopd={"domain": ["code"], "selection": "none"},
        teachers=[{"model": models["big"], "key": ["agentic"]}, {"model": models["small"], "key": ["code"]}],
    )  # fmt: skip
    metrics = asyncio.run(make_engine(config).step(load_prompts([prompt_file]).prompts[:4])).metrics
    assert metrics["sampling/logprob_difference"] < 1e-4
    assert {"teacher_kl/big", "teacher_kl/small", "gap/mean"} <= metrics.keys()


def test_a_dead_teacher_stops_a_sampled_run(models: Models, prompt_file: str, tmp_path: Path) -> None:
    from opdengine.errors import ProbeError

    config = make_config(
        models, prompt_file, tmp_path / "run", method="camopd", camopd={"domain": ["code"]},
        teachers=[{"model": models["big"], "key": ["agentic"]}, {"model": models["small"], "key": ["code"]}],
    )  # fmt: skip
    engine = make_engine(config)
    engine.teachers[0].head.weight.data.zero_()
    with pytest.raises(ProbeError, match="teacher 'big' is dead"):
        asyncio.run(engine.step(load_prompts([prompt_file]).prompts[:4]))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"divergence": "jsd"}, "divergence='jsd' is not possible"),
        ({"divergence_temperature": 2.0}, "divergence_temperature=2.0 is not possible"),
        ({"advantage": {"importance": "band", "low": 3.0}}, "leaves no token any weight"),
        ({"advantage": {"importance": "bend"}}, "advantage.importance='bend' is not possible"),
        ({"advantage": {"importance": "none", "low": 0.5}}, "advantage.low=0.5 has no effect with .*importance='none'"),
        ({"advantage": {"importance": "none", "high": 3.0}}, "advantage.high=3.0 has no effect with"),
        ({"advantage": {"importance": "truncated", "low": 0.5}}, "advantage.low=0.5 has no effect with .*='truncated'"),
        ({"advantage": {"max_gap": 0.0}}, "advantage.max_gap=0.0 is not possible"),
    ],
)
def test_impossible_settings_are_refused(
    models: Models, prompt_file: str, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        build_method(make_config(models, prompt_file, tmp_path, method="uni_opd", **changes))


def test_gap_mixes_teachers_by_weight() -> None:
    sample = make_rollout("a", [1])
    sample.mix = np.array([0.25, 0.75], dtype=np.float32)
    sample.student_logprob, sample.teacher_logprob = np.array([-2.0]), np.array([[-1.0, -4.0]])
    np.testing.assert_allclose(gap_of(sample), [0.25 * 1 + 0.75 * -2])
