"""The first process in a sandbox: starts programs, watches their limits, ends them with all that they started.

Sent into the sandbox as text, run as ``python -c TEXT CONFIG``; the standard library alone. Reads requests and
writes answers as lines of JSON on descriptors 0 and 1, which no program ever has. As process 1 of its process
namespace it cannot be killed from within, and as it is not dumpable programs cannot look into it.

Requests: ``{"run": {"code", "input"}, "seconds"}`` for a program on standard input and output,
``{"start": {"mode", "code", ...}, "seconds"}`` for one that answers lines, ``{"tell": line, "seconds"}`` for its
next line. Answers: ``{"output", "errors", "status"}``, ``{"line"}`` or ``{"failed": word, "detail"}``.
"""

from __future__ import annotations

import base64
import contextlib
import ctypes
import fcntl
import json
import os
import resource
import select
import signal
import sys
import time
import types
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

TICK_SECONDS = 0.05
SCRATCH = ("/tmp", "/dev/shm")
CHUNK = 1 << 16
ERROR_BYTES = 4000
STACK_BYTES = 64 << 20
PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_SECCOMP, PR_SET_NO_NEW_PRIVS, PR_SET_CHILD_SUBREAPER = 1, 4, 22, 38, 36
SECCOMP_MODE_FILTER = 2


class Limit(Exception):
    """A program exceeded a limit or ended too early: word and detail."""


class _FilterProgram(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("filter", ctypes.c_char_p))


class Program:
    """One running program and the ends of its pipes that are kept here.

    Args:
        config: of the sandbox.
        request: see :mod:`.runner`.
    """

    def __init__(self, config: dict[str, Any], modules: dict[str, types.ModuleType], request: dict[str, Any]) -> None:
        self._config, self._modules = config, modules
        self.output, self.errors = bytearray(), bytearray()
        theirs_in, self._input = os.pipe()
        self._output, theirs_out = os.pipe()
        self._errors, theirs_err = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            _become(config, modules, request, theirs_in, theirs_out, theirs_err)
        for descriptor in (theirs_in, theirs_out, theirs_err):
            os.close(descriptor)
        for descriptor in (self._input, self._output, self._errors):
            os.set_blocking(descriptor, False)
        self._ended = os.pidfd_open(self.pid)
        self.status: int | None = None

    def communicate(self, data: bytes, seconds: float, *, line: bool) -> None:
        """Send input and collect output until it ends or, with ``line``, has written a line.

        Raises:
            Limit: it did not come to that.
        """
        deadline = time.monotonic() + seconds
        pending = memoryview(data)
        poller = select.poll()
        poller.register(0, 0)  # hang-up only
        for descriptor in (self._ended, self._output, self._errors):
            poller.register(descriptor, select.POLLIN)
        if pending:
            poller.register(self._input, select.POLLOUT)
        elif not line:
            self._close_input()
        while not (line and b"\n" in self.output):
            ready = dict(poller.poll(TICK_SECONDS * 1000))
            if 0 in ready:
                _kill_all(self._config)
                os._exit(0)
            if self._input in ready:
                try:
                    pending = pending[os.write(self._input, pending[:CHUNK]) :]
                except OSError:
                    pending = pending[:0]
                if not pending:
                    poller.unregister(self._input)
                    if not line:
                        self._close_input()
            for descriptor, kept in ((self._output, self.output), (self._errors, self.errors)):
                if descriptor in ready and _drain(descriptor, kept) == 0:
                    poller.unregister(descriptor)
            del self.errors[:-ERROR_BYTES]
            if len(self.output) > self._config["output"]:
                raise Limit("output", f"more than {self._config['output']} bytes")
            if self._ended in ready:
                self._collect()
                if line and b"\n" not in self.output:
                    raise Limit("ended", f"{_how(self.status)}: {self.errors.decode(errors='replace')}")
                return
            if time.monotonic() > deadline:
                raise Limit("time", f"more than {seconds:g} s")
            self.watch()

    def line(self) -> str:
        """The first line of the output; what follows it is dropped."""
        line = self.output.partition(b"\n")[0].decode(errors="replace")
        self.output.clear()
        return line

    def close(self) -> None:
        """Kill everything that runs in the sandbox and remove what it wrote.

        Raises:
            OSError: something of it is left, so that no other program may follow.
        """
        _kill_all(self._config)
        self._close_input()
        for descriptor in (self._output, self._errors, self._ended):
            os.close(descriptor)
        for folder in SCRATCH if os.getpid() == 1 else (".",):
            self._modules["tidy"].empty_folder(folder)

    def _close_input(self) -> None:
        if self._input >= 0:
            os.close(self._input)
            self._input = -1

    def _collect(self) -> None:
        """It has ended: what it started must end too, and then the pipes are read to their ends."""
        self.status = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        _kill_all(self._config)
        for descriptor, kept in ((self._output, self.output), (self._errors, self.errors)):
            while len(kept) <= self._config["output"] and _drain(descriptor, kept):
                pass
        del self.errors[:-ERROR_BYTES]
        if len(self.output) > self._config["output"]:
            raise Limit("output", f"more than {self._config['output']} bytes")

    def watch(self) -> None:
        """Enforce what the kernel does not for a group of processes: memory in use and, isolated, files.

        Raises:
            Limit: there is too much of it.
        """
        if sum(map(_resident, _others())) > self._config["memory"]:
            raise Limit("memory", f"more than {self._config['memory']} bytes in all processes")
        for folder in SCRATCH if os.getpid() == 1 else ():
            scratch = os.statvfs(folder)
            if scratch.f_files - scratch.f_ffree > self._config["files"]:
                raise Limit("files", f"more than {self._config['files']} files")


