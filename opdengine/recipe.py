"""What a method is made of. The engine knows these protocols and no paper."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Protocol

import numpy as np

from opdengine.checks import Check
from opdengine.room import Room
from opdengine.teachers import Teacher
from opdengine.types import Prompt, Rollout, TeacherContext, TokenSignal

if TYPE_CHECKING:
    from opdengine.engine import Engine
    from opdengine.objective import Item
    from opdengine.scoring import Judged


@dataclass(frozen=True)
class Note:
    """What an annotator found out about one rollout.

    Args:
        contexts: one per teacher that judges it, in the order of ``mix``.
        mix: float32 [len(contexts)] teacher weights, or None for uniform.
        turn_weight: float32 [number of turns], or None for ones. Where it is 0 on every trained turn
            no model is run; the tokens still count in the denominators.
        drop: a reason to leave the rollout out of the update; empty to keep it.
    """

    contexts: tuple[TeacherContext, ...] = ()
    mix: np.ndarray | None = None
    turn_weight: np.ndarray | None = None
    drop: str = ""

    def only(self, teachers: Sequence[str]) -> Note:
        """The note without the other teachers; their weight goes to these in proportion."""
        chosen = [c.teacher in teachers for c in self.contexts]
        contexts = tuple(c for c, stays in zip(self.contexts, chosen, strict=True) if stays)
        if self.mix is None or all(chosen):
            return replace(self, contexts=contexts)
        left, whole = self.mix[chosen], float(self.mix.sum())
        share = left / left.sum() if left.sum() > 0 else np.full_like(left, 1 / max(len(left), 1))
        return replace(self, contexts=contexts, mix=(whole * share).astype(np.float32))

    def light(self) -> Note:
        """The note with contexts that only name their teachers."""
        nothing = np.zeros(0, dtype=np.int64)
        contexts = tuple(replace(c, token_ids=nothing, target_positions=nothing) for c in self.contexts)
        return replace(self, contexts=contexts)

    def is_silent(self, rollout: Rollout) -> bool:
        """Whether every trained turn of the rollout has weight 0."""
        if self.turn_weight is None:
            return False
        return not np.any(np.asarray(self.turn_weight)[rollout.target_turns])


@dataclass(frozen=True)
class Stats:
    """What the models said about the targets of one rollout before the update; detached.

    Each is None unless the recipe asked for it in ``measures`` (and the rollout was judged).

    Args:
        student_logprob: float32 [T] the trainer's log p(target).
        teacher_logprob: float32 [T, K] log q_k(target), teachers in the order of the note's contexts.
        teacher_top1: float32 [T, K] largest probability of q_k.
        teacher_entropy: float32 [T, K] of q_k, nats (of a served teacher: at most this).
        policy_logratio: float32 [T] log of the probability of the target under the present policy over that
            under the policy that sampled it, both after temperature, penalty, top-k and top-p of the sampling.
            Exactly 0 where no update lies between the two; else the older one is the sampler's, and where that
            told no log-probs this is None.
        sampler_logratio: float32 [T] the same with the sampler's log-prob always, so that it also shows how
            trainer and sampler differ with the same weights.
    """

    student_logprob: np.ndarray | None = None
    teacher_logprob: np.ndarray | None = None
    teacher_top1: np.ndarray | None = None
    teacher_entropy: np.ndarray | None = None
    policy_logratio: np.ndarray | None = None
    sampler_logratio: np.ndarray | None = None


MEASURES = tuple(field.name for field in fields(Stats))


@dataclass(frozen=True)
class Batch:
    """A whole step as weighers see it: every kept rollout of every process, in one order.

    Args:
        rollouts: not dropped by their notes; all have targets.
        notes: one each, without teachers that failed; their contexts only name the teachers.
        stats: one each.
        step: number of the batch; seeds what a weigher chooses at random.
    """

    rollouts: Sequence[Rollout]
    notes: Sequence[Note]
    stats: Sequence[Stats]
    step: int = 0


@dataclass(frozen=True)
class Annotations:
    """Notes in the order of the rollouts, metrics, and records for the log folder."""

    notes: Sequence[Note]
    metrics: Mapping[str, float] = field(default_factory=dict)
    records: Sequence[Mapping[str, object]] = ()


class Annotator(Protocol):
    """Chooses under which contexts and with which weights teachers judge; may ask them to write."""

    async def annotate(self, rollouts: Sequence[Rollout], teachers: Sequence[Teacher]) -> Annotations: ...


class Reviser(Protocol):
    """Pure: the last word on the notes of a whole step, before any teacher scores: moves weights, drops rollouts."""

    def __call__(
        self, rollouts: Sequence[Rollout], notes: Sequence[Note], step: int
    ) -> tuple[Sequence[Note], Mapping[str, float]]:
        """New notes in the order of the rollouts, and metrics.

        Args:
            rollouts: of every process, in one order.
            notes: one each; their contexts only name the teachers, and stay what they are.
            step: number of the batch; seeds what is chosen at random.
        """
        ...


class Weigher(Protocol):
    """Pure: a whole step -> one signal for each of its rollouts, and metrics."""

    def __call__(self, batch: Batch) -> Weighed: ...


@dataclass(frozen=True)
class Weighed:
    """Signals in the order of the batch, and metrics of the whole step."""

    signals: Sequence[TokenSignal]
    metrics: Mapping[str, float] = field(default_factory=dict)


class Schedule(Protocol):
    """Chooses the data streams of each step."""

    @property
    def streams(self) -> tuple[str, ...]: ...

    def stream_of(self, prompt: Prompt) -> str:
        """The stream that a prompt belongs to."""
        ...

    def shares(self, step: int) -> Mapping[str, float]:
        """Which share of the prompts of this step (from 0) comes from each stream; sums to 1."""
        ...


class Inspector(Protocol):
    """Measures something beside the update; changes nothing. All processes ask it at once."""

    def watch(self, prompts: Sequence[Prompt]) -> None:
        """All training prompts, told once before the first step."""
        ...

    async def __call__(
        self, engine: Engine, judged: Sequence[Judged], stats: Sequence[Stats], items: Sequence[Item], step: int
    ) -> Mapping[str, float]:
        """Metrics of a whole step, asked for between weighing and update; the same on all processes.

        Args:
            engine: with the weights of before the update.
            judged: rollouts of the step, of this process.
            stats: one each.
            items: what of them is trained on.
            step: number of the batch.
        """
        ...


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
        measures: which :class:`Stats` the weighers need.
        top1_temperature: of the distributions behind ``teacher_top1``.
        split: makes several training states of each finished rollout, before it is annotated.
        needs_reward: whether rollouts are graded by the verifier before they are annotated (an
            episode's reward is its environment's).
        schedule: which data streams a step draws from; None draws from all data as one.
        inspector: measures beside the updates.
        revise: changes the notes of a whole step; None leaves them as they are annotated.
        checks: shares of a step's counts from which on the method has fallen apart.
        room: what it asks of the teachers' windows; None is not known.
    """

    name: str
    annotator: Annotator
    weighers: tuple[Weigher, ...]
    demonstrations: DemonstrationSource | None = None
    teachers_per_prompt: int = 1
    measures: tuple[str, ...] = ()
    top1_temperature: float = 1.0
    split: Callable[[Sequence[Rollout], int], list[Rollout]] | None = None
    needs_reward: bool = False
    schedule: Schedule | None = None
    inspector: Inspector | None = None
    revise: Reviser | None = None
    checks: tuple[Check, ...] = ()
    room: Room | None = None


