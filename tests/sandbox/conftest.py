"""Every way of isolation that this machine offers; tests run in each."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from opdengine.verifiers.sandbox.runtime import Runtime, find_runtime
from opdengine.verifiers.sandbox.session import SandboxError, check_tier
from opdengine.verifiers.sandbox.tiers import Tier, candidates

PR_SET_CHILD_SUBREAPER = 36
SYSTEM_PYTHON = Path("/usr/bin/python3")
"""Where the interpreter of the tests lies in root's home, ordinary users can run this one."""


@functools.cache
def available() -> dict[str, tuple[Tier, Runtime]]:
    """Tiers that work here, each with an interpreter."""
    runtimes = [find_runtime()] + ([find_runtime(str(SYSTEM_PYTHON))] if SYSTEM_PYTHON.exists() else [])
    found: dict[str, tuple[Tier, Runtime]] = {}
    for tier in candidates():
        for runtime in runtimes:
            try:
                check_tier(tier, runtime)
            except SandboxError:
                continue
            found[str(tier)] = (tier, runtime)
            break
    return found


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "isolated" in metafunc.fixturenames:
        tiers = [name for name, (tier, _) in available().items() if tier.isolated]
        metafunc.parametrize("isolated", tiers or ["nothing"], indirect=True)


@pytest.fixture
def isolated(request: pytest.FixtureRequest) -> tuple[Tier, Runtime]:
    """One of the tiers that isolate."""
    if request.param == "nothing":
        pytest.fail(
            "no isolation works on this machine; install bubblewrap or allow user namespaces "
            "(sysctl kernel.apparmor_restrict_unprivileged_userns=0, --security-opt seccomp=unconfined)"
        )
    return available()[request.param]


@pytest.fixture(autouse=True)
def orphanage() -> Iterator[None]:
    """Processes that outlive their parents become children of the test, where they can be counted."""
    libc = ctypes.CDLL(None)
    libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    yield
    libc.prctl(PR_SET_CHILD_SUBREAPER, 0, 0, 0, 0)
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
