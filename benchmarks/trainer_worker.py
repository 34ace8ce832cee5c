"""Optimiser steps of one trainer, in a process of its own; prints JSON: seconds of a step, peak memory, losses.

python benchmarks/trainer_worker.py PROVIDER settings.json

Every provider does the same: sample the student on all prompts, ask the teacher, reverse KL over the
completions' tokens, backward, AdamW. Steps after the first are timed, by the clock and in seconds of all processors.
Memory is the process's peak beyond what it held with both models loaded, before the first step. With ``top_k: 1`` all
trainers get the same completions; ``lora`` is the rank of an adapter on every linear layer. "ours sampled" takes the
gradient of the loss from a tenth of the columns. With several ``processes`` torchrun starts this in each of them, the
prompts and threads are divided among them, and the figures are those of the first.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch


def memory(name: str) -> int:
    """Bytes of this process: "VmRSS" now, "VmHWM" at most since :func:`forget_peak`."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


def forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


class Stopwatch:
    """Told at the beginning and after every step."""

    def __init__(self) -> None:
        self.times: list[tuple[float, float]] = []
        self.begun = 0

    def begin(self) -> None:
        forget_peak()
        self.begun = memory("VmRSS")
        self.step()

    def step(self) -> None:
        self.times.append((time.perf_counter(), time.process_time()))

    def figures(self) -> dict[str, float]:
        steps = [(b[0] - a[0], b[1] - a[1]) for a, b in zip(self.times[1:], self.times[2:], strict=False)]
        wall, processor = (statistics.median(column) for column in zip(*steps, strict=True))
        return {"step_s": wall, "processor_s": processor, "peak_bytes": memory("VmHWM") - self.begun}


def share_of_prompts(settings: dict[str, Any]) -> int:
    """Prompts of one process in a step."""
    share: int = settings["prompts"] // settings.get("processes", 1)
    return share


def ours(settings: dict[str, Any], watch: Stopwatch) -> dict[str, Any]:
    import asyncio

    from opdengine.config.loading import from_mapping
    from opdengine.config.train import TrainConfig
    from opdengine.data.prompts import load_prompts
    from opdengine.distributed import start
    from opdengine.methods import build_method
    from opdengine.models.chat import load_tokenizer
    from opdengine.training.build import build_engine

    bf16 = settings.get("bf16", False)
    config = from_mapping(
        TrainConfig,
        {
            "model": settings["student"],
            "teachers": [{"model": settings["teacher"], "dtype": "bfloat16" if bf16 else "float32"}],
            "bf16": bf16,
            "method": "opd",
            "train_data": [settings["data"]],
            "output_dir": settings["folder"],
            "max_completion_length": settings["tokens"],
            "per_device_train_batch_size": share_of_prompts(settings),
            "learning_rate": settings["learning_rate"],
            "max_steps": settings["steps"],
            "warmup_ratio": 0.0,
            "lr_scheduler_type": "constant",
            "weight_decay": 0.0,
            "top_k": settings.get("top_k", 0),
            "vocab_sample": settings.get("vocab_sample", 0.0),
            **({"lora": {"r": settings["lora"], "lora_alpha": settings["lora"]}} if settings.get("lora") else {}),
        },
    )
    losses = []
    with start() as ranks:
        engine = build_engine(config, build_method(config), load_tokenizer(config.model), ranks=ranks)
        batch = load_prompts(config.train_data).prompts
        watch.begin()
        for _ in range(settings["steps"]):
            metrics = asyncio.run(engine.step(batch)).metrics
            losses.append(metrics["loss"])
            watch.step()
    return {"losses": losses, "tokens": metrics["completions/mean_length"] * settings["prompts"]}


def trl(settings: dict[str, Any], watch: Stopwatch, kind: str) -> dict[str, Any]:
    from datasets import load_dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

    class Watcher(TrainerCallback):
        def on_train_begin(self, *arguments: Any, **others: Any) -> None:
            watch.begin()

        def on_step_end(self, *arguments: Any, **others: Any) -> None:
            watch.step()

    bf16 = settings.get("bf16", False)
    data = load_dataset("json", data_files=settings["data"], split="train", cache_dir=settings["folder"])
    shared = {
        "output_dir": settings["folder"],
        "per_device_train_batch_size": share_of_prompts(settings),
        "max_steps": settings["steps"],
        "learning_rate": settings["learning_rate"],
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "beta": 1.0,
        "temperature": 1.0,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": not torch.cuda.is_available(),
        "bf16": bf16,
        "gradient_checkpointing": False,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        **({"ddp_backend": "gloo"} if settings.get("processes", 1) > 1 else {}),
    }
    student = AutoModelForCausalLM.from_pretrained(settings["student"], dtype=torch.float32)
    teacher = AutoModelForCausalLM.from_pretrained(settings["teacher"], dtype=torch.bfloat16 if bf16 else torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(settings["student"], padding_side="left")
    columns: dict[str, Any] = {"args": None, "processing_class": tokenizer, "callbacks": [Watcher()]}
    if settings.get("lora"):
        from peft import LoraConfig

        rank = settings["lora"]
        columns["peft_config"] = LoraConfig(r=rank, lora_alpha=rank, target_modules="all-linear", task_type="CAUSAL_LM")
    trainer: Any
    if kind == "trl":
        from trl import DistillationConfig, DistillationTrainer

        columns["args"] = DistillationConfig(
            **shared, max_completion_length=settings["tokens"], top_k=settings.get("top_k", 0)
        )
        trainer = DistillationTrainer(student, teacher, train_dataset=data, **columns)
    else:
        from trl.experimental.gkd import GKDConfig, GKDTrainer

        columns["args"] = GKDConfig(**shared, max_new_tokens=settings["tokens"], lmbda=1.0, max_length=1024)
        answered = data.map(
            lambda row: {"messages": [*row["prompt"], {"role": "assistant", "content": "w7"}]},
            remove_columns=["prompt"],
        )
        trainer = GKDTrainer(student, teacher, train_dataset=answered, **columns)
        trainer.generation_config.top_k = settings.get("top_k", 0)
    trainer.train()
    return {"losses": [row["loss"] for row in trainer.state.log_history if "loss" in row]}


PROVIDERS: dict[str, Callable[[dict[str, Any], Stopwatch], dict[str, Any]]] = {
    "ours": ours,
    "ours sampled": lambda settings, watch: ours({**settings, "vocab_sample": 0.1}, watch),
    "trl": lambda settings, watch: trl(settings, watch, "trl"),
    "trl gkd": lambda settings, watch: trl(settings, watch, "gkd"),
}


def main(provider: str, file: str) -> None:
    settings = json.loads(Path(file).read_text())
    torch.set_num_threads(max(1, settings["threads"] // settings.get("processes", 1)))
    watch = Stopwatch()
    found = PROVIDERS[provider](settings, watch)
    if os.environ.get("RANK", "0") == "0":
        print(json.dumps({**watch.figures(), **found}))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
