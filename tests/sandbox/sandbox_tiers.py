"""Every way of isolation that this machine offers."""

from __future__ import annotations

import functools
from pathlib import Path

from opdengine.verifiers.sandbox.runtime import Runtime, find_runtime
from opdengine.verifiers.sandbox.session import SandboxError, check_tier
from opdengine.verifiers.sandbox.tiers import Tier, candidates

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
