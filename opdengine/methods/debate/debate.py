"""Multi-agent debate: K teachers, R rounds, a transcript, confidences, and a cache on disk.

MAD-OPD, arXiv 2605.01347: section 4.1 (debate), equation 7 (confidence weights). The student's
answer never enters a debate, so a debate depends on the state only and is generated once.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np

from opdengine.methods.debate.prompts import DebatePrompts, parse_confidence
from opdengine.models.surrogates import without_surrogates
from opdengine.teachers import Teacher
from opdengine.types import Failure, Prompt, Request, SamplingParams

logger = logging.getLogger(__name__)

CACHE_VERSION = 1


@dataclass(frozen=True)
class Debate:
    """A finished debate over one state.

    Args:
        teachers: names, in the order of the experts A, B, ...
        rounds: ``rounds[r][k]`` is expert k's text of round r + 1.
        confidences: of the last round, clamped to 0..100; None where it could not be read.
        problems: counts by reason ("missing_confidence", "clamped_confidence", "empty_turn",
            "truncated_turn"). The turn of a teacher that failed is empty.
        failed: why there is no debate (then ``rounds`` is empty); else empty.
    """

    teachers: tuple[str, ...]
    rounds: tuple[tuple[str, ...], ...]
    confidences: tuple[float | None, ...]
    problems: dict[str, int]
    failed: str = ""

    def weights(self, tau: float) -> np.ndarray:
        """float32 [K] teacher weights, softmax of confidence / 100 / tau (equation 7).

        Uniform if any confidence of the debate is unknown or any last turn is empty.
        """
        known = [c for c in self.confidences if c is not None]
        last = self.rounds[-1] if self.rounds else ()
        if len(known) < len(self.teachers) or not all(text.strip() for text in last):
            return np.full(len(self.teachers), 1 / len(self.teachers), dtype=np.float32)
        scaled = np.array(known) / 100 / tau
        weights: np.ndarray = np.exp(scaled - scaled.max())
        weights /= weights.sum()
        return weights.astype(np.float32)


@dataclass
class _Talk:
    """The turns that were said so far. A debate of more rounds continues them.

    Args:
        rounds: ``rounds[r][k]`` is expert k's text of round r + 1.
        truncated: turns of each round that ran into the length limit.
        failed: why no further round is possible now; else empty. Not part of the cache: a server that is
            started with a larger window can go on.
    """

    rounds: list[list[str]] = field(default_factory=list)
    truncated: list[int] = field(default_factory=list)
    failed: str = ""

    def is_done(self, rounds: int) -> bool:
        """Whether a debate of so many rounds is over."""
        return bool(self.failed) or len(self.rounds) >= rounds


class Debater:
    """Runs debates over batches of states, all states of a round at once.

    Args:
        rounds: R >= 1; round 1 is blind.
        params: how teachers are sampled (``n`` = 1).
        prompts_for: the prompt family for a routing key.
        ask_confidence: whether replies end with a confidence.
        cache_dir: folder of finished debates, or None for no cache.
    """

    def __init__(
        self,
        *,
        rounds: int,
        params: SamplingParams,
        prompts_for: Callable[[str], DebatePrompts],
        ask_confidence: bool = True,
        cache_dir: Path | None = None,
    ) -> None:
        self.rounds = rounds
        self.params = params
        self.prompts_for = prompts_for
        self.ask_confidence = ask_confidence
        self.cache_dir = cache_dir
        self.generated = 0
        self.cached = 0
        self.unreadable = 0

    async def debate(self, prompts: Sequence[Prompt], teachers: Sequence[Sequence[Teacher]]) -> list[Debate]:
        """Debate every prompt among its teachers; equal states are debated once.

        Args:
            prompts: the states.
            teachers: for every prompt its K >= 2 teachers.
        """
        keys = [self._key(p, t) for p, t in zip(prompts, teachers, strict=True)]
        states = dict(zip(keys, zip(prompts, teachers, strict=True), strict=True))
        talks = {key: self._load(key) for key in states}
        unfinished = {k: states[k] for k, talk in talks.items() if not talk.is_done(self.rounds)}
        self.cached += len(states) - len(unfinished)
        known = {key: len(talks[key].rounds) for key in unfinished}
        broken: set[str] = set()
        for number in range(self.rounds):
            waiting = {k: state for k, state in unfinished.items() if not talks[k].is_done(number + 1)}
            if waiting:
                broken |= await self._round(waiting, number, talks)
        for key in unfinished:
            if key not in broken:  # what a broken server left out must not outlive it
                self._store(key, talks[key])
        self.generated += sum(len(talks[key].rounds) > count for key, count in known.items())
        return [self._conclude(states[key][1], talks[key]) for key in keys]

    async def _round(self, states: dict[str, Any], number: int, talks: dict[str, _Talk]) -> set[str]:
        """One reply of every teacher to every state; the teachers of a round work in parallel.

        Returns the states in which a teacher failed: it says nothing there. Where all failed there
        is no debate.
        """
        queues: dict[str, tuple[Teacher, list[tuple[str, int, Request]]]] = {}
        for key, (prompt, experts) in states.items():
            requests = [
                self._request(key, prompt, expert, k, number, talks[key].rounds) for k, expert in enumerate(experts)
            ]
            room = [
                expert.window is None or len(request.token_ids) + self.params.max_tokens <= expert.window
                for expert, request in zip(experts, requests, strict=True)
            ]
            if not all(room):
                talks[key].failed = "debate_too_long"
                continue
            talks[key].rounds.append([""] * len(experts))
            talks[key].truncated.append(0)
            for k, (expert, request) in enumerate(zip(experts, requests, strict=True)):
                queues.setdefault(expert.name, (expert, []))[1].append((key, k, request))
        answers = await asyncio.gather(
            *(teacher.generate([request for _, _, request in queue], self.params) for teacher, queue in queues.values())
        )
        failures: Counter[str] = Counter()
        for (_, queue), completions in zip(queues.values(), answers, strict=True):
            for (key, k, _), completion in zip(queue, completions, strict=True):
                if isinstance(completion, Failure):
                    failures[key] += 1
                    continue
                talks[key].rounds[number][k] = without_surrogates(completion.text).strip()
                talks[key].truncated[number] += completion.stop_reason == "length"
        for key, count in failures.items():
            if count == len(states[key][1]):
                talks[key].rounds.pop()
                talks[key].truncated.pop()
                talks[key].failed = "teacher_failure"
        return set(failures)

    def _request(
        self,
        key: str,
        prompt: Prompt,
        expert: Teacher,
        k: int,
        number: int,
        rounds: Sequence[Sequence[str]],
    ) -> Request:
        family = self.prompts_for(prompt.key)
        if number == 0:
            messages = family.first_messages(prompt.messages, k, self.ask_confidence)
        else:
            messages = family.later_messages(prompt.messages, k, rounds, self.ask_confidence)
        seed = int(hashlib.sha256(f"{key}:{number}:{k}".encode()).hexdigest()[:12], 16)
        return Request(prompt.id, expert.encode(messages, prompt.tools), seed)

    def _conclude(self, experts: Sequence[Teacher], talk: _Talk) -> Debate:
        """Read the confidences of the last round and count what went wrong."""
        rounds = talk.rounds[: self.rounds]
        if len(rounds) < self.rounds:
            return Debate(tuple(t.name for t in experts), (), (), {}, talk.failed)
        problems: Counter[str] = Counter(
            empty_turn=sum(not text for texts in rounds for text in texts),
            truncated_turn=sum(talk.truncated[: self.rounds]),
        )
        confidences: list[float | None] = []
        for expert, text in zip(experts, rounds[-1], strict=True):
            stated = parse_confidence(text, expert.opening) if self.ask_confidence else None
            if stated is not None:
                problems["clamped_confidence"] += not 0 <= stated <= 100
                stated = min(max(stated, 0.0), 100.0)
            elif self.ask_confidence:
                problems["missing_confidence"] += 1
            confidences.append(stated)
        return Debate(
            teachers=tuple(t.name for t in experts),
            rounds=tuple(tuple(texts) for texts in rounds),
            confidences=tuple(confidences),
            problems={reason: count for reason, count in problems.items() if count},
        )

    def _key(self, prompt: Prompt, teachers: Sequence[Teacher]) -> str:
        """Everything a round depends on; neither the policy nor the number of rounds is part of it."""
        content: list[Any] = [
            CACHE_VERSION,
            [dict(m) for m in prompt.messages],
            [dict(t) for t in prompt.tools],
            [[t.name, t.fingerprint, t.encode(prompt.messages, prompt.tools)] for t in teachers],
            asdict(self.prompts_for(prompt.key)),
            asdict(self.params),
            self.ask_confidence,
        ]
        return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()

    def _file(self, key: str) -> Path | None:
        return None if self.cache_dir is None else self.cache_dir / key[:2] / f"{key}.json"

    def _load(self, key: str) -> _Talk:
        file = self._file(key)
        if file is None or not file.is_file():
            return _Talk()
        try:
            stored = json.loads(file.read_text("utf-8"))
            talk = _Talk(stored["rounds"], stored["truncated"])
            if any(not isinstance(text, str) for texts in talk.rounds for text in texts):
                raise TypeError("a turn is not text")
            if len(talk.truncated) != len(talk.rounds):
                raise ValueError(f"{len(talk.rounds)} rounds, {len(talk.truncated)} counts")
        except (ValueError, TypeError, KeyError) as error:
            logger.warning("the stored debate %s cannot be read (%s): debating again", file, error)
            self.unreadable += 1
            return _Talk()
        return talk

    def _store(self, key: str, talk: _Talk) -> None:
        """Write whole or not at all, so that a killed run leaves no half debate."""
        file = self._file(key)
        if file is None or not talk.rounds:
            return
        file.parent.mkdir(parents=True, exist_ok=True)
        partial = file.with_suffix(f".{uuid4().hex}.tmp")
        said = {"rounds": talk.rounds, "truncated": talk.truncated}
        partial.write_text(json.dumps(said, ensure_ascii=False), "utf-8")
        partial.replace(file)
