"""Top-k log-probs: reading them, and the objective with them against exact and plain-torch values."""

from __future__ import annotations

import asyncio
import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from engine_helpers import assert_same_gradients, loss_and_gradient, make_config, make_engine, make_samples
from teacher_helpers import Server

from opd_kernels import LMHead
from opdengine.data.prompts import load_prompts
from opdengine.loss.objective import Objective, kl_weight
from opdengine.loss.statistics import Statistics
from opdengine.models.chat import vocabulary_size
from opdengine.teachers.endpoint import BadAnswer
from opdengine.teachers.top_k import read_top_k
from opdengine.training.scoring import _read_list
from opdengine.types import Prompt, Sample, TeacherContext, TopK, Turn

Models = dict[str, str]


def row(**logprobs: float) -> dict[str, Any]:
    return {name[1:]: {"logprob": value, "rank": 1} for name, value in logprobs.items()}


IDS = np.array([4, 9, 2])
ROWS = [None, row(_9=-3.0, _1=-0.5, _2=-1.5), row(_2=-0.1, _7=-4.0)]


def read(rows: Any, k: int = 2, vocab: int = 10, **more: Any) -> TopK:
    return read_top_k({"prompt_logprobs": rows, **more}, IDS, np.array([1, 2]), k, vocab)


def test_every_row_holds_the_actual_token_and_the_likeliest_others() -> None:
    found = read(ROWS)
    assert found.ids.tolist() == [[9, 1], [2, 7]]  # the first row came with k + 1 entries
    np.testing.assert_allclose(found.logprobs, [[-3.0, -0.5], [-0.1, -4.0]])
    assert found.ids.dtype == np.int64 and found.logprobs.dtype == np.float32
    narrow = read([None, ROWS[1], row(_2=-0.1)])  # a row that lists fewer leaves the others as they are
    assert narrow.ids.tolist() == [[9, 1], [2, -1]] and narrow.logprobs[1, 1] == -np.inf
    assert read([None, row(_9=-3.0), row(_2=-0.1)], k=5).ids.tolist() == [[9], [2]]
    assert read_top_k({"prompt_logprobs": ROWS}, IDS, np.array([], dtype=int), 2, 10).ids.shape[0] == 0


def test_other_tokens_of_which_a_server_knows_nothing_belong_to_the_tail() -> None:
    """As log-probs they would make the reverse KL, and its gradient, thousands of nats."""
    found = read([None, row(_9=-3.0, _1=-9999.0), ROWS[2]])
    assert found.ids.tolist() == [[9, -1], [2, 7]] and found.logprobs[0].tolist() == [-3.0, -np.inf]


def test_padding_columns_of_a_head_are_taken_out_of_the_distribution() -> None:
    half = float(np.log(0.5))
    found = read([None, row(_9=half - 1e-7, _11=half), row(_2=-0.1)], k=2)
    assert found.ids.tolist() == [[9], [2]]
    assert found.logprobs[0, 0] == pytest.approx(0.0, abs=1e-5)


@pytest.mark.parametrize(
    ("rows", "more", "reason"),
    [
        (None, {}, "no_logprobs"),
        ("text", {}, "no_logprobs"),
        (ROWS[:2], {}, "wrong_ids"),
        ([*ROWS, ROWS[1]], {}, "wrong_ids"),
        ([None, ROWS[2], ROWS[1]], {}, "wrong_ids"),
        ([None, None, ROWS[2]], {}, "wrong_ids"),
        (ROWS, {"prompt_token_ids": [5, 9, 2]}, "wrong_ids"),
        ([None, row(_9=0.5), ROWS[2]], {}, "bad_logprobs"),
        ([None, row(_9=-0.1, _1=-0.1), ROWS[2]], {}, "bad_logprobs"),
        ([None, row(_9=float("nan")), ROWS[2]], {}, "bad_logprobs"),
        ([None, {"9": {"prob": 1.0}}, ROWS[2]], {}, "bad_logprobs"),
        ([None, {"9": None}, ROWS[2]], {}, "bad_logprobs"),
        ([None, row(_9=-np.inf), ROWS[2]], {}, "bad_logprobs"),
        ([None, row(_9=-9999.0, _1=-0.5), ROWS[2]], {}, "bad_logprobs"),  # vLLM's -inf, OpenAI's "very unlikely"
        ([None, row(_9=-9999), ROWS[2]], {}, "bad_logprobs"),
        ([None, row(_9="-0.1"), ROWS[2]], {}, "bad_logprobs"),
        ([None, row(_9=True), ROWS[2]], {}, "bad_logprobs"),
        ([None, row(_9=-(10**400)), ROWS[2]], {}, "bad_logprobs"),
        ([None, {"9": {"logprob": -1.0}, "09": {"logprob": -1.5}}, ROWS[2]], {}, "bad_logprobs"),  # one id twice
        ([None, {"9": {"logprob": -1.0}, "1" * 30: {"logprob": -1.5}}, ROWS[2]], {}, "bad_logprobs"),
        ([None, {"9": {"logprob": -1.0}, "-1": {"logprob": -1.5}}, ROWS[2]], {}, "wrong_ids"),
        ([None, row(_9=-9.0, _11=-0.01), ROWS[2]], {}, "wrong_ids"),  # nearly all of it beyond the vocabulary
        (ROWS, {"prompt_token_ids": 7}, "wrong_ids"),
    ],
)
def test_anything_else_is_refused(rows: Any, more: dict[str, Any], reason: str) -> None:
    with pytest.raises(BadAnswer) as error:
        read(rows, **more)
    assert error.value.reason == reason
    if isinstance(rows, list) and isinstance(rows[1], dict) and len(rows) == 3 and not more:
        assert "position 1 " in str(error.value)


