"""What the kernels are to reach and what was predicted before the first run, beside what was measured.

Every line reads its number from the results of ``run.py``; a case that was not run, or that failed,
leaves it open.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

Results = Mapping[str, Any]


@dataclass(frozen=True)
class Line:
    """One expectation.

    Args:
        name: what is measured.
        expected: in words.
        read: the number in the results; a missing case is a KeyError.
        holds: whether a number is as expected.
        form: how the number is written.
    """

    name: str
    expected: str
    read: Callable[[Results], float]
    holds: Callable[[float], bool]
    form: str = "{:.2f}"

    def measured(self, results: Results) -> float | None:
        try:
            return self.read(results)
        except (KeyError, TypeError, ZeroDivisionError, ValueError):
            return None

    def row(self, results: Results, yes: str, no: str) -> str:
        value = self.measured(results)
        if value is None:
            return f"| {self.name} | {self.expected} | not measured | |"
        if math.isnan(value):
            return f"| {self.name} | {self.expected} | not possible | {no} |"
        return f"| {self.name} | {self.expected} | {self.form.format(value)} | {yes if self.holds(value) else no} |"


def ours(results: Results, case: str, figure: str = "ms") -> float:
    return results["speed"][case]["ours"][figure]


def in_gib(results: Results, shape: str, size: float) -> float:
    return results["speed"][f"{shape} workspaces"][f"ours, {size} GiB"]["ms"]


def compared(results: Results) -> dict[str, dict[str, Any]]:
    """Every case of the speed with Liger's figures, which are measured apart."""
    cases = {name: dict(figures) for name, figures in results["speed"].items()}
    for name, figures in results.get("liger", {}).items():
        cases.setdefault(name, {}).update({key: found for key, found in figures.items() if "liger" in key})
    return cases


def advantage(results: Results, peer: str, case: str = "S1 reverse_kl") -> float:
    """Time of a peer over ours at no more than its memory."""
    figures = compared(results)[case]
    mine, theirs = figures[f"ours at the memory of {peer}"], figures[peer]
    if "error" in mine or mine["peak_bytes"] > 1.02 * theirs["peak_bytes"]:
        return math.nan  # it cannot be had at that memory
    return theirs["ms"] / mine["ms"]


def best_advantage(results: Results, peer: str) -> float:
    """Time of a peer at its best chunk over ours at no more than its memory."""
    case = "S1 reverse_kl, peers at their best"
    (name,) = (n for n in results["peers"][case] if n.startswith(f"{peer}, ") and "ms" in results["peers"][case][n])
    return advantage({"speed": results["peers"]}, name, case)


def sampled(results: Results, case: str, share: float = 0.1) -> float:
    """Time with gradients from a share of the columns over dense ones."""
    figures = results["speed"][f"{case}, sampled"]
    return figures[f"ours, share {share}"]["ms"] / figures["ours, share 0.0"]["ms"]


def gradient_error(results: Results) -> float:
    kinds = ("reverse_kl", "forward_kl", "jsd")
    errors = [results["correctness"][f"{kind}, KL 8e-4"]["ours"] for kind in kinds]
    return max(max(e["hidden"], e["weight"]) for e in errors)


def split_gain(results: Results, rows: int) -> float:
    """Rate of the best split dX over that of one product."""
    found = results["ceilings"][f"dX {rows}"]
    return max(v for k, v in found.items() if k.endswith(("blocks_tflops", "split_tflops"))) / found["float32_tflops"]


def sweep(results: Results, name: str) -> float:
    """Bandwidth over a copy's."""
    return results["kernels"]["row kernels"]["sweeps"][name]["TB/s"] / results["ceilings"]["copy"]["TB/s"]


def whole_step(results: Results, figure: str, case: str = "update, fused loss") -> float:
    return results["step"][case][figure]


TARGETS = [
    Line(
        "K=1, share of the FLOP floor (S1)",
        "at least 0.85",
        lambda r: ours(r, "S1 reverse_kl", "of_floor"),
        lambda x: x >= 0.85,
    ),
    Line("K=2 (S2), ms", "at most 62", lambda r: ours(r, "S2 reverse_kl"), lambda x: x <= 62, "{:.1f}"),
    Line(
        "JSD over reverse KL, K=1",
        "at most 1.07",
        lambda r: ours(r, "S1 jsd") / ours(r, "S1 reverse_kl"),
        lambda x: x <= 1.07,
    ),
    Line(
        "JSD over reverse KL, K=2",
        "at most 1.07",
        lambda r: ours(r, "S2 jsd") / ours(r, "S2 reverse_kl"),
        lambda x: x <= 1.07,
    ),
    Line(
        "half of the rows masked, over all rows",
        "at most 0.55",
        lambda r: ours(r, "S7 reverse_kl") / ours(r, "S1 reverse_kl"),
        lambda x: x <= 0.55,
    ),
    Line(
        "32,768 tokens in half a GiB, GB beyond inputs and gradients",
        "at most 2.5",
        lambda r: r["speed"]["S6 memory"]["ours, 0.5 GiB"]["peak_bytes"] / 1e9,
        lambda x: x <= 2.5,
    ),
    Line("as fast as TRL 1.16 at its memory, times", "at least 1.8", lambda r: advantage(r, "trl"), lambda x: x >= 1.8),
    Line(
        "as fast as Liger 0.8.5 at its memory, times",
        "at least 2.5",
        lambda r: advantage(r, "liger"),
        lambda x: x >= 2.5,
    ),
    Line("largest gradient error at KL 8e-4", "at most 1e-3", gradient_error, lambda x: x <= 1e-3, "{:.1e}"),
    Line(
        "a tenth of the columns, K=1 reverse KL, over dense",
        "at most 0.5",
        lambda r: sampled(r, "S1 reverse_kl"),
        lambda x: x <= 0.5,
    ),
]

