"""Scores, selection, schedule and loss of CaMOPD; what the update costs; diagnostics with their control."""

from __future__ import annotations

import asyncio
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from engine_helpers import assert_same_gradients, loss_and_gradient, make_config, make_engine
from method_helpers import make_batch, make_rollout
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM

from opd_kernels import heads, linear_logprob
from opdengine.config.loading import from_mapping
from opdengine.config.train import ConfigError, TrainConfig
from opdengine.data.prompts import DataError, PromptSet, ScheduledStream, load_prompts
from opdengine.loss import objective
from opdengine.loss.objective import kl_weight
from opdengine.methods import PAPERS, build_method
from opdengine.methods.camopd import CaMOPD, gap_score, mass_prefix, select
from opdengine.methods.policy_gradient import PolicyGradient
from opdengine.training import scoring
from opdengine.training.diagnostics import (
    Coherence,
    coherence,
    coherence_gain,
    probed_parameters,
    sample_gradients,
    sketch,
)
from opdengine.training.run import train
from opdengine.training.step import Engine
from opdengine.training.writer import read_metrics
from opdengine.types import Batch, Completion, Prompt, Sample

Models = dict[str, str]


def method(**settings: Any) -> CaMOPD:
    """The method with some settings, without any model."""
    teachers = [{"model": "t", "key": ["g"]}, {"model": "u", "key": ["d"]}]
    section = {"domain": ["d"], **settings}
    return CaMOPD(
        from_mapping(
            TrainConfig,
            {
                "model": "m",
                "teachers": teachers,
                "output_dir": "o",
                "train_data": ["d"],
                "method": "camopd",
                "camopd": section,
            },
        )
    )


def test_scores() -> None:
    gap = np.array([-2, 0.5, -0.1, 1])
    scores = {kind: gap_score(gap, kind) for kind in ("abs", "pos", "signed", "sq")}
    assert scores == pytest.approx({"abs": 0.9, "pos": 0.375, "signed": -0.15, "sq": 5.26 / 4})


@pytest.mark.parametrize(("rho", "kept"), [(0.75, {1, 3}), (0.8, {1, 3}), (0.85, {0, 1, 3}), (1.0, {0, 1, 2, 3, 4})])
def test_mass_prefix(rho: float, kept: set[int]) -> None:
    assert set(np.flatnonzero(mass_prefix(np.array([0.10, 0.50, 0.06, 0.30, 0.04]), rho))) == kept


def test_mass_prefix_at_its_edges() -> None:
    assert mass_prefix(np.zeros(3), 0.8).all()  # a student equal to its teacher
    assert mass_prefix(np.array([-1.0, -2.0]), 0.8).all()
    assert mass_prefix(np.array([-5.0, 1.0]), 1.0).tolist() == [False, True]
    assert mass_prefix(np.ones(4), 0.5).tolist() == [True, True, False, False]  # ties by place


def test_mass_selection_does_not_depend_on_the_order() -> None:
    rng = np.random.default_rng(0)
    scores = rng.exponential(size=64)
    chosen, order = mass_prefix(scores, 0.8), rng.permutation(64)
    np.testing.assert_array_equal(mass_prefix(scores[order], 0.8), chosen[order])
    assert scores[chosen].min() > scores[~chosen].max()
    assert scores[chosen].sum() / scores.sum() >= 0.8 > (scores[chosen].sum() - scores[chosen].min()) / scores.sum()


def test_other_selections() -> None:
    scores = np.array([0.1, 0.5, 0.06, 0.3, 0.04])
    assert set(np.flatnonzero(select(scores, 0.5, "topk_frac", [0]))) == {0, 1, 3}
    assert select(np.arange(100.0), 0.55, "topk_frac", [0]).sum() == 55  # 0.55 * 100 is a little more
    assert select(scores, 0.5, "none", [0]).all()
    randoms = [select(scores, 0.8, "random", [0, step]) for step in range(40)]
    assert all(chosen.sum() == 2 for chosen in randoms)  # as many as by mass
    assert len({tuple(chosen) for chosen in randoms}) > 5
    np.testing.assert_array_equal(randoms[7], select(scores, 0.8, "random", [0, 7]))


