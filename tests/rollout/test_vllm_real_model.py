"""SmolLM2-135M in a real vLLM (``-m vllm``): its samples, updates and an adapter."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from vllm_helpers import same, train, worst_gap

from opdengine.config.train import LoRAConfig
from opdengine.models.lora import add_adapter, base_of
from opdengine.models.policy import policy
from opdengine.rollout.vllm.opening import open_child
from opdengine.rollout.vllm.sampler import VLLMSampler
from opdengine.types import Request, SamplingParams

pytestmark = pytest.mark.vllm

QUESTIONS = ("What is the capital of France?", "Name three fruits.", "How many legs does a spider have?")


@pytest.fixture
def student(smollm2: str) -> Any:
    return AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def asked(smollm2: str) -> list[Request]:
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    chats = [[{"role": "user", "content": question}] for question in QUESTIONS]
    prompts = [tokenizer.apply_chat_template(c, add_generation_prompt=True, return_dict=False) for c in chats]
    return [Request(str(i), tuple(ids), seed=i) for i, ids in enumerate(prompts)]


@pytest.fixture(scope="module")
def sampler(smollm2: str) -> Iterator[VLLMSampler]:
    options = {"dtype": "float32", "kv_cache_memory_bytes": 128 << 20, "max_num_seqs": 16, "max_model_len": 512}
    with open_child(smollm2, AutoTokenizer.from_pretrained(smollm2), **options) as opened:
        yield opened


def test_samples_are_sentences_of_the_models_own_distribution(
    sampler: VLLMSampler, smollm2: str, student: Any, asked: list[Request]
) -> None:
    greedy = sampler.generate(asked, SamplingParams(max_tokens=24, temperature=0.0))
    text = AutoTokenizer.from_pretrained(smollm2).decode(greedy[0][0].token_ids)
    assert "Paris" in text
    params = SamplingParams(max_tokens=24, n=2, seed=1)
    results = sampler.generate(asked, params)
    assert worst_gap(student, asked, results) < 2e-3
    assert same(sampler.generate(asked, params), results)


def test_updates_and_adapters_arrive(sampler: VLLMSampler, student: Any, asked: list[Request], smollm2: str) -> None:
    old = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32).eval()
    params = SamplingParams(max_tokens=16, seed=2)
    with torch.no_grad():
        for weight in student.parameters():
            weight.mul_(1.01)
    sampler.load_policy(1, *policy(student))
    results = sampler.generate(asked, params)
    assert worst_gap(student, asked, results) < 2e-3
    assert worst_gap(old, asked, results) > 0.02
    adapted = train(add_adapter(old, LoRAConfig(r=4)), 3)
    sampler.load_policy(2, *policy(adapted))
    results = sampler.generate(asked, params)
    assert worst_gap(base_of(adapted), asked, results) < 2e-3
    assert worst_gap(student, asked, results) > 0.02
