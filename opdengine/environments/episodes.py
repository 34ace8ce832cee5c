"""Episodes: the student acts in an environment over many turns, token ids kept exactly.

All running episodes are sampled in one call per turn; an episode that ends makes room for the next
task at once, so the sampler always has a full batch. The prompt of a turn is the ids of the turns before it, never text
that was tokenised again. A teacher may take the turns instead; they are kept as the student would see them.
"""

from __future__ import annotations

import asyncio
import threading
from collections import Counter, deque
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from opdengine.data.templates import Reader
from opdengine.environments.protocol import Broken, Observation, Step, Task
from opdengine.metrics import Mean, mean
from opdengine.models.chat import encode_answer, written
from opdengine.models.surrogates import without_surrogates
from opdengine.models.thoughts import answer_part
from opdengine.types import Completion, Failure, Message, Prompt, Request, Sample, SamplingParams, Turn

if TYPE_CHECKING:
    from opdengine.rollout import Sampler


class Pool(Protocol):
    """Environments in worker processes; see :class:`opdengine.environments.pool.EnvironmentPool`."""

    @property
    def size(self) -> int: ...

    def reset(self, jobs: Mapping[int, tuple[int, Task]]) -> dict[int, Observation | Broken]: ...

    def step(self, messages: Mapping[int, Message]) -> dict[int, Step | Broken]: ...

    def counts(self) -> dict[str, float]: ...

    def close(self) -> None: ...


@dataclass(frozen=True)
class Job:
    """One episode to play.

    Args:
        id: of the rollout.
        prompt: ``extra["task"]`` is the environment's task; its messages come from the reset.
        seed: of the environment; and of the sampling, where that has none of its own.
        group: of the rollout. Its members have one ``seed``, so that they begin alike and can be compared.
        sampling_seed: of the sampling.
    """

    id: str
    prompt: Prompt
    seed: int
    group: str = ""
    sampling_seed: int | None = None


@dataclass
class Running:
    """An episode in progress."""

    job: Job
    prompt: Prompt
    turns: list[Turn]
    start: Mapping[str, Any]
    steps: list[Step] = field(default_factory=list)

    @property
    def token_ids(self) -> tuple[int, ...]:
        """Everything so far: the prompt of the next turn."""
        return tuple(int(i) for turn in self.turns for i in turn.token_ids)

    @property
    def taken(self) -> int:
        """Turns that the student has taken."""
        return len(self.steps)

    def request(self, token_ids: Sequence[int]) -> Request:
        """The next turn, to be sampled behind these ids."""
        seed = self.job.seed if self.job.sampling_seed is None else self.job.sampling_seed
        return Request(f"{self.prompt.id} turn {self.taken}", tuple(token_ids), seed=_turn_seed(seed, self.taken))


Taken = Completion | Failure | str
"""A turn that was taken, a call that failed (the episode is broken), or why the episode ends without another turn."""