PREDICTIONS = [
    Line(
        "logits of 1024 rows, float32 over bfloat16 results",
        "rate 0.93 to 1",
        lambda r: r["ceilings"]["logits 1024"]["float32_tflops"] / r["ceilings"]["logits 1024"]["narrow_tflops"],
        lambda x: x >= 0.93,
    ),
    Line(
        "dX of 512 rows, best split over one product",
        "rate 1.2 or more: 40 tiles for 132 multiprocessors",
        lambda r: split_gain(r, 512),
        lambda x: x >= 1.2,
    ),
    Line(
        "dX of 4096 rows, best split over one product",
        "rate at most 1.05",
        lambda r: split_gain(r, 4096),
        lambda x: x <= 1.05,
    ),
    Line(
        "statistics of student and teacher, over a copy",
        "bandwidth 0.85 or more",
        lambda r: sweep(r, "statistics, reverse_kl, K=1"),
        lambda x: x >= 0.85,
    ),
    Line(
        "gradient of one teacher, over a copy",
        "bandwidth 0.85 or more",
        lambda r: sweep(r, "gradient, reverse_kl, K=1"),
        lambda x: x >= 0.85,
    ),
    Line(
        "gap-domain GEMM over the library",
        "time 1.1 to 1.3",
        lambda r: r["kernels"]["Triton GEMM"]["ratio"],
        lambda x: 1.1 <= x <= 1.3,
    ),
    Line("K=1 (S1), ms on an H100", "42 to 46", lambda r: ours(r, "S1 reverse_kl"), lambda x: 42 <= x <= 46, "{:.1f}"),
    Line("K=2 (S2), ms on an H100", "61 to 67", lambda r: ours(r, "S2 reverse_kl"), lambda x: 61 <= x <= 67, "{:.1f}"),
    Line("K=2 JSD (S2), ms on an H100", "61 to 68", lambda r: ours(r, "S2 jsd"), lambda x: 61 <= x <= 68, "{:.1f}"),
    Line(
        "K=2 (S2) in 4 GiB over 1 GiB",
        "time 0.75 to 0.9: large chunks, and one block of dZ for all rows",
        lambda r: in_gib(r, "S2", 4) / in_gib(r, "S2", 1),
        lambda x: 0.75 <= x <= 0.9,
    ),
    Line(
        "as fast as TRL at its best chunk and at its memory, times",
        "1.3 or more: it computes 1.57 times the products",
        lambda r: best_advantage(r, "trl"),
        lambda x: x >= 1.3,
    ),
    Line(
        "as fast as Liger at its best chunk and at its memory, times",
        "1.5 or more: 140 bytes a logit between the products",
        lambda r: best_advantage(r, "liger"),
        lambda x: x >= 1.5,
    ),
    Line(
        "largest gradient error at KL 8e-4",
        "1.5e-3 to 2.5e-3: dZ and results are rounded to bfloat16",
        gradient_error,
        lambda x: 1.5e-3 <= x <= 2.5e-3,
        "{:.1e}",
    ),
    Line(
        "a tenth of the columns, K=1 reverse KL, over dense",
        "time 0.3 to 0.45: a dense product of four, 0.4 of the others, the row work",
        lambda r: sampled(r, "S1 reverse_kl"),
        lambda x: 0.3 <= x <= 0.45,
    ),
    Line(
        "the same for K=2",
        "time 0.25 to 0.4",
        lambda r: sampled(r, "S2 reverse_kl"),
        lambda x: 0.25 <= x <= 0.4,
    ),
    Line(
        "a tenth of the columns, JSD, over dense",
        "time 0.6 to 0.75: its forward half is dense",
        lambda r: sampled(r, "S1 jsd"),
        lambda x: 0.6 <= x <= 0.75,
    ),
    Line(
        "screened logits over bfloat16, columns from probability 1e-3",
        "time 0.6 to 0.7",
        lambda r: r["screened"]["20 live columns, exponent 1.1"]["probability 0.001"]["over_bfloat16"],
        lambda x: x <= 0.7,
    ),
    Line(
        "fused loss, share of a real update",
        "0.05 to 0.1",
        lambda r: whole_step(r, "loss_share"),
        lambda x: 0.05 <= x <= 0.1,
    ),
    Line(
        "update with logits of 2048 tokens over the fused one",
        "time 1.02 to 1.15",
        lambda r: whole_step(r, "update_seconds", "update, logits of 2048 tokens") / whole_step(r, "update_seconds"),
        lambda x: 1.02 <= x <= 1.15,
    ),
]


def tables(results: Results) -> list[str]:
    """Both tables as Markdown."""
    out = ["| target | asked | measured | reached |", "|---|---|---:|---|"]
    out += [line.row(results, "yes", "no") for line in TARGETS]
    out += ["", "| prediction | predicted | measured | held |", "|---|---|---:|---|"]
    return out + [line.row(results, "yes", "no") for line in PREDICTIONS]
