"""Starts one worker process and leaves nothing of it behind, however it or its owner ends.

A program of the standard library alone, run by path: ``python -P guard.py '{"channel": FD, ...}'``. It forks
the worker and waits until the worker ends, the owner closes the channel or the owner is gone (killed
included). Then it kills every process that descends from the worker, daemons too, since orphans are handed
to the guard (Linux: PR_SET_CHILD_SUBREAPER), and removes the worker's folder. A command is first told to end.
"""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import importlib
import json
import os
import runpy
import select
import signal
import sys
import time
from typing import Any, NoReturn

PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36
OWNER_SECONDS, LEAVE_SECONDS = 1.0, 10.0
TIDY = os.path.join(os.path.dirname(os.path.abspath(__file__)), "tidy.py")
HANG_UP = select.POLLHUP | select.POLLERR | getattr(select, "POLLRDHUP", 0)


def main(config: dict[str, Any]) -> int:
    """Run one worker to its end.

    Args:
        config: ``channel`` (file descriptor of the socket to the owner), ``owner`` (its process id),
            ``folder`` (removed at the end), ``left`` (folders, removed as well if the owner is gone), ``path`` (the
            owner's ``sys.path``), ``module`` (its ``serve`` is called in the worker with the channel), ``command``
            (executed instead).

    Returns:
        The worker's exit code; 128 plus the signal that ended it.
    """
    _prctl(PR_SET_CHILD_SUBREAPER, 1)
    ended, tell = os.pipe()
    for end in (ended, tell):
        os.set_blocking(end, False)
    signal.set_wakeup_fd(tell)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    tidy = runpy.run_path(TIDY)
    guard = os.getpid()
    worker = os.fork()
    if worker == 0:
        os.close(ended)
        os.close(tell)
        _become_worker(config, guard)
    code, hung_up = None, False
    try:
        waiting = select.poll()
        waiting.register(config["channel"], HANG_UP)
        waiting.register(ended, select.POLLIN)
        while code is None and not hung_up and os.getppid() == config["owner"]:
            events = dict(waiting.poll(OWNER_SECONDS * 1000))
            if ended in events:
                os.read(ended, 4096)
            code = _reap(worker)
            hung_up = bool(events.get(config["channel"], 0) & HANG_UP)
    finally:
        if config["command"] and code is None:
            _let_leave(worker)
        _kill_children()
        gone = bool(config["left"]) and _is_gone(config["owner"], OWNER_SECONDS if hung_up else 0.0)
        for folder in (config["folder"], *(config["left"] if gone else ())):
            with contextlib.suppress(OSError):  # the owner removes what is left, and says so
                tidy["remove_folder"](folder)
    return 128 + signal.SIGKILL if code is None else code


def _let_leave(worker: int) -> None:
    """Tell it to end and give it the time."""
    with contextlib.suppress(OSError):
        os.kill(worker, signal.SIGTERM)
    deadline = time.monotonic() + LEAVE_SECONDS
    while _reap(worker) is None and time.monotonic() < deadline:
        time.sleep(0.05)


def _is_gone(owner: int, seconds: float) -> bool:
    """Whether the owner is gone, or is within so many seconds: its end of the channel closes a moment before."""
    deadline = time.monotonic() + seconds
    while os.getppid() == owner and time.monotonic() < deadline:
        time.sleep(0.02)
    return os.getppid() != owner


def _become_worker(config: dict[str, Any], guard: int) -> NoReturn:
    _prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != guard:
        os._exit(1)  # it died before it could take this process along
    faulthandler.enable()
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if config["command"]:
        os.execvp(config["command"][0], config["command"])
    sys.path[:] = config["path"]
    importlib.import_module(config["module"]).serve(config["channel"])
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def _reap(worker: int) -> int | None:
    """Collect the children that have ended; the worker's exit code if it is among them."""
    code = None
    with contextlib.suppress(ChildProcessError):
        while (ended := os.waitpid(-1, os.WNOHANG))[0]:
            if ended[0] == worker:
                status = os.waitstatus_to_exitcode(ended[1])
                code = status if status >= 0 else 128 - status
    return code


def _kill_children() -> None:
    """Kill children until there are none: those of a killed child become children of this process."""
    while True:
        for child in _children():
            with contextlib.suppress(OSError):
                os.kill(child, signal.SIGKILL)
        try:
            os.waitpid(-1, 0)
        except ChildProcessError:
            return


def _children() -> list[int]:
    """Process ids whose parent is this process."""
    found = []
    for name in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError), open(f"/proc/{name}/stat", "rb") as stat:
            if int(stat.read().rpartition(b")")[2].split()[1]) == os.getpid():
                found.append(int(name))
    return found


def _prctl(option: int, value: int) -> None:
    if ctypes.CDLL(None, use_errno=True).prctl(option, value, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), f"prctl({option}) failed")


if __name__ == "__main__":
    sys.exit(main(json.loads(sys.argv[1])))
