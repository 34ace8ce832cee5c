"""A real vLLM server as a teacher (``-m vllm``)."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from engine_helpers import make_config, make_engine
from teacher_helpers import context

from opdengine.config.train import TeacherConfig
from opdengine.data.prompts import load_prompts
from opdengine.errors import ProbeError
from opdengine.teachers.server import ServedTeacher
from opdengine.types import Completion, Failure, Request, SamplingParams, TopK

pytestmark = pytest.mark.vllm

K = 32
IDS = [260, 40, 41, 42, 43, 44, 45, 200, 7, 99]


@pytest.fixture(scope="module")
def folder(tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A random Qwen3 with heads of 32, the least that vLLM takes on a CPU."""
    from transformers import AutoModelForCausalLM, Qwen3Config

    path = tmp_path_factory.mktemp("served")
    torch.manual_seed(5)
    config = Qwen3Config(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=2, head_dim=32,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=1024, initializer_range=0.15,
        tie_word_embeddings=True, eos_token_id=tokenizer.eos_token_id, bos_token_id=None,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).float().save_pretrained(path)
    tokenizer.save_pretrained(path)
    return str(path)


@contextlib.contextmanager
def serve(folder: str, log: Path, window: int = 512, cache: int = 64 << 20) -> Iterator[str]:
    """A model in float32, with log-probs of at most K tokens."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    on_cpu = {} if torch.cuda.is_available() else {
        "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "TORCHDYNAMO_DISABLE": "1",
    }  # fmt: skip
    # `vllm serve` asks for a distribution named "vllm", which the CPU build is not.
    command = [
        sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", folder,
        "--served-model-name", "tiny", "--host", "127.0.0.1", "--port", str(port), "--dtype", "float32",
        "--max-model-len", str(window), "--max-logprobs", str(K), "--enforce-eager",
        "--kv-cache-memory-bytes", str(cache),
    ]  # fmt: skip
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", **on_cpu}
    with log.open("w") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environment)
    try:
        deadline = time.monotonic() + 240
        while True:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5)
                break
            except OSError:
                assert process.poll() is None and time.monotonic() < deadline, log.read_text()[-3000:]
                time.sleep(0.5)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        process.terminate()
        process.wait(60)


@pytest.fixture(scope="module")
def url(folder: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with serve(folder, tmp_path_factory.mktemp("vllm") / "server.log") as found:
        yield found


def teacher_at(url: str, folder: str, tokenizer: Any, **settings: Any) -> ServedTeacher:
    config = TeacherConfig("tiny", name="served", base_url=url, tokenizer=folder, **{"score_top_k": K, **settings})
    return ServedTeacher(config, tokenizer, len(tokenizer))


def reference(folder: str, ids: list[int]) -> torch.Tensor:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0].double().log_softmax(-1)


def test_the_probe_passes_and_names_what_is_missing(url: str, folder: str, tokenizer: Any) -> None:
    teacher = teacher_at(url, folder, tokenizer)
    asyncio.run(teacher.probe(judges=True))
    assert teacher.window == 511
    with pytest.raises(ProbeError, match=rf"--max-logprobs {K + 1}, or lower score_top_k"):
        asyncio.run(teacher_at(url, folder, tokenizer, score_top_k=K + 1).probe(judges=True))


def test_log_probs_are_those_of_the_model(url: str, folder: str, tokenizer: Any) -> None:
    """Of the actual token always, and of the likeliest others."""
    teacher = teacher_at(url, folder, tokenizer)
    contexts = [context(IDS, 6), context(IDS[:7], 3), context([*IDS, *IDS], 15)]
    for asked, found in zip(contexts, asyncio.run(teacher.score(contexts)), strict=True):
        assert isinstance(found, TopK)
        full = reference(folder, asked.token_ids.tolist())[asked.target_positions - 1]
        assert found.ids[:, 0].tolist() == asked.token_ids[asked.target_positions].tolist()
        exact = full.gather(1, torch.from_numpy(found.ids)).numpy()
        np.testing.assert_allclose(found.logprobs, exact, atol=1e-4)
        for row, ids in zip(full.numpy(), found.ids, strict=True):
            others = [i for i in np.argsort(-row).tolist() if i != ids[0]]
            assert len(ids) == K and ids[1:].tolist() == others[: K - 1]


def test_text_ids_seeds_and_refusals(url: str, folder: str, tokenizer: Any) -> None:
    teacher = teacher_at(url, folder, tokenizer)
    params = SamplingParams(max_tokens=8, temperature=0.9, top_k=20, repetition_penalty=1.1, seed=5)
    requests = [Request(f"r{i}", tuple(IDS), seed=i) for i in range(6)]
    results, again = (asyncio.run(teacher.generate(requests, params)) for _ in range(2))
    for result in results:
        assert isinstance(result, Completion) and result.stop_reason in ("stop", "length")
        assert 1 <= len(result.token_ids) <= 8 and result.text
    assert [r.token_ids.tolist() for r in again] == [r.token_ids.tolist() for r in results]  # type: ignore[union-attr]
    assert len({tuple(r.token_ids) for r in results if isinstance(r, Completion)}) > 1
    teacher.endpoint.stop_on_failure = False
    (refused,) = asyncio.run(teacher.score([context(IDS * 60, 3)]))
    assert isinstance(refused, Failure) and refused.reason == "http_400"


def test_a_step_of_mad_opd_with_a_served_and_a_local_teacher(
    url: str, folder: str, models: dict[str, str], prompt_file: str, tmp_path: Path
) -> None:
    teachers = [
        {"name": "served", "model": "tiny", "base_url": url, "tokenizer": folder, "score_top_k": K},
        {"name": "local", "model": folder},
    ]
    config = make_config(models, prompt_file, tmp_path, method="mad_opd", teachers=teachers)
    engine = make_engine(config)
    prompts = load_prompts([prompt_file]).prompts[:4]
    before = {n: p.detach().clone() for n, p in engine.student.model.named_parameters()}
    metrics = asyncio.run(engine.step(prompts)).metrics
    assert metrics["completions/kept"] == 4.0 and metrics["policy_version"] == 1.0 and metrics["loss"] > 0
    # Both hold the same weights, but read as different experts.
    assert metrics["teacher_kl/served"] > 0 and metrics["teacher_kl/local"] > 0
    assert not any(key.startswith("teacher_failures") for key in metrics)
    assert any(not torch.equal(p, before[n]) for n, p in engine.student.model.named_parameters())


def test_a_real_model_debates_behind_a_server_while_vllm_samples_the_student(smollm2: str, tmp_path: Path) -> None:
    """The command line, end to end: the second step samples from what the first one trained."""
    data = tmp_path / "questions.jsonl"
    data.write_text("".join(json.dumps({"prompt": f"Name {n} fruits."}) + "\n" for n in ("three", "two")))
    settings = {
        "model": smollm2,
        "method": "mad_opd",
        "debate": {"rounds": 2, "max_tokens": 32},
        "train_data": [str(data)],
        "output_dir": str(tmp_path / "run"),
        "dtype": "float32",
        "use_vllm": True,
        "per_device_train_batch_size": 2,
        "max_completion_length": 16,
        "max_steps": 2,
        "learning_rate": 1e-5,
    }
    with serve(smollm2, tmp_path / "server.log", 2048, 256 << 20) as address:
        served = {"name": "served", "model": "tiny", "base_url": address, "tokenizer": smollm2, "score_top_k": K}
        settings["teachers"] = [served, {"name": "local", "model": smollm2}]
        file = tmp_path / "run.yaml"
        file.write_text(yaml.safe_dump(settings))
        done = subprocess.run(
            [sys.executable, "-m", "opdengine", "train", "--config", str(file)],
            capture_output=True, text=True, timeout=900, check=False,
        )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    steps = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    steps = [row for row in steps if "loss" in row]
    assert [row["policy_version"] for row in steps] == [1, 2]
    for row in steps:
        assert row["sampling/logprob_difference"] < 2e-3
        assert row["teacher_kl/served"] > 0 and row["teacher_kl/local"] > 0
        assert not any(key.startswith("teacher_failures") for key in row)