def test_alternating_schedule() -> None:
    branches = method()
    steps = ["D" if branches.schedule(t)["domain"] else "G" for t in range(120)]
    assert "".join(steps[:8]) == "GGGDGGGD"
    assert Counter(steps) == {"G": 90, "D": 30}
    assert method(schedule="mixed").schedule(5) == {"general": 0.75, "domain": 0.25}


# ------------------------------------------------------------------------------------- streams


def prompt_set(general: int, domain: int) -> PromptSet:
    keys = ["g"] * general + ["d"] * domain
    return PromptSet(tuple(Prompt(f"{k}{i}", ({"role": "user", "content": k},), key=k) for i, k in enumerate(keys)), {})


def test_each_stream_keeps_its_own_order() -> None:
    """The prompts of a branch come as they would alone, whatever the other one does."""
    alone = ScheduledStream(prompt_set(10, 7), 3, method(n_general=1))
    other = ScheduledStream(prompt_set(10, 7), 3, method(n_general=3))
    drawn = [[p.id for _ in range(24) for p in stream.next(4)] for stream in (alone, other)]
    for key, count in (("g", 48), ("d", 24)):
        one, two = ([i for i in ids if i.startswith(key)][:count] for ids in drawn)
        assert one == two and len(one) == count
    batches = [{p.key for p in alone.next(4)} for _ in range(4)]
    assert batches == [{"g"}, {"d"}, {"g"}, {"d"}]


def test_mixed_batches_are_rounded_by_largest_remainder() -> None:
    for ratio, count, expected in ((1, 8, (4, 4)), (3, 8, (6, 2)), (3, 6, (5, 1)), (3, 5, (4, 1)), (2, 4, (3, 1))):
        schedule = method(schedule="mixed", n_general=ratio)
        keys = Counter(p.key for p in ScheduledStream(prompt_set(20, 20), 0, schedule).next(count))
        assert (keys["g"], keys["d"]) == expected


def test_streams_resume_where_they_stopped() -> None:
    schedule = method()
    whole, first = (ScheduledStream(prompt_set(5, 3), 1, schedule) for _ in range(2))
    expected = [[p.id for p in whole.next(3)] for _ in range(14)]
    begun = [[p.id for p in first.next(3)] for _ in range(6)]
    resumed = ScheduledStream(prompt_set(5, 3), 1, schedule)
    resumed.load_state_dict(first.state_dict())
    assert begun + [[p.id for p in resumed.next(3)] for _ in range(8)] == expected
    with pytest.raises(DataError, match="other training data"):
        ScheduledStream(prompt_set(5, 4), 1, schedule).load_state_dict(first.state_dict())


def test_a_stream_without_prompts_is_refused() -> None:
    with pytest.raises(DataError, match="no prompt belongs to the stream 'domain'"):
        ScheduledStream(prompt_set(5, 0), 0, method())


# ---------------------------------------------------------------------------------- the weigher


def weighed_by(batch: Batch, **settings: Any) -> Batch:
    made = method(**settings)
    made.gradient = PolicyGradient()
    made.weigh(batch)
    return batch


def test_each_branch_has_its_own_score_share_and_weight() -> None:
    rollouts = [make_rollout(f"g{i}", [1, 2], key="g") for i in range(3)]
    rollouts += [make_rollout(f"d{i}", [1, 2], key="d") for i in range(3)]
    gaps = [[-9.0, -9.0], [1.0, 0.0], [0.2, 0.2], [-9.0, -9.0], [4.0, -1.0], [0.1, 0.0]]
    weighed = weighed_by(make_batch(rollouts, gaps))
    # general: |gap| 9, 0.5, 0.2; domain: positive part 0, 2, 0.05
    assert [not s.drop for s in weighed.samples] == [True, False, False, False, True, False]
    assert {s.drop for s in weighed.samples} == {"", "selection"}
    np.testing.assert_allclose(weighed.samples[0].advantage, [-18, -18])
    np.testing.assert_allclose(weighed.samples[4].advantage, [4, -1])  # a negative gap still pushes down
    assert weighed.metrics["camopd/general/selected_share"] == pytest.approx(1 / 3)
    assert weighed.metrics["camopd/domain/gap_positive"] == pytest.approx(4.1 / 6)
    assert weighed.metrics["camopd/domain/gap_signed"] == pytest.approx((-18 + 3 + 0.1) / 6)


