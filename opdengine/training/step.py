"""One step of distillation, read from top to bottom in :meth:`Engine.prepare` and :meth:`Engine.finish`."""

from __future__ import annotations

import asyncio
import hashlib
import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, TypeVar

import numpy as np
import torch

from opd_kernels import LMHead
from opdengine.config.train import TrainConfig
from opdengine.distributed import Ranks
from opdengine.environments.episodes import Episodes, Job, episode_metrics
from opdengine.loss.objective import LossOf, Objective, set_scales
from opdengine.loss.statistics import Statistics
from opdengine.loss.vocab_parallel import VocabParallel
from opdengine.methods.method import Method
from opdengine.models.backbone import Backbone
from opdengine.models.policy import policy
from opdengine.models.reply import encode_prompt
from opdengine.rollout import Sampler
from opdengine.teachers import Teacher
from opdengine.teachers.shard import Session
from opdengine.training import sanity
from opdengine.training.agreement import processed_differences
from opdengine.training.optimizer_step import (
    backward,
    clip_gradients,
    describe,
    gradient_norm,
    micro_batches,
    some_values,
)
from opdengine.training.scoring import Measurer, score
from opdengine.training.step_result import StepResult, step_result
from opdengine.training.token_log import logged
from opdengine.types import Batch, Prompt, Request, Sample, SamplingParams, Turn
from opdengine.verifiers.grader import Grader

logger = logging.getLogger(__name__)

T = TypeVar("T")


class Diagnostics(Protocol):
    """Measures a weighed batch without changing it. All processes call it at the same time."""

    async def __call__(self, engine: Engine, batch: Batch) -> Mapping[str, float]:
        """Metrics of a weighed batch, the same on all processes."""
        ...


