"""A teacher that is asked once about given answers, and read from disk whenever they come again (``stored``)."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import uuid
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from opd_kernels import LMHead
from opdengine.config.sections import TeacherConfig
from opdengine.data.templates import Reader
from opdengine.errors import ConfigError
from opdengine.models.backbone import read_dtype
from opdengine.models.fingerprint import contents, differences
from opdengine.models.lora import read_adapted
from opdengine.models.manifest import hashes_of
from opdengine.models.rendering import thought_opening
from opdengine.teachers import Configured, Teacher, TeacherError
from opdengine.teachers.pictures import processor_fingerprint
from opdengine.teachers.remote import RemoteTeacher
from opdengine.teachers.server import ServedTeacher
from opdengine.teachers.store import Store, key_of
from opdengine.teachers.wire import DTYPES, digest_of, name_of, raw, tokenizer_fingerprint
from opdengine.types import Completion, Failure, Hidden, Request, SamplingParams, TeacherContext, TeacherTargets, TopK

FORMAT = 1
"""Raised when what is stored could be misread."""

ABOUT = "teacher.safetensors"
"""The teacher's head, and as metadata what it is."""

MOST_APART = 0.1
"""Nats, on average over the targets of an answer: what the same weights differ by in other batches is far below."""


def identity_of(
    teacher: TeacherConfig, tokenizer: Any, remote: RemoteTeacher | None = None, trust_remote_code: bool = False
) -> dict[str, str]:
    """What must be the same for a judgement to hold: weights by content, dtypes, tokenizer. Every file is read.

    Of an endpoint that tells log-probs it is what can be known: the name of the model, and how many it tells.

    Args:
        teacher: its settings.
        tokenizer: its own.
        remote: the servers of a teacher with ``hidden_states_url``, probed.
        trust_remote_code: run code that comes with the model.

    Raises:
        ConfigError: it cannot be known which weights these are.
    """
    found = {"format": str(FORMAT), "tokenizer": tokenizer_fingerprint(tokenizer)}
    if not teacher.judges_exactly:
        return {**found, "served model": teacher.model, "score_top_k": str(teacher.score_top_k)}
    if (processor := processor_fingerprint(tokenizer)) is not None:
        found["processor"] = processor
    if remote is not None:
        files: Mapping[str, str] | None = remote.about.contents
        dtype, sent = name_of(remote.about.dtype), teacher.hidden_states_dtype
    else:
        files, sent = contents(teacher.model, trust_remote_code), "auto"
        own = read_dtype(teacher.model, trust_remote_code=trust_remote_code)
        dtype = teacher.dtype if teacher.dtype != "auto" or own is None else name_of(own)
        found |= _code(teacher.model) if trust_remote_code else {}
    if files is None or "object" in files:
        raise unknown_weights(teacher)
    kept = next((name for name in (teacher.stored_dtype, sent) if name != "auto"), dtype)
    return {**found, **files, "dtype": dtype, "dtype of what is kept": kept}


def unknown_weights(teacher: TeacherConfig) -> ConfigError:
    """Of a teacher whose model is no files."""
    return ConfigError(
        f"teacher {teacher.name!r}: stored={teacher.stored!r} needs to know which weights {teacher.model!r} are; save "
        "the model with save_pretrained and name the folder"
    )


def _code(model: str) -> dict[str, str]:
    """The code that lies beside a model's weights and beside those of its base, each file with its SHA-256."""
    own = hashes_of({file.name: file for file in Path(model).expanduser().glob("*.py")})
    base = read_adapted(model)
    return own | ({} if base is None else {f"base/{name}": digest for name, digest in _code(base).items()})


def folder_of(teacher: TeacherConfig, identity: Mapping[str, str]) -> Path:
    """Where the judgements of a teacher with this identity lie: another one never meets them."""
    assert teacher.stored is not None
    return Path(teacher.stored) / digest_of(dict(identity))[:16]


