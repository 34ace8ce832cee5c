"""The sampler's side of a vLLM server: faults of a real process on loopback, whole runs, overlap.

The server here speaks vLLM's protocol but makes its samples up; test_vllm.py and test_vllm_server.py
hold the same sampler against a real one.
"""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from server_helpers import PARAMS, REQUESTS, Server, ids, settings
from transformers import AutoModelForCausalLM

from opdengine.cli import main
from opdengine.config.loading import from_mapping
from opdengine.config.train import ConfigError, TrainConfig
from opdengine.data.prompts import PromptStream, load_prompts
from opdengine.distributed import Ranks
from opdengine.models.checkpoint import list_checkpoints
from opdengine.rollout.vllm import remote
from opdengine.rollout.vllm.engine import EngineDiedError, EngineError, engine_environment
from opdengine.rollout.vllm.folders import private_folders
from opdengine.rollout.vllm.opening import open_server
from opdengine.rollout.vllm.sampler import VLLMSampler
from opdengine.rollout.vllm.serve import server_command
from opdengine.training.build_sampler import build_sampler
from opdengine.training.loop import prepared
from opdengine.training.run import train
from opdengine.training.step import Engine
from opdengine.training.writer import read_metrics
from opdengine.types import Image, Request, SamplingParams
from tiny.agents.house import HOUSE


@pytest.fixture
def server(serve: Callable[..., Server]) -> Server:
    return serve()


@pytest.fixture(autouse=True)
def _short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "PAUSE_SECONDS", 0.05)


@pytest.fixture
def sampler(server: Server, tokenizer: Any, models: dict[str, str]) -> Iterator[VLLMSampler]:
    model = AutoModelForCausalLM.from_pretrained(models["student"])
    with open_server(server.url, tokenizer) as opened:
        opened.load_policy(0, model.state_dict().items())
        yield opened


def test_a_prompt_with_pictures_is_refused_and_not_sent_without_them(sampler: VLLMSampler) -> None:
    picture = Image("00", 1, 1, b"")
    with pytest.raises(ValueError, match=r"prompt 'seen' has pictures.*set use_vllm to false"):
        sampler.generate([*REQUESTS, Request("seen", (1, 2), 0, images=(picture,))], PARAMS)


# --- faults ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("500", r"server fails: HTTP 500.*EngineCore encountered.*--resume_from_checkpoint latest"),
        ("garbage", r"not a vLLM server that can be trained with.*not JSON.*login page.*opdengine vllm-serve"),
        ("fields", r"not a vLLM server.*KeyError\('logprobs'\)"),
        ("half", r"cannot be reached.*IncompleteRead.*opdengine vllm-serve"),
        ("die", r"cannot be reached.*opdengine vllm-serve --model MODEL"),
        ("hang", r"hangs: .*gave no answer in 1 s.*vllm_response_timeout"),
    ],
)
def test_failing_server_is_an_error_that_names_the_remedy(
    server: Server, sampler: VLLMSampler, kind: str, message: str
) -> None:
    sampler._engine.response_timeout = 1.0
    server.post("/fault", {"kind": kind, "after": 2})
    begin = time.monotonic()
    with pytest.raises(EngineError, match=f"(?s){message}"):
        sampler.generate(REQUESTS, PARAMS)
    assert time.monotonic() - begin < 5
    if kind not in ("die", "hang"):
        server.post("/fault", {"kind": "none"})
        assert len(sampler.generate(REQUESTS, PARAMS)) == 3


def test_failure_ends_requests_that_wait_for_their_turn(server: Server, sampler: VLLMSampler) -> None:
    sampler._engine._client.concurrency = 2
    server.post("/fault", {"kind": "garbage", "after": 3})
    with pytest.raises(EngineError, match="not JSON"):
        sampler.generate(REQUESTS, SamplingParams(max_tokens=4, n=20))
    server.post("/fault", {"kind": "none"})
    assert len(ids(sampler.generate(REQUESTS, SamplingParams(max_tokens=4, n=20)))) == 60


