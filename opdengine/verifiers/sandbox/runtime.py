"""The files that a Python interpreter needs, and nothing else."""

from __future__ import annotations

import functools
import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

LOADER = re.compile(rb"/[\w./+-]*/ld[\w.+-]*\.so[.\d]*")
DEVICES = ("/dev/null", "/dev/zero", "/dev/full", "/dev/random", "/dev/urandom")
LINKS = (
    ("/proc/self/fd", "/dev/fd"),
    ("/proc/self/fd/0", "/dev/stdin"),
    ("/proc/self/fd/1", "/dev/stdout"),
    ("/proc/self/fd/2", "/dev/stderr"),
)
LIST_FILES = """
import importlib, json, os, sys, sysconfig
paths = sysconfig.get_paths()
places = [paths["stdlib"], paths["platstdlib"], *(p for p in sys.path if os.path.isdir(p))]
for place in places:
    for name in os.listdir(place) if place.endswith("lib-dynload") else []:
        try:
            importlib.import_module(name.partition(".")[0])
        except Exception:
            pass
mapped = {line.split(None, 5)[5].strip() for line in open("/proc/self/maps") if "/" in line}
libraries = {os.path.dirname(p) for p in mapped if ".so" in os.path.basename(p)}
print(json.dumps([places, sorted(libraries), [paths["purelib"], paths["platlib"]]]))
"""


@dataclass(frozen=True)
class Runtime:
    """What is to be seen of the host's files, all of it read-only.

    Args:
        executable: the interpreter.
        folders: shown at their own places: the standard library, and where shared libraries lie.
        files: pairs of source and place.
        links: pairs of target and place.
        hidden: folders within ``folders`` that are covered: installed packages.
    """

    executable: str
    folders: tuple[str, ...]
    files: tuple[tuple[str, str], ...]
    links: tuple[tuple[str, str], ...]
    hidden: tuple[str, ...]


@functools.cache
def find_runtime(executable: str = "") -> Runtime:
    """Find out what an interpreter loads by running it once.

    Args:
        executable: default: the one that runs this (outside of its virtual environment).

    Raises:
        OSError: it cannot be run.
    """
    executable = os.path.realpath(executable or getattr(sys, "_base_executable", sys.executable))
    listed = subprocess.run([executable, "-I", "-S", "-c", LIST_FILES], capture_output=True, text=True, env={})
    if listed.returncode != 0:
        raise OSError(f"{executable} does not run: {listed.stderr.strip()[-500:]}")
    standard, libraries, packages = json.loads(listed.stdout)
    folders = _outermost([os.path.realpath(folder) for folder in (*standard, *libraries)])
    files = [(executable, executable)]
    if loader := LOADER.search(Path(executable).read_bytes()):
        place = loader[0].decode()
        files.append(
            (os.path.realpath(place), os.path.join(os.path.realpath(os.path.dirname(place)), Path(place).name))
        )
    if os.path.isfile("/etc/ld.so.cache"):
        files.append(("/etc/ld.so.cache", "/etc/ld.so.cache"))
    seen = {folder + "/" for folder in folders}
    tops = sorted({"/" + folder.split("/")[1] for folder in ("/lib", "/lib64", *libraries)})
    return Runtime(
        executable,
        folders,
        tuple(pair for pair in files if not any(pair[1].startswith(folder) for folder in seen)),
        (*((os.readlink(top), top) for top in tops if os.path.islink(top)), *LINKS),
        tuple(p for p in dict.fromkeys(map(os.path.realpath, packages)) if os.path.isdir(p) and _within(p, folders)),
    )


def _outermost(folders: list[str]) -> tuple[str, ...]:
    """Without those that lie in another one."""
    return tuple(sorted(f for f in set(folders) if not _within(f, [g for g in folders if g != f])))


def _within(path: str, folders: list[str] | tuple[str, ...]) -> bool:
    return any(path == folder or path.startswith(folder + "/") for folder in folders)
