"""Runs that change: longer, at another place, with other settings, and what keeps the best of them."""

from __future__ import annotations

import dataclasses
import json
import logging
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from engine_helpers import make_config
from safetensors.torch import load_file, save_file

from opdengine.config.loading import from_mapping, load_config, to_mapping
from opdengine.config.section import BY_CONTENT, CHANGEABLE, RESUMABLE, every_setting, mark_of
from opdengine.config.train import ConfigError, TrainConfig
from opdengine.data.prompts import DataError
from opdengine.models.checkpoint import list_checkpoints, step_of
from opdengine.models.fingerprint import contents, differences
from opdengine.training.best import Best
from opdengine.training.changes import read_changes
from opdengine.training.run import in_steps, train
from opdengine.training.run_folder import RunFolder
from opdengine.training.writer import read_metrics

STEPS = 4


@pytest.fixture(scope="module")
def finished(models: dict[str, str], prompt_file: str, tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """A run of four steps, each saved, with a linear schedule."""
    root = tmp_path_factory.mktemp("changes")
    places = {name: shutil.copytree(path, root / "models" / Path(path).name) for name, path in models.items()}
    config = make_config(
        {name: str(place) for name, place in places.items()}, prompt_file, root / "run", method="opd",
        teachers=[{"model": str(places["big"])}], max_steps=STEPS, save_steps=1, lr_scheduler_type="linear",
        warmup_ratio=0.0,
    )  # fmt: skip
    train(config, progress=False)
    return SimpleNamespace(config=config, root=root)


@pytest.fixture
def run(finished: SimpleNamespace, tmp_path: Path) -> SimpleNamespace:
    """A copy of that run and of its models, at another place."""
    root = Path(shutil.copytree(finished.root, tmp_path / "elsewhere"))
    here = json.loads(json.dumps(to_mapping(finished.config)).replace(str(finished.root), str(root)))
    return SimpleNamespace(config=from_mapping(TrainConfig, here), folder=root / "run", root=root)


def resumed(config: TrainConfig, **changes: Any) -> TrainConfig:
    return dataclasses.replace(config, **{"resume_from_checkpoint": "latest", **changes})


def rates(folder: Path) -> list[float]:
    return [row["learning_rate"] for row in read_metrics(folder / "metrics.jsonl") if "learning_rate" in row]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def assert_same_weights(one: Path, other: Path) -> None:
    ours, theirs = weights(one), weights(other)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


# -------------------------------------------------------------------------------------------- longer


def test_a_run_is_extended_as_if_it_had_been_so_long_from_the_beginning(
    run: SimpleNamespace, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, logger="opdengine"):
        train(resumed(run.config, max_steps=8), progress=False)
    assert "max_steps 4 -> 8: the schedule 'linear' of the learning rate is continued" in caplog.text
    peak = run.config.learning_rate
    assert rates(run.folder)[:STEPS] == pytest.approx([peak * (4 - i) / 4 for i in range(4)])
    assert rates(run.folder)[STEPS:] == pytest.approx([peak * (8 - i) / 8 for i in range(4, 8)])
    assert read_changes(run.folder) == [{"step": 4, "changes": {
        **{place: read_changes(run.folder)[0]["changes"][place] for place in ("model", "teachers.0.model")},
        "max_steps": [4, 8],
    }}]  # fmt: skip
    assert yaml.safe_load((run.folder / "config.yaml").read_text())["max_steps"] == 8
    assert [path.name for path in list_checkpoints(run.folder / "checkpoints")][-1] == "step_8"


def test_a_restarted_schedule_stays_so_when_the_extended_run_is_killed_and_resumed(
    run: SimpleNamespace, caplog: pytest.LogCaptureFixture
) -> None:
    longer = resumed(run.config, max_steps=7, changed_schedule="restart")
    with caplog.at_level(logging.WARNING, logger="opdengine"):
        train(longer, progress=False)
    assert "begins anew after step 4, warm-up included, over the 3 steps that are left" in caplog.text
    expected = [run.config.learning_rate * share for share in (1, 2 / 3, 1 / 3)]
    assert rates(run.folder)[STEPS:] == pytest.approx(expected)
    final = shutil.copytree(run.folder / "final", run.root / "whole")
    for after in (6, 4):  # killed after a checkpoint of its own, and before the first one
        shutil.rmtree(run.folder / "final")
        for checkpoint in list_checkpoints(run.folder / "checkpoints")[after:]:
            shutil.rmtree(checkpoint)
        caplog.clear()
        with caplog.at_level(logging.WARNING, logger="opdengine"):
            train(longer, progress=False)
        assert ("begins anew" in caplog.text) == (after == 4)
        assert rates(run.folder)[STEPS:] == pytest.approx(expected)
        assert_same_weights(run.folder / "final", final)
        assert [line["step"] for line in read_changes(run.folder)] == [4]


def test_a_run_cannot_end_before_its_checkpoint(run: SimpleNamespace) -> None:
    with pytest.raises(ConfigError, match=r"max_steps=3 is not possible: the checkpoint .* is of step 4"):
        train(resumed(run.config, max_steps=3), progress=False)


def test_the_last_step_is_saved_so_that_a_run_can_be_extended(
    models: dict[str, str], prompt_file: str, tmp_path: Path
) -> None:
    train(make_config(models, prompt_file, tmp_path, max_steps=3, save_steps=2), progress=False)
    assert [path.name for path in list_checkpoints(tmp_path / "checkpoints")] == ["step_2", "step_3"]


# -------------------------------------------------------------------------------------------- settings


def test_what_changes_what_is_learned_is_changed_on_request_only(
    run: SimpleNamespace, caplog: pytest.LogCaptureFixture
) -> None:
    other = resumed(run.config, max_steps=6, learning_rate=5e-4, divergence="forward_kl")
    listed = r"(?s)divergence: 'reverse_kl' then, 'forward_kl' now.*learning_rate: 0.001 then, 0.0005 now"
    with pytest.raises(ConfigError, match=f"{listed}.*--allow_changes") as refused:
        train(other, progress=False)
    assert "max_steps" not in str(refused.value)
    train(dataclasses.replace(other, allow_changes=True), progress=False)
    assert rates(run.folder)[STEPS:] == pytest.approx([5e-4 * (6 - i) / 6 for i in (4, 5)])
    (line,) = read_changes(run.folder)
    assert line["changes"]["divergence"] == ["reverse_kl", "forward_kl"]
    # What the checkpoint says counts, so that it needs to be said once.
    train(dataclasses.replace(other, max_steps=7), progress=False)


def test_what_a_killed_run_had_otherwise_is_forgotten_with_it(run: SimpleNamespace) -> None:
    """It had no checkpoint: the next one goes on from the settings before, and its files say so."""

    def claim(config: TrainConfig) -> Any:
        """All that a run leaves which is killed before its next checkpoint; the settings in its file."""
        folder = RunFolder(config)
        folder.settle(config)
        folder.claim()
        folder.release()
        return yaml.safe_load((run.folder / "config.yaml").read_text())

    longer = resumed(run.config, max_steps=5)
    train(longer, progress=False)
    told = read_changes(run.folder)
    other = dataclasses.replace(longer, learning_rate=5e-4, max_steps=6, allow_changes=True)
    for _ in range(2):
        assert claim(other)["learning_rate"] == 5e-4
        assert read_changes(run.folder) == [
            *told, {"step": 5, "changes": {"learning_rate": [1e-3, 5e-4], "max_steps": [5, 6]}},
        ]  # fmt: skip
    for _ in range(2):
        left = claim(longer)
        assert (left["learning_rate"], left["max_steps"]) == (1e-3, 5)
        assert read_changes(run.folder) == told
    (run.folder / "config.yaml").write_text("a: [")
    assert claim(longer)["learning_rate"] == 1e-3


@pytest.mark.parametrize(
    ("change", "name"),
    [({"seed": 5}, "seed"), ({"dtype": "bfloat16"}, "dtype"), ({"freeze_head": True}, "freeze_head"),
     ({"lora": {"r": 4}}, "lora"), ({"max_prompt_length": 900}, "max_prompt_length"),
     ({"skip_bad_rows": True}, "skip_bad_rows")],
)  # fmt: skip
def test_what_the_order_of_the_data_depends_on_cannot_be_changed(
    run: SimpleNamespace, change: dict[str, Any], name: str
) -> None:
    with pytest.raises(ConfigError, match=rf"depends on {name}, which cannot be changed"):
        train(resumed(run.config, allow_changes=True, **change), progress=False)


def test_the_prompts_of_a_step_change_on_request_only(run: SimpleNamespace) -> None:
    other = resumed(run.config, max_steps=5, per_device_train_batch_size=2)
    with pytest.raises(ConfigError, match=r"had 4 prompts in a step, this one has 2 .*go on with 2 by --allow_changes"):
        train(other, progress=False)
    train(dataclasses.replace(other, allow_changes=True), progress=False)
    assert read_changes(run.folder)[0]["changes"]["prompts_per_step"] == [4, 2]


def test_every_mark_of_a_setting_is_one_of_the_known() -> None:
    marks = {name: mark_of(info) for name, info in every_setting(TrainConfig)}
    assert marks["learning_rate"] == marks["debate"] == marks["camopd.rho_g"] == CHANGEABLE
    assert marks["teachers.0.model"] == marks["model"] == BY_CONTENT
    assert marks["save_steps"] == marks["debate.cache_dir"] == RESUMABLE
    assert {marks[name] for name in ("seed", "train_data", "method", "camopd.domain", "camopd.n_general")} == {None}


# -------------------------------------------------------------------------------------------- places


def test_a_run_moves_to_another_place_with_its_models_and_data(
    finished: SimpleNamespace, run: SimpleNamespace, tmp_path: Path
) -> None:
    shutil.rmtree(run.folder / "checkpoints" / "step_4")
    (source,) = run.config.train_data
    moved = shutil.copy(str(source), tmp_path / Path(str(source)).name)
    renamed = (run.root / "models" / Path(run.config.teachers[0].model).name).rename(run.root / "models" / "teacher")
    teachers = [dataclasses.replace(run.config.teachers[0], model=str(renamed), name="")]
    train(resumed(run.config, train_data=[str(moved)], teachers=teachers), progress=False)
    assert_same_weights(run.folder / "final", finished.root / "run" / "final")


def change_one_weight(folder: Path) -> None:
    tensors = weights(folder)
    name = sorted(tensors)[-1]
    tensors[name] = tensors[name].clone()
    tensors[name].view(-1)[-1] += 0.01
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def test_another_model_at_the_same_place_is_refused(run: SimpleNamespace) -> None:
    change_one_weight(Path(run.config.teachers[0].model))
    with pytest.raises(ConfigError, match=r"teachers.0.model='.*' is another model .*what differs: model.safetensors"):
        train(resumed(run.config, max_steps=5), progress=False)


def test_other_data_at_another_place_are_refused(run: SimpleNamespace, tmp_path: Path) -> None:
    other = tmp_path / "other.jsonl"
    other.write_text("".join(json.dumps({"prompt": f"Other {i}"}) + "\n" for i in range(8)))
    with pytest.raises(DataError, match="other training data"):
        train(resumed(run.config, max_steps=5, train_data=[str(other)]), progress=False)


def test_contents_are_those_of_the_model_and_not_of_its_place(models: dict[str, str], tmp_path: Path) -> None:
    copy = Path(shutil.copytree(models["small"], tmp_path / "copy"))
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "_name_or_path": "elsewhere"}, indent=7))
    (copy / "README.md").write_text("beside it")
    first, second = contents(models["small"]), contents(str(copy))
    assert first is not None and second is not None and differences(first, second) == []
    (copy / "config.json").write_text(json.dumps({**config, "rope_theta": 7.0}))
    assert differences(first, contents(str(copy)) or {}) == ["config.json"]
    change_one_weight(copy)
    assert differences(first, contents(str(copy)) or {}) == ["config.json", "model.safetensors"]


