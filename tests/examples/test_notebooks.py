"""The notebooks run from top to bottom in a kernel, and what they show is small and of this code."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")
pytest.importorskip("ipykernel")

NOTEBOOKS = Path(__file__).parents[2] / "examples" / "notebooks"
MOST_BYTES = 60_000
"""GitHub shows a page of this size at once."""


def texts(notebook: Any) -> list[str]:
    """What the cells print and return, without the warnings of packages that happen to be installed."""
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    outputs = [output for output in outputs if output.get("name") != "stderr"]
    return [output.get("text") or output["data"]["text/plain"] for output in outputs]


@pytest.mark.parametrize("name", ["first_run", "fused_loss"])
def test_a_notebook_runs(name: str) -> None:
    path = NOTEBOOKS / f"{name}.ipynb"
    stored = nbformat.read(path, as_version=4)
    nbformat.validate(stored)
    assert path.stat().st_size < MOST_BYTES
    run = nbformat.read(path, as_version=4)
    # Nothing of the kernel goes into this folder.
    nbclient.NotebookClient(run, timeout=240, resources={"metadata": {"path": str(NOTEBOOKS)}}).execute()
    assert len(texts(run)) == len(texts(stored)) > 2
    images = [o for cell in run.cells for o in cell.get("outputs", []) if "image/png" in o.get("data", {})]
    assert len(images) == 1
    said = "\n".join(texts(run))
    if name == "fused_loss":
        assert "gradients agree" in said
    else:
        lines = [line for line in said.splitlines() if line.startswith("step ")]
        accuracy = [float(line.split("accuracy ")[1][:4]) for line in lines]
        assert len(accuracy) == 4 and accuracy[-1] > accuracy[0] + 0.3
