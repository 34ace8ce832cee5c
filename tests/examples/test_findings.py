"""What README and docs say of the committed results, computed here in another way."""

from __future__ import annotations

import importlib.util
import json
import math
from collections import defaultdict
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tiny import demo

ROOT = Path(__file__).parents[2]


def module(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "benchmarks" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


findings = module("findings")


def results(name: str) -> dict[str, Any]:
    return json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text())


def means(name: str, of: Any) -> dict[str, float]:
    by_arm = defaultdict(list)
    for run in results(name)["runs"]:
        by_arm[run["arm"]].append(of(run))
    return {arm: sum(values) / len(values) for arm, values in by_arm.items()}


def test_confidences_are_counted_by_round(tmp_path: Path) -> None:
    said = [
        [["a<<CONFIDENCE=5>>", "b<<CONFIDENCE=95>>"], ["b<<CONFIDENCE=95>>", "b<<CONFIDENCE=95>>"]],
        [["a<<CONFIDENCE=5>>", "b<<CONFIDENCE=95>>"]],
        [["a", "b<<CONFIDENCE=95>>"]],
    ]
    for number, rounds in enumerate(said):
        (tmp_path / f"{number:02}").mkdir()
        (tmp_path / f"{number:02}" / "x.json").write_text(json.dumps({"rounds": rounds, "truncated": []}))
    assert demo.stated_confidences(tmp_path) == [{"5, 95": 2, "none, 95": 1}, {"95, 95": 1}]


def test_the_last_confidences_of_the_demo_are_equal_in_every_debate() -> None:
    first, last = results("demo")["confidences"]
    assert last == {"95, 95": 11143} and sum(first.values()) == 11143
    assert set(first) == {"5, 5", "5, 95", "95, 5"} and results("demo")["tau"] == 0.2
    assert findings.shares("95, 95", 0.2) == "0.500 : 0.500"
    share = 1 / (1 + math.exp(-0.9 / 0.2))
    assert findings.shares("95, 5", 0.2) == f"{share:.3f} : {1 - share:.3f}" == "0.989 : 0.011"
    assert findings.shares("95, 5", 1.0) == "0.711 : 0.289"


def test_full_uni_opd_is_the_lowest_of_nine_arms() -> None:
    final = means("uni_opd", lambda run: run["curve"][-1]["eval/accuracy"])
    assert len(final) == 9 and min(final, key=final.__getitem__) == "uni_opd"
    assert findings.place(results("uni_opd")) == "71.9 %, the lowest of 9 arms"
    page = (ROOT / "docs" / "outcomes_and_recovery.md").read_text()
    assert "the full method is the lowest of the nine arms" in page


@pytest.mark.parametrize("split", ["seen", "unseen"])
def test_opad_wins_less_than_one_expert_and_as_much_as_on_recorded_episodes(split: str) -> None:
    won = means("opad", lambda run: 100 * run["after"][f"valid_{split}/success"])
    assert won["opad"] < min(won["opd_open"], won["opd_bring"], won["mt_opd"])
    assert abs(won["opad"] - won["recorded"]) < 2.1
    rows = {line.split(" | ")[0].strip("| "): line for line in findings.opad_less().splitlines()}
    shown = rows["OPD, expert_open"].split(" | ")[1 if split == "seen" else 2]
    assert float(shown.split(" ± ")[0]) == pytest.approx(won["opad"] - won["opd_open"], abs=0.06)


def test_every_method_has_a_sentence_and_what_is_missing_is_named() -> None:
    page = (ROOT / "README.md").read_text()
    assert all(line in page for line in findings.findings().splitlines())
    assert "vision-language" in page and "vision-language" not in findings.findings()
