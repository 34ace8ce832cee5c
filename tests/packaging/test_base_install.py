"""With nothing installed but torch, triton and numpy the command helps, examines, and says what to install."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRA = [re.split(r"[\[<>=!;]", line)[0] for line in PROJECT["optional-dependencies"]["train"]]

SCRIPT = """
import sys

class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {names}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Missing())
from {module} import {function}
sys.exit({function}({arguments}))
"""


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    module, function = PROJECT["scripts"]["opdengine"].split(":")
    names = {name.replace("-", "_") for name in EXTRA} | {"yaml"}
    code = SCRIPT.format(names=names, module=module, function=function, arguments=list(arguments))
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("arguments", [(), ("--help",), ("train", "--help")])
def test_help_says_what_to_install(arguments: tuple[str, ...]) -> None:
    done = run(*arguments)
    assert (done.returncode, done.stderr) == (0, "")
    assert "pip install 'opdengine[train]'" in done.stdout


def test_a_run_is_refused_with_the_command() -> None:
    done = run("train", "--config", "x.yaml")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.count("\n") == 2 and "pip install 'opdengine[train]'" in done.stderr


def test_the_doctor_names_what_is_missing() -> None:
    done = run("doctor")
    assert done.returncode == 0
    assert re.search(r"\[ +ok\] torch", done.stdout)


def test_the_version_is_told() -> None:
    assert re.fullmatch(r"opdengine \d+\.\d+\.\d+\n", run("--version").stdout)
