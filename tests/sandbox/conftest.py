"""Every way of isolation that this machine offers; tests run in each."""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections.abc import Iterator

import pytest
from sandbox_tiers import available

from opdengine.verifiers.sandbox.runtime import Runtime
from opdengine.verifiers.sandbox.tiers import Tier

PR_SET_CHILD_SUBREAPER = 36


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
