"""One step of distillation, read from top to bottom in :meth:`Engine.prepare` and :meth:`Engine.finish`."""

from __future__ import annotations

import asyncio
import hashlib
import logging
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch

from opdengine import probes
from opdengine.agreement import processed_differences
from opdengine.backbone import Backbone, Head
from opdengine.chat import encode_chat
from opdengine.config import TrainConfig
from opdengine.distributed import Ranks
from opdengine.lora import policy
from opdengine.objective import Item, Objective, make_item, normalisers
from opdengine.recipe import Annotations, Batch, Note, Recipe, Stats, combine
from opdengine.report import Clock, Prepared, StepResult, merge_ranks, summarise
from opdengine.rollout import Sampler
from opdengine.rollout.episodes import Episodes, Job, episode_metrics
from opdengine.scoring import Judged, Measurer, judge
from opdengine.tally import Tally
from opdengine.teachers import Teacher
from opdengine.teachers.shard import Session
from opdengine.types import Prompt, Request, Rollout, SamplingParams, Turn
from opdengine.update import LossOf, backward, clip_gradients, describe, gradient_norm
from opdengine.vocab_parallel import VocabParallel

if TYPE_CHECKING:
    from opdengine.verifiers.grader import Grader

logger = logging.getLogger(__name__)

T = TypeVar("T")