def test_equal_student_and_teacher_keep_all_with_zero_loss() -> None:
    weighed = weighed_by(make_batch([make_rollout(str(i), [1, 2], key="d") for i in range(3)], [[0, 0]] * 3))
    assert all(not s.drop and not s.advantage.any() for s in weighed.samples)


def test_bad_and_short_rollouts_are_left_out_and_counted() -> None:
    rollouts = [make_rollout(str(i), [1] * n, key="g") for i, n in enumerate([2, 2, 1])]
    batch = make_batch(rollouts, [[np.nan, 1], [1, 1], [5.0]])
    weighed = weighed_by(batch, min_tokens=2, selection="none")
    assert [s.drop for s in weighed.samples] == ["gap_not_finite", "", "min_tokens"]
    assert np.isfinite(weighed.metrics["camopd/general/gap_abs"])


# --------------------------------------------------------------------------- with real models


def camopd_config(models: Models, prompt_file: str, folder: Path, **changes: Any) -> TrainConfig:
    section = {"domain": ["code"], **changes.pop("camopd", {})}
    teachers = [{"model": models["big"], "key": ["agentic"]}, {"model": models["small"], "key": ["code"]}]
    settings = {"method": "camopd", "teachers": teachers, "loss_normalization": "sequence", **changes}
    return make_config(models, prompt_file, folder, camopd=section, **settings)


def gather(engine: Engine, prompts: list[Prompt]) -> tuple[list[Sample], list[Sample]]:
    """All samples of a step, measured, and those that are trained on."""

    async def run() -> Batch:
        batch = await engine.prepare(prompts, 0)
        await engine.score(batch)
        engine.measure(batch)
        engine.weigh(batch)
        return batch

    batch = asyncio.run(run())
    return batch.samples, list(batch)


def code_prompts(prompt_file: str) -> list[Prompt]:
    return [p for p in load_prompts([prompt_file]).prompts if p.key == "code"]