# ------------------------------------------------------------------ through the engine


def engines(models: Models, server: Server, prompt_file: str, folder: Path, k: int, **changes: Any) -> tuple[Any, Any]:
    """The same run with the teacher "big" in this process, and behind the server."""
    local = make_config(models, prompt_file, folder, **changes)
    away = dataclasses.replace(
        local.teachers[0], model="tiny", base_url=server.url, tokenizer=models["big"], score_top_k=k
    )
    return (
        make_engine(local),
        make_engine(dataclasses.replace(local, teachers=[away, *local.teachers[1:]])),
    )


@pytest.mark.parametrize("kind", ["reverse_kl", "forward_kl", "jsd", "skew_kl"])
def test_a_whole_list_equals_hidden_states_and_a_short_one_is_a_lower_bound(
    models: Models, real_server: Server, tokenizer: Any, prompt_file: str, tmp_path: Path, kind: str
) -> None:
    """One teacher is served, the other is local; the loss is the sum of the two parts."""
    real_server.control()
    prompts = load_prompts([prompt_file]).prompts[:4]
    vocab = vocabulary_size(tokenizer)
    found = {}
    for k in (4, 32, vocab + 13):  # the head of the served model has 13 columns of padding
        local, away = engines(models, real_server, prompt_file, tmp_path, k, divergence=kind)
        samples = make_samples(away, prompts)
        targets = samples[0].teacher_targets[0]
        assert isinstance(targets, TopK) and len(targets) == len(samples[0].target_ids)
        # Columns of padding among the k likeliest are taken out.
        assert min(k, vocab) - 4 < targets.ids.shape[1] <= min(k, vocab)
        assert targets.ids[:, 0].tolist() == samples[0].target_ids.tolist()
        found[k] = loss_and_gradient(away, samples)
    exact = loss_and_gradient(local, make_samples(local, prompts))
    assert found[vocab + 13][0] == pytest.approx(exact[0], rel=1e-5)
    assert_same_gradients(found[vocab + 13][1], exact[1], rtol=1e-3)
    assert found[4][0] < found[32][0] < exact[0]
    assert found[32][0] > 0.5 * exact[0]


def plain_loss(engine: Any, samples: Any, kind: str) -> torch.Tensor:
    """Whole-vocabulary student log-probs, merged by hand into the listed events and the rest."""
    total = torch.zeros((), dtype=torch.float64)
    for rollout in samples:
        targets = rollout.teacher_targets[0]
        logits = engine.student.model(torch.from_numpy(rollout.token_ids)[None]).logits[0].double()
        p = logits[torch.from_numpy(rollout.target_positions - 1), : engine.vocab_size].softmax(-1)
        for n, weight in enumerate(kl_weight(rollout).tolist()):
            listed = torch.from_numpy(targets.ids[n][targets.ids[n] >= 0])
            likely = torch.from_numpy(targets.logprobs[n, : len(listed)]).double().exp()
            total = total + weight * plain_row(_with_rest(p[n, listed]), _with_rest(likely), kind)
    return total


def _with_rest(listed: torch.Tensor) -> torch.Tensor:
    return torch.cat([listed, 1 - listed.sum(0, keepdim=True)])


def plain_row(p: torch.Tensor, q: torch.Tensor, kind: str) -> torch.Tensor:
    if kind == "reverse_kl":
        return (p * (p / q).log()).sum()
    if kind == "forward_kl":
        return (q * (q / p).log()).sum()
    m = 0.5 * (p + q)
    return 0.5 * (q * (q / m).log()).sum() + 0.5 * (p * (p / m).log()).sum()


