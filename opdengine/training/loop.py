"""The steps of a run, one after the other or with the next batches in preparation."""

from __future__ import annotations

import asyncio
import errno
import json
import logging
import math
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import aclosing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from opdengine.data.prompts import PromptStream, ScheduledStream
from opdengine.distributed import PeerError
from opdengine.errors import NothingTrainedError, ProbeError, ServiceError, WriteError
from opdengine.methods.checks import Watch
from opdengine.metrics import write_jsonl
from opdengine.models.checkpoint import list_checkpoints, save_checkpoint
from opdengine.teachers import TeacherError
from opdengine.teachers.own import starts_of, tensors_of
from opdengine.training.best import Best
from opdengine.training.callbacks import Callbacks, Event
from opdengine.training.progress import Progress
from opdengine.training.run_folder import InputFiles
from opdengine.training.signals import Interrupts
from opdengine.training.step import Engine
from opdengine.training.step_result import StepResult
from opdengine.training.token_log import Pieces, write_tokens
from opdengine.training.writer import MetricsWriter, NoWriter
from opdengine.types import Batch

logger = logging.getLogger(__name__)

RESUMABLE = (ServiceError, TeacherError, ProbeError, FloatingPointError, NothingTrainedError)
"""The errors that end a step before anything wrong has reached the weights."""

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


async def prepared(
    engine: Engine, stream: PromptStream | ScheduledStream, start: int, stop: int, ahead: int
) -> AsyncGenerator[tuple[int, Batch, dict[str, Any]], None]:
    """Batches ``start + 1`` to ``stop`` in order, with up to ``ahead`` more in preparation.

    A batch is begun no earlier than when batch ``number - ahead - 1`` has been finished, so it is updated
    at most ``ahead`` versions after it was sampled. With ``ahead`` 0 nothing runs while the consumer works.

    Yields:
        The batch's number, the batch, and the state of the stream after it was drawn.
    """
    count = engine.config.prompts_per_step * engine.ranks.world_size
    tasks: deque[tuple[asyncio.Task[Batch], dict[str, Any]]] = deque()
    begun = start
    try:
        for number in range(start + 1, stop + 1):
            while begun < min(stop, number + ahead):
                begun += 1
                batch = stream.next(count)
                tasks.append((asyncio.create_task(engine.prepare(batch, begun - 1)), stream.state_dict()))
            task, state = tasks.popleft()
            yield number, await engine.ranks.agreed(task), state
    finally:
        for task, _ in tasks:
            task.cancel()


