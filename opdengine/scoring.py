"""What teachers (and the student) say about the rollouts of a step, before anything is weighed."""

from __future__ import annotations

import asyncio
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from opd_kernels import linear_logprob
from opdengine.agreement import processed_rows
from opdengine.backbone import Backbone, Head
from opdengine.probes import ProbeError
from opdengine.recipe import Note, Stats
from opdengine.teachers import Teacher
from opdengine.types import Failure, Hidden, Rollout, SamplingParams, TeacherContext, TeacherTargets, TopK


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

    A teacher that failed on a rollout, or whose states are not finite there, is left out of it; where all
    failed the rollout is dropped. A rollout of which no turn has weight stays without being shown to any
    teacher.

    Raises:
        ProbeError: nothing that a teacher says is finite.
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
    for teacher in busy:
        broken = [c.rollout_id for c in queues[teacher.name] if not _finite(found[c.rollout_id, teacher.name])]
        if len(broken) == len(queues[teacher.name]) > 1:
            raise ProbeError(
                f"teacher {teacher.name!r} is broken: its hidden states are NaN or inf on all {len(broken)} contexts; "
                "check its weights, and its dtype (float16 overflows where bfloat16 does not)"
            )
        for rollout_id in broken:
            found[rollout_id, teacher.name] = Failure(teacher.name, "not_finite")
            dropped[f"teacher_not_finite/{teacher.name}"] += 1
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
            failed = {name for name, t in answered.items() if isinstance(t, Failure) and t.reason != "not_finite"}
            dropped.update(f"teacher_without_answer/{name}" for name in failed)
            judged.append(Judged(rollout, note.only(list(good)), tuple(good.values())))
    return judged


def _finite(answer: TeacherTargets | Failure) -> bool:
    # A sum in float64 is finite exactly where all of these are, and needs no memory.
    return not isinstance(answer, Hidden) or math.isfinite(answer.states.sum(dtype=torch.float64).item())


@dataclass(frozen=True)
class Measurer:
    """Reads statistics off the models' distributions, in chunks and without gradient.

    Args:
        student: its present weights.
        heads: of the teachers that judge by hidden states.
        vocab_size: valid leading columns of every head.
        impl, workspace_bytes: of the fused op.
        sampling: how the rollouts were sampled.
        version: optimiser steps that the student has taken.
    """

    student: Backbone
    heads: Mapping[str, Head]
    vocab_size: int
    impl: str = "auto"
    workspace_bytes: int | None = None
    sampling: SamplingParams = field(default_factory=SamplingParams)
    version: int = 0

    @torch.no_grad()
    def __call__(self, judged: Sequence[Judged], measures: Sequence[str], top1_temperature: float = 1.0) -> list[Stats]:
        """The wanted :class:`Stats` of every rollout; rollouts without teachers have none.

        Tokens of turns without weight are left out; their values are 0.
        """
        values: list[dict[str, np.ndarray]] = [{} for _ in judged]
        shown = [i for i, item in enumerate(judged) if item.targets]
        if any(measure in measures for measure in OWN):
            for i, own in zip(shown, self._student([judged[i] for i in shown], measures), strict=True):
                values[i] |= own
        wanted = [measure for measure in measures if measure not in OWN]
        columns = self._teachers(judged, wanted, top1_temperature) if wanted else {}
        for i in shown:
            for measure in wanted:
                read = [columns[i, name][measure] for name in judged[i].teachers]
                values[i][measure] = np.stack(read, axis=1)
        return [Stats(**found) for found in values]

    def _student(self, judged: Sequence[Judged], measures: Sequence[str]) -> list[dict[str, np.ndarray]]:
        """The wanted statistics of the student alone; a ratio without the sampler's log-probs is left out."""
        rollouts = [item.rollout for item in judged]
        states = self.student.score([r.token_ids for r in rollouts], [r.target_positions for r in rollouts])
        head = self.student.head.to(states[0].dtype) if states else self.student.head
        parts = list(zip(judged, states, strict=True))
        logprobs = [read["teacher_logprob"] for read in self._read(parts, head)]
        values = [{"student_logprob": own} for own in logprobs]
        for measure in (name for name in OWN[1:] if name in measures):
            same = [measure == "policy_logratio" and r.policy_version == self.version for r in rollouts]
            open_ = [i for i, r in enumerate(rollouts) if not same[i] and r.logprobs is not None]
            ratios = self._ratios([parts[i] for i in open_], [logprobs[i] for i in open_], head)
            values = [
                v | ({measure: np.zeros_like(v["student_logprob"])} if s else {})
                for v, s in zip(values, same, strict=True)
            ]
            for i, ratio in zip(open_, ratios, strict=True):
                values[i][measure] = ratio
        return values

    def _ratios(
        self, parts: Sequence[tuple[Judged, torch.Tensor]], logprobs: Sequence[np.ndarray], head: Head
    ) -> list[np.ndarray]:
        """float32 [T]: log-probs of every part under the student, processed as in sampling, less the sampler's.

        Args:
            parts: rollouts that have the sampler's log-probs, with hidden states.
            logprobs: of their targets at temperature 1.
            head: of the student.
        """
        params, ours = self.sampling, list(logprobs)
        if params.repetition_penalty != 1.0 or (params.temperature and (params.top_p < 1.0 or params.top_k)):
            ours = [
                processed_rows(head, r.token_ids, r.target_positions, states, params, self.vocab_size)
                for r, states in ((item.rollout, states) for item, states in parts)
            ]
        elif params.temperature not in (0.0, 1.0):
            ours = [read["teacher_logprob"] for read in self._read(parts, head, params.temperature)]
        theirs = [item.rollout.logprobs for item, _ in parts]
        return [
            np.where(_has_weight(item), mine - sampled, 0.0).astype(np.float32)
            for (item, _), mine, sampled in zip(parts, ours, theirs, strict=True)
        ]

    def _teachers(
        self, judged: Sequence[Judged], wanted: Sequence[str], top1_temperature: float
    ) -> dict[tuple[int, str], dict[str, np.ndarray]]:
        """What is read off every teacher, by rollout and teacher; one pass over each head."""
        columns: dict[tuple[int, str], dict[str, np.ndarray]] = {}
        parts: dict[str, list[tuple[int, torch.Tensor]]] = {}
        for i, item in enumerate(judged):
            for name, targets in zip(item.teachers, item.targets, strict=True):
                if isinstance(targets, TopK):
                    columns[i, name] = _read_list(targets, self.vocab_size)
                else:
                    parts.setdefault(name, []).append((i, targets.states))
        for name, members in parts.items():
            rows = [(judged[i], states) for i, states in members]
            reads = self._read(rows, self.heads[name])
            if "teacher_top1" in wanted and top1_temperature != 1.0:
                warm = self._read(rows, self.heads[name], top1_temperature)
                reads = [{**r, "teacher_top1": w["teacher_top1"]} for r, w in zip(reads, warm, strict=True)]
            columns |= {(i, name): read for (i, _), read in zip(members, reads, strict=True)}
        return columns

    def _read(
        self, parts: Sequence[tuple[Judged, torch.Tensor]], head: Head, temperature: float = 1.0
    ) -> list[dict[str, np.ndarray]]:
        """Log-prob of the target, entropy and largest probability [T] of every part, 0 where no turn has weight."""
        return [read for piece in _pieces(parts) for read in self._read_piece(piece, head, temperature)]

    def _read_piece(
        self, parts: Sequence[tuple[Judged, torch.Tensor]], head: Head, temperature: float
    ) -> list[dict[str, np.ndarray]]:
        masks = [_has_weight(item) for item, _ in parts]
        if not any(mask.any() for mask in masks):
            return [dict.fromkeys(READ, np.zeros(len(mask), dtype=np.float32)) for mask in masks]
        device = head.weight.device
        rows = [
            states[torch.from_numpy(mask).to(states.device)] for (_, states), mask in zip(parts, masks, strict=True)
        ]
        labels = np.concatenate([item.rollout.targets[mask] for (item, _), mask in zip(parts, masks, strict=True)])
        hidden = torch.cat(rows).to(device)
        output = linear_logprob(
            hidden,
            head.weight.detach().to(hidden.dtype),  # as in the loss: bfloat16 under autocast
            torch.from_numpy(labels).to(device),
            bias=head.bias,
            logit_scale=head.logit_scale,
            softcap=head.softcap,
            temperature=temperature,
            impl=self.impl,
            workspace_bytes=self.workspace_bytes,
            vocab_size=self.vocab_size,
        )
        read = [x.float().cpu().numpy() for x in (output.logprob, output.entropy, output.top1_prob)]
        ends = np.cumsum([mask.sum() for mask in masks])
        results = []
        for mask, end in zip(masks, ends, strict=True):
            part = {}
            for name, values in zip(READ, read, strict=True):
                part[name] = np.zeros(len(mask), dtype=np.float32)
                part[name][mask] = values[end - mask.sum() : end]
            results.append(part)
        return results