def test_server_that_was_started_again_gets_the_last_policy(
    serve: Callable[..., Server], tokenizer: Any, models: dict[str, str]
) -> None:
    server = serve()
    with open_server(server.url, tokenizer) as sampler:
        model = AutoModelForCausalLM.from_pretrained(models["student"])
        sampler.load_policy(4, model.state_dict().items())
        expected = ids(sampler.generate(REQUESTS, PARAMS))
        server.stop()
        again = serve(server.port)
        assert ids(sampler.generate(REQUESTS, PARAMS)) == expected
        state = again.post("/state", {})
        assert state["loaded"] == 1 and state["version"].endswith("-4")
        assert (sampler.restarts, sampler.policy_version) == (1, 4)
        again.post("/fault", {"kind": "restart", "after": 3})  # in the middle of a batch
        assert ids(sampler.generate(REQUESTS, PARAMS)) == expected
        assert sampler.restarts == 2


def test_two_runs_on_one_server_are_noticed(server: Server, sampler: VLLMSampler, tokenizer: Any) -> None:
    def other_run() -> None:
        server.post("/update_weight_version", {"new_version": "other-7"})

    ask = sampler._engine._ask
    sampler._engine._ask = lambda *a: (other_run() if "generate" in a[0] else None, ask(*a))[1]  # type: ignore[method-assign]
    with pytest.raises(EngineError, match=r"weights \['other-7'\] instead of version 0; does another run"):
        sampler.generate(REQUESTS, PARAMS)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"logprobs_mode": "raw_logprobs"}, EngineError, "logprobs_mode is raw_logprobs"),
        ({"dtype": "bfloat16"}, ValueError, "computes in bfloat16, the trainer in float32.*--dtype float32"),
    ],
)
def test_server_with_other_settings_is_refused(
    serve: Callable[..., Server], tokenizer: Any, changes: dict[str, str], error: type, message: str
) -> None:
    with pytest.raises(error, match=message):
        open_server(serve(**changes).url, tokenizer, dtype="float32")


def test_no_server_and_bad_addresses_are_refused(tokenizer: Any) -> None:
    with pytest.raises(EngineDiedError, match=r"cannot be reached: http://127.0.0.1:9/.*opdengine vllm-serve"):
        open_server("http://127.0.0.1:9", tokenizer)
    with pytest.raises(ValueError, match="write it like http"):
        open_server("127.0.0.1:8000", tokenizer)
    with pytest.raises(ValueError, match="vllm_sync_dir"):
        open_server("http://10.0.0.1:8000", tokenizer)
    with pytest.raises(ValueError, match=r"ask for no password.*ssh -L"):
        server_command("model", "0.0.0.0", 8000)
    with pytest.raises(ValueError, match="--logprobs-mode=raw_logprobs is set by"):
        server_command("model", "127.0.0.1", 8000, extra=["--logprobs-mode=raw_logprobs"])


def test_closing_ends_a_generation_and_leaves_no_file(server: Server, sampler: VLLMSampler) -> None:
    folders = list(sampler._folders)
    assert any(Path(f).exists() for f in folders)
    sampler.close()
    sampler.close()
    assert not any(Path(f).exists() for f in folders)
    with pytest.raises(EngineError, match="closed"):
        sampler.generate(REQUESTS, PARAMS)


# --- whole runs ------------------------------------------------------------------------------