def test_bf16_covers_the_products_with_the_heads(
    models: Models, prompt_file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of measurement and update; a float32 teacher keeps its own dtype."""
    seen: dict[str, list[torch.dtype]] = {"scoring": [], "objective": []}
    for name, module in (("scoring", scoring), ("objective", objective)):

        def spied(hidden: torch.Tensor, head: Any, *rest: Any, name: str = name, **options: Any) -> Any:
            seen[name].append(hidden.dtype)
            return linear_logprob(hidden, head, *rest, **options)

        monkeypatch.setattr(module, "linear_logprob", spied)

    def product(head: Any, hidden: torch.Tensor, *rest: Any, real: Any = heads.write_product) -> None:
        assert hidden.dtype == head.weight.dtype
        real(head, hidden, *rest)

    monkeypatch.setattr(heads, "write_product", product)
    engine = make_engine(camopd_config(models, prompt_file, tmp_path, bf16=True))
    loss_and_gradient(engine, gather(engine, code_prompts(prompt_file))[1])
    assert seen["scoring"][0] == torch.bfloat16  # the student comes first
    assert set(seen["scoring"][1:]) == {torch.float32}
    assert set(seen["objective"]) == {torch.bfloat16}


@pytest.mark.parametrize("key", ["agentic", "code"])
def test_gradient_is_that_of_equation_9(models: Models, prompt_file: str, tmp_path: Path, key: str) -> None:
    """-(1/|S|) (1/T_i) sum_t w r gap d log p over the selected, written down with the whole model's logits.

    The gap is that of the models themselves, the ratio that of the distributions that are sampled from.
    """
    from transformers import AutoModelForCausalLM

    config = camopd_config(models, prompt_file, tmp_path, temperature=1.1)
    engine = make_engine(config)
    plain = engine.sampler.generate

    def generate(*arguments: Any) -> list[list[Completion]]:
        """As from an engine that computes otherwise, so that some ratios are outside of the band."""
        return [
            [replace(c, logprobs=c.logprobs + np.tile([0.8, -0.1], 50)[: len(c.logprobs)]) for c in completions]
            for completions in plain(*arguments)
        ]

    engine.sampler.generate = generate
    judged, items = gather(engine, [p for p in load_prompts([prompt_file]).prompts if p.key == key])
    assert 0 < len(items) < len(judged)
    kept = {item.id for item in items}
    student = AutoModelForCausalLM.from_pretrained(models["student"])
    loss, negative, banned = torch.zeros(()), 0, 0
    for rollout in judged:
        if rollout.id not in kept:
            continue
        assert rollout.teachers == (("small",) if key == "code" else ("big",))
        logits = student(input_ids=torch.from_numpy(rollout.token_ids)[None]).logits[0]
        rows = logits[rollout.target_positions - 1, : engine.vocab_size].log_softmax(-1)
        logprob = rows[range(len(rollout.target_ids)), rollout.target_ids]
        gap = torch.from_numpy(rollout.teacher_logprob[:, 0]) - logprob.detach()
        tempered = (logits[rollout.target_positions - 1, : engine.vocab_size] / 1.1).log_softmax(-1)
        tempered = tempered[range(len(rollout.target_ids)), rollout.target_ids].detach()
        ratio = (tempered - torch.from_numpy(rollout.sampler_logprob)).exp()
        w = torch.where((ratio >= 0.5) & (ratio <= 2), ratio, 0)
        banned += int((w == 0).sum())
        r = 1.0 if key == "code" else 2.0
        loss = loss - (w * r * gap * logprob).mean() / len(kept)
        negative += int((gap < 0).sum())
    loss.backward()
    assert negative and banned
    mine, gradients = loss_and_gradient(engine, items)
    assert mine == pytest.approx(loss.item(), rel=1e-3)
    theirs = {n: p.grad for n, p in student.named_parameters() if p.grad is not None}
    assert_same_gradients(gradients, theirs, rtol=1e-3)


def test_the_update_runs_only_what_was_selected(models: Models, prompt_file: str, tmp_path: Path) -> None:
    """FLOPs of the update are those of a step that never had the other rollouts."""
    still = {"learning_rate": 0.0, "max_tokens_per_batch": 32}
    engine = make_engine(camopd_config(models, prompt_file, tmp_path, **still))
    everything = make_engine(camopd_config(models, prompt_file, tmp_path, camopd={"selection": "none"}, **still))
    prompts = code_prompts(prompt_file)
    judged, items = gather(engine, prompts)
    _, whole = gather(everything, prompts)
    assert len(whole) == len(judged) > len(items) > 0
    kept = {item.id for item in items}
    alone = [item for item in whole if item.id in kept]

    def flops(engine: Engine, samples: list[Sample]) -> int:
        for _ in range(2):  # the first step also checks the loss
            with FlopCounterMode(display=False) as counter:
                engine.update(Batch(samples=samples))
        return counter.get_total_flops()

    chosen, reference, full = flops(engine, items), flops(everything, alone), flops(everything, whole)
    assert chosen == reference < full
    tokens = [sum(len(i.token_ids) for i in part) for part in (items, whole)]
    assert chosen / full == pytest.approx(tokens[0] / tokens[1], rel=0.15)


def test_full_vocabulary_trains_the_same_selection(models: Models, prompt_file: str, tmp_path: Path) -> None:
    prompts = code_prompts(prompt_file)
    _, sampled = gather(make_engine(camopd_config(models, prompt_file, tmp_path)), prompts)
    config = camopd_config(models, prompt_file, tmp_path, advantage={"kl_mode": "full_vocab"}, camopd={"r_d": 3.0})
    engine = make_engine(config)
    _, exact = gather(engine, prompts)
    assert [i.id for i in exact] == [i.id for i in sampled]
    assert not any(np.any(i.advantage) for i in exact)
    for item in exact:
        np.testing.assert_allclose(kl_weight(item), 3 / (len(exact) * len(item.target_ids)), rtol=1e-5)
    assert loss_and_gradient(engine, exact)[0] > 0


def test_a_run_alternates_and_resumes_in_phase(models: Models, prompt_file: str, tmp_path: Path) -> None:
    common = {"max_steps": 6, "warmup_ratio": 0.0, "lr_scheduler_type": "constant", "camopd": {"n_general": 2}}
    train(camopd_config(models, prompt_file, tmp_path / "whole", **common), progress=False)
    saving = {**common, "save_steps": 4}
    train(camopd_config(models, prompt_file, tmp_path / "cut", **saving), progress=False)
    saved = str(tmp_path / "cut" / "checkpoints" / "step_4")
    train(camopd_config(models, prompt_file, tmp_path / "cut", **saving, resume_from_checkpoint=saved), progress=False)
    whole, cut = ([x for x in read_metrics(tmp_path / n / "metrics.jsonl") if "loss" in x] for n in ("whole", "cut"))
    branches = ["d" if "camopd/domain/selected" in line else "g" for line in whole]
    assert branches == ["g", "g", "d", "g", "g", "d"]
    for one, two in zip(whole, cut, strict=True):
        assert one["loss"] == pytest.approx(two["loss"], rel=1e-5)
        assert one.keys() == two.keys()


# ------------------------------------------------------------------------------- diagnostics


def test_coherence_by_hand() -> None:
    assert coherence(np.array([[3.0, 0], [0, 4.0]])) == pytest.approx(5 / 7)
    assert coherence(np.ones((5, 3))) == pytest.approx(1)
    assert coherence(np.zeros((2, 3))) == 0


def test_a_random_selection_seems_to_gain_and_the_control_shows_it() -> None:
    """Unrelated gradients: a quarter of them gains about 100 %, none of it over random choices."""
    rng = np.random.default_rng(0)
    gradients = rng.normal(size=(128, 400))
    found = [coherence_gain(gradients, rng.permutation(128) < 32, 20, [0, i]) for i in range(8)]
    assert np.mean([f["gain"] for f in found]) == pytest.approx(100, abs=15)
    assert np.mean([f["gain_over_random"] for f in found]) == pytest.approx(0, abs=6)
    aligned = gradients + 0.5 * (np.arange(128) < 32)[:, None]
    assert coherence_gain(aligned, np.arange(128) < 32, 20, [0])["gain_over_random"] > 50


def test_sketches_keep_inner_products() -> None:
    torch.manual_seed(0)
    parts = [[torch.randn(37, 41), torch.randn(53)] for _ in range(2)]
    flat = [torch.cat([p.flatten() for p in part]) for part in parts]
    errors = []
    for seed in range(30):
        a, b = (sketch(part, 256, 1000 * seed) for part in parts)
        errors.append(float(a @ b) - float(flat[0] @ flat[1]))
        assert float(a @ a) == pytest.approx(float(flat[0] @ flat[0]), rel=0.5)
    assert abs(np.mean(errors)) < 3 * np.std(errors) / np.sqrt(30)
    np.testing.assert_array_equal(sketch(parts[0], 256, 1), sketch(parts[0], 256, 1))


def test_sample_gradients_are_those_of_each_loss_alone(models: Models, prompt_file: str, tmp_path: Path) -> None:
    """Projected gradients of single samples sum to the projection of the gradient of their sum."""
    engine = make_engine(camopd_config(models, prompt_file, tmp_path, camopd={"selection": "none"}))
    _, items = gather(engine, code_prompts(prompt_file))
    rows = sample_gradients(engine, items, 512, seed=1)
    assert rows.shape == (len(items), 512) and np.linalg.norm(rows, axis=1).min() > 0
    assert all(p.grad is None for p in engine.student.model.parameters())
    parameters = probed_parameters(engine.student.model)
    names = {id(p): n for n, p in engine.student.model.named_parameters()}
    assert all("layers.1." in names[id(p)] for p in parameters)  # the last of two blocks
    _, gradients = loss_and_gradient(engine, items)
    whole = sketch([gradients[names[id(p)]] for p in parameters], 512, 1)
    np.testing.assert_allclose(rows.sum(0), whole, rtol=1e-3, atol=1e-4 * np.abs(whole).max())


@pytest.mark.parametrize(
    ("every", "general", "domain"), [(1, [0, 1, 2, 4, 5, 6], [3, 7]), (4, [0, 4], [3, 7]), (6, [0, 6], [3, 7])]
)
def test_each_branch_is_measured_at_its_next_turn(every: int, general: list[int], domain: list[int]) -> None:
    """Also where the interval is a multiple of the schedule's period."""
    diagnostics = Coherence(method(diagnose_steps=every), ())
    for branch, steps in (("general", general), ("domain", domain)):
        assert [s for s in range(8) if diagnostics.is_due(branch, s)] == steps


def test_a_run_reports_coherence_and_opposition(models: Models, prompt_file: str, tmp_path: Path) -> None:
    section = {"n_general": 1, "diagnose_steps": 1, "diagnose_samples": 4, "diagnose_dimensions": 256}
    train(camopd_config(models, prompt_file, tmp_path / "with", max_steps=2, camopd=section), progress=False)
    lines = [x for x in read_metrics(tmp_path / "with" / "metrics.jsonl") if "loss" in x]
    for line, branch in zip(lines, ("general", "domain"), strict=True):
        assert {f"coherence/{branch}/{n}" for n in ("full", "gain", "gain_random", "gain_over_random")} <= line.keys()
        assert -1 <= line["branches/cosine"] <= 1
    # Measuring changes nothing.
    train(
        camopd_config(models, prompt_file, tmp_path / "without", max_steps=2, camopd={"n_general": 1}), progress=False
    )
    plain = [x for x in read_metrics(tmp_path / "without" / "metrics.jsonl") if "loss" in x]
    assert [x["loss"] for x in plain] == [x["loss"] for x in lines]
    assert "branches/cosine" not in plain[0]


# ---------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    "changes",
    [
        {"camopd": {"domain": []}},
        {"camopd": {"domain": ["nothing"]}},
        {"camopd": {"domain": ["code", "agentic"]}},
        {"teachers": [{"model": "big", "key": ["agentic"]}, {"model": "small", "key": ["agentic", "code"]}]},
    ],
)
def test_teachers_that_the_domain_does_not_part_are_refused(
    models: Models, prompt_file: str, tmp_path: Path, changes: dict[str, Any]
) -> None:
    if "teachers" in changes:
        changes = {"teachers": [{**t, "model": models[t["model"]]} for t in changes["teachers"]]}
    with pytest.raises(ConfigError, match="does not part the teachers"):
        build_method(camopd_config(models, prompt_file, tmp_path, **changes))


