"""One vLLM engine for all tests of the sampler: starting one takes seconds."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from opdengine.rollout.vllm import VLLMSampler


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


@pytest.fixture
def sampler(shared: VLLMSampler, model: Any) -> VLLMSampler:
    """The shared sampler, holding the saved weights."""
    if shared.policy_version != 0:
        shared.load_policy(0, model.state_dict().items())
    return shared
