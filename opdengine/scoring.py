"""What teachers (and the student) say about the rollouts of a step, before anything is weighed."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from opd_kernels import linear_logprob
from opdengine.backbone import Backbone, Head
from opdengine.recipe import Note, Stats
from opdengine.teachers import Teacher
from opdengine.types import Failure, Rollout, TeacherContext, TeacherTargets, TopK


@dataclass(frozen=True)
class Judged:
    """A rollout that takes part in the update.

    Args:
        rollout: has at least one target.
        note: without the teachers that failed on it.
        targets: what each teacher of the note says; empty where no teacher was asked.
    """

    rollout: Rollout
    note: Note
    targets: tuple[TeacherTargets, ...]

    @property
    def teachers(self) -> tuple[str, ...]:
        """Names of the teachers behind ``targets``."""
        return tuple(c.teacher for c in self.note.contexts) if self.targets else ()


async def judge(
    rollouts: Sequence[Rollout],
    notes: Sequence[Note],
    teachers: Sequence[Teacher],
    vocab_size: int,
    dropped: Counter[str],
) -> list[Judged]:
    """Ask every teacher about its contexts; rollouts that cannot be trained on are counted in ``dropped``.

    A teacher that failed on a rollout is left out of it; where all failed the rollout is dropped. A
    rollout of which no turn has weight stays without being shown to any teacher.
    """
    usable = []
    for rollout, note in zip(rollouts, notes, strict=True):
        if note.drop:
            dropped[note.drop] += 1
        elif not len(rollout.targets):
            dropped["empty"] += 1
        elif rollout.targets.max() >= vocab_size:
            # vLLM can sample a padding column of the head; no tokenizer knows such a token.
            dropped["token_beyond_vocabulary"] += 1
        else:
            usable.append((rollout, note))
    asked = [(r, n) for r, n in usable if not n.is_silent(r)]
    queues: dict[str, list[TeacherContext]] = {teacher.name: [] for teacher in teachers}
    for _, note in asked:
        for context in note.contexts:
            queues[context.teacher].append(context)
    busy = [teacher for teacher in teachers if queues[teacher.name]]
    answers = await asyncio.gather(*(teacher.score(queues[teacher.name]) for teacher in busy))
    found = {
        (context.rollout_id, teacher.name): targets
        for teacher, judgements in zip(busy, answers, strict=True)
        for context, targets in zip(queues[teacher.name], judgements, strict=True)
    }
    judged = []
    for rollout, note in usable:
        if note.is_silent(rollout):
            judged.append(Judged(rollout, note, ()))
            continue
        answered = {c.teacher: found[rollout.id, c.teacher] for c in note.contexts}
        good = {name: t for name, t in answered.items() if not isinstance(t, Failure)}
        if answered and not good:
            dropped["teacher_failure"] += 1
        else:
            judged.append(Judged(rollout, note.only(list(good)), tuple(good.values())))
    return judged


@dataclass(frozen=True)
class Measurer:
    """Reads statistics off the models' distributions, in chunks and without gradient.

    Args:
        student: its present weights.
        heads: of the teachers that judge by hidden states.
        vocab_size: valid leading columns of every head.
        impl, workspace_bytes: of the fused op.
    """

    student: Backbone
    heads: Mapping[str, Head]
    vocab_size: int
    impl: str = "auto"
    workspace_bytes: int | None = None

    @torch.no_grad()
    def __call__(self, judged: Sequence[Judged], measures: Sequence[str], top1_temperature: float = 1.0) -> list[Stats]:
        """The wanted :class:`Stats` of every rollout; rollouts without teachers have none."""
        shown = [item for item in judged if item.targets]
        student = self._student(shown) if "student_logprob" in measures else {}
        stats = []
        for item in judged:
            if not item.targets:
                stats.append(Stats())
                continue
            columns = [
                self._teacher(name, targets, item, measures, top1_temperature)
                for name, targets in zip(item.teachers, item.targets, strict=True)
            ]
            stats.append(
                Stats(
                    student_logprob=student.get(item.rollout.id),
                    **{m: np.stack([c[m] for c in columns], axis=1) for m in measures if m != "student_logprob"},
                )
            )
        return stats

    def _student(self, judged: Sequence[Judged]) -> dict[str, np.ndarray]:
        rollouts = [item.rollout for item in judged]
        states = self.student.score([r.token_ids for r in rollouts], [r.target_positions for r in rollouts])
        head = self.student.head
        return {
            r.id: self._read(rows, head, r.targets)["teacher_logprob"] for r, rows in zip(rollouts, states, strict=True)
        }

    def _teacher(
        self, name: str, targets: TeacherTargets, item: Judged, measures: Sequence[str], top1_temperature: float
    ) -> dict[str, np.ndarray]:
        if isinstance(targets, TopK):
            return _read_list(targets, self.vocab_size)
        values = self._read(targets.states, self.heads[name], item.rollout.targets)
        if "teacher_top1" in measures and top1_temperature != 1.0:
            warm = self._read(targets.states, self.heads[name], item.rollout.targets, top1_temperature)
            values["teacher_top1"] = warm["teacher_top1"]
        return values

    def _read(
        self, states: torch.Tensor, head: Head, labels: np.ndarray, temperature: float = 1.0
    ) -> dict[str, np.ndarray]:
        output = linear_logprob(
            states.to(head.weight.device, head.weight.dtype),
            head.weight.detach(),
            torch.from_numpy(labels).to(head.weight.device),
            bias=head.bias,
            logit_scale=head.logit_scale,
            softcap=head.softcap,
            temperature=temperature,
            impl=self.impl,
            workspace_bytes=self.workspace_bytes,
            vocab_size=self.vocab_size,
        )
        named = {
            "teacher_logprob": output.logprob,
            "teacher_entropy": output.entropy,
            "teacher_top1": output.top1_prob,
        }
        return {name: values.float().cpu().numpy() for name, values in named.items()}


def _read_list(targets: TopK, vocabulary: int) -> dict[str, np.ndarray]:
    """What is known from a truncated list: the entropy is an upper bound, reached by a flat tail."""
    logprobs = targets.logprobs.astype(np.float64)
    known = np.exp(logprobs)
    tail = np.clip(1 - known.sum(axis=1), 1e-12, None)
    rest = tail * (np.log(max(vocabulary - logprobs.shape[1], 1)) - np.log(tail))
    values = {
        "teacher_logprob": logprobs[:, 0],
        "teacher_top1": known.max(axis=1),
        "teacher_entropy": rest - (known * logprobs).sum(axis=1),
    }
    return {name: value.astype(np.float32) for name, value in values.items()}
