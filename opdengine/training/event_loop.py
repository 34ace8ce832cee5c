"""Coroutines run to their end also where an event loop runs already, as in a notebook."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from threading import Thread
from typing import Any, TypeVar

import torch

T = TypeVar("T")


def run_coroutine(work: Coroutine[Any, Any, T], may_cancel: Callable[[], bool] = lambda: True) -> T:
    """Return what a coroutine returns.

    Where this thread runs an event loop, another thread runs the coroutine in a loop of its own, and this one waits.
    An exception that reaches the waiting thread (of a signal) cancels the coroutine, and is raised when it has ended.

    Args:
        work: the coroutine.
        may_cancel: asked in the coroutine's loop, between two of its moves; where it says no, the coroutine learns of
            the signal itself.
    """
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(work)
    return _in_thread(work, may_cancel)


def _in_thread(work: Coroutine[Any, Any, T], may_cancel: Callable[[], bool]) -> T:
    result: Future[T] = Future()
    running: Future[tuple[asyncio.AbstractEventLoop, asyncio.Task[Any]]] = Future()
    device = torch.cuda.current_device() if torch.cuda.is_available() else None

    async def watched() -> T:
        task = asyncio.current_task()
        assert task is not None
        running.set_result((asyncio.get_running_loop(), task))
        return await work

    def target() -> None:
        try:
            if device is not None:  # a new thread is on the first one
                torch.cuda.set_device(device)
            result.set_result(asyncio.run(watched()))
        except BaseException as error:
            result.set_exception(error)

    thread = Thread(target=contextvars.copy_context().run, args=(target,), name="opdengine event loop")
    thread.start()
    try:
        return result.result()
    except BaseException:
        if not result.done():
            loop, task = running.result()
            with contextlib.suppress(RuntimeError):  # the loop was closed meanwhile: the coroutine has ended
                loop.call_soon_threadsafe(lambda: task.cancel() if may_cancel() else None)
        raise
    finally:
        thread.join()
