"""A whole step, from the prompts to the gradient, against float64 logits and autograd of the plain models.

Nothing of the engine is used for the expected values: they are computed from what a step logs (rollouts and
debates) as the papers write it down.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_helpers import assert_same_gradients, divergence, make_config, make_engine
from transformers import AutoModelForCausalLM

from opdengine.data import load_prompts
from opdengine.report import StepResult
from opdengine.types import Completion, Request, SamplingParams

THINKING = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
BRACKETS = (
    "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}[answer]{% endif %}"
)


def whole_step(engine: Any, prompts: Sequence[Any]) -> tuple[StepResult, dict[str, torch.Tensor]]:
    """What a step reports and the gradient that its optimiser would have taken."""
    gradient: dict[str, torch.Tensor] = {}

    def note(loss: float, norm: float) -> dict[str, float]:
        gradient.update({n: p.grad.clone() for n, p in engine.student.model.named_parameters() if p.grad is not None})
        return {"loss": loss}

    engine._optimizer_step = note
    return asyncio.run(engine.step(prompts)), gradient


def logprobs(model: Any, ids: Sequence[int], count: int, vocab: int) -> torch.Tensor:
    """float64 [count, V]: what predicts the last ``count`` of the ids, as the whole model says it."""
    logits = model(input_ids=torch.tensor([list(ids)])).logits[0, -count - 1 : -1, :vocab]
    return logits.double().log_softmax(-1)


def plain_models(models: dict[str, str], *names: str) -> list[Any]:
    return [AutoModelForCausalLM.from_pretrained(models[name]).double().eval() for name in names]


@pytest.mark.parametrize("normalization", ["token", "sequence"])
def test_mad_opd(models: dict[str, str], tokenizer: Any, tmp_path: Path, normalization: str) -> None:
    """Real debates, three templates, two divergences, two samples of a prompt; one debate lacks a confidence."""
    rows = [
        {"id": f"p{i}", "prompt": f"What is {i} + {i}?", "data_source": "agentic" if i % 2 else "code"}
        for i in range(4)
    ]
    rows[1] = {"id": "p1", "data_source": "agentic", "messages": [
        {"role": "system", "content": "Be brief."}, {"role": "user", "content": "1?"},
        {"role": "assistant", "content": "one"}, {"role": "user", "content": "and 2?"},
    ]}  # fmt: skip
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = make_config(
        models, str(data), tmp_path, method="mad_opd", loss_normalization=normalization, num_generations=2,
        divergence={"agentic": "jsd", "default": "reverse_kl"}, jsd_beta=0.3, debate={"tau": 0.4},
        chat_template=THINKING, chat_template_kwargs={"enable_thinking": False},
        teachers=[
            {"model": models["big"], "chat_template": THINKING, "chat_template_kwargs": {"enable_thinking": True}},
            {"model": models["small"], "chat_template": BRACKETS},
        ],
    )  # fmt: skip
    engine = make_engine(config)
    engine.sampler.stop_ids = tuple(range(0, len(tokenizer), 4))  # completions of several lengths
    for teacher in engine.teachers:
        give_confidences(teacher)
    result, gradient = whole_step(engine, load_prompts([str(data)]).prompts)
    debates = {record["prompt_id"]: record["rounds"] for record in result.records}
    assert len(result.rollouts) == 8 and len(debates) == 4
    assert len({len(r.targets) for r in result.rollouts}) > 2
    assert {r.stop_reason for r in result.rollouts} == {"stop", "length"}

    student, *teachers = plain_models(models, "student", "big", "small")
    every = sum(len(r.targets) for r in result.rollouts)
    loss, stated = torch.zeros((), dtype=torch.float64), []
    for rollout in result.rollouts:
        messages = [dict(m) for m in rollout.prompt.messages]
        answer, rounds = rollout.targets.tolist(), debates[rollout.prompt.id]
        opening = "<|im_start|>assistant\n<think>\n\n</think>\n\n"
        p = logprobs(student, encode(tokenizer, chatml(messages) + opening) + answer, len(answer), len(tokenizer))
        said = [re.findall(r"<<CONFIDENCE=(\d+)>>", text) for text in rounds[-1]]
        sure = [int(s[-1]) / 100 for s in said] if all(said) else [0.0, 0.0]
        stated.append(all(said))
        total = sum(math.exp(c / 0.4) for c in sure)
        entries = [f"[Expert {'AB'[k]} Round {r + 1}]: {rounds[r][k]}" for r in range(2) for k in range(2)]
        transcript = "\n".join(["[Debate Start]", *entries, "[Debate End]"])
        terms = torch.zeros(len(answer), dtype=torch.float64)
        for k, teacher in enumerate(teachers):
            question = f"S {messages[-1]['content']} | {'AB'[k]} | {transcript}"
            chat = [*messages[:-1], {"role": "user", "content": question}]
            text = chatml(chat) + "<|im_start|>assistant\n" if k == 0 else brackets(chat) + "[answer]"
            with torch.no_grad():
                q = logprobs(teacher, encode(tokenizer, text) + answer, len(answer), len(tokenizer))
            kind = "jsd" if rollout.prompt.key == "agentic" else "reverse_kl"
            terms = terms + math.exp(sure[k] / 0.4) / total * divergence(kind, p, q, 0.3)
        scale = every if normalization == "token" else len(result.rollouts) * len(answer)
        loss = loss + terms.sum() / scale
    loss.backward()
    assert sorted(stated) == [False] * 2 + [True] * 6
    assert result.metrics["loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert_same_gradients(gradient, {n: p.grad.float() for n, p in student.named_parameters()})


def encode(tokenizer: Any, text: str) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False)


def chatml(messages: Sequence[dict[str, str]]) -> str:
    return "".join(f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in messages)


def brackets(messages: Sequence[dict[str, str]]) -> str:
    return "".join(f"[{m['role']}] {m['content']}<|im_end|>" for m in messages)


def give_confidences(teacher: Any) -> None:
    """What a teacher really writes, with a tag at its end; the last prompt's second round has none of "small"."""
    plain, calls = teacher.generate, []

    async def generate(requests: Sequence[Request], params: SamplingParams) -> list[Completion]:
        calls.append(requests)
        answers = await plain(requests, params)
        tags = [f" <<CONFIDENCE={(r.seed + 7 * len(calls)) % 101}>>" for r in requests]
        if teacher.name == "small" and len(calls) == 2:
            tags[-1] = ""
        return [dataclasses.replace(a, text=a.text + tag) for a, tag in zip(answers, tags, strict=True)]

    teacher.generate = generate