@dataclass
class Episodes:
    """Plays episodes of one policy.

    Args:
        pool: of the environments.
        tokenizer: the student's.
        template_kwargs: handed to its chat template.
        max_turns: most turns of the student.
        max_trajectory_tokens: an episode ends, counted, when its next turn might not fit (the
            model's window).
        parse: text of a turn -> the message that the environment is given (tool calls, say).
        opening: the thought that the chat template leaves open before a turn. A turn that does not end it is
            given to the environment with it, so that nothing within the thought is taken for an action.
    """

    pool: Pool
    tokenizer: Any
    template_kwargs: Mapping[str, Any]
    max_turns: int
    max_trajectory_tokens: int
    parse: Callable[[Message], Message] | None = None
    opening: str = ""
    _turn: threading.Lock = field(default_factory=threading.Lock)

    def __post_init__(self) -> None:
        self._reader = Reader("the student", self.tokenizer, self.template_kwargs)

    def play(self, sampler: Sampler, jobs: Sequence[Job], params: SamplingParams) -> tuple[list[Sample], Counter[str]]:
        """One rollout per job, in order, without those whose environment broke (counted by reason).

        Calls from several threads take turns.

        Args:
            sampler: of the policy.
            jobs: episodes to play.
            params: of every turn; ``max_tokens`` is the limit of one turn.
        """
        with self._turn, sampler.chats():
            play = Play(self, params, deque(jobs), sampler.policy_version)
            while running := play.begin():
                requests = [episode.request(episode.token_ids) for episode in running]
                play.go_on([c[0] for c in sampler.generate(requests, replace(params, n=1))])
        return [play.finished[job.id] for job in jobs if job.id in play.finished], Counter(play.broken.values())

    async def play_by(
        self,
        take: Callable[[Sequence[Running]], Awaitable[Sequence[Taken]]],
        jobs: Sequence[Job],
        params: SamplingParams,
    ) -> Play:
        """Play episodes whose turns another takes than the student; what came of them.

        The environments work in a thread, so that other coroutines go on meanwhile.

        Args:
            take: running episodes -> the next turn of each, in the student's tokens.
            jobs: episodes to play; their ids are unique.
            params: of every turn.
        """
        await asyncio.to_thread(self._turn.acquire)
        try:
            play = Play(self, params, deque(jobs))
            while running := await asyncio.to_thread(play.begin):
                await asyncio.to_thread(play.go_on, await take(running))
        finally:
            self._turn.release()
        return play

    def counts(self) -> dict[str, float]:
        """Metrics of the environments' processes since this was last asked."""
        return self.pool.counts()

    def close(self) -> None:
        """End the environments' processes."""
        self.pool.close()

    def _begin(self, job: Job, start: Observation) -> Running:
        messages, tools, info = without_surrogates((tuple(start.messages), tuple(start.tools), start.info))
        prompt = replace(job.prompt, messages=messages, tools=tools)
        ids = self._reader.encode(messages, tools)
        return Running(job, prompt, [Turn("prompt", np.array(ids))], info)

    def _has_room(self, episode: Running, params: SamplingParams) -> bool:
        return len(episode.token_ids) + params.max_tokens <= self.max_trajectory_tokens

    def _message(self, episode: Running, completion: Completion) -> Message:
        unfinished = self.opening if answer_part(self.opening + completion.text) is None else ""
        message: Message = {"role": "assistant", "content": unfinished + completion.text}
        if self.parse is None or not episode.prompt.tools:
            return message
        parsed: Message = without_surrogates(self.parse(message))  # JSON in the student's text may escape them
        return parsed

    def _advance(self, episode: Running, message: Message, completion: Completion, answer: Step) -> None:
        """Add the student's turn and, unless the episode is over, the environment's."""
        messages, told = without_surrogates((tuple(answer.messages), answer.info))
        answer = replace(answer, messages=messages, info=told)
        info = {**answer.info, "reward": answer.reward, "stop_reason": completion.stop_reason}
        episode.turns.append(
            Turn("assistant", completion.token_ids, completion.logprobs, True, messages=(message,), info=info)
        )
        episode.steps.append(answer)
        if not answer.done:
            sampled = completion.token_ids.tolist()
            following = encode_answer(
                self.tokenizer, answer.messages, episode.prompt.tools, self.template_kwargs, sampled
            )
            episode.turns.append(Turn("environment", np.array(following), messages=tuple(answer.messages)))


