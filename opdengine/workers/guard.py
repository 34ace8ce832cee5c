"""Starts one worker process and leaves nothing of it behind, however it or its owner ends.

A program of the standard library alone, run by path: ``python -P guard.py '{"channel": FD, ...}'``. It forks
the worker and waits until the worker ends, the owner closes the channel or the owner is gone (killed
included). Then it kills every process that descends from the worker, daemons too, since orphans are handed
to the guard (Linux: PR_SET_CHILD_SUBREAPER), and removes the worker's folder.
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
from typing import Any, NoReturn

PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36
OWNER_SECONDS = 1.0
TIDY = os.path.join(os.path.dirname(os.path.abspath(__file__)), "tidy.py")
HANG_UP = select.POLLHUP | select.POLLERR | getattr(select, "POLLRDHUP", 0)


def main(config: dict[str, Any]) -> int:
    """Run one worker to its end.

    Args:
        config: ``channel`` (file descriptor of the socket to the owner), ``owner`` (its process id),
            ``folder`` (removed at the end), ``path`` (the owner's ``sys.path``), ``module`` (its ``serve`` is
            called in the worker with the channel).

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
    code = None
    try:
        waiting = select.poll()
        waiting.register(config["channel"], HANG_UP)
        waiting.register(ended, select.POLLIN)
        while code is None and os.getppid() == config["owner"]:
            events = dict(waiting.poll(OWNER_SECONDS * 1000))
            if ended in events:
                os.read(ended, 4096)
            code = _reap(worker)
            if events.get(config["channel"], 0) & HANG_UP:
                break
    finally:
        _kill_children()
        with contextlib.suppress(OSError):  # the owner removes what is left, and says so
            tidy["remove_folder"](config["folder"])
    return 128 + signal.SIGKILL if code is None else code


def _become_worker(config: dict[str, Any], guard: int) -> NoReturn:
    _prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != guard:
        os._exit(1)  # it died before it could take this process along
    faulthandler.enable()
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
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
