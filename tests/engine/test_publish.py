"""The card of a finished model, and its way to the hub, of which a stand-in runs on this machine."""

from __future__ import annotations

import json
import logging
import os
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from engine_helpers import make_config
from hub_stand_in import READ_TOKEN, TOKEN, Hub, hub_stand_in
from huggingface_hub import constants

from opdengine.config.loading import from_mapping, to_mapping
from opdengine.config.train import ConfigError, TrainConfig
from opdengine.errors import HubError
from opdengine.methods import PAPERS
from opdengine.training.model_card import TITLES, hub_name, shown, write_card
from opdengine.training.publish import open_repository, push
from opdengine.training.run import train

ROOT = Path(__file__).parents[2]


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub in place of the real one, for this process."""
    with hub_stand_in() as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield hub


def config(**changes: Any) -> TrainConfig:
    settings = {"model": "m", "train_data": ["d.jsonl"], "output_dir": "runs/first", "push_to_hub": True, **changes}
    return from_mapping(TrainConfig, settings)


# ---------------------------------------------------------------------------------------- the hub


def test_a_repository_is_made_once_and_named_after_the_run(hub: Hub) -> None:
    assert open_repository(config()) == "alice/first"
    assert open_repository(config()) == "alice/first"
    assert open_repository(config(hub_model_id="alice/other", hub_private_repo=True)) == "alice/other"
    assert {name: r["private"] for name, r in hub.repositories.items()} == {
        "acme/theirs": False, "alice/first": False, "alice/other": True,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("token", "changes", "message"),
    [
        ("", {}, "push_to_hub needs a login to the Hugging Face hub: log in with 'hf auth login', or set HF_TOKEN"),
        ("hf_" + "x" * 34, {}, "the hub does not accept the login"),
        (READ_TOKEN, {}, "alice/first cannot be written with this login: take a token with the role 'write'"),
        (TOKEN, {"hub_model_id": "acme/theirs"}, "acme/theirs cannot be written with this login"),
        (TOKEN, {"hub_model_id": "acme/new"}, "acme/new cannot be written with this login"),
        (TOKEN, {"hub_model_id": "alice/a b"}, "'alice/a b' is no name that the hub could have"),
        (TOKEN, {"hub_model_id": "a/b/c"}, "'a/b/c' is no name that the hub could have"),
        (TOKEN, {"hub_model_id": "alice/old", "hub_private_repo": True}, "alice/old exists and is public"),
    ],
)
def test_what_the_hub_would_refuse_at_the_end_is_refused_at_the_beginning(
    hub: Hub, monkeypatch: pytest.MonkeyPatch, token: str, changes: dict[str, Any], message: str
) -> None:
    hub.add("alice/old")
    monkeypatch.setenv("HF_TOKEN", token)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", "/nowhere/token")
    with pytest.raises(ConfigError) as refused:
        open_repository(config(**changes))
    assert message in str(refused.value) and "\n" not in str(refused.value)
    assert not token or token not in str(refused.value)


def test_a_hub_that_cannot_be_reached_is_said_at_the_beginning(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ConfigError, match="push_to_hub is not possible offline: unset HF_HUB_OFFLINE"):
        open_repository(config())


def test_a_failed_push_says_how_to_repeat_it(hub: Hub, tmp_path: Path) -> None:
    folder = tmp_path / "my run"
    folder.mkdir()
    hub.add("alice/first")
    (folder / "config.json").write_text("{}")
    hub.is_full = True
    with pytest.raises(HubError, match=f"model is whole in '{folder}'; push it again with: hf upload") as failed:
        push(folder, "alice/first", "again")
    command = str(failed.value).partition("push it again with: ")[2]
    assert shlex.split(command) == ["hf", "upload", "alice/first", str(folder)]
    hub.is_full = False
    push(folder, "alice/first", "again")
    assert hub.repositories["alice/first"]["files"] == {"config.json": b"{}"}
    assert hub.repositories["alice/first"]["commits"] == ["again"]


def settings(models: dict[str, str], prompt_file: str, folder: Path, **changes: Any) -> TrainConfig:
    wanted: dict[str, Any] = {"method": "opd", "teachers": [{"model": models["big"]}], "max_steps": 2, **changes}
    return make_config(models, prompt_file, folder, **wanted)


def test_a_run_pushes_its_model_as_a_user_starts_it(models: dict[str, str], prompt_file: str, tmp_path: Path) -> None:
    wanted = settings(models, prompt_file, tmp_path / "distilled", push_to_hub=True)
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(to_mapping(wanted)))
    with hub_stand_in() as hub:
        environment = {
            **os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}", "HF_ENDPOINT": hub.url,
            "HF_TOKEN": TOKEN, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "home"),
        }  # fmt: skip
        done = subprocess.run(
            [sys.executable, "-m", "opdengine", "train", "--config", str(tmp_path / "run.yaml")],
            env=environment, capture_output=True, text=True, timeout=300, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-3000:]
        pushed = hub.repositories["alice/distilled"]
    final = {p.name: p.read_bytes() for p in (tmp_path / "distilled" / "final").iterdir()}
    assert {name: content for name, content in pushed["files"].items() if name != ".gitattributes"} == final
    assert pushed["commits"] == ["opd: step 2"]
    assert TOKEN not in done.stderr
    for file in tmp_path.rglob("*"):
        assert not file.is_file() or TOKEN.encode() not in file.read_bytes(), file


def test_a_run_without_rights_ends_before_its_first_step_and_one_that_cannot_push_has_its_model(
    hub: Hub, models: dict[str, str], prompt_file: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="acme/theirs cannot be written"):
        train(
            settings(models, prompt_file, tmp_path / "a", push_to_hub=True, hub_model_id="acme/theirs"), progress=False
        )
    assert not (tmp_path / "a").exists()
    hub.is_full = True
    with pytest.raises(HubError, match=r"hf upload alice/b "):
        train(settings(models, prompt_file, tmp_path / "b", push_to_hub=True), progress=False)
    assert (tmp_path / "b" / "final" / "model.safetensors").is_file()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            {"push_to_hub": False, "hub_model_id": "a/b"},
            "hub_model_id and hub_private_repo belong to push_to_hub: true",
        ),
        ({"hub_private": True}, "here it is hub_private_repo"),
        ({"hub_token": "hf_secret"}, r"here it is push_to_hub \(log in with 'hf auth login', or set HF_TOKEN\)"),
    ],
)
def test_settings_of_the_hub_that_say_nothing_are_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as refused:
        config(**given)
    assert "hf_secret" not in str(refused.value)


# ---------------------------------------------------------------------------------------- the card


def card(folder: Path) -> tuple[dict[str, Any], str]:
    """What the hub reads of a card, and the rest."""
    _, head, text = (folder / "README.md").read_text().split("---\n", 2)
    return yaml.safe_load(head), text


def test_every_final_model_has_a_card(
    models: dict[str, str], prompt_file: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    wanted = settings(
        models, prompt_file, tmp_path / "card", method="mad_opd", divergence="jsd", temperature=0.9, eval_steps=1,
        teachers=[{"model": models["big"]}, {"model": models["small"]}], debate={"max_tokens": 4, "rounds": 3},
        eval_data=[prompt_file], eval_max_prompts=1, run_name="a | `b`",
    )  # fmt: skip
    with caplog.at_level(logging.INFO, logger="opdengine"):
        train(wanted, progress=False)
    head, text = card(tmp_path / "card" / "final")
    assert head["library_name"] == "transformers" and "mad_opd" in head["tags"] and "base_model" not in head
    assert "# a \\| 'b'" in text
    for said in (
        *("base model | `student`", "`big`, `small`", "2 steps of 4 prompts, 1 rollouts each", "| accuracy | "),
        *("arxiv:2605.01347", "arxiv:2306.13649", "divergence: jsd", "temperature: 0.9", "rounds: 3"),
        *("transformers ", "opdengine "),
    ):
        assert said in text, said
    assert str(tmp_path) not in text and str(Path(models["student"]).parent) not in text
    assert "learning_rate: 0.001" in text and "save_steps" not in text and "output_dir" not in text


def test_an_adapter_has_a_card_that_says_so(models: dict[str, str], prompt_file: str, tmp_path: Path) -> None:
    train(settings(models, prompt_file, tmp_path / "adapter", lora={"r": 2}), progress=False)
    head, text = card(tmp_path / "adapter" / "final")
    assert head["library_name"] == "peft" and "A LoRA adapter (r=2) of `student`" in text and "peft " in text


@pytest.mark.parametrize(
    ("name", "title"),
    [
        ("gsm8k/opd/first", "gsm8k/opd/first"),
        ("a | b", r"a \| b"),
        ("from /home/someone/models/large, twice", "from large, twice"),
        ("one\n\n# two", "one # two"),
        ("./a and ~/b", "./a and b"),
    ],
)
def test_the_title_of_a_card_is_the_name_of_the_run(tmp_path: Path, name: str, title: str) -> None:
    """Only folders of this machine are cut off it, and it stays on one line."""
    write_card(tmp_path, config(run_name=name), tmp_path, 1, 1)
    assert card(tmp_path)[1].strip().splitlines()[0] == f"# {title}"


def test_a_card_tells_values_of_changes_whole(tmp_path: Path) -> None:
    changes = {"run_name": ["a/b/c", "x|y"], "debate.cache_dir": ["/home/someone/cache", None]}
    (tmp_path / "changes.jsonl").write_text(json.dumps({"step": 2, "changes": changes}) + "\n")
    write_card(tmp_path, config(), tmp_path, 1, 3)
    text = card(tmp_path)[1]
    assert "- after step 2: `run_name` a/b/c -> x\\|y\n" in text
    assert "- after step 2: `debate.cache_dir` cache -> None\n" in text


def test_names_of_the_hub_are_told_from_folders(models: dict[str, str], tmp_path: Path) -> None:
    assert hub_name("Qwen/Qwen3-4B") == "Qwen/Qwen3-4B"
    assert hub_name(models["big"]) is None and hub_name("/nowhere/model") is None and hub_name("./a/b") is None
    (tmp_path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "Qwen/Qwen3-4B"}))
    assert hub_name(str(tmp_path)) == "Qwen/Qwen3-4B"
    assert shown("/home/someone/models/student") == "student" and shown("Qwen/Qwen3-4B") == "Qwen/Qwen3-4B"


def test_titles_are_those_of_the_citations() -> None:
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())["references"]
    titles = {reference["identifiers"][0]["value"].removeprefix("arXiv:"): reference["title"] for reference in cited}
    assert all(titles[number].startswith(title) for number, title in TITLES.items())
    assert titles.keys() == TITLES.keys()
    assert {paper.arxiv for paper in PAPERS.values()} <= TITLES.keys()
