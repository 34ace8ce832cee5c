"""Teachers and student score the samples of a step here, before the method weighs them."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from opd_kernels import LMHead, TeacherHead, linear_logprob, token_stats
from opdengine.errors import ProbeError
from opdengine.models.backbone import Backbone
from opdengine.models.vision import Vision
from opdengine.teachers import Teacher
from opdengine.training.agreement import processed_rows
from opdengine.types import (
    Batch,
    Failure,
    Hidden,
    Sample,
    SamplingParams,
    Spans,
    TeacherContext,
    TeacherTargets,
    TopK,
)


async def score(batch: Batch, teachers: Sequence[Teacher], vocab_size: int, vision: Vision | None = None) -> None:
    """Ask every teacher about its contexts and set ``teacher_targets``; what cannot be trained on is dropped.

    A teacher that failed on a sample, or whose states are not finite there, is left out of it; where all
    failed the sample is dropped. A sample of which no turn has weight stays without being shown to any
    teacher.

    Args:
        batch: annotated samples.
        teachers: of the run.
        vocab_size: ids of the tokenizer.
        vision: of a student that is given pictures; its image tokens cannot be sampled beside them.

    Raises:
        ProbeError: nothing that a teacher says is finite.
    """
    for sample in batch:
        if not len(sample.target_ids):
            sample.drop = "empty"
        elif sample.target_ids.max() >= vocab_size:
            # vLLM can sample a padding column of the head; no tokenizer knows such a token.
            sample.drop = "token_beyond_vocabulary"
        elif vision is not None and not vision.matches(sample.token_ids, sample.images):
            sample.drop = "image_token_sampled"
    asked = [sample for sample in batch if sample.contexts and np.any(sample.target_turn_weight)]
    queues: dict[str, list[TeacherContext]] = {teacher.name: [] for teacher in teachers}
    for sample in asked:
        for context in sample.contexts:
            queues[context.teacher].append(context)
    busy = [teacher for teacher in teachers if queues[teacher.name]]
    answers = await asyncio.gather(*(teacher.score(queues[teacher.name]) for teacher in busy))
    found = {
        (context.sample_id, teacher.name): targets
        for teacher, judgements in zip(busy, answers, strict=True)
        for context, targets in zip(queues[teacher.name], judgements, strict=True)
    }
    for teacher in busy:
        broken = [c.sample_id for c in queues[teacher.name] if not _finite(found[c.sample_id, teacher.name])]
        if len(broken) == len(queues[teacher.name]) > 1:
            raise ProbeError(
                f"teacher {teacher.name!r} is broken: its hidden states are NaN or inf on all {len(broken)} contexts; "
                "check its weights, and its dtype (float16 overflows where bfloat16 does not)"
            )
        for sample_id in broken:
            found[sample_id, teacher.name] = Failure(teacher.name, "not_finite")
            batch.lost[f"teacher_not_finite/{teacher.name}"] += 1
    for sample in asked:
        said = {c.teacher: found[sample.id, c.teacher] for c in sample.contexts}
        good = {name: targets for name, targets in said.items() if not isinstance(targets, Failure)}
        if not good:
            sample.drop = "teacher_failure"
            continue
        failed = {name for name, t in said.items() if isinstance(t, Failure) and t.reason != "not_finite"}
        batch.lost.update(f"teacher_without_answer/{name}" for name in failed)
        sample.keep_teachers(good)
        sample.teacher_targets = tuple(good.values())


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
    heads: Mapping[str, LMHead]
    vocab_size: int
    impl: str = "auto"
    workspace_bytes: int | None = None
    sampling: SamplingParams = field(default_factory=SamplingParams)
    version: int = 0

    @torch.no_grad()
    def __call__(self, samples: Sequence[Sample], needs: Collection[str], top1_temperature: float = 1.0) -> None:
        """Set the needed measures of every sample; samples without teachers have none but ``policy_logratio``.

        Tokens of turns without weight are left out; their values are 0.

        Args:
            samples: scored.
            needs: names of the fields.
            top1_temperature: of the distributions behind ``teacher_top1``.
        """
        shown = [sample for sample in samples if sample.teacher_targets]
        if any(name in needs for name in (*OWN, *COMPARED)):
            parts = self._states(shown)
            self._student(parts, needs)
            if any(name in needs for name in COMPARED):
                self._compare(parts)
        if "policy_logratio" in needs:
            self._moved([sample for sample in samples if not sample.teacher_targets])
        wanted = [name for name in READ if name in needs]
        columns = self._teachers(shown, wanted, top1_temperature) if wanted else {}
        for i, sample in enumerate(shown):
            for name in wanted:
                setattr(sample, name, np.stack([columns[i, teacher][name] for teacher in sample.teachers], axis=1))

    def _states(self, samples: Sequence[Sample]) -> list[tuple[Sample, torch.Tensor]]:
        """The samples with the student's hidden states that predict their targets."""
        ids, images = [s.token_ids for s in samples], [s.images for s in samples]
        states = self.student.score(ids, [s.target_positions for s in samples], images)
        return list(zip(samples, states, strict=True))

    def _student(self, parts: Sequence[tuple[Sample, torch.Tensor]], needs: Collection[str]) -> None:
        """Set what the student alone tells; a ratio without the sampler's log-probs stays None."""
        samples = [sample for sample, _ in parts]
        head = self.student.head.to(parts[0][1].dtype) if parts else self.student.head
        for sample, read in zip(samples, self._read(parts, head), strict=True):
            sample.student_logprob = read["teacher_logprob"]
            if "student_entropy" in needs:
                sample.student_entropy = read["teacher_entropy"]
        for name in (name for name in RATIOS if name in needs):
            same = [name == "policy_logratio" and s.policy_version == self.version for s in samples]
            open_ = [i for i, s in enumerate(samples) if not same[i] and s.sampler_logprob is not None]
            for sample in (s for s, unmoved in zip(samples, same, strict=True) if unmoved):
                setattr(sample, name, np.zeros(len(sample.target_ids), dtype=np.float32))
            own = [np.asarray(samples[i].student_logprob) for i in open_]
            for i, ratio in zip(open_, self._ratios([parts[i] for i in open_], head, own), strict=True):
                setattr(samples[i], name, ratio)

    def _moved(self, samples: Sequence[Sample]) -> None:
        """Set how far the policy has moved, for samples that no teacher judges: rewards alone may train them."""
        still = [s for s in samples if s.policy_version == self.version]
        for sample in still:
            sample.policy_logratio = np.zeros(len(sample.target_ids), dtype=np.float32)
        older = [s for s in samples if s.policy_version != self.version and s.sampler_logprob is not None]
        ids, images = [s.token_ids for s in older], [s.images for s in older]
        states = self.student.score(ids, [s.target_positions for s in older], images)
        head = self.student.head.to(states[0].dtype) if states else self.student.head
        parts = list(zip(older, states, strict=True))
        own = [read["teacher_logprob"] for read in self._read(parts, head)]
        for sample, ratio in zip(older, self._ratios(parts, head, own), strict=True):
            sample.policy_logratio = ratio

    def _ratios(
        self, parts: Sequence[tuple[Sample, torch.Tensor]], head: LMHead, ours: list[np.ndarray]
    ) -> list[np.ndarray]:
        """float32 [T]: log-probs of every part under the student, processed as in sampling, less the sampler's.

        Args:
            parts: samples whose sampler told log-probs, with hidden states.
            head: of the student.
            ours: the student's own log-probs of each, not processed.
        """
        params, samples = self.sampling, [sample for sample, _ in parts]
        if params.repetition_penalty != 1.0 or (params.temperature and (params.top_p < 1.0 or params.top_k)):
            ours = [
                processed_rows(head, s.token_ids, s.target_positions, states, params, self.vocab_size)
                for s, states in parts
            ]
        elif params.temperature not in (0.0, 1.0):
            ours = [read["teacher_logprob"] for read in self._read(parts, head, params.temperature)]
        return [
            np.where(sample.target_turn_weight != 0, mine - np.asarray(sample.sampler_logprob), 0.0).astype(np.float32)
            for sample, mine in zip(samples, ours, strict=True)
        ]

    def _teachers(
        self, samples: Sequence[Sample], wanted: Sequence[str], top1_temperature: float
    ) -> dict[tuple[int, str], dict[str, np.ndarray]]:
        """Return the statistics of every teacher, by sample and teacher, in one pass over each head."""
        columns: dict[tuple[int, str], dict[str, np.ndarray]] = {}
        parts: dict[str, list[tuple[int, torch.Tensor]]] = {}
        for i, sample in enumerate(samples):
            for name, context, targets in zip(sample.teachers, sample.contexts, sample.teacher_targets, strict=True):
                if context.spans is not None:
                    columns[i, name] = self._aligned(sample, context, context.spans, targets)
                elif isinstance(targets, TopK):
                    columns[i, name] = _read_list(targets, self.vocab_size)
                else:
                    parts.setdefault(name, []).append((i, targets.states))
        for name, members in parts.items():
            rows = [(samples[i], states) for i, states in members]
            reads = self._read(rows, self.heads[name])
            if "teacher_top1" in wanted and top1_temperature != 1.0:
                warm = self._read(rows, self.heads[name], top1_temperature)
                reads = [{**r, "teacher_top1": w["teacher_top1"]} for r, w in zip(reads, warm, strict=True)]
            columns |= {(i, name): read for (i, _), read in zip(members, reads, strict=True)}
        return columns

    def _compare(self, parts: Sequence[tuple[Sample, torch.Tensor]]) -> None:
        """Set what student and teacher tell together: of teachers that judge by hidden states, NaN of others."""
        judged: dict[str, list[tuple[Sample, torch.Tensor]]] = {}
        for sample, states in parts:
            for name in COMPARED:
                setattr(sample, name, np.full((len(sample.target_ids), len(sample.teachers)), np.nan, dtype=np.float32))
            for name, context, targets in zip(sample.teachers, sample.contexts, sample.teacher_targets, strict=True):
                if context.spans is None and isinstance(targets, Hidden):
                    judged.setdefault(name, []).append((sample, states))
        for name, members in judged.items():
            for piece in _pieces(members):
                self._compare_piece(piece, name)

    def _compare_piece(self, parts: Sequence[tuple[Sample, torch.Tensor]], name: str) -> None:
        their, places = self.heads[name], [sample.teachers.index(name) for sample, _ in parts]
        said = [sample.teacher_targets[k] for (sample, _), k in zip(parts, places, strict=True)]
        hidden = torch.cat([states for _, states in parts]).to(their.weight.device)
        judged = torch.cat([targets.states for targets in said if isinstance(targets, Hidden)])
        weighs = np.concatenate([sample.target_turn_weight != 0 for sample, _ in parts]).astype(np.float32)
        stats = token_stats(
            hidden,
            self.student.head.to(hidden.dtype),
            [TeacherHead.of(judged.to(their.weight.device, their.weight.dtype), their)],
            token_weight=torch.from_numpy(weighs).to(hidden.device),
            impl=self.impl,
            workspace_bytes=self.workspace_bytes,
            vocab_size=self.vocab_size,
        )
        columns = [x[:, 0].float().nan_to_num().cpu().numpy() for x in (stats.reverse_kl, stats.top1_agreement)]
        start = 0
        for (sample, _), k in zip(parts, places, strict=True):
            end = start + len(sample.target_ids)
            for field_name, values in zip(COMPARED, columns, strict=True):
                getattr(sample, field_name)[:, k] = values[start:end]
            start = end

    def _aligned(
        self, sample: Sample, context: TeacherContext, spans: Spans, targets: TeacherTargets
    ) -> dict[str, np.ndarray]:
        """What a teacher with another tokenizer says: the log-prob of each span, in equal parts for its targets.

        Entropy and largest probability are those of other tokens, and NaN.
        """
        if isinstance(targets, TopK):
            own = targets.logprobs[:, 0]
        else:
            head = self.heads[context.teacher]
            hidden = targets.states.to(head.weight.device)
            labels = torch.from_numpy(context.token_ids[context.target_positions]).to(hidden.device)
            options: Any = {"workspace_bytes": self.workspace_bytes, "vocab_size": spans.vocabulary}
            own = linear_logprob(hidden, head, labels, impl=self.impl, **options).logprob.float().cpu().numpy()
        logprob = np.where(sample.target_turn_weight != 0, spans.shared(own.astype(np.float64)), 0.0)
        unknown = np.full(len(logprob), np.nan, dtype=np.float32)
        return {"teacher_logprob": logprob.astype(np.float32), "teacher_entropy": unknown, "teacher_top1": unknown}

    def _read(
        self, parts: Sequence[tuple[Sample, torch.Tensor]], head: LMHead, temperature: float = 1.0
    ) -> list[dict[str, np.ndarray]]:
        """Log-prob of the target, entropy and largest probability [T] of every part, 0 where no turn has weight."""
        return [read for piece in _pieces(parts) for read in self._read_piece(piece, head, temperature)]

    def _read_piece(
        self, parts: Sequence[tuple[Sample, torch.Tensor]], head: LMHead, temperature: float
    ) -> list[dict[str, np.ndarray]]:
        masks = [sample.target_turn_weight != 0 for sample, _ in parts]
        if not any(mask.any() for mask in masks):
            return [dict.fromkeys(READ, np.zeros(len(mask), dtype=np.float32)) for mask in masks]
        device = head.weight.device
        rows = [
            states[torch.from_numpy(mask).to(states.device)] for (_, states), mask in zip(parts, masks, strict=True)
        ]
        labels = np.concatenate([sample.target_ids[mask] for (sample, _), mask in zip(parts, masks, strict=True)])
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


RATIOS = ("policy_logratio", "sampler_logratio")
OWN = ("student_logprob", "student_entropy", *RATIOS)
"""The measures that need the student only."""
COMPARED = ("teacher_kl", "teacher_agreement")
"""The measures that need the student and a teacher that judges by hidden states."""
READ = ("teacher_logprob", "teacher_entropy", "teacher_top1")
MOST_ROWS = 32768
"""Hidden states that are on the device at a time (those of one sample always are)."""


def _pieces(parts: Sequence[tuple[Sample, torch.Tensor]]) -> list[list[tuple[Sample, torch.Tensor]]]:
    """Consecutive parts of at most :data:`MOST_ROWS` rows together."""
    pieces: list[list[tuple[Sample, torch.Tensor]]] = []
    rows = MOST_ROWS
    for part in parts:
        rows += len(part[1])
        if rows > MOST_ROWS:
            pieces.append([])
            rows = len(part[1])
        pieces[-1].append(part)
    return pieces


def _read_list(targets: TopK, vocabulary: int) -> dict[str, np.ndarray]:
    """Return the statistics of a truncated list. The entropy is an upper bound, which a flat tail reaches."""
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
