"""Episodes: the student acts in an environment over many turns, token ids kept exactly.

All running episodes are sampled in one call per turn; an episode that ends makes room for the next
task at once, so the sampler always has a full batch. The prompt of a turn is the ids of the turns before it, never text
that was tokenised again.
"""

from __future__ import annotations

import threading
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from opdengine.data.templates import Reader
from opdengine.environments.protocol import Broken, Observation, Step, Task
from opdengine.metrics import Mean, mean
from opdengine.models.chat import encode_answer, written
from opdengine.models.surrogates import without_surrogates
from opdengine.models.thoughts import answer_part
from opdengine.types import Completion, Message, Prompt, Request, Sample, SamplingParams, Turn

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
        seed: of the environment and of the sampling.
        group: of the rollout.
    """

    id: str
    prompt: Prompt
    seed: int
    group: str = ""


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
        with self._turn:
            return self._play(sampler, jobs, params)

    def _play(self, sampler: Sampler, jobs: Sequence[Job], params: SamplingParams) -> tuple[list[Sample], Counter[str]]:
        waiting, finished, broken = deque(jobs), dict[str, Sample](), Counter[str]()
        running: dict[int, Running] = {}
        version = sampler.policy_version

        def end(slot: int, reason: str) -> None:
            episode = running.pop(slot)
            finished[episode.job.id] = _rollout(episode, reason, version)

        while waiting or running:
            free = [slot for slot in range(self.pool.size) if slot not in running]
            opened = {slot: waiting.popleft() for slot in free[: len(waiting)]}
            starts = self.pool.reset({s: (j.seed, j.prompt.extra["task"]) for s, j in opened.items()}) if opened else {}
            for slot, start in starts.items():
                if isinstance(start, Broken):
                    broken[f"environment/{start.reason}"] += 1
                    continue
                running[slot] = self._begin(opened[slot], start)
            for slot in [s for s, e in running.items() if not self._has_room(e, params)]:
                end(slot, "window")
            slots = sorted(running)
            requests = [
                Request(f"{e.prompt.id} turn {e.taken}", e.token_ids, seed=_turn_seed(e.job.seed, e.taken))
                for e in (running[slot] for slot in slots)
            ]
            completions = [c[0] for c in sampler.generate(requests, replace(params, n=1))] if requests else []
            messages = {s: self._message(running[s], c) for s, c in zip(slots, completions, strict=True)}
            answers = self.pool.step(messages) if messages else {}
            for slot, completion in zip(slots, completions, strict=True):
                answer = answers[slot]
                if isinstance(answer, Broken):
                    broken[f"environment/{answer.reason}"] += 1
                    del running[slot]
                    continue
                self._advance(running[slot], messages[slot], completion, answer)
                if answer.done:
                    end(slot, "terminated" if answer.terminated else "truncated")
                elif running[slot].taken >= self.max_turns:
                    end(slot, "max_turns")
        return [finished[job.id] for job in jobs if job.id in finished], broken

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
