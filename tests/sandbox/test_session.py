"""The sandbox ends with its owner, tells what it is, refuses without isolation, and passes plain data only."""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest
from sandbox_tiers import available

from opdengine.verifiers.sandbox import session as module
from opdengine.verifiers.sandbox.filter import AUDIT_ARCHITECTURE, build_filter
from opdengine.verifiers.sandbox.runtime import Runtime, find_runtime
from opdengine.verifiers.sandbox.session import SandboxError, Session, find_tier
from opdengine.verifiers.sandbox.tiers import NONE, Limits, Tier, spare_uid
from opdengine.workers.plain import decode, encode
from opdengine.workers.tidy import empty_folder, remove_folder

OWNER = """
import sys
from sandbox_tiers import available
from opdengine.verifiers.sandbox.session import Session
tier, runtime = available()[sys.argv[1]]
session = Session(tier, runtime=runtime)
code = "import os, time\\nif os.fork() == 0: os.setsid(); time.sleep(1000)\\ndef f(): time.sleep(1000)"
session.start("functions", code, 10)
print("started", flush=True)
session.tell({"call": ["f", [], []]}, 1000)
"""


def family(pid: int) -> set[int]:
    """Process ids of all descendants."""
    parents = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            parents[int(stat.parent.name)] = int(stat.read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
    found = [pid]
    for each in found:
        found += [child for child, parent in parents.items() if parent == each]
    return set(found[1:])


def wait_until(condition: Any) -> bool:
    deadline = time.monotonic() + 30
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.02)
    return bool(condition())


def gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


def test_everything_ends_when_the_owner_is_killed(isolated: tuple[Tier, Runtime]) -> None:
    tier, _ = isolated
    path = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    with subprocess.Popen(
        [sys.executable, "-c", OWNER, str(tier)],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": path},
    ) as owner:
        assert owner.stdout is not None and owner.stdout.readline() == "started\n"
        # Launcher, first process, program and its daemon.
        assert wait_until(lambda: len(family(owner.pid)) >= 4)
        members = family(owner.pid)
        owner.send_signal(signal.SIGKILL)
    assert wait_until(lambda: all(map(gone, members)))


def test_a_sandbox_that_is_killed_is_an_answer_not_an_error(isolated: tuple[Tier, Runtime]) -> None:
    tier, runtime = isolated
    with Session(tier, runtime=runtime) as session:
        for pid in family(os.getpid()):
            os.kill(pid, signal.SIGKILL)
        assert session.run("print(1)", "", 5)["failed"] == "ended"
        assert session.run("print(1)", "", 5)["failed"] == "ended"


def test_a_broken_first_process_is_noticed_in_time(isolated: tuple[Tier, Runtime], monkeypatch: Any) -> None:
    tier, runtime = isolated
    monkeypatch.setattr(module, "GRACE_SECONDS", 0.2)
    monkeypatch.setattr(module, "END_SECONDS", 0.2)
    with Session(tier, runtime=runtime) as session:
        members = family(os.getpid())
        for pid in members:
            os.kill(pid, signal.SIGSTOP)
        assert session.run("print(1)", "", 0.2) == {"failed": "time", "detail": "the sandbox does not answer"}
    assert members and wait_until(lambda: all(map(gone, members)))


def test_no_two_sandboxes_of_root_share_a_user(isolated: tuple[Tier, Runtime]) -> None:
    tier, runtime = isolated
    ask = "import os; print(os.getuid(), os.getgid(), os.getgroups())"
    seen = []
    for _ in range(3):
        with Session(tier, runtime=runtime) as session:
            seen.append(session.run(ask, "", 10)["output"])
            if session.uid is not None:
                assert seen[-1] == f"{session.uid} {session.uid} []\n"
    assert os.geteuid() != 0 or len(set(seen)) == 3


