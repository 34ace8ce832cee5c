"""Starts a command in namespaces of its own, without any helper program (Linux 5.12 or newer).

Run by path: ``python jail.py CONFIG COMMAND...``; the standard library alone. The command sees nothing but what
the configuration names: read-only folders and files, a process list of its own, no network, a scratch
folder of limited size. It becomes process 1 of its process namespace, so that everything in there ends with it.
"""

from __future__ import annotations

import ctypes
import json
import os
import platform
import signal
import sys
from typing import Any

NEW_NS, NEW_CGROUP, NEW_UTS, NEW_IPC, NEW_USER, NEW_PID, NEW_NET = (
    0x00020000,
    0x02000000,
    0x04000000,
    0x08000000,
    0x10000000,
    0x20000000,
    0x40000000,
)
MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_BIND, MS_REC, MS_PRIVATE = 1, 2, 4, 8, 4096, 16384, 1 << 18
MNT_DETACH = 2
ATTR_RDONLY, ATTR_NOSUID, ATTR_NODEV = 1, 2, 4
AT_FDCWD, AT_RECURSIVE = -100, 0x8000
MOUNT_SETATTR = 442
PIVOT_ROOT = {"x86_64": 155, "aarch64": 41}
PR_SET_PDEATHSIG = 1

libc = ctypes.CDLL(None, use_errno=True)


class _Attributes(ctypes.Structure):
    _fields_ = (
        ("set", ctypes.c_uint64),
        ("clear", ctypes.c_uint64),
        ("propagation", ctypes.c_uint64),
        ("userns", ctypes.c_uint64),
    )


def main(config: dict[str, Any], command: list[str]) -> int:
    """Run the command to its end and return its exit code.

    Args:
        config: ``userns`` (needed without privileges), ``folders`` and ``devices`` (bound at their own places),
            ``files`` (pairs of source and place), ``links`` (pairs of target and place), ``hidden`` (folders to
            cover), ``scratch`` (bytes), ``inodes``.
        command: absolute path and arguments; its environment is empty.
    """
    _die_with_parent()
    user, group = os.getuid(), os.getgid()
    flags = NEW_NS | NEW_CGROUP | NEW_UTS | NEW_IPC | NEW_PID | NEW_NET
    _check("unshare", libc.unshare(flags | (NEW_USER if config["userns"] else 0)))
    if config["userns"]:
        for name, text in (("setgroups", "deny"), ("uid_map", f"{user} {user} 1"), ("gid_map", f"{group} {group} 1")):
            with open(f"/proc/self/{name}", "w") as file:
                file.write(text)
    child = os.fork()
    if child == 0:
        _die_with_parent()
        os.setsid()
        _build_root(config)
        os.execve(command[0], command, {})
    os.closerange(0, 2)
    return abs(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))


def _build_root(config: dict[str, Any]) -> None:
    """Put an empty file system in place of the root and fill it."""
    _mount(None, "/", None, MS_REC | MS_PRIVATE)
    _mount("tmpfs", "/tmp", "tmpfs", MS_NOSUID | MS_NODEV, "mode=755")
    os.mkdir("/tmp/old")
    os.mkdir("/tmp/new")
    _pivot("/tmp", "/tmp/old")
    os.chdir("/new")
    _mount("/new", "/new", None, MS_BIND)
    for folder in config["folders"]:
        os.makedirs("/new" + folder, exist_ok=True)
        _mount("/old" + folder, "/new" + folder, None, MS_BIND | MS_REC)
        _restrict("/new" + folder, ATTR_RDONLY | ATTR_NOSUID | ATTR_NODEV)
    for target, place in config["links"]:
        os.makedirs(os.path.dirname("/new" + place), exist_ok=True)
        os.symlink(target, "/new" + place)
    for source, place in config["files"]:
        _bind_file("/old" + source, "/new" + place, ATTR_RDONLY | ATTR_NOSUID | ATTR_NODEV)
    for device in config["devices"]:
        _bind_file("/old" + device, "/new" + device, ATTR_NOSUID)
    for folder in config["hidden"]:
        _mount("tmpfs", "/new" + folder, "tmpfs", MS_RDONLY, "size=4k,mode=755")
    for folder in ("/proc", "/tmp", "/dev/shm"):
        os.makedirs("/new" + folder, exist_ok=True)
    _mount("proc", "/new/proc", "proc", MS_NOSUID | MS_NODEV | MS_NOEXEC)
    options = f"mode=1777,nr_inodes={config['inodes']},size="
    _mount("tmpfs", "/new/tmp", "tmpfs", MS_NOSUID | MS_NODEV, f"{options}{config['scratch']}")
    _mount("tmpfs", "/new/dev/shm", "tmpfs", MS_NOSUID | MS_NODEV, f"{options}{config['scratch']}")
    os.chdir("/new")
    _pivot(".", ".")
    _check("umount2", libc.umount2(b".", MNT_DETACH))
    _restrict("/", ATTR_RDONLY | ATTR_NOSUID, recursive=False)
    os.chdir("/tmp")


def _bind_file(source: str, place: str, attributes: int) -> None:
    os.makedirs(os.path.dirname(place), exist_ok=True)
    os.close(os.open(place, os.O_CREAT | os.O_WRONLY))
    _mount(source, place, None, MS_BIND)
    _restrict(place, attributes)


def _mount(source: str | None, place: str, kind: str | None, flags: int, options: str | None = None) -> None:
    texts = [None if text is None else text.encode() for text in (source, place, kind, options)]
    _check(f"mounting {place}", libc.mount(*texts[:3], ctypes.c_ulong(flags), texts[3]))


def _restrict(place: str, attributes: int, recursive: bool = True) -> None:
    wanted = _Attributes(attributes, 0, 0, 0)
    flags = AT_RECURSIVE if recursive else 0
    arguments = (AT_FDCWD, place.encode(), flags, ctypes.byref(wanted), ctypes.c_size_t(ctypes.sizeof(wanted)))
    _check(f"restricting {place}", libc.syscall(MOUNT_SETATTR, *arguments))


def _pivot(new: str, old: str) -> None:
    _check("pivot_root", libc.syscall(PIVOT_ROOT[platform.machine()], new.encode(), old.encode()))


def _die_with_parent() -> None:
    _check("prctl", libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0))


def _check(what: str, result: int) -> None:
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")


if __name__ == "__main__":
    sys.exit(main(json.loads(sys.argv[1]), sys.argv[2:]))