def run(data: dict[str, Any]) -> dict[str, torch.Tensor]:
    result = train(from_mapping(TrainConfig, data), progress=False)
    return load_file(result.final_model / "model.safetensors")


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("kind", ["die", "500", "half", "hang"])
def test_run_whose_server_fails_ends_with_a_checkpoint_and_goes_on(
    serve: Callable[..., Server],
    models: dict[str, str],
    prompt_file: str,
    tmp_path: Path,
    kind: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    whole = run(settings(models, prompt_file, tmp_path / "whole", serve().url))
    broken = serve()
    broken.post("/fault", {"kind": kind, "after": 2 + 2 * 4 + 1})  # the probe, 4 a step: in the third step
    data = settings(models, prompt_file, tmp_path / "broken", broken.url, vllm_response_timeout=1.0)
    arguments = [a for k, v in data.items() for a in (f"--{k}", json.dumps(v))]
    assert main(["train", *arguments]) == 2
    message = capsys.readouterr().err
    assert "opdengine vllm-serve" in message or "start it again" in message.lower()
    assert "--resume_from_checkpoint latest" in message and "Traceback" not in message
    (saved,) = list_checkpoints(tmp_path / "broken" / "checkpoints")
    assert saved.name == "step_2"
    again = serve()
    resumed = run({**data, "vllm_server_base_url": again.url, "resume_from_checkpoint": "latest"})
    assert same(resumed, whole)
    assert [row["step"] for row in read_metrics(tmp_path / "broken" / "metrics.jsonl")] == [1, 2, 3, 4]


def test_staleness_is_bounded_and_logged(
    server: Server, models: dict[str, str], prompt_file: str, tmp_path: Path
) -> None:
    for bound, expected in ((0, [0, 0, 0, 0]), (1, [0, 1, 1, 1]), (2, [0, 1, 2, 2])):
        folder = tmp_path / str(bound)
        weights = run(settings(models, prompt_file, folder, server.url, max_staleness=bound))
        rows = read_metrics(folder / "metrics.jsonl")
        assert [row["sampling/staleness_max"] for row in rows] == expected
        assert [row["policy_version"] for row in rows] == [1, 2, 3, 4]
        again = run(settings(models, prompt_file, tmp_path / f"{bound}-again", server.url, max_staleness=bound))
        assert same(weights, again), "the order of batches and versions does not depend on timing"


def test_overlapping_run_resumes_within_its_bound(
    server: Server, models: dict[str, str], prompt_file: str, tmp_path: Path
) -> None:
    data = settings(models, prompt_file, tmp_path, server.url, max_staleness=1, save_steps=2, log_completions=True)
    server.post("/fault", {"kind": "garbage", "after": 2 + 3 * 4})  # noticed when batch 4 is wanted
    with pytest.raises(EngineError):
        run(data)
    assert list_checkpoints(tmp_path / "checkpoints")[-1].name == "step_3"
    server.post("/fault", {"kind": "none"})
    run({**data, "resume_from_checkpoint": "latest"})
    rows = read_metrics(tmp_path / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert rows[-1]["sampling/staleness_max"] == 0  # batch 4 was sampled anew
    seen = [
        json.loads(line)["prompt_id"]
        for step in range(1, 5)
        for line in (tmp_path / "rollouts" / f"step_{step}.jsonl").read_text().splitlines()
    ]
    assert sorted(seen[:12]) == sorted(p.id for p in load_prompts([prompt_file]).prompts)  # every prompt once


def test_rollouts_run_during_the_update() -> None:
    """Batch i + 1 is begun before batch i is finished, and no earlier batch waits for a later one."""
    log: list[str] = []

    class Slow:
        config = type("Config", (), {"prompts_per_step": 1})
        ranks = Ranks()

        async def prepare(self, batch: Any, number: int) -> int:
            log.append(f"begin {number}")
            await asyncio.sleep(0.01)
            log.append(f"ready {number}")
            return number

    class Stream:
        drawn = 0

        def next(self, count: int) -> list[int]:
            self.drawn += 1
            return [self.drawn]

        def state_dict(self) -> dict[str, int]:
            return {"drawn": self.drawn}

    async def consume(ahead: int) -> list[str]:
        log.clear()
        async for number, batch, state in prepared(Slow(), Stream(), 0, 3, ahead):  # type: ignore[arg-type]
            assert batch == number - 1 and state == {"drawn": number}
            log.append(f"update {batch}")
            await asyncio.sleep(0.05)
            log.append(f"updated {batch}")
        return list(log)

    strict = asyncio.run(consume(0))
    assert strict == [f"{what} {i}" for i in range(3) for what in ("begin", "ready", "update", "updated")]
    overlapped = asyncio.run(consume(1))
    assert overlapped.index("begin 1") < overlapped.index("updated 0")
    assert overlapped.index("ready 2") < overlapped.index("updated 1")
    assert overlapped.index("begin 2") > overlapped.index("updated 0")


def test_update_leaves_the_event_loop_free(engine_at: Callable[..., Engine]) -> None:
    engine = engine_at(max_staleness=1)
    ticks: list[int] = []

    async def tick() -> None:
        while True:
            ticks.append(1)
            await asyncio.sleep(0.01)

    async def work() -> None:
        ticker = asyncio.create_task(tick())
        assert await engine.run_in_thread(lambda: time.sleep(0.2) or threading.current_thread().name) != "MainThread"
        ticker.cancel()

    asyncio.run(work())
    assert len(ticks) > 5


@pytest.fixture
def engine_at(
    server: Server, models: dict[str, str], prompt_file: str, tmp_path: Path
) -> Iterator[Callable[..., Engine]]:
    from opdengine.methods import build_method
    from opdengine.models.chat import load_tokenizer
    from opdengine.training.build import build_engine

    engines: list[Engine] = []

    def build(**changes: Any) -> Engine:
        config = from_mapping(TrainConfig, settings(models, prompt_file, tmp_path, server.url, **changes))
        engines.append(build_engine(config, build_method(config), load_tokenizer(config.model)))
        return engines[-1]

    yield build
    for engine in engines:
        engine.sampler.close()


def test_stream_state_is_that_of_the_finished_batch(prompt_file: str) -> None:
    stream = PromptStream(load_prompts([prompt_file]), 0)
    before = json.loads(json.dumps(stream.state_dict()))
    state = stream.state_dict()
    stream.next(4)
    assert state == before, "a state that was taken does not move on with the stream"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_staleness": -1}, "max_staleness=-1"),
        ({"max_staleness": 1, "use_vllm": False}, "without use_vllm"),
        ({"max_staleness": 1, "vllm_enable_sleep_mode": True}, "cannot sleep"),
        ({"vllm_mode": "remote"}, "vllm_mode='remote'"),
    ],
)
def test_impossible_settings_are_refused(changes: dict[str, Any], message: str) -> None:
    data = {"model": "m", "train_data": ["d"], "output_dir": "o", "use_vllm": True, **changes}
    with pytest.raises(ConfigError, match=message):
        from_mapping(TrainConfig, data)


