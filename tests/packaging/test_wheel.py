"""The built wheel works in an environment that holds nothing else of this project."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Built from a copy, so that nothing is written into the checkout."""
    source = tmp_path_factory.mktemp("source")
    names = ["pyproject.toml", "README.md", "LICENSE", "opdengine", "kernels", "tests", "benchmarks", "examples"]
    for name in names:
        subprocess.run(["cp", "-r", str(ROOT / name), str(source)], check=True)
    out = tmp_path_factory.mktemp("wheel")
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "-w", str(out), str(source)], check=True
    )
    (built,) = out.glob("opdengine-*.whl")
    return built


def test_wheel_holds_only_the_two_packages(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    top = {name.split("/")[0] for name in names}
    assert {t for t in top if not t.endswith(".dist-info")} == {"opdengine", "opd_kernels"}
    page = [f"opdengine/tools/report/{name}" for name in ("page.html", "views.js", "vendor/LICENSE.uPlot")]
    for file in ("opdengine/py.typed", "opd_kernels/py.typed", "opdengine/methods/mad_opd.py", *page):
        assert file in names
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_wheel_imports_light_and_works(wheel, tmp_path):
    """torch comes from this environment; the project itself only from the wheel."""
    venv.create(tmp_path / "env", with_pip=True)
    python = tmp_path / "env" / "bin" / "python"
    # A checkout on PYTHONPATH would count as installed already.
    alone = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    subprocess.run([python, "-m", "pip", "install", "--quiet", "--no-deps", str(wheel)], check=True, env=alone)
    # A folder on PYTHONPATH does not run its .pth files, so an editable install stays invisible.
    code = """
import sys
import opd_kernels, opdengine
assert "site-packages" in opd_kernels.__file__ and "/env/" in opd_kernels.__file__, opd_kernels.__file__
assert "/env/" in opdengine.__file__, opdengine.__file__
heavy = {"transformers", "vllm", "datasets", "peft"} & set(sys.modules)
assert not heavy, heavy
import torch
h, w = torch.randn(5, 8, requires_grad=True), torch.randn(11, 8, requires_grad=True)
teachers = [opd_kernels.TeacherHead(torch.randn(5, d), torch.randn(11, d)) for d in (4, 6)]
out = opd_kernels.linear_divergence(h, w, teachers, divergence="jsd")
out.loss.backward()
assert torch.isfinite(out.loss) and w.grad.abs().sum() > 0
print("works")
"""
    site = sysconfig.get_paths()["purelib"]
    environment = {**os.environ, "PYTHONPATH": site}
    result = subprocess.run(
        [python, "-c", code], env=environment, cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert result.stdout.strip() == "works", result.stderr


def test_kernels_folder_is_no_package():
    assert not (ROOT / "kernels" / "__init__.py").exists()
