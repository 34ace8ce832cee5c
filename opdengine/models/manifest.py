"""A manifest lists the files of a checkpoint with hashes, so that damage is noticed before anything is trained on it.

Large files are hashed in parts, in threads, while the system still writes them to the disk: the hash of a
file of one part is what ``sha256sum`` prints.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from opdengine.models.files import some, tensor_shapes

MANIFEST = "manifest.json"
STATE = "state.json"
PART_BYTES = 1 << 28
BLOCK_BYTES = 1 << 20

Files = dict[str, list[str]]
"""Place of a file in the folder -> SHA-256 of each of its parts."""


def seal(folder: Path, step: int) -> None:
    """Write a finished folder to the disk, and last of all its manifest."""
    files = {str(file.relative_to(folder)): file for file in sorted(folder.rglob("*")) if file.is_file()}
    with ThreadPoolExecutor(_threads()) as pool:
        hashes = {name: _hashes(pool, file, PART_BYTES) for name, file in files.items()}
        for file in files.values():
            flush(file)
        body = {"step": step, "part_bytes": PART_BYTES, "files": {name: list(found) for name, found in hashes.items()}}
    (folder / MANIFEST).write_text(json.dumps({**body, "sha256": _own(body)}, indent=1), "utf-8")
    flush(folder / MANIFEST)


def hashes_of(files: Mapping[str, Path]) -> dict[str, str]:
    """One hash for each of some files, by their names here; that of a file of one part is what ``sha256sum`` prints."""
    with ThreadPoolExecutor(_threads()) as pool:
        parts = {name: _hashes(pool, file, PART_BYTES) for name, file in files.items()}
        found = {name: list(digests) for name, digests in parts.items()}
    return {
        name: digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()
        for name, digests in found.items()
    }


def flush(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def find_damage(checkpoint: Path) -> str | None:
    """Return what is wrong with a checkpoint, with the name of the file; None where it is whole.

    Of one without a manifest, which earlier versions wrote, only the form of the files can be checked.
    """
    try:
        state = _read_object(checkpoint / STATE)
        if not (checkpoint / MANIFEST).is_file() and not state.get("manifest"):
            return _wrong_step(checkpoint, state) or _bad_form(checkpoint)
        manifest = _read_object(checkpoint / MANIFEST)
        told = manifest.pop("sha256", None)
        if told != _own(manifest):
            return f"{MANIFEST} is not what was written"
        return _wrong_step(checkpoint, manifest) or _difference(checkpoint, manifest["files"], manifest["part_bytes"])
    except (OSError, ValueError) as error:
        return str(error)


def has_manifest(checkpoint: Path) -> bool:
    """Whether the contents of a checkpoint can be checked."""
    return (checkpoint / MANIFEST).is_file()


def _difference(checkpoint: Path, files: Files, part_bytes: int) -> str | None:
    """The first file that is not what the manifest says."""
    if missing := [name for name in files if not (checkpoint / name).is_file()]:
        return f"{some(missing)} is missing"
    beside = [path for path in (checkpoint / "model").rglob("*") if path.is_file() and not path.name.startswith(".")]
    if added := sorted(
        {str(p.relative_to(checkpoint)) for p in beside} - files.keys()
    ):  # it may be read with the model
        return f"{some(added)} was added to it"
    with ThreadPoolExecutor(_threads()) as pool:
        hashes = {name: _hashes(pool, checkpoint / name, part_bytes) for name in files}
        for name, now in hashes.items():
            if list(now) != files[name]:
                pool.shutdown(cancel_futures=True)
                return f"{name} is not what was written"
    return None


def _wrong_step(checkpoint: Path, told: Mapping[str, Any]) -> str | None:
    """Whether a checkpoint lies under the name of another one."""
    step = told.get("step")
    number = checkpoint.name.removeprefix("step_")
    if checkpoint.name.startswith("step_") and number.isdecimal() and number != str(step):
        return f"it is the checkpoint of step {step}"
    return None


def _bad_form(checkpoint: Path) -> str | None:
    for file in sorted(checkpoint.rglob("*.safetensors")):
        tensor_shapes(file)  # raises
    return None


def _read_object(file: Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
        ValueError: the file is missing, or holds something else.
    """
    if not file.is_file():
        raise ValueError(f"{file.name} is missing")
    try:
        value = json.loads(file.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file.name} is not JSON ({error})") from error
    if not isinstance(value, dict):
        raise ValueError(f"{file.name} is not a JSON object")
    return value


def _own(body: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def _hashes(pool: ThreadPoolExecutor, file: Path, size: int) -> Iterator[str]:
    """Hashes of the parts of a file, an empty one being one part; they are computed in the pool at once."""
    starts = range(0, max(file.stat().st_size, 1), size)
    return pool.map(lambda start: _hash(file, start, size), starts)


def _hash(file: Path, start: int, size: int) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as content:
        content.seek(start)
        while size and (block := content.read(min(size, BLOCK_BYTES))):
            digest.update(block)
            size -= len(block)
    return digest.hexdigest()


def _threads() -> int:
    return min(os.cpu_count() or 1, 16)
