"""Files that look like a model and are none that can be trained: pointers of git-LFS, and GGUF files."""

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


def require_no_gguf(path: str) -> None:
    """Raise ModelFileError for a model that is a GGUF file, or a folder that holds nothing else."""
    place = Path(path)
    files = sorted(place.glob("*.gguf")) if place.is_dir() and not (place / "config.json").exists() else []
    if path.endswith(".gguf"):
        files = [place]
    if files:
        raise ModelFileError(
            f"{str(files[0])!r} is a GGUF file, whose quantised weights cannot be trained; convert it once with "
            f"'opdengine fetch {files[0]} --out FOLDER' and name FOLDER instead"
        )
