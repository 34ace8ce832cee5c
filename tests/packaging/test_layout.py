"""The rooms of the house: a module imports only what stands before it, and no modules import each other in a circle."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

ORDER = [
    {"errors"},
    {"types", "metrics", "workers"},
    {"plugins"},
    {"config", "distributed"},
    {"models"},
    {"data", "rollout"},
    {"environments", "verifiers", "teachers", "loss"},
    {"methods"},
    {"training"},
    {"tools"},
    {"cli"},
    {"__main__"},
]
"""Rooms and single modules at the top of the package, from the bottom up; those in one line do not know each other."""


def modules(package: Path) -> dict[str, Path]:
    """Dotted name within the package -> file; a package's own name stands for its ``__init__``."""
    found = {}
    for file in package.rglob("*.py"):
        parts = file.relative_to(package).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)] = file
    return found


def imports(package: str, known: dict[str, Path], name: str) -> set[str]:
    """The modules of the package that one of them imports anywhere, also within functions and for type checking."""
    found = set()
    for node in ast.walk(ast.parse(known[name].read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == package:
            base = node.module.removeprefix(package).lstrip(".")
            for alias in node.names:
                inner = f"{base}.{alias.name}".lstrip(".")
                found.add(inner if inner in known else base or "__init__")
        elif isinstance(node, ast.Import):
            found |= {a.name.removeprefix(package + ".") for a in node.names if a.name.startswith(package + ".")}
        elif isinstance(node, ast.ImportFrom) and node.level:
            raise AssertionError(f"{known[name]}: relative imports hide what is imported")
    return found - {name}


@pytest.fixture(scope="module")
def graph() -> dict[str, set[str]]:
    known = modules(ROOT / "opdengine")
    return {name: imports("opdengine", known, name) for name in known}


def test_every_room_has_its_place() -> None:
    named = set().union(*ORDER)
    there = {p.stem for p in (ROOT / "opdengine").iterdir() if p.suffix == ".py" or (p / "__init__.py").is_file()}
    assert there - {"__init__"} == named
    files = [p for p in (ROOT / "opdengine").iterdir() if p.is_file() and p.suffix == ".py"]
    assert len(files) <= 8


def test_a_room_imports_only_what_stands_before_it(graph: dict[str, set[str]]) -> None:
    place = {room: i for i, row in enumerate(ORDER) for room in row}
    wrong = [
        f"{name} imports {other}"
        for name, others in graph.items()
        for other in others
        if name != "__init__" and other != "__init__"
        if (here := name.split(".")[0]) != (there := other.split(".")[0]) and place[there] >= place[here]
    ]
    assert not wrong


def test_no_modules_import_each_other_in_a_circle(graph: dict[str, set[str]]) -> None:
    state: dict[str, str] = {}
    circles = []

    def visit(name: str, path: list[str]) -> None:
        if state.get(name) == "open":
            circles.append(" -> ".join([*path[path.index(name) :], name]))
        if name in state or name not in graph:
            return
        state[name] = "open"
        for other in sorted(graph[name]):
            visit(other, [*path, name])
        state[name] = "done"

    for name in sorted(graph):
        visit(name, [])
    assert not circles