@dataclass
class Engine:
    """Student, teachers, sampler and optimiser of one run.

    Args:
        config: of the run.
        recipe: of the method.
        student: the trained model.
        tokenizer: the student's.
        teachers: frozen.
        sampler: holds the student's weights of :attr:`version`.
        optimizer, scheduler: update the student.
        vocab_size: ids of the tokenizer; heads may be wider.
        episodes: plays in an environment; None answers prompts in one turn.
        grader: rewards what is sampled, for recipes that need it.
        ranks: the processes that share the prompts of every batch.
        session: of the teachers whose weights are split over the ranks.
        vocabulary: splits the loss over the ranks by vocabulary; None splits it by rows.
        version: optimiser steps taken.
    """

    config: TrainConfig
    recipe: Recipe
    student: Backbone
    tokenizer: Any
    teachers: Sequence[Teacher]
    sampler: Sampler
    optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LRScheduler
    vocab_size: int
    episodes: Episodes | None = None
    grader: Grader | None = None
    ranks: Ranks = field(default_factory=Ranks)
    session: Session | None = None
    vocabulary: VocabParallel | None = None
    version: int = 0
    probed: bool = False
    _turn: asyncio.Lock = field(default_factory=asyncio.Lock)

    async def step(self, prompts: Sequence[Prompt], batch: int | None = None) -> StepResult:
        """One optimiser step on one batch of prompts, everything in turn."""
        result = await self.finish(await self.prepare(prompts, batch))
        result.metrics |= await self.sync()
        return result

    async def prepare(self, prompts: Sequence[Prompt], batch: int | None = None) -> Prepared:
        """Rollouts and debate of this rank's share of a batch; may run while an earlier batch is finished.

        Args:
            prompts: of the batch, of all ranks.
            batch: its number, which seeds the sampling; default: the version.
        """
        clock, dropped = Clock(), Counter[str]()
        number = self.version if batch is None else batch
        with clock("rollout"):
            rollouts, metrics = await self.settled(self.rollout(prompts, number, dropped))
        if self.recipe.needs_reward and self.grader is not None:
            with clock("reward"):
                rollouts = await self.settled(asyncio.to_thread(self.reward, rollouts, metrics))
        if self.recipe.split is not None:
            whole = rollouts
            rollouts = self.recipe.split(whole, number)
            dropped["not_chosen"] += sum(r.trained_turns for r in whole) - sum(r.trained_turns for r in rollouts)
        with clock("debate"):
            notes, found = await self.annotate(rollouts)
        return Prepared(rollouts, notes, found, {**metrics, **found.metrics}, clock, dropped, number)

    async def finish(self, prepared: Prepared) -> StepResult:
        """Scores and the update; :meth:`sync` must follow before the sampler is used again."""
        clock, metrics = prepared.clock, prepared.metrics
        rollouts = self.ranks.join(prepared.rollouts)
        found: dict[str, float] = {}  # what is the same on all ranks
        if self.recipe.demonstrations is None:
            found |= probes.fresh(rollouts, self.version, self.config.max_staleness)
        notes, revised = self.revise(rollouts, prepared.notes, prepared.number)
        found |= revised
        with clock("score"):
            judged = await self.ranks.agreed(self.judge(prepared.rollouts, notes, prepared.dropped))
            stats = await self.beside(self.measure, judged)
        items, weighed = self.weigh(judged, stats, prepared.dropped, prepared.number)
        found |= weighed
        tally, bad = Tally(), list[Mapping[str, object]]()
        if not self.ranks.sum(sum(bool(np.any(item.kl_weight)) for item in items)):
            for item, known in zip(judged, stats, strict=True):
                tally.add_measured(item.teachers, item.rollout, known)
        if self.recipe.inspector is not None:
            with clock("inspect"):
                found |= await self.recipe.inspector(self, judged, stats, items, prepared.number)
        with clock("update"):
            updated = await self.beside(self.update, items, tally, bad)
        for teacher in self.teachers:
            metrics |= teacher.counts()
        merged, records = merge_ranks(self.ranks, prepared, len(items))
        merged |= found | updated | summarise(rollouts, tally)
        merged["completions/sampled"] = float(len(rollouts))
        seconds = sum(value for name, value in merged.items() if name.startswith("timing/"))
        merged["perf/tokens_per_second"] = sum(len(r.targets) for r in rollouts) / seconds
        return StepResult(merged, rollouts, records, bad)

    async def sync(self) -> dict[str, float]:
        """Give the sampler the student's weights, unless it has them."""
        clock = Clock()
        with clock("sync"):
            async with self._turn:
                if self.sampler.policy_version != self.version:
                    load = self.beside(self.sampler.load_policy, self.version, *policy(self.student.model))
                    await self.ranks.agreed(load)
        return {"timing/sync": clock["sync"]}

    # -------------------------------------------------------------------------------- phases

    async def rollout(
        self, prompts: Sequence[Prompt], number: int, dropped: Counter[str]
    ) -> tuple[list[Rollout], dict[str, float]]:
        """The sequences of this step: sampled from the student, or written by teachers."""
        if self.recipe.demonstrations is not None:
            mine = self.ranks.share(len(prompts))
            async with self.calls():
                written, metrics = await self.recipe.demonstrations(
                    [prompts[place] for place in mine], self.teachers, self.encode
                )
            rollouts = [replace(r, id=str(place)) for place, r in zip(mine, written, strict=True)]
            return rollouts, dict(metrics)
        async with self._turn:  # in the order of the batches, and not between weights and version
            if self.episodes is not None:
                return await self.beside(self.play, prompts, number, dropped)
            return await self.beside(self.sample, prompts, number), {}

    def sample(self, prompts: Sequence[Prompt], number: int) -> list[Rollout]:
        """``num_generations`` rollouts of the sampler's policy for every prompt of this rank."""
        mine = self.ranks.share(len(prompts))
        encoded = [self.encode(prompts[place]) for place in mine]
        # A prompt that comes again in a later step gets new samples; a resumed run, or one on another
        # number of ranks, gets the same.
        requests = [
            Request(prompts[place].id, tuple(ids), seed=_seed(number, place))
            for place, ids in zip(mine, encoded, strict=True)
        ]
        version = self.sampler.policy_version
        sampled = self.sampler.generate(requests, self.sampling_params())
        self._let_sleep()
        return [
            Rollout(
                id=f"{place}.{i}",
                prompt=prompts[place],
                turns=(
                    Turn("prompt", np.array(ids)),
                    Turn("assistant", completion.token_ids, completion.logprobs, True),
                ),
                policy_version=version,
                stop_reason=completion.stop_reason,
                group=str(place),
                text=completion.text,
            )
            for place, ids, completions in zip(mine, encoded, sampled, strict=True)
            for i, completion in enumerate(completions)
        ]

    def play(
        self, prompts: Sequence[Prompt], number: int, dropped: Counter[str]
    ) -> tuple[list[Rollout], dict[str, float]]:
        """``num_generations`` episodes of the sampler's policy for every task of this rank."""
        assert self.episodes is not None
        count = self.config.num_generations
        jobs = [
            Job(f"{place}.{i}", prompts[place], _seed(number, place * count + i), group=str(place))
            for place in self.ranks.share(len(prompts))
            for i in range(count)
        ]
        rollouts, broken = self.episodes.play(self.sampler, jobs, self.sampling_params())
        self._let_sleep()
        dropped.update(broken)
        begun = {"episodes/begun": float(len(jobs))}
        return rollouts, begun | episode_metrics(rollouts) | self.episodes.counts()

    def reward(self, rollouts: Sequence[Rollout], metrics: dict[str, float]) -> list[Rollout]:
        """The rollouts with the verifier's scores, where the environment has given none."""
        assert self.grader is not None
        open_ = [r for r in rollouts if r.reward is None]
        scores = self.grader.grade([r.text for r in open_], [r.prompt for r in open_])
        metrics |= {**self.grader.counts(), "verifier/graded": float(len(open_))}
        graded = {r.id: replace(r, reward=s.value) for r, s in zip(open_, scores, strict=True)}
        return [graded.get(r.id, r) for r in rollouts]

    def _let_sleep(self) -> None:
        if self.config.vllm_enable_sleep_mode:
            self.sampler.sleep()

    async def annotate(self, rollouts: Sequence[Rollout]) -> tuple[list[Note], Annotations]:
        """Contexts and weights of the teachers; what does not fit a teacher's window is dropped."""
        async with self.calls():
            found = await self.recipe.annotator.annotate(rollouts, self.teachers)
        windows = {t.name: t.window for t in self.teachers}
        notes = []
        for rollout, note in zip(rollouts, found.notes, strict=True):
            for context in note.contexts:
                context.check(rollout)
                window = windows[context.teacher]
                if window is not None and len(context.token_ids) > window:
                    note = Note(drop=f"teacher_window/{context.teacher}")
            notes.append(note)
        return notes, found

    def revise(
        self, rollouts: Sequence[Rollout], notes: Sequence[Note], number: int
    ) -> tuple[Sequence[Note], Mapping[str, float]]:
        """This rank's notes as the recipe revises those of all ranks, whose rollouts are given; metrics."""
        if self.recipe.revise is None:
            return notes, {}
        revised, metrics = self.recipe.revise(rollouts, self.ranks.join([note.light() for note in notes]), number)
        first = sum(self.ranks.gather(len(notes))[: self.ranks.rank])
        return [replace(revised[first + i], contexts=note.contexts) for i, note in enumerate(notes)], metrics

    async def judge(self, rollouts: Sequence[Rollout], notes: Sequence[Note], dropped: Counter[str]) -> list[Judged]:
        """What every teacher says about its contexts; see :func:`opdengine.scoring.judge`."""
        async with self.calls():
            return await judge(rollouts, notes, self.teachers, self.vocab_size, dropped)

    def measure(self, judged: Sequence[Judged]) -> list[Stats]:
        """The statistics that the recipe's weighers need; nothing is run where they need none."""
        c, recipe = self.config, self.recipe
        if not recipe.measures:
            return [Stats() for _ in judged]
        heads = {t.name: t.head for t in self.teachers if t.head is not None}
        self.student.model.eval()
        measurer = Measurer(
            self.student, heads, self.vocab_size, c.loss_impl, c.workspace_bytes, self.sampling_params(), self.version
        )
        return self.student.within(lambda: measurer(judged, recipe.measures, recipe.top1_temperature))

    def weigh(
        self, judged: Sequence[Judged], stats: Sequence[Stats], dropped: Counter[str], number: int = 0
    ) -> tuple[list[Item], dict[str, float]]:
        """Normalised loss items of what the weighers keep, the rest counted by reason; metrics.

        Weighers and normalisers see the rollouts of all ranks; items and counts are this rank's.
        """
        rollouts = self.ranks.join([item.rollout for item in judged])
        notes = self.ranks.join([item.note.light() for item in judged])
        batch = Batch(rollouts, notes, self.ranks.join(stats), number)
        weighed = combine([weigher(batch) for weigher in self.recipe.weighers])
        kept = [i for i, signal in enumerate(weighed.signals) if signal.keep]
        scales = dict(zip(kept, normalisers([rollouts[i] for i in kept], self.config.loss_normalization), strict=True))
        first = sum(self.ranks.gather(len(judged))[: self.ranks.rank])
        items = []
        for i, item in enumerate(judged, start=first):
            signal = weighed.signals[i]
            if not signal.keep:
                dropped[signal.reason or "unknown"] += 1
                continue
            signal = signal if item.targets else replace(signal, mix=None)
            items.append(make_item(item.rollout, signal, item.teachers, item.targets, scales[i]))
        return items, dict(weighed.metrics)

    def update(
        self, items: Sequence[Item], tally: Tally, bad: list[Mapping[str, object]] | None = None
    ) -> dict[str, float]:
        """Forward, backward and one optimiser step over all micro-batches.

        Rollouts without any weight are not run; a step of which nothing is left moves no weight, and
        neither does one whose loss or gradient is not finite: what entered it is added to ``bad``.
        """
        items = [item for item in items if item.has_weight]
        if not self.ranks.sum(len(items)):
            return {"skipped_steps": 1.0, "policy_version": float(self.version)}
        loss_of = self._loss(tally)
        self.student.model.train()
        self.optimizer.zero_grad(set_to_none=True)
        micro = backward(self.student, items, loss_of, self.config.max_tokens_per_batch)
        loss = self.ranks.sum(sum(part.loss for part in micro))
        tally.join(self.ranks)
        norm = gradient_norm(self.student.model)
        if not np.isfinite(loss) or not np.isfinite(norm):
            logger.warning("version %d: loss %g, gradient norm %g: no update", self.version, loss, norm)
            self.optimizer.zero_grad(set_to_none=True)
            if bad is not None:
                bad.extend(self.ranks.join(describe(micro)))
            return {"bad_steps": 1.0, "policy_version": float(self.version)}
        metrics = self._probe(tally, items)  # before anything wrong can reach the weights
        return metrics | self._optimizer_step(loss, norm)

    # ------------------------------------------------------------------------------- helpers

    def calls(self) -> AbstractAsyncContextManager[None]:
        """Teachers are called within; all ranks come here equally often."""
        return nullcontext() if self.session is None else self.session.open()

    async def settled(self, work: Awaitable[T]) -> T:
        """What comes before such calls: in a session the others would wait for a rank that failed here."""
        return await (work if self.session is None else self.ranks.agreed(work))

    def encode(self, prompt: Prompt) -> list[int]:
        """The prompt in the student's chat template."""
        return encode_chat(self.tokenizer, prompt.messages, prompt.tools, self.config.chat_template_kwargs)

    def sampling_params(self) -> SamplingParams:
        """How the student is sampled in training."""
        c = self.config
        return SamplingParams(
            max_tokens=c.max_completion_length,
            temperature=c.temperature,
            top_p=c.top_p,
            top_k=c.top_k,
            repetition_penalty=c.repetition_penalty,
            stop=tuple(c.environment.stop),
            n=c.num_generations,
            seed=c.seed,
        )

    def objective(self) -> Objective:
        """The loss with the settings of the run."""
        c = self.config
        return Objective(
            heads={t.name: t.head for t in self.teachers if t.head is not None},
            divergence_of=c.divergence_of,
            jsd_beta=c.jsd_beta,
            skew_alpha=c.skew_alpha,
            teacher_reduction=c.teacher_reduction,
            temperature=c.divergence_temperature,
            vocab_size=self.vocab_size,
            impl=c.loss_impl,
            workspace_bytes=c.workspace_bytes,
        )

    async def beside(self, function: Callable[..., T], *arguments: Any) -> T:
        """Call what blocks: in a thread when batches overlap, so that the next ones go on."""
        if not self.config.max_staleness:
            return function(*arguments)

        def call() -> T:
            if self.student.device.type == "cuda":
                torch.cuda.set_device(self.student.device)  # new threads start on the first GPU
            return function(*arguments)

        return await asyncio.to_thread(call)

    def _loss(self, tally: Tally) -> LossOf:
        """The loss of a micro-batch from its final hidden states."""
        objective = self.objective()
        if self.vocabulary is not None:
            return self.vocabulary.loss(objective, self.student, tally, self._probe_once)

        def loss_of(hidden: torch.Tensor, members: Sequence[Item]) -> torch.Tensor:
            head = self.student.head  # whole within a pass only
            self._probe_once(hidden, head, members)
            return objective(hidden, head, members, tally)

        return loss_of

    def _probe_once(self, hidden: torch.Tensor, head: Head, items: Sequence[Item]) -> None:
        if self.probed or not items or not items[0].teachers:
            return
        c, group = self.config, None if self.vocabulary is None else self.vocabulary.group
        for divergence in sorted({c.divergence_of(i.rollout.prompt.key) for i in items}):
            probes.self_distillation_is_zero(hidden, head, divergence, self.vocab_size, c.loss_impl, group)
        self.probed = True

    def _probe(self, tally: Tally, items: Sequence[Item]) -> dict[str, float]:
        """The probes that need the statistics of the step; returns what they measured."""
        probes.teachers_are_alive(tally, [t.name for t in self.teachers], self.vocab_size)
        if self.recipe.demonstrations is not None:
            return {}
        return probes.sampler_agrees(self._differences(tally, items), self.config.max_logprob_difference)

    def _differences(self, tally: Tally, items: Sequence[Item]) -> np.ndarray:
        """Trainer minus sampler log-probs: of all targets where the loss has them, else of a few."""
        params = self.sampling_params()
        known = tally.get("logprob_difference")
        same = probes.samples_the_model(params) and not self.student.has_dropout
        if len(known) and same and self.config.divergence_temperature == 1.0:
            return known
        self.student.model.eval()
        rollouts = [item.rollout for item in items]
        differences = self.student.within(
            lambda: processed_differences(self.student, rollouts, params, self.vocab_size)
        )
        self.student.model.train()
        return np.concatenate(self.ranks.gather(differences))

    def _optimizer_step(self, loss: float, norm: float) -> dict[str, float]:
        clip_gradients(self.student.model, self.config.max_grad_norm, norm)
        learning_rate = float(self.scheduler.get_last_lr()[0])
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)  # nothing of them is held while the next batch is sampled and scored
        self.scheduler.step()
        self.version += 1
        return {
            "loss": loss,
            "grad_norm": norm,
            "learning_rate": learning_rate,
            "policy_version": float(self.version),
        }


def _seed(version: int, place: int) -> int:
    digest = hashlib.sha256(f"{version}:{place}".encode()).digest()
    return int.from_bytes(digest[:6], "big")