def open_stored(teacher: Any, identity: Mapping[str, str]) -> StoredTeacher:
    """A loaded teacher that is asked about what is not stored yet. Its head is stored, too."""
    folder = folder_of(teacher.config, identity)
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / ABOUT).exists():
        head: LMHead | None = teacher.head
        about = {"model": teacher.config.model, "identity": dict(identity), "window": teacher.window}
        writer = getattr(teacher, "_writer", None)
        about["fingerprint"] = teacher.fingerprint.removesuffix(f" {writer.fingerprint}" if writer else "")
        tensors = {}
        if head is not None:
            about |= {"logit_scale": head.logit_scale, "softcap": head.softcap}
            tensors = {"weight": head.weight} | ({} if head.bias is None else {"bias": head.bias})
            tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        text, partial = json.dumps(about), folder / f"{ABOUT}.{uuid.uuid4().hex[:8]}"
        save_file(tensors, partial, {"about": text, "sha256": _digest(text, tensors)})
        os.replace(partial, folder / ABOUT)
    return StoredTeacher(teacher, Store(folder, teacher.config.stored_max_bytes))


def open_alone(
    teacher: TeacherConfig,
    identity: Mapping[str, str],
    tokenizer: Any,
    device: torch.device,
    writer: ServedTeacher | None = None,
) -> StoredTeacher:
    """The teacher without its network: its head and what it has said.

    Raises:
        ConfigError: nothing of it is stored, or its head is damaged.
    """
    folder = folder_of(teacher, identity)
    if not (folder / ABOUT).is_file():
        others = [_read(file)[0] for file in sorted(folder.parent.glob(f"*/{ABOUT}"))[:3]]
        said = [f"{o['model']!r} (other {', '.join(differences(o['identity'], identity)[:3])})" for o in others]
        there = "nothing that these weights have said" + (", but of " * bool(said)) + "; ".join(said)
        raise ConfigError(
            f"teacher {teacher.name!r}: stored={teacher.stored!r} holds {there}; run 'opdengine score' first, or leave "
            "stored_only out"
        )
    about, tensors = _read(folder / ABOUT)
    head = None
    if tensors:
        weight, bias = (None if (t := tensors.get(name)) is None else t.to(device) for name in ("weight", "bias"))
        assert weight is not None
        head = LMHead(weight, bias, about["logit_scale"], about["softcap"])
    unloaded = Unloaded(teacher, tokenizer, head, about["window"], about["fingerprint"], writer)
    return StoredTeacher(unloaded, Store(folder))


