"""Time, peak memory, launches and clocks, on a CUDA device or on a CPU."""

from __future__ import annotations

import statistics
import subprocess
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch

Call = Callable[[], Any]


def synchronise() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def rotate(calls: Mapping[str, Call], *, warmups: int, rounds: int) -> dict[str, list[float]]:
    """Milliseconds of every call, taking turns; the order moves on by one in every round.

    CUDA events where there is a device, the clock otherwise.
    """
    names = list(calls)
    for name in names:
        for _ in range(warmups):
            calls[name]()
    times: dict[str, list[float]] = {name: [] for name in names}
    for round_ in range(rounds):
        shift = round_ % len(names)
        for name in names[shift:] + names[:shift]:
            times[name].append(once(calls[name]))
    return times


def once(call: Call) -> float:
    """Milliseconds of one call."""
    if not torch.cuda.is_available():
        start = time.perf_counter()
        call()
        return 1e3 * (time.perf_counter() - start)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    call()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end)


def summary(times: list[float]) -> dict[str, float]:
    """Median and interquartile range."""
    if len(times) < 2:
        return {"ms": times[0], "iqr": 0.0}
    low, middle, high = statistics.quantiles(times, n=4, method="inclusive")
    return {"ms": middle, "iqr": high - low}


def median_ms(call: Call, *, warmups: int = 3, rounds: int = 10) -> float:
    return statistics.median(rotate({"call": call}, warmups=warmups, rounds=rounds)["call"])


def peak_bytes(call: Call) -> int:
    """Largest number of bytes alive during a call, beyond what was alive before it."""
    if torch.cuda.is_available():
        synchronise()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        synchronise()
        return torch.cuda.max_memory_allocated() - before
    with torch.autograd.profiler.profile(profile_memory=True) as profile:
        kept = call()
    events = [e for e in profile.kineto_results.events() if e.name() == "[memory]"]
    alive = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        alive += event.nbytes()
        peak = max(peak, alive)
    del kept
    return peak


def launches(call: Call) -> int | None:
    """Kernels and copies that one call puts on the device."""
    if not torch.cuda.is_available():
        return None
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as found:
        call()
        synchronise()
    return sum(1 for e in found.events() if e.device_type == torch.autograd.DeviceType.CUDA)


def clocks() -> dict[str, str] | None:
    """What ``nvidia-smi`` says now; None where there is none."""
    fields = "clocks.sm,clocks.mem,power.draw,temperature.gpu,clocks_event_reasons.active"
    command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader,nounits"]
    try:
        line = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.splitlines()[0]
    except (OSError, subprocess.SubprocessError, IndexError):
        return None
    return dict(zip(fields.split(","), (x.strip() for x in line.split(",")), strict=False))


def poison() -> None:
    """Leave NaN in the memory that later allocations get."""
    if torch.cuda.is_available():
        free = min(4 << 30, torch.cuda.mem_get_info()[0] // 2)
        torch.full((free // 4,), float("nan"), device="cuda")
