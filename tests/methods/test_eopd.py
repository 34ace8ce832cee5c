"""Divergences that are chosen token by token: the gradient in float64, what is logged, and what is refused."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from engine_helpers import divergence, full_logprobs, make_config, make_engine, make_samples
from method_helpers import make_rollout
from self_taught_helpers import our_loss
from test_rewards import built

from opd_kernels import LMHead
from opdengine.config.train import ConfigError
from opdengine.data.prompts import load_prompts
from opdengine.distributed import Ranks
from opdengine.loss.objective import Objective, set_scales
from opdengine.loss.statistics import Statistics
from opdengine.metrics import Mean
from opdengine.training.run import train
from opdengine.types import Batch, Hidden, Sample

Models = dict[str, str]


def test_every_token_has_the_gradient_of_its_own_divergence() -> None:
    """Of samples with chosen divergences and one without, beside an advantage; each row is counted once."""
    draw = torch.Generator().manual_seed(0)
    rows, width, vocab = 7, 5, 11

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=draw)

    hidden, weight, states, head = normal(rows, width), normal(vocab, width), normal(rows, width), normal(vocab, width)
    samples = [make_rollout("a", [1, 2, 3, 4]), make_rollout("b", [5, 6]), make_rollout("c", [7])]
    kinds = ["forward_kl", "reverse_kl", "jsd", "forward_kl", "reverse_kl", "reverse_kl", "reverse_kl"]
    start, method = 0, built("opd")
    method.teachers = []
    for sample in samples:
        end = start + len(sample.target_ids)
        sample.contexts = (_context(sample),)
        sample.teacher_targets = (Hidden(states[start:end].float()),)
        sample.kl_weight = np.linspace(0.5, 2, end - start, dtype=np.float32)
        sample.advantage = np.full(end - start, 0.3, dtype=np.float32)
        if sample.id != "c":
            sample.divergence_kind = np.array(kinds[start:end])
        start = end
    set_scales(samples, "token", Ranks())
    given = [x.float().requires_grad_() for x in (hidden, weight)]
    statistics = Statistics(["a", "b", "c"])
    objective = Objective({"t": LMHead(head.float())}, lambda key: "reverse_kl", jsd_beta=0.3)
    loss = objective(given[0], LMHead(given[1]), samples, statistics)
    found = torch.autograd.grad(loss, given)
    exact = [x.clone().requires_grad_() for x in (hidden, weight)]
    student, teacher = (exact[0] @ exact[1].T).log_softmax(-1), (states @ head.T).log_softmax(-1)
    each = torch.stack([divergence(k, student[i : i + 1], teacher[i : i + 1], 0.3)[0] for i, k in enumerate(kinds)])
    weights = torch.from_numpy(np.concatenate([s.kl_weight for s in samples])).double()  # type: ignore[misc]
    labels = torch.from_numpy(np.concatenate([s.target_ids for s in samples]))
    total = (weights * each - 0.3 * student[torch.arange(rows), labels]).mean()
    assert float(loss.detach()) == pytest.approx(float(total.detach()), rel=1e-5)
    for ours, theirs in zip(found, torch.autograd.grad(total, exact), strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-4, atol=1e-6)
    noted = np.concatenate([statistics.tokens[sample.id]["divergence"] for sample in samples])
    np.testing.assert_allclose(noted, each.detach().numpy(), rtol=1e-4)
    kl = (student.exp() * (student - teacher)).sum(1).detach().numpy()
    np.testing.assert_allclose(np.sort(statistics.get("teacher_kl/t")), np.sort(kl), rtol=1e-4)


def _context(sample: Sample) -> Any:
    from opdengine.types import TeacherContext

    return TeacherContext(sample.id, "t", sample.token_ids, sample.target_positions)


def test_uncertain_tokens_have_the_forward_kl(models: Models, prompt_file: str, tmp_path: Path) -> None:
    """The loss of a step from the models in float64, with tau in the middle of the teacher's entropies."""
    teacher = {"teachers": [{"model": models["big"]}], "method": "eopd"}
    probe = make_samples(
        make_engine(make_config(models, prompt_file, tmp_path, **teacher)), load_prompts([prompt_file]).prompts[:3]
    )
    entropies = np.concatenate([s.teacher_entropy[:, 0] for s in probe])  # type: ignore[index]
    tau = float(np.sort(entropies)[len(entropies) // 2 - 1 : len(entropies) // 2 + 1].mean())
    config = make_config(models, prompt_file, tmp_path, **teacher, eopd={"tau": tau}, divergence="jsd", jsd_beta=0.4)
    engine = make_engine(config)
    batch = asyncio.run(engine.prepare(load_prompts([prompt_file]).prompts[:3], 0))
    asyncio.run(engine.score(batch))
    engine.measure(batch)
    engine.weigh(batch)
    total, count, forward = 0.0, 0, 0
    for sample in batch:
        own = full_logprobs(models["student"], sample.token_ids, sample.target_positions, engine.vocab_size)
        (read,) = sample.contexts
        their = full_logprobs(models["big"], read.token_ids, read.target_positions, engine.vocab_size)
        uncertain = -(their.exp() * their).sum(-1) > tau
        parts = [divergence("jsd", own, their, 0.4), divergence("forward_kl", own, their)]
        total += float(torch.where(uncertain, parts[1], parts[0]).sum())
        count, forward = count + len(uncertain), forward + int(uncertain.sum())
    share = batch.metrics["eopd/forward"]
    assert isinstance(share, Mean) and float(share) == pytest.approx(forward / count) and 0 < forward < count
    assert our_loss(engine, list(batch)) == pytest.approx(total / count, rel=1e-4)


@pytest.mark.parametrize(("tau", "share"), [(0.0, 1.0), (float("inf"), 0.0)])
def test_a_tau_that_chooses_nothing_is_said(
    models: Models, prompt_file: str, tmp_path: Path, caplog: pytest.LogCaptureFixture, tau: float, share: float
) -> None:
    """All tokens are on one side: the run is that of the forward or of the reverse KL alone."""
    settings = {"teachers": [{"model": models["big"]}], "max_steps": 2}
    found = train(make_config(models, prompt_file, tmp_path / "a", method="eopd", eopd={"tau": tau}, **settings))
    kind = "forward_kl" if share else "reverse_kl"
    plain = train(make_config(models, prompt_file, tmp_path / "b", method="opd", divergence=kind, **settings))
    assert found.metrics["eopd/forward"] == share and found.metrics["loss"] == plain.metrics["loss"]
    assert "tokens lie on one side of eopd.tau" in caplog.text


def test_rollouts_that_no_teacher_judged_have_none() -> None:
    method, sample = built("eopd"), make_rollout("a", [1, 2])
    method.weigh(batch := Batch(samples=[sample]))
    assert sample.divergence_kind is None and batch.metrics["eopd/tokens"] == 0


def test_where_there_is_nothing_to_choose() -> None:
    for kind in ("forward_kl", {"a": "forward_kl", "default": "jsd"}):
        with pytest.raises(
            ConfigError, match="with method 'eopd', which takes the forward KL where the teacher is uncer"
        ):
            built("eopd", divergence=kind)
    with pytest.raises(ConfigError, match=r"eopd\.tau=-1\.0 is not possible"):
        built("eopd", eopd={"tau": -1})
