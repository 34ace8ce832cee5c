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
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from engine_helpers import assert_same_gradients, divergence, make_config, make_engine
from transformers import AutoModelForCausalLM

from opdengine.data.prompts import load_prompts
from opdengine.environments.protocol import Step
from opdengine.environments.setup import load_tasks
from opdengine.training.step_result import StepResult
from opdengine.types import Completion, Message, Request, Sample, SamplingParams

sys.path.append(str(Path(__file__).parents[1] / "agents"))
from agent_helpers import Countdown, LocalPool

from tiny.agents.house import HOUSE

THINKING = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
NO_THOUGHT = "<|im_start|>assistant\n<think>\n\n</think>\n\n"
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
    config = debate_config(
        models, str(data), tmp_path, method="mad_opd", loss_normalization=normalization, num_generations=2,
        divergence={"agentic": "jsd", "default": "reverse_kl"},
    )  # fmt: skip
    engine = make_engine(config)
    engine.sampler.stop_ids = tuple(range(0, len(tokenizer), 4))  # completions of several lengths
    for teacher in engine.teachers:
        give_confidences(teacher)
    result, gradient = whole_step(engine, load_prompts([str(data)]).prompts)
    debates = {record["prompt_id"]: record["rounds"] for record in result.records}
    assert len(result.samples) == 8 and len(debates) == 4
    assert len({len(r.target_ids) for r in result.samples}) > 2
    assert {r.stop_reason for r in result.samples} == {"stop", "length"}

    student, *teachers = plain_models(models, "student", "big", "small")
    every = sum(len(r.target_ids) for r in result.samples)
    loss, stated = torch.zeros((), dtype=torch.float64), []
    for rollout in result.samples:
        messages = [dict(m) for m in rollout.prompt.messages]
        answer, rounds = rollout.target_ids.tolist(), debates[rollout.prompt.id]
        p = logprobs(student, encode(tokenizer, chatml(messages) + NO_THOUGHT) + answer, len(answer), len(tokenizer))
        kind = "jsd" if rollout.prompt.key == "agentic" else "reverse_kl"
        terms = under_debate(tokenizer, teachers, messages, rounds, p, answer, kind)
        stated.append(all("CONFIDENCE" in text for text in rounds[-1]))
        scale = every if normalization == "token" else len(result.samples) * len(answer)
        loss = loss + terms.sum() / scale
    loss.backward()
    assert sorted(stated) == [False] * 2 + [True] * 6
    assert result.metrics["loss"] == pytest.approx(loss.item(), rel=1e-6)
    assert_same_gradients(gradient, {n: p.grad.float() for n, p in student.named_parameters()}, rtol=1e-5)


def test_opad(models: dict[str, str], tokenizer: Any, tmp_path: Path) -> None:
    """A debate on every state of an episode, judged under the true prefix."""
    config = debate_config(
        models, "", tmp_path, method="opad", loss_normalization="sequence", divergence="jsd",
        environment={"name": HOUSE},
    )  # fmt: skip
    engine = make_engine(config)
    assert engine.episodes is not None
    engine.episodes.close()
    engine.episodes.pool = LocalPool(Countdown, 3)
    engine.sampler.stop_ids = tuple(range(0, len(tokenizer), 4))
    for teacher in engine.teachers:
        give_confidences(teacher)
    result, gradient = whole_step(engine, load_tasks(config.environment, "train").prompts[:3])
    debates = {record["prompt_id"]: record["rounds"] for record in result.records}
    assert len(result.samples) == len(debates) == 9

    student, *teachers = plain_models(models, "student", "big", "small")
    loss = torch.zeros((), dtype=torch.float64)
    for first in range(0, 9, 3):
        ids, chat = [], []
        for step, rollout in enumerate(result.samples[first : first + 3]):
            closing = "" if not ids or ids[-1] == tokenizer.eos_token_id else "<|im_end|>"
            seen = {"role": "user", "content": f"{3 - step} left"} if step else dict(rollout.prompt.messages[0])
            ids = ids + encode(tokenizer, closing + ("\n" if step else "") + chatml([seen]) + NO_THOUGHT)
            chat, answer = [*chat, seen], rollout.target_ids.tolist()
            assert rollout.token_ids.tolist() == ids + answer
            p = logprobs(student, ids + answer, len(answer), len(tokenizer))
            terms = under_debate(tokenizer, teachers, chat, debates[rollout.prompt.id], p, answer, "jsd")
            loss = loss + terms.mean() / 9
            ids, chat = ids + answer, [*chat, {"role": "assistant", "content": rollout.text}]
    loss.backward()
    assert result.metrics["loss"] == pytest.approx(loss.item(), rel=1e-6)
    assert_same_gradients(gradient, {n: p.grad.float() for n, p in student.named_parameters()}, rtol=1e-5)


