"""Is a screened forward worth building? Logits of all columns in fp8, and those of the columns that
matter for some row again in bfloat16, with plain library calls.

Time: what the logits of student and teacher cost against bfloat16 products with float32 results, part
by part. Error: reverse KL and dZ from the screened logits against those from the bfloat16 products,
for every threshold on a column's largest probability.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from measure import median_ms
from problems import PEAKS, S1, Shape, peaked
from torch import Tensor

from opd_kernels.chunking import ALIGNMENT

Case = tuple[str, Callable[[], dict[str, Any]]]
LARGEST = 448.0  # of float8_e4m3fn
THRESHOLDS = (1e-2, 1e-3, 1e-4, 1e-5)

CUDA = torch.cuda.is_available()


def quantise(x: Tensor) -> tuple[Tensor, Tensor]:
    """(e4m3 values, their one scale): x is about the product."""
    scale = x.abs().amax().float() / LARGEST
    return (x.float() / scale).to(torch.float8_e4m3fn), scale


def fp8_product(left: tuple[Tensor, Tensor], right: tuple[Tensor, Tensor]) -> Tensor:
    """left right^T in float32."""
    if CUDA:
        return torch._scaled_mm(
            left[0], right[0].t(), scale_a=left[1], scale_b=right[1], out_dtype=torch.float32, use_fast_accum=True
        )
    return (left[0].float() * left[1]) @ (right[0].float() * right[1]).t()


def product(left: Tensor, right: Tensor) -> Tensor:
    return torch.mm(left, right.t(), **({"out_dtype": torch.float32} if CUDA else {}))


def columns(logits: list[Tensor], threshold: float) -> Tensor:
    """Columns whose probability reaches the threshold in some row of student or teacher, and the next
    likeliest up to a number that products like."""
    best = torch.stack([(z - z.logsumexp(1, keepdim=True)).amax(0) for z in logits]).amax(0)
    count = int((best >= math.log(threshold)).sum())
    return best.topk(min(len(best), -(-max(count, 1) // ALIGNMENT) * ALIGNMENT)).indices


def repair(logits: list[Tensor], pairs: list[tuple[Tensor, Tensor]], index: Tensor) -> None:
    """The logits of some columns again."""
    for z, (hidden, weight) in zip(logits, pairs, strict=True):
        z[:, index] = product(hidden, weight[index])


def judged(z: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """([c] reverse KL, its gradient dZ)."""
    p, q = z.log_softmax(1), t.log_softmax(1)
    gap = p - q
    value = (p.exp() * gap).sum(1)
    return value, p.exp() * (gap - value[:, None])


def distance(got: Tensor, want: Tensor) -> float:
    return ((got - want).norm() / want.norm()).item()


def screen(shape: Shape, rows: int, live: int, exponent: float) -> dict[str, Any]:
    device, dtype = ("cuda", torch.bfloat16) if CUDA else ("cpu", torch.float32)
    problem = peaked(shape, device, dtype, live=live, exponent=exponent)
    hidden, weight, (teacher,) = problem.hidden.detach()[:rows], problem.weight.detach(), problem.teachers
    pairs = [(hidden, weight), (teacher.hidden[:rows], teacher.weight)]
    small = [(quantise(h), quantise(w)) for h, w in pairs]
    exact = [product(h, w) for h, w in pairs]
    value, dz = judged(*exact)
    gradient = product(dz.to(dtype), weight.t())
    out: dict[str, Any] = {
        "bfloat16_ms": sum(median_ms(lambda h=h, w=w: product(h, w)) for h, w in pairs),
        "fp8_ms": sum(median_ms(lambda h=h, w=w: fp8_product(h, w)) for h, w in small),
        "quantise_hidden_ms": sum(median_ms(lambda h=h: quantise(h)) for h, _ in pairs),
    }

    def compare(logits: list[Tensor]) -> dict[str, float]:
        got, d = judged(*logits)
        wrong = distance(product(d.to(dtype), weight.t()), gradient)
        return {"value_error": distance(got, value), "dz_error": distance(d, dz), "hidden_error": wrong}

    out["fp8 alone"] = compare([fp8_product(h, w) for h, w in small])
    for threshold in THRESHOLDS:
        logits = [fp8_product(h, w) for h, w in small]
        index = columns(logits, threshold)
        choose = median_ms(partial(columns, logits, threshold))
        again = median_ms(partial(repair, logits, pairs, index))
        out[f"probability {threshold:g}"] = {
            "columns": len(index),
            "choose_ms": choose,
            "repair_ms": again,
            "over_bfloat16": (out["fp8_ms"] + choose + again) / out["bfloat16_ms"],
            **compare(logits),
        }
    return out


def cases(smoke: bool) -> Iterator[Case]:
    shape, rows = (S1.smaller(), 32) if smoke else (S1, 1024)
    for live, exponent in PEAKS:
        yield (
            f"{live} live columns, exponent {exponent}",
            lambda live=live, exponent=exponent: screen(shape, rows, live, exponent),
        )
