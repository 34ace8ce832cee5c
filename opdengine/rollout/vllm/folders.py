"""Folders of this process alone for weight files, which engines on this machine read, and for logs."""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import IO

PREFIX, LOCK = "opdengine-vllm-", ".lock"
_locks: dict[str, IO[str]] = {}


def private_folders(base: str | None = None) -> list[str]:
    """New folders for weight files, best first; the last one also takes logs.

    Args:
        base: make one folder here; None: in shared memory if there is any, and in ``TMPDIR``.
    """
    bases = [base or tempfile.gettempdir()]
    if base is None and os.access("/dev/shm", os.W_OK):
        bases.insert(0, "/dev/shm")
    for folder in bases:
        _sweep(folder)
    return [_lock_folder(tempfile.mkdtemp(prefix=PREFIX, dir=folder)) for folder in bases]


def remove_folders(folders: Iterable[str]) -> None:
    """Undo :func:`private_folders`."""
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)
        _locks.pop(folder, None)


def _lock_folder(folder: str) -> str:
    """Hold a lock in the folder for as long as this process lives."""
    lock = open(Path(folder) / "new", "w")  # noqa: SIM115
    fcntl.flock(lock, fcntl.LOCK_EX)
    (Path(folder) / "new").rename(Path(folder) / LOCK)
    _locks[folder] = lock
    return folder


def _sweep(base: str) -> None:
    """Remove what processes that were killed have left: folders whose lock nobody holds."""
    for lock in Path(base).glob(f"{PREFIX}*/{LOCK}"):
        try:
            with lock.open("r+") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(lock.parent, ignore_errors=True)
        except OSError:
            pass  # in use, gone, or of another user


def path_with_room(folders: Sequence[str], name: str, size: int) -> str:
    """A new path with room for ``size`` bytes, in the first folder that has it.

    Raises:
        OSError: none has.
    """
    for folder in folders:
        if shutil.disk_usage(folder).free > size * 1.05 + (1 << 20):
            return str(Path(folder) / f"{name}-{time.monotonic_ns()}.safetensors")
    raise OSError(
        f"no room for a policy of {size / 2**30:.2f} GiB beside the last one in any of {list(folders)}; free some, or "
        "set TMPDIR to a larger disk"
    )
