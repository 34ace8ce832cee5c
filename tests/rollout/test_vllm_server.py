"""A real vLLM server that ``opdengine vllm-serve`` starts: updates, a killed server (``-m vllm``)."""

from __future__ import annotations

import os
import signal
import time
from typing import Any

import pytest
from vllm_helpers import VLLMServer, after, requests, train, worst_gap

from opdengine.rollout.vllm.engine import EngineError, InvalidRequestError
from opdengine.rollout.vllm.opening import open_server
from opdengine.types import SamplingParams

pytestmark = pytest.mark.vllm


def test_weights_of_an_earlier_run_are_replaced_at_the_start(
    server: VLLMServer, byte_tokenizer: Any, model: Any
) -> None:
    params = SamplingParams(max_tokens=8, seed=1)
    with open_server(server.url, byte_tokenizer, dtype="float32") as first:
        train(model)
        first.load_policy(7, model.state_dict().items())
        assert worst_gap(model, requests(), first.generate(requests(), params)) < 1e-4
    with open_server(server.url, byte_tokenizer, dtype="float32") as second:
        assert second.policy_version == -1
        assert worst_gap(model, requests(), second.generate(requests(), params)) > 0.1


def test_refused_request_leaves_the_server_usable(server: VLLMServer, byte_tokenizer: Any) -> None:
    with open_server(server.url, byte_tokenizer) as sampler:
        with pytest.raises(InvalidRequestError, match="empty string"):
            sampler.generate(requests(), SamplingParams(max_tokens=4, stop=("",)))
        assert len(sampler.generate(requests(), SamplingParams(max_tokens=4))) == 4


def test_closing_during_a_generation_frees_the_server(server: VLLMServer, byte_tokenizer: Any) -> None:
    long = SamplingParams(max_tokens=200, n=64, seed=4)
    with open_server(server.url, byte_tokenizer) as sampler:
        after(0.5, sampler.close)
        begin = time.monotonic()
        with pytest.raises(EngineError, match="closed"):
            sampler.generate(requests(8), long)
        assert time.monotonic() - begin < 5
    with open_server(server.url, byte_tokenizer) as sampler:
        begin = time.monotonic()
        sampler.generate(requests(), SamplingParams(max_tokens=4))
        assert time.monotonic() - begin < 5


def test_killed_server_is_an_error_that_names_the_remedy(server: VLLMServer, byte_tokenizer: Any) -> None:
    """Runs last: it ends the server."""
    with open_server(server.url, byte_tokenizer) as sampler:
        worker = server.members()[-1]
        after(0.3, lambda: os.kill(worker, signal.SIGKILL))
        begin = time.monotonic()
        with pytest.raises(EngineError, match=r"start it again|Start it"):
            sampler.generate(requests(8), SamplingParams(max_tokens=200, n=64, seed=4))
        assert time.monotonic() - begin < 60
