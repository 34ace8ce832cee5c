"""Trajectories of teachers: they play whole episodes, from which the student learns by cross-entropy.

The off-policy baseline of papers on agents (SAGE-OPD, arXiv 2606.19659, appendix A: supervised fine-tuning on teacher
trajectories). A teacher reads everything in its own chat template and, where that is another one, in its own tokenizer;
what is kept are the student's tokens, as if the student had played.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from opdengine.config.train import TrainConfig
from opdengine.environments.episodes import Episodes, Job, Running, Taken, episode_metrics
from opdengine.errors import ConfigError
from opdengine.methods.checks import ROLLOUTS, Check
from opdengine.methods.unused import refuse_unused
from opdengine.metrics import mean
from opdengine.models.reply import own_turn
from opdengine.teachers import Teacher
from opdengine.types import Batch, Completion, Failure, Prompt, Sample, SamplingParams, Turn


@dataclass
class Player:
    """Takes the turns of episodes in the words of a teacher.

    Args:
        teacher: writes the turns.
        episodes: are played; they hold the student's tokenizer.
        params: of every turn.
        view: a prompt as the teacher reads it.
    """

    teacher: Teacher
    episodes: Episodes
    params: SamplingParams
    view: Callable[[Prompt], Prompt]
    _read: dict[str, list[int]] = field(default_factory=dict)
    """Job -> all that the teacher has read and said in it."""
    _said: dict[str, list[int]] = field(default_factory=dict)
    """Job -> its last turn."""

    async def __call__(self, running: Sequence[Running]) -> list[Taken]:
        """The next turn of every episode; one that the teacher's window may not hold is over."""
        ids = [self._context(episode) for episode in running]
        window, longest = self.teacher.window, self.params.max_tokens
        asked = [i for i, own in enumerate(ids) if window is None or len(own) + longest <= window]
        requests = [running[i].request(ids[i]) for i in asked]
        said = await self.teacher.generate(requests, self.params) if requests else ()
        turns: list[Taken] = [f"teacher_window/{self.teacher.name}"] * len(running)
        for i, answer in zip(asked, said, strict=True):
            turns[i] = answer if isinstance(answer, Failure) else self._heard(running[i], answer)
        return turns

    def _context(self, episode: Running) -> list[int]:
        """What the teacher reads before its next turn."""
        name, tools = episode.job.id, episode.prompt.tools
        if name not in self._read:
            self._read[name] = list(self.teacher.encode(self.view(episode.prompt).messages, tools))
        else:
            self._read[name] += self.teacher.encode_answer(episode.turns[-1].messages, tools, self._said[name])
        return self._read[name]

    def _heard(self, episode: Running, answer: Completion) -> Completion | str:
        """A turn in the student's tokens; nobody has sampled these, so their log-probs are no number.

        One that takes more of them than of the teacher's may be too long: then the episode is over.
        """
        theirs = answer.token_ids.tolist()
        self._said[episode.job.id] = theirs
        self._read[episode.job.id] += theirs
        same = getattr(self.teacher, "alignment", None) is None
        # A string that ends turns stands in the text; else a token has ended this one, or its length has.
        ended = answer.stop_reason == "stop" and not any(stop in answer.text for stop in self.params.stop)
        own = own_turn(
            self.episodes.tokenizer, self.episodes.template_kwargs, answer.text, theirs if same else None, ended=ended
        )
        if len(episode.token_ids) + len(own) > self.episodes.max_trajectory_tokens:
            return "window"
        return replace(answer, token_ids=np.array(own, dtype=np.int64), logprobs=np.full(len(own), np.nan))