def _read(file: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """What is said of a teacher, and its head."""
    try:
        with safe_open(file, "pt") as parts:
            told, tensors = parts.metadata(), {name: parts.get_tensor(name) for name in parts.keys()}  # noqa: SIM118
        whole = told["sha256"] == _digest(told["about"], tensors)
    except (SafetensorError, KeyError, TypeError):
        whole = False
    if not whole:
        raise ConfigError(f"{file} is damaged; remove it, and run 'opdengine score', which writes it anew")
    return json.loads(told["about"]), tensors


def _digest(text: str, tensors: Mapping[str, torch.Tensor]) -> str:
    digest = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        digest.update(raw(tensors[name]))
    return digest.hexdigest()


class Unloaded(Configured):
    """A teacher whose network is not here: what it has said, and its head, are on disk.

    Args:
        config: its settings.
        tokenizer: its own.
        head: None of one that tells log-probs.
        window, fingerprint: as of the loaded teacher.
        writer: writes its text; None: nothing can.
    """

    def __init__(
        self,
        config: TeacherConfig,
        tokenizer: Any,
        head: LMHead | None,
        window: int | None,
        fingerprint: str,
        writer: ServedTeacher | None = None,
    ) -> None:
        self.config, self.tokenizer, self.head, self.window = config, tokenizer, head, window
        self.fingerprint = fingerprint + ("" if writer is None else f" {writer.fingerprint}")
        self.opening = thought_opening(tokenizer, config.chat_template_kwargs)
        self._reader = Reader(f"teacher {config.name!r}", tokenizer, config.chat_template_kwargs)
        self._writer = writer

    async def generate(self, requests: Sequence[Request], params: SamplingParams) -> Sequence[Completion | Failure]:
        if self._writer is not None:
            return await self._writer.generate(requests, params)
        raise TeacherError(
            f"teacher {self.name!r} was to write {len(requests)} texts, and stored_only: true runs no network; debates "
            "are read from debate.cache_dir, where they were held before: name it, or leave stored_only out"
        )

    async def score(self, contexts: Sequence[TeacherContext]) -> Sequence[TeacherTargets | Failure]:
        raise TeacherError(
            f"teacher {self.name!r}: stored={self.config.stored!r} does not hold its judgement of the answer to "
            f"{contexts[0].prompt} ({len(contexts)} in this step), and stored_only: true asks nobody; score with "
            "'opdengine score', or leave stored_only out"
        )

    def counts(self) -> dict[str, float]:
        """Of the calls to its writer."""
        return {} if self._writer is None else self._writer.counts()


class StoredTeacher(Configured):
    """A teacher with what it has said before.

    Args:
        teacher: is asked about the rest.
        store: its own.
    """

    def __init__(self, teacher: Any, store: Store) -> None:
        self.teacher: Teacher = teacher
        self.store = store
        self.config, self.tokenizer, self._reader = teacher.config, teacher.tokenizer, teacher._reader
        self._counts: Counter[str] = Counter()
        # Which weights an endpoint of log-probs has is not known by content.
        self._proved = not isinstance(teacher, ServedTeacher)

    @property
    def fingerprint(self) -> str:
        return self.teacher.fingerprint

    @property
    def window(self) -> int | None:
        return self.teacher.window

    @property
    def opening(self) -> str:
        return self.teacher.opening

    @property
    def head(self) -> LMHead | None:
        return self.teacher.head

    async def generate(self, requests: Sequence[Request], params: SamplingParams) -> Sequence[Completion | Failure]:
        return await self.teacher.generate(requests, params)

    async def score(self, contexts: Sequence[TeacherContext]) -> Sequence[TeacherTargets | Failure]:
        """What is stored of given answers, and of the others, and of sampled ones, what the teacher says now.

        Raises:
            TeacherError: with ``stored_only`` anything is not stored, or an endpoint says something else than before.
        """
        keys = [None if context.sampled else key_of(context) for context in contexts]
        given = {key: context for key, context in zip(keys, contexts, strict=True) if key is not None}
        found: dict[str, TeacherTargets | Failure] = {**await asyncio.to_thread(self.store.read, given)}
        self._counts["hits"] += len(found)
        await self._prove([(given[key], targets) for key, targets in found.items()])
        found |= await self._ask({key: context for key, context in given.items() if key not in found})
        self._counts["damaged"] += self.store.damaged
        self.store.damaged = 0
        # In a call of their own, so that their numbers do not depend on what is stored by now: a resumed run has them.
        sampled = [context for context in contexts if context.sampled]
        rest = iter(await self.teacher.score(sampled) if sampled else ())
        return [next(rest) if key is None else found[key] for key in keys]

    async def _ask(self, missing: Mapping[str, TeacherContext]) -> dict[str, TeacherTargets | Failure]:
        """What the teacher says, as a later epoch will read it; it is stored then."""
        if not missing:
            return {}
        self._counts["misses"] += len(missing)
        said = dict(zip(missing, await self.teacher.score(list(missing.values())), strict=True))
        if self.config.stored_dtype != "auto":
            dtype = DTYPES[self.config.stored_dtype]
            said |= {key: Hidden(t.states.to(dtype)) for key, t in said.items() if isinstance(t, Hidden)}
        good = {key: targets for key, targets in said.items() if not isinstance(targets, Failure)}
        if good and not await asyncio.to_thread(self.store.write, good):
            self._counts["beyond_max_bytes"] += len(good)
        return said

    async def _prove(self, hits: Sequence[tuple[TeacherContext, TeacherTargets | Failure]]) -> None:
        """Once in a run, ask an endpoint again about one answer that is stored."""
        if self._proved or not hits:
            return
        context, before = hits[0]
        (now,) = await self.teacher.score([context])
        if isinstance(now, Failure) or not (isinstance(now, TopK) and isinstance(before, TopK)):
            return  # the next step tries again
        apart = float(np.abs(now.logprobs[:, 0] - before.logprobs[:, 0]).mean())
        if not apart <= MOST_APART:
            raise TeacherError(
                f"teacher {self.name!r} now says otherwise than what {self.store.folder} holds: the log-probs of an "
                f"answer differ by {apart:.3g} nats on average. Other weights are served under the same name: serve "
                "those of before, or name another folder with 'stored'"
            )
        self._proved = True

    def counts(self) -> dict[str, float]:
        """Judgements that were read, asked for, damaged and not kept since the last call, beside the teacher's own."""
        own = {f"stored/{what}/{self.name}": float(count) for what, count in self._counts.items()}
        self._counts.clear()
        return own | self.teacher.counts()
