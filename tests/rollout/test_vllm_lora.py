"""Adapters in vLLM: only their factors cross, and the engine's log-probs are the trainer's."""

from __future__ import annotations

import itertools
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM
from vllm_helpers import open_sampler, requests, same, train, worst_gap

from opdengine.config.train import LoRAConfig
from opdengine.models.lora import LowRank, add_adapter, base_of
from opdengine.models.policy import policy
from opdengine.rollout.vllm.policy_file import check_low_rank, pack_low_rank, read_policy, write_policy
from opdengine.rollout.vllm.sampler import VLLMSampler
from opdengine.types import SamplingParams

LONGER_THAN_A_CACHE_BLOCK = 280
SAMPLING = SamplingParams(max_tokens=24, seed=1)


@pytest.fixture
def student(model: Any) -> Any:
    return add_adapter(model, LoRAConfig(r=4, lora_alpha=8, target_modules=["q_proj", "o_proj", "down_proj"]))


def inodes(folders: list[str]) -> dict[int, int]:
    """Inode -> size of all weight files."""
    files = [file.stat() for folder in folders for file in Path(folder).glob("*.safetensors")]
    return {file.st_ino: file.st_size for file in files}


@pytest.mark.vllm
def test_every_update_of_an_adapter_is_exact(sampler: VLLMSampler, student: Any, path: str) -> None:
    """Of fused groups (q, k, v) only one member is adapted."""
    prompts = requests(4, LONGER_THAN_A_CACHE_BLOCK)
    base = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    before = base
    seen: list[dict[int, int]] = []
    for version in (1, 2, 3):
        train(student, version)
        sampler.load_policy(version, *policy(student))
        results = sampler.generate(prompts, SAMPLING)
        assert worst_gap(base_of(student), prompts, results) < 1e-4
        assert worst_gap(before, prompts, results) > 0.05
        before = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
        before.load_state_dict(whole(student))
        seen.append(inodes(sampler._folders))
    size = sum(p.numel() * 4 for p in student.parameters() if p.requires_grad)
    for last, now in itertools.pairwise(seen):
        (kept,), (added,) = set(last) & set(now), set(now) - set(last)
        assert now[added] < size + 4096 < now[kept]


def whole(student: Any) -> dict[str, torch.Tensor]:
    base, low_rank = policy(student)
    assert low_rank is not None
    return {n: w + low_rank[n][0] @ low_rank[n][1] if n in low_rank else w.clone() for n, w in base}


@pytest.mark.vllm
def test_an_adapter_may_follow_full_weights_and_the_other_way(sampler: VLLMSampler, student: Any, path: str) -> None:
    full = train(AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32), seed=5)
    train(student)
    for version, model in enumerate((full, student, full, student), start=1):
        sampler.load_policy(version, *policy(model))
        assert worst_gap(base_of(model), requests(), sampler.generate(requests(), SAMPLING)) < 1e-4


@pytest.mark.vllm
def test_a_killed_engine_gets_base_and_adapter_again(colocated: VLLMSampler, student: Any) -> None:
    train(student)
    colocated.load_policy(1, *policy(student))
    expected = colocated.generate(requests(), SAMPLING)
    restarts = colocated.restarts
    assert colocated._engine.pid is not None
    os.kill(colocated._engine.pid, signal.SIGKILL)
    assert same(colocated.generate(requests(), SAMPLING), expected)
    assert colocated.restarts == restarts + 1


@pytest.mark.vllm
def test_bfloat16_engine_stays_close(path: str, model: Any) -> None:
    """Base and adapter are added in float32 and rounded once."""
    student = train(add_adapter(model.bfloat16(), LoRAConfig(r=4, lora_alpha=8)))
    with open_sampler(path, dtype="bfloat16") as sampler:
        sampler.load_policy(1, *policy(student))
        results = sampler.generate(requests(), SAMPLING)
    merged = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    merged.load_state_dict(whole(student))
    plain = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    assert 3 * worst_gap(merged, requests(), results) < worst_gap(plain, requests(), results)


# --- without vLLM ----------------------------------------------------------------------------


def test_stored_factors_are_added_in_float32(tmp_path: Path) -> None:
    torch.manual_seed(0)
    weights = {"a": torch.randn(6, 4).bfloat16(), "experts": torch.randn(3, 5, 4), "c": torch.randn(2)}
    low_rank: LowRank = {
        "a": (torch.randn(6, 2) * 1e-4, torch.randn(2, 4)),
        "experts": (torch.randn(3, 5, 2), torch.randn(3, 2, 4)),
    }
    check_low_rank(low_rank, {name: tuple(tensor.shape) for name, tensor in weights.items()})
    base, factors = str(tmp_path / "base"), str(tmp_path / "factors")
    write_policy(weights, base)
    write_policy(pack_low_rank(low_rank), factors)
    read = dict(read_policy(base, {name: name for name in weights}, factors))
    assert torch.equal(read["c"], weights["c"])
    for name, (left, right) in low_rank.items():
        expected = weights[name].double() + left.double() @ right.double()
        torch.testing.assert_close(read[name].double(), expected, rtol=1e-6, atol=1e-6)
        assert read[name].dtype == torch.float32


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [("b", (3, 2), "no weight 'b'"), ("a", (3, 2), r"'a' has shape \(3, 2\), the engine's model \(3, 4\)")],
)
def test_factors_that_fit_no_weight_are_refused(name: str, shape: tuple[int, int], message: str) -> None:
    factors = {name: (torch.ones(shape[0], 1), torch.ones(1, shape[1]))}
    with pytest.raises(ValueError, match=message):
        check_low_rank(factors, {"a": (3, 4)})