def debate_config(*arguments: Any, **changes: Any) -> Any:
    """A student that does not think, a teacher that does, and one with a template of its own."""
    models = arguments[0]
    return make_config(
        *arguments, jsd_beta=0.3, debate={"tau": 0.4}, chat_template=THINKING,
        chat_template_kwargs={"enable_thinking": False},
        teachers=[
            {"model": models["big"], "chat_template": THINKING, "chat_template_kwargs": {"enable_thinking": True}},
            {"model": models["small"], "chat_template": BRACKETS},
        ],
        **changes,
    )  # fmt: skip


def under_debate(
    tokenizer: Any,
    teachers: Sequence[Any],
    messages: Sequence[dict[str, str]],
    rounds: Sequence[Sequence[str]],
    p: torch.Tensor,
    answer: Sequence[int],
    kind: str,
) -> torch.Tensor:
    """float64 [T]: sum_k w_k D(p_Tk, p_S) under the transcript (equations 7 and 8), p the student's log-probs."""
    said = [re.findall(r"<<CONFIDENCE=(\d+)>>", text) for text in rounds[-1]]
    sure = [int(s[-1]) / 100 for s in said] if all(said) else [0.0, 0.0]
    total = sum(math.exp(c / 0.4) for c in sure)
    entries = [f"[Expert {'AB'[k]} Round {r + 1}]: {rounds[r][k]}" for r in range(2) for k in range(2)]
    transcript = "\n".join(["[Debate Start]", *entries, "[Debate End]"])
    terms = torch.zeros(len(answer), dtype=torch.float64)
    for k, teacher in enumerate(teachers):
        question = f"S {messages[-1]['content']} | {'AB'[k]} | {transcript}"
        chat = [*messages[:-1], {"role": "user", "content": question}]
        text = chatml(chat) + "<|im_start|>assistant\n" if k == 0 else brackets(chat) + "[answer]"
        with torch.no_grad():
            q = logprobs(teacher, [*encode(tokenizer, text), *answer], len(answer), len(tokenizer))
        terms = terms + math.exp(sure[k] / 0.4) / total * divergence(kind, p, q, 0.3)
    return terms


class Troubled(Countdown):
    """Three turns; the second fails."""

    def step(self, message: Message) -> Step:
        answer = super().step(message)
        return dataclasses.replace(answer, info={**answer.info, "failure": "execution" if self.left == 1 else ""})


WORDS = ("SKIP", "WEAK", "STRONG", "SKIP or WEAK")