def test_a_program_has_what_python_needs(isolated: tuple[Tier, Runtime]) -> None:
    tier, runtime = isolated
    program = """
import asyncio, bz2, collections, concurrent.futures, ctypes, decimal, hashlib, heapq, json, lzma, math, multiprocessing
import numbers, os, random, re, sqlite3, ssl, statistics, subprocess, sys, tempfile, threading, unicodedata, zlib
print(asyncio.run(asyncio.sleep(0, "async")))
print(multiprocessing.get_context("fork").Pool(2).map(math.isqrt, [16, 25]))
print(subprocess.run([sys.executable, "-c", "print('child')"], capture_output=True, text=True).stdout.strip())
print(open("/dev/stdin").read(), len(os.urandom(4)), "ü", sys.argv)
with tempfile.NamedTemporaryFile() as file: print(file.write(b"12"))
"""
    with Session(tier, runtime=runtime) as session:
        answer = session.run(program, "input ß", 60)
    assert answer["output"] == "async\n[4, 5]\nchild\ninput ß 4 ü ['solution.py']\n2\n", answer


def test_large_input_and_output_pass(isolated: tuple[Tier, Runtime]) -> None:
    tier, runtime = isolated
    text = "line ö\n" * 100_000
    with Session(tier, Limits(output=1 << 20), runtime) as session:
        answer = session.run("import sys\nsys.stdout.write(sys.stdin.read())", text, 30)
        assert answer["output"] == text
        assert session.run("print(len('x'))", text, 30)["output"] == "1\n", "input that nobody reads is no trouble"


HOARDS = """
import os, threading, time
def later():
    time.sleep(0.2)
    for _ in range(5):
        if os.fork() == 0:
            time.sleep(2)  # the test sees them before they are ended
            block = bytearray(100 << 20)
            time.sleep(1000)
threading.Thread(target=later, daemon=True).start()
def f(): return 1
"""


@pytest.mark.parametrize("name", available())
def test_limits_hold_between_two_questions(name: str) -> None:
    """Processes that wait until nothing is asked are watched as well."""
    tier, runtime = available()[name]
    with Session(tier, Limits(memory=300 << 20), runtime) as session:
        first = len(family(os.getpid()))
        assert session.start("functions", HOARDS, 30) == {"ready": True}
        assert wait_until(lambda: len(family(os.getpid())) > first + 1)
        assert wait_until(lambda: len(family(os.getpid())) == first), "they have been ended without any question"
        answer = session.tell({"call": ["f", [], []]}, 10)
        assert answer["failed"] == "memory" and "in all processes" in answer["detail"]
        assert session.start("functions", "def f(): return 2", 30) == {"ready": True}
        assert session.tell({"call": ["f", [], []]}, 10) == {"value": 2}


def test_a_question_without_a_program_has_an_answer() -> None:
    tier, runtime = next(iter(available().values()))
    with Session(tier, runtime=runtime) as session:
        assert session.tell({"call": ["f", [], []]}, 10) == {"failed": "ended", "detail": "no program was started"}
        assert session.run("print(1)", "", 10)["output"] == "1\n"


def test_a_sandbox_that_cannot_be_cleaned_serves_no_other_program(
    isolated: tuple[Tier, Runtime], tmp_path: Path
) -> None:
    """As where a program's files belong to somebody else; the removal is made to fail."""
    tier, runtime = isolated
    *others, tidy = module.MODULES
    broken = tmp_path / "tidy.py"
    broken.write_text(
        tidy.read_text().replace("    _open_up(folder)\n    unused", "    raise OSError('stuck')\n    unused")
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "MODULES", (*others, broken))
        session = Session(tier, runtime=runtime)
    with session:
        assert session.run("print(1)", "", 10)["output"] == "1\n"
        assert session.run("print(2)", "", 10)["failed"] == "ended"


def test_folders_nested_deeper_than_python_recurses_do_not_pass_to_the_next_program(
    isolated: tuple[Tier, Runtime],
) -> None:
    nest = "import os\nfor _ in range(1500): os.mkdir('d'); os.chdir('d')\nos.chmod('.', 0); print('deep')"
    tier, runtime = isolated
    with Session(tier, runtime=runtime) as session:
        for _ in range(2):
            assert session.run(nest, "", 30)["output"] == "deep\n"
            assert session.run("import os; print(os.listdir('.'))", "", 30)["output"] == "[]\n"


