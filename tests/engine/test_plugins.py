"""A user's own file that is wrong: one sentence with the file, the line and the cause, before any model is loaded."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from engine_helpers import make_config

from opdengine.config.sections import EnvironmentConfig
from opdengine.environments.registry import load_environment
from opdengine.environments.setup import load_tasks
from opdengine.methods import build_method
from opdengine.plugins import PluginError, load_object
from opdengine.verifiers import load_verifier

OWN = "from opdengine.methods.method import Method\nclass wanted(Method):\n    def __init__"

BROKEN = [
    ("x = 1\ndef f(:\n", r"own\.py, line 2: SyntaxError: "),
    ("def f():\n\treturn 1\n        return 2\n", r"own\.py, line 3: TabError|IndentationError"),
    ("import no_such_package\n", r"own\.py, line 1: ModuleNotFoundError: No module named 'no_such_package'"),
    ("import beside\n", r"line 1: ModuleNotFoundError.*it lies beside that file: set PYTHONPATH="),
    ("from os import no_such_name\n", r"own\.py, line 1: ImportError: cannot import name 'no_such_name'"),
    ("from . import other\n", r"own\.py, line 1: ImportError"),
    ("\nprint(undefined)\n", r"own\.py, line 2: NameError: name 'undefined' is not defined"),
    ("def g():\n    return {}['key']\n\ng()\n", r"own\.py, line 2: KeyError: 'key'"),
    ("import json\njson.loads('{')\n", r"own\.py, line 2: JSONDecodeError"),
    ("import sys\nsys.exit(0)\n", r"own\.py, line 2: it calls exit\(\)"),
    ("import os\nos._exit(0)\n", r"own\.py, line 2: it calls exit\(\)"),
    ("from os import _exit\ndef f(): _exit(3)\nf()\n", r"own\.py, line 2: it calls exit\(\)"),
    ("raise Exception('\\x1b[31mred\\n' * 1000)\n", r"own\.py, line 1: Exception: \\x1b\[31mred"),
    ("def f(): f()\nf()\n", r"own\.py, line 1: RecursionError"),
    ("def wanted_name(): ...\n", r"has no 'wanted'; did you mean 'wanted_name'\?"),
    ("", r"has no 'wanted'$"),
    ("x = '\x00'\n", r"own\.py: (SyntaxError|ValueError): source code (string )?cannot contain null bytes"),
    ("x = '\xff'\n".encode("latin-1"), r"own\.py.*SyntaxError"),
]


@pytest.mark.parametrize(("content", "message"), BROKEN)
def test_files_that_cannot_be_loaded(
    models: dict[str, str], prompt_file: str, tmp_path: Path, content: str | bytes, message: str
) -> None:
    file = tmp_path / "own.py"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    (tmp_path / "beside.py").write_text("")
    name = f"{file}:wanted"
    for load in (
        load_object,
        load_verifier,
        load_environment,
        lambda name: build_method(make_config(models, prompt_file, tmp_path / "o", method=name)),
    ):
        with pytest.raises(ValueError, match=message) as refused:
            load(name)
        assert len(str(refused.value)) < 900


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("own.py:", "neither 'module:name' nor 'path/to/file.py:name'"),
        (":f", "neither"),
        ("plain", "neither"),
        ("nowhere/own.py:f", "there is no Python file 'nowhere/own.py'"),
        ("own_package.missing:f", "No module named 'own_package'; install it, set PYTHONPATH"),
        ("os.path:joi", "'os.path' has no 'joi'; did you mean 'join'?"),
    ],
)
def test_names_that_lead_nowhere(name: str, message: str) -> None:
    with pytest.raises(PluginError) as refused:
        load_object(name)
    assert message in str(refused.value)


def test_children_of_a_users_file_end_as_they_like(tmp_path: Path) -> None:
    """Processes that are forked leave by os._exit, as those of multiprocessing do."""
    file = tmp_path / "own.py"
    file.write_text(
        "import os\nchild = os.fork()\nif child == 0:\n    os._exit(7)\n"
        "code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])\n"
    )
    plain = os._exit
    assert load_object(f"{file}:code") == 7
    assert os._exit is plain


def test_a_run_that_a_users_code_ends_suddenly_has_failed(
    models: dict[str, str], prompt_file: str, tmp_path: Path
) -> None:
    file = tmp_path / "own.py"
    file.write_text(f"import os\n{OWN}(self, config):\n        os._exit(0)\n")
    arguments = ["--model", models["student"], "--teachers.0.model", models["big"], "--train_data", prompt_file]
    arguments += ["--output_dir", str(tmp_path / "o"), "--method", f"{file}:wanted"]
    command = [sys.executable, "-m", "opdengine", "train", *arguments]
    run = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert run.returncode == 2
    assert "own.py, line 5: it calls exit()" in run.stderr and "Traceback" not in run.stderr


def test_a_folder_is_no_file(tmp_path: Path) -> None:
    (tmp_path / "own.py").mkdir()
    with pytest.raises(PluginError, match="there is no Python file"):
        load_object(f"{tmp_path / 'own.py'}:f")


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("def wanted(): ...", r"is no class that inherits opdengine\.methods\.method\.Method"),
        ("wanted = 5", r"is no class that inherits"),
        ("class wanted: ...", r"is no class that inherits"),
        (OWN + "(self): ...", r"cannot be called with \(config, \*\*method_options\)"),
        (OWN + "(self, config):\n        config.no_such", r"failed: .*own\.py, line 4: AttributeError: .*no_such"),
        (OWN + "(self, config):\n        raise SystemExit(0)", r"failed: .*own\.py, line 4: it calls exit\(\)"),
    ],
)
def test_methods_that_cannot_be_called(
    models: dict[str, str], prompt_file: str, tmp_path: Path, body: str, message: str
) -> None:
    (tmp_path / "own.py").write_text(body)
    with pytest.raises(ValueError, match=message):
        build_method(make_config(models, prompt_file, tmp_path / "o", method=f"{tmp_path / 'own.py'}:wanted"))


CLASS = """
class wanted:
    {decorator}
    def tasks({arguments}):
        {body}
    def reset(self, seed, task): ...
    def step(self, message): ...
    def close(self): ...
