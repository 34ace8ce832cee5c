"""A corpus of hostile programs reaches nothing, leaves nothing behind and stays within its limits."""

from __future__ import annotations

import os
import shutil
import socket
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hostile import CORPUS

from opdengine.verifiers.sandbox.runtime import Runtime
from opdengine.verifiers.sandbox.session import Session
from opdengine.verifiers.sandbox.tiers import Limits, Tier

LIMITS = Limits(memory=400 << 20, cpu=10, processes=16, output=100_000, scratch=20 << 20, files=500)
NEXT = """
import json, os, resource
others = [p for p in os.listdir("/proc") if p.isdigit() and int(p) not in (1, os.getpid())]
umask = os.umask(0)
print(os.listdir("/tmp"), os.listdir("/dev/shm"), oct(umask), os.getcwd(), end=" ")
print(resource.getrlimit(resource.RLIMIT_NOFILE)[0], "LEFT" in os.environ, others, "still here")
open("/tmp/file", "w").write("x"), open("/dev/shm/file", "w").write("x")
"""
"""Tells what a program before it has left, and that there is room to work."""
PLACES = (
    "/",
    "/tmp",
    "/var/tmp",
    "/dev/shm",
    "/dev",
    "/etc",
    "/usr",
    "/usr/lib",
    "/run",
    os.getcwd(),
    str(Path.home()),
)


@pytest.fixture
def world() -> Iterator[dict[str, Any]]:
    """What a program could find, break or leave on this machine."""
    token = f"hostile{uuid.uuid4().hex[:12]}"
    folder = Path(tempfile.mkdtemp(prefix=f"{token}-"))
    folder.chmod(0o777)
    places = {name: folder / name for name in ("secret", "bait", "socket")}
    places["secret"].write_text(f"content of {token}")
    places["bait"].write_text("precious")
    os.environ["OPDENGINE_TEST_SECRET"] = f"variable of {token}"
    listeners = [socket.create_server(("127.0.0.1", 0))]
    for address in (f"\0{token}", str(places["socket"])):
        listeners.append(socket.socket(socket.AF_UNIX))
        listeners[-1].bind(address)
        listeners[-1].listen()
    for listener in listeners:
        listener.setblocking(False)
    yield {
        "token": token,
        "name": folder.name,
        "secret": str(places["secret"]),
        "bait": str(places["bait"]),
        "path": str(places["socket"]),
        "abstract": token,
        "port": listeners[0].getsockname()[1],
        "home": str(Path.home()),
        "cwd": os.getcwd(),
        "pid": os.getpid(),
        "listeners": listeners,
    }
    del os.environ["OPDENGINE_TEST_SECRET"]
    shutil.rmtree(folder)
    for listener in listeners:
        listener.close()


def children() -> list[str]:
    """Processes whose parent is this one, orphans of its descendants included."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[1]) == os.getpid():
            found.append(f"{stat.parent.name} ({(stat.parent / 'cmdline').read_text()[:80]})")
    return found


def owned(uid: int) -> list[str]:
    """Processes of a user."""
    return [p.name for p in Path("/proc").glob("[0-9]*") if p.exists() and p.stat().st_uid == uid]


@pytest.mark.parametrize("name", CORPUS)
def test_hostile_program(name: str, isolated: tuple[Tier, Runtime], world: dict[str, Any]) -> None:
    tier, runtime = isolated
    hostile = CORPUS[name]
    before = children()
    with Session(tier, LIMITS, runtime) as session:
        answer = session.run(hostile.code.format(**world), "", hostile.seconds)
        after = session.run(NEXT, "", 10)
    assert answer.get("failed", "alone") in hostile.ends, answer
    output = answer.get("output", "")
    assert "GOT" not in output, output
    assert world["token"] not in output, "a secret came out"
    umask = os.umask(0)
    os.umask(umask)
    assert after.get("output") == f"[] [] {oct(umask)} /tmp 64 False [] still here\n", after
    assert children() == before
    assert session.uid is None or not owned(session.uid)
    left = [place for place in PLACES for entry in os.listdir(place) if entry.startswith(world["token"])]
    assert left == [tempfile.gettempdir()], "the folder of this test and nothing else"
    assert Path(world["bait"]).read_text() == "precious"
    for listener in world["listeners"]:
        with pytest.raises(BlockingIOError):
            listener.accept()


def test_the_corpus_is_large_enough() -> None:
    assert len(CORPUS) >= 30
