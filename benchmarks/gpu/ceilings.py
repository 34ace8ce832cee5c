"""What the machine can do, and the open questions of the kernels' design, each answered by numbers.

1. fp32-output against bf16-output GEMMs for logits.  2. The library's choice for dX, whose inner
dimension is the vocabulary, against splits of it.  3. Bandwidth of the row kernels.
4. A Triton GEMM against the library.  5. Sustained clocks.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from measure import clocks, kernels, median_ms, synchronise

Case = tuple[str, Callable[[], dict[str, Any]]]
CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
NARROW = torch.bfloat16 if CUDA else torch.float32


def rate(flops: float, ms: float) -> float:
    """TFLOP/s."""
    return flops / ms / 1e9


def names(call: Callable[[], object]) -> list[str]:
    return [name for name, _ in kernels(call) or ()]


def normal(*shape: int, dtype: torch.dtype = NARROW) -> torch.Tensor:
    return torch.randn(*shape, device=DEVICE, dtype=dtype)


def square(size: int) -> dict[str, Any]:
    a, b = normal(size, size), normal(size, size)
    out = torch.empty_like(a)
    ms = median_ms(lambda: torch.mm(a, b, out=out))
    return {"size": size, "ms": ms, "tflops": rate(2 * size**3, ms)}


def copy(size: int) -> dict[str, Any]:
    """Read and write ``size`` bytes."""
    a = torch.empty(size, device=DEVICE, dtype=torch.uint8)
    b = torch.empty_like(a)
    ms = median_ms(lambda: b.copy_(a))
    return {"bytes": size, "ms": ms, "TB/s": 2 * size / ms / 1e9}


def logits(rows: int, vocab: int, width: int) -> dict[str, Any]:
    """Question 1."""
    hidden, weight = normal(rows, width), normal(vocab, width)
    flops, out = 2 * rows * vocab * width, {"rows": rows, "width": width}
    narrow = torch.empty(rows, vocab, device=DEVICE, dtype=NARROW)
    out["narrow_tflops"] = rate(flops, median_ms(lambda: torch.mm(hidden, weight.t(), out=narrow)))
    if CUDA:
        wide = torch.empty(rows, vocab, device=DEVICE)
        call = lambda: torch.mm(hidden, weight.t(), out_dtype=torch.float32, out=wide)  # noqa: E731
        out["float32_tflops"] = rate(flops, median_ms(call))
        out["library"] = names(call)
    return out


def hidden_gradient(rows: int, vocab: int, width: int) -> dict[str, Any]:
    """Question 2: dX = dZ W in one product, as sums over blocks of the vocabulary, and as a batch of
    products over blocks whose results are added."""
    dz, weight = normal(rows, vocab), normal(vocab, width)
    flops = 2 * rows * vocab * width
    out: dict[str, Any] = {"rows": rows, "width": width}
    more = {"out_dtype": torch.float32} if CUDA else {}
    calls: dict[str, Callable[[], object]] = {
        "narrow": lambda: torch.mm(dz, weight),
        "float32": lambda: torch.mm(dz, weight, **more),
    }
    wide = torch.zeros(rows, width, device=DEVICE)
    for parts in (4, 16):
        step = -(-vocab // parts)

        def blocks(step: int = step) -> None:
            for start in range(0, vocab, step):
                torch.addmm(wide, dz[:, start : start + step], weight[start : start + step], out=wide, **more)

        def batch(parts: int = parts) -> torch.Tensor:
            left = dz.view(rows, parts, -1).transpose(0, 1)
            return torch.bmm(left, weight.view(parts, -1, width), **more).sum(0)

        calls[f"{parts}_blocks"] = blocks
        if vocab % parts == 0:
            calls[f"{parts}_split"] = batch
    for name, call in calls.items():
        out[f"{name}_tflops"] = rate(flops, median_ms(call))
    out["library"] = names(calls["float32"])
    return out


def weight_gradient(rows: int, vocab: int, width: int) -> dict[str, Any]:
    dz, hidden = normal(rows, vocab), normal(rows, width)
    out = torch.zeros(vocab, width, device=DEVICE)
    more = {"out_dtype": torch.float32} if CUDA else {}
    ms = median_ms(lambda: torch.addmm(out, dz.t(), hidden, out=out, **more))
    return {"rows": rows, "width": width, "tflops": rate(2 * rows * vocab * width, ms)}


def row_kernels(rows: int, vocab: int) -> dict[str, Any]:
    """Question 3: every sweep at the setting in use."""
    from gpu_rows import sweeps

    out = {}
    for name, size, call in sweeps(rows, vocab):
        ms = median_ms(call)
        out[name] = {"ms": ms, "bytes_per_logit": size, "TB/s": size * rows * vocab / ms / 1e9}
    return {"sweeps": out}


def triton_gemm(rows: int, vocab: int, width: int) -> dict[str, Any]:
    """Question 4."""
    from gap_gemm import matmul_gap

    hidden, weight = normal(rows, width), normal(vocab, width)
    theirs, head = normal(rows, width), normal(vocab, width)
    z, gap = torch.empty(2, rows, vocab, device=DEVICE, dtype=torch.float16)
    wide = torch.empty(rows, vocab, device=DEVICE)

    def library() -> None:
        for left, right in ((hidden, weight), (theirs, head)):
            torch.mm(left, right.t(), out_dtype=torch.float32, out=wide)

    ours = median_ms(lambda: matmul_gap(hidden, weight, theirs, head, z, gap))
    want = (hidden[:64].float() @ weight.float().t()) - (theirs[:64].float() @ head.float().t())
    wrong = ((gap[:64].float() - want).norm() / want.norm()).item()
    peer = median_ms(library)
    flops = 4 * rows * vocab * width
    return {
        "triton_tflops": rate(flops, ours),
        "library_tflops": rate(flops, peer),
        "ratio": ours / peer,
        "error": wrong,
    }


def sustained(seconds: float, size: int) -> dict[str, Any]:
    """Question 5: rate and clocks at the start and at the end of a long run."""
    a, b = normal(size, size), normal(size, size)
    out = torch.empty_like(a)
    stop, rates, seen = time.monotonic() + seconds, [], []
    while time.monotonic() < stop or len(rates) < 2:
        rates.append(rate(2 * size**3, median_ms(lambda: torch.mm(a, b, out=out), warmups=0, rounds=50 if CUDA else 1)))
        for _ in range(20 if CUDA else 0):
            torch.mm(a, b, out=out)
        seen.append(clocks())
        synchronise()
    return {"first_tflops": rates[0], "last_tflops": rates[-1], "clocks": [seen[0], seen[-1]]}


def cases(smoke: bool) -> Iterator[Case]:
    size = 64 if smoke else 8192
    yield f"matmul {size}", lambda: square(size)
    yield "copy", lambda: copy(1 << 16 if smoke else 8 << 30)
    vocab, width = (515, 16) if smoke else (151936, 2560)
    for count in (8, 16) if smoke else (512, 1024, 2048, 4096, 8192):
        yield f"logits {count}", lambda count=count: logits(count, vocab, width)
        yield f"dX {count}", lambda count=count: hidden_gradient(count, vocab, width)
        yield f"dW {count}", lambda count=count: weight_gradient(count, vocab, width)
    yield "sustained", lambda: sustained(0.01 if smoke else 3.0, size)


def kernel_cases(smoke: bool) -> Iterator[Case]:
    """Those that Triton compiles for."""
    rows, vocab, width = (8, 515, 16) if smoke else (512, 151936, 2560)
    if CUDA:
        yield "row kernels", lambda: row_kernels(rows, vocab)
        yield "Triton GEMM", lambda: triton_gemm(1024, vocab, width)
