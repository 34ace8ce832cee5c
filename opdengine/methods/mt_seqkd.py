"""MT-SeqKD: sequence-level distillation from several teachers (Kim & Rush, arXiv 1606.07947).

The off-policy baseline of MAD-OPD (arXiv 2605.01347, section 5): teachers write answers, the student
is trained on them by cross-entropy. Each prompt is answered by one teacher, drawn in proportion to
the teachers' weights (the paper mixes 7 : 3, strong : weak). In an environment a teacher plays the whole episode of a
task (:mod:`.trajectories`).
"""

from __future__ import annotations

import asyncio
import hashlib
import zlib
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from opdengine.config.sections import SELF
from opdengine.config.train import TrainConfig
from opdengine.errors import ConfigError
from opdengine.methods.checks import Check
from opdengine.methods.mad_opd import BASELINES
from opdengine.methods.method import Method, answer_need, need_teachers, route
from opdengine.methods.paper import Paper
from opdengine.methods.room import Need, length
from opdengine.methods.trajectories import Trajectories
from opdengine.teachers import Teacher
from opdengine.types import Batch, Completion, Failure, Prompt, Request, Sample, SamplingParams, Turn

PAPER = Paper(
    arxiv=BASELINES.arxiv,
    defaults={
        **BASELINES.defaults,
        "temperature": (0.7, "unstated: as in the debates"),
        "top_p": (0.8, "unstated: as in the debates"),
        "top_k": (20, "unstated: as in the debates"),
        "repetition_penalty": (1.0, "unstated: none, where students learn the text"),
    },
    choices={
        "teachers.weight": "7 : 3, strong : weak",
        **{name: text for name, text in BASELINES.choices.items() if name != "divergence"},
    },
)

_FAILED = Completion(np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.float32), "teacher_failure", "")


class MTSeqKD(Method):
    """Supervised training on what teachers write: an answer, or a whole episode, once per prompt."""

    paper = PAPER

    writes = True
    diverges = False

    def __init__(self, config: TrainConfig) -> None:
        super().__init__(config)
        need_teachers(config, 1)
        if config.num_generations != 1:
            raise ConfigError(
                f"num_generations={config.num_generations} is not possible; in method 'mt_seqkd' one teacher "
                "writes one answer per prompt: use 1"
            )
        if changing := [t.name for t in config.teachers if t.model == SELF and t.weights != "base"]:
            raise ConfigError(
                f"teacher {changing[0]!r} is not possible where teachers write once what is learned: its weights "
                "change with the student's, and a resumed run would have it write something else; use weights: base"
            )
        self.params = SamplingParams(
            max_tokens=config.max_completion_length,
            temperature=config.temperature,
            top_p=config.top_p,
            top_k=config.top_k,
            repetition_penalty=config.repetition_penalty,
            stop=tuple(config.environment.stop) if config.environment.name else (),
            seed=config.seed,
        )
        self._answers: dict[str, Completion] = {}
        self.trajectories = Trajectories(config, self.params)

    @property
    def checks(self) -> tuple[Check, ...]:
        """The run warns where most episodes are left out."""
        return (*super().checks, *self.trajectories.checks)

    def room(self, prompt: Prompt) -> list[Need]:
        """The author reads the prompt (as ``teacher_prompt_template`` has it) and writes the longest answer."""
        teacher = author(prompt, route(self.teachers, prompt.key), self.params.seed)
        read = length(teacher, self.view(prompt).messages, prompt.tools)
        return [answer_need(self.params.max_tokens, teacher, read)]

    async def write(self, prompts: Sequence[Prompt], encode: Callable[..., list[int]]) -> Batch:
        """One sample per prompt, written by one of its teachers, or played where there is an environment."""
        if self.episodes is not None:
            authors = {p.id: author(p, route(self.teachers, p.key), self.params.seed) for p in prompts}
            return await self.trajectories.write(prompts, authors, self.episodes, self.view)
        missing = {p.id: p for p in prompts if p.id not in self._answers}
        queues: dict[str, tuple[Teacher, list[Prompt]]] = {}
        for prompt in missing.values():
            teacher = author(prompt, route(self.teachers, prompt.key), self.params.seed)
            queues.setdefault(teacher.name, (teacher, []))[1].append(prompt)
        await asyncio.gather(*(self._write(t, queue) for t, queue in queues.values()))
        answers = [self._answers.get(p.id, _FAILED) for p in prompts]
        samples = [
            Sample(
                id=f"{i}",
                prompt=p,
                turns=(Turn.of_prompt(encode(p)), Turn("assistant", self._ids(p, answer, encode), trains=True)),
                stop_reason=answer.stop_reason,
                text=answer.text,
            )
            for i, (p, answer) in enumerate(zip(prompts, answers, strict=True))
        ]
        written = {f"seqkd/written/{name}": float(len(q)) for name, (_, q) in queues.items()}
        return Batch(samples=samples, metrics=written)

    def _ids(self, prompt: Prompt, answer: Completion, encode: Callable[..., list[int]]) -> np.ndarray:
        """The student's tokens of an answer: the teacher's, or, where its tokenizer is another, those of its text."""
        teacher = author(prompt, route(self.teachers, prompt.key), self.params.seed)
        if getattr(teacher, "alignment", None) is None or not len(answer.token_ids):
            return answer.token_ids
        return np.array(encode(prompt, answer.text, ended=answer.stop_reason == "stop"), dtype=np.int64)

    async def _write(self, teacher: Teacher, prompts: Sequence[Prompt]) -> None:
        queue = []
        for p in prompts:
            ids = teacher.encode(self.view(p).messages, p.tools)
            if teacher.window is not None and len(ids) + self.params.max_tokens > teacher.window:
                self._answers[p.id] = replace(_FAILED, stop_reason=f"teacher_window/{teacher.name}")
            else:
                queue.append(Request(p.id, ids, seed=zlib.crc32(p.id.encode())))
        for request, answer in zip(queue, await teacher.generate(queue, self.params), strict=True):
            if not isinstance(answer, Failure):  # after a failure the next epoch asks again
                self._answers[request.id] = answer

    async def annotate(self, batch: Batch) -> None:
        """No teacher judges: the sequences themselves are the signal."""
        for sample in batch:
            if not len(sample.target_ids):
                sample.drop = sample.stop_reason
        self.trajectories.select(batch)

    def weigh(self, batch: Batch) -> None:
        """Advantage 1 on every target: maximum likelihood of the teacher's answer."""
        for sample in batch:
            sample.kl_weight = np.zeros(len(sample.target_ids), dtype=np.float32)
            sample.advantage = np.ones(len(sample.target_ids), dtype=np.float32)


def author(prompt: Prompt, teachers: Sequence[Teacher], seed: int) -> Teacher:
    """The teacher that answers this prompt, drawn by weight; fixed by its id and the seed."""
    digest = hashlib.sha256(f"{seed}:{prompt.id}".encode()).digest()
    point = int.from_bytes(digest[:8], "big") / 2**64 * sum(t.weight for t in teachers)
    for teacher in teachers:
        point -= teacher.weight
        if point < 0:
            return teacher
    return teachers[-1]
