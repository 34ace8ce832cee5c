"""How many variants of the Triton kernels 60 routed calls would compile; no GPU is needed.

Every launch is replaced by the key under which Triton keeps a compiled kernel: its specialised arguments and its
constants. The results of the calls are zeros.
"""

from __future__ import annotations

import random
from collections import defaultdict
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import CUDABackend
from triton.runtime.jit import create_function_from_signature

from opd_kernels import TeacherHead, linear_divergence, row_ops, rows, teacher_check

KEYS: dict[str, set[str]] = defaultdict(set)
BACKEND = CUDABackend(GPUTarget("cuda", 90, 32))
DIVISIBLE = 16


class Recorder:
    """Stands for a kernel: ``kernel[grid](...)`` keeps its key."""

    def __init__(self, name: str, kernel: triton.JITFunction) -> None:
        self.name = name
        self.binder = create_function_from_signature(kernel.signature, kernel.params, BACKEND)

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def launch(*args: Any, **kwargs: Any) -> None:
            _, specialisation, options = self.binder(*args, **kwargs)
            KEYS[self.name].add(repr((specialisation, options)))

        return launch


def main() -> None:
    for name, kernel in list(vars(rows).items()):
        if name.endswith("_kernel"):
            setattr(rows, name, Recorder(name, kernel))
    row_ops.interpreted = lambda: True  # type: ignore[assignment]
    torch.set_num_threads(1)
    draw, g = random.Random(0), torch.Generator().manual_seed(0)
    width = 16
    for _ in range(60):
        count, vocab = draw.randrange(17, 400), 515
        route = torch.randint(0, 3, (count,), generator=g)
        mix = torch.nn.functional.one_hot(route, 3).float()
        mix[route == 2, 0] = draw.random()  # some rows have two teachers
        weight = torch.randint(0, 2, (count,), generator=g).float()
        heads = [TeacherHead(torch.zeros(count, width), torch.zeros(vocab, width)) for _ in range(3)]
        hidden, head = torch.zeros(count, width).requires_grad_(), torch.zeros(vocab, width).requires_grad_()
        linear_divergence(
            hidden,
            head,
            heads,
            mix=mix,
            token_weight=weight,
            labels=torch.zeros(count, dtype=torch.int64),
            stats=True,
            impl="triton",
            workspace_bytes=draw.randrange(300_000, 3_000_000),
        ).loss.backward()
    for name, keys in KEYS.items():
        print(name, len(keys))


if __name__ == "__main__":
    teacher_check.TeacherCheck.__call__ = lambda self: None  # type: ignore[method-assign]
    main()
