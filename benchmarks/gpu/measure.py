"""Time, peak memory, launches and clocks, on a CUDA device or on a CPU."""

from __future__ import annotations

import gc
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


def release() -> None:
    """Give device memory back that nothing uses."""
    if torch.cuda.is_available():
        gc.collect()
        torch.cuda.empty_cache()


def rotate(calls: Mapping[str, Call], *, warmups: int, rounds: int) -> dict[str, list[float]]:
    """Milliseconds of every call, taking turns; the order moves on by one in every round.

    CUDA events where there is a device, see ``once`` otherwise.
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
    """Milliseconds of one call.

    A single CPU thread is measured by the processor time it used, which other programs on the machine
    do not stretch; several threads by the clock, since they spend processor time waiting for each other.
    """
    if not torch.cuda.is_available():
        clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
        start = clock()
        call()
        return 1e3 * (clock() - start)
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


def temporary_bytes(call: Call, result_bytes: int) -> int:
    """Largest number of bytes alive during a call, beyond what was alive before it and the
    ``result_bytes`` of what it returns.

    On a CPU allocations that outlive the call are left out one by one. A CUDA device reports its peak
    only: the results are subtracted from it, which favours calls whose peak comes before them.
    """
    if not torch.cuda.is_available():
        return _traced_bytes(call)
    synchronise()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    synchronise()
    return torch.cuda.max_memory_allocated() - before - result_bytes


def _traced_bytes(call: Call) -> int:
    from torch._C._profiler import _EventType
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as trace:
        kept = call()
    assert trace.profiler is not None and trace.profiler.kineto_results is not None
    pending, events = list(trace.profiler.kineto_results.experimental_event_tree()), []
    while pending:
        event = pending.pop()
        pending.extend(event.children)
        if event.tag == _EventType.Allocation:
            events.append((event.start_time_ns, event.extra_fields.ptr, event.extra_fields.alloc_size))
    events.sort()
    open_: dict[int, int] = {}
    for place, (_, address, size) in enumerate(events):
        if size > 0:
            open_[address] = place
        else:
            open_.pop(address, None)
    outlive = set(open_.values())
    alive = peak = 0
    for place, (_, _, size) in enumerate(events):
        if place not in outlive:
            alive += size
            peak = max(peak, alive)
    del kept
    return peak


def kernels(call: Call) -> list[tuple[str, float]] | None:
    """Name and milliseconds of every kernel and copy that one call puts on the device."""
    if not torch.cuda.is_available():
        return None
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as found:
        call()
        synchronise()
    events = [e for e in found.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    return [(e.name, e.time_range.elapsed_us() / 1e3) for e in events]


def by_kernel(found: list[tuple[str, float]], most: int = 16) -> dict[str, list[float]]:
    """[launches, milliseconds] of the kernels that take longest, by the beginning of their names."""
    total: dict[str, list[float]] = {}
    for name, ms in found:
        entry = total.setdefault(name[:90], [0, 0.0])
        entry[0] += 1
        entry[1] = round(entry[1] + ms, 4)
    return dict(sorted(total.items(), key=lambda item: -item[1][1])[:most])


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
