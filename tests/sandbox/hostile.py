"""Programs that attack the machine they run on. Each is bounded, so that a sandbox that fails is only embarrassed.

A program prints ``GOT ...`` when it has reached something that it must not. ``{secret}``, ``{bait}``, ``{port}``,
``{abstract}`` and ``{path}`` are filled in by the tests: a file that everybody may read, a file to destroy, a TCP
port on the loopback, an abstract and a file-system UNIX socket. ``{token}`` is part of every name it writes.
"""

from __future__ import annotations

from dataclasses import dataclass

CALL = """
import ctypes, os
libc = ctypes.CDLL(None, use_errno=True)
def call(name, *arguments):
    ctypes.set_errno(0)
    result = libc.syscall(*arguments)
    if result >= 0:
        print("GOT", name, result)
    return result
"""


@dataclass(frozen=True)
class Hostile:
    """A program and how the sandbox may end it.

    Args:
        code: the program.
        ends: words of ``failed``, or "alone" if it comes to its end by itself.
    """

    code: str
    ends: tuple[str, ...] = ("alone",)

    @property
    def seconds(self) -> float:
        """How long it may run: only those that would never end are cut short."""
        return 1.0 if "time" in self.ends else 30.0


CORPUS: dict[str, Hostile] = {
    # Time.
    "endless_loop": Hostile("while True: pass", ("time",)),
    "sleeps_forever": Hostile("import time; time.sleep(1000)", ("time",)),
    "ignores_signals": Hostile(
        "import signal, time\n"
        "for s in range(1, 65):\n"
        "    try: signal.signal(s, signal.SIG_IGN)\n"
        "    except (OSError, ValueError): pass\n"
        "while True:\n"
        "    try: time.sleep(1000)\n"
        "    except BaseException: pass",
        ("time",),
    ),
    "computes_in_c": Hostile("sum(range(10**13))", ("time",)),
    "stops_itself": Hostile("import os, signal; os.kill(os.getpid(), signal.SIGSTOP)", ("time",)),
    "waits_for_input": Hostile("import sys, os\nos.dup2(os.pipe()[0], 0)\nsys.stdin.read()", ("time",)),
    "regular_expression": Hostile("import re; re.match(r'(a+)+b', 'a' * 60)", ("time",)),
    # Memory.
    "memory_bomb": Hostile("blocks = []\nfor _ in range(60): blocks.append(bytearray(50 << 20))\nprint('GOT 3 GB')"),
    "memory_bomb_of_processes": Hostile(
        "import os, time\n"
        "for _ in range(12):\n"
        "    if os.fork() == 0:\n"
        "        block = bytearray(150 << 20)\n"
        "        time.sleep(5)\n"
        "        os._exit(0)\n"
        "time.sleep(5)\n"
        "print('GOT 1.8 GB')",
        ("memory",),
    ),
    "memory_files": Hostile(
        "import os\nfds = []\n"
        "for i in range(40):\n"
        "    fd = os.memfd_create(str(i)); fds.append(fd)\n"
        "    os.write(fd, bytes(15 << 20))\n"
        "print('GOT 600 MB')"
    ),
    "shared_segments": Hostile(
        CALL + "for i in range(4):\n"
        "    segment = call('shmget', 29 if os.uname().machine == 'x86_64' else 194, 0, 100 << 20, 0o1600)\n"
        "    address = libc.shmat\n"
    ),
    "huge_integer": Hostile("x = 7 ** (10 ** 9)\nprint('GOT it')", ("alone", "time")),
    "long_string": Hostile("s = 'x' * (1 << 33)\nprint('GOT 8 GB')"),
    "deep_recursion": Hostile("import sys\nsys.setrecursionlimit(10**9)\ndef f(): return f()\nf()", ("alone", "time")),
    "deep_recursion_in_c": Hostile(
        "import sys\nsys.setrecursionlimit(10**9)\nx = []\nfor _ in range(10**6): x = [x]\nrepr(x)", ("alone", "time")
    ),
    # Processes.
    "fork_bomb": Hostile(
        "import os, time\n"
        "count = 0\n"
        "try:\n"
        "    for _ in range(200):\n"
        "        if os.fork() == 0:\n"
        "            time.sleep(10); os._exit(0)\n"
        "        count += 1\n"
        "except OSError as error: print('refused after', count)\n"
        "if count > 40: print('GOT', count, 'processes')"
    ),
    "fork_bomb_of_children": Hostile(
        "import os\nfor _ in range(8):\n    try: os.fork()\n    except OSError: pass\nwhile True: pass",
        ("time",),
    ),
    "thread_bomb": Hostile(
        "import threading, time\n"
        "count = 0\n"
        "try:\n"
        "    for _ in range(300):\n"
        "        threading.Thread(target=time.sleep, args=(10,), daemon=True).start(); count += 1\n"
        "except RuntimeError: print('refused after', count)\n"
        "if count > 40: print('GOT', count, 'threads')\n"
        "import os; os._exit(0)"
    ),
    "daemon": Hostile(
        "import os, time\n"
        "if os.fork() == 0:\n"
        "    os.setsid()\n"
        "    if os.fork() == 0:\n"
        "        for fd in range(64):\n"
        "            try: os.close(fd)\n"
        "            except OSError: pass\n"
        "        time.sleep(1000)\n"
        "    os._exit(0)\n"
        "os.wait()"
    ),
    "kills_everything": Hostile(
        "import os, signal\n"
        "if os.getppid() != 1 or os.getuid() == 0: print('GOT no world of its own')\n"
        "else: os.kill(-1, signal.SIGKILL)"
    ),
    "kills_the_first_process": Hostile(
        "import os, signal, time\n"
        "for s in (9, 15, 19, 11, 6):\n"
        "    try: os.kill(1, s)\n"
        "    except OSError: pass\n"
        "    try: os.kill(os.getppid(), s)\n"
        "    except OSError: pass\n"
        "time.sleep(0.2)\n"
        "print('went on')"
    ),
    "signals_strangers": Hostile(
        "import os, signal\n"
        "for pid in [{pid}, *range(2, 3000)]:\n"
        "    if pid == os.getpid(): continue\n"
        "    try: os.kill(pid, 0); print('GOT', pid)\n"
        "    except OSError: pass"
    ),
    "sees_strangers": Hostile(
        "import os\n"
        "for pid in filter(str.isdigit, os.listdir('/proc')):\n"
        "    for name in ('environ', 'mem', 'maps', 'fd', 'root', 'cwd'):\n"
        "        if int(pid) == os.getpid(): continue\n"
        "        try: print('GOT', pid, name, os.listdir(f'/proc/{{pid}}/{{name}}'))\n"
        "        except NotADirectoryError:\n"
        "            try: print('GOT', pid, name, open(f'/proc/{{pid}}/{{name}}', 'rb').read(10))\n"
        "            except OSError: pass\n"
        "        except OSError: pass"
    ),
    "runs_a_shell": Hostile(
        "import os, subprocess\n"
        "for shell in ('/bin/sh', '/bin/bash', '/usr/bin/env', '/bin/busybox', '/usr/bin/perl'):\n"
        "    try: print('GOT', subprocess.run([shell, '-c', 'id'], capture_output=True))\n"
        "    except OSError: pass\n"
        "if os.system('id') == 0: print('GOT system')"
    ),
    "traces_and_steers": Hostile(
        CALL + "x86 = os.uname().machine == 'x86_64'\n"
        "for name, a, b in [('ptrace', 101, 117), ('process_vm_readv', 310, 270), ('pidfd_getfd', 438, 438)]:\n"
        "    call(name, a if x86 else b, 16 if name == 'ptrace' else 1, 1, 0, 0, 0, 0)\n"
        "import resource\n"
        "for pid in (1, os.getppid()):\n"
        "    try: resource.prlimit(pid, resource.RLIMIT_CPU, (0, 0)); print('GOT prlimit')\n"
        "    except OSError: pass\n"
        "    try: os.setpriority(os.PRIO_PROCESS, pid, 19); print('GOT setpriority')\n"
        "    except OSError: pass"
    ),
    "raises_its_limits": Hostile(
        "import resource\n"
        "for name in ('AS', 'CPU', 'NPROC', 'FSIZE', 'NOFILE'):\n"
        "    kind = getattr(resource, 'RLIMIT_' + name)\n"
        "    try: resource.setrlimit(kind, (resource.RLIM_INFINITY,) * 2); print('GOT', name)\n"
        "    except (OSError, ValueError): pass"
    ),
    "segmentation_fault": Hostile("import ctypes; ctypes.string_at(0)"),
    "aborts": Hostile("import os; os.abort()"),
    # Output.
    "endless_output": Hostile("import os\nwhile True: os.write(1, b'x' * 65536)", ("output",)),
    "endless_errors": Hostile("import os\nfor _ in range(2000): os.write(2, b'x' * 65536)", ("alone", "time")),
    "no_text": Hostile("import os; os.write(1, bytes(range(256)) * 10)"),
    # Files.
    "huge_file": Hostile(
        "with open('/tmp/{token}', 'wb') as f:\n    for _ in range(300): f.write(bytes(1 << 20))\nprint('GOT')"
    ),
    "fills_tmp": Hostile(
        "for i in range(40):\n"
        "    with open(f'/tmp/{token}{{i}}', 'wb') as f: f.write(bytes(10 << 20))\n"
        "print('GOT 400 MB')"
    ),
    "fills_shared_memory": Hostile(
        "for i in range(40):\n"
        "    with open(f'/dev/shm/{token}{{i}}', 'wb') as f: f.write(bytes(10 << 20))\n"
        "print('GOT 400 MB')"
    ),
    "many_files": Hostile(
        "import os\nfor i in range(100_000): os.mkdir(f'/tmp/{token}{{i}}')\nprint('GOT 100000')", ("alone", "files")
    ),
    "many_open_files": Hostile("import os\nfds = [os.pipe() for _ in range(1000)]\nprint('GOT 2000')"),
    "writes_everywhere": Hostile(
        "import os\n"
        "for folder in ('/', '/etc', '/usr', '/usr/lib', '/root', '/home', '/var/tmp', '/dev', '/proc', '/run',\n"
        "               os.path.expanduser('~'), {home!r}, {cwd!r}, os.path.dirname(os.__file__)):\n"
        "    try:\n"
        "        open(os.path.join(folder, '{token}'), 'w').write('x'); print('GOT', folder)\n"
        "    except OSError: pass"
    ),
    "deletes_files": Hostile(
        "import os, shutil\n"
        "for path in ({bait!r}, os.path.dirname({bait!r})):\n"
        "    shutil.rmtree(path, ignore_errors=True)\n"
        "    try: os.remove(path); print('GOT', path)\n"
        "    except OSError: pass\n"
        "try: open({bait!r}, 'w').close(); print('GOT', {bait!r})\n"
        "except OSError: pass"
    ),
    "reads_files": Hostile(
        "import os\n"
        "roots = ('', '/proc/1/root', '/proc/self/cwd/../..', '/../../..', '/old', '/oldroot', '/newroot')\n"
        "for path in ('/etc/passwd', '/etc/hostname', *(root + {secret!r} for root in roots)):\n"
        "    try: print('GOT', open(path).read()[:100])\n"
        "    except OSError: pass\n"
        "for folder, _, names in os.walk('/'):\n"
        "    if folder.startswith(('/proc', '/usr/lib', os.path.dirname(os.__file__))): continue\n"
        "    for name in names:\n"
        "        if '{name}' in name: print('GOT', folder, name)"
    ),
    "reads_the_environment": Hostile(
        "import ctypes, os\n"
        "print(dict(os.environ))\n"
        "for pid in ('self', 1, os.getppid()):\n"
        "    try: print(open(f'/proc/{{pid}}/environ').read())\n"
        "    except OSError: pass\n"
        "print(ctypes.c_char_p.in_dll(ctypes.CDLL(None), 'environ').value)"
    ),
    "climbs_out": Hostile(
        CALL + "x86 = os.uname().machine == 'x86_64'\n"
        "call('chroot', 161 if x86 else 51, b'/tmp')\n"
        "call('mount', 165 if x86 else 40, b'x', b'/tmp', b'tmpfs', 0, None)\n"
        "call('umount', 166 if x86 else 39, b'/proc', 2)\n"
        "call('unshare', 272 if x86 else 97, 0x10000000)\n"
        "call('setns', 308 if x86 else 268, 0, 0)\n"
        "call('clone', 56 if x86 else 220, 0x10000011, 0, 0, 0, 0)\n"
        "call('clone3', 435, 0, 0)\n"
        "call('pivot_root', 155 if x86 else 41, b'/', b'/')\n"
        "call('open_by_handle_at', 304 if x86 else 265, 0, 0, 0)\n"
        "call('bpf', 321 if x86 else 280, 0, 0, 0)\n"
        "call('io_uring_setup', 425, 1, 0)\n"
        "call('userfaultfd', 323 if x86 else 282, 0)\n"
        "call('keyctl', 250 if x86 else 219, 0, -3, 1)\n"
        "call('perf_event_open', 298 if x86 else 241, 0, 0, -1, -1, 0)\n"
        "try: os.setuid(0); print('GOT root')\n"
        "except OSError: pass\n"
        "try: os.setgroups([0]); print('GOT groups')\n"
        "except OSError: pass"
    ),
    "makes_devices": Hostile(
        "import os, stat\n"
        "try: os.mknod('/tmp/{token}', stat.S_IFBLK | 0o666, os.makedev(254, 0)); print('GOT a device')\n"
        "except OSError: pass\n"
        "try: os.chmod('/dev/null', 0); print('GOT /dev/null')\n"
        "except OSError: pass"
    ),
    # What the next program would find.
    "closed_folders": Hostile(
        "import os\n"
        "for place in ('/tmp', '/dev/shm'):\n"
        "    folder = f'{{place}}/{token}/inner'\n"
        "    os.makedirs(folder)\n"
        "    open(folder + '/file', 'w').close()\n"
        "    os.chmod(folder, 0); os.chmod(f'{{place}}/{token}', 0)\n"
        "    try: os.chmod(place, 0)\n"
        "    except OSError: pass"
    ),
    "nested_folders": Hostile(
        "import os\n"
        "for place, depth in (('/dev/shm', 450), ('/tmp', 450)):\n"
        "    os.chdir(place)\n"
        "    for _ in range(depth): os.mkdir('{token}'); os.chdir('{token}')\n"
        "    os.chmod('.', 0)"
    ),
    "odd_names": Hostile(
        "import os\n"
        "os.symlink('/tmp', b'/tmp/\\xff\\n'); os.symlink('nowhere', '/tmp/-rf'); os.mkfifo('/dev/shm/{token}', 0)\n"
        "os.mkdir(b'/tmp/\\xfe'); os.symlink('..', b'/tmp/\\xfe/up')"
    ),
    "interrupts_the_first_process": Hostile(
        "import os, signal, time\n"
        "for s in range(1, 65):\n"
        "    for pid in (1, os.getppid()):\n"
        "        try: os.kill(pid, s)\n"
        "        except OSError: pass\n"
        "time.sleep(0.2)\n"
        "print('went on')"
    ),
    "changes_its_state": Hostile(
        "import os, resource, sys\n"
        "os.umask(0o777); os.chdir('/')\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (5, 5)); resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))\n"
        "os.environ['LEFT'] = '{token}'; sys.modules['json'] = None; __builtins__.print = None"
    ),
    "leaves_processes": Hostile(
        "import os, time\n"
        "for _ in range(5):\n"
        "    if os.fork() == 0:\n"
        "        os.setsid()\n"
        "        if os.fork(): os._exit(0)\n"
        "        while True: time.sleep(0.01); open('/tmp/{token}', 'a').close()\n"
        "time.sleep(0.1)"
    ),
    # The network.
    "connects_to_the_loopback": Hostile(
        "import socket\ntry: socket.create_connection(('127.0.0.1', {port}), 2); print('GOT it')\nexcept OSError: pass"
    ),
    "connects_to_unix_sockets": Hostile(
        "import socket\n"
        "for address in ('\\0{abstract}', {path!r}):\n"
        "    try:\n"
        "        s = socket.socket(socket.AF_UNIX); s.connect(address); print('GOT', address)\n"
        "    except OSError: pass"
    ),
    "opens_sockets": Hostile(
        "import socket\n"
        "for family in (socket.AF_INET, socket.AF_INET6, socket.AF_NETLINK, socket.AF_PACKET, socket.AF_VSOCK):\n"
        "    for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM, socket.SOCK_RAW):\n"
        "        try: socket.socket(family, kind); print('GOT', family, kind)\n"
        "        except OSError: pass"
    ),
    "asks_a_name_server": Hostile(
        "import socket\ntry: print('GOT', socket.getaddrinfo('example.com', 80))\nexcept OSError: pass"
    ),
}
"""By name."""
