"""TRL's trainers with the fused loss in place of their own: the same losses and gradients, step by step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from trl.experimental.gkd import GKDTrainer
from trl.trainer import distillation_trainer

import trl_gkd
from opd_kernels.adapters import trl_chunked_divergence_loss


def losses(trainer: Any) -> list[float]:
    trainer.train()
    return [line["loss"] for line in trainer.state.log_history if "loss" in line]


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("items", [None, 40])
def test_one_batch_has_the_loss_and_the_gradient_of_trl(tmp_path: Path, beta: float, items: int | None) -> None:
    trainer = trl_gkd.gkd(str(tmp_path), steps=1)
    trainer.beta = beta
    batch = next(iter(trainer.get_train_dataloader()))
    found = []
    for compute_loss in (trl_gkd.FusedGKDTrainer.compute_loss, GKDTrainer.compute_loss):
        trainer.model.zero_grad()
        loss = compute_loss(trainer, trainer.model, batch, num_items_in_batch=items)
        loss.backward()
        found.append((loss.detach(), *(p.grad.clone() for p in trainer.model.parameters())))
    ours, theirs = found
    assert theirs[0] > 0.01
    largest = max(g.abs().max().item() for g in theirs[1:])
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5 * largest)


def test_gkd_trains_alike(tmp_path: Path) -> None:
    ours, theirs = (losses(trl_gkd.gkd(str(tmp_path), 3, trainer)) for trainer in (trl_gkd.FusedGKDTrainer, GKDTrainer))
    assert len(ours) == 3 and ours == pytest.approx(theirs, rel=1e-3)


def test_distillation_trains_alike_after_one_assignment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = losses(trl_gkd.distillation(str(tmp_path), 3))
    calls = []

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append(args)
        return trl_chunked_divergence_loss(*args, **kwargs)

    monkeypatch.setattr(distillation_trainer, "_chunked_divergence_loss", counted)
    ours = losses(trl_gkd.distillation(str(tmp_path), 3))
    assert len(calls) == 3 and ours == pytest.approx(theirs, rel=1e-3)


def test_the_example_runs(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    plain = distillation_trainer._chunked_divergence_loss
    monkeypatch.setattr(distillation_trainer, "_chunked_divergence_loss", plain)  # put back at the end
    trl_gkd.main(steps=1)
    assert capsys.readouterr().out.count("'loss'") == 2
    assert distillation_trainer._chunked_divergence_loss is trl_chunked_divergence_loss
