"""An environment that does what its message says, faults included."""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

from opdengine.environments import Observation, Step


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