def test_everything_in_a_folder_is_removed(tmp_path: Path) -> None:
    folder, outside = tmp_path / "folder", tmp_path / "outside"
    outside.mkdir()
    (outside / "kept").touch()
    deep = os.open(tmp_path, os.O_RDONLY)
    for name in ["folder"] + ["d"] * 1500:
        os.mkdir(name, dir_fd=deep)
        below = os.open(name, os.O_RDONLY, dir_fd=deep)
        os.close(deep)
        deep = below
    os.symlink(outside, "link", dir_fd=deep)
    os.fchmod(deep, 0)
    os.close(deep)
    (folder / "link").symlink_to(outside)
    (folder / "closed").mkdir()
    (folder / "closed" / "file").touch()
    (folder / "closed").chmod(0)
    folder.chmod(0)
    empty_folder(str(folder))
    assert os.listdir(folder) == [] and (outside / "kept").exists()
    for _ in range(2):
        remove_folder(str(folder))
        assert not folder.exists()


ONE_USER = """
import sys
from opdengine.verifiers.sandbox.session import SandboxError, Session, find_tier
from opdengine.verifiers.sandbox.tiers import candidates
for tier in candidates():
    try:
        Session(tier).close()
        print("started", tier)
    except SandboxError as error:
        assert "a user namespace with one user id" in str(error), error
try:
    find_tier(True)
except SandboxError as error:
    print("refused")
"""


def test_a_user_namespace_with_one_user_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    unshare = shutil.which("unshare")
    command = [str(unshare), "--user", "--map-root-user"]
    if unshare is None or subprocess.run([*command, "true"], capture_output=True).returncode:
        pytest.skip("this system allows no user namespaces")
    environment = {**os.environ, "TMPDIR": str(tmp_path), "PYTHONPATH": os.pathsep.join(sys.path)}
    answer = subprocess.run(
        [*command, sys.executable, "-c", ONE_USER], env=environment, capture_output=True, text=True, timeout=120
    )
    assert answer.stdout == "refused\n", answer.stderr
    assert os.listdir(tmp_path) == []


def test_a_sandbox_that_does_not_start_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(module, "spare_uid", lambda: None)
    monkeypatch.setattr(Tier, "command", lambda *_: [str(tmp_path / "nothing")])
    with pytest.raises(SandboxError, match=r"does not start: .*nothing"):
        Session(NONE)
    assert os.listdir(tmp_path) == []


def test_unsandboxed_programs_have_limits_and_leave_nothing() -> None:
    if str(NONE) not in available():
        with pytest.raises(SandboxError, match="root runs unsandboxed programs as another user"):
            Session(NONE)
        return
    tier, runtime = available()[str(NONE)]
    others = set(family(os.getpid()))  # children that earlier tests of this process have, of a compiler for example
    with Session(tier, Limits(processes=16, memory=300 << 20), runtime) as session:
        assert session.run("while True: pass", "", 0.5)["failed"] == "time"
        assert "MemoryError" in session.run("bytearray(1 << 30)", "", 10)["errors"]
        assert "not permitted" in session.run("import socket\nsocket.socket()", "", 10)["errors"]
        daemon = "import os, time\nif os.fork() == 0:\n    os.setsid()\n    os.fork()\n    time.sleep(1000)"
        assert session.run(daemon + "\nopen('left', 'w')", "", 10)["status"] == 0
        assert len(set(family(os.getpid())) - others) == 1, "the first process"
        (scratch,) = Path(session._scratch or "").parent.glob(Path(session._scratch or "").name)
    assert not scratch.exists() and not set(family(os.getpid())) - others


def test_the_best_tier_is_taken_and_named(monkeypatch: pytest.MonkeyPatch) -> None:
    find_tier.cache_clear()
    tried = []

    def check(tier: Tier, runtime: Any = None) -> None:
        tried.append(tier)
        if tier.name != "unshare":
            raise SandboxError(f"sandbox {tier}: no")

    monkeypatch.setattr(module, "candidates", lambda: [Tier("bwrap", True), Tier("unshare", True), NONE])
    monkeypatch.setattr(module, "check_tier", check)
    assert str(find_tier()) == "unshare (user namespace)" and [t.name for t in tried] == ["bwrap", "unshare"]
    monkeypatch.setattr(module, "candidates", lambda: [Tier("bwrap", True), NONE])
    find_tier.cache_clear()
    with pytest.raises(SandboxError, match=r"(?s)sandbox bwrap \(user namespace\): no.*apt-get install bubblewrap"):
        find_tier()
    find_tier.cache_clear()