# -------------------------------------------------------------------------------------------- epochs


def test_epochs_are_counted_in_steps(models: dict[str, str], prompt_file: str, tmp_path: Path) -> None:
    config = make_config(models, prompt_file, tmp_path)
    config = dataclasses.replace(config, num_train_epochs=1.5)
    assert in_steps(config, 10, 1).max_steps == 4  # 15 prompts, 4 a step
    assert in_steps(config, 16, 2).max_steps == 3  # 24 prompts, 8 a step
    assert in_steps(dataclasses.replace(config, num_train_epochs=0.01), 10, 1).max_steps == 1
    assert in_steps(config, 16, 2).num_train_epochs is None


def test_a_run_of_epochs_is_extended_by_epochs_and_by_steps(
    models: dict[str, str], prompt_file: str, tmp_path: Path
) -> None:
    prompts = len(Path(prompt_file).read_text().splitlines())
    data = to_mapping(make_config(models, prompt_file, tmp_path, method="opd", teachers=[{"model": models["big"]}]))
    data |= {"num_train_epochs": 1, "per_device_train_batch_size": prompts, "save_steps": 1}
    del data["max_steps"]
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(data))
    for arguments, steps in (([], 1), (["--num_train_epochs", "2"], 2), (["--max_steps", "3"], 3)):
        again = ["--resume_from_checkpoint", "latest"] if arguments else []
        train(load_config(str(file), [*arguments, *again]), progress=False)
        assert read_metrics(tmp_path / "metrics.jsonl")[-1]["step"] == steps


