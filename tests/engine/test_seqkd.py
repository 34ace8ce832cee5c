"""MT-SeqKD: supervised training on text that the teachers wrote."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from engine_helpers import (
    ScriptedTeacher,
    assert_same_gradients,
    loss_and_gradient,
    make_config,
    make_engine,
    make_samples,
)
from transformers import AutoModelForCausalLM

from opdengine.data.prompts import load_prompts
from opdengine.methods.mt_seqkd import MTSeqKD, author
from opdengine.models.chat import load_tokenizer
from opdengine.models.reply import encode_prompt
from opdengine.types import Prompt, Request


@pytest.fixture
def prompts(prompt_file: str) -> Sequence[Prompt]:
    return load_prompts([prompt_file]).prompts


def test_the_student_is_trained_on_what_the_teachers_wrote(
    models: dict[str, str], prompt_file: str, prompts: Sequence[Prompt], tmp_path: Path
) -> None:
    engine = make_engine(make_config(models, prompt_file, tmp_path, method="mt_seqkd"))
    engine.sampler.generate = None  # the student is not sampled
    said: dict[str, tuple[str, list[int]]] = {}
    for teacher in engine.teachers:
        plain = teacher.generate

        async def generate(requests, params, plain=plain, name=teacher.name):
            answers = await plain(requests, params)
            said.update({r.id: (name, a.token_ids.tolist()) for r, a in zip(requests, answers, strict=True)})
            return answers

        teacher.generate = generate
    result = asyncio.run(engine.step(prompts))
    assert {name for name, _ in said.values()} == {"big", "small"}
    assert len(result.samples) == len(prompts)
    for rollout in result.samples:
        assert rollout.target_ids.tolist() == said[rollout.prompt.id][1]
        assert rollout.turns[0].token_ids.tolist() == engine.encode(rollout.prompt)
        assert rollout.sampler_logprob is None
    assert "sampling/logprob_difference" not in result.metrics
    # An answer is written once: the second epoch asks nobody.
    for teacher in engine.teachers:
        teacher.generate = None
    again = asyncio.run(engine.step(prompts[::-1]))
    assert [r.target_ids.tolist() for r in again.samples[::-1]] == [r.target_ids.tolist() for r in result.samples]


def test_the_loss_is_hugging_faces_cross_entropy(
    models: dict[str, str], prompt_file: str, prompts: Sequence[Prompt], tmp_path: Path
) -> None:
    engine = make_engine(make_config(models, prompt_file, tmp_path, method="mt_seqkd"))
    samples = make_samples(engine, prompts[:4])
    loss, gradient = loss_and_gradient(engine, samples)
    model = AutoModelForCausalLM.from_pretrained(models["student"])
    count = sum(len(i.target_ids) for i in samples)
    total = 0.0
    for sample in samples:
        ids = torch.from_numpy(sample.token_ids)[None]
        labels = ids.clone()
        labels[0, : sample.target_positions[0]] = -100
        part = model(input_ids=ids, labels=labels).loss * len(sample.target_ids) / count
        part.backward()
        total += part.item()
    assert loss == pytest.approx(total, rel=1e-5)
    assert_same_gradients(gradient, {n: p.grad for n, p in model.named_parameters()})


def shares(weights: Sequence[float], seed: int = 0, count: int = 4000) -> Counter[str]:
    teachers = [ScriptedTeacher(f"t{k}", []) for k in range(len(weights))]
    for teacher, weight in zip(teachers, weights, strict=True):
        teacher.weight = weight
    return Counter(author(Prompt(f"p{i}", ()), teachers, seed).name for i in range(count))


def test_the_share_of_a_teacher_follows_its_weight() -> None:
    found = shares([7.0, 3.0])
    assert found["t0"] / 4000 == pytest.approx(0.7, abs=0.03)  # four standard errors
    found = shares([1.0, 2.0, 5.0])
    for k, share in enumerate((0.125, 0.25, 0.625)):
        assert found[f"t{k}"] / 4000 == pytest.approx(share, abs=0.032)


def test_authors_are_fixed_by_the_seed() -> None:
    teachers = [ScriptedTeacher("a", []), ScriptedTeacher("b", [])]

    def authors(seed: int) -> list[str]:
        return [author(Prompt(f"p{i}", ()), teachers, seed).name for i in range(50)]

    assert authors(1) == authors(1) != authors(2)


def test_answers_come_from_the_routed_teacher(
    models: dict[str, str], prompt_file: str, prompts: Sequence[Prompt], tmp_path: Path
) -> None:
    teachers = [{"model": models["big"], "key": ["code"]}, {"model": models["small"], "key": ["agentic"]}]
    engine = make_engine(make_config(models, prompt_file, tmp_path, method="mt_seqkd", teachers=teachers))
    metrics = asyncio.run(engine.step(prompts)).metrics
    assert metrics["seqkd/written/big"] == metrics["seqkd/written/small"] == 6


def test_prompts_beyond_a_teachers_window_are_dropped_and_counted(
    models: dict[str, str], prompt_file: str, prompts: Sequence[Prompt], tmp_path: Path
) -> None:
    engine = make_engine(make_config(models, prompt_file, tmp_path, method="mt_seqkd"))
    small = engine.teachers[1]
    written = asyncio.run(engine.rollout(prompts, 0)).metrics["seqkd/written/small"]
    assert written > 0
    small.backbone.model.config.max_position_embeddings = 20
    engine.method._answers.clear()
    result = asyncio.run(engine.step(prompts))
    assert result.metrics["dropped/teacher_window/small"] == written
    assert result.metrics["completions/kept"] == len(prompts) - written


def test_clipped_answers_are_reported(
    models: dict[str, str], prompt_file: str, prompts: Sequence[Prompt], tmp_path: Path
) -> None:
    engine = make_engine(make_config(models, prompt_file, tmp_path, method="mt_seqkd", max_completion_length=2))
    result = asyncio.run(engine.step(prompts))
    stops = engine.sampler.stop_ids
    clipped = np.mean([len(r.target_ids) == 2 and r.target_ids[-1] not in stops for r in result.samples])
    assert result.metrics["completions/clipped_ratio"] == pytest.approx(clipped)
    assert clipped > 0


def test_requests_to_a_teacher_carry_its_own_template(models: dict[str, str], prompt_file: str, tmp_path: Path) -> None:
    teacher = ScriptedTeacher("a", lambda call, request: "answer")
    method = MTSeqKD(make_config(models, prompt_file, tmp_path, method="mt_seqkd"))
    method.teachers = [teacher]
    messages = ({"role": "system", "content": "s"}, {"role": "user", "content": "u"})
    written = asyncio.run(method.write([Prompt("p", messages, tools=({"name": "f"},))], lambda p: [1, 2]))
    assert teacher.asked(0) == "<system>s<user>u<tool {'name': 'f'}><assistant>"
    assert isinstance(teacher.calls[0][0], Request)
    assert written.samples[0].token_ids.tolist() == [1, 2, 1]
    assert written.samples[0].text == "answer"


def test_the_author_reads_what_is_shown_to_teachers(models: dict[str, str], prompt_file: str, tmp_path: Path) -> None:
    """The student's prompt stays; the room that is checked is that of what the author reads."""
    template = {"teacher_prompt_template": "{prompt} ({answer})"}
    method = MTSeqKD(make_config(models, prompt_file, tmp_path, method="mt_seqkd", **template))
    teacher = ScriptedTeacher("a", lambda call, request: "answer")
    method.teachers = [teacher]
    prompt = Prompt("p", ({"role": "user", "content": "u"},), answer="42")
    asyncio.run(method.write([prompt], lambda p: [len(p.messages[0]["content"])]))
    assert teacher.asked(0) == "<user>u (42)<assistant>"
    assert method.room(prompt)[0].tokens == len("<user>u (42)<assistant>") + method.params.max_tokens


def test_an_answer_that_was_cut_off_in_its_thought_is_learned_as_far_as_it_goes(
    models: dict[str, str], prompt_file: str, tmp_path: Path
) -> None:
    """Of a teacher with another tokenizer, where the template opens a thought; one that ended has the student's end."""
    template = (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
    )
    tokenizer = load_tokenizer(models["student"], chat_template=template)

    class Stops(ScriptedTeacher):
        async def generate(self, requests: Any, params: Any) -> Any:
            answers = await super().generate(requests, params)
            return [replace(a, stop_reason=r.id) for a, r in zip(answers, requests, strict=True)]

    teacher = Stops("a", lambda call, request: "first I add")
    teacher.alignment = object()
    method = MTSeqKD(make_config(models, prompt_file, tmp_path, method="mt_seqkd"))
    method.teachers = [teacher]
    prompts = [Prompt(name, ({"role": "user", "content": "u"},)) for name in ("length", "stop")]
    samples = asyncio.run(method.write(prompts, partial(encode_prompt, tokenizer, {}))).samples
    said = [tokenizer.decode(sample.target_ids) for sample in samples]
    assert said == ["first I add", "first I add<|im_end|>"]
