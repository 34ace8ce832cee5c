"""Several ranks on one vLLM server: who sends weights, what a server that was started again does, what is refused.

The server is a fake one; the ranks are threads, or processes that torchrun starts. test_vllm_server_ranks.py does the
same with a real one.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from ranks_helpers import each_to_its_end, torchrun
from safetensors.torch import load_file, save_file
from server_helpers import PARAMS, REQUESTS, SCRIPT, Server, ThreadRanks, ids, on_ranks, settings
from transformers import AutoModelForCausalLM

from opdengine.config.train import LoRAConfig
from opdengine.distributed import PeerError, Ranks
from opdengine.models.checkpoint import list_checkpoints
from opdengine.models.lora import add_adapter
from opdengine.models.policy import policy
from opdengine.rollout.vllm import opening, remote
from opdengine.rollout.vllm.engine import EngineDiedError, EngineError
from opdengine.rollout.vllm.extension import PolicyLoader
from opdengine.rollout.vllm.opening import open_server, open_shared
from opdengine.training.build_sampler import _gpus
from opdengine.training.writer import read_metrics


@pytest.fixture(autouse=True)
def _short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "PAUSE_SECONDS", 0.05)


@pytest.fixture
def student(models: dict[str, str]) -> Any:
    return AutoModelForCausalLM.from_pretrained(models["student"])


class Counted:
    """Weights that count how many of them were read."""

    def __init__(self, weights: Any) -> None:
        self.weights, self.read = list(weights), 0

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        for item in self.weights:
            self.read += 1
            yield item


def test_one_rank_sends_the_weights_and_all_check_the_same_stamp(server: Server, tokenizer: Any, student: Any) -> None:
    def work(ranks: ThreadRanks) -> tuple[Any, ...]:
        with open_server(server.url, tokenizer, ranks=ranks) as sampler:
            read = []
            for version in (0, 1):
                weights = Counted(student.state_dict().items())
                sampler.load_policy(version, weights)
                read.append(weights.read)
            sampled = []
            for _ in range(1 + 2 * ranks.rank):  # as often as each likes
                sampled += ids(sampler.generate(REQUESTS[ranks.rank :], PARAMS))
            return read, sampler.policy_version, sampler._stamp, len(sampler._folders), sampled

    one, other = on_ranks(2, work)
    whole = len(student.state_dict())
    assert one[0] == other[0] == [whole, whole], "gathering a weight takes all ranks"
    assert one[1] == other[1] == 1
    assert one[2] == other[2] == server.post("/state", {})["version"]
    assert (one[3] > 0, other[3]) == (True, 0)
    assert one[4][2:] * 3 == other[4]
    assert server.post("/state", {})["loaded"] == 2 + 2, "twice to see that it can be updated, once a version"


def test_another_rank_may_own_the_server(server: Server, tokenizer: Any, student: Any) -> None:
    def work(ranks: ThreadRanks) -> str:
        with open_server(server.url, tokenizer, ranks=ranks, owner=1) as sampler:
            sampler.load_policy(3, student.state_dict().items())
            assert bool(sampler._folders) == (ranks.rank == 1)
            return sampler._stamp

    stamps = on_ranks(2, work)
    assert stamps == [server.post("/state", {})["version"]] * 2


def test_a_base_is_read_once_on_every_rank(server: Server, tokenizer: Any, student: Any) -> None:
    weights, low_rank = policy(add_adapter(student, LoRAConfig(r=2)))
    items = list(weights)

    def work(ranks: ThreadRanks) -> list[int]:
        read = []
        with open_server(server.url, tokenizer, ranks=ranks) as sampler:
            for version in (0, 1, 2):
                counted = Counted(items)
                sampler.load_policy(version, counted, low_rank)
                read.append(counted.read)
                sampler.generate(REQUESTS, PARAMS)
        return read

    assert on_ranks(2, work) == [[len(items), 0, 0]] * 2
    assert server.post("/state", {})["low_rank"]


def test_a_restarted_server_gets_the_policy_back_once(
    serve: Callable[..., Server], tokenizer: Any, student: Any
) -> None:
    server = serve()
    servers = [server]

    def work(ranks: ThreadRanks) -> tuple[Any, ...]:
        with open_server(server.url, tokenizer, ranks=ranks) as sampler:
            sampler.load_policy(4, student.state_dict().items())
            before = ids(sampler.generate(REQUESTS, PARAMS))
            ranks.raise_on_all_ranks()
            if ranks.is_first:
                server.stop()
                servers.append(serve(server.port))
            ranks.raise_on_all_ranks()
            after = ids(sampler.generate(REQUESTS, PARAMS))
            ranks.raise_on_all_ranks()
            sampler.load_policy(5, student.state_dict().items())
            return before == after, sampler.policy_version, sampler._stamp

    found = on_ranks(3, work)
    state = servers[1].post("/state", {})
    assert found == [(True, 5, state["version"])] * 3
    assert state["loaded"] == 2, "version 4 once, whoever gave it back, and version 5"


def test_a_rank_without_files_gives_the_policy_back(serve: Callable[..., Server], tokenizer: Any, student: Any) -> None:
    """Only the second rank samples after the restart."""
    server = serve()

    def work(ranks: ThreadRanks) -> list[list[int]]:
        with open_server(server.url, tokenizer, ranks=ranks) as sampler:
            sampler.load_policy(4, student.state_dict().items())
            ranks.raise_on_all_ranks()
            if not ranks.is_first:
                server.post("/fault", {"kind": "restart", "after": 2})  # in the middle of a batch
                return [ids(sampler.generate(REQUESTS, PARAMS)) for _ in range(2)] + [ranks.gather(sampler.restarts)]
            return ranks.gather(sampler.restarts)

    first, (one, other, restarts) = on_ranks(2, work)
    assert one == other
    assert first == restarts == [0, 1]


def test_weights_that_are_refused_end_the_update_on_all_ranks(server: Server, tokenizer: Any, student: Any) -> None:
    good = dict(student.state_dict())
    bad = {**good, "model.norm.weight": torch.zeros(3)}

    def work(ranks: ThreadRanks) -> tuple[Any, ...]:
        with open_server(server.url, tokenizer, ranks=ranks) as sampler:
            sampler.load_policy(0, good.items())
            expected = ids(sampler.generate(REQUESTS, PARAMS))
            weights = Counted(bad.items())
            with pytest.raises((ValueError, PeerError), match=r"'model.norm.weight' has shape \(3,\)") as found:
                sampler.load_policy(1, weights)
            same = ids(sampler.generate(REQUESTS, PARAMS)) == expected
            return found.type, weights.read, same, sampler.policy_version

    one, other = on_ranks(2, work)
    assert one == (ValueError, len(bad), True, 0)
    assert other == (PeerError, len(bad), True, 0)


def test_an_update_that_fails_half_way_leaves_no_stamp(server: Server, tokenizer: Any, student: Any) -> None:
    """No rank may take the new weights for the old ones."""

    server.post("/fault", {"kind": "cache", "version": 1})

    def work(ranks: ThreadRanks) -> tuple[dict[str, Any], ...]:
        with open_server(server.url, tokenizer, ranks=ranks) as sampler:
            sampler.load_policy(0, student.state_dict().items())
            with pytest.raises((EngineError, PeerError), match="did not reset its prefix cache"):
                sampler.load_policy(1, student.state_dict().items())
            failed = server.post("/state", {})
            ranks.raise_on_all_ranks()
            sampler.generate(REQUESTS, PARAMS)
            ranks.raise_on_all_ranks()
            return failed, server.post("/state", {})

    for failed, after in on_ranks(2, work):
        assert (failed["version"], failed["loaded"]) == ("none", 2 + 2), "the weights of version 1 had arrived"
        assert after["version"].endswith("-0") and after["loaded"] == 2 + 2 + 1, "version 0 is given back once"


def test_a_server_that_is_refused_is_refused_on_all_ranks(serve: Callable[..., Server], tokenizer: Any) -> None:
    server = serve(logprobs_mode="raw_logprobs")
    found = on_ranks(2, lambda ranks: open_server(server.url, tokenizer, ranks=ranks))
    assert isinstance(found[0], EngineError) and isinstance(found[1], PeerError)
    assert all("logprobs_mode is raw_logprobs" in str(error) for error in found)


# --- the worker's side -----------------------------------------------------------------------


def test_a_worker_loads_a_policy_once_and_its_checkpoint_always(
    tmp_path: Path, student: Any, models: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    file = str(tmp_path / "policy.safetensors")
    save_file({name: value.clone() for name, value in student.state_dict().items()}, file)
    names = {name: name for name in student.state_dict()}
    loaded: list[int] = []
    broken = threading.Event()

    def reload_weights(weights_iterator: Any) -> None:
        loaded.append(sum(1 for _ in weights_iterator))
        if broken.is_set():
            raise RuntimeError("half-way")

    worker = SimpleNamespace(
        device="cpu",
        reload_weights=reload_weights,
        vllm_config=SimpleNamespace(model_config=SimpleNamespace(model=models["student"], trust_remote_code=False)),
        model_runner=SimpleNamespace(get_model=lambda: student),
    )
    load = PolicyLoader.load_policy_file
    for _ in range(3):
        load(worker, file, names)
    assert loaded == [len(names)]
    other = str(tmp_path / "other.safetensors")
    save_file(load_file(file), other)
    load(worker, other, names)
    load(worker, file, names)
    assert len(loaded) == 3
    broken.set()
    with pytest.raises(RuntimeError, match="half-way"):
        load(worker, other, names)
    broken.clear()
    load(worker, file, names)
    assert len(loaded) == 5, "after a failure nothing is taken for granted"


# --- groups ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("visible", "size", "expected"),
    [
        (None, 1, ["0", "1", "2", "3"]),
        (None, 2, ["0,1", "0,1", "2,3", "2,3"]),
        ("4,5,6,7", 2, ["4,5", "4,5", "6,7", "6,7"]),
        ("4,5,6,7", 4, ["4,5,6,7"] * 4),
    ],
)
def test_neighbours_share_their_gpus(
    monkeypatch: pytest.MonkeyPatch, visible: str | None, size: int, expected: list[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    if visible is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert [_gpus(Ranks(4 + rank, 8, rank, 4), size) for rank in range(4)] == expected
    assert _gpus(Ranks(), size) is None


@pytest.fixture
def commands(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, description: dict[str, Any]) -> list[dict[str, Any]]:
    """Groups start fake servers; what they were started with."""
    file, started = tmp_path / "description.json", list[dict[str, Any]]()
    file.write_text(json.dumps(description))

    def command(model: str, *arguments: Any, extra: list[str], **options: Any) -> tuple[list[str], dict[str, str]]:
        started.append({"extra": extra, **options})
        return [sys.executable, str(SCRIPT), str(file), extra[extra.index("--uds") + 1]], dict(os.environ)

    monkeypatch.setattr(remote, "server_command", command)
    monkeypatch.setattr(opening, "require_vllm", lambda otherwise: None)
    return started


def test_every_group_has_one_engine_of_its_own(
    commands: list[dict[str, Any]], tokenizer: Any, student: Any, models: dict[str, str]
) -> None:
    def work(ranks: ThreadRanks) -> tuple[Any, ...]:
        devices = str(ranks.rank - ranks.rank % 2)
        sampler = open_shared(models["student"], tokenizer, ranks=ranks, size=2, devices=devices)
        with sampler:
            weights = Counted(student.state_dict().items())
            sampler.load_policy(1, weights)
            sampled = [ids(sampler.generate(REQUESTS, PARAMS)) for _ in range(1 + ranks.rank)]
            state = sampler._engine._client.call("/state", {})
            ranks.raise_on_all_ranks()
        owned = None if sampler._engine.own is None else sampler._engine.own.process.poll()
        return sampler._engine._client.base_url, state, weights.read, sampled[-1], owned

    found = on_ranks(4, work)
    urls, states, read, sampled, owned = zip(*found, strict=True)
    assert urls[0] == urls[1] != urls[2] == urls[3]
    assert all(url.startswith("unix:") and not Path(url.removeprefix("unix:")).parent.exists() for url in urls)
    assert [state["loaded"] for state in states] == [3] * 4
    assert read == (len(student.state_dict()),) * 4
    assert sampled[0] == sampled[1] == sampled[2] == sampled[3], "whichever engine samples"
    assert [code is None for code in owned] == [False, True, False, True]
    assert sorted(command["devices"] for command in commands) == ["0", "2"]
    assert all("--tensor-parallel-size 2" in " ".join(command["extra"]) for command in commands)


def test_an_engine_that_dies_ends_its_group_with_its_log(
    commands: list[dict[str, Any]], tokenizer: Any, student: Any, models: dict[str, str]
) -> None:
    def work(ranks: ThreadRanks) -> str:
        with open_shared(models["student"], tokenizer, ranks=ranks, size=2) as sampler:
            sampler.load_policy(1, student.state_dict().items())
            ranks.raise_on_all_ranks()
            if sampler._engine.own is not None:
                Path(sampler._engine.own.log).write_text("out of memory")
                os.kill(sampler._engine.own.process.pid, signal.SIGKILL)
            with pytest.raises(EngineDiedError) as found:
                sampler.generate(REQUESTS, PARAMS)
            ranks.raise_on_all_ranks()
            return str(found.value)

    for message in on_ranks(2, work):
        assert "--resume_from_checkpoint latest" in message and "vllm-serve" not in message
        assert message.endswith("--- end of its log ---\nout of memory")


def test_an_engine_that_cannot_start_is_refused_on_all_ranks(
    commands: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch, tokenizer: Any, models: dict[str, str]
) -> None:
    broken = [sys.executable, "-c", "import sys; sys.exit('no such GPU')"]
    monkeypatch.setattr(remote, "server_command", lambda *a, **k: (broken, dict(os.environ)))
    found = on_ranks(2, lambda ranks: open_shared(models["student"], tokenizer, ranks=ranks, size=2))
    assert isinstance(found[0], EngineError) and isinstance(found[1], PeerError)
    assert all("ended with exit code 1 before it was ready" in str(e) and "no such GPU" in str(e) for e in found)


# --- whole runs ------------------------------------------------------------------------------


@pytest.fixture
def server(serve: Callable[..., Server]) -> Server:
    return serve()


def train(processes: int, data: dict[str, Any], start: Callable[..., Any] = torchrun, **changes: Any) -> Any:
    file = Path(data["output_dir"]).with_suffix(".yaml")
    file.write_text(yaml.safe_dump({**data, **changes}))
    return start(processes, "-m", "opdengine", "train", "--config", str(file))


def rollouts(folder: Path, steps: int) -> list[list[dict[str, Any]]]:
    files = [folder / "rollouts" / f"step_{step}.jsonl" for step in range(1, steps + 1)]
    return [[json.loads(line) for line in file.read_text().splitlines()] for file in files]


@pytest.mark.parametrize("staleness", [0, 1])
def test_two_processes_sample_what_one_does(
    serve: Callable[..., Server], models: dict[str, str], prompt_file: str, tmp_path: Path, staleness: int
) -> None:
    servers = {}
    for processes in (1, 2):
        servers[processes] = serve()
        data = settings(
            models,
            prompt_file,
            tmp_path / str(processes),
            servers[processes].url,
            per_device_train_batch_size=4 // processes,
            max_steps=3,
            max_staleness=staleness,
        )
        done = train(processes, data)
        assert done.returncode == 0, done.stderr[-4000:]
    assert rollouts(tmp_path / "1", 3) == rollouts(tmp_path / "2", 3)
    states = [server.post("/state", {}) for server in servers.values()]
    assert [state["loaded"] for state in states] == [2 + 4] * 2
    assert states[0]["calls"] == states[1]["calls"]


def test_a_failing_update_ends_all_processes_with_a_checkpoint(
    server: Server, models: dict[str, str], prompt_file: str, tmp_path: Path
) -> None:
    server.post("/fault", {"kind": "cache", "version": 2})
    data = settings(models, prompt_file, tmp_path / "run", server.url, per_device_train_batch_size=2)
    done = train(2, data, each_to_its_end)
    assert done.returncode != 0
    assert "(rank 0): the server" in done.stderr and "did not reset its prefix cache" in done.stderr
    assert "(rank 1): rank 0 failed (EngineError)" in done.stderr
    assert [p.name for p in list_checkpoints(tmp_path / "run" / "checkpoints")] == ["step_2"]
    server.post("/fault", {"kind": "none"})
    again = train(2, data, resume_from_checkpoint="latest")
    assert again.returncode == 0, again.stderr[-4000:]
    assert read_metrics(tmp_path / "run" / "metrics.jsonl")[-1]["step"] == 4