@dataclass
class Engine:
    """Student, teachers, sampler and optimiser of one run.

    Args:
        config: of the run.
        method: says who judges, with which weights.
        student: the trained model.
        tokenizer: the student's.
        teachers: frozen.
        sampler: holds the student's weights of :attr:`version`.
        optimizer, scheduler: update the student.
        vocab_size: ids of the tokenizer; heads may be wider.
        episodes: plays in an environment; None answers prompts in one turn.
        grader: rewards what is sampled, for methods that need it.
        ranks: the processes that share the prompts of every batch.
        session: of the teachers whose weights are split over the ranks.
        vocabulary: splits the loss over the ranks by vocabulary; None splits it by rows.
        diagnostics: measures weighed batches, where asked; None measures nothing.
        version: optimiser steps taken.
    """

    config: TrainConfig
    method: Method
    student: Backbone
    tokenizer: Any
    teachers: Sequence[Teacher]
    sampler: Sampler
    optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LambdaLR
    vocab_size: int
    episodes: Episodes | None = None
    grader: Grader | None = None
    ranks: Ranks = field(default_factory=Ranks)
    session: Session | None = None
    vocabulary: VocabParallel | None = None
    diagnostics: Diagnostics | None = None
    version: int = 0
    probed: bool = False
    _turn: asyncio.Lock = field(default_factory=asyncio.Lock)

    def __post_init__(self) -> None:
        self.method.teachers, self.method.ranks = self.teachers, self.ranks

    # ---------------------------------------------------------------------------- the step

    async def step(self, prompts: Sequence[Prompt], number: int | None = None) -> StepResult:
        """One optimiser step on one batch of prompts, everything in turn."""
        result = await self.finish(await self.prepare(prompts, number))
        result.metrics |= await self.sync()
        return result

    async def prepare(self, prompts: Sequence[Prompt], number: int | None = None) -> Batch:
        """The first half of a step; it may run while an earlier batch is finished, so no rank waits for another.

        Args:
            prompts: of the batch, of all ranks.
            number: of the batch, which seeds the sampling; default: the version.
        """
        batch = await self.alone(self.rollout(prompts, self.version if number is None else number))
        await self.alone(self.reward(batch))
        self.method.split(batch)
        await self.annotate(batch)
        return batch

    async def finish(self, batch: Batch) -> StepResult:
        """Scores and the update; :meth:`sync` must follow before the sampler is used again."""
        self.check_versions(batch)
        self.method.select(batch)
        await self.ranks.agreed(self.score(batch))
        await self.run_in_thread(self.measure, batch)
        self.weigh(batch)
        found = await self.diagnose(batch)
        result = await self.run_in_thread(self.update, batch, found)
        for sample in batch.samples:  # hidden states would stay in memory until the samples are gone
            sample.teacher_targets = ()
        return result

    async def sync(self) -> dict[str, float]:
        """Give the sampler the student's weights, unless it has them."""
        batch = Batch()
        with batch.timed("sync"):
            async with self._turn:
                if self.sampler.policy_version != self.version:
                    load = self.run_in_thread(self.sampler.load_policy, self.version, *policy(self.student.model))
                    await self.ranks.agreed(load)
        return {"timing/sync": batch.timing["sync"]}

    # -------------------------------------------------------------------------- its phases

    async def rollout(self, prompts: Sequence[Prompt], number: int) -> Batch:
        """The sequences of this rank's share of a batch: sampled from the student, or written by others."""
        batch, mine = Batch(number), self.ranks.share(len(prompts))
        given = [place for place in mine if self.method.is_written(prompts[place], number)]
        with batch.timed("rollout"):
            if self.method.writes or self.method.mixes:  # also with nothing to write: ranks share teachers' calls
                await self.write(prompts, given, batch)
            if self.method.writes:
                return batch
            own = [place for place in mine if place not in set(given)]
            async with self._turn:  # in the order of the batches, and not between weights and version
                work = self.sample if self.episodes is None else self.play
                await self.run_in_thread(work, prompts, own, batch)
        batch.samples.sort(key=lambda sample: int(sample.group))  # the same, on however many ranks
        return batch

    async def write(self, prompts: Sequence[Prompt], places: Sequence[int], batch: Batch) -> None:
        """Add the sequences of some prompts that the method makes."""
        async with self.calls():
            written = await self.method.write([prompts[place] for place in places], self.encode)
        batch.samples += [
            replace(sample, id=str(place), group=str(place), policy_version=self.version)
            for place, sample in zip(places, written.samples, strict=True)
        ]
        batch.metrics |= written.metrics

    def sample(self, prompts: Sequence[Prompt], mine: Sequence[int], batch: Batch) -> None:
        """Add ``num_generations`` samples of the sampler's policy for each of some prompts."""
        encoded = [self.encode(prompts[place]) for place in mine]
        # A prompt that comes again in a later step gets new samples; a resumed run, or one on another
        # number of ranks, gets the same.
        requests = [
            Request(prompts[place].id, ids, seed=_seed(batch.number, place))
            for place, ids in zip(mine, encoded, strict=True)
        ]
        version = self.sampler.policy_version
        sampled = self.sampler.generate(requests, self.sampling_params())
        self._let_sleep()
        batch.samples += [
            Sample(
                id=f"{place}.{i}",
                prompt=prompts[place],
                turns=(
                    Turn.of_prompt(ids),
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

    def play(self, prompts: Sequence[Prompt], mine: Sequence[int], batch: Batch) -> None:
        """``num_generations`` episodes of the sampler's policy for each of some tasks."""
        assert self.episodes is not None
        count = self.config.num_generations
        jobs = [
            Job(
                f"{place}.{i}",
                prompts[place],
                _seed(batch.number, place * count),
                group=str(place),
                sampling_seed=_seed(batch.number, place * count + i),
            )
            for place in mine
            for i in range(count)
        ]
        batch.samples, broken = self.episodes.play(self.sampler, jobs, self.sampling_params())
        self._let_sleep()
        batch.lost.update(broken)
        batch.metrics["episodes/begun"] = float(len(jobs))
        batch.metrics |= episode_metrics(batch.samples) | self.episodes.counts()

    async def reward(self, batch: Batch) -> None:
        """Set the verifier's scores, where the method needs them and the environment has given none."""
        if not self.method.needs_reward or self.grader is None:
            return
        open_ = [sample for sample in batch if sample.reward is None]
        with batch.timed("reward"):
            prompts = [sample.prompt for sample in open_]
            scores = await asyncio.to_thread(self.grader.grade, [sample.text for sample in open_], prompts)
        batch.metrics |= {**self.grader.counts(), "verifier/graded": float(len(open_))}
        for sample, given in zip(open_, scores, strict=True):
            sample.reward, sample.info = given.value, {**sample.info, "feedback": given.detail}

    async def annotate(self, batch: Batch) -> None:
        """Contexts and weights of the teachers; what does not fit a teacher's window is dropped."""
        with batch.timed("debate"):
            async with self.calls():
                await self.method.annotate(batch)
        windows = {t.name: t.window for t in self.teachers}
        for sample in batch:
            for context in sample.contexts:
                context.check(sample)
                window = windows[context.teacher]
                if window is not None and len(context.token_ids) > window:
                    sample.drop = f"teacher_window/{context.teacher}"

    def check_versions(self, batch: Batch) -> None:
        """No sample is older than allowed; a metric says how old the oldest is."""
        if not self.method.writes:
            versions = self.ranks.join(sorted({sample.policy_version for sample in batch.samples}))
            batch.metrics |= sanity.fresh(versions, self.version, self.config.max_staleness)

    async def score(self, batch: Batch) -> None:
        """Set every teacher's targets; see :func:`opdengine.training.scoring.score`."""
        with batch.timed("score"):
            async with self.calls():
                await score(batch, self.teachers, self.vocab_size, self.student.vision)

    def measure(self, batch: Batch) -> None:
        """Measure the statistics that the method needs; no model runs where it needs none."""
        c, method = self.config, self.method
        if not method.needs:
            return
        heads = {t.name: t.head for t in self.teachers if t.head is not None}
        self.student.model.eval()
        measurer = Measurer(
            self.student, heads, self.vocab_size, c.loss_impl, c.workspace_bytes, self.sampling_params(), self.version
        )
        with batch.timed("score"):
            self.student.with_weights(lambda: measurer(list(batch), method.needs, method.top1_temperature))

    def weigh(self, batch: Batch) -> None:
        """Set the method's weights, then the loss denominators of the whole step."""
        self.method.weigh(batch)
        set_scales(list(batch), self.config.loss_normalization, self.ranks)

    async def diagnose(self, batch: Batch) -> Mapping[str, float]:
        """Return the metrics of the diagnostics, where there are any."""
        if self.diagnostics is None:
            return {}
        with batch.timed("diagnose"):
            return await self.diagnostics(self, batch)

    def update(self, batch: Batch, found: Mapping[str, float] | None = None) -> StepResult:
        """Forward, backward and one optimiser step over all micro-batches.

        Samples without any weight are not run; a step of which nothing is left moves no weight, and
        neither does one whose loss or gradient is not finite: what entered it is in the result's ``bad``.

        Args:
            batch: weighed.
            found: further metrics, the same on all ranks.
        """
        config, bad = self.config, list[Mapping[str, Any]]()
        of_tokens = config.log_tokens if config.log_completions else "none"
        shown = logged(batch.samples, of_tokens, self.ranks.world_size)
        statistics = Statistics(self.ranks.join([sample.id for sample in shown]))
        # Without a divergence the loss itself tells nothing of the teachers.
        if not self.ranks.sum(sum(bool(np.any(sample.kl_weight)) for sample in batch)):
            for sample in batch:
                statistics.add_measured(sample)
        with batch.timed("update"):
            updated = self._update([sample for sample in batch if sample.has_weight], statistics, bad)
        for teacher in self.teachers:
            batch.metrics |= teacher.counts()
        updated = {**(found or {}), **updated}
        return step_result(batch, self.ranks, statistics, updated, bad, config.log_completions, shown)

    def _update(
        self, samples: Sequence[Sample], statistics: Statistics, bad: list[Mapping[str, Any]]
    ) -> dict[str, float]:
        if not self.ranks.sum(len(samples)):
            return {"skipped_steps": 1.0, "policy_version": float(self.version)}
        loss_of = self._loss(statistics)
        self.student.model.train()
        self.optimizer.zero_grad(set_to_none=True)
        student = self.student
        batches = micro_batches(
            samples, self.config.max_tokens_per_batch, student.layout, student.regimes, student.image_layout
        )
        losses = backward(self.student, batches, loss_of)
        loss = self.ranks.sum(sum(losses))
        statistics.join(self.ranks)
        norm = gradient_norm(self.student.model)
        if not np.isfinite(loss) or not np.isfinite(norm):
            logger.warning("version %d: loss %g, gradient norm %g: no update", self.version, loss, norm)
            self.optimizer.zero_grad(set_to_none=True)
            bad.extend(self.ranks.join(describe(batches, losses)))
            return {"bad_steps": 1.0, "policy_version": float(self.version)}
        metrics = self._check(statistics, samples)  # before anything wrong can reach the weights
        return metrics | self._optimizer_step(loss, norm)

    # ----------------------------------------------------------------------------- helpers

    def _let_sleep(self) -> None:
        if self.config.vllm_enable_sleep_mode:
            self.sampler.sleep()

    def calls(self) -> AbstractAsyncContextManager[None]:
        """Return a context in which teachers can be called; all ranks enter it equally often."""
        return nullcontext() if self.session is None else self.session.open()

    async def alone(self, work: Awaitable[T]) -> T:
        """Await work that no rank waits for, unless teachers are split: then all ranks learn of a failure here."""
        return await (work if self.session is None else self.ranks.agreed(work))

    def encode(self, prompt: Prompt, answer: str | None = None, **written: Any) -> list[int]:
        """The prompt in the student's chat template, or an answer behind it; see :func:`encode_prompt`."""
        return encode_prompt(self.tokenizer, self.config.chat_template_kwargs, prompt, answer, **written)

    def sampling_params(self) -> SamplingParams:
        """Return how the student is sampled in training."""
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
            vocab_sample=c.vocab_sample,
            draw=f"{c.seed} {self.version}",
            gold=c.gold,
        )

    async def run_in_thread(self, function: Callable[..., T], *arguments: Any) -> T:
        """Call a blocking function; in a thread where batches overlap, so that the next ones go on meanwhile."""
        if not self.config.max_staleness:
            return function(*arguments)

        def call() -> T:
            if self.student.device.type == "cuda":
                torch.cuda.set_device(self.student.device)  # new threads start on the first GPU
            return function(*arguments)

        return await asyncio.to_thread(call)

    def _loss(self, statistics: Statistics) -> LossOf:
        """The loss of a micro-batch from its final hidden states."""
        objective = self.objective()
        if self.vocabulary is not None:
            return self.vocabulary.loss(objective, self.student, statistics, self._check_once)

        def loss_of(hidden: torch.Tensor, members: Sequence[Sample]) -> torch.Tensor:
            head = self.student.head  # only whole during a pass
            self._check_once(hidden, head, members)
            return objective(hidden, head, members, statistics)

        return loss_of

    def _check_once(self, hidden: torch.Tensor, head: LMHead, samples: Sequence[Sample]) -> None:
        if self.probed or not samples or not samples[0].teachers:
            return
        c, group = self.config, None if self.vocabulary is None else self.vocabulary.group
        chosen = [kind for s in samples if s.divergence_kind is not None for kind in s.divergence_kind.tolist()]
        for divergence in sorted({*chosen, *(c.divergence_of(s.prompt.key) for s in samples)}):
            sanity.self_distillation_is_zero(hidden, head, divergence, self.vocab_size, c.loss_impl, group)
        self.probed = True

    def _check(self, statistics: Statistics, samples: Sequence[Sample]) -> dict[str, float]:
        """Run the checks that need the statistics of the step; return what they measured."""
        sanity.teachers_are_alive(statistics, [t.name for t in self.teachers], self.vocab_size)
        if self.method.writes:
            return {}
        return sanity.sampler_agrees(self._differences(statistics, samples), self.config.max_logprob_difference)

    def _differences(self, statistics: Statistics, samples: Sequence[Sample]) -> np.ndarray:
        """Trainer minus sampler log-probs: of all targets where the loss has them, else of a few."""
        params = self.sampling_params()
        known = statistics.get("logprob_difference")
        same = sanity.samples_the_model(params) and not self.student.has_dropout
        if len(known) and same and self.config.divergence_temperature == 1.0:
            return known
        self.student.model.eval()
        differences = self.student.with_weights(
            lambda: processed_differences(self.student, samples, params, self.vocab_size)
        )
        self.student.model.train()
        return np.concatenate(self.ranks.gather(differences))

    def _optimizer_step(self, loss: float, norm: float) -> dict[str, float]:
        clip_gradients(self.student.model, self.config.max_grad_norm, norm)
        learning_rate = float(self.scheduler.get_last_lr()[0])
        before = some_values(self.student.model)
        self.optimizer.step()
        changed = before != some_values(self.student.model)
        moved = self.ranks.sum(float(changed.sum()))
        seen = self.ranks.sum(changed.numel()) if self.student.model.dtype == torch.bfloat16 else 0.0
        self.optimizer.zero_grad(set_to_none=True)  # nothing of them is held while the next batch is sampled and scored
        self.scheduler.step()
        self.version += 1
        return {
            "loss": loss,
            "grad_norm": norm,
            "learning_rate": learning_rate,
            "policy_version": float(self.version),
            **({} if moved or not learning_rate else {"lost_updates": 1.0}),
            **({"weights_moved": moved / seen} if seen else {}),
        }


def _seed(version: int, place: int) -> int:
    digest = hashlib.sha256(f"{version}:{place}".encode()).digest()
    return int.from_bytes(digest[:6], "big")
