"""The command ``opdengine``; where the packages of the extra ``train`` are missing it says so and can still examine."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from opdengine import __version__

OWN = ("opdengine", "opd_kernels")


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; the exit status."""
    try:
        from opdengine.cli import main as command
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if missing in OWN:
            raise
        return _without(missing, list(sys.argv[1:] if arguments is None else arguments))
    return command(arguments)


def _without(package: str, arguments: Sequence[str]) -> int:
    """What can be done without a package that everything else needs."""
    if arguments[:1] == ["doctor"]:
        from opdengine.tools.doctor import examine

        sys.stdout.write("\n".join(map(str, examine())) + "\n")
        return 0
    if "--version" in arguments:
        sys.stdout.write(f"opdengine {__version__}\n")
        return 0
    asked = not arguments or any(argument in ("-h", "--help") for argument in arguments)
    (sys.stdout if asked else sys.stderr).write(
        f"opdengine {__version__}: training needs the package {package!r} and others: pip install 'opdengine[train]'\n"
        "Without them 'opdengine doctor' shows what is missing, and the fused losses work (import opd_kernels).\n"
    )
    return 0 if asked else 2


if __name__ == "__main__":
    sys.exit(main())
