"""Weight updates and faults of the vLLM sampler, with a real engine process (``-m vllm``)."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM
from vllm_helpers import after, alive, open_sampler, requests, same, save_model, train, worst_gap

from opdengine.config.train import LoRAConfig
from opdengine.models.lora import add_adapter, base_of
from opdengine.models.policy import policy
from opdengine.rollout.vllm.engine import EngineDiedError, EngineError
from opdengine.rollout.vllm.opening import open_child
from opdengine.rollout.vllm.sampler import VLLMSampler
from opdengine.types import SamplingParams

pytestmark = pytest.mark.vllm

LONGER_THAN_A_CACHE_BLOCK = 280


# --- the policy ------------------------------------------------------------------------------


def test_untied_model_updates_and_closing_leaves_nothing(tmp_path: Path) -> None:
    path = save_model(tmp_path / "untied", tied=False)
    old = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    prompts, params = requests(4, LONGER_THAN_A_CACHE_BLOCK), SamplingParams(max_tokens=24, seed=1)
    sampler = open_sampler(path)
    before = set(sampler._folders)
    for version in (1, 2):
        train(model, version)
        sampler.load_policy(version, model.state_dict().items())
        results = sampler.generate(prompts, params)
        assert worst_gap(model, prompts, results) < 1e-4
        assert worst_gap(old, prompts, results) > 0.1
    assert sum(f.suffix == ".safetensors" for d in before for f in Path(d).iterdir()) == 1
    sampler.sleep()
    sampler._engine.wake()
    pid = sampler._engine.pid
    sampler.close()
    sampler.close()
    assert not alive(pid)
    assert not any(Path(folder).exists() for folder in before)
    with pytest.raises(EngineError, match="closed"):
        sampler.generate(prompts, params)


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral"])
def test_mixture_of_experts_updates(tmp_path: Path, family: str) -> None:
    """Full weights, then an adapter on the experts of the result."""
    path = save_model(tmp_path, tied=False, family=family)
    old, model = (AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32) for _ in range(2))
    prompts, params = requests(4, LONGER_THAN_A_CACHE_BLOCK), SamplingParams(max_tokens=16, seed=1)
    with open_sampler(path) as sampler:
        assert worst_gap(old, prompts, sampler.generate(prompts, params)) < 1e-4
        for version in (1, 2, 3, 4):
            if version == 3:
                model = add_adapter(model, LoRAConfig(r=4))
            train(model, version)
            sampler.load_policy(version, *policy(model))
            results = sampler.generate(prompts, params)
            assert worst_gap(base_of(model), prompts, results) < 1e-4
            assert worst_gap(old, prompts, results) > 0.1
            old = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
            base, low_rank = policy(model)
            old.load_state_dict(
                {n: w + low_rank[n][0] @ low_rank[n][1] if low_rank and n in low_rank else w for n, w in base}
            )


def test_refused_policy_leaves_the_previous_one(colocated: VLLMSampler, model: Any) -> None:
    good = dict(model.state_dict())
    name = "model.layers.1.self_attn.q_proj.weight"
    partial = {k: v for k, v in good.items() if k != name}
    cases = [
        (partial.items(), "lacks 1 of"),
        ([*good.items(), ("module.lm_head.weight", good["lm_head.weight"])], "no weight 'module"),
        ({**good, name: good[name][:-1]}.items(), "has shape"),
    ]
    pid = colocated._engine.pid
    for weights, message in cases:
        with pytest.raises(ValueError, match=message):
            colocated.load_policy(9, weights)
    assert colocated.policy_version == 0
    assert colocated._engine.pid == pid
    results = colocated.generate(requests(), SamplingParams(max_tokens=8))
    assert worst_gap(model, requests(), results) < 1e-4


def test_a_waking_engine_finds_the_memory_that_the_trainer_has_freed(
    colocated: VLLMSampler, model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    log: list[str] = []
    call = colocated._engine.call

    def noted(operation: str, *arguments: Any) -> Any:
        log.append(operation)
        return call(operation, *arguments)

    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: log.append("empty"))
    monkeypatch.setattr(colocated._engine, "call", noted)
    few = SamplingParams(max_tokens=2)
    colocated.generate(requests(), few)
    for _ in range(2):
        colocated._engine._asleep = True  # on a CPU nothing sleeps
        colocated.load_policy(0, model.state_dict().items())
        colocated.generate(requests(), few)
    assert log == ["generate", *["empty", "load", "empty", "wake", "generate"] * 2]


# --- faults ----------------------------------------------------------------------------------


LONG = SamplingParams(max_tokens=100, n=64, seed=4)


def test_killed_engine_is_replaced_with_the_same_policy(colocated: VLLMSampler, model: Any) -> None:
    train(model)
    colocated.load_policy(1, model.state_dict().items())
    expected = colocated.generate(requests(), LONG)
    pid, restarts = colocated._engine.pid, colocated.restarts
    assert pid is not None
    after(0.3, lambda: os.kill(pid, signal.SIGKILL))
    results = colocated.generate(requests(), LONG)
    assert (colocated.restarts, colocated.policy_version) == (restarts + 1, 1)
    assert colocated._engine.pid != pid
    assert same(results, expected)
    assert worst_gap(model, requests(), [row[:2] for row in results]) < 1e-4


def test_engine_that_dies_twice_in_a_call_is_an_error(colocated: VLLMSampler, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def die(operation: str, arguments: Any) -> None:
        asked.append(operation)
        raise EngineDiedError("killed")

    monkeypatch.setattr(colocated._engine, "call", die)
    with pytest.raises(EngineDiedError, match="killed"):
        colocated.generate(requests(), SamplingParams(max_tokens=4))
    assert asked == ["generate", "generate"]


def test_stale_policy_is_detected_and_replaced(colocated: VLLMSampler, model: Any) -> None:
    train(model)
    colocated.load_policy(1, model.state_dict().items())
    restarts = colocated.restarts
    colocated._engine.load(None, "other")
    colocated._engine._held = colocated._stamp  # the first answer says that it is another one
    results = colocated.generate(requests(), SamplingParams(max_tokens=4))
    assert worst_gap(model, requests(), results) < 1e-4
    assert colocated.restarts == restarts + 1


def test_interrupted_call_leaves_no_request_behind(colocated: VLLMSampler) -> None:
    few = SamplingParams(max_tokens=8, n=2)
    expected = colocated.generate(requests(), few)
    pid, restarts = colocated._engine.pid, colocated.restarts
    after(0.5, lambda: os.kill(os.getpid(), signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        colocated.generate(requests(8, 4), LONG)
    begin = time.monotonic()
    assert same(colocated.generate(requests(), few), expected)
    assert time.monotonic() - begin < 5
    assert (colocated._engine.pid, colocated.restarts) == (pid, restarts)


def test_silent_engine_is_stopped(colocated: VLLMSampler) -> None:
    pid = colocated._engine.pid
    assert pid is not None
    os.kill(pid, signal.SIGSTOP)
    colocated._engine.response_timeout, usual = 1.0, colocated._engine.response_timeout
    try:
        with pytest.raises(EngineError, match="no answer to 'generate'"):
            colocated.generate(requests(), SamplingParams(max_tokens=4))
    finally:
        colocated._engine.response_timeout = usual
    assert not alive(pid)


@pytest.mark.parametrize("work", ["sampler.generate(prompts, SamplingParams(max_tokens=120, n=8))", "time.sleep(60)"])
def test_engine_leaves_with_its_parent(path: str, work: str) -> None:
    """Whatever the parent was doing; the engine sees its end of the pipe close before the parent is gone."""
    script = textwrap.dedent(f"""
        import time
        from transformers import AutoTokenizer
        from opdengine.rollout.vllm.opening import open_child
        from opdengine.types import Request, SamplingParams
        tokenizer = AutoTokenizer.from_pretrained({path!r})
        sampler = open_child({path!r}, tokenizer, dtype="float32", kv_cache_memory_bytes=64 << 20)
        print(sampler._engine.pid, *sampler._folders, flush=True)
        prompts = [Request(str(i), (1, 2, 3)) for i in range(500)]
        {work}
    """)
    root = str(Path(__file__).resolve().parents[2])
    with subprocess.Popen(
        [sys.executable, "-c", script],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": root},
    ) as parent:
        assert parent.stdout is not None
        pid, *folders = parent.stdout.readline().split()
        time.sleep(0.5)
        parent.kill()

    def left() -> list[str]:
        return [folder for folder in folders if Path(folder).exists()] + ([pid] if alive(int(pid)) else [])

    deadline = time.monotonic() + 10
    while left() and time.monotonic() < deadline:  # the guard removes the folders once the engine is gone
        time.sleep(0.1)
    assert folders and not left()


def test_engine_that_cannot_start_says_why(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match=r"(?s)failed in 'start'.*config\.json"):
        open_child(str(tmp_path), None)