def _become(
    config: dict[str, Any], modules: dict[str, types.ModuleType], request: dict[str, Any], *pipes: int
) -> NoReturn:
    """In the new process: put everything that is not the program's out of its reach, and run it."""
    try:
        os.setsid()
        signal.signal(signal.SIGINT, signal.default_int_handler)
        high = [fcntl.fcntl(descriptor, fcntl.F_DUPFD, 100) for descriptor in pipes]
        if request["mode"] == "program":
            wanted = high
        else:
            nothing = fcntl.fcntl(os.open("/dev/null", os.O_RDWR), fcntl.F_DUPFD, 100)
            wanted = [nothing, nothing, high[2], high[0], high[1]]
        for number, descriptor in enumerate(wanted):
            os.dup2(descriptor, number, inheritable=number < 3)
        os.closerange(len(wanted), 4096)
        limits = {
            "AS": config["memory"],
            "CPU": config["cpu"],
            "NPROC": config["processes"] + 2,
            "FSIZE": config["file_size"],
            "NOFILE": config["open_files"],
            "STACK": STACK_BYTES,
            "SIGPENDING": 64,
            "CORE": 0,
            "MEMLOCK": 0,
            "MSGQUEUE": 0,
        }
        for name, value in limits.items():
            kind = getattr(resource, f"RLIMIT_{name}")
            hard = resource.getrlimit(kind)[1]
            value = value if hard == resource.RLIM_INFINITY else min(value, hard)
            resource.setrlimit(kind, (value, value))
        code = base64.b64decode(config["filter"])
        _prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, ctypes.byref(_FilterProgram(len(code) // 8, code)))
        modules["runner"].run(modules["plain"], request, 3, 4)
    finally:
        os._exit(1)


def _kill_all(config: dict[str, Any]) -> None:
    """Kill every other process of the sandbox and wait until they are gone."""
    while True:
        if os.getpid() == 1 or config["uid"] is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(-1, signal.SIGKILL)
        else:
            for child in _children():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(child, signal.SIGKILL)
        try:
            os.waitpid(-1, 0)
        except ChildProcessError:
            return


def _children() -> list[int]:
    """Processes whose parent is this one; orphans of a program are, too."""
    return [pid for pid, parent in _parents().items() if parent == os.getpid()]


def _others() -> list[int]:
    """All processes that programs have started here."""
    if os.getpid() == 1:
        return [int(name) for name in os.listdir("/proc") if name.isdigit() and name != "1"]
    parents = _parents()
    found = [os.getpid()]
    for each in found:
        found += [pid for pid, parent in parents.items() if parent == each]
    return found[1:]


def _parents() -> dict[int, int]:
    """The parent of every process that can be seen."""
    found = {}
    for name in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError), open(f"/proc/{name}/stat", "rb") as stat:
            found[int(name)] = int(stat.read().rpartition(b")")[2].split()[1])
    return found


def _resident(process: int) -> int:
    """Bytes of memory in use; 0 if it has just ended."""
    with contextlib.suppress(OSError), open(f"/proc/{process}/statm", "rb") as statm:
        return int(statm.read().split()[1]) * resource.getpagesize()
    return 0


def _drain(descriptor: int, kept: bytearray) -> int | None:
    """Read what there is; 0 at the end, None if there is nothing yet."""
    try:
        chunk = os.read(descriptor, CHUNK)
    except BlockingIOError:
        return None
    kept += chunk
    return len(chunk)


def _how(status: int | None) -> str:
    return f"exit code {status}" if status is None or status >= 0 else f"killed by signal {-status}"


def _prctl(option: int, *values: Any) -> None:
    arguments = [ctypes.c_ulong(v) if isinstance(v, int) else v for v in (*values, 0, 0, 0, 0)[:4]]
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(option, *arguments) != 0:
        raise OSError(ctypes.get_errno(), f"prctl({option}) failed")


def _say(answer: dict[str, Any]) -> None:
    data = json.dumps(answer).encode() + b"\n"
    try:
        while data:
            data = data[os.write(1, data) :]
    except OSError:
        os._exit(0)


def _lines(idle: Callable[[], None]) -> Iterator[bytes]:
    """What is asked; while nothing is, ``idle`` is called every tick."""
    waiting = bytearray()
    poller = select.poll()
    poller.register(0, select.POLLIN)
    while True:
        while not poller.poll(TICK_SECONDS * 1000):
            idle()
        chunk = os.read(0, CHUNK)
        if not chunk:
            return
        waiting += chunk
        if chunk.endswith(b"\n"):
            yield bytes(waiting)
            waiting.clear()


def _load(name: str, text: str) -> types.ModuleType:
    module = types.ModuleType(name)
    exec(compile(text, f"{name}.py", "exec"), module.__dict__)
    return module


def main(config: dict[str, Any]) -> None:
    """Serve until the other side hangs up.

    Args:
        config: ``uid`` to change to (or None), ``modules`` (texts of :mod:`.plain`, :mod:`.runner`
            and :mod:`.tidy`), ``filter``
            (base64 of the system-call filter), and limits: ``memory, cpu, processes, output, file_size,
            open_files, files``.
    """
    if config["uid"] is not None:
        os.setgroups([])
        os.setresgid(config["uid"], config["uid"], config["uid"])
        os.setresuid(config["uid"], config["uid"], config["uid"])
    _prctl(PR_SET_NO_NEW_PRIVS, 1)
    _prctl(PR_SET_DUMPABLE, 0)
    _prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    _prctl(PR_SET_CHILD_SUBREAPER, 1)
    os.environ.clear()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the one signal that Python handles and a program could send here
    modules = {name: _load(name, text) for name, text in config["modules"].items()}
    server = _Server(config, modules)
    _say({"ready": os.getpid()})
    for line in _lines(server.watch):
        _say(server.answer(json.loads(line)))
        if server.unclean:
            break
    server.end()
    _kill_all(config)


class _Server:
    """Answers requests about one program at a time."""

    def __init__(self, config: dict[str, Any], modules: dict[str, types.ModuleType]) -> None:
        self._config, self._modules = config, modules
        self._program: Program | None = None
        self._stopped = Limit("ended", "no program was started")
        self.unclean = ""

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        """What a request has as its answer."""
        try:
            answer = self._answer(request)
        except Limit as limit:
            answer = {"failed": limit.args[0], "detail": limit.args[1]}
        if "line" not in answer:
            self.end()
        return answer

    def _answer(self, request: dict[str, Any]) -> dict[str, Any]:
        if "run" in request:
            program = self._start({"mode": "program", **request["run"]})
            program.communicate(request["run"]["input"].encode(), request["seconds"], line=False)
            output, errors = (kept.decode(errors="replace") for kept in (program.output, program.errors))
            return {"output": output, "errors": errors, "status": program.status}
        if "start" in request:
            program = self._start(request["start"])
            program.communicate(b"", request["seconds"], line=True)
            return {"line": program.line()}
        if self._program is None:
            raise self._stopped
        self._program.communicate(request["tell"].encode() + b"\n", request["seconds"], line=True)
        return {"line": self._program.line()}

    def _start(self, request: dict[str, Any]) -> Program:
        self._program = Program(self._config, self._modules, request)
        return self._program

    def watch(self) -> None:
        """Between two questions, too, a program keeps to its limits; else it is ended and the next answer says why."""
        try:
            if self._program is not None:
                self._program.watch()
        except Limit as limit:
            self._stopped = limit
            self.end()

    def end(self) -> None:
        """End the program, if there is one; ``unclean`` says what of it could not be removed."""
        program, self._program = self._program, None
        try:
            if program is not None:
                program.close()
        except OSError as error:
            self.unclean = str(error)


main(json.loads(sys.argv[1]))
