"""TRL's SDFT and SDPO trainers with the fused loss in place of their own: the same losses and gradients."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from ranks_helpers import free_port, in_processes
from test_trl_gkd import losses
from trl.experimental.sdft import SDFTConfig, SDFTTrainer
from trl.experimental.sdpo import SDPOConfig, SDPOTrainer

import trl_gkd
from opd_kernels.trainers import trl_self_distillation_compute_loss

SDFT: dict[str, dict[str, Any]] = {
    "topk": {},
    "topk with tail": {"distillation_add_tail": True, "distillation_topk": 8, "temperature": 0.7},
    "topk forward": {"distillation_add_tail": True, "distillation_topk": 8, "distillation_alpha": 0.0},
    "topk reverse": {"distillation_topk": 8, "distillation_alpha": 1.0, "num_loss_tokens_to_skip": 3},
    "full": {"distillation_mode": "full_logits", "distillation_topk": None, "num_loss_tokens_to_skip": 2},
    "sampled": {"distillation_mode": "sampled_token", "distillation_topk": None, "distillation_alpha": 1.0},
    "skipped": {"num_loss_tokens_to_skip": 100},
}
LORA = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear")


class FusedSDFTTrainer(SDFTTrainer):
    compute_loss = trl_self_distillation_compute_loss


class FusedSDPOTrainer(SDPOTrainer):
    compute_loss = trl_self_distillation_compute_loss


def sdft(folder: Path, kind: type[SDFTTrainer], steps: int = 1, peft_config: Any = None, **options: Any) -> Any:
    """The demo's student is shown the answer; not yet trained."""
    rows = [{"prompt": trl_gkd.chat(row), "privileged_context": row["answer"]} for row in trl_gkd.prompts()]
    given = {"num_generations": 2, "max_completion_length": 12, "distillation_topk": 16}
    args = SDFTConfig(output_dir=str(folder), **{**trl_gkd.shared(steps), **given, **options})
    return kind(args=args, train_dataset=Dataset.from_list(rows), peft_config=peft_config, **student())


def sdpo(folder: Path, kind: type[SDPOTrainer], steps: int = 1, **options: Any) -> Any:
    """A completion is good where its length is even; a good one is shown to the teacher of the others."""

    def reward(completions: list[Any], **_: Any) -> list[float]:
        return [float(len(str(completion)) % 2 == 0) for completion in completions]

    rows = [{"prompt": trl_gkd.chat(row)} for row in trl_gkd.prompts()]
    given = {"num_generations": 4, "max_completion_length": 12, "dont_reprompt_on_self_success": True}
    args = SDPOConfig(output_dir=str(folder), **{**trl_gkd.shared(steps), **given, **options})
    return kind(args=args, train_dataset=Dataset.from_list(rows), reward_funcs=reward, **student())


def student() -> dict[str, Any]:
    return {name: value for name, value in trl_gkd.models().items() if name != "teacher_model"}


def one_batch(trainer: Any, batch: dict[str, Any]) -> list[list[torch.Tensor]]:
    """Loss and gradients of a batch with our loss and with the trainer's, and what each logged."""
    model, found, logged = trainer.accelerator.prepare(trainer.model).train(), [], []
    trainer.current_gradient_accumulation_steps = 2
    trainer._log_self_distillation_metric = lambda mode, value: logged.append((mode, value))
    for kind in (trl_self_distillation_compute_loss, type(trainer).__mro__[1].compute_loss):
        model.zero_grad()
        loss = kind(trainer, model, dict(batch))
        loss.backward()
        found.append([loss.detach(), *(p.grad.clone() for p in model.parameters() if p.requires_grad)])
    assert logged[0] == (logged[1][0], pytest.approx(logged[1][1], rel=1e-4, abs=1e-6))
    return found


@pytest.mark.parametrize("name", SDFT)
def test_a_batch_of_sdft_has_the_loss_and_the_gradient_of_trl(tmp_path: Path, name: str) -> None:
    trainer = sdft(tmp_path, FusedSDFTTrainer, **SDFT[name])
    batch = trainer._prepare_training_batch([trainer.train_dataset[i] for i in range(4)])
    ours, theirs = one_batch(trainer, batch)
    if name == "skipped":
        assert ours[0] == theirs[0] == 0 and all(not g.any() for g in ours[1:]) and len(ours) == len(theirs)
    else:
        compare(ours, theirs)
    batch["old_per_token_logps"] = torch.full(batch["completion_ids"].shape, -1.0) + 0.5 * torch.rand(
        batch["completion_ids"].shape
    )
    compare(*one_batch(trainer, batch))


def compare(ours: list[torch.Tensor], theirs: list[torch.Tensor]) -> None:
    assert len(ours) == len(theirs) > 1
    largest = max(g.abs().max().item() for g in theirs[1:])
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5 * largest)


@pytest.mark.parametrize("mode", ["sampled_token", "full_logits"])
def test_a_batch_of_sdpo_has_the_loss_and_the_gradient_of_trl(tmp_path: Path, mode: str) -> None:
    """Of several completions some have no good one to be shown, and do not count."""
    trainer = sdpo(tmp_path, FusedSDPOTrainer, distillation_mode=mode)
    batch = trainer._prepare_training_batch([trainer.train_dataset[i // 4] for i in range(8)])
    assert batch["self_distillation_mask"].sum() > 0
    batch["self_distillation_mask"][1] = 0.0
    compare(*one_batch(trainer, batch))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"teacher_model_kind": "live"},
        {"bf16": True, "gradient_checkpointing": True, "gradient_accumulation_steps": 2},
        {"peft_config": LORA},
        {"peft_config": LORA, "teacher_model_kind": "ema"},
    ],
    ids=["copy", "live", "bf16", "lora", "lora ema"],
)
def test_sdft_trains_alike(tmp_path: Path, options: dict[str, Any]) -> None:
    ours, theirs = (losses(sdft(tmp_path, kind, 2, **options)) for kind in (FusedSDFTTrainer, SDFTTrainer))
    assert len(ours) == 2 and theirs[0] > 0
    assert ours == pytest.approx(theirs, rel=2e-2 if options.get("bf16") else 1e-3)


@pytest.mark.slow
def test_two_processes_train_alike(tmp_path: Path) -> None:
    """As under torchrun, each rank with its own batches."""
    script = Path(__file__).with_name("trl_self_distillation_process.py")
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    in_processes(2, lambda _: (str(script), str(tmp_path)), PYTHONPATH=os.pathsep.join(sys.path), **place)
    ours, theirs = json.loads((tmp_path / "losses.json").read_text())
    assert len(ours) == 2 and theirs[0] > 0 and ours == pytest.approx(theirs, rel=1e-3)


def test_sdpo_trains_alike(tmp_path: Path) -> None:
    """With a teacher that follows the student."""
    ours, theirs = (
        losses(sdpo(tmp_path, kind, 2, teacher_model_kind="ema", distillation_mode="full_logits"))
        for kind in (FusedSDPOTrainer, SDPOTrainer)
    )
    assert len(ours) == 2 and max(theirs) > 0 and ours == pytest.approx(theirs, rel=1e-3)


def test_what_needs_logits_is_refused(tmp_path: Path) -> None:
    trainer = sdpo(tmp_path, FusedSDPOTrainer, distillation_weight=0.5)
    with pytest.raises(ValueError, match=r"distillation_weight=0\.5 adds a policy loss"):
        trainer.compute_loss(trainer.model, {})
    with pytest.raises(ValueError, match="no outputs to return"):
        trainer.compute_loss(trainer.model, {}, return_outputs=True)