@pytest.mark.parametrize("kl_mode", ["full_vocab", "sampled"])
def test_sage_opd(models: dict[str, str], tokenizer: Any, tmp_path: Path, kl_mode: str) -> None:
    """Sampled episodes; student and teacher in templates of their own; turns judged, failed and cut off."""
    config = make_config(
        models, "", tmp_path, method="sage_opd", num_generations=2, environment={"name": HOUSE}, seed=1,
        chat_template=THINKING, chat_template_kwargs={"enable_thinking": False},
        sage={"judge_prompt": "{llm_text}", "judge_max_tokens": 8, "kl_mode": kl_mode},
        teachers=[{"model": models["big"], "chat_template": BRACKETS}],
    )  # fmt: skip
    engine = make_engine(config)
    assert engine.episodes is not None
    engine.episodes.close()
    engine.episodes.pool = LocalPool(Troubled, 3)
    engine.sampler.stop_ids = tuple(range(0, len(tokenizer), 4))

    async def judge(requests: Sequence[Request], params: SamplingParams) -> list[Completion]:
        said = [WORDS[sum(r.token_ids) % len(WORDS)] for r in requests]
        return [Completion(np.array([5]), np.zeros(1), "stop", text) for text in said]

    engine.teachers[0].generate = judge
    result, gradient = whole_step(engine, load_tasks(config.environment, "train").prompts[:8])
    assert len(result.samples) == 16

    student, teacher = plain_models(models, "student", "big")
    weighted, mass, seen = torch.zeros((), dtype=torch.float64), 0.0, set()
    for rollout in result.samples:
        ours, theirs = trajectory(tokenizer, rollout, student=True), trajectory(tokenizer, rollout, student=False)
        assert rollout.token_ids.tolist() == ours[0]
        turns = [turn for turn in rollout.turns if turn.role == "assistant"]
        for number, (turn, end, its_end) in enumerate(zip(turns, ours[1], theirs[1], strict=True)):
            count, text = len(turn.token_ids), turn.messages[0]["content"]
            question = encode(tokenizer, brackets([{"role": "user", "content": text}]) + "[answer]")
            i = (0.0, 0.5, 1.0, 1.0)[sum(question) % len(WORDS)]
            failed = "failed" if number == 1 else "cut" if turn.token_ids[-1] not in engine.sampler.stop_ids else ""
            failed = failed or ("" if text.strip() else "empty")
            seen.add(failed or i)
            with torch.no_grad():
                q = logprobs(teacher, theirs[0][:its_end], count, len(tokenizer))
            s = (1.0 if failed else i) * q.exp().amax(-1).mean().item()
            p = logprobs(student, ours[0][:end], count, len(tokenizer))
            terms = divergence("reverse_kl", p, q)
            if kl_mode == "sampled":
                own, its = (x[range(count), turn.token_ids] for x in (p, q))
                terms = -(its - own.detach()) * own
            weighted = weighted + s * terms.sum()
            mass += s * count
    loss = weighted / mass
    loss.backward()
    assert seen >= {0.0, 0.5, 1.0, "failed", "cut"}
    assert result.metrics["loss"] == pytest.approx(loss.item(), rel=1e-6)
    assert_same_gradients(gradient, {n: p.grad.float() for n, p in student.named_parameters()}, rtol=1e-5)


def trajectory(tokenizer: Any, rollout: Sample, *, student: bool) -> tuple[list[int], list[int]]:
    """What a model reads of an episode, sampled ids kept, and where each of the student's turns ends in it."""
    render, opening = brackets, "[answer]"
    if student:
        render, opening = chatml, NO_THOUGHT
    ids, ends = encode(tokenizer, render([dict(m) for m in rollout.prompt.messages]) + opening), []
    for turn in rollout.turns[1:]:
        if turn.role == "assistant":
            ids = ids + turn.token_ids.tolist()
            ends.append(len(ids))
            continue
        closing = "" if ids[-1] == tokenizer.eos_token_id else "<|im_end|>"
        answer = render([dict(m) for m in turn.messages])
        ids = ids + encode(tokenizer, closing + ("\n" if student else "") + answer + opening)
    return ids, ends


def encode(tokenizer: Any, text: str) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False)


def chatml(messages: Sequence[dict[str, str]]) -> str:
    return "".join(f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in messages)


def brackets(messages: Sequence[dict[str, str]]) -> str:
    return "".join(f"[{m['role']}] {m['content']}<|im_end|>" for m in messages)


def give_confidences(teacher: Any) -> None:
    """What a teacher really writes between two tags; in the second round "small" gives the last prompt none."""
    plain, calls = teacher.generate, []

    async def generate(requests: Sequence[Request], params: SamplingParams) -> list[Completion]:
        calls.append(requests)
        answers = await plain(requests, params)
        tags = [f"<<CONFIDENCE={(r.seed + 7 * len(calls)) % 101}>>" for r in requests]
        if teacher.name == "small" and len(calls) == 2:
            tags[-1] = ""
        texts = [f"<<CONFIDENCE=50>> {a.text} {tag}" if tag else a.text for a, tag in zip(answers, tags, strict=True)]
        return [dataclasses.replace(a, text=text) for a, text in zip(answers, texts, strict=True)]

    teacher.generate = generate
