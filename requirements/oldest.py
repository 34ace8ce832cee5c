"""Print the oldest torch, triton and transformers that pyproject.toml admits, as constraints for pip.

With ``--check`` say whether they are what is installed here.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from importlib.metadata import version

from extras import PROJECT

NAMES = ("torch", "triton", "transformers")
REQUIREMENTS = [*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["train"]]


def oldest() -> Iterator[tuple[str, str]]:
    """Name and version of each."""
    for name in NAMES:
        (found,) = (found for r in REQUIREMENTS if (found := re.match(rf"{name}>=([\d.]+)", r)))
        yield name, found.group(1)


def check() -> None:
    """Installed versions may end in further zeros and in the name of a build: 2.11 admits 2.11.0+cpu."""
    for name, wanted in oldest():
        here = version(name)
        if not re.fullmatch(rf"{re.escape(wanted)}(\.0)*(\+.*)?", here):
            sys.exit(f"{name} {here} is not the oldest, {wanted}")
        print(name, here)  # noqa: T201


if __name__ == "__main__":
    if sys.argv[1:] == ["--check"]:
        check()
    else:
        print("\n".join(f"{name}=={wanted}" for name, wanted in oldest()))  # noqa: T201
