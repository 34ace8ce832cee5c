"""Files that git-LFS keeps elsewhere, of which a clone without it has pointers alone."""

from __future__ import annotations

from pathlib import Path

from opdengine.errors import ModelFileError

POINTER = b"version https://git-lfs.github.com/spec/"
LARGEST = 1024
"""Bytes; a pointer has about 130."""


def require_no_pointer(file: Path) -> None:
    """Raise ModelFileError for the pointer of a file that was never fetched."""
    if not file.is_file() or file.stat().st_size > LARGEST:
        return
    with file.open("rb") as content:
        if content.read(len(POINTER)) != POINTER:
            return
    raise ModelFileError(
        f"{str(file)!r} is a git-LFS pointer, not the file itself: run 'git lfs install' and 'git lfs pull' in "
        f"{str(file.parent)!r}"
    )


def require_no_pointers(folder: Path) -> None:
    """The same for every file of a folder."""
    for file in sorted(folder.iterdir()):
        require_no_pointer(file)
