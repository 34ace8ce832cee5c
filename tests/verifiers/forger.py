"""A verifier that writes lines of its own to the process that asked it."""

from __future__ import annotations

import os
import stat
import threading
import time

GRADE = b', "score": [1, "", ""]}\n'
LINES = {
    "garbage": b"garbage\n",
    "empty": b"\n",
    "no utf-8": b"\xff\xfe\n",
    "list": b"[1, 2]\n",
    "number": b"1\n",
    "null": b"null\n",
    "huge": b"x" * 200_000 + b"\n",
    "huge without an end": b"x" * 200_000,
    "deep": b"[" * 50_000 + b"\n",
    "two": b'{"number": NUMBER' + GRADE + b'{"number": NUMBER' + GRADE,
    "no number": b'{"score": [1, "", ""]}\n',
    "other number": b'{"number": 1' + GRADE,
    "text number": b'{"number": "NUMBER"' + GRADE,
    "large number": b'{"number": ' + b"9" * 5000 + GRADE,
    "no score": b'{"number": NUMBER}\n',
    "short": b'{"number": NUMBER, "score": [1]}\n',
    "long": b'{"number": NUMBER, "score": [1, "", "", 2]}\n',
    "types": b'{"number": NUMBER, "score": ["1", "", ""]}\n',
    "null score": b'{"number": NUMBER, "score": null}\n',
    "mapping": b'{"number": NUMBER, "score": {"value": 1}}\n',
    "nan": b'{"number": NUMBER, "score": [NaN, "", ""]}\n',
    "above": b'{"number": NUMBER, "score": [2, "", ""]}\n',
    "reason": b'{"number": NUMBER, "score": [1, "odd", ""]}\n',
    "failure": b'{"number": NUMBER, "score": [1, 5, ""]}\n',
    "half a character": b'{"number": NUMBER, "score": [1, "", "\xc3"]}\n',
    "half a line": b'{"number": NUMBER, "sco',
}
"""What is written, by its name; NUMBER is that of the question."""


def verify(text, answer, messages):
    kind, _, number = text.partition("|")
    if kind in LINES:
        data = LINES[kind].replace(b"NUMBER", number.encode())
        while data:
            data = data[os.write(channel(), data) :]
        time.sleep(0 if kind.startswith("half a line") or "without" in kind else 1000)
        os._exit(0)
    if kind == "late":
        line = b'{"score": [1.0, "", "late"], "number": %d}\n' % int(number)
        threading.Timer(0.3, os.write, (channel(), line)).start()
    if kind == "wait":
        time.sleep(1)
    return float(kind == "good")


def channel():
    """File descriptor of the socket to the owner."""
    for descriptor in map(int, os.listdir("/proc/self/fd")):
        try:
            if descriptor > 2 and stat.S_ISSOCK(os.fstat(descriptor).st_mode):
                return descriptor
        except OSError:
            pass
    raise AssertionError("there is no channel")
