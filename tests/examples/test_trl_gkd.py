"""TRL's trainers with the fused loss in place of their own: the same losses and gradients, step by step."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from ranks_helpers import free_port, in_processes
from transformers import AutoModelForCausalLM
from trl.experimental.gkd import GKDTrainer
from trl.experimental.gold import GOLDConfig, GOLDTrainer
from trl.trainer import distillation_trainer

import trl_gkd
from opd_kernels.adapters import trl_chunked_divergence_loss
from opd_kernels.trainers import trl_gkd_compute_loss, trl_gold_compute_loss

SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "bf16": {"bf16": True},
    "accumulation": {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2},
    "checkpointing": {"gradient_checkpointing": True},
    "lora": {"lora": True},
    "all": {
        "bf16": True,
        "lora": True,
        "gradient_checkpointing": True,
        "gradient_accumulation_steps": 2,
        "per_device_train_batch_size": 2,
    },
}


def options(name: str) -> dict[str, Any]:
    found = dict(SETTINGS[name])
    if found.pop("lora", False):
        found["peft_config"] = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear")
    return found


def losses(trainer: Any) -> list[float]:
    trainer.train()
    return [line["loss"] for line in trainer.state.log_history if "loss" in line]


def one_batch(trainer: Any, compute_losses: list[Any], items: int | None) -> list[list[torch.Tensor]]:
    """Loss and gradients of one batch, on the model as the trainer prepares it, with each function."""
    model = trainer.accelerator.prepare(trainer.model).train()
    batch = next(iter(trainer.get_train_dataloader()))
    found = []
    for compute_loss in compute_losses:
        model.zero_grad()
        loss = compute_loss(trainer, model, dict(batch), num_items_in_batch=items)
        loss.backward()
        gradients = [p.grad.clone() for p in model.parameters() if p.requires_grad]
        found.append([loss.detach(), *gradients])
    return found


def assert_same(ours: list[torch.Tensor], theirs: list[torch.Tensor], rtol: float, atol: float) -> None:
    assert theirs[0] > 0.01 and len(ours) == len(theirs) > 1
    largest = max(g.abs().max().item() for g in theirs[1:])
    assert largest > 0
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=rtol, atol=atol * largest)


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("items", [None, 40])
def test_one_batch_has_the_loss_and_the_gradient_of_trl(tmp_path: Path, beta: float, items: int | None) -> None:
    trainer = trl_gkd.gkd(str(tmp_path), steps=1, beta=beta)
    ours, theirs = one_batch(trainer, [trl_gkd_compute_loss, GKDTrainer.compute_loss], items)
    assert_same(ours, theirs, rtol=1e-4, atol=1e-5)


def test_bf16_is_what_the_model_computes_in(tmp_path: Path) -> None:
    """The gradient is that of TRL under bf16, and not that of float32."""
    found = {}
    for bf16 in (True, False):
        trainer = trl_gkd.gkd(str(tmp_path), steps=1, bf16=bf16)
        found[bf16] = one_batch(trainer, [trl_gkd_compute_loss, GKDTrainer.compute_loss], None)
    ours, theirs = found[True]
    assert_same(ours, theirs, rtol=0.02, atol=0.02)
    exact = found[False][0]
    assert not all(torch.allclose(a, b, rtol=1e-3, atol=0.0) for a, b in zip(ours, exact, strict=True))


@pytest.mark.parametrize("name", SETTINGS)
def test_gkd_trains_alike(tmp_path: Path, name: str) -> None:
    ours, theirs = (
        losses(trl_gkd.gkd(str(tmp_path), 3, trainer, **options(name)))
        for trainer in (trl_gkd.FusedGKDTrainer, GKDTrainer)
    )
    assert len(ours) == 3 and ours == pytest.approx(theirs, rel=2e-2 if options(name).get("bf16") else 1e-3)


@pytest.mark.slow
def test_two_processes_train_alike(tmp_path: Path) -> None:
    """As under torchrun, each rank with its own batches, with and without LoRA."""
    found = _in_processes(tmp_path)
    for name in ("plain", "lora"):
        ours, theirs = found[f"FusedGKDTrainer {name}"], found[f"GKDTrainer {name}"]
        assert len(ours) == 2 and ours == pytest.approx(theirs, rel=1e-3)


def _in_processes(folder: Path) -> dict[str, list[float]]:
    script = Path(__file__).with_name("trl_gkd_process.py")
    path = os.pathsep.join([str(Path(trl_gkd.__file__).parent), *sys.path])
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    in_processes(2, lambda _: (str(script), str(folder)), PYTHONPATH=path, **place)
    found: dict[str, list[float]] = json.loads((folder / "losses.json").read_text())
    return found


def test_evaluation_has_the_loss_of_trl(tmp_path: Path) -> None:
    found = []
    for kind in (trl_gkd.FusedGKDTrainer, GKDTrainer):
        trainer = trl_gkd.gkd(str(tmp_path), 1, kind)
        found.append(trainer.evaluate(trainer.train_dataset.select(range(6)))["eval_loss"])
    assert found[0] == pytest.approx(found[1], rel=1e-4)


def test_metrics_of_logits_are_refused(tmp_path: Path) -> None:
    trainer = trl_gkd.gkd(str(tmp_path), 1)
    trainer.compute_metrics = lambda prediction: {}
    with pytest.raises(ValueError, match="compute_metrics needs logits"):
        trainer.evaluate(trainer.train_dataset.select(range(2)))


class FusedGOLDTrainer(GOLDTrainer):
    compute_loss = trl_gold_compute_loss


@pytest.mark.parametrize("beta", [0.0, 0.5])
def test_gold_has_the_loss_and_the_gradient_of_trl(tmp_path: Path, models: Any, tokenizer: Any, beta: float) -> None:
    """It reads byte-level tokenizers only, so its models are others."""
    rows = [
        {"messages": [*trl_gkd.chat(row), {"role": "assistant", "content": row["answer"]}]} for row in trl_gkd.prompts()
    ]
    options = {"beta": beta, "lmbda": 0.0, "temperature": 0.7, "max_length": 256}
    student, teacher = (AutoModelForCausalLM.from_pretrained(models["student"], dtype=torch.float32) for _ in range(2))
    with torch.no_grad():
        teacher.lm_head.weight.mul_(1.2)
    trainer = FusedGOLDTrainer(
        model=student,
        teacher_model=teacher,
        processing_class=tokenizer,
        args=GOLDConfig(output_dir=str(tmp_path), **trl_gkd.shared(1), **options),
        train_dataset=trl_gkd.Dataset.from_list(rows),
    )
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(4)])
    found = []
    for compute_loss in (FusedGOLDTrainer.compute_loss, GOLDTrainer.compute_loss):
        student.zero_grad()
        loss = compute_loss(trainer, student, dict(batch), num_items_in_batch=30)
        loss.backward()
        found.append([loss.detach(), *(p.grad.clone() for p in student.parameters())])
    assert_same(found[0], found[1], rtol=1e-4, atol=1e-5)
    trainer.use_uld_loss, trainer.teacher_tokenizer = True, tokenizer
    with pytest.raises(ValueError, match="use_uld_loss=True compares two tokenizers"):
        trainer.compute_loss(student, batch)


@pytest.mark.parametrize("name", SETTINGS)
def test_distillation_trains_alike_after_one_assignment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    theirs = losses(trl_gkd.distillation(str(tmp_path), 3, **options(name)))
    calls = []

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append(args)
        return trl_chunked_divergence_loss(*args, **kwargs)

    monkeypatch.setattr(distillation_trainer, "_chunked_divergence_loss", counted)
    ours = losses(trl_gkd.distillation(str(tmp_path), 3, **options(name)))
    assert len(calls) == 3 * SETTINGS[name].get("gradient_accumulation_steps", 1)
    assert ours == pytest.approx(theirs, rel=2e-2 if options(name).get("bf16") else 1e-3)


def test_the_example_runs(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    plain = distillation_trainer._chunked_divergence_loss
    monkeypatch.setattr(distillation_trainer, "_chunked_divergence_loss", plain)  # put back at the end
    trl_gkd.main(steps=1)
    assert capsys.readouterr().out.count("'loss'") == 2
    assert distillation_trainer._chunked_divergence_loss is trl_chunked_divergence_loss
