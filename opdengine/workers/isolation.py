"""Leaving the network: a process keeps nothing but a loopback interface of its own (Linux)."""

from __future__ import annotations

import ctypes
import os
import socket
import struct
from pathlib import Path

CLONE_NEWUSER, CLONE_NEWNET = 0x10000000, 0x40000000
SIOCSIFFLAGS, IFF_UP = 0x8914, 0x1


def leave_network() -> bool:
    """Move this process and all its future children out of the network.

    Needs no privilege where the system allows user namespaces; the process must have one thread. It is tried
    in a child first, so that a system which allows only a part of it leaves this process as it was.

    Returns:
        Whether the process has left; where not, nothing has changed.
    """
    child = os.fork()
    if child == 0:
        code = 1
        try:
            _leave()
            code = 0
        finally:
            os._exit(code)
    if os.waitpid(child, 0)[1] != 0:
        return False
    _leave()
    return True


def _leave() -> None:
    """
    Raises:
        OSError: the system does not allow it.
    """
    user, group = os.getuid(), os.getgid()
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(CLONE_NEWNET) != 0:  # only root may without a user namespace
        if libc.unshare(CLONE_NEWUSER | CLONE_NEWNET) != 0:
            raise OSError(ctypes.get_errno(), "unshare failed")
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"{user} {user} 1")
        Path("/proc/self/gid_map").write_text(f"{group} {group} 1")
    import fcntl

    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        fcntl.ioctl(any_socket, SIOCSIFFLAGS, struct.pack("16sh14x", b"lo", IFF_UP))
