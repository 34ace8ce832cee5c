"""The data that travels through one training step. This module imports nothing of the engine.

A :class:`Prompt` becomes a :class:`Sample`: the student's exact token ids in :class:`Turn`s, one
:class:`TeacherContext` per teacher (the same target ids under the teacher's own prefix), what the teachers say about
the targets (:class:`Hidden` or :class:`TopK`), and the weights of the loss. A :class:`Batch` holds the samples of one
optimiser step.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import torch

Message = Mapping[str, Any]
"""One chat message: ``{"role": ..., "content": ...}`` plus whatever the template understands."""


@dataclass(frozen=True)
class Image:
    """A picture in a message, checked when the data were read and decoded where a model reads it.

    It stands in a part ``{"type": "image", "image": Image}`` of a message's content.

    Args:
        sha256: of the bytes of its file, hexadecimal; the same picture has the same one.
        width, height: in pixels.
        data: the bytes of its file; None: they are read from ``path`` when they are needed.
        path: of its file, or "".
        text: what a model reads in its place that is given no pictures; None: the data have no such text.
    """

    sha256: str
    width: int
    height: int
    data: bytes | None = field(default=None, repr=False)
    path: str = ""
    text: str | None = None

    def __str__(self) -> str:
        """Its content and what stands in its place, in one line; the same wherever its file lies."""
        return f"<image {self.sha256} {self.width}x{self.height} {self.text!r}>"


class Encoded(list[int]):
    """The token ids of a chat, and the pictures that its image tokens stand for.

    Args:
        ids: the token ids.
        images: in the order in which they come in ``ids``.
        text: of the chat, with one mark for each picture; "" where nobody needs it.
    """

    def __init__(self, ids: Iterable[int] = (), images: Sequence[Image] = (), text: str = "") -> None:
        super().__init__(ids)
        self.images = tuple(images)
        self.text = text


def images_in(ids: object) -> tuple[Image, ...]:
    """The pictures that come with token ids; plain ids have none."""
    return ids.images if isinstance(ids, Encoded) else ()


def images_of(messages: Iterable[Message]) -> tuple[Image, ...]:
    """The pictures of a chat, in their order."""
    contents = [c for message in messages if isinstance(c := message.get("content"), (list, tuple))]
    if not contents:  # mostly: this is asked several times for every chat
        return ()
    found = [part.get("image") for content in contents for part in content if isinstance(part, Mapping)]
    return tuple(image for image in found if isinstance(image, Image))


@dataclass(frozen=True)
class Prompt:
    """One row of the training data.

    Args:
        id: unique within the data set; appears in every error and every log.
        messages: the chat so far; the student writes the next assistant message.
        tools: JSON schemas handed to the chat template.
        key: routing key (``data_source`` column): chooses teachers and divergence by task.
        answer: what a verifier compares with; never shown to the student or a teacher.
        extra: remaining columns of the row, for verifiers and environments.
        place: where the row stands, "FILE, row N", for errors; "" for the task of an environment.
    """

    id: str
    messages: tuple[Message, ...]
    tools: tuple[Mapping[str, Any], ...] = ()
    key: str = ""
    answer: Any = None
    extra: Mapping[str, Any] = field(default_factory=dict)
    place: str = field(default="", compare=False)

    @property
    def name(self) -> str:
        """What an error calls it: its id, and where it stands."""
        return f"prompt {self.id!r}" + (f" ({self.place})" if self.place else "")


@dataclass(frozen=True)
class Turn:
    """A run of consecutive tokens of one origin.

    Args:
        role: "prompt", "assistant" or "environment".
        token_ids: int64 [T], exactly as fed to or sampled from the model.
        logprobs: float32 [T] behaviour log-probabilities of sampled tokens (nats, of the
            distribution that was sampled from), or None for tokens that were not sampled.
        trains: whether these tokens carry loss.
        messages: the chat messages that these tokens stand for (empty for the prompt turn, whose
            messages are the prompt's, and in single-turn rollouts).
        info: of an assistant turn: what the environment found out about it
            (:class:`opdengine.environments.Step`), and ``stop_reason``.
        images: pictures that the image tokens among ``token_ids`` stand for, in their order.
    """

    role: str
    token_ids: np.ndarray
    logprobs: np.ndarray | None = None
    trains: bool = False
    messages: tuple[Message, ...] = ()
    info: Mapping[str, Any] = field(default_factory=dict)
    images: tuple[Image, ...] = ()

    @classmethod
    def of_prompt(cls, ids: Sequence[int]) -> Turn:
        """What the student reads first, with the pictures that :class:`Encoded` ids bring."""
        return cls("prompt", np.array(ids), images=images_in(ids))

    def __post_init__(self) -> None:
        object.__setattr__(self, "token_ids", np.asarray(self.token_ids, dtype=np.int64))
        if self.logprobs is not None:
            object.__setattr__(self, "logprobs", np.asarray(self.logprobs, dtype=np.float32))
            if self.logprobs.shape != self.token_ids.shape:
                raise ValueError(
                    f"a turn has {self.token_ids.shape[0]} token ids but "
                    f"{self.logprobs.shape[0]} log-probs; every sampled token has exactly one"
                )


@dataclass(frozen=True)
class Spans:
    """Which targets of a student and of a teacher with another tokenizer stand for the same text.

    Spans are numbered from 0 in the order of the text; each has at least one token on either side.

    Args:
        student: int64 [T] the span of each target of the sample, -1 for none.
        teacher: int64 [R] the span of each of the R tokens in which the teacher reads the targets, -1 for none.
        pairs: int64 [2, n] ids of student and teacher that stand for the same bytes.
        vocabulary: ids of the teacher's tokenizer.
    """

    student: np.ndarray
    teacher: np.ndarray
    pairs: np.ndarray
    vocabulary: int

    @classmethod
    def joined(cls, parts: Sequence[Spans], pairs: np.ndarray, vocabulary: int) -> Spans:
        """The spans of several texts as those of one."""
        starts = np.cumsum([0, *(len(part.lengths) for part in parts)])[:-1]
        student, teacher = (
            np.concatenate(
                [np.zeros(0, dtype=np.int64), *(np.where(x < 0, -1, x + s) for x, s in zip(side, starts, strict=True))]
            )
            for side in ([part.student for part in parts], [part.teacher for part in parts])
        )
        return cls(student, teacher, pairs, vocabulary)

    @property
    def lengths(self) -> np.ndarray:
        """int64 [S]: how many of the student's tokens each span has."""
        return np.bincount(self.student[self.student >= 0])

    @property
    def one_to_one(self) -> np.ndarray:
        """bool [T]: whether a target's span is one token on either side."""
        theirs = np.bincount(self.teacher[self.teacher >= 0])
        single = np.append((self.lengths == 1) & (theirs == 1), False)
        found: np.ndarray = single[self.student]
        return found

    def pooled(self, values: np.ndarray) -> np.ndarray:
        """[T]: for each target the sum of ``values`` [T] over its span; 0 where it has none."""
        inside = self.student >= 0
        sums = np.append(np.bincount(self.student[inside], weights=values[inside]), 0.0)
        found: np.ndarray = sums[self.student]
        return found

    def shared(self, values: np.ndarray) -> np.ndarray:
        """[T]: the sum of ``values`` [R] over each span, in equal parts for its targets; NaN where it has none."""
        inside = self.teacher >= 0
        sums = np.bincount(self.teacher[inside], weights=values[inside])
        parts = np.append(sums / self.lengths, np.nan)
        found: np.ndarray = parts[self.student]
        return found


@dataclass(frozen=True)
class TeacherContext:
    """What one teacher reads to judge one sample: its own prefix, then the same target ids.

    Args:
        sample_id: the judged sample.
        teacher: name of the teacher.
        token_ids: int64 [L], the teacher's whole input.
        target_positions: int64 [T], positions in ``token_ids`` of the sample's targets, in order; with ``spans``
            [R] those of the tokens in which the teacher reads them.
        images: pictures that the teacher sees where ``token_ids`` have its image tokens, in their order.
        spans: of a teacher with another tokenizer; None: it reads the student's own ids.
        sampled: whether the student has sampled the targets, so that they will hardly come again.
        prompt: what errors call the prompt of the sample.
    """

    sample_id: str
    teacher: str
    token_ids: np.ndarray
    target_positions: np.ndarray
    images: tuple[Image, ...] = ()
    spans: Spans | None = None
    sampled: bool = False
    prompt: str = ""

    @classmethod
    def replace_prompt(
        cls,
        sample: Sample,
        teacher: str,
        prefix_ids: Sequence[int] | np.ndarray,
        answers: Mapping[int, Sequence[int]] | None = None,
    ) -> TeacherContext:
        """Put ``prefix_ids`` in place of the sample's prompt turn and keep the sampled ids after it.

        Args:
            sample: the judged sample.
            teacher: name of the teacher.
            prefix_ids: what it reads first, with the pictures in it.
            answers: index of a turn of the environment -> ids in its place.
        """
        others = {0: prefix_ids, **(answers or {})}
        parts = [np.asarray(others.get(i, t.token_ids), dtype=np.int64) for i, t in enumerate(sample.turns)]
        trains = [np.full(len(part), turn.trains) for part, turn in zip(parts, sample.turns, strict=True)]
        targets = np.flatnonzero(np.concatenate(trains))
        ids, images = np.concatenate(parts), images_in(prefix_ids)
        context = cls(sample.id, teacher, ids, targets, images, None, sample.is_sampled, sample.prompt.name)
        context.check(sample)
        return context

    def check(self, sample: Sample) -> None:
        """Raise ValueError unless the teacher judges exactly the ids that the student sampled."""
        positions = self.target_positions
        if len(positions) and (positions[0] < 1 or positions[-1] >= len(self.token_ids)):
            raise ValueError(
                f"teacher {self.teacher!r}: target positions {positions[0]}..{positions[-1]} leave "
                f"the context of {len(self.token_ids)} tokens (sample {sample.id!r})"
            )
        if self.spans is not None:
            given = (len(self.spans.student), len(self.spans.teacher))
            if given != (len(sample.target_ids), len(positions)):
                raise ValueError(
                    f"teacher {self.teacher!r}: spans of {given} tokens for {len(sample.target_ids)} targets, which it "
                    f"reads as {len(positions)} tokens (sample {sample.id!r})"
                )
            return
        if not np.array_equal(self.token_ids[positions], sample.target_ids):
            raise ValueError(
                f"teacher {self.teacher!r}: its context does not hold the student's exact token "
                f"ids for sample {sample.id!r}; contexts must be built from ids, not from text"
            )


@dataclass(frozen=True)
class Hidden:
    """Exact judgement of a local teacher.

    Args:
        states: [T, d] final hidden states that predict the targets, in the teacher's dtype, on the host;
            its head turns them into the whole distribution.
    """

    states: torch.Tensor

    def __len__(self) -> int:
        return len(self.states)


@dataclass(frozen=True)
class TopK:
    """What a served teacher tells of its distributions; all the rest is one tail bucket.

    Args:
        ids: int64 [T, k] different token ids of each row, the target first, then from likely to unlikely; a row
            that has fewer than k ends with -1.
        logprobs: float32 [T, k] their log-probabilities at temperature 1, nats; -inf where the id is -1.
    """

    ids: np.ndarray
    logprobs: np.ndarray

    def __len__(self) -> int:
        return len(self.ids)

    def widened(self, width: int) -> TopK:
        """The same lists in arrays of ``width`` columns, which is at least k."""
        more = ((0, 0), (0, width - self.ids.shape[1]))
        return TopK(
            np.pad(self.ids, more, constant_values=-1),
            np.pad(self.logprobs, more, constant_values=np.float32(-np.inf)),
        )


TeacherTargets = Hidden | TopK
"""A teacher's distributions at the targets of one context, aligned with them."""


@dataclass(frozen=True)
class Failure:
    """A teacher's call that failed for good, in place of its result.

    Args:
        teacher: its name.
        reason: one word for the metrics: "timeout", "connection", "http_500", "bad_json", ...
        detail: for people.
    """

    teacher: str
    reason: str
    detail: str = ""

    def __str__(self) -> str:
        return f"teacher {self.teacher!r} failed ({self.reason}): {self.detail}"


MEASURES = (
    "student_logprob",
    "student_entropy",
    "teacher_logprob",
    "teacher_top1",
    "teacher_entropy",
    "teacher_kl",
    "teacher_agreement",
    "policy_logratio",
    "sampler_logratio",
)
"""Fields of a :class:`Sample` that are measured before the update, where the method needs them."""

DIVERGENCES = ("reverse_kl", "forward_kl", "jsd", "skew_kl")

PER_TOKEN = (*MEASURES, "kl_weight", "divergence_kind", "advantage")
"""Fields of a :class:`Sample` whose first axis is its T targets."""


@dataclass(eq=False)
class Sample:
    """One training sequence on its way through a step, filled from left to right.

    T is the number of target tokens, K the number of teachers that judge them. Every per-token array is checked
    against the targets when it is set.

    Args:
        id: unique within the step.
        prompt: the prompt that the sequence answers.
        turns: the prompt turn first, then sampled and environment turns in order.
        policy_version: optimiser steps taken by the weights that sampled the sequence.
        stop_reason: "stop", "length" or an environment's own word.
        reward: outcome in [0, 1], or None while unknown.
        group: samples of the same prompt in the same step share a group.
        text: the decoded trained text (for debates, judges, verifiers and logs only).
        trajectory: samples that are steps of one episode share it; each holds a prefix of the same token ids, so
            the student reads them once. Empty: the sample stands alone.
        info: of a whole episode: ``success``, ``score``, and the environment's first observation; ``feedback``: what
            the verifier or, at its end, the environment said.
        contexts: what each of the K teachers reads (set by ``Method.annotate``).
        mix: float32 [K] or [T, K] teacher weights; None is uniform. The student moves away from a teacher that has a
            negative one.
        turn_weight: float32 [number of turns], None for ones. Where it is 0 on every trained turn no model is run;
            the tokens still count in the denominators.
        teacher_targets: what each teacher said about the targets, in the order of ``contexts``; empty where no
            teacher was asked (set by the scoring).
        student_logprob: float32 [T] the trainer's log p(target) before the update, nats. This and the next seven
            are None unless the method needs them.
        teacher_logprob: float32 [T, K] log q_k(target), nats.
        student_entropy: float32 [T] of the student's distribution at temperature 1, nats.
        teacher_top1: float32 [T, K] largest probability of q_k.
        teacher_entropy: float32 [T, K] of q_k, nats (of a served teacher: at most this).
        teacher_kl: float32 [T, K] KL(p || q_k), nats; NaN of a teacher that does not judge by hidden states.
        teacher_agreement: float32 [T, K] 1 where p and q_k have the same likeliest token, else 0; NaN likewise.
        policy_logratio: float32 [T] log of the probability of the target under the present policy over that
            under the policy that sampled it, both after temperature, penalty, top-k and top-p of the sampling.
            Exactly 0 where no update lies between the two; else the older one is the sampler's, and where that
            told no log-probs this is None.
        sampler_logratio: float32 [T] the same with the sampler's log-prob always, so that it also shows how
            trainer and sampler differ with the same weights.
        kl_weight: float32 [T] multiplies the divergence at each target (set by ``Method.weigh``).
        divergence_kind: [T] the name of each target's divergence, one of :data:`DIVERGENCES`; None: that of the
            prompt's routing key.
        advantage: float32 [T] multiplies log p(target); None for no such term.
        scale: the loss denominator: what both weights are multiplied with in the loss.
        drop: why the sample is left out of the update; empty while it is kept. Every reason is counted.
    """

    id: str
    prompt: Prompt
    turns: tuple[Turn, ...]
    policy_version: int = 0
    stop_reason: str = "stop"
    reward: float | None = None
    group: str = ""
    text: str = ""
    trajectory: str = ""
    info: Mapping[str, Any] = field(default_factory=dict)
    contexts: tuple[TeacherContext, ...] = ()
    mix: np.ndarray | None = None
    turn_weight: np.ndarray | None = None
    teacher_targets: tuple[TeacherTargets, ...] = ()
    student_logprob: np.ndarray | None = None
    student_entropy: np.ndarray | None = None
    teacher_logprob: np.ndarray | None = None
    teacher_top1: np.ndarray | None = None
    teacher_entropy: np.ndarray | None = None
    teacher_kl: np.ndarray | None = None
    teacher_agreement: np.ndarray | None = None
    policy_logratio: np.ndarray | None = None
    sampler_logratio: np.ndarray | None = None
    kl_weight: np.ndarray | None = None
    divergence_kind: np.ndarray | None = None
    advantage: np.ndarray | None = None
    scale: float = 1.0
    drop: str = ""

    def __setattr__(self, name: str, value: Any) -> None:
        if name in PER_TOKEN and value is not None and len(value) != len(self.target_ids):
            raise ValueError(
                f"sample {self.id!r}: {name} has {len(value)} entries for {len(self.target_ids)} target tokens"
            )
        super().__setattr__(name, value)

    @cached_property
    def token_ids(self) -> np.ndarray:
        """int64 [L]: the whole trajectory."""
        return np.concatenate([turn.token_ids for turn in self.turns])

    @cached_property
    def target_positions(self) -> np.ndarray:
        """int64 [T]: where the trained tokens stand in :attr:`token_ids`."""
        trains = np.concatenate([np.full(len(t.token_ids), t.trains) for t in self.turns])
        return np.flatnonzero(trains)

    @cached_property
    def target_ids(self) -> np.ndarray:
        """int64 [T]: the trained token ids; every per-token array aligns with this one."""
        targets: np.ndarray = self.token_ids[self.target_positions]
        return targets

    @cached_property
    def target_turns(self) -> np.ndarray:
        """int64 [T]: index into :attr:`turns` of each trained token."""
        turns: np.ndarray = np.repeat(np.arange(len(self.turns)), [len(t.token_ids) for t in self.turns])[
            self.target_positions
        ]
        return turns

    @cached_property
    def sampler_logprob(self) -> np.ndarray | None:
        """float32 [T]: the sampler's log-probs of the targets, nats; None if any is unknown."""
        trained = [t.logprobs for t in self.turns if t.trains]
        known = [logprobs for logprobs in trained if logprobs is not None]
        if not trained or len(known) != len(trained):
            return None
        return np.concatenate(known)

    @property
    def is_sampled(self) -> bool:
        """Whether the student has sampled any of the targets; else all of them were given."""
        return any(turn.logprobs is not None for turn in self.turns if turn.trains)

    @property
    def images(self) -> tuple[Image, ...]:
        """The pictures that the student sees, in the order of their tokens."""
        return tuple(image for turn in self.turns for image in turn.images)

    @property
    def trained_turns(self) -> int:
        """Number of turns that carry loss."""
        return sum(turn.trains for turn in self.turns)

    @property
    def is_clipped(self) -> bool:
        """Whether a sampled turn ran into its length limit."""
        return self.stop_reason == "length" or any(turn.info.get("stop_reason") == "length" for turn in self.turns)

    @property
    def teachers(self) -> tuple[str, ...]:
        """Names of the teachers behind :attr:`teacher_targets`."""
        return tuple(c.teacher for c in self.contexts) if self.teacher_targets else ()

    @property
    def target_turn_weight(self) -> np.ndarray:
        """float32 [T]: the weight of each target's turn."""
        if self.turn_weight is None:
            return np.ones(len(self.target_ids), dtype=np.float32)
        weights: np.ndarray = np.asarray(self.turn_weight, dtype=np.float32)[self.target_turns]
        return weights

    @property
    def has_weight(self) -> bool:
        """Whether any token adds to the loss."""
        return any(w is not None and bool(np.any(w)) for w in (self.kl_weight, self.advantage))

    def token_mix(self, count: int) -> np.ndarray:
        """float64 [T, K] teacher weights of every target, for ``count`` teachers."""
        rows = len(self.target_ids)
        if self.mix is None:
            return np.full((rows, count), 1 / max(count, 1))
        mix = np.asarray(self.mix, dtype=np.float64)
        if mix.shape not in ((count,), (rows, count)):
            raise ValueError(
                f"sample {self.id!r}: {rows} targets and {count} teachers need a mix of shape [{count}] or "
                f"[{rows}, {count}], got {list(mix.shape)}"
            )
        return np.broadcast_to(mix, (rows, count))

    def keep_teachers(self, names: Collection[str]) -> None:
        """Leave out the other teachers; their weight goes to these in proportion."""
        chosen = [c.teacher in names for c in self.contexts]
        if all(chosen):
            return
        self.contexts = tuple(c for c, stays in zip(self.contexts, chosen, strict=True) if stays)
        if self.mix is None:
            return
        left, whole = self.mix[..., chosen], self.mix.sum(axis=-1, keepdims=True)
        total = left.sum(axis=-1, keepdims=True)
        uniform = np.full_like(left, 1 / max(len(self.contexts), 1))
        share = np.divide(left, total, out=uniform, where=total > 0)
        self.mix = (whole * share).astype(np.float32)


@dataclass
class Batch:
    """The samples of one optimiser step on this process. Iterating gives those that are not dropped.

    Args:
        number: of the step, from 0; seeds whatever is chosen at random.
        samples: all of them; what a method leaves out stays here with its reason in ``drop``.
        metrics: a plain float is a count and is added over the processes; a :class:`opdengine.metrics.Mean` is
            averaged by its weight.
        records: rows for the run's log files: debates, verdicts.
        lost: what never became a sample of this batch (broken episodes, steps that were not chosen), by reason.
        timing: wall seconds by phase.
    """

    number: int = 0
    samples: list[Sample] = field(default_factory=list)
    metrics: dict[str, float] = field(default_factory=dict)
    records: list[Mapping[str, Any]] = field(default_factory=list)
    lost: Counter[str] = field(default_factory=Counter)
    timing: dict[str, float] = field(default_factory=dict)

    def __iter__(self) -> Iterator[Sample]:
        return iter([sample for sample in self.samples if not sample.drop])

    def __len__(self) -> int:
        return sum(not sample.drop for sample in self.samples)

    @property
    def dropped(self) -> Counter[str]:
        """How many were left out of the update, by reason."""
        return self.lost + Counter(sample.drop for sample in self.samples if sample.drop)

    @contextmanager
    def timed(self, phase: str) -> Iterator[None]:
        """Add the wall seconds of what is inside to a phase."""
        start = time.perf_counter()
        yield
        self.timing[phase] = self.timing.get(phase, 0.0) + time.perf_counter() - start


@dataclass(frozen=True)
class SamplingParams:
    """How a model is sampled, in Hugging Face's and vLLM's names.

    Args:
        max_tokens: most new tokens of one completion.
        temperature: 0 is greedy.
        top_p: nucleus mass in (0, 1].
        top_k: 0 keeps every token.
        repetition_penalty: 1 is off.
        stop: strings that end a completion (the tokens that complete the string are kept).
        n: completions per prompt.
        seed: base seed; completion i of request r is a function of (seed, r.seed, i) only.
    """

    max_tokens: int = 512
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    repetition_penalty: float = 1.0
    stop: tuple[str, ...] = ()
    n: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        checks = (
            (self.max_tokens >= 1, "max_tokens", self.max_tokens, "at least 1"),
            (self.temperature >= 0, "temperature", self.temperature, "0 (greedy) or positive"),
            (0 < self.top_p <= 1, "top_p", self.top_p, "in (0, 1]"),
            (self.top_k >= 0, "top_k", self.top_k, "0 (off) or positive"),
            (self.repetition_penalty > 0, "repetition_penalty", self.repetition_penalty, "> 0"),
            (self.n >= 1, "n", self.n, "at least 1"),
            (self.n == 1 or self.temperature > 0, "n", self.n, "1 when temperature is 0"),
        )
        for ok, name, value, remedy in checks:
            if not ok:
                raise ValueError(f"sampling: {name}={value} is not possible; it must be {remedy}")

    def as_json(self) -> dict[str, Any]:
        """How another program is asked to sample, in vLLM's names; each counts completions and seeds in its own way."""
        return {
            "max_tokens": self.max_tokens,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "top_k": self.top_k,
            "repetition_penalty": self.repetition_penalty,
            "stop": list(self.stop),
        }


@dataclass(frozen=True)
class Completion:
    """One sampled continuation.

    Args:
        token_ids: int64 [T] including the end-of-sequence token when it was sampled.
        logprobs: float32 [T] under the distribution that was sampled from.
        stop_reason: "stop" (end of sequence or stop string) or "length".
        text: decoded without special tokens.
    """

    token_ids: np.ndarray
    logprobs: np.ndarray
    stop_reason: str
    text: str


@dataclass(frozen=True)
class Request:
    """One prompt to sample from, as token ids.

    Args:
        id: appears in errors.
        token_ids: the whole templated prompt; :class:`Encoded` ids bring their pictures.
        seed: makes its samples independent of every other request and of the batch.
        images: pictures that its image tokens stand for, in their order.
        text: of a chat with pictures, with one mark for each; see :class:`Encoded`.
    """

    id: str
    token_ids: Sequence[int]
    seed: int = 0
    images: tuple[Image, ...] = ()
    text: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "images", self.images or images_in(self.token_ids))
        object.__setattr__(self, "text", self.text or getattr(self.token_ids, "text", ""))
        object.__setattr__(self, "token_ids", tuple(self.token_ids))
