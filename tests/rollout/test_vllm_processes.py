"""Two trainer processes on one real vLLM server, and on one engine over both (``-m vllm``).

Everything is float32, and weights after a step differ by rounding only, so all must sample the same tokens.
"""

from __future__ import annotations

import json
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
import yaml
from ranks_helpers import ROOT, torchrun
from server_helpers import ThreadRanks, on_ranks
from transformers import AutoModelForCausalLM
from vllm_helpers import VLLMServer, alive, members_of, requests, same, save_model, train, worst_gap

from opdengine.distributed import Ranks
from opdengine.rollout.vllm.engine import EngineError
from opdengine.rollout.vllm.http_client import JSONClient
from opdengine.rollout.vllm.opening import open_server, open_shared
from opdengine.rollout.vllm.sampler import VLLMSampler
from opdengine.training.writer import read_metrics
from opdengine.types import SamplingParams

pytestmark = pytest.mark.vllm

STEPS = 3
TEMPLATE = "{% for m in messages %}{{ m['role'][0] }}:{{ m['content'] }}\n{% endfor %}a:"
ON_CPU = {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_CPU_KVCACHE_SPACE": "1"}


@pytest.fixture(scope="module")
def settings(path: str, prompt_file: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    teacher = save_model(tmp_path_factory.mktemp("teacher"), tied=False)
    return {
        "model": path,
        "teachers": [{"model": teacher, "chat_template": TEMPLATE}],
        "train_data": [prompt_file],
        "chat_template": TEMPLATE,
        "method": "opd",
        "per_device_train_batch_size": 4,
        "num_generations": 2,
        "max_completion_length": 24,
        "max_prompt_length": 64,
        "max_steps": STEPS,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "warmup_ratio": 0.0,
        "adam_epsilon": 1e-2,
        "use_vllm": True,
        "max_logprob_difference": 1e-3,
    }


def run(processes: int, folder: Path, data: dict[str, Any], program: tuple[str, ...] = (), **environment: str) -> str:
    """Train; returns what was written to standard error."""
    file = folder.with_suffix(".yaml")
    share = data["per_device_train_batch_size"] // processes
    file.write_text(yaml.safe_dump({**data, "output_dir": str(folder), "per_device_train_batch_size": share}))
    command = program or ("-m", "opdengine", "train")
    done = torchrun(processes, *command, "--config", str(file), **environment)
    assert done.returncode == 0, done.stderr[-5000:]
    return done.stderr


def sampled(folder: Path) -> list[list[dict[str, Any]]]:
    files = [folder / "rollouts" / f"step_{step}.jsonl" for step in range(1, STEPS + 1)]
    return [[json.loads(line) for line in file.read_text().splitlines()] for file in files]


def differences(folder: Path) -> list[float]:
    return [row["sampling/logprob_difference"] for row in read_metrics(folder / "metrics.jsonl")]


@pytest.fixture(scope="module")
def alone(server: VLLMServer, settings: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one process."""
    folder = tmp_path_factory.mktemp("runs") / "alone"
    run(1, folder, {**settings, "vllm_mode": "server", "vllm_server_base_url": server.url})
    assert max(differences(folder)) < 1e-4
    texts = [{row["text"] for row in step} for step in sampled(folder)]
    assert all(len(step) == 8 for step in texts) and not texts[0] & texts[1]
    return folder


def test_two_processes_on_one_server_sample_what_one_does(
    server: VLLMServer, settings: dict[str, Any], alone: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "two"
    run(2, folder, {**settings, "vllm_mode": "server", "vllm_server_base_url": server.url})
    assert sampled(folder) == sampled(alone)
    assert max(differences(folder)) < 1e-4


def test_a_server_that_is_killed_and_started_again_between_steps(
    settings: dict[str, Any], path: str, alone: Path, tmp_path: Path
) -> None:
    log = tmp_path / "server.log"
    server = VLLMServer(path, log)
    pid = tmp_path / "server.log.pid"
    pid.write_text(str(server.process.pid))
    try:
        server.wait()
        messages = run(
            2,
            tmp_path / "restarted",
            {**settings, "vllm_mode": "server", "vllm_server_base_url": server.url},
            (str(Path(__file__).with_name("restart_worker.py")),),
            RESTART_AT="2",
            RESTART=f"{path} {log} {server.port}",
        )
    finally:
        VLLMServer.kill(int(pid.read_text()))
        server.stop()
    assert int(pid.read_text()) != server.process.pid
    assert "holds the weights 'default' instead of version 1: giving them back" in messages
    assert sampled(tmp_path / "restarted") == sampled(alone)
    assert max(differences(tmp_path / "restarted")) < 1e-4


def test_two_processes_share_one_engine_over_both(settings: dict[str, Any], alone: Path, tmp_path: Path) -> None:
    folder = tmp_path / "group"
    run(2, folder, {**settings, "vllm_mode": "colocate", "vllm_tensor_parallel_size": 2}, **ON_CPU)
    assert sampled(folder) == sampled(alone)
    assert max(differences(folder)) < 1e-4


def test_weights_are_given_back_while_another_rank_samples(server: VLLMServer, byte_tokenizer: Any, model: Any) -> None:
    """The server forgets the policy under the first rank's requests, and the second one gives it back."""
    samplers: dict[int, VLLMSampler] = {}
    long, short = SamplingParams(max_tokens=200, n=32, seed=4), SamplingParams(max_tokens=8, seed=1)
    train(model)

    def forget() -> None:
        while not samplers[0]._engine._client._open:
            time.sleep(0.01)
        client = JSONClient(server.url)
        client.call("/collective_rpc", {"method": "load_policy_file"}, 60)
        client.call("/update_weight_version", {"new_version": "default"})

    def work(ranks: ThreadRanks) -> tuple[float, bool, int]:
        with open_server(server.url, byte_tokenizer, dtype="float32", ranks=ranks) as sampler:
            samplers[ranks.rank] = sampler
            sampler.load_policy(1, model.state_dict().items())
            expected = sampler.generate(requests(8), long) if ranks.is_first else []
            ranks.raise_on_all_ranks()
            if ranks.is_first:
                found = sampler.generate(requests(8), long)
                return worst_gap(model, requests(8), [row[:1] for row in found]), same(found, expected), 0
            forget()
            found = sampler.generate(requests(), short)
            return worst_gap(model, requests(), found), True, sampler.restarts

    first, second = on_ranks(2, work)
    assert first[0] < 1e-4 and first[1]
    assert second[0] < 1e-4 and second[2] == 1


# --- the server of a group -------------------------------------------------------------------


def test_a_group_engine_follows_the_trainer_and_leaves_nothing(
    path: str, byte_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in ON_CPU.items():
        monkeypatch.setenv(name, value)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    params = SamplingParams(max_tokens=8, seed=1)
    sampler = open_shared(path, byte_tokenizer, ranks=Ranks(), size=1, dtype="float32", max_num_seqs=64)
    with sampler:
        assert sampler._engine.own is not None
        group = sampler._engine.own.process.pid
        socket_file = Path(sampler._engine.own.url.removeprefix("unix:"))
        assert socket_file.is_socket() and socket_file.parent.stat().st_mode & 0o077 == 0
        for version in (1, 2):
            sampler.load_policy(version, train(model, version).state_dict().items())
            assert worst_gap(model, requests(), sampler.generate(requests(), params)) < 1e-4
        members = members_of(group)
        os.kill(members[-1], signal.SIGKILL)
        with pytest.raises(EngineError, match=r"belongs to this run.*--resume_from_checkpoint latest"):
            sampler.generate(requests(8), SamplingParams(max_tokens=200, n=64, seed=4))
    assert len(members) > 1 and not any(map(alive, members))
    assert not socket_file.parent.exists()


def test_a_group_engine_leaves_with_its_parent(path: str) -> None:
    script = textwrap.dedent(f"""
        from transformers import AutoTokenizer
        from opdengine.distributed import Ranks
        from opdengine.rollout.vllm.opening import open_shared
        from opdengine.types import Request, SamplingParams
        tokenizer = AutoTokenizer.from_pretrained({path!r})
        sampler = open_shared({path!r}, tokenizer, ranks=Ranks(), size=1, dtype="float32", max_num_seqs=64)
        print(sampler._engine.own.process.pid, flush=True)
        prompts = [Request(str(i), (1, 2, 3)) for i in range(500)]
        sampler.generate(prompts, SamplingParams(max_tokens=120, n=8))
    """)
    places = f"{ROOT}{os.pathsep}{ROOT / 'kernels'}"
    with subprocess.Popen(
        [sys.executable, "-c", script],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, **ON_CPU, "PYTHONPATH": places},
    ) as parent:
        assert parent.stdout is not None
        members = members_of(int(parent.stdout.readline()))
        parent.kill()
    deadline = time.monotonic() + 30
    while any(map(alive, members)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert len(members) > 1 and not any(map(alive, members))