@pytest.mark.parametrize("kind", ["reverse_kl", "forward_kl", "jsd"])
def test_loss_and_gradient_equal_plain_torch(
    models: Models, real_server: Server, prompt_file: str, tmp_path: Path, kind: str
) -> None:
    real_server.control()
    _, engine = engines(models, real_server, prompt_file, tmp_path, 16, method="opd", divergence=kind,
                        teachers=[{"model": models["big"]}])  # fmt: skip
    samples = make_samples(engine, load_prompts([prompt_file]).prompts[:3])
    loss, gradient = loss_and_gradient(engine, samples)
    expected = plain_loss(engine, samples, kind)
    assert loss == pytest.approx(expected.item(), rel=1e-4)
    expected.backward()
    plain = {n: p.grad.clone() for n, p in engine.student.model.named_parameters() if p.grad is not None}
    assert_same_gradients(gradient, plain, rtol=1e-3)


@pytest.mark.parametrize("method", ["opd", "mt_opd"])
def test_statistics_of_a_served_teacher(
    models: Models, real_server: Server, tokenizer: Any, prompt_file: str, tmp_path: Path, method: str
) -> None:
    """Equal to the exact ones for the whole list; for a short one bounds, and only where they are known."""
    real_server.control()
    prompts = load_prompts([prompt_file]).prompts[:3]
    teachers = [{"model": models["big"]}, {"model": models["small"]}][: 1 if method == "opd" else 2]

    def statistics(engine: Any) -> Statistics:
        engine._optimizer_step = lambda loss, norm: {}
        found = Statistics()
        engine._update(make_samples(engine, prompts), found, [])
        return found

    def pair(k: int, **changes: Any) -> list[Statistics]:
        made = engines(models, real_server, prompt_file, tmp_path, k, method=method, teachers=teachers, **changes)
        return [statistics(engine) for engine in made]

    exact, whole = pair(vocabulary_size(tokenizer) + 13)
    for name in ("student_entropy", "logprob_difference", "gap", "teacher_kl/big", "teacher_entropy/big"):
        assert len(exact.get(name)), name
        np.testing.assert_allclose(np.sort(whole.get(name)), np.sort(exact.get(name)), atol=1e-4, err_msg=name)
    _, short = pair(16)
    assert (short.get("teacher_kl/big") < exact.get("teacher_kl/big")).all()
    assert (short.get("teacher_kl/big") > 0).all()
    _, jsd = pair(16, divergence="jsd")
    assert not len(jsd.get("teacher_kl/big")) and len(jsd.get("gap"))


def listed_item(name: str, widths: list[int], vocab: int, seed: int) -> Sample:
    """Four targets of which a teacher lists ``widths`` ids each."""
    rng = np.random.default_rng(seed)
    targets = rng.integers(0, vocab, 4)
    turns = (Turn("prompt", np.array([1, 2])), Turn("assistant", targets, np.zeros(4), True))
    logq = torch.from_numpy(rng.normal(size=(4, vocab)) * 2).log_softmax(-1).numpy()
    ids, logprobs = np.full((4, max(widths)), -1), np.full((4, max(widths)), -np.inf, dtype=np.float32)
    for n, (target, width) in enumerate(zip(targets, widths, strict=True)):
        others = [i for i in np.argsort(-logq[n]) if i != target]
        ids[n, :width] = [target, *others[: width - 1]]
        logprobs[n, :width] = logq[n, ids[n, :width]]
    sample = Sample(name, Prompt(name, ()), turns, teacher_targets=(TopK(ids, logprobs),))
    sample.contexts = (TeacherContext(name, "T", sample.token_ids, sample.target_positions),)
    sample.kl_weight = rng.random(4).astype(np.float32) / 8
    return sample


@pytest.mark.parametrize("kind", ["reverse_kl", "forward_kl", "jsd", "skew_kl"])
def test_lists_of_different_widths_do_not_depend_on_the_micro_batch(kind: str) -> None:
    """Loss, gradient and statistics of the whole are the sums of those of the parts."""
    items = [listed_item("a", [20, 20, 20, 20], 60, 0), listed_item("b", [3, 1, 2, 3], 60, 1)]
    g = torch.Generator().manual_seed(0)
    head = LMHead(torch.randn(60, 8, generator=g, dtype=torch.float64))
    hidden = torch.randn(8, 8, generator=g, dtype=torch.float64)
    objective = Objective(heads={}, divergence_of=lambda key: kind)

    def run(rows: slice, members: list[Sample]) -> tuple[float, torch.Tensor, np.ndarray]:
        leaf, statistics = hidden[rows].clone().requires_grad_(), Statistics()
        loss = objective(leaf, head, members, statistics)
        loss.backward()
        assert leaf.grad is not None
        return loss.item(), leaf.grad, statistics.get("teacher_entropy/T")

    whole, one, two = run(slice(0, 8), items), run(slice(0, 4), items[:1]), run(slice(4, 8), items[1:])
    assert whole[0] == pytest.approx(one[0] + two[0], rel=1e-9)
    torch.testing.assert_close(whole[1], torch.cat([one[1], two[1]]), rtol=1e-6, atol=1e-9)
    np.testing.assert_allclose(whole[2], np.concatenate([one[2], two[2]]), rtol=1e-6)
    assert np.isfinite(whole[2]).all()


