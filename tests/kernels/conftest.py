"""Random problems of the kernel tests, and the fixture that measures peak memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor

from opd_kernels import TeacherHead


@dataclass
class Case:
    """A student, K teachers and per-token arguments on ``rows`` tokens and an odd vocabulary."""

    hidden: Tensor
    weight: Tensor
    teachers: list[TeacherHead]
    mix: Tensor
    token_weight: Tensor
    labels: Tensor
    extra: dict = field(default_factory=dict)

    @property
    def student(self) -> tuple[Tensor, Tensor]:
        return self.hidden, self.weight


@pytest.fixture
def make_case() -> Callable[..., Case]:
    def make(
        teachers: int = 1,
        *,
        rows: int = 11,
        vocab: int = 37,
        width: int = 6,
        dtype: torch.dtype = torch.float64,
        seed: int = 0,
        spread: float = 1.0,
    ) -> Case:
        g = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype)

        mix = torch.rand(rows, teachers, generator=g)
        mix[torch.rand(rows, teachers, generator=g) < 0.3] = 0.0
        mix[0], mix[1] = 0.5, 0.0
        token_weight = torch.rand(rows, generator=g) + 0.1
        token_weight[torch.rand(rows, generator=g) < 0.3] = 0.0
        token_weight[0], token_weight[2] = 0.7, 0.0
        return Case(
            hidden=(normal(rows, width) * spread).requires_grad_(),
            weight=normal(vocab, width).requires_grad_(),
            teachers=[
                TeacherHead(normal(rows, width + k + 1) * spread, normal(vocab, width + k + 1)) for k in range(teachers)
            ],
            mix=mix,
            token_weight=token_weight,
            labels=torch.randint(0, vocab, (rows,), generator=g),
        )

    return make


@pytest.fixture
def peak_bytes() -> Callable[[Callable[[], object]], int]:
    """Largest number of bytes alive on the CPU allocator during a call, beyond what was alive before it."""

    def measure(call: Callable[[], object]) -> int:
        with torch.autograd.profiler.profile(profile_memory=True) as profile:
            kept = call()
        events = [e for e in profile.kineto_results.events() if e.name() == "[memory]"]
        alive = peak = 0
        for event in sorted(events, key=lambda e: e.start_ns()):
            alive += event.nbytes()
            peak = max(peak, alive)
        del kept
        return peak

    return measure