def test_a_domain_that_no_domain_teacher_answers_is_refused(models: Models, prompt_file: str, tmp_path: Path) -> None:
    teachers = [{"model": models["big"]}, {"model": models["small"], "key": ["code"]}]
    config = camopd_config(models, prompt_file, tmp_path, teachers=teachers, camopd={"domain": ["code", "agentic"]})
    with pytest.raises(ConfigError, match=r"names \['agentic'\], but no domain teacher.*one of \['small'\]"):
        build_method(config)


def test_a_general_teacher_without_key_judges_general_prompts_only(
    models: Models, prompt_file: str, tmp_path: Path
) -> None:
    teachers = [{"model": models["big"]}, {"model": models["small"], "key": ["code"]}]
    engine = make_engine(camopd_config(models, prompt_file, tmp_path, teachers=teachers))
    judged, _ = gather(engine, list(load_prompts([prompt_file]).prompts))
    assert {(j.prompt.key, j.teachers) for j in judged} == {("code", ("small",)), ("agentic", ("big",))}


def test_r_g_acts_at_the_clipping_of_the_method_and_is_lost_at_1(
    models: Models, prompt_file: str, tmp_path: Path
) -> None:
    """Four general and domain steps: where each is clipped, AdamW sees the same gradients whatever r_g is."""
    weights = {}
    for clip in (PAPERS["camopd"]["max_grad_norm"], 1e-3):
        for r_g in (1.0, 2.0):
            changes = {"max_grad_norm": clip, "max_steps": 4, "advantage": {"importance": "none"}}
            config = camopd_config(models, prompt_file, tmp_path / f"{clip}-{r_g}", camopd={"r_g": r_g}, **changes)
            model = AutoModelForCausalLM.from_pretrained(train(config, progress=False).final_model)
            weights[clip, r_g] = torch.cat([p.detach().flatten() for p in model.parameters()])
    assert not torch.equal(weights[1000.0, 1.0], weights[1000.0, 2.0])
    assert torch.allclose(weights[1e-3, 1.0], weights[1e-3, 2.0], atol=1e-6)
