"""Multi-agent debate: K teachers, R rounds, a transcript, confidences, and a cache on disk.

MAD-OPD, arXiv 2605.01347: section 4.1 (debate), equation 7 (confidence weights). The student's
answer never enters a debate, so a debate depends on the state only and is generated once.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from opdengine.debate_prompts import DebatePrompts, parse_confidence
from opdengine.teachers import Teacher
from opdengine.types import Prompt, Request, SamplingParams

CACHE_VERSION = 1


@dataclass(frozen=True)
class Debate:
    """A finished debate over one state.

    Args:
        teachers: names, in the order of the experts A, B, ...
        rounds: ``rounds[r][k]`` is expert k's text of round r + 1.
        confidences: of the last round, clamped to 0..100; None where it could not be read.
        problems: counts by reason ("missing_confidence", "clamped_confidence", "empty_turn",
            "truncated_turn").
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
        weights = np.exp(scaled - scaled.max())
        return (weights / weights.sum()).astype(np.float32)


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

    async def debate(self, prompts: Sequence[Prompt], teachers: Sequence[Sequence[Teacher]]) -> list[Debate]:
        """Debate every prompt among its teachers; equal states are debated once.

        Args:
            prompts: the states.
            teachers: for every prompt its K >= 2 teachers.
        """
        keys = [self._key(p, t) for p, t in zip(prompts, teachers, strict=True)]
        done: dict[str, Debate] = {}
        todo: dict[str, tuple[Prompt, Sequence[Teacher]]] = {}
        for key, prompt, experts in zip(keys, prompts, teachers, strict=True):
            if key in done or key in todo:
                continue
            found = self._load(key)
            if found is None:
                todo[key] = (prompt, experts)
            else:
                done[key] = found
        self.cached += len(done)
        self.generated += len(todo)
        if todo:
            done.update(await self._run(todo))
        return [done[key] for key in keys]

    async def _run(self, todo: dict[str, tuple[Prompt, Sequence[Teacher]]]) -> dict[str, Debate]:
        texts: dict[str, list[list[str]]] = {key: [] for key in todo}
        problems: dict[str, Counter[str]] = {key: Counter() for key in todo}
        failed: dict[str, str] = {}
        for number in range(self.rounds):
            live = {key: state for key, state in todo.items() if key not in failed}
            replies = await self._round(live, number, texts, problems, failed)
            for key in live:
                if key not in failed:
                    texts[key].append(replies[key])
        results = {}
        for key, (_, experts) in todo.items():
            results[key] = self._conclude(experts, texts[key], problems[key], failed.get(key, ""))
            self._store(key, results[key])
        return results

    async def _round(
        self,
        states: dict[str, tuple[Prompt, Sequence[Teacher]]],
        number: int,
        texts: dict[str, list[list[str]]],
        problems: dict[str, Counter[str]],
        failed: dict[str, str],
    ) -> dict[str, list[str]]:
        """One reply of every teacher to every state; the teachers of a round work in parallel."""
        queues: dict[str, tuple[Teacher, list[tuple[str, int, Request]]]] = {}
        for key, (prompt, experts) in states.items():
            requests = [self._request(key, prompt, expert, k, number, texts[key]) for k, expert in enumerate(experts)]
            room = [
                expert.window is None or len(request.token_ids) + self.params.max_tokens <= expert.window
                for expert, request in zip(experts, requests, strict=True)
            ]
            if not all(room):
                failed[key] = "debate_too_long"
                continue
            for k, (expert, request) in enumerate(zip(experts, requests, strict=True)):
                queues.setdefault(expert.name, (expert, []))[1].append((key, k, request))
        answers = await asyncio.gather(
            *(teacher.generate([request for _, _, request in queue], self.params) for teacher, queue in queues.values())
        )
        replies = {key: [""] * len(experts) for key, (_, experts) in states.items()}
        for (_, queue), completions in zip(queues.values(), answers, strict=True):
            for (key, k, _), completion in zip(queue, completions, strict=True):
                text = completion.text.strip()
                replies[key][k] = text
                problems[key]["empty_turn"] += not text
                problems[key]["truncated_turn"] += completion.stop_reason == "length"
        return replies

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
        return Request(prompt.id, tuple(expert.encode(messages, prompt.tools)), seed)

    def _conclude(
        self,
        experts: Sequence[Teacher],
        rounds: Sequence[Sequence[str]],
        problems: Counter[str],
        failed: str,
    ) -> Debate:
        confidences: list[float | None] = []
        for text in rounds[-1] if rounds and not failed else ():
            stated = parse_confidence(text) if self.ask_confidence else None
            if stated is not None:
                problems["clamped_confidence"] += not 0 <= stated <= 100
                stated = min(max(stated, 0.0), 100.0)
            elif self.ask_confidence:
                problems["missing_confidence"] += 1
            confidences.append(stated)
        return Debate(
            teachers=tuple(t.name for t in experts),
            rounds=() if failed else tuple(tuple(texts) for texts in rounds),
            confidences=tuple(confidences),
            problems={reason: count for reason, count in problems.items() if count},
            failed=failed,
        )

    def _key(self, prompt: Prompt, teachers: Sequence[Teacher]) -> str:
        """Everything a debate depends on; the policy is not part of it."""
        content: list[Any] = [
            CACHE_VERSION,
            [dict(m) for m in prompt.messages],
            [dict(t) for t in prompt.tools],
            [[t.name, t.fingerprint, t.encode(prompt.messages, prompt.tools)] for t in teachers],
            self.rounds,
            asdict(self.prompts_for(prompt.key)),
            asdict(self.params),
            self.ask_confidence,
        ]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    def _file(self, key: str) -> Path | None:
        return None if self.cache_dir is None else self.cache_dir / key[:2] / f"{key}.json"

    def _load(self, key: str) -> Debate | None:
        file = self._file(key)
        if file is None or not file.is_file():
            return None
        data = json.loads(file.read_text("utf-8"))
        return Debate(
            teachers=tuple(data["teachers"]),
            rounds=tuple(tuple(texts) for texts in data["rounds"]),
            confidences=tuple(data["confidences"]),
            problems=data["problems"],
            failed=data["failed"],
        )

    def _store(self, key: str, debate: Debate) -> None:
        """Write whole or not at all, so that a killed run leaves no half debate."""
        file = self._file(key)
        if file is None:
            return
        file.parent.mkdir(parents=True, exist_ok=True)
        partial = file.with_suffix(f".{os.getpid()}.tmp")
        partial.write_text(json.dumps(asdict(debate), ensure_ascii=False), "utf-8")
        partial.replace(file)
