"""Which isolation this system offers, and how a process is started in it."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from opdengine.verifiers.sandbox.runtime import DEVICES, Runtime

JAIL = Path(__file__).with_name("jail.py").read_text()
UIDS = range(2_000_000_000, 2_100_000_000)


@dataclass(frozen=True)
class Limits:
    """What one program may use.

    Args:
        memory: bytes of address space of each process, and of memory in use of all of them together.
        cpu: seconds of processor time of one process.
        processes: processes and threads at the same time.
        output: bytes on standard output, or of one returned value.
        file_size: bytes of one file.
        scratch: bytes of all files in /tmp, and again in /dev/shm.
        files: files in /tmp.
        open_files: per process.
    """

    memory: int = 1 << 30
    cpu: int = 60
    processes: int = 32
    output: int = 1 << 20
    file_size: int = 16 << 20
    scratch: int = 64 << 20
    files: int = 2000
    open_files: int = 64


@dataclass(frozen=True)
class Tier:
    """One way to start a process apart from everything else.

    Args:
        name: "bwrap" (bubblewrap), "unshare" (namespaces, set up by this package) or "none".
        userns: by means of a user namespace, which needs no privileges; else as root.
    """

    name: str
    userns: bool = False

    def __str__(self) -> str:
        if self.name == "none":
            return "none (only resource limits and a system-call filter)"
        return f"{self.name} ({'user namespace' if self.userns else 'as root'})"

    @property
    def isolated(self) -> bool:
        """Whether programs are kept from files, processes and the network of this system."""
        return self.name != "none"

    def command(self, runtime: Runtime, limits: Limits, arguments: Sequence[str]) -> list[str]:
        """The command line that runs the interpreter with these arguments."""
        inner = [runtime.executable, "-I", "-S", "-B", "-X", "utf8", *arguments]
        if self.name == "bwrap":
            return [*self._bwrap(runtime, limits), "--", *inner]
        if self.name == "unshare":
            config = {
                "userns": self.userns,
                "folders": runtime.folders,
                "files": runtime.files,
                "links": runtime.links,
                "hidden": runtime.hidden,
                "devices": DEVICES,
                "scratch": limits.scratch,
                "inodes": limits.files,
            }
            return [runtime.executable, "-I", "-S", "-c", JAIL, json.dumps(config), *inner]
        return inner

    def _bwrap(self, runtime: Runtime, limits: Limits) -> Iterator[str]:
        yield str(shutil.which("bwrap"))
        yield from ("--unshare-ipc", "--unshare-pid", "--unshare-net", "--unshare-uts", "--unshare-cgroup-try")
        yield from ("--die-with-parent", "--new-session", "--as-pid-1", "--clearenv")
        if self.userns:
            yield "--unshare-user"
        else:
            yield from ("--cap-drop", "ALL", "--cap-add", "CAP_SETUID", "--cap-add", "CAP_SETGID")
        places = [*runtime.folders, *DEVICES, *(place for _, place in runtime.files)]
        for parent in sorted({str(p) for place in places for p in Path(place).parents} - {"/"}):
            yield from ("--dir", parent)  # those made on the way are root's alone
        for folder in runtime.folders:
            yield from ("--ro-bind", folder, folder)
        for source, place in runtime.files:
            yield from ("--ro-bind", source, place)
        for target, place in runtime.links:
            yield from ("--symlink", target, place)
        for device in DEVICES:
            yield from ("--dev-bind", device, device)
        for folder in runtime.hidden:
            yield from ("--size", "4096", "--tmpfs", folder, "--remount-ro", folder)
        for folder in ("/tmp", "/dev/shm"):
            yield from ("--perms", "1777", "--size", str(limits.scratch), "--tmpfs", folder)
        yield from ("--proc", "/proc", "--chdir", "/tmp", "--remount-ro", "/")


def candidates() -> list[Tier]:
    """The tiers that may work here, best first; :func:`find_tier` tries them."""
    if not sys.platform.startswith("linux"):
        return [NONE]
    ways = [False, True] if os.geteuid() == 0 else [True]
    programs = ["bwrap", "unshare"] if shutil.which("bwrap") else ["unshare"]
    return [*(Tier(program, userns) for program in programs for userns in ways), NONE]


NONE = Tier("none")


def spare_uid() -> int | None:
    """As root: a user id that belongs to nobody, for one sandbox; None as an ordinary user.

    Limits on the number of processes hold per user id and not for root at all.

    Raises:
        ValueError: this user namespace knows no user but root.
    """
    if os.geteuid() != 0:
        return None
    mapped = _mapped_ids()
    if len(mapped) < 2:
        raise ValueError(
            "root in a user namespace with one user id cannot run programs as another user; map more ids "
            "(/etc/subuid and newuidmap, or podman and docker with --userns and a range), or run as an ordinary user"
        )
    choices = UIDS if UIDS[-1] in mapped else range(mapped.stop - min(10_000, len(mapped) // 2), mapped.stop)
    return secrets.choice(choices)


def _mapped_ids() -> range:
    """The longest run of user ids that this user namespace knows."""
    with open("/proc/self/uid_map") as file:
        runs = [tuple(map(int, line.split())) for line in file]
    start, _, length = max(runs, key=lambda run: run[2])
    return range(start, start + length)
