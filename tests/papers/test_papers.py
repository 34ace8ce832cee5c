"""Presets and defaults hold the papers' constants, which the tables beside this file name once more.

A constant of a preset or of a method's defaults that is changed fails the test of that preset or method.
"""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

import camopd_table
import gkd_table
import gold_table
import mad_opd_table
import pytest
import rewards_table
import sage_opd_table
import self_distillation_table
import uni_opd_table
from paper_helpers import CONFIGS, Row, at, differences, method_defaults, numbers_of, preset, unlisted

from opdengine.config.loading import from_mapping, to_mapping
from opdengine.config.train import TrainConfig
from opdengine.methods import METHODS, PAPERS, build_method
from opdengine.methods.sage_judge import Judge
from opdengine.tools.balance import BalanceSettings
from opdengine.types import Completion

TABLES: tuple[ModuleType, ...] = (
    mad_opd_table,
    sage_opd_table,
    uni_opd_table,
    camopd_table,
    self_distillation_table,
    rewards_table,
    gkd_table,
    gold_table,
)
PRESETS: dict[str, list[Row]] = {name: rows for table in TABLES for name, rows in table.PRESETS.items()}
DEFAULTS: dict[str, list[Row]] = {name: rows for table in TABLES for name, rows in table.DEFAULTS.items()}
SECTIONS = {name: found for table in TABLES for name, found in table.SECTIONS.items()}


def test_every_preset_has_a_table() -> None:
    assert {file.stem for file in CONFIGS.glob("*.yaml")} == {*PRESETS, "tiny_mad_opd", "real_mad_opd"}
    readme = (CONFIGS / "README.md").read_text()
    assert [name for name in PRESETS if f"({name}.yaml)" not in readme] == []


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_preset(name: str) -> None:
    """It loads, makes its method, holds every constant of its table and sets nothing that the table does not name."""
    config = preset(name)
    assert type(build_method(config)) is METHODS[config.method]
    assert differences(config, PRESETS[name]) == []
    assert unlisted(name, PRESETS[name]) == []
    assert from_mapping(TrainConfig, to_mapping(config)) == config
    assert len((CONFIGS / f"{name}.yaml").read_text().splitlines()) <= 64


@pytest.mark.parametrize("method", sorted(DEFAULTS))
def test_defaults_of(method: str) -> None:
    assert differences(method_defaults(method), DEFAULTS[method]) == []
    assert set(PAPERS[method].defaults) <= {setting for setting, _, _ in DEFAULTS[method]}


@pytest.mark.parametrize("section", sorted(SECTIONS))
def test_the_table_names_every_setting_of_section(section: str) -> None:
    method, open_ = SECTIONS[section]
    listed = {name for rows in DEFAULTS.values() for name, _, _ in rows}
    held = numbers_of(getattr(method_defaults(method), section))
    assert {f"{section}.{name}" for name in held - open_} <= listed


def test_every_method_with_a_paper_has_a_table() -> None:
    assert set(DEFAULTS) == set(PAPERS)
    assert {method: PAPERS[method].arxiv for method in sorted(PAPERS)} == {
        "camopd": "2605.27115",
        "entropy_opd": "2606.19659",
        "eopd": "2603.07079",
        "g_opd": "2602.12125",
        "gkd": "2306.13649",
        "gold": "2402.12030",
        "grpo": "2402.03300",
        "mad_opd": "2605.01347",
        "mt_opd": "2605.01347",
        "mt_seqkd": "2605.01347",
        "opad": "2605.01347",
        "opsd": "2601.18734",
        "relaxed_opd": "2603.11137",
        "sage_opd": "2606.19659",
        "sdft": "2601.19897",
        "sdpo": "2601.20802",
        "selectkd": "2510.24021",
        "tcod": "2606.19659",
        "uni_opd": "2605.03677",
    }


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        ("uni_opd", {"importance": "clip", "low": 0.2, "high": 0.28, "max_gap": 10.0, "exact": False}),
        ("camopd", {"importance": "band", "low": 0.5, "high": 2.0, "max_gap": float("inf"), "exact": False}),
    ],
)
def test_advantages_are_bounded_as_in_the_paper(method: str, expected: dict[str, Any]) -> None:
    """In a run that leaves the bounds open."""
    teachers = [{"model": "g"}, {"model": "d", "key": ["d"]}]
    given = {"model": "m", "output_dir": "o", "train_data": ["d.jsonl"], "teachers": teachers, "method": method}
    config = from_mapping(TrainConfig, {**given, "camopd": {"domain": ["d"]}})
    built: Any = build_method(config)
    assert {name: getattr(built.gradient, name) for name in expected} == expected


def test_balancing_is_the_papers(tmp_path: Path) -> None:
    assert differences(BalanceSettings(tmp_path / "out.jsonl"), uni_opd_table.BALANCING) == []


@pytest.mark.parametrize(("said", "weight"), [("SKIP", 0.0), ("WEAK", 0.5), ("STRONG", 1.0), ("perhaps", 1.0)])
def test_labels_weigh_as_in_equation_7(said: str, weight: float) -> None:
    judge = Judge(method_defaults("sage_opd").sage)
    assert judge.read(Completion(token_ids=None, logprobs=None, stop_reason="stop", text=said)).weight == weight  # type: ignore[arg-type]
    assert (judge.params.max_tokens, judge.params.temperature) == (1028, 0.0)


def test_what_is_to_be_chosen_is_what_the_presets_hold() -> None:
    """What a run is told of the paper's lengths, batch and steps, beside the presets of that method."""
    for name, rows in PRESETS.items():
        config = preset(name)
        if name in sage_opd_table.PRESETS and config.method == "mt_seqkd":
            continue  # of another paper than the method's
        for setting, text in PAPERS[config.method].choices.items() if config.method in PAPERS else ():
            if "unstated" in text or setting in ("train_data", "verifier", "teachers.weight", "environment.stop"):
                continue
            if setting == "prompts_per_step" and not text.isdigit():
                continue
            assert str(at(config, setting)) in text, (name, setting)
        assert rows
