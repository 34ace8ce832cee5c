"""A child process that runs an inference engine, and the pipe to it."""

from __future__ import annotations

import logging
import multiprocessing
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from opdengine.errors import ServiceError

if TYPE_CHECKING:
    from opdengine.rollout.vllm_extension import EngineInfo

logger = logging.getLogger(__name__)

POLL_SECONDS = 0.2
CLOSE_SECONDS = 10.0
CANCEL_SECONDS = 60.0
WORKER = "from opdengine.rollout.vllm_worker import main; main()"


class EngineError(ServiceError):
    """The engine could not do what it was asked."""


class EngineDiedError(EngineError):
    """The engine process ended by itself or was killed."""


class InvalidRequestError(ValueError):
    """vLLM refused a request; the engine is unharmed."""


class EngineProcess:
    """The child process and the pipe to it: one question, one answer."""

    def __init__(self) -> None:
        self._child: subprocess.Popen[bytes] | None = None
        self._connection: Connection | None = None
        self._log = ""
        self._pending = False

    def start(self, config: Mapping[str, Any], environment: Mapping[str, str], log: str, timeout: float) -> EngineInfo:
        """Start the child and wait until it is ready.

        Args:
            config: the first message; the child answers it with its ``EngineInfo``.
            environment: the child's, complete.
            log: file for all that the child prints.
            timeout: seconds.
        """
        self.kill()
        self._log = log
        ours, theirs = multiprocessing.Pipe()
        with theirs, open(log, "wb") as output:
            # A session of its own: an interrupt from the keyboard is the parent's to handle.
            self._child = subprocess.Popen(
                [sys.executable, "-c", WORKER, str(theirs.fileno()), str(os.getpid())],
                env=dict(environment),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                pass_fds=(theirs.fileno(),),
                start_new_session=True,
            )
        self._connection = ours
        try:
            self._send(config)
            return self._accept("start", *self._wait("start", timeout))
        except BaseException:
            self.kill()
            raise

    def alive(self) -> bool:
        """Whether there is a child that runs and owes no answer of an earlier call."""
        return self._child is not None and self._child.poll() is None and not self._pending

    @property
    def pid(self) -> int | None:
        """The child's process id."""
        return None if self._child is None else self._child.pid

    def call(self, operation: str, payload: Mapping[str, Any], timeout: float) -> Any:
        """Ask for one operation; when this is interrupted, the child drops it too."""
        self._pending = True
        try:
            self._send((operation, payload))
            status, answer = self._wait(operation, timeout)
            self._pending = False
        except EngineError:
            raise
        except BaseException:
            self._cancel()
            raise
        return self._accept(operation, status, answer)

    def kill(self) -> None:
        """End the child at once; the next call starts another."""
        child, self._child = self._child, None
        connection, self._connection = self._connection, None
        self._pending = False
        if connection is not None:
            connection.close()
        if child is not None:
            child.kill()
            child.wait()

    def close(self) -> None:
        """Let the child leave by itself, and end it if it does not."""
        if self._child is not None and self._connection is not None:
            try:
                self._connection.send(("exit", {}))
                self._child.wait(CLOSE_SECONDS)
            except OSError:
                pass  # it has already gone
            except subprocess.TimeoutExpired:
                logger.warning("the vLLM engine did not end in %.0f s; killing it", CLOSE_SECONDS)
        self.kill()

    def _send(self, message: object) -> None:
        assert self._connection is not None
        try:
            self._connection.send(message)
        except OSError:
            raise self._died("before it could be asked") from None
        except BaseException:
            self.kill()  # half a message is in the pipe
            raise

    def _accept(self, operation: str, status: str, answer: Any) -> Any:
        if status == "invalid":
            raise InvalidRequestError(f"vLLM refuses: {answer}")
        if status != "ok":
            tail = end_of_log(self._log)
            self.kill()
            raise EngineError(f"the vLLM engine failed in {operation!r}: {answer}{tail}")
        return answer

    def _wait(self, operation: str, timeout: float) -> tuple[str, Any]:
        assert self._connection is not None and self._child is not None
        deadline = time.monotonic() + timeout
        while not self._connection.poll(POLL_SECONDS):
            if self._child.poll() is not None and not self._connection.poll():
                raise self._died(f"during {operation!r}")
            if time.monotonic() > deadline:
                tail = end_of_log(self._log)
                self.kill()
                raise EngineError(
                    f"the vLLM engine gave no answer to {operation!r} in {timeout:.0f} s and was "
                    f"stopped; raise the time limit if the work is that large{tail}"
                )
        try:
            return self._connection.recv()
        except (EOFError, OSError):
            raise self._died(f"during {operation!r}") from None
        except BaseException:
            self.kill()  # half an answer was read
            raise

    def _cancel(self) -> None:
        """Tell the engine to drop the call in flight and wait until it has."""
        if self._connection is None:
            return
        try:
            self._send(("cancel", {}))
            self._wait("cancel", CANCEL_SECONDS)
            self._pending = False
        except EngineError as error:
            logger.warning("%s", error)
        except BaseException:
            self.kill()
            raise

    def _died(self, when: str) -> EngineDiedError:
        assert self._child is not None
        tail = end_of_log(self._log)
        try:
            code = self._child.wait(1.0)
        except subprocess.TimeoutExpired:
            code = None
        self.kill()
        cause = ""
        if code == -9:
            cause = (
                "; something killed it, most often the system for lack of memory: lower "
                "max_num_seqs, kv_cache_memory_bytes or gpu_memory_utilization"
            )
        return EngineDiedError(f"the vLLM engine ended {when} (exit code {code}){cause}{tail}")


def end_of_log(path: str, characters: int = 2000) -> str:
    """The last lines of a log, to be added to an error; empty where there is none."""
    try:
        text = Path(path).read_text(errors="replace").strip()
    except OSError:
        return ""
    return f"\n--- end of its log ---\n{text[-characters:]}" if text else ""
