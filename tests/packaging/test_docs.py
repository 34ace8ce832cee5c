"""The pages: every link and anchor leads somewhere, every page is in the site, every setting that is shown exists."""

from __future__ import annotations

import dataclasses
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from opdengine.config.train import TeacherConfig, TrainConfig

ROOT = Path(__file__).parents[2]
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
    *sorted((ROOT / "examples").rglob("*.md")),
]
FREE = {"options", "method_options", "chat_template_kwargs", "divergence", "verifier", "prompts"}
"""Settings whose keys are the user's own."""


class _Loader(yaml.SafeLoader):
    """Passes over tags of other programs."""


_Loader.add_multi_constructor("!", lambda loader, suffix, node: None)


def headings(page: Path) -> set[str]:
    """Anchors of a page, as GitHub and the site make them."""
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    titles = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def links(page: Path) -> Iterator[str]:
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if "://" not in link and not link.startswith("mailto:"):
            yield link


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_leads_to_a_file_and_a_heading(page: Path) -> None:
    for link in links(page):
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{link} leads nowhere"
        assert not anchor or anchor in headings(target), f"{link}: there is no such heading"


def test_every_page_is_in_the_navigation_of_the_site() -> None:
    def named(entry: Any) -> Iterator[str]:
        if isinstance(entry, str):
            yield entry
        else:
            for inner in entry.values() if isinstance(entry, dict) else entry:
                yield from named(inner)

    site = yaml.load((ROOT / "mkdocs.yml").read_text(), _Loader)
    pages = list(named(site["nav"]))
    there = {str(page.relative_to(ROOT / "docs")) for page in (ROOT / "docs").rglob("*.md")}
    assert sorted(pages) == sorted(there)


def unknown(data: Any, cls: type, place: str = "") -> Iterator[str]:
    """Settings in a mapping that a section does not have."""
    sections = {f.name: f.default_factory for f in dataclasses.fields(cls)}
    for name, value in data.items():
        inner = sections.get(name)
        if name not in sections:
            yield place + name
        elif name == "teachers":
            for teacher in value:
                yield from unknown(teacher, TeacherConfig, "teachers.")
        elif isinstance(value, dict) and name not in FREE and dataclasses.is_dataclass(inner):
            yield from unknown(value, inner, f"{name}.")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_settings_that_are_shown_exist(page: Path) -> None:
    for block in re.findall(r"```yaml\n(.*?)```", page.read_text(), re.DOTALL):
        data = yaml.safe_load(block)
        assert isinstance(data, dict), block
        assert not list(unknown(data, TrainConfig)), block


def test_the_workflow_runs_what_ci_runs() -> None:
    lines = re.findall(r"^make (\S+)$", (ROOT / ".ci" / "run").read_text(), re.MULTILINE)
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())
    targets = workflow["jobs"]["test"]["strategy"]["matrix"]["target"]
    assert lines and set(lines) <= set(targets)


@pytest.mark.parametrize("page", ["README.md", "docs/index.md"])
def test_the_oldest_versions_that_are_named_are_those_of_pyproject(page: str) -> None:
    command = [sys.executable, str(ROOT / "requirements" / "oldest.py")]
    oldest = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    assert len(oldest) == 3
    for line in oldest:
        name, version = line.split("==")
        assert re.search(rf"\b{name} {re.escape(version)}\b", (ROOT / page).read_text(), re.IGNORECASE), line
