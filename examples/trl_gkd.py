"""The fused loss inside TRL: its GKDTrainer and its DistillationTrainer without logits, by one assignment each.

    pip install "trl==1.16.0"
    python examples/trl_gkd.py

Both train the bundled tiny student for some steps. The losses and gradients are TRL's own to rounding, in float32, with
bf16, LoRA, gradient accumulation, gradient checkpointing and several processes (tests/examples/test_trl_gkd.py); what
is saved are the logits: [tokens, vocabulary] of student and teacher.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from pathlib import Path
from typing import Any

import torch

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")

from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DistillationConfig, DistillationTrainer
from trl.experimental.gkd import GKDConfig, GKDTrainer
from trl.trainer import distillation_trainer

from opd_kernels.adapters import trl_chunked_divergence_loss
from opd_kernels.trainers import trl_gkd_compute_loss
from tiny import task

MODELS = Path(__file__).parent / "tiny" / "models"


class FusedGKDTrainer(GKDTrainer):
    """GKD whose loss reads hidden states and heads."""

    compute_loss = trl_gkd_compute_loss


def gkd(
    output: str, steps: int, trainer: type[GKDTrainer] = FusedGKDTrainer, peft_config: Any = None, **options: Any
) -> GKDTrainer:
    """GKD on the student's own answers half of the time, on given ones else; not yet trained."""
    given = {"lmbda": 0.5, "beta": 0.5, "max_new_tokens": 16, "max_length": 256}
    args = GKDConfig(output_dir=output, **{**shared(steps), **given, **options})
    rows = [{"messages": [*chat(row), {"role": "assistant", "content": row["answer"]}]} for row in prompts()]
    return trainer(args=args, train_dataset=Dataset.from_list(rows), peft_config=peft_config, **models())


def distillation(output: str, steps: int, peft_config: Any = None, **options: Any) -> DistillationTrainer:
    """On-policy distillation; not yet trained."""
    args = DistillationConfig(
        output_dir=output, **{**shared(steps), "max_completion_length": 16, "beta": 1.0, **options}
    )
    rows = [{"prompt": chat(row)} for row in prompts()]
    return DistillationTrainer(args=args, train_dataset=Dataset.from_list(rows), peft_config=peft_config, **models())


def shared(steps: int) -> dict[str, Any]:
    """Arguments of both trainers."""
    return {
        "max_steps": steps, "per_device_train_batch_size": 4, "learning_rate": 1e-3, "logging_steps": 1,
        "report_to": [], "save_strategy": "no", "use_cpu": not torch.cuda.is_available(), "bf16": False,
        "gradient_checkpointing": False, "disable_tqdm": True,
    }  # fmt: skip


def models() -> dict[str, Any]:
    """Student, teacher and their tokenizer, as arguments of a trainer."""
    student, teacher = (
        AutoModelForCausalLM.from_pretrained(MODELS / name, dtype=torch.float32)
        for name in ("student", "teacher_convert")
    )
    return {
        "model": student,
        "teacher_model": teacher,
        "processing_class": AutoTokenizer.from_pretrained(MODELS / "student"),
    }


def prompts() -> list[dict[str, Any]]:
    """What teacher_convert is good at."""
    return task.prompts("train", "convert", 64)


def chat(row: dict[str, Any]) -> list[dict[str, str]]:
    """A prompt as messages."""
    return [{"role": "user", "content": row["prompt"]}]


def main(steps: int = 5) -> None:
    """Some steps of each trainer."""
    with tempfile.TemporaryDirectory() as folder:
        gkd(folder, steps).train()
        distillation_trainer._chunked_divergence_loss = trl_chunked_divergence_loss
        distillation(folder, steps).train()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=5, help="of each trainer (default: %(default)s)")
    main(parser.parse_args().steps)