@dataclass
class Play:
    """Episodes on their way: :meth:`begin` tells which ones wait for a turn, :meth:`go_on` is given these.

    Args:
        episodes: how they are played.
        params: of every turn.
        waiting: have not begun.
        version: of the policy that plays.
        running: by the place of their environment.
        finished: id of the job -> its rollout.
        broken: id of the job -> why there is none.
    """

    episodes: Episodes
    params: SamplingParams
    waiting: deque[Job]
    version: int = 0
    running: dict[int, Running] = field(default_factory=dict)
    finished: dict[str, Sample] = field(default_factory=dict)
    broken: dict[str, str] = field(default_factory=dict)

    def begin(self) -> list[Running]:
        """Begin what there is room for; the episodes that wait for a turn, empty when all are over."""
        pool = self.episodes.pool
        while self.waiting or self.running:
            free = [slot for slot in range(pool.size) if slot not in self.running]
            opened = {slot: self.waiting.popleft() for slot in free[: len(self.waiting)]}
            starts = pool.reset({s: (j.seed, j.prompt.extra["task"]) for s, j in opened.items()}) if opened else {}
            for slot, start in starts.items():
                if isinstance(start, Broken):
                    self.broken[opened[slot].id] = f"environment/{start.reason}"
                    continue
                self.running[slot] = self.episodes._begin(opened[slot], start)
            for slot in [s for s, e in self.running.items() if not self.episodes._has_room(e, self.params)]:
                self._end(slot, "window")
            if self.running:
                break
        return [self.running[slot] for slot in sorted(self.running)]

    def go_on(self, turns: Sequence[Taken]) -> None:
        """Hand the turns of the episodes that :meth:`begin` told of to their environments."""
        taken: dict[int, Completion] = {}
        for slot, turn in zip(sorted(self.running), turns, strict=True):
            if isinstance(turn, str):
                self._end(slot, turn)
            elif isinstance(turn, Failure):
                self.broken[self.running.pop(slot).job.id] = "teacher_failure"
            else:
                taken[slot] = turn
        messages = {slot: self.episodes._message(self.running[slot], turn) for slot, turn in taken.items()}
        answers = self.episodes.pool.step(messages) if messages else {}
        for slot, completion in taken.items():
            answer, episode = answers[slot], self.running[slot]
            if isinstance(answer, Broken):
                self.broken[self.running.pop(slot).job.id] = f"environment/{answer.reason}"
                continue
            self.episodes._advance(episode, messages[slot], completion, answer)
            if answer.done:
                self._end(slot, "terminated" if answer.terminated else "truncated")
            elif episode.taken >= self.episodes.max_turns:
                self._end(slot, "max_turns")

    def _end(self, slot: int, reason: str) -> None:
        episode = self.running.pop(slot)
        self.finished[episode.job.id] = _rollout(episode, reason, self.version)


def turns_of(rollout: Sample) -> Iterator[tuple[int, Turn, tuple[Message, ...]]]:
    """(index, turn, the chat that the student saw before it) of every turn of the student."""
    chat = list(rollout.prompt.messages)
    for index, turn in enumerate(rollout.turns):
        if turn.role == "assistant":
            yield index, turn, tuple(chat)
        chat.extend(turn.messages)


def episode_metrics(rollouts: Sequence[Sample]) -> dict[str, float]:
    """Success, score, length and faults of whole episodes, as ``episodes/...`` metrics.

    Repeated actions are those that the episode has executed before.
    """
    if not rollouts:
        return {}
    turns = [[t.info for t in r.turns if t.role == "assistant"] for r in rollouts]
    actions = [[info["action"] for info in episode if info.get("action")] for episode in turns]
    taken = max(sum(map(len, turns)), 1)
    repeated = sum(len(a) - len(set(a)) for a in actions)
    metrics = {
        "episodes/success": mean([float(r.info["success"]) for r in rollouts]),
        "episodes/score": mean([float(r.info["score"]) for r in rollouts]),
        "episodes/turns": mean([len(t) for t in turns]),
        "episodes/invalid_action_rate": Mean(sum(bool(i.get("failure")) for t in turns for i in t) / taken, taken),
        "episodes/repeated_action_rate": Mean(repeated / taken, taken),
    }
    if raw := [r.info["raw_score"] for r in rollouts if "raw_score" in r.info]:
        metrics["episodes/raw_score"] = mean(raw)
    ends = Counter(r.stop_reason for r in rollouts)
    return metrics | {f"episodes/end/{reason}": float(count) for reason, count in sorted(ends.items())}


def _rollout(episode: Running, reason: str, version: int) -> Sample:
    turns = episode.turns
    if turns[-1].role == "environment":  # an answer that the student did not get to read
        turns = turns[:-1]
    last = episode.steps[-1].info if episode.steps else {}
    success = bool(last.get("success", False))
    score = float(last.get("score", success))
    raw = {"raw_score": float(last["raw_score"])} if "raw_score" in last else {}
    answer = episode.steps[-1].messages if episode.steps else ()
    said = last.get("feedback") or last.get("observation") or "\n".join(map(written, answer))
    return Sample(
        id=episode.job.id,
        prompt=episode.prompt,
        turns=tuple(turns),
        policy_version=version,
        stop_reason=reason,
        reward=score,
        group=episode.job.group,
        text="\n".join(written(m) for t in turns for m in t.messages if t.role == "assistant"),
        info={**episode.start, "success": success, "score": score, "feedback": str(said), **raw},
    )


def _turn_seed(seed: int, turn: int) -> int:
    return (seed * 1_000_003 + turn) % (1 << 48)
