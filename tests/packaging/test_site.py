"""The documentation: links and anchors lead somewhere, the table of contents is whole, and its examples run."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
WRITTEN = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *PAGES]
FENCE = re.compile(r"^(```|~~~).*?^\1[ \t]*$", re.DOTALL | re.MULTILINE)


def prose(page: Path) -> str:
    """A page without its code."""
    return re.sub(r"`[^`\n]*`", "`code`", FENCE.sub("", page.read_text()))


def links(page: Path) -> list[str]:
    """What the links and pictures of a page lead to, other than web addresses."""
    found = re.findall(r"\]\(([^)\s]+)\)", prose(page)) + re.findall(r'(?:src|href)="([^"]+)"', prose(page))
    return [link for link in found if not re.match(r"[a-z]+:", link)]


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    titles = re.findall(r"^#+ (.+)$", FENCE.sub("", page.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.strip().lower()).replace(" ", "-") for title in titles}


def contents() -> list[str]:
    """The files that the table of contents names."""

    def files(entry: Any) -> Iterator[str]:
        if isinstance(entry, str):
            yield entry
        else:
            for inner in entry.values() if isinstance(entry, dict) else entry:
                yield from files(inner)

    return list(files(yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"]))


@pytest.mark.parametrize("page", WRITTEN, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_and_anchors_lead_somewhere(page: Path) -> None:
    dead = []
    for link in links(page):
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            dead.append(link)
    assert not dead


def test_the_table_of_contents_names_every_page_once() -> None:
    assert sorted(contents()) == [str(page.relative_to(DOCS)) for page in PAGES]


def test_every_picture_is_shown_somewhere() -> None:
    shown = {(page.parent / link).resolve() for page in WRITTEN for link in links(page)}
    pictures = [path for path in DOCS.iterdir() if path.suffix in (".png", ".svg")]
    assert [path.name for path in pictures if path not in shown] == []


def test_objects_of_the_reference_exist() -> None:
    import importlib

    for page in sorted((DOCS / "api").glob("*.md")):
        for name in re.findall(r"^::: ([\w.]+)$", page.read_text(), re.MULTILINE):
            module, _, last = name.rpartition(".")
            try:
                importlib.import_module(name)
            except ModuleNotFoundError:
                assert hasattr(importlib.import_module(module), last), name


def test_continuous_integration_runs_what_the_script_runs() -> None:
    script = re.findall(r"^make ([\w-]+)$", (ROOT / ".ci" / "run").read_text(), re.MULTILINE)
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())
    assert workflow["jobs"]["checks"]["strategy"]["matrix"]["target"] == script == ["test", "test-vllm", "test-envs"]


def code_of(page: str) -> list[str]:
    """The Python examples of a page."""
    return re.findall(r"^```python\n(.*?)^```", (DOCS / page).read_text(), re.DOTALL | re.MULTILINE)


def run(code: str, folder: Path) -> str:
    paths = [str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    result = subprocess.run(
        [sys.executable, "-c", code],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_the_verifier_of_the_page_grades_as_the_page_says(tmp_path: Path) -> None:
    verifier, trial = code_of("extend/verifier.md")
    (tmp_path / "close.py").write_text(verifier)
    assert run(trial, tmp_path) == "[1.0, 0.5, 0.0]\n"
    assert "# [1.0, 0.5, 0.0]" in trial


def test_the_teacher_of_the_page_judges(tmp_path: Path) -> None:
    (code,) = code_of("extend/teacher.md")
    assert "runs/sharpened" in code
    lines = run(code.replace("runs/sharpened", str(tmp_path / "run")), ROOT).splitlines()
    steps = [line for line in lines if line.startswith("{'teacher_kl/")]
    assert len(steps) == 2 and all("teacher_convert" in line and "teacher_compile" in line for line in steps)


def test_the_environment_of_the_page_trains(models: dict[str, str], tmp_path: Path) -> None:
    from opdengine.config.loading import from_mapping
    from opdengine.config.train import TrainConfig
    from opdengine.training.run import train

    page = (DOCS / "extend" / "environment.md").read_text()
    (tmp_path / "guess.py").write_text(code_of("extend/environment.md")[0])
    (shown,) = re.findall(r"```yaml\n(.*?)```", page, re.DOTALL)
    settings = yaml.safe_load(shown)
    settings["environment"] |= {"name": f"{tmp_path / 'guess.py'}:Guess", "num_environments": 2}
    config = from_mapping(
        TrainConfig,
        {
            **settings,
            "model": models["student"],
            "teachers": [{"model": models["big"]}],
            "output_dir": str(tmp_path / "run"),
            "per_device_train_batch_size": 2,
            "max_completion_length": 4,
            "max_steps": 1,
            "learning_rate": 1e-3,
        },
    )
    assert train(config, progress=False).metrics["episodes/begun"] == 2


def test_the_example_of_the_kernels_runs(tmp_path: Path) -> None:
    (code,) = code_of("api/kernels.md")
    assert run(code, tmp_path) == "torch.Size([32, 2])\n"