"""


@pytest.mark.parametrize(
    ("decorator", "arguments", "body", "message"),
    [
        (
            "@classmethod",
            "cls, split",
            "return {}['x']",
            r"no tasks of split 'train': .*own\.py, line 5: KeyError: 'x'",
        ),
        ("@classmethod", "cls, split", "raise SystemExit", r"own\.py, line 5: it calls exit\(\)"),
        ("@classmethod", "cls", "return []", "TypeError: .*takes 1 positional argument"),
        ("", "self, split", "return []", "TypeError: .*missing 1 required positional argument"),
        ("@classmethod", "cls, split", "return 5", "gave 5, which is no list of mappings with 'id'"),
        ("@classmethod", "cls, split", "return ['a']", r"gave \['a'\], which is no list of mappings"),
        ("@classmethod", "cls, split", "return None", "gave None"),
        ("@classmethod", "cls, split", "return [{}]", "task 1 has no id"),
    ],
)
def test_environments_without_usable_tasks(
    tmp_path: Path, decorator: str, arguments: str, body: str, message: str
) -> None:
    text = CLASS.format(decorator=decorator, arguments=arguments, body=body)
    (tmp_path / "own.py").write_text(text)
    with pytest.raises(ValueError, match=message):
        load_tasks(EnvironmentConfig(name=f"{tmp_path / 'own.py'}:wanted"), "train")


def test_the_command_line_says_it_in_one_line(
    models: dict[str, str], prompt_file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from opdengine.cli import main

    (tmp_path / "own.py").write_text("1 / 0\n")
    arguments = ["--model", models["student"], "--train_data", prompt_file, "--output_dir", str(tmp_path / "o")]
    changes: list[Any] = [["--method", f"{tmp_path / 'own.py'}:f"], ["--method", "opd", "--teachers.0.model"]]
    changes[1] += [models["big"], "--verifier", f"{tmp_path / 'own.py'}:f"]
    for change in changes:
        assert main(["train", *arguments, *change]) == 2
        said = capsys.readouterr().err
        assert "own.py, line 1: ZeroDivisionError: division by zero" in said and said.count("\n") == 1
