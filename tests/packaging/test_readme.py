"""The README shows what the committed result files hold, and its links and commands exist."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()


def test_tables_are_those_of_the_committed_results():
    result = subprocess.run([sys.executable, "benchmarks/report.py", "--check"], cwd=ROOT, check=False)
    assert result.returncode == 0, "README.md is out of date: run python benchmarks/report.py"


def test_every_local_link_exists():
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", README) if "://" not in link]
    assert len(links) > 5
    assert [link for link in links if not (ROOT / link).exists()] == []


def test_every_make_target_exists():
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"make ([a-z][a-z-]+)", README))
    assert {"demo", "test"} <= targets
    assert [t for t in targets if not re.search(rf"^{t}:", makefile, re.MULTILINE)] == []


def test_the_settings_that_the_readme_shows_are_real():
    import dataclasses

    import yaml

    from opdengine.config.train import DebateConfig, TeacherConfig, TrainConfig

    known = {f.name for c in (TrainConfig, DebateConfig, TeacherConfig) for f in dataclasses.fields(c)}
    blocks = re.findall(r"```yaml\n(.*?)```", README, re.DOTALL)
    assert blocks
    for block in blocks:
        settings = yaml.safe_load(block)
        nested = [*settings.get("teachers", []), settings.get("debate", {})]
        shown = set(settings).union(*nested) - {"agentic", "default"}
        assert shown <= known, shown - known


def test_the_sample_configuration_trains_float32_weights_under_bfloat16():
    """Steps of 1e-6 move few of bfloat16 weights, which `dtype: auto` would keep of such a model."""
    import yaml

    blocks = [yaml.safe_load(block) for block in re.findall(r"```yaml\n(.*?)```", README, re.DOTALL)]
    (sample,) = [block for block in blocks if "output_dir" in block]
    assert sample["dtype"] == "float32" and sample["bf16"] is True
    for file in sorted((ROOT / "examples" / "configs").glob("*.yaml")):
        settings = yaml.safe_load(file.read_text())
        if "tiny" not in file.name and settings.get("lora") is None:
            assert (settings["dtype"], settings["bf16"]) == ("float32", True), file
