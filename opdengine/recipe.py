"""What a method is made of. The engine knows these protocols and no paper."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from opdengine.teachers import Teacher
from opdengine.types import Prompt, Rollout, TeacherContext, TokenSignal


@dataclass(frozen=True)
class Note:
    """What an annotator found out about one rollout.

    Args:
        contexts: one per teacher that judges it, in the order of ``mix``.
        mix: float32 [len(contexts)] teacher weights, or None for uniform.
        turn_weight: float32 [number of turns], or None for ones.
        drop: a reason to leave the rollout out of the update; empty to keep it.
    """

    contexts: tuple[TeacherContext, ...] = ()
    mix: np.ndarray | None = None
    turn_weight: np.ndarray | None = None
    drop: str = ""


@dataclass(frozen=True)
class Annotations:
    """Notes in the order of the rollouts, metrics, and records for the log folder."""

    notes: Sequence[Note]
    metrics: Mapping[str, float] = field(default_factory=dict)
    records: Sequence[Mapping[str, object]] = ()


class Annotator(Protocol):
    """Chooses under which contexts and with which weights teachers judge; may ask them to write."""

    async def annotate(self, rollouts: Sequence[Rollout], teachers: Sequence[Teacher]) -> Annotations: ...


class Weigher(Protocol):
    """Pure: rollouts and notes of a whole step -> one signal each."""

    def __call__(self, rollouts: Sequence[Rollout], notes: Sequence[Note]) -> list[TokenSignal]: ...


class DemonstrationSource(Protocol):
    """Lets teachers write the training sequences."""

    async def __call__(
        self,
        prompts: Sequence[Prompt],
        teachers: Sequence[Teacher],
        encode: Callable[[Prompt], list[int]],
    ) -> tuple[list[Rollout], Mapping[str, float]]: ...


@dataclass(frozen=True)
class Recipe:
    """A method as the engine runs it.

    Args:
        name: of the method.
        annotator: contexts and teacher weights.
        weighers: combined by :func:`combine`.
        demonstrations: sequences written by teachers to train on instead of the student's own
            rollouts (sequence-level distillation); None samples the student.
        teachers_per_prompt: least number of teachers that every prompt needs.
    """

    name: str
    annotator: Annotator
    weighers: tuple[Weigher, ...]
    demonstrations: DemonstrationSource | None = None
    teachers_per_prompt: int = 1


def combine(per_weigher: Sequence[Sequence[TokenSignal]]) -> list[TokenSignal]:
    """Merge the signals of several weighers, rollout by rollout.

    ``kl_weight`` multiplies, the last given ``mix`` replaces, ``advantage`` adds, ``keep`` must
    hold everywhere (the first reason against it is reported).
    """
    merged = []
    for signals in zip(*per_weigher, strict=True):
        advantages = [s.advantage for s in signals if s.advantage is not None]
        mixes = [s.mix for s in signals if s.mix is not None]
        merged.append(
            TokenSignal(
                kl_weight=np.prod([s.kl_weight for s in signals], axis=0),
                mix=mixes[-1] if mixes else None,
                advantage=np.sum(advantages, axis=0) if advantages else None,
                keep=all(s.keep for s in signals),
                reason=next((s.reason for s in signals if not s.keep), ""),
            )
        )
    return merged


def route(teachers: Sequence[Teacher], key: str) -> list[Teacher]:
    """The teachers that answer for prompts with this routing key, in their configured order."""
    return [t for t in teachers if not t.keys or key in t.keys]


def distill(rollouts: Sequence[Rollout], notes: Sequence[Note]) -> list[TokenSignal]:
    """The plain weigher: every target token counts 1 (or its turn's weight), teachers by note."""
    signals = []
    for rollout, note in zip(rollouts, notes, strict=True):
        count = len(rollout.targets)
        weight = np.ones(count, dtype=np.float32)
        if note.turn_weight is not None:
            weight = np.asarray(note.turn_weight, dtype=np.float32)[rollout.target_turns]
        mix = None if note.mix is None else np.tile(note.mix, (count, 1)).astype(np.float32)
        signals.append(TokenSignal(kl_weight=weight, mix=mix, keep=not note.drop, reason=note.drop))
    return signals