@pytest.mark.parametrize(
    ("changes", "longest"),
    [
        ({"train_data": ["d"]}, 1024),  # 4096 + 512 are more than the window
        ({"train_data": ["d"], "max_prompt_length": 100}, 612),
        ({"environment": {"name": HOUSE}}, 1024),
        ({"environment": {"name": HOUSE, "max_trajectory_tokens": 50}}, 50),
        ({"environment": {"name": HOUSE, "max_trajectory_tokens": 5000}}, 1024),
    ],
)
def test_a_colocated_engine_is_asked_for_no_more_than_the_window(
    models: dict[str, str], monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], longest: int
) -> None:
    asked: dict[str, Any] = {}
    monkeypatch.setattr(
        "opdengine.rollout.vllm.opening.open_child", lambda path, tokenizer, **options: asked.update(options)
    )
    data = {"model": models["student"], "output_dir": "o", "use_vllm": True, **changes}
    build_sampler(from_mapping(TrainConfig, data), SimpleNamespace(dtype=torch.float32), None)
    assert asked["max_model_len"] == longest


def test_made_up_samples_do_not_depend_on_the_batch(sampler: VLLMSampler) -> None:
    together = sampler.generate(REQUESTS, PARAMS)
    alone = [sampler.generate([request], PARAMS)[0] for request in REQUESTS]
    assert ids(together) == ids(alone)
    assert np.isclose(together[0][0].logprobs, -5.5).all()


