"""An environment that does what its message says, faults included."""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path

from opdengine.environments import Observation, Step

STEP = (
    b'{"number": NUMBER, "step": {"messages": [], "reward": 0.0, "terminated": false, "truncated": false, "info": {}}}'
)
LINES = {
    "garbage": b"garbage\n",
    "empty": b"\n",
    "no utf-8": b"\xff\xfe\n",
    "list": b"[1, 2]\n",
    "null": b"null\n",
    "deep": b"[" * 50_000 + b"\n",
    "huge line": b"x" * 3_000_000,
    "large": b"9" * 5000 + b"\n",
    "two lines": STEP + b"\n" + STEP + b"\n",
    "other number": STEP.replace(b"NUMBER", b"1") + b"\n",
    "no number": STEP.replace(b'"number": NUMBER, ', b"") + b"\n",
    "nothing": b'{"number": NUMBER}\n',
    "observation": b'{"number": NUMBER, "observation": {"messages": [], "tools": [], "info": {}}}\n',
    "null step": b'{"number": NUMBER, "step": null}\n',
    "no messages": STEP.replace(b'"messages": [], ', b"") + b"\n",
    "text as messages": STEP.replace(b"[]", b'"text"') + b"\n",
    "numbers as messages": STEP.replace(b"[]", b"[1]") + b"\n",
    "one more field": STEP.replace(b'"info"', b'"more": 1, "info"') + b"\n",
    "text as an end": STEP.replace(b"false", b'"no"') + b"\n",
    "list as info": STEP.replace(b"{}", b"[]") + b"\n",
    "text as a reward": STEP.replace(b"0.0", b'"1"') + b"\n",
    "nan as a reward": STEP.replace(b"0.0", b"NaN") + b"\n",
    "broken as text": b'{"number": NUMBER, "broken": "error"}\n',
    "broken as a list": b'{"number": NUMBER, "broken": ["error"]}\n',
    "unknown reason": b'{"number": NUMBER, "broken": ["odd", "reason"]}\n',
    "reason of no text": b'{"number": NUMBER, "broken": [["error"], ""]}\n',
}
"""What a worker may say that is no answer, by its name; NUMBER is that of the question."""


class Troubled:
    def __init__(self, broken: bool = False, marker: str = "") -> None:
        if broken:
            raise ImportError("the package is missing; pip install it")
        if marker and Path(marker).exists():
            raise OSError("the second start fails")
        self.episodes = 0

    @classmethod
    def tasks(cls, split, **options):
        return [{"id": "0", "type": "any"}]

    def reset(self, *, seed, task):
        self.episodes += 1
        if task.get("reset") == "raise":
            raise RuntimeError("reset failed")
        if task.get("spawn"):
            self._spawn(task["spawn"])
        info = {"pid": os.getpid(), "folder": os.environ["TMPDIR"], "episodes": self.episodes, "seed": seed}
        return Observation(({"role": "user", "content": "hello"},), info=info)

    def step(self, message):
        text = message["content"]
        if text == "hang":
            time.sleep(3600)
        elif text == "killed":
            print("last words")
            os.kill(os.getpid(), signal.SIGKILL)
        elif text == "exit":
            sys.exit(3)
        elif text == "segfault":
            ctypes.string_at(0)
        elif text == "raise":
            raise RuntimeError("an unlucky step")
        elif text == "huge":
            return self._say("x" * 2_000_000)
        elif text == "huge info":
            return Step((), info={"admissible": ["x" * 9_000_000]})
        elif text == "no step":
            return "a string"
        elif text == "no data":
            return Step((), info={"object": object()})
        elif text == "bad word":
            return Step((), info={"failure": "whatever"})
        elif text == "end":
            return Step((), 1.0, terminated=True, info={"success": True, "score": 1.0})
        elif text in LINES:
            return self._write(LINES[text])
        elif text == "late line":
            line = LINES["other number"]
            threading.Timer(0.3, os.write, (self._channel(), line)).start()
        elif text == "wait":
            time.sleep(1)
        elif text.startswith("told "):
            name, value = text[5:].split("=", 1)
            value = eval(value)  # as an environment would tell it
            return Step((), value) if name == "reward" else Step((), terminated=True, info={name: value})
        elif text.startswith("connect "):
            with socket.socket() as probe:
                probe.settimeout(5)
                return self._say(str(probe.connect_ex(("127.0.0.1", int(text.split()[1])))))
        elif text == "loopback":
            with socket.create_server(("127.0.0.1", 0)) as server, socket.socket() as probe:
                return self._say(str(probe.connect_ex(server.getsockname())))
        return self._say(text)

    def close(self) -> None:
        pass

    def _write(self, line):
        """A line of its own to the owner; the number is that of the question after a start and a reset."""
        data = line.replace(b"NUMBER", b"3")
        while data:
            data = data[os.write(self._channel(), data) :]
        time.sleep(3600)

    @staticmethod
    def _channel():
        """File descriptor of the socket to the owner."""
        for descriptor in map(int, os.listdir("/proc/self/fd")):
            try:
                if descriptor > 2 and stat.S_ISSOCK(os.fstat(descriptor).st_mode):
                    return descriptor
            except OSError:
                pass
        raise AssertionError("there is no channel")

    @staticmethod
    def _say(text):
        return Step(({"role": "user", "content": text},))

    @staticmethod
    def _spawn(name):
        """A child, one in a session of its own, and a daemon; each carries ``name`` in its command line."""
        wait = [sys.executable, "-c", "import time; time.sleep(3600)", name]
        subprocess.Popen(wait)
        subprocess.Popen(wait, start_new_session=True)
        if os.fork() == 0:
            subprocess.Popen(wait, start_new_session=True)
            os._exit(0)
        os.wait()
        Path(os.environ["TMPDIR"], "left.txt").write_text("left")
