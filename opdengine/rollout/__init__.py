"""Samplers: token ids in, exact sampled token ids and log-probs out."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Protocol

from opdengine.types import Completion, Request, SamplingParams

if TYPE_CHECKING:
    import torch

    from opdengine.models.lora import LowRank


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

    def chats(self) -> AbstractContextManager[None]:
        """Within it every call of :meth:`generate` has the next turns of chats of the call before.

        So what was read of them may be kept. The policy stays the same, and one caller at a time is within.
        """
        ...

    def load_policy(
        self, version: int, weights: Iterable[tuple[str, torch.Tensor]], low_rank: LowRank | None = None
    ) -> None:
        """Make the sampler hold exactly these weights and stamp ``version``.

        Where several ranks train, all of them call this when none of them samples.

        Args:
            version: optimiser steps taken.
            weights: the whole model by its ``state_dict`` names. With ``low_rank`` they are a base that
                never changes: a sampler may read them at the first call only.
            low_rank: what is added to them; see :data:`opdengine.models.lora.LowRank`.
        """
        ...

    def sleep(self) -> None:
        """Give memory back until the next call that needs it; does nothing where that is impossible."""
        ...

    def close(self) -> None:
        """Give back memory and processes; the sampler cannot be used afterwards."""
        ...