def combine(per_weigher: Sequence[Weighed]) -> Weighed:
    """Merge the signals of several weighers, rollout by rollout, and their metrics.

    ``kl_weight`` multiplies, the last given ``mix`` replaces, ``advantage`` adds, ``keep`` must
    hold everywhere (the first reason against it is reported).
    """
    merged = []
    for signals in zip(*(weighed.signals for weighed in per_weigher), strict=True):
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
    metrics = {name: value for weighed in per_weigher for name, value in weighed.metrics.items()}
    return Weighed(merged, metrics)


def route(teachers: Sequence[Teacher], key: str) -> list[Teacher]:
    """The teachers that answer for prompts with this routing key, in their configured order."""
    return [t for t in teachers if not t.keys or key in t.keys]


def distill(batch: Batch) -> Weighed:
    """The plain weigher: every target token counts 1 (or its turn's weight), teachers by note."""
    return Weighed([plain_signal(r, note) for r, note in zip(batch.rollouts, batch.notes, strict=True)])


def plain_signal(rollout: Rollout, note: Note) -> TokenSignal:
    """Divergence weights of one rollout: 1, or the weight of the token's turn."""
    count = len(rollout.targets)
    weight = np.ones(count, dtype=np.float32)
    if note.turn_weight is not None:
        weight = np.asarray(note.turn_weight, dtype=np.float32)[rollout.target_turns]
    mix = None if note.mix is None else np.tile(note.mix, (count, 1)).astype(np.float32)
    return TokenSignal(kl_weight=weight, mix=mix)
