"""vLLM in a child process that serves this rank alone.

vLLM replaces torch functions, reseeds the global generator and creates a process group wherever it runs, so it gets a
process of its own (:mod:`opdengine.rollout.vllm.worker`), which is replaced when it dies.
"""

from __future__ import annotations

import base64
import logging
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from opdengine.models.pictures import bytes_of
from opdengine.rollout.vllm.engine import (
    FRESH,
    EngineDiedError,
    EngineError,
    EngineInfo,
    InvalidRequestError,
    PicturePrompt,
    Sampled,
    engine_environment,
)
from opdengine.rollout.vllm.policy_file import StoredPolicy
from opdengine.workers.process import WorkerProcess
from opdengine.workers.talk import Question, Talk, WorkerLost, hold

logger = logging.getLogger(__name__)

WORKER = "opdengine.rollout.vllm.worker"
MOST_BYTES = 1 << 40
CLOSE_SECONDS, CANCEL_SECONDS = 10.0, 60.0
KILLED = (-9, 128 + 9)


class ChildEngine:
    """An :class:`~opdengine.rollout.vllm.engine.Engine` in a child process.

    A child that died is noticed at once, and the next call starts another one.

    Args:
        config: of the engine, see :func:`opdengine.rollout.vllm.sampler.open_child`.
        folders: of weight files, removed when this process is killed.
        devices: CUDA_VISIBLE_DEVICES of the engine; None: the trainer's.
        cpu_threads: threads of the engine's CPU kernels; None: one less than there are cores.
        start_timeout: seconds to load the model.
        response_timeout: seconds for one call; an engine that takes longer is stopped.
    """

    name = "the vLLM engine"
    replaceable = True

    def __init__(
        self,
        config: Mapping[str, Any],
        folders: Sequence[str],
        devices: str | None,
        cpu_threads: int | None,
        start_timeout: float,
        response_timeout: float,
    ) -> None:
        self.response_timeout = response_timeout
        self.pid: int | None = None
        """Process id of the child."""
        self._config = config
        self._folders = folders
        self._environment = engine_environment(config["model"], devices, cpu_threads)
        self._start_timeout = start_timeout
        self._process: WorkerProcess | None = None
        self._closed = False
        self._calling = threading.Lock()
        self._info: EngineInfo | None = None
        self._held = FRESH
        self._asleep = False

    def describe(self) -> EngineInfo:
        with self._calling:
            self._running()
        assert self._info is not None
        return self._info

    def held(self) -> str:
        self.describe()
        return self._held

    def stamp(self, name: str) -> None:
        self._held = name

    def load(self, policy: StoredPolicy | None, name: str) -> None:
        self._make_room()
        stored = [] if policy is None else [policy.path, dict(policy.names), policy.low_rank]
        self.call("load", [stored, name])
        self._held = name

    def generate(
        self,
        prompts: Sequence[np.ndarray | PicturePrompt],
        seeds: Sequence[Sequence[int]],
        sampling: Mapping[str, Any],
    ) -> list[Sampled]:
        self.wake()
        stamp, samples = self.call("generate", [list(map(_asked, prompts)), seeds, sampling])
        self._held = stamp
        return [
            Sampled(frozenset([stamp]), np.array(ids, dtype=np.int64), np.array(logprobs, dtype=np.float32), reason)
            for ids, logprobs, reason in samples
        ]

    def sleep(self) -> None:
        """vLLM's sleep level 1: weights go to host memory, the KV cache is dropped.

        :meth:`load` may be called while asleep and brings back only the weights.
        """
        if self._asleep or self.describe().is_cpu:
            return
        if not self._config["enable_sleep_mode"]:
            raise ValueError("sleep() needs enable_sleep_mode=True when the sampler is created")
        try:
            self.call("sleep", [])
            self._asleep = True
        except EngineDiedError as error:
            logger.warning("%s", error)  # it holds no memory any more, and the next call starts another one

    def wake(self) -> None:
        """Undo :meth:`sleep`."""
        if self._asleep:
            self._make_room()
            self.call("wake", [])
            self._asleep = False

    def close(self) -> None:
        self._closed = True
        process = self._process
        if process is None:
            return
        idle = self._calling.acquire(blocking=False)
        if idle:
            process.say_goodbye()
            process.wait(CLOSE_SECONDS)
        else:
            process.hang_up()
            self._calling.acquire()
        try:
            self._end()
        finally:
            self._calling.release()

    def call(self, operation: str, arguments: Sequence[Any]) -> Any:
        """Ask for one operation; when this is interrupted, the child drops it too."""
        with self._calling:
            return self._ask(self._running(), operation, arguments, self.response_timeout)

    def _running(self) -> WorkerProcess:
        """The child, which is started if there is none."""
        if self._closed:
            raise EngineError("this sampler is closed; create a new one")
        if self._process is not None and self._process.poll() is None:
            return self._process
        self._end()
        begin = time.monotonic()
        self._held, self._asleep = FRESH, False
        process = WorkerProcess(MOST_BYTES, WORKER, environment=self._environment, left=self._folders)
        self._process = process
        try:
            self.pid, fields = self._ask(process, "start", [self._config], self._start_timeout)
        except BaseException:
            self._end()
            raise
        self._info = EngineInfo(**{**fields, "shapes": {n: tuple(shape) for n, shape in fields["shapes"].items()}})
        logger.info("vLLM engine ready after %.1f s", time.monotonic() - begin)
        return process

    def _make_room(self) -> None:
        """What this process has freed but keeps for later, a waking engine could not have."""
        if self._asleep:
            import torch

            torch.cuda.empty_cache()

    def _ask(self, process: WorkerProcess, operation: str, arguments: Sequence[Any], seconds: float) -> Any:
        try:
            answer = _answer(process, {operation: arguments}, seconds)
        except WorkerLost as lost:
            raise self._lost(process, operation, lost) from None
        except BaseException:
            self._cancel(process)
            raise
        if "invalid" in answer:
            raise InvalidRequestError(f"vLLM refuses: {answer['invalid']}")
        if operation not in answer:
            tail = process.tail()
            self._end()
            raise EngineError(
                f"{self.name} failed in {operation!r}: {answer.get('failed', answer.get('broken'))}{tail}"
            )
        return answer[operation]

    def _cancel(self, process: WorkerProcess) -> None:
        """Tell the child to drop the call in flight and wait until it has."""
        try:
            process.interrupt()
            _answer(process, None, CANCEL_SECONDS)
        except WorkerLost as lost:
            logger.warning("%s did not drop a call: %s", self.name, lost.detail)
            self._end()
        except BaseException:
            self._end()
            raise

    def _lost(self, process: WorkerProcess, operation: str, lost: WorkerLost) -> EngineError:
        tail = process.tail()
        code = self._end()
        if self._closed:
            return EngineError("this sampler is closed; create a new one")
        if lost.reason == "timeout":
            return EngineError(
                f"{self.name} gave no answer to {operation!r} in {lost.detail.split()[-2]} s and was stopped; raise "
                f"the time limit (vllm_response_timeout) if the work is that large{tail}"
            )
        cause = ""
        if code in KILLED:
            cause = (
                "; something killed it, most often the system for lack of memory: lower "
                "max_num_seqs, kv_cache_memory_bytes or gpu_memory_utilization"
            )
        return EngineDiedError(f"{self.name} ended during {operation!r} (exit code {code}){cause}{tail}")

    def _end(self) -> int | None:
        process, self._process = self._process, None
        return None if process is None else process.end()


def _asked(prompt: np.ndarray | PicturePrompt) -> Any:
    """A prompt as :meth:`opdengine.rollout.vllm.worker.Engine.generate` takes it."""
    if not isinstance(prompt, PicturePrompt):
        return prompt.tolist()
    pictures = [base64.b64encode(bytes_of(image)).decode() for image in prompt.images]
    return {"marked": list(prompt.marked), "read_as": prompt.token_ids.tolist(), "pictures": pictures}


def _answer(process: WorkerProcess, question: Question | None, seconds: float) -> dict[str, Any]:
    """The answer to a question; None waits on for that to the last one.

    Raises:
        WorkerLost: there is none.
    """
    answers = []

    def talk() -> Talk[None]:
        answers.append((yield process, question, seconds))

    hold([talk()])
    return answers[0]
