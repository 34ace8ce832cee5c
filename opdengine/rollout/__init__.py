"""Samplers: token ids in, exact sampled token ids and log-probs out."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Protocol

from opdengine.types import Completion, Request, SamplingParams

if TYPE_CHECKING:
    import torch


class Sampler(Protocol):
    """Samples from one policy whose weights the trainer can replace."""

    policy_version: int

    def generate(self, requests: Sequence[Request], params: SamplingParams) -> list[list[Completion]]:
        """Sample ``params.n`` completions for every request, in order.

        Completion ``i`` of a request depends on ``(params.seed, request.seed, i)`` and the weights
        only, never on the other requests of the batch.

        Raises:
            ValueError: a prompt is empty or leaves no room in the model's window; names its id.
        """
        ...

    def load_policy(self, version: int, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Make the sampler hold exactly ``weights`` (``state_dict`` names) and stamp ``version``."""
        ...

    def sleep(self) -> None:
        """Give memory back until the next call that needs it; does nothing where that is impossible."""
        ...

    def close(self) -> None:
        """Give back memory and processes; the sampler cannot be used afterwards."""
        ...