def test_a_run_has_one_length(models: dict[str, str], prompt_file: str, tmp_path: Path) -> None:
    data = to_mapping(make_config(models, prompt_file, tmp_path)) | {"num_train_epochs": 2, "max_steps": 100}
    with pytest.raises(ConfigError, match="max_steps and num_train_epochs both say how long the run is"):
        from_mapping(TrainConfig, data)


# -------------------------------------------------------------------------------------------- the best


def measured(values: list[float]) -> Any:
    """In place of an evaluation: the values of one metric, one after the other, the first before training."""

    def evaluate(*_: Any, **__: Any) -> Any:
        value = values.pop(0)
        return SimpleNamespace(metrics=lambda: {"eval/accuracy": value}, scores=torch.zeros(0, 1), texts=[])

    return evaluate


def best_config(models: dict[str, str], prompt_file: str, folder: Path, **changes: Any) -> TrainConfig:
    settings = {
        "method": "opd", "teachers": [{"model": models["big"]}], "eval_data": [prompt_file], "eval_max_prompts": 1,
        "eval_steps": 1, "metric_for_best_model": "accuracy", **changes,
    }  # fmt: skip
    return make_config(models, prompt_file, folder, **settings)


def test_the_best_checkpoint_is_kept_and_becomes_the_final_model(
    models: dict[str, str], prompt_file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The model that Python gets back is that one, too."""
    config = best_config(
        models, prompt_file, tmp_path, max_steps=5, save_steps=1, save_total_limit=1, load_best_model_at_end=True
    )
    values = [0.9, 0.1, 0.6, 0.6, 0.2, 0.3]
    monkeypatch.setattr("opdengine.training.run.evaluate", measured(values))
    monkeypatch.setattr("opdengine.training.run._rows_of", lambda *_: [])
    result = train(config, progress=False)
    assert [path.name for path in list_checkpoints(tmp_path / "checkpoints")] == ["step_2", "step_5"]
    assert_same_weights(tmp_path / "final", tmp_path / "checkpoints" / "step_2" / "model")
    last, final = weights(tmp_path / "checkpoints" / "step_5" / "model"), weights(tmp_path / "final")
    assert any(not torch.equal(last[name], final[name]) for name in last)
    assert (tmp_path / "final" / "tokenizer.json").is_file()
    state = result.model.state_dict()
    assert all(torch.equal(state[name], value) for name, value in final.items()) and result.step == 5


def test_the_best_adapter_is_the_one_that_python_gets_back(
    models: dict[str, str], prompt_file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = best_config(
        models, prompt_file, tmp_path, max_steps=2, save_steps=1, load_best_model_at_end=True, lora={"r": 2}
    )
    monkeypatch.setattr("opdengine.training.run.evaluate", measured([0.1, 0.9, 0.2]))
    monkeypatch.setattr("opdengine.training.run._rows_of", lambda *_: [])
    result = train(config, progress=False)
    last, final = (
        load_file(folder / "adapter_model.safetensors")
        for folder in (tmp_path / "checkpoints" / "step_2" / "model", tmp_path / "final")
    )
    assert any(not torch.equal(last[name], final[name]) for name in last)
    state = {name.replace(".default", ""): value for name, value in result.model.state_dict().items()}
    assert all(torch.equal(state[name], value) for name, value in final.items())


def test_a_run_stops_early_and_goes_on_with_more_patience(
    models: dict[str, str], prompt_file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    config = best_config(models, prompt_file, tmp_path, max_steps=9, save_steps=4, early_stopping_patience=2)
    values = [0.9, 0.5, 0.4, 0.5]
    monkeypatch.setattr("opdengine.training.run.evaluate", measured(values))
    monkeypatch.setattr("opdengine.training.run._rows_of", lambda *_: [])
    with caplog.at_level(logging.INFO, logger="opdengine"):
        train(config, progress=False)
    assert "step 3: eval/accuracy has not become better in 2 evaluations (the best is 0.5 at step 1)" in caplog.text
    assert [path.name for path in list_checkpoints(tmp_path / "checkpoints")] == ["step_1", "step_3"]
    train(resumed(config), progress=False)  # ends where it is
    assert [row["step"] for row in read_metrics(tmp_path / "metrics.jsonl")] == [0, 1, 2, 3]
    values += [0.6, 0.1, 0.1, 0.1]
    train(resumed(config, early_stopping_patience=3), progress=False)
    assert [row["step"] for row in read_metrics(tmp_path / "metrics.jsonl")] == list(range(8))
    assert [step_of(path) for path in list_checkpoints(tmp_path / "checkpoints")] == [1, 3, 4, 7]


@pytest.mark.parametrize(
    ("name", "greater", "values", "best", "exhausted"),
    [
        ("eval/accuracy", None, [0.1, 0.3, 0.2], 2, [False, False, False]),
        ("accuracy", None, [0.3, 0.3, 0.3], 1, [False, False, True]),
        ("eval_loss", None, [3.0, 2.0, 2.5], 2, [False, False, False]),
        ("eval/accuracy", False, [0.1, 0.3, 0.2], 1, [False, False, True]),
        ("eval/accuracy", None, [float("nan"), 0.1, float("nan")], 2, [False, False, False]),
        ("eval/accuracy", None, [0.1, 0.15, 0.19], 3, [False, False, True]),  # better, but by too little
        ("eval/pass@4", None, [0.1, 0.3, 0.2], 2, [False, False, False]),
        ("eval/test/success@0.7", None, [0.1, 0.3, 0.2], 2, [False, False, False]),
        *(
            (f"eval/{name}", None, [3.0, 1.0, 2.0], 2, [False, False, False])
            for name in (
                "clipped_ratio",
                "verifier_failed/timed out",
                "verifier_failed/success",
                "test/turns@0.7",
                "test/broken@1",
                "test/invalid_action_rate@0.7",
                "test/repeated_action_rate",
            )
        ),
        *(
            (f"eval/accuracy/{key}", None, [0.1, 0.3, 0.2], 2, [False, False, False])
            for key in ("multi_turns", "exchange_rate", "golden_ratio@2", "word/loss", "verifier_failed")
        ),
    ],
)
def test_which_evaluation_is_the_best(
    name: str, greater: bool | None, values: list[float], best: int, exhausted: list[bool],
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    settings = {
        "model": "m", "train_data": ["d.jsonl"], "output_dir": "o", "eval_data": ["e.jsonl"], "eval_steps": 1,
        "metric_for_best_model": name, "greater_is_better": greater, "early_stopping_patience": 2,
        "early_stopping_threshold": 0.1 if values[-1] == 0.19 else 0.0,
    }  # fmt: skip
    with caplog.at_level(logging.INFO, logger="opdengine"):
        found = Best.from_config(from_mapping(TrainConfig, settings))
    assert found is not None
    said = f"{found.metric}: {'more' if found.greater else 'less'} is better"
    assert caplog.messages == ([said] if greater is None else [])
    ends = []
    for step, value in enumerate(values, start=1):
        found.look(step, {found.metric: value})
        ends.append(found.exhausted)
    assert found.step == best
    assert ends == exhausted


def test_an_evaluation_without_the_metric_is_no_better_and_ends_no_run(caplog: pytest.LogCaptureFixture) -> None:
    """As where every episode of one evaluation broke."""
    found = Best("eval/seen/success", True, patience=2)
    assert found.look(1, {"eval/seen/success": 0.2}) and not found.look(2, {"eval/seen/broken": 4.0})
    assert (found.step, found.waited) == (1, 1) and "step 2: this evaluation gave no eval/seen/success" in caplog.text
    assert found.look(3, {"eval/seen/success": 0.3}) and found.step == 3
    lost = Best("eval/seen/success", True)
    assert not lost.look(1, {"eval/seen/broken": 4.0}) and lost.step is None


def test_a_metric_that_is_not_measured_is_refused_before_the_first_step(
    models: dict[str, str], prompt_file: str, tmp_path: Path
) -> None:
    config = best_config(models, prompt_file, tmp_path, metric_for_best_model="eval/bleu")
    with pytest.raises(ConfigError, match=r"metric_for_best_model='eval/bleu' is not measured .*'eval/accuracy'"):
        train(config, progress=False)
    assert not (tmp_path / "checkpoints").exists()


def test_a_metric_that_is_not_measured_changes_nothing_of_the_run_to_resume(
    models: dict[str, str], prompt_file: str, tmp_path: Path
) -> None:
    config = best_config(models, prompt_file, tmp_path, max_steps=1, save_steps=1)
    train(config, progress=False)
    before = (tmp_path / "config.yaml").read_text()
    other = resumed(config, max_steps=2, metric_for_best_model="eval/bleu")
    with pytest.raises(ConfigError, match=r"'eval/bleu' is not measured .*'eval/accuracy'") as kept:
        train(other, progress=False)
    assert (tmp_path / "config.yaml").read_text() == before and read_changes(tmp_path) == []
    assert train(resumed(config, max_steps=2), progress=False).step == 2
    del kept  # until here, as in a notebook, which keeps what the error can reach


def test_a_run_without_a_usable_evaluation_says_that_the_final_model_is_the_last_steps(
    models: dict[str, str], prompt_file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    config = best_config(models, prompt_file, tmp_path, max_steps=1, save_steps=1, load_best_model_at_end=True)
    monkeypatch.setattr("opdengine.training.run.evaluate", measured([0.5, float("nan")]))
    monkeypatch.setattr("opdengine.training.run._rows_of", lambda *_: [])
    with caplog.at_level(logging.WARNING, logger="opdengine"):
        train(config, progress=False)
    said = "load_best_model_at_end: no evaluation after a step gave a number for eval/accuracy, so final/ is the model"
    assert sum(said in message for message in caplog.messages) == 1
    assert_same_weights(tmp_path / "final", tmp_path / "checkpoints" / "step_1" / "model")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"load_best_model_at_end": True}, "load_best_model_at_end=True is not possible; name the metric"),
        ({"early_stopping_patience": 2}, "early_stopping_patience=2 is not possible; name the metric_for_best_model"),
        ({"metric_for_best_model": "eval/accuracy"}, "nothing is evaluated while the run goes on: set eval_steps"),
        ({"metric_for_best_model": "eval/accuracy", "eval_data": ["e"]}, "set eval_steps"),
    ],
)
def test_the_best_needs_a_metric_and_evaluations(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        from_mapping(TrainConfig, {"model": "m", "train_data": ["d.jsonl"], "output_dir": "o", **settings})