class Trajectories:
    """The episodes that teachers have played, one of each task.

    Args:
        config: of the run.
        params: of every turn.

    Raises:
        ConfigError: the settings ask for what cannot be done.
    """

    def __init__(self, config: TrainConfig, params: SamplingParams) -> None:
        self.successful_only = config.mt_seqkd.successful_only
        self.params = params
        self._played: dict[str, Sample] = {}
        if not config.environment.name:
            refuse_unused(config, ("mt_seqkd.successful_only",), "answers, which nobody grades", "set environment.name")
        # A turn would lose the string that ends it.
        served = [t.name for t in config.teachers if t.base_url is not None or t.writer_base_url is not None]
        if served and params.stop:
            raise ConfigError(
                f"environment.stop={list(params.stop)} is not possible in method {config.method!r} with teacher "
                f"{served[0]!r}, whose server leaves the string out of what it writes; leave environment.stop empty, "
                "or take a teacher in this process or at a hidden_states_url"
            )

    @property
    def checks(self) -> tuple[Check, ...]:
        """The run warns where most episodes are left out."""
        failed = Check(
            "dropped/unsuccessful",
            "episodes/begun",
            "episodes of the teachers did not succeed and were left out (mt_seqkd.successful_only)",
            "take teachers that succeed more often, raise environment.max_turns, or train on failures, too, with "
            "successful_only: false",
            ROLLOUTS,
        )
        return (failed,)

    async def write(
        self,
        prompts: Sequence[Prompt],
        authors: Mapping[str, Teacher],
        episodes: Episodes,
        view: Callable[[Prompt], Prompt],
    ) -> Batch:
        """One trajectory per task, each played once.

        Environment and sampling are seeded by the run's seed and the task's id, so a task has the same trajectory
        whenever it is played.

        Args:
            prompts: the tasks.
            authors: id of a task -> the teacher that plays it.
            episodes: plays them, in the student's tokens.
            view: a prompt as the teachers read it.
        """
        missing = {p.id: p for p in prompts if p.id not in self._played}
        jobs: dict[str, list[Job]] = {}
        for prompt in missing.values():
            job = Job(prompt.id, prompt, task_seed(prompt.id, self.params.seed))
            jobs.setdefault(authors[prompt.id].name, []).append(job)
        players = {author.name: author for author in authors.values()}
        broken: dict[str, str] = {}
        metrics = {"episodes/begun": float(len(prompts))}
        for name, queue in jobs.items():
            found = await episodes.play_by(Player(players[name], episodes, self.params, view), queue, self.params)
            self._played |= {place: _written(sample, name) for place, sample in found.finished.items()}
            broken |= found.broken  # they are played again in the next epoch
            metrics[f"seqkd/written/{name}"] = float(len(found.finished))
        whole = [self._played[p.id] for p in prompts if p.id in self._played]
        success: dict[str, list[float]] = {}
        for sample in whole:
            success.setdefault(f"seqkd/success/{sample.info['author']}", []).append(float(sample.info["success"]))
        metrics |= {name: mean(values) for name, values in success.items()}
        samples = [self._played.get(p.id) or _nothing(p, broken[p.id]) for p in prompts]
        return Batch(samples=samples, metrics=metrics | episode_metrics(whole) | episodes.counts())

    def select(self, batch: Batch) -> None:
        """Leave failures out, where that is asked for."""
        for sample in batch:
            if self.successful_only and not sample.info["success"]:
                sample.drop = "unsuccessful"


def _nothing(prompt: Prompt, reason: str) -> Sample:
    """In place of a trajectory that there is not."""
    none = np.zeros(0, dtype=np.int64)
    return Sample("", prompt, (Turn("prompt", none), Turn("assistant", none, trains=True)), stop_reason=reason)


def _written(sample: Sample, author: str) -> Sample:
    """A trajectory that the student has not sampled, with the name of the teacher that has."""
    turns = tuple(replace(turn, logprobs=None) for turn in sample.turns)
    return replace(sample, turns=turns, info={**sample.info, "author": author})


def task_seed(name: str, seed: int) -> int:
    """The seed of the one episode of a task, in a run with ``seed``."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:6], "big")
