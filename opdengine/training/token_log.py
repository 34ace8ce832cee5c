"""What is known of every token of a step, as compressed arrays: ``tokens/step_N.npz`` beside ``rollouts/step_N.jsonl``.

T targets, K teachers, L tokens of a sample. A file holds every field of all its samples end to end, and each field's
shapes; :func:`read_tokens` takes it apart again. With :func:`recompute_loss` a step's loss follows from its file alone.
"""

from __future__ import annotations

import json
import re
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from opdengine.types import DIVERGENCES, Sample, TopK

SAMPLED = 8
"""Rollouts of a step whose tokens are logged with ``log_tokens: sample``."""
ALTERNATIVES = 5
"""Tokens of a served teacher's list that are kept for each target."""

Arrays = Mapping[str, np.ndarray]

NOTED = (
    "student_logprob",
    "student_entropy",
    "teacher_logprob",
    "teacher_entropy",
    "teacher_top1",
    "reverse_kl",
    "divergence",
)
"""Fields that the loss tells (:class:`opdengine.loss.statistics.Statistics`), or else the measures before it."""
GIVEN = ("kl_weight", "advantage", "mix", "turn_weight", "sampler_logprob", "policy_logratio", "sampler_logratio")
"""Fields that are the sample's own."""


def logged(samples: Sequence[Sample], log_tokens: str, processes: int = 1) -> list[Sample]:
    """The samples of this process whose tokens are logged: none, the first ones (whole groups mostly), or all."""
    if log_tokens == "none":
        return []
    return list(samples if log_tokens == "all" else samples[: -(-SAMPLED // processes)])


def token_arrays(sample: Sample) -> dict[str, np.ndarray]:
    """The fields of one sample, but for what the loss tells of its targets, which may stand on another rank.

    Args:
        sample: at the end of its step, with what its teachers said.

    Returns:
        ``token_ids`` int32 [L] and ``is_target`` bool [L]; ``context_ids`` int32 and ``context_is_target`` bool, of all
        teachers end to end, and their lengths ``context_lengths`` int32 [K]; ``scale`` float64 [1], the loss
        denominator; float32 [T] or [T, K] the fields of :data:`NOTED` and :data:`GIVEN`, NaN where nothing was
        computed; ``divergence_kind`` int32 [T], places in :data:`opdengine.types.DIVERGENCES`; of served teachers
        ``alternatives`` int32 and ``alternatives_logprob`` float32 [T, K, n]. What is not known is left out.
    """
    found = {
        "token_ids": sample.token_ids.astype(np.int32),
        "is_target": _marked(len(sample.token_ids), sample.target_positions),
        "scale": np.array([sample.scale]),
    }
    if sample.contexts:
        found["context_ids"] = np.concatenate([c.token_ids for c in sample.contexts]).astype(np.int32)
        found["context_is_target"] = np.concatenate(
            [_marked(len(c.token_ids), c.target_positions) for c in sample.contexts]
        )
        found["context_lengths"] = np.array([len(c.token_ids) for c in sample.contexts], dtype=np.int32)
    for name in (*NOTED, *GIVEN):
        value = getattr(sample, name, None)
        if value is not None:
            found[name] = np.asarray(value, dtype=np.float32)
    if sample.divergence_kind is not None:
        found["divergence_kind"] = np.array(
            [DIVERGENCES.index(kind) for kind in sample.divergence_kind], dtype=np.int32
        )
    return found | _alternatives(sample)


def _marked(length: int, positions: np.ndarray) -> np.ndarray:
    marks = np.zeros(length, dtype=bool)
    marks[positions] = True
    return marks


def _alternatives(sample: Sample) -> dict[str, np.ndarray]:
    """The likeliest tokens of the teachers that told some; the others have the id -1."""
    if not any(isinstance(targets, TopK) for targets in sample.teacher_targets):
        return {}
    shape = (len(sample.target_ids), len(sample.teacher_targets), ALTERNATIVES)
    ids, logprobs = np.full(shape, -1, dtype=np.int32), np.full(shape, np.nan, dtype=np.float32)
    for k, targets in enumerate(sample.teacher_targets):
        if isinstance(targets, TopK):
            order = np.argsort(-targets.logprobs, axis=1, kind="stable")[:, :ALTERNATIVES]
            ids[:, k, : order.shape[1]] = np.take_along_axis(targets.ids, order, axis=1)
            logprobs[:, k, : order.shape[1]] = np.take_along_axis(targets.logprobs, order, axis=1)
    return {"alternatives": ids, "alternatives_logprob": logprobs}


@dataclass
class Pieces:
    """Text of single tokens, so that whoever reads a log needs no tokenizer.

    Args:
        tokenizer: the student's.
    """

    tokenizer: Any
    _known: dict[int, str] = field(default_factory=dict)

    def __call__(self, ids: Iterable[int]) -> dict[int, str]:
        """The text of each id; bytes that are a part of a character stand as ``<F0 9F>``."""
        return {token: self._known.setdefault(token, self._piece(token)) for token in ids}

    def _piece(self, token: int) -> str:
        if token in self._known:
            return self._known[token]
        name = self.tokenizer.convert_ids_to_tokens(token)
        if name is None:  # a padding row of the head
            return f"[{token}]"
        text = str(self.tokenizer.decode([token]))
        if "\ufffd" in text:
            return _bytes_of(str(name)) or text
        # SentencePiece leaves out the space before the first word of what it decodes.
        return f" {text}" if str(name).startswith("\u2581") and not text.startswith(" ") else text


_PRINTED = (*range(33, 127), *range(161, 173), *range(174, 256))
_BYTES = {chr(byte): byte for byte in _PRINTED}
_BYTES |= {chr(256 + i): byte for i, byte in enumerate(sorted(set(range(256)) - set(_PRINTED)))}
"""How tokenizers in the manner of GPT-2 write the bytes of a token."""


def _bytes_of(name: str) -> str:
    """The text of a token that holds parts of characters; "" where its name does not tell its bytes."""
    if re.fullmatch("<0x[0-9A-F]{2}>", name):  # SentencePiece
        data = bytes.fromhex(name[3:5])
    elif set(name) <= _BYTES.keys():
        data = bytes(_BYTES[letter] for letter in name)
    else:
        return ""
    return re.sub(
        "[\udc80-\udcff]+",
        lambda found: f"<{' '.join(f'{ord(letter) - 0xDC00:02X}' for letter in found[0])}>",
        data.decode("utf-8", "surrogateescape"),
    )


def write_tokens(path: Path, samples: Sequence[tuple[int, Arrays]], pieces: Pieces) -> None:
    """Write the tokens of a step, whole or not at all, and the same bytes for the same samples.

    Args:
        path: of the file.
        samples: the line (from 0) of each sample in the step's ``rollouts`` file, and its :func:`token_arrays`.
        pieces: text of the tokens.
    """
    rows = [arrays for _, arrays in samples]
    content: dict[str, np.ndarray] = {"line": np.array([line for line, _ in samples], dtype=np.int32)}
    for name in dict.fromkeys(name for arrays in rows for name in arrays):
        values = [arrays.get(name) for arrays in rows]
        content[name] = np.concatenate([value.ravel() for value in values if value is not None])
        content[f"{name}.shape"] = _shapes(values)
    shown = [content[name] for name in ("token_ids", "alternatives") if name in content]
    ids = sorted({int(token) for part in shown for token in np.unique(part) if token >= 0})
    text = json.dumps(pieces(ids))
    content["pieces"] = np.frombuffer(text.encode(), dtype=np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".tmp")
    with zipfile.ZipFile(partial, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        for name, array in content.items():
            with archive.open(zipfile.ZipInfo(f"{name}.npy"), "w", force_zip64=True) as file:
                np.lib.format.write_array(file, array, allow_pickle=False)
    partial.replace(path)


def _shapes(values: Sequence[np.ndarray | None]) -> np.ndarray:
    """int32 [N, 1 + most dimensions]: the number of dimensions of each value (-1: there is none), then its shape."""
    most = max(value.ndim for value in values if value is not None)
    shapes = np.zeros((len(values), most + 1), dtype=np.int32)
    for row, value in zip(shapes, values, strict=True):
        row[0] = -1 if value is None else value.ndim
        row[1 : 1 + max(row[0], 0)] = () if value is None else value.shape
    return shapes


@dataclass(frozen=True)
class TokenLog:
    """The tokens of a step.

    Args:
        lines: of each sample in the step's ``rollouts`` file, from 0.
        samples: :func:`token_arrays` of each.
        pieces: token id -> text.
    """

    lines: tuple[int, ...]
    samples: tuple[Arrays, ...]
    pieces: Mapping[int, str]


def read_tokens(path: Path) -> TokenLog:
    """Read what :func:`write_tokens` has written.

    Raises:
        ValueError: the file is damaged, or none of ours; names it.
    """
    try:
        with np.load(path, allow_pickle=False) as archive:
            content = {name: archive[name] for name in archive.files}
        lines = content.pop("line")
        pieces = json.loads(content.pop("pieces").tobytes())
        samples: list[dict[str, np.ndarray]] = [{} for _ in lines]
        for name in [name for name in content if not name.endswith(".shape")]:
            start = 0
            for arrays, (dimensions, *shape) in zip(samples, content[f"{name}.shape"].tolist(), strict=True):
                if dimensions >= 0:
                    stop = start + int(np.prod(shape[:dimensions]))
                    arrays[name] = content[name][start:stop].reshape(shape[:dimensions])
                    start = stop
    except (ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} holds no tokens of a step ({error}); remove it") from None
    return TokenLog(tuple(lines.tolist()), tuple(samples), {int(token): text for token, text in pieces.items()})


def recompute_loss(samples: Iterable[Arrays]) -> float:
    """The loss of a step from the tokens of all its rollouts (``log_tokens: all``).

    The sum over samples and targets of ``scale * (kl_weight * divergence - advantage * student_logprob)``.
    """
    total = 0.0
    for arrays in samples:
        for weight, value, sign in (("kl_weight", "divergence", 1), ("advantage", "student_logprob", -1)):
            if weight in arrays and value in arrays:
                counts = arrays[weight] != 0  # elsewhere nothing need have been computed
                terms = arrays[weight][counts].astype(np.float64) * arrays[value][counts]
                total += sign * float(arrays["scale"][0]) * float(terms.sum())
    return total