def test_spare_users_belong_to_nobody() -> None:
    uid = spare_uid()
    if os.geteuid() != 0:
        assert uid is None
        return
    import pwd

    assert uid is not None
    with pytest.raises(KeyError):
        pwd.getpwuid(uid)


def test_installed_packages_are_not_shown() -> None:
    runtime = find_runtime()
    assert not any("site-packages" in folder for folder in runtime.folders)
    shown = [p for p in sys.path if "site-packages" in p and any(p.startswith(f + "/") for f in runtime.folders)]
    assert all(any(p.startswith(h) for h in runtime.hidden) for p in shown)
    with pytest.raises(OSError, match="does not run"):
        find_runtime("/bin/false")


@pytest.mark.parametrize("machine", AUDIT_ARCHITECTURE)
def test_the_filter_is_well_formed(machine: str) -> None:
    """Every jump stays inside, and the program ends with a verdict."""
    code = build_filter(machine)
    steps = [code[i : i + 8] for i in range(0, len(code), 8)]
    assert len(steps) < 4096
    for place, step in enumerate(steps):
        operation, if_true, if_false = int.from_bytes(step[:2], sys.byteorder), step[2], step[3]
        if operation & 7 == 5:
            assert max(if_true, if_false) + place + 1 < len(steps)
    assert int.from_bytes(steps[-1][:2], sys.byteorder) == 6


def test_unknown_processors_are_refused() -> None:
    with pytest.raises(ValueError, match="no system-call filter for 'sparc64'"):
        build_filter("sparc64")


def test_the_filter_denies_every_call_it_names() -> None:
    """Each in a process of its own: an error number, or the process would not have returned."""
    from opdengine.verifiers.sandbox.filter import CLONE3, DENIED, EPERM

    column = list(AUDIT_ARCHITECTURE).index(os.uname().machine)
    names = {name: numbers[column] for name, numbers in DENIED.items() if numbers[column] is not None}
    code = f"""
import ctypes, json
libc = ctypes.CDLL(None, use_errno=True)
def call(number):
    ctypes.set_errno(0)
    return libc.syscall(number, -1, 0, 0, 0, 0, 0), ctypes.get_errno()
print(json.dumps({{name: call(number) for name, number in {names!r}.items()}}))
print(json.dumps(call({CLONE3[column]})))
"""
    tier, runtime = next(iter(available().values()))
    with Session(tier, runtime=runtime) as session:
        denied, clone3 = map(json.loads, session.run(code, "", 10)["output"].splitlines())
    assert denied == {name: [-1, EPERM] for name in names}
    assert clone3 == [-1, 38]
    assert ctypes.CDLL(None).syscall(names["kcmp"], -1, 0, 0, 0, 0) == -1  # the test's own process may ask


def test_plain_data_survives_and_nothing_else_does() -> None:
    for value in (None, [1, (2, {"a": {3}})], {(1, "x"): b"\xff"}, 1.5, -(2**80), 1j, frozenset(), {"tuple": 1}, ""):
        back = decode(json.loads(json.dumps(encode(value))))
        assert back == value and type(back) is type(value)

    class Text(str):
        __slots__ = ()

    assert type(decode(encode(Text("a")))) is str
    for bad in (object(), print, iter([]), [range(3)]):
        with pytest.raises(TypeError, match="no plain data"):
            encode(bad)
    endless: list[Any] = []
    endless.append(endless)
    with pytest.raises(TypeError, match="nested deeper"):
        encode(endless)
    deep: Any = 1
    for _ in range(200):
        deep = [deep]
    for forged in (
        {"eval": "1"},
        {"a": 1, "b": 2},
        {"set": [[1]]},
        {"bytes": "zz"},
        {"dict": [[1]]},
        {"set": 5},
        deep,
        {},
    ):
        with pytest.raises(ValueError, match=r"plain data|nested deeper"):
            decode(forged)
