"""The configuration that tries an installation out: its data are the task's, and its three commands run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from opdengine.cli import main
from opdengine.training.writer import read_metrics
from tiny import task

ROOT = Path(__file__).parents[2]
CONFIG = "examples/configs/tiny_mad_opd.yaml"


@pytest.mark.parametrize(("split", "count"), [("train", 64), ("dev", 20)])
def test_the_data_are_those_of_the_task(split: str, count: int) -> None:
    lines = (ROOT / "examples" / "tiny" / f"{split}.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [r for s in task.SKILLS for r in task.prompts(split, s, count)]


def test_the_debate_has_the_words_that_the_teachers_know() -> None:
    assert yaml.safe_load((ROOT / CONFIG).read_text())["debate"]["prompts"] == task.DEBATE_PROMPTS


def test_its_commands_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(ROOT)
    settings = ["--config", CONFIG, "--output_dir", str(tmp_path / "run"), "--eval_max_prompts", "4"]
    assert main(["train", *settings, "--max_steps", "1", "--per_device_train_batch_size", "2"]) == 0
    assert [line["step"] for line in read_metrics(tmp_path / "run" / "metrics.jsonl")] == [0, 1]
    assert main(["eval", *settings, "--model", str(tmp_path / "run" / "final")]) == 0
    assert '"eval/accuracy"' in capsys.readouterr().out
    assert main(["debate", *settings, "--prompt", "M101100010001C(7+1)*0"]) == 0
    said = capsys.readouterr().out
    assert "round 2, teacher_compile" in said and "5421|71+0*" in said
