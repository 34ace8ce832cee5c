"""One vLLM engine for all tests of the sampler: starting one takes seconds. And fake servers."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from server_helpers import Server
    from vllm_helpers import VLLMServer

    from opdengine.rollout.vllm.sampler import VLLMSampler


@pytest.fixture(scope="session")
def path(tmp_path_factory: pytest.TempPathFactory) -> str:
    from vllm_helpers import save_model

    return save_model(tmp_path_factory.mktemp("tied"), tied=True)


@pytest.fixture(scope="session")
def byte_tokenizer(path: str) -> Any:
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast.from_pretrained(path)


@pytest.fixture(scope="session")
def shared(path: str) -> Iterator[VLLMSampler]:
    from vllm_helpers import open_sampler

    with open_sampler(path) as sampler:
        yield sampler


@pytest.fixture
def model(path: str) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()


@pytest.fixture(scope="session")
def server(path: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[VLLMServer]:
    from vllm_helpers import VLLMServer

    started = VLLMServer(path, tmp_path_factory.mktemp("server") / "server.log")
    try:
        started.wait()
        yield started
    finally:
        started.stop()


@pytest.fixture(scope="session")
def served(server: VLLMServer, byte_tokenizer: Any) -> Iterator[VLLMSampler]:
    from opdengine.rollout.vllm.opening import open_server

    with open_server(server.url, byte_tokenizer, dtype="float32") as sampler:
        yield sampler


@pytest.fixture
def colocated(shared: VLLMSampler, model: Any) -> VLLMSampler:
    """The shared sampler in a child process, holding the saved weights."""
    if shared.policy_version != 0:
        shared.load_policy(0, model.state_dict().items())
    return shared


@pytest.fixture(params=["colocate", "server"])
def sampler(request: pytest.FixtureRequest, model: Any) -> VLLMSampler:
    """A sampler of either mode, holding the saved weights."""
    chosen: VLLMSampler = request.getfixturevalue({"colocate": "shared", "server": "served"}[request.param])
    if chosen.policy_version != 0:
        chosen.load_policy(0, model.state_dict().items())
    return chosen


@pytest.fixture(scope="session")
def description(models: dict[str, str]) -> dict[str, Any]:
    """What a fake server says of itself."""
    from opdengine.rollout.vllm.weight_names import model_weights

    shapes, tied = model_weights(models["student"], False)
    return {
        "is_cpu": True,
        "window": 1024,
        "vocabulary": shapes["lm_head.weight"][0],
        "shapes": shapes,
        "tied": tied,
        "model": models["student"],
        "dtype": "float32",
        "logprobs_mode": "processed_logprobs",
    }


@pytest.fixture
def serve(description: dict[str, Any], tmp_path: Path) -> Iterator[Callable[..., Server]]:
    """Starts fake servers; changes to the description are keywords."""
    from server_helpers import Server

    servers: list[Server] = []

    def start(port: int = 0, **changes: Any) -> Server:
        file = tmp_path / "description.json"
        file.write_text(json.dumps(description | changes))
        servers.append(Server(file, port))
        return servers[-1]

    yield start
    for server in servers:
        server.stop()
