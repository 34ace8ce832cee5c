"""The package as a whole: no import circles, and few variants of the kernels."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

PACKAGE = Path(__file__).parents[2] / "kernels" / "opd_kernels"
VARIANTS = Path(__file__).with_name("variant_cases.py")


def imports(file: Path) -> set[str]:
    """Modules of the package that ``file`` imports anywhere, within functions and for type checkers too."""
    names = {p.stem for p in PACKAGE.glob("*.py")}
    found: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level == 1:
            found |= {node.module} if node.module else {alias.name for alias in node.names} & names
    return found


def test_no_import_circles():
    graph = {file.stem: imports(file) for file in PACKAGE.glob("*.py") if file.stem != "__init__"}
    assert "driver" in graph["call"] and "triton_impl" in graph["row_ops"]
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, " -> ".join((*path, name))
        if name not in done:
            for other in sorted(graph[name]):
                visit(other, (*path, name))
            done.add(name)

    for name in sorted(graph):
        visit(name, ())


def test_few_variants_of_the_kernels():
    """In a process without the interpreter, which has no variants."""
    env = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    run = subprocess.run([sys.executable, "-W", "ignore", VARIANTS], env=env, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
    counts = {name: int(count) for name, count in (line.split() for line in run.stdout.splitlines())}
    assert counts["statistics_kernel"] == counts["gradient_kernel"] == 2, (
        counts
    )  # for one and for two teachers of a row
    assert sum(counts.values()) <= 8, counts
