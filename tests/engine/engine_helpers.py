"""What the tests of the engine share: configurations, engines without a run folder, scripted teachers."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from opdengine.config.loading import from_mapping
from opdengine.config.train import TrainConfig
from opdengine.methods import PAPERS, build_method
from opdengine.methods.paper import value_of
from opdengine.models.chat import load_tokenizer
from opdengine.training.build import build_engine
from opdengine.training.step import Engine
from opdengine.types import Batch, Completion, Message, Prompt, Request, Sample, SamplingParams

PROMPTS = {
    "first": "Q {task}{confidence}",
    "later": "L {task} {expert} {transcript}{confidence}",
    "score": "S {task} | {expert} | {transcript}",
}


PLAIN = {
    setting: value_of(TrainConfig, setting)
    for paper in PAPERS.values()
    for setting in paper.defaults
    if "." not in setting
}
"""The general default of every setting that some paper sets otherwise."""


def make_config(models: dict[str, str], train_data: str, output_dir: Path, **changes: Any) -> TrainConfig:
    """Two teachers on the tiny models, four prompts a step, short completions, and no paper's defaults."""
    data: dict[str, Any] = {
        **PLAIN,
        "model": models["student"],
        "teachers": [{"model": models["big"], "weight": 3.0}, {"model": models["small"], "weight": 1.0}],
        "train_data": [train_data] if train_data else [],
        "output_dir": str(output_dir),
        "method": "mt_opd",
        "per_device_train_batch_size": 4,
        "max_completion_length": 6,
        "max_steps": 3,
        "learning_rate": 1e-3,
        "debate": {"max_tokens": 5, "prompts": PROMPTS},
        "log_completions": False,
    }
    debate = {**data["debate"], **changes.pop("debate", {})}
    return from_mapping(TrainConfig, {**data, **changes, "debate": debate})


def make_engine(config: TrainConfig) -> Engine:
    tokenizer = load_tokenizer(config.model, chat_template=config.chat_template, images=config.images)
    return build_engine(config, build_method(config), tokenizer)


def make_samples(engine: Engine, prompts: Sequence[Prompt]) -> list[Sample]:
    """Sample, annotation, scores and weights of a step, as the engine does them."""

    async def run() -> list[Sample]:
        batch = await engine.prepare(prompts, 0)
        await engine.score(batch)
        engine.measure(batch)
        engine.weigh(batch)
        return list(batch)

    return asyncio.run(run())


def loss_and_gradient(engine: Engine, samples: Sequence[Sample]) -> tuple[float, dict[str, torch.Tensor]]:
    """Forward and backward of a step without its optimiser step."""
    engine._optimizer_step = lambda loss, norm: {"loss": loss}  # type: ignore[method-assign]
    try:
        loss = engine.update(Batch(samples=list(samples))).metrics["loss"]
    finally:
        del engine._optimizer_step
    gradients = {n: p.grad.clone() for n, p in engine.student.model.named_parameters() if p.grad is not None}
    engine.optimizer.zero_grad(set_to_none=True)
    return loss, gradients


def assert_same_gradients(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor], rtol: float = 1e-4) -> None:
    assert one.keys() == other.keys()
    largest = max(g.abs().max().item() for g in other.values())
    assert largest > 0
    for name in one:
        torch.testing.assert_close(one[name], other[name], rtol=rtol, atol=rtol * largest, msg=name)


def divergence(kind: str, student: torch.Tensor, teacher: torch.Tensor, beta: float = 0.5) -> torch.Tensor:
    """[T] from log-probabilities [T, V], written down as in the papers."""

    def kl(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return (a.exp() * (a - b)).sum(-1)

    if kind == "reverse_kl":
        return kl(student, teacher)
    if kind == "forward_kl":
        return kl(teacher, student)
    if kind == "skew_kl":  # here beta is alpha, the teacher's share of the middle
        return kl(teacher, (beta * teacher.exp() + (1 - beta) * student.exp()).log())
    middle = (beta * teacher.exp() + (1 - beta) * student.exp()).log()
    return beta * kl(teacher, middle) + (1 - beta) * kl(student, middle)


def full_logprobs(path: str, ids: Sequence[int], positions: np.ndarray, vocab: int) -> torch.Tensor:
    """float64 [T, V] from the logits of the whole model, padded vocabulary rows left out."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path).double().eval()
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([list(ids)])).logits[0]
    return logits[torch.from_numpy(positions - 1), :vocab].log_softmax(-1)


class ScriptedTeacher:
    """A teacher that says what it is told and records what it was asked.

    Args:
        name: of the teacher.
        reply: (index of the call, request) -> text, or a list with one text per round.
        window: longest sequence in tokens; one id stands for a character.
        opening: the thought that its prompts leave open.
    """

    def __init__(
        self,
        name: str,
        reply: Callable[[int, Request], str] | Sequence[str],
        window: int | None = None,
        opening: str = "",
    ) -> None:
        self.name = name
        self.keys: tuple[str, ...] = ()
        self.weight = 1.0
        self.fingerprint = f"weights of {name}"
        self.window = window
        self.opening = opening
        self.calls: list[list[Request]] = []
        self._reply = reply

    def encode(self, messages: Sequence[Message], tools: Sequence[Any] = ()) -> list[int]:
        text = "".join(f"<{m['role']}>{m['content']}" for m in messages) + "".join(f"<tool {t}>" for t in tools)
        return [ord(c) for c in text + "<assistant>"]

    def encode_answer(
        self, messages: Sequence[Message], tools: Sequence[Any] = (), sampled: Sequence[int] = ()
    ) -> list[int]:
        return [ord(c) for c in "".join(f"<{m['role']}>{m['content']}" for m in messages) + "<assistant>"]

    def asked(self, call: int, place: int = 0) -> str:
        """The text of one request."""
        return "".join(map(chr, self.calls[call][place].token_ids))

    async def generate(self, requests: Sequence[Request], params: SamplingParams) -> list[Completion]:
        self.calls.append(list(requests))
        number = len(self.calls) - 1
        texts = [self._reply(number, r) if callable(self._reply) else self._reply[number] for r in requests]
        return [Completion(np.array([1]), np.zeros(1), "stop", text) for text in texts]
