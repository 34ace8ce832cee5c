"""One sandbox from its start to its end: programs run in it, and only plain text comes out."""

from __future__ import annotations

import base64
import contextlib
import functools
import json
import logging
import os
import select
import signal
import stat
import subprocess
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from opdengine.verifiers.sandbox.filter import build_filter
from opdengine.verifiers.sandbox.runtime import Runtime, find_runtime
from opdengine.verifiers.sandbox.tiers import Limits, Tier, candidates, spare_uid
from opdengine.workers import plain, tidy

logger = logging.getLogger(__name__)

START_SECONDS = 60.0
GRACE_SECONDS = 5.0
END_SECONDS = 10.0
CHUNK = 1 << 16
LINE_BYTES = 1 << 16
HERE = Path(__file__).parent
MODULES = (Path(plain.__file__), HERE / "runner.py", Path(tidy.__file__))
"""What the first process in a sandbox is sent as text."""


class SandboxError(RuntimeError):
    """The sandbox itself could not be set up or gave way; says nothing about the program."""


class Session:
    """A running sandbox; use it as a context manager.

    Args:
        tier: how it is separated.
        limits: of every program in it.
        runtime: the interpreter; default: this one's.

    Raises:
        SandboxError: it does not start.
    """

    def __init__(self, tier: Tier, limits: Limits | None = None, runtime: Runtime | None = None) -> None:
        self._limits = limits = limits or Limits()
        runtime = runtime or find_runtime()
        try:
            self.uid = spare_uid()
        except ValueError as error:
            raise SandboxError(f"sandbox {tier}: {error}") from error
        switch: dict[str, Any] = {}
        if tier.userns and self.uid is not None:
            switch = {"user": self.uid, "group": self.uid, "extra_groups": []}
        config = {
            "uid": None if switch else self.uid,
            "modules": {path.stem: path.read_text() for path in MODULES},
            "filter": base64.b64encode(build_filter()).decode(),
            **{name: getattr(limits, name) for name in ("memory", "cpu", "processes", "output", "file_size")},
            **{name: getattr(limits, name) for name in ("open_files", "files")},
        }
        arguments = ["-c", (HERE / "inside.py").read_text(), json.dumps(config)]
        self._scratch = None if tier.isolated else _scratch_folder(self.uid, runtime)
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 - closed with the session
        try:
            self._process = subprocess.Popen(
                tier.command(runtime, limits, arguments),
                env={},
                cwd=self._scratch or "/",
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._errors,
                bufsize=0,
                start_new_session=True,
                **switch,
            )
        except (OSError, subprocess.SubprocessError) as error:
            self._leave_nothing()
            raise SandboxError(f"sandbox {tier} does not start: {error}") from error
        self._received = bytearray()
        try:
            ready = self._receive(time.monotonic() + START_SECONDS)
        except (TimeoutError, EOFError, ValueError):
            ready = None
        if ready is None or (tier.isolated and ready != {"ready": 1}):
            words = self._last_words()
            self.close()
            raise SandboxError(f"sandbox {tier} does not start: {words or ready}")

    def run(self, code: str, standard_input: str, seconds: float) -> dict[str, Any]:
        """Run a program to its end.

        Args:
            code: its text.
            standard_input: what it reads.
            seconds: of wall time.

        Returns:
            ``output`` (str), ``errors`` (the end of what went to standard error) and ``status`` (exit code, or
            minus a signal); or ``failed`` ("time", "memory", "output", "files", "ended") and ``detail``.
        """
        return self._ask({"run": {"code": code, "input": standard_input}, "seconds": seconds})

    def start(self, mode: str, code: str, seconds: float, **more: Any) -> dict[str, Any]:
        """Start a program that is then asked by :meth:`tell`; see :mod:`opdengine.verifiers.sandbox.runner`.

        Args:
            mode: "functions" or "test".
            code: its text.
            seconds: of wall time until its first line.
            more: what belongs to the mode.

        Returns:
            What its first line says, or ``failed`` and ``detail``. It may be forged by the program.
        """
        return self._line({"start": {"mode": mode, "code": code, **more}, "seconds": seconds})

    def tell(self, message: Mapping[str, Any], seconds: float) -> dict[str, Any]:
        """Send a line to the program that was started and return what its next line says, as :meth:`start`."""
        return self._line({"tell": json.dumps(message), "seconds": seconds})

    def close(self) -> None:
        """End everything in the sandbox; safe to call twice."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()
        try:
            self._process.wait(END_SECONDS)
        except subprocess.TimeoutExpired:
            for pid in (self._process.pid, *_descendants(self._process.pid)):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            self._process.wait()
        self._process.stdout.close()
        self._leave_nothing()

    def _leave_nothing(self) -> None:
        self._errors.close()
        if self._scratch is not None:
            try:
                tidy.remove_folder(self._scratch)
            except OSError as error:
                logger.warning("the folder of an unsandboxed program could not be removed: %s", error)

    def __enter__(self) -> Session:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _line(self, request: Mapping[str, Any]) -> dict[str, Any]:
        answer = self._ask(request)
        if "line" not in answer:
            return answer
        try:
            said = json.loads(answer["line"])
        except (ValueError, RecursionError) as error:
            return {"failed": "output", "detail": f"no plain data: {error}"}
        return said if isinstance(said, dict) else {"failed": "output", "detail": "no plain data"}

    def _ask(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """Every request has an answer; a sandbox that dies meanwhile was killed by the program in it."""
        assert self._process.stdin is not None
        try:
            data = json.dumps(request).encode() + b"\n"
            while data:
                data = data[self._process.stdin.write(data) :]
            return self._receive(time.monotonic() + request["seconds"] + GRACE_SECONDS)
        except TimeoutError:
            return {"failed": "time", "detail": "the sandbox does not answer"}
        except (EOFError, OSError, ValueError, TypeError, RecursionError) as error:
            return {"failed": "ended", "detail": f"the sandbox ended: {error}"}

    def _receive(self, deadline: float) -> dict[str, Any]:
        """The next line.

        Raises:
            TimeoutError, EOFError, ValueError: there is none.
        """
        assert self._process.stdout is not None
        descriptor, limit = self._process.stdout.fileno(), 6 * self._limits.output + LINE_BYTES
        poller = select.poll()
        poller.register(descriptor, select.POLLIN)
        while not self._received.endswith(b"\n"):
            if not poller.poll(max(deadline - time.monotonic(), 0.0) * 1000):
                raise TimeoutError
            chunk = os.read(descriptor, CHUNK)
            if not chunk:
                raise EOFError
            self._received += chunk
            if len(self._received) > limit:
                raise ValueError(f"more than {limit} bytes")
        line = bytes(self._received)
        self._received.clear()
        return dict(json.loads(line))

    def _last_words(self) -> str:
        self._errors.seek(0)
        return self._errors.read()[-1000:].decode(errors="replace").strip()


def _descendants(pid: int) -> list[int]:
    """Processes that a process has started, and those that they have."""
    parents: dict[int, int] = {}
    for stat_file in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            parents[int(stat_file.parent.name)] = int(stat_file.read_text().rpartition(")")[2].split()[1])
    found = [pid]
    for each in found:
        found += [child for child, parent in parents.items() if parent == each]
    return found[1:]


def _scratch_folder(uid: int | None, runtime: Runtime) -> str:
    """Where a program works that is not isolated; as root it belongs to the program's own user id.

    Raises:
        SandboxError: that user could not read the interpreter.
    """
    if uid is not None:
        for path in (runtime.executable, *runtime.folders):
            closed = [str(p) for p in Path(path).parents if not p.stat().st_mode & stat.S_IXOTH]
            if closed:
                raise SandboxError(
                    f"root runs unsandboxed programs as another user, who may not enter {closed[-1]} "
                    f"(the interpreter is {runtime.executable}); run as an ordinary user or use another interpreter"
                )
    folder = tempfile.mkdtemp(prefix="opdengine-unsandboxed-")
    try:
        if uid is not None:
            os.chown(folder, uid, uid)
    except OSError as error:
        os.rmdir(folder)
        raise SandboxError(f"a folder cannot be given to the user {uid}: {error}") from error
    return folder


@functools.cache
def find_tier(allow_unsandboxed: bool = False) -> Tier:
    """The best tier that works here; each is tried by running a program in it.

    Args:
        allow_unsandboxed: accept "none".

    Raises:
        SandboxError: there is none; says why not and what to do.
    """
    reasons = []
    for tier in candidates():
        if tier.isolated or allow_unsandboxed:
            try:
                check_tier(tier)
            except SandboxError as error:
                reasons.append(str(error))
            else:
                return tier
    tried = "\n".join(f"  {reason}" for reason in reasons)
    raise SandboxError(
        f"programs of the model cannot be isolated on this system:\n{tried}\n"
        "Install bubblewrap (apt-get install bubblewrap), allow user namespaces (docs/verifiers.md says how, also in "
        "containers), or set verifier_allow_unsandboxed: true on a machine that has nothing to lose"
    )


def check_tier(tier: Tier, runtime: Runtime | None = None) -> None:
    """Run a small program in a tier.

    Raises:
        SandboxError: it does not work.
    """
    try:
        with Session(tier, runtime=runtime) as session:
            answer = session.run("import json, math\nprint(math.prod([6, 7]))", "", START_SECONDS)
    except (OSError, ValueError) as error:
        raise SandboxError(f"sandbox {tier}: {error}") from error
    if answer.get("output") != "42\n":
        raise SandboxError(f"sandbox {tier} does not run a simple program: {answer}")
