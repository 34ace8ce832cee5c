"""Removes what a program has left in a folder, however deep, and whatever modes it was given.

Used on both sides of the wall and by the guards of workers, so the standard library alone.
"""

from __future__ import annotations

import os
import stat
import uuid


def empty_folder(folder: str) -> None:
    """Remove everything in a folder. Nothing may run meanwhile that could write there.

    Folders that others lie in are moved up before they are opened, so no path is ever long and nothing recurses.

    Raises:
        OSError: something cannot be removed.
    """
    _open_up(folder)
    unused = os.path.join(folder, uuid.uuid4().hex)
    waiting = [os.path.join(folder, name) for name in os.listdir(folder)]
    moved = 0
    while waiting:
        path = waiting.pop()
        if not stat.S_ISDIR(os.lstat(path).st_mode):
            os.unlink(path)
            continue
        _open_up(path)
        for name in os.listdir(path):
            inner = os.path.join(path, name)
            if stat.S_ISDIR(os.lstat(inner).st_mode):
                _open_up(inner)
                waiting.append(f"{unused}{moved}")
                os.rename(inner, waiting[-1])
                moved += 1
            else:
                os.unlink(inner)
        os.rmdir(path)


def remove_folder(folder: str) -> None:
    """Remove a folder with everything in it; one that is not there is removed already.

    Raises:
        OSError: something cannot be removed.
    """
    if os.path.lexists(folder):
        empty_folder(folder)
        os.rmdir(folder)


def _open_up(folder: str) -> None:
    """Let the owner list, enter and change it."""
    mode = os.stat(folder).st_mode
    if mode & stat.S_IRWXU != stat.S_IRWXU:
        os.chmod(folder, stat.S_IMODE(mode) | stat.S_IRWXU)