OWN = ("student_logprob", "policy_logratio", "sampler_logratio")
"""What needs the student alone."""
READ = ("teacher_logprob", "teacher_entropy", "teacher_top1")
MOST_ROWS = 32768
"""Hidden states that are on the device at a time (those of one rollout always are)."""


def _pieces(parts: Sequence[tuple[Judged, torch.Tensor]]) -> list[list[tuple[Judged, torch.Tensor]]]:
    """Consecutive parts of at most :data:`MOST_ROWS` rows together."""
    pieces: list[list[tuple[Judged, torch.Tensor]]] = []
    rows = MOST_ROWS
    for part in parts:
        rows += len(part[1])
        if rows > MOST_ROWS:
            pieces.append([])
            rows = len(part[1])
        pieces[-1].append(part)
    return pieces


def _has_weight(item: Judged) -> np.ndarray:
    """bool [T]: whether the turn of a target has weight."""
    weight = item.note.turn_weight
    if weight is None:
        return np.ones(len(item.rollout.targets), dtype=bool)
    mask: np.ndarray = np.asarray(weight)[item.rollout.target_turns] != 0
    return mask


def _read_list(targets: TopK, vocabulary: int) -> dict[str, np.ndarray]:
    """What is known from a truncated list: the entropy is an upper bound, reached by a flat tail."""
    logprobs = targets.logprobs.astype(np.float64)
    known = np.exp(logprobs)
    tail = np.clip(1 - known.sum(axis=1), 1e-12, None)
    listed = targets.ids >= 0
    rest = tail * (np.log(np.maximum(vocabulary - listed.sum(axis=1), 1)) - np.log(tail))
    values = {
        "teacher_logprob": logprobs[:, 0],
        "teacher_top1": known.max(axis=1),
        "teacher_entropy": rest - (known * np.where(listed, logprobs, 0.0)).sum(axis=1),
    }
    return {name: value.astype(np.float32) for name, value in values.items()}
