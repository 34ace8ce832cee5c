"""The command line itself: its help, the settings that it explains, what it prints and what not."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest
import yaml
from engine_helpers import make_config

import opdengine
from opdengine.cli import main
from opdengine.config import method_sections, sections
from opdengine.config.loading import from_mapping
from opdengine.config.section import elsewhere
from opdengine.config.train import TeacherConfig, TrainConfig
from opdengine.environments import ENVIRONMENTS, load_environment
from opdengine.methods import PAPERS
from opdengine.tools.explain import annotated, common, meanings
from opdengine.tools.reference import GROUPS, reference
from opdengine.training.progress import Progress
from opdengine.training.run import train
from tiny.agents.house import HOUSE

SECTIONS = [
    c
    for c in {**vars(sections), **vars(method_sections)}.values()
    if isinstance(c, type) and issubclass(c, sections.Section) and dataclasses.is_dataclass(c)
]


@pytest.mark.parametrize("cls", [TrainConfig, TeacherConfig, *SECTIONS])
def test_every_setting_is_described(cls: type) -> None:
    texts = meanings(cls)
    assert sorted(texts) == sorted(f.name for f in dataclasses.fields(cls))
    assert all(texts.values())


def test_all_settings_are_printed_as_a_configuration_of_the_defaults() -> None:
    settings = yaml.safe_load(annotated())
    by_paper = {setting for paper in PAPERS.values() for setting in paper.defaults}
    assert list(settings) == [f.name for f in dataclasses.fields(TrainConfig) if f.name not in by_paper]
    assert all(f"\n#{setting}: " in annotated() for setting in by_paper if "." not in setting)
    needed = {"model": "m", "output_dir": "o", "train_data": ["d.jsonl"]}
    assert from_mapping(TrainConfig, {**settings, **needed}) == from_mapping(TrainConfig, needed)


def test_the_page_of_all_settings_is_current() -> None:
    written = (Path(__file__).parents[2] / "docs" / "settings.md").read_text("utf-8")
    assert written == reference(), "run python -m opdengine.tools.reference docs/settings.md"
    assert set(GROUPS) <= {f.name for f in dataclasses.fields(TrainConfig)}


def test_what_is_commented_out_is_a_configuration_as_well() -> None:
    for name, cls in (("lora", sections.LoRAConfig), ("teachers", TeacherConfig)):
        lines = annotated([name]).splitlines()
        body = "\n".join(line[1:] for line in lines if line.startswith("#  "))
        assert set(yaml.safe_load(body)) == {f.name for f in dataclasses.fields(cls)}


@pytest.mark.parametrize("name", sorted(ENVIRONMENTS))
def test_the_options_of_an_environment_are_printed_with_their_meanings(name: str) -> None:
    described = load_environment(name).option_class  # type: ignore[attr-defined]
    assert sorted(meanings(described)) == sorted(f.name for f in dataclasses.fields(described))
    shown = yaml.safe_load(annotated([f"environment.{name}"]))["environment"]
    assert shown["name"] == name
    for field in dataclasses.fields(described):
        default = field.default if field.default is not dataclasses.MISSING else field.default_factory()
        assert shown["options"][field.name] == (list(default) if isinstance(default, tuple) else default)


def test_names_of_other_libraries_lead_to_ours() -> None:
    for name, ours in elsewhere(TrainConfig).items():
        assert name not in {f.name for f in dataclasses.fields(TrainConfig)}
        section, _, field = re.split(r"[ ,]", ours)[0].partition(".")
        assert section in {f.name for f in dataclasses.fields(TrainConfig)}
        assert not field or section == "teachers" or field in {f.name for f in dataclasses.fields(sections.LoRAConfig)}


def test_some_settings_are_printed_and_an_unknown_one_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["settings", "tcod", "seed"]) == 0
    assert yaml.safe_load(capsys.readouterr().out) == {"tcod": {"k_start": 1, "eta": 1.0}, "seed": 0}
    assert main(["settings", "debat"]) == 2
    assert "no setting or section 'debat'; did you mean 'debate'?" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["settings", "--debate"])
    assert "unrecognized arguments: --debate" in capsys.readouterr().err


def test_the_help_of_training_names_the_usual_settings(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    shown = capsys.readouterr().out
    assert common() in shown and "max_completion_length         most new tokens of a rollout [512]" in shown


def test_the_version_is_that_of_the_package(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--version"])
    assert ended.value.code == 0 and capsys.readouterr().out == f"opdengine {opdengine.__version__}\n"


def test_without_arguments_the_way_to_give_them_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train"]) == 2
    assert "--config run.yaml" in capsys.readouterr().err


def test_log_lines_show_an_evaluation_at_its_own_step_only(
    models: dict[str, str], prompt_file: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    changes = {"eval_data": [prompt_file], "eval_max_prompts": 2, "eval_steps": 4, "max_steps": 6, "logging_steps": 3}
    with caplog.at_level("INFO"):
        train(make_config(models, prompt_file, tmp_path, **changes))
    lines = [r.getMessage() for r in caplog.records if "step " in r.getMessage() and "/6 " in r.getMessage()]
    shown = {line.split()[2]: "accuracy" in line for line in lines}
    assert shown == {"0/6": True, "3/6": False, "4/6": True, "6/6": True} and "loss" not in lines[0]


def test_log_lines_show_the_success_of_every_split(
    models: dict[str, str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = make_config(models, "", tmp_path, environment={"name": HOUSE}, max_steps=2)
    with caplog.at_level("INFO"), Progress(config, 0) as bar:
        bar.advance(1, {"loss": 2.0, "eval/seen/success": 0.5, "eval/unseen/success": 0.25, "eval/seen/score": 1.0}, {})
    (message,) = caplog.messages
    assert message.startswith("mt_opd step 1/2  ") and "ETA" in message
    assert message.endswith("loss 2  seen/success 0.5  unseen/success 0.25")


def test_bars_of_transformers_stay_out_of_the_output(
    models: dict[str, str], prompt_file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from transformers.utils import logging

    logging.enable_progress_bar()
    arguments = ["--model", models["student"], "--output_dir", str(tmp_path), "--eval_data", prompt_file]
    arguments += ["--train_data", prompt_file, "--max_completion_length", "4", "--eval_max_prompts", "2"]
    assert main(["eval", *arguments]) == 0
    assert "Loading weights" not in capsys.readouterr().err