@dataclass
class Loop:
    """Runs the steps, writes what they report, saves and evaluates. Of several ranks the first one writes.

    Args:
        engine: of the run.
        stream: of its prompts.
        folder: of the run.
        writer: of its metrics.
        measure: step -> evaluation metrics; writes the answers down.
        step: steps finished so far.
        metrics: the last value of every metric.
        first: metrics to write at step 0.
        interrupts: tells when to end early.
        inputs: the files that the prompts were read from.
        notes: what every checkpoint says beside its own state.
        best: which evaluation was the best; None: it does not matter.
        callbacks: of the caller, who may end the run.
    """

    engine: Engine
    stream: PromptStream | ScheduledStream
    folder: Path
    writer: MetricsWriter | NoWriter
    measure: Callable[[int], dict[str, float]]
    step: int
    metrics: dict[str, float]
    first: Mapping[str, float]
    interrupts: Interrupts
    inputs: InputFiles = field(default_factory=InputFiles)
    notes: Mapping[str, Any] = field(default_factory=dict)
    best: Best | None = None
    callbacks: Callbacks = field(default_factory=Callbacks)

    def __post_init__(self) -> None:
        self.position = self.stream.state_dict()
        config, engine = self.engine.config, self.engine
        self.pieces = Pieces(engine.tokenizer)
        self.watch = Watch(
            engine.method.checks,
            self.folder,
            config.max_bad_steps,
            speaks=engine.ranks.is_first,
            logs=config.log_completions,
            trained=engine.version > 0,
        )

    async def run(self, bar: Progress) -> None:
        """All steps up to ``max_steps``; when a service fails, the last finished one is saved.

        Closes the sampler at the end.

        Raises:
            NothingTrainedError: no weight could move in too many steps in a row, or in any at all.
        """
        config = self.engine.config
        try:
            await self.engine.sync()
            if self.step == 0 and (config.eval_data or config.environment.eval_splits or self.first):
                await self._before_training(bar)
            last_step = self.step if self._is_over() or self._is_stopped() else config.max_steps
            batches = prepared(self.engine, self.stream, self.step, last_step, config.max_staleness)
            last = time.perf_counter()
            async with aclosing(batches):
                async for number, batch, position in batches:
                    with self.interrupts.whole():
                        result = await self.engine.finish(batch)
                        self.step, self.position = number, position
                        self.metrics |= result.metrics
                        try:
                            result.metrics |= await self.engine.sync()
                        except Exception:
                            self._log(dict(result.metrics), result)  # the step itself is finished
                            raise
                        now = time.perf_counter()
                        result.metrics["timing/step"] = now - last
                        last = now
                        line = await self._report(result)
                        bar.advance(number, line, self.metrics, result.samples)
                    self._tell("on_step", Event(number, line, result.completions))
                    if self._is_over() or self._is_stopped():
                        break
            if self.step:
                self.watch.finish(self.step)
        except OSError as error:
            if error.errno in FULL:
                raise WriteError(
                    f"step {self.step + 1}: a file could not be written ({error}); make room, then continue the run "
                    "with --resume_from_checkpoint latest"
                ) from error
            raise
        except Exception as error:
            kind = error.kind if isinstance(error, PeerError) else type(error)
            worthless = issubclass(kind, NothingTrainedError) and not self.engine.version
            if issubclass(kind, RESUMABLE) and not worthless:
                self.rescue(type(error).__name__)
            raise
        finally:
            self.engine.sampler.close()  # ends what is still being sampled

    async def _before_training(self, bar: Progress) -> None:
        """Evaluate the student as it is given, and write that down with the first metrics."""
        measured = await self.engine.run_in_thread(self.measure, 0)
        self.metrics |= {**measured, **self.first}
        if self.best is not None:
            self.best.require(self.metrics)
        with self.engine.ranks.agree():
            self.writer.write(0, self.metrics)
        bar.advance(0, self.metrics, self.metrics)
        self._tell_of_evaluation(measured)

    async def _report(self, result: StepResult) -> dict[str, float]:
        """Evaluate where that is due, and write, save and tell what the step has given."""
        config, step = self.engine.config, self.step
        line, measured = dict(result.metrics), dict[str, float]()
        is_best, is_last = False, step == config.max_steps
        if _due(step, config.eval_steps) or is_last:
            measured = await self.engine.run_in_thread(self.measure, step)
            line |= measured
            is_best = self.best is not None and self.best.look(step, measured)
            is_last = is_last or (self.best is not None and self.best.exhausted)
        self.metrics |= line
        self._log(line, result)
        if is_best or _due(step, config.save_steps) or (is_last and config.save_steps):
            self._save()
        self._write_bad(result)
        self._tell_of_evaluation(measured)
        self.watch.look(step, line)
        return line

    def _is_over(self) -> bool:
        """Whether the run ends before ``max_steps``; says why."""
        best = self.best
        if best is None or not best.exhausted:
            return False
        logger.info(
            "step %d: %s has not become better in %d evaluations (the best is %.4g at step %s): the run ends here "
            "(early_stopping_patience)",
            self.step, best.metric, best.waited, math.nan if best.value is None else best.value, best.step,
        )  # fmt: skip
        return True

    def _log(self, line: dict[str, float], result: StepResult) -> None:
        """Write a step's metrics and what was sampled in it."""
        config, step = self.engine.config, self.step
        with self.engine.ranks.agree():
            if _due(step, config.logging_steps) or len(line) > len(result.metrics):
                self.writer.write(step, line)
            if config.log_completions and self.engine.ranks.is_first:
                self._log_completions(result)

    def _log_completions(self, result: StepResult) -> None:
        name = f"step_{self.step}"
        write_jsonl(self.folder / "rollouts" / f"{name}.jsonl", result.completions)
        if _due(self.step, self.engine.config.logging_steps):
            self.writer.table("completions", self.step, result.completions)
        if result.tokens:
            write_tokens(self.folder / "tokens" / f"{name}.npz", result.tokens, self.pieces)
        verdicts = [dict(r) for r in result.records if "verdict" in r]
        debates = [dict(r) for r in result.records if "verdict" not in r]
        for kind, records in (("debates", debates), ("verdicts", verdicts)):
            if records:
                write_jsonl(self.folder / kind / f"{name}.jsonl", records)

    def _write_bad(self, result: StepResult) -> None:
        """Keep what made a step's numbers go wrong."""
        with self.engine.ranks.agree():
            if result.bad and self.engine.ranks.is_first:
                write_jsonl(self.folder / "bad_steps" / f"step_{self.step}.jsonl", result.bad)

    def _tell_of_evaluation(self, measured: Mapping[str, float]) -> None:
        """Called once all of the step is written down, so that a callback that fails loses nothing of it."""
        if measured:
            self._tell("on_evaluate", Event(self.step, measured, self._evaluated()))

    def _evaluated(self) -> list[dict[str, Any]]:
        """The answers of the step's evaluation, as they were written down."""
        if not self.callbacks or not self.engine.ranks.is_first:
            return []
        path = self.folder / "evaluations" / f"step_{self.step}.jsonl"
        return [json.loads(line) for line in path.read_text("utf-8").splitlines()]

    def _is_stopped(self) -> bool:
        """Whether a callback ends the run, whose last step is saved then. All ranks agree."""
        if not self.callbacks or not self.engine.ranks.max(int(self.callbacks.stopped)):
            return False
        logger.info("step %d: a callback ends the run", self.step)
        saved = list_checkpoints(self.folder / "checkpoints")
        if self.step and self.engine.config.save_steps and not (saved and saved[-1].name == f"step_{self.step}"):
            self._save()
        return True

    def _tell(self, name: str, event: Event) -> None:
        """Call the callbacks on the first rank; where one fails, the last finished step is kept."""
        if not self.callbacks:
            return
        try:
            with self.engine.ranks.agree():
                if self.engine.ranks.is_first:
                    self.callbacks.tell(name, event)
        except Exception as error:
            self.rescue(f"a callback failed in {name} ({type(error).__name__})")
            raise

    def rescue(self, reason: str) -> None:
        """Keep the last finished step: its weights are whole whatever failed after it."""
        saved = list_checkpoints(self.folder / "checkpoints")
        if self.step and not (saved and saved[-1].name == f"step_{self.step}"):
            saved = [self._save()]
        if saved:
            logger.error(
                "%s: the run ends; continue it from %s with --resume_from_checkpoint latest", reason, saved[-1]
            )
        else:
            logger.error("%s: the run ends; no step was finished, so there is nothing to continue from", reason)

    def _save(self) -> Path:
        engine = self.engine
        self.inputs.check()
        return save_checkpoint(
            self.folder / "checkpoints",
            step=self.step,
            model=engine.student.model,
            tokenizer=engine.tokenizer,
            optimizer=engine.optimizer,
            state={
                "version": engine.version,
                "scheduler": engine.scheduler.state_dict(),
                "stream": self.position,
                "metrics": self.metrics,
                "prompts_per_step": engine.config.prompts_per_step * engine.ranks.world_size,
                "teachers": starts_of(engine.teachers),
                **self.notes,
                **({} if self.best is None else {"best": self.best.state()}),
            },
            teachers=tensors_of(engine.teachers),
            spare=() if self.best is None else (self.best.step,),
            keep=engine.config.save_total_limit,
            ranks=engine.ranks,
        )


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
