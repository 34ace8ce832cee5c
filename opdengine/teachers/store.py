"""What one teacher has said about given tokens, in a folder on disk.

A process writes into two files of its own. ``NAME.data`` holds the bytes of judgements one behind another;
``NAME.index`` has one line for each call that the teacher has answered, written last and with a checksum.
So a call is there as a whole or not at all, whenever a process is killed, and readers need no locks. Several processes
may fill a folder that others read.
"""

from __future__ import annotations

import hashlib
import json
import logging
import time
import uuid
from collections.abc import Collection, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch

from opdengine.teachers.wire import DTYPES, name_of, raw
from opdengine.types import Hidden, TeacherContext, TeacherTargets, TopK

logger = logging.getLogger(__name__)

STATES = {**DTYPES, "float64": torch.float64}
"""In which hidden states are stored."""

TOP_K = "top_k"
"""How the index calls lists of log-probs; hidden states have the name of their dtype."""


@dataclass(frozen=True)
class Place:
    """Where a judgement lies.

    Args:
        file: that holds it.
        start: its first byte.
        kind: a name in :data:`STATES`, or :data:`TOP_K`.
        shape: [T, d] of hidden states, [T, k] of lists.
        digest: of its bytes.
    """

    file: Path
    start: int
    kind: str
    shape: tuple[int, int]
    digest: str


@dataclass
class Store:
    """The judgements of one teacher by :func:`key_of` their context.

    Args:
        folder: is made with the first judgement.
        max_bytes: most bytes of the folder; what would exceed them is not kept. None: no limit.
        damaged: pieces that were found damaged since this was last set to 0.
    """

    folder: Path
    max_bytes: int | None = None
    damaged: int = 0
    _places: dict[str, list[Place]] = field(default_factory=dict)
    _seen: dict[Path, int] = field(default_factory=dict)
    _full: bool = False

    def __post_init__(self) -> None:
        self._own = f"{time.time_ns():016x}_{uuid.uuid4().hex[:8]}"  # of this process alone; names sort by age

    @property
    def size(self) -> int:
        """Bytes of all files, those of other processes too."""
        endings = (".data", ".index", ".safetensors")  # a head that is being written ends otherwise, and is renamed
        return sum(file.stat().st_size for file in self.folder.glob("*") if file.suffix in endings)

    def read(self, keys: Collection[str]) -> dict[str, TeacherTargets]:
        """What is there, and whole, of some judgements. What is damaged is said, and never returned."""
        self._refresh()
        found = {}
        with ExitStack() as files:
            opened: dict[Path, IO[bytes] | None] = {}
            for key in keys:
                for place in list(self._places.get(key, ())):
                    if place.file not in opened:
                        there = place.file.is_file()
                        opened[place.file] = files.enter_context(place.file.open("rb")) if there else None
                    if (targets := _read_at(opened[place.file], place)) is not None:
                        found[key] = targets
                        break
                    self._places[key].remove(place)
                    self._complain(place.file, f"the judgement at byte {place.start}")
        return found

    def write(self, judgements: Mapping[str, TeacherTargets]) -> bool:
        """Keep the judgements of one call, all of them or none.

        Returns:
            Whether they were kept; else they would have exceeded ``max_bytes``.

        Raises:
            OSError: they could not be written; nothing of them will be read.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        data, index = (self.folder / f"{self._own}.{ending}" for ending in ("data", "index"))
        start = data.stat().st_size if data.exists() else 0
        lines, parts = list[Any](), list[memoryview]()
        for key, targets in judgements.items():
            kind, shape, content = _encoded(targets)
            lines.append([key, start, kind, shape, _digest(content)])
            parts.append(content)
            start += len(content)
        body = json.dumps(lines)
        line = f"{_digest(body.encode())} {body}\n".encode()
        if self.max_bytes is not None and self.size + sum(map(len, parts)) + len(line) > self.max_bytes:
            if not self._full:
                logger.warning("%s has reached stored_max_bytes=%d: no more is kept", self.folder, self.max_bytes)
            self._full = True
            return False
        with data.open("ab") as file:
            file.writelines(parts)
        with index.open("ab") as file:  # an unbuffered file would cut the line at a full disk, and say nothing
            file.write(line)
        return True

    def _refresh(self) -> None:
        """Read what has been added to the indices, by whichever process."""
        for file in sorted(self.folder.glob("*.index")):
            known, begin = file in self._seen, self._seen.get(file, 0)
            with file.open("rb") as lines:
                lines.seek(begin)
                text = lines.read()
            end = text.rfind(b"\n") + 1
            for line in text[:end].splitlines():
                self._add(file, line)
            if end < len(text) and not known:
                logger.warning("%s ends within a line: a process was killed there, and nothing of it is used", file)
            self._seen[file] = begin + end

    def _add(self, file: Path, line: bytes) -> None:
        digest, _, body = line.partition(b" ")
        if digest.decode("latin-1") != _digest(body):
            self._complain(file, "a line")
            return
        for key, start, kind, shape, own in json.loads(body):
            place = Place(file.with_suffix(".data"), start, kind, (shape[0], shape[1]), own)
            self._places.setdefault(key, []).append(place)

    def _complain(self, file: Path, what: str) -> None:
        self.damaged += 1
        logger.warning("%s: %s is damaged (its checksum is another), and is not used", file, what)


def key_of(context: TeacherContext) -> str:
    """Identifies what a teacher reads, and which of its tokens it judges: token ids, positions and pictures."""
    images = [(image.sha256, image.width, image.height) for image in context.images]
    digest = hashlib.sha256(json.dumps([len(context.token_ids), images]).encode())
    for numbers in (context.token_ids, context.target_positions):
        digest.update(numbers.astype("<i8").tobytes())
    return digest.hexdigest()[:32]


def _digest(content: bytes | memoryview) -> str:
    return hashlib.sha256(content).hexdigest()[:32]


def _encoded(targets: TeacherTargets) -> tuple[str, list[int], memoryview]:
    if isinstance(targets, Hidden):
        states = targets.states.contiguous()
        return name_of(states.dtype), list(states.shape), raw(states)
    content = targets.ids.astype(np.int32).tobytes() + targets.logprobs.astype(np.float32).tobytes()
    return TOP_K, list(targets.ids.shape), memoryview(content)


def _read_at(file: IO[bytes] | None, place: Place) -> TeacherTargets | None:
    """The judgement at a place; None where its bytes are missing or others."""
    if file is None:
        return None
    lists = place.kind == TOP_K
    shape = (2, *place.shape) if lists else place.shape
    found = torch.empty(shape, dtype=torch.int32 if lists else STATES[place.kind])
    content = raw(found)
    file.seek(place.start)
    if file.readinto(content) != len(content) or _digest(content) != place.digest:  # type: ignore[attr-defined]
        return None
    if not lists:
        return Hidden(found)
    ids, logprobs = found.numpy()
    return TopK(ids.astype(np.int64), logprobs.view(np.float32))
