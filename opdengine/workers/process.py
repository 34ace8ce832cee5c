"""The owner's side of one worker: its process, its folder and the lines to and from it."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any

from opdengine.workers import guard
from opdengine.workers.tidy import remove_folder

logger = logging.getLogger(__name__)

END_SECONDS = 30.0
CHUNK = 1 << 16


class WorkerEnded(Exception):
    """The worker hung up: it crashed or left."""


class WorkerProcess:
    """One worker, from its start to the removal of everything that it leaves.

    The process that is started is the guard (:mod:`opdengine.workers.guard`); it outlives the worker by
    the time that it takes to tidy up. Only JSON crosses the socket, so nothing that the worker says is executed.

    Args:
        line_limit: most bytes of one answer.
        module: its ``serve(channel)`` is what the worker runs.
        command: a program that it runs instead, which is asked nothing; its end begins with SIGTERM.
        environment: of the worker, complete; None: this process's, and its folder for temporary files.
        left: folders of the owner, removed as well when that is killed.
        log: file of what it prints; None: in its folder.

    Raises:
        OSError: the system has no room for another process; nothing is left of it.
    """

    def __init__(
        self,
        line_limit: int = 0,
        module: str = "opdengine.environments.worker",
        *,
        command: Sequence[str] = (),
        environment: Mapping[str, str] | None = None,
        left: Sequence[str] = (),
        log: str | None = None,
    ) -> None:
        self._limit = line_limit
        self._number = 0
        self._outgoing = bytearray()
        self._incoming = bytearray()
        self.folder = tempfile.mkdtemp(prefix="opdengine-env-")
        self._log_file = log or os.path.join(self.folder, "output.log")
        if environment is None:
            environment = {"OMP_NUM_THREADS": "1", "PYTHONHASHSEED": "0", **os.environ, "TMPDIR": self.folder}
        try:
            self._start({"module": module, "command": list(command), "left": list(left)}, environment)
        except BaseException:
            remove_folder(self.folder)
            raise

    def _start(self, task: Mapping[str, Any], environment: Mapping[str, str]) -> None:
        self.socket, theirs = socket.socketpair()
        place = {"channel": theirs.fileno(), "owner": os.getpid(), "folder": self.folder, "path": sys.path}
        config = {**place, **task}
        self._log = open(self._log_file, "a+b")  # noqa: SIM115 - closed by end()
        with theirs:
            # A session of its own: an interrupt from the keyboard is the owner's to handle.
            self._guard = subprocess.Popen(
                [sys.executable, "-u", "-P", guard.__file__, json.dumps(config)],
                env=dict(environment),
                stdin=subprocess.DEVNULL,
                stdout=self._log,
                stderr=self._log,
                pass_fds=(theirs.fileno(),),
                start_new_session=True,
            )
        self.socket.setblocking(False)

    @property
    def pid(self) -> int:
        """Process id of the guard, which is the worker's parent."""
        return self._guard.pid

    @property
    def sending(self) -> bool:
        """Whether a part of the question is still to be sent."""
        return bool(self._outgoing)

    def ask(self, request: Mapping[str, Any]) -> None:
        """Take a question; :meth:`send` and :meth:`receive` carry it and its answer, which has the same number."""
        self._number += 1
        self._outgoing += json.dumps({**request, "number": self._number}, default=str).encode() + b"\n"
        self._incoming.clear()

    def send(self) -> None:
        """Send what the socket takes.

        Raises:
            WorkerEnded: nobody reads it.
        """
        try:
            del self._outgoing[: self.socket.send(self._outgoing)]
        except BlockingIOError:
            pass  # it is full: the rest goes with the next call
        except OSError as error:
            raise WorkerEnded from error

    def receive(self) -> dict[str, Any] | None:
        """The answer, or None while it is not whole.

        A line that is no answer to the question is ``{"broken": [reason, detail]}``; what follows it cannot be
        trusted, so the worker must be ended then.

        Raises:
            WorkerEnded: there will be none.
        """
        try:
            chunk = self.socket.recv(CHUNK)
        except BlockingIOError:
            return None
        except OSError as error:
            raise WorkerEnded from error
        if not chunk:
            raise WorkerEnded
        self._incoming += chunk
        if len(self._incoming) > self._limit:
            return {"broken": ["observation_too_long", f"an answer of more than {self._limit} bytes"]}
        if not chunk.endswith(b"\n"):
            return None
        try:
            answer = json.loads(self._incoming)
        except (ValueError, RecursionError) as error:
            return {"broken": ["error", f"an answer that is no JSON: {error}"]}
        if not isinstance(answer, dict) or answer.pop("number", None) != self._number:
            return {"broken": ["error", f"a line that is no answer to the question: {self._incoming[:200]!r}"]}
        return answer

    def interrupt(self) -> None:
        """Say that the answer is not wanted any more; it must still be waited for, but may say so, too."""
        self._outgoing += b"\n"

    def say_goodbye(self) -> None:
        """Ask the worker to close itself; :meth:`wait` gives it the time."""
        self.ask({"close": None})
        with contextlib.suppress(WorkerEnded):
            self.send()

    def hang_up(self) -> None:
        """Tell the guard to end everything; :meth:`end` waits for it."""
        with contextlib.suppress(OSError):
            self.socket.shutdown(socket.SHUT_RDWR)

    def end(self) -> int | None:
        """End the worker with all its descendants and remove its folder.

        Returns:
            The worker's exit code (128 plus the signal that ended it), None if the guard itself had to be killed.
        """
        self.hang_up()
        self.socket.close()
        self._log.close()
        code: int | None
        try:
            code = self._guard.wait(END_SECONDS)
        except subprocess.TimeoutExpired:
            self._guard.kill()
            self._guard.wait()
            code = None
        try:
            remove_folder(self.folder)
        except OSError as error:
            logger.warning("the folder of a worker could not be removed: %s", error)
        return code

    def poll(self) -> int | None:
        """The worker's exit code if it has ended, see :meth:`end`."""
        return self._guard.poll()

    def wait(self, seconds: float) -> None:
        """Give the worker time to leave by itself."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._guard.wait(seconds)

    def tail(self, characters: int = 2000) -> str:
        """The end of what it printed during the last question."""
        self._log.seek(0)
        text = self._log.read().decode(errors="replace").strip()
        return f"\n--- end of its output ---\n{text[-characters:]}" if text else ""
