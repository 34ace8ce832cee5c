"""Print the requirements of extras of pyproject.toml, one per line: for environments without the core ones (torch)."""

from __future__ import annotations

import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

PROJECT = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
OWN = re.compile(rf"{PROJECT['name']}\[(.+)\]")


def requirements(extra: str) -> Iterator[str]:
    """The packages of an extra, with those of the extras that it names."""
    for requirement in PROJECT["optional-dependencies"][extra]:
        own = OWN.fullmatch(requirement)
        if own is None:
            yield requirement
            continue
        for inner in own.group(1).split(","):
            yield from requirements(inner.strip())


if __name__ == "__main__":
    print("\n".join(dict.fromkeys(r for extra in sys.argv[1:] for r in requirements(extra))))  # noqa: T201
