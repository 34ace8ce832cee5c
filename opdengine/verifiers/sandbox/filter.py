"""The system-call filter of programs in the sandbox, as a classic BPF program for seccomp."""

from __future__ import annotations

import platform
import struct

EPERM, ENOSYS = 1, 38
ALLOW, ERRNO, KILL_PROCESS = 0x7FFF0000, 0x00050000, 0x80000000
LOAD, EQUAL, AT_LEAST, ANY_BIT, RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
NUMBER, ARCHITECTURE, ARGUMENT = 0, 4, 16
NEW_NAMESPACE = 0x7E020000  # CLONE_NEW{NS,CGROUP,UTS,IPC,USER,PID,NET}
X32 = 0x40000000

AUDIT_ARCHITECTURE = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}

# Number on x86-64 and on arm64 (None: there is no such call).
DENIED: dict[str, tuple[int | None, int | None]] = {
    # Other processes: reading, steering and slowing them down.
    "ptrace": (101, 117),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "kcmp": (312, 272),
    "pidfd_getfd": (438, 438),
    "setpriority": (141, 140),
    "sched_setparam": (142, 118),
    "sched_setscheduler": (144, 119),
    "sched_setattr": (314, 274),
    "sched_setaffinity": (203, 122),
    "ioprio_set": (251, 30),
    # Memory that the limits on address space and files do not count.
    "memfd_create": (319, 279),
    "memfd_secret": (447, 447),
    "shmget": (29, 194),
    "shmat": (30, 196),
    "msgget": (68, 186),
    "semget": (64, 190),
    "mq_open": (240, 180),
    "vmsplice": (278, 75),
    "add_key": (248, 217),
    "request_key": (249, 218),
    "keyctl": (250, 219),
    "inotify_init": (253, None),
    "inotify_init1": (294, 26),
    "fanotify_init": (300, 262),
    # The network; socketpair is left.
    "socket": (41, 198),
    # Namespaces and mounts.
    "unshare": (272, 97),
    "setns": (308, 268),
    "mount": (165, 40),
    "umount2": (166, 39),
    "pivot_root": (155, 41),
    "chroot": (161, 51),
    "open_tree": (428, 428),
    "move_mount": (429, 429),
    "fsopen": (430, 430),
    "fsconfig": (431, 431),
    "fsmount": (432, 432),
    "fspick": (433, 433),
    "mount_setattr": (442, 442),
    "name_to_handle_at": (303, 264),
    "open_by_handle_at": (304, 265),
    # Large parts of the kernel that no program of this kind needs.
    "bpf": (321, 280),
    "perf_event_open": (298, 241),
    "userfaultfd": (323, 282),
    "io_uring_setup": (425, 425),
    "io_uring_enter": (426, 426),
    "io_uring_register": (427, 427),
    "personality": (135, 92),
    "modify_ldt": (154, None),
    "iopl": (172, None),
    "ioperm": (173, None),
    "acct": (163, 89),
    "quotactl": (179, 60),
    "syslog": (103, 116),
    "swapon": (167, 224),
    "swapoff": (168, 225),
    "reboot": (169, 142),
    "kexec_load": (246, 104),
    "init_module": (175, 105),
    "finit_module": (313, 273),
    "delete_module": (176, 106),
}
CLONE = (56, 220)
CLONE3 = (435, 435)
PRLIMIT = (302, 261)


def build_filter(machine: str | None = None) -> bytes:
    """The filter for a processor architecture: an array of ``struct sock_filter``.

    Denied calls fail with EPERM; clone3 with ENOSYS, upon which the C library takes clone, whose flags can be
    checked. Limits of other processes cannot be changed.

    Args:
        machine: as in :func:`platform.machine`; default: this one's.

    Raises:
        ValueError: the architecture is not known.
    """
    machine = machine or platform.machine()
    if machine not in AUDIT_ARCHITECTURE:
        raise ValueError(f"no system-call filter for {machine!r}; known are {sorted(AUDIT_ARCHITECTURE)}")
    column = list(AUDIT_ARCHITECTURE).index(machine)
    code: list[tuple[int, int, int, int]] = []

    def add(operation: int, value: int, if_true: int = 0, if_false: int = 0) -> None:
        code.append((operation, if_true, if_false, value))

    add(LOAD, ARCHITECTURE)
    add(EQUAL, AUDIT_ARCHITECTURE[machine], 1, 0)
    add(RETURN, KILL_PROCESS)
    add(LOAD, NUMBER)
    add(AT_LEAST, X32, 0, 1)
    add(RETURN, ERRNO | EPERM)
    for numbers in DENIED.values():
        if (number := numbers[column]) is not None:
            add(EQUAL, number, 0, 1)
            add(RETURN, ERRNO | EPERM)
    add(EQUAL, CLONE3[column], 0, 1)
    add(RETURN, ERRNO | ENOSYS)
    add(EQUAL, CLONE[column], 0, 4)
    add(LOAD, ARGUMENT)
    add(ANY_BIT, NEW_NAMESPACE, 0, 1)
    add(RETURN, ERRNO | EPERM)
    add(RETURN, ALLOW)
    add(EQUAL, PRLIMIT[column], 0, 3)
    add(LOAD, ARGUMENT)
    add(EQUAL, 0, 1, 0)
    add(RETURN, ERRNO | EPERM)
    add(RETURN, ALLOW)
    return b"".join(struct.pack("=HBBI", *instruction) for instruction in code)