def test_what_is_measured_of_ragged_lists_does_not_depend_on_their_padding() -> None:
    narrow = TopK(np.array([[4, 1]]), np.log(np.array([[0.5, 0.25]], dtype=np.float32)))
    for name, value in _read_list(narrow, 10).items():
        np.testing.assert_allclose(_read_list(narrow.widened(7), 10)[name], value, err_msg=name)


def test_a_dead_teacher_behind_a_server_has_the_entropy_of_the_uniform_distribution() -> None:
    statistics = Statistics()
    statistics.add_listed("t", torch.full((3, 8), -float(np.log(300))), 300, torch.zeros(3), None)
    np.testing.assert_allclose(statistics.get("teacher_entropy/t"), np.log(300), rtol=1e-5)


def test_the_weight_of_a_teacher_that_is_left_out_goes_to_the_others() -> None:
    ids = np.array([1, 2, 3])
    contexts = tuple(TeacherContext("r", name, ids, np.array([2])) for name in "abc")

    def left(mix: list[float] | None, names: list[str]) -> Sample:
        sample = Sample("r", Prompt("p", ()), (Turn("prompt", ids[:2]), Turn("assistant", ids[2:], trains=True)))
        sample.contexts, sample.mix = contexts, None if mix is None else np.array(mix, dtype=np.float32)
        sample.keep_teachers(names)
        return sample

    np.testing.assert_array_equal(left([0.5, 0.3, 0.2], ["a", "b", "c"]).mix, np.float32([0.5, 0.3, 0.2]))
    two = left([0.5, 0.3, 0.2], ["a", "b"])
    assert [c.teacher for c in two.contexts] == ["a", "b"]
    np.testing.assert_allclose(two.mix, [0.625, 0.375], rtol=1e-6)
    np.testing.assert_allclose(left([0.0, 0.0, 1.0], ["a", "b"]).mix, [0.5, 0.5], rtol=1e-6)
    assert left(None, ["a"]).mix is None


def test_rollouts_of_a_failed_teacher_are_judged_by_the_others(
    models: Models, real_server: Server, prompt_file: str, tmp_path: Path
) -> None:
    """Which equals a run in which that rollout never had the teacher."""
    prompts = load_prompts([prompt_file]).prompts[:2]
    real_server.control(faults=[{"kind": "500", "on": "score", "after": 1}])  # after the probe
    _, engine = engines(models, real_server, prompt_file, tmp_path, 16, on_teacher_failure="drop")
    engine.teachers[0].endpoint.max_retries = 0
    samples = make_samples(engine, prompts)
    assert [i.teachers for i in samples] == [("small",), ("small",)]
    assert all((i.mix == 1).all() for i in samples)
    alone = make_engine(make_config(models, prompt_file, tmp_path, method="opd", teachers=[{"model": models["small"]}]))
    expected = loss_and_gradient(alone, make_samples(alone, prompts))
    found = loss_and_gradient(engine, samples)
    assert found[0] == pytest.approx(expected[0], rel=1e-6)
    assert_same_gradients(found[1], expected[1])


def test_a_rollout_without_any_teacher_is_dropped_and_changes_no_denominator(
    models: Models, real_server: Server, prompt_file: str, tmp_path: Path
) -> None:
    prompts = load_prompts([prompt_file]).prompts[:3]
    real_server.control(faults=[{"kind": "500", "on": "score", "after": 2, "times": 1}])  # probe, first rollout
    _, engine = engines(models, real_server, prompt_file, tmp_path, 16, on_teacher_failure="drop", method="opd",
                        teachers=[{"model": models["big"]}], max_steps=1)  # fmt: skip
    teacher = engine.teachers[0]
    teacher.endpoint.max_retries, teacher.endpoint.max_concurrency = 0, 1
    metrics = asyncio.run(engine.step(prompts)).metrics
    assert metrics["dropped/teacher_failure"] == 1.0
    assert metrics["teacher_failures/big/http_500"] == 1.0
    assert metrics["completions/kept"] == 2.0 and metrics["policy_version"] == 1.0
