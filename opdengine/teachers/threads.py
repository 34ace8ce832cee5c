"""One thread per device: what computes there takes turns, and the event loop goes on meanwhile."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any, TypeVar

import torch

T = TypeVar("T")


async def work_on(device: torch.device, function: Callable[..., T], *arguments: Any) -> T:
    """Call a function in the thread of a device, in the order in which this is called."""
    return await asyncio.get_running_loop().run_in_executor(_thread(device), function, *arguments)


@cache
def _thread(device: torch.device) -> ThreadPoolExecutor:
    set_device = torch.cuda.set_device if device.type == "cuda" else lambda _: None
    return ThreadPoolExecutor(1, f"teachers on {device}", initializer=set_device, initargs=(device,))
