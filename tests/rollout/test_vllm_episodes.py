"""Episodes of many turns sampled by a real vLLM engine (``-m vllm``): ids and log-probs stay exact."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from opdengine.environments.episodes import Episodes, Job, turns_of
from opdengine.rollout.vllm.sampler import VLLMSampler
from opdengine.types import Prompt, SamplingParams
from tiny.agents.house import House

pytestmark = pytest.mark.vllm

TEMPLATE = (
    "{% for m in messages %}{{ m['role'][0] }}:{{ m['content'] }}"
    "{{ '<eos>' if m['role'] == 'assistant' }}\n{% endfor %}"
    "{% if add_generation_prompt %}a:{% endif %}"
)


class InProcess:
    """Two houses without processes of their own."""

    size = 2

    def __init__(self) -> None:
        self.houses = [House(instructions=False), House(instructions=False)]

    def reset(self, jobs: Any) -> Any:
        return {slot: self.houses[slot].reset(seed=seed, task=task) for slot, (seed, task) in jobs.items()}

    def step(self, messages: Any) -> Any:
        return {slot: self.houses[slot].step(message) for slot, message in messages.items()}

    def counts(self) -> dict[str, float]:
        return {}

    def close(self) -> None:
        pass


def test_trajectories_are_those_of_the_model(colocated: VLLMSampler, model: Any, byte_tokenizer: Any) -> None:
    byte_tokenizer.chat_template = TEMPLATE
    episodes = Episodes(InProcess(), byte_tokenizer, {}, max_turns=4, max_trajectory_tokens=300)
    jobs = [Job(str(i), Prompt(t["id"], (), extra={"task": t}), i) for i, t in enumerate(House.tasks("train", count=4))]
    params = SamplingParams(max_tokens=6, temperature=0.7, seed=3)
    rollouts, broken = episodes.play(colocated, jobs, params)
    assert len(rollouts) == 4 and not broken
    for rollout in rollouts:
        assert len(list(turns_of(rollout))) >= 2
        ids = torch.from_numpy(rollout.token_ids)[None]
        with torch.no_grad():
            logits = model(ids).logits[0].double() / 0.7
        expected = logits.log_softmax(-1)[rollout.target_positions - 1].gather(
            1, torch.from_numpy(rollout.target_ids)[:, None]
        )[:, 0]
        assert rollout.sampler_logprob is not None
        torch.testing.assert_close(torch.from_numpy(rollout.sampler_logprob).double(), expected, atol=1e-4, rtol=0)
    again, _ = episodes.play(colocated, jobs[2:], params)  # whatever else is in the batch
    assert [r.token_ids.tolist() for r in again] == [r.token_ids.tolist() for r in rollouts[2:]]