def test_environment_of_an_engine(monkeypatch: pytest.MonkeyPatch, models: dict[str, str]) -> None:
    torchruns = {"RANK": "3", "LOCAL_WORLD_SIZE": "4", "MASTER_PORT": "1", "TORCHELASTIC_USE_AGENT_STORE": "True"}
    for name, value in {**torchruns, "OMP_NUM_THREADS": "9", "CUDA_VISIBLE_DEVICES": "7"}.items():
        monkeypatch.setenv(name, value)
    plain = engine_environment(models["student"], None, None)
    assert not set(torchruns) & set(plain)
    assert plain["CUDA_VISIBLE_DEVICES"] == "7" and plain["HF_HUB_OFFLINE"] == "1"
    chosen = engine_environment("hub/name", "0,1", 5)
    assert (chosen["CUDA_VISIBLE_DEVICES"], chosen["OMP_NUM_THREADS"]) == ("0,1", "5")
    _, environment = server_command("m", "::1", 8000, cpu_threads=2)
    assert environment["VLLM_SERVER_DEV_MODE"] == "1" and environment["OMP_NUM_THREADS"] == "2"


def test_folders_of_a_killed_process_are_removed_by_the_next(tmp_path: Path) -> None:
    code = (
        "import os, signal; from opdengine.rollout.vllm.folders import private_folders;"
        f"private_folders({str(tmp_path)!r}); os.kill(os.getpid(), signal.SIGKILL)"
    )
    subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2], check=False)
    (left,) = tmp_path.iterdir()
    (mine,) = private_folders(str(tmp_path))
    assert not left.exists()
    private_folders(str(tmp_path))
    assert Path(mine).exists(), "a folder in use stays"


@pytest.mark.parametrize("extra", [
    ["--hos", "0.0.0.0"], ["--ho=0.0.0.0"], ["--h", "0.0.0.0"], ["--HOST", "0.0.0.0"], ["--host=0.0.0.0"],
    ["--por", "1"], ["--dty=float16"], ["--max_model", "7"], ["--mod", "x"], ["--logprobs-m", "raw_logprobs"],
    ["--worker_extension", "x.Y"], ["--skip-tok"], ["--config", "vllm.yaml"], ["--conf=vllm.yaml"], ["--"],
    ["--host.x", "0.0.0.0"],
])  # fmt: skip
def test_no_other_name_of_an_argument_passes_its_check(extra: list[str]) -> None:
    """vLLM would take the beginning of a name for the name, and settings from a file."""
    with pytest.raises(ValueError, match=r"write it out|is set by opdengine|may hold --host|is not possible here"):
        server_command("m", "127.0.0.1", 8000, extra=extra)


def test_what_was_checked_comes_last() -> None:
    """So that it counts, whatever was said before in a way that we do not know."""
    command, _ = server_command("m", "127.0.0.1", 8000, extra=["-tp", "2", "--max-logprobs", "5", "--model-impl=x"])
    given = command[3:]
    assert given[:6] == ["m", "-tp", "2", "--max-logprobs", "5", "--model-impl=x"]
    assert given[6:10] == ["--host", "127.0.0.1", "--port", "8000"]


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.0.0.1", "0", "127.1", "", "localhost.evil", "127.0.0.1@x", "*"])
def test_hosts_that_others_reach(host: str) -> None:
    with pytest.raises(ValueError, match="can be reached from other machines"):
        server_command("m", host, 8000)


@pytest.mark.parametrize("arguments", [
    ["--hos", "0.0.0.0"], ["--host", "127.0.0.1", "--host", "0.0.0.0"], ["--host=0.0.0.0"], ["--port", "0"],
    ["--", "--host", "0.0.0.0"], ["--port", "99999999"],
])  # fmt: skip
def test_the_command_starts_nothing_that_others_reach(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("opdengine.rollout.vllm.serve.require_vllm", lambda *_: None)
    monkeypatch.setattr("subprocess.Popen", lambda *_, **__: pytest.fail("a server was started"))
    try:
        status: object = main(["vllm-serve", "--model", "m", *arguments])
    except SystemExit as ended:
        status = ended.code
    said = capsys.readouterr().err
    assert status == 2 and said.count("\n") == 1, said
