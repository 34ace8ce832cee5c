"""The API reference names what exists, its example runs, and no picture of the documentation is forgotten."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[2] / "docs"


def test_objects_of_the_reference_exist() -> None:
    named = [n for page in (DOCS / "api").glob("*.md") for n in re.findall(r"^::: ([\w.]+)$", page.read_text(), re.M)]
    assert len(named) > 10
    for name in named:
        module, _, last = name.rpartition(".")
        try:
            importlib.import_module(name)
        except ModuleNotFoundError:
            assert hasattr(importlib.import_module(module), last), name


def test_the_example_of_the_kernels_runs(capsys: pytest.CaptureFixture[str]) -> None:
    (code,) = re.findall(r"^```python\n(.*?)^```", (DOCS / "api" / "kernels.md").read_text(), re.DOTALL | re.MULTILINE)
    exec(code, {})
    assert capsys.readouterr().out == "torch.Size([32, 2])\n"


def test_every_picture_is_shown_on_a_page() -> None:
    pages = [DOCS.parent / "README.md", *DOCS.rglob("*.md")]
    shown = {
        (page.parent / link).resolve() for page in pages for link in re.findall(r"!\[.*?\]\((\S+)\)", page.read_text())
    }
    assert [path.name for path in DOCS.iterdir() if path.suffix in (".png", ".svg") and path not in shown] == []
