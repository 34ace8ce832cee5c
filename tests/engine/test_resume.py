"""What a run is continued from: the newest checkpoint that is whole, with the rows that belong to it."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from engine_helpers import make_config
from safetensors.torch import load_file

from opdengine.config.train import TrainConfig
from opdengine.models import manifest
from opdengine.models.checkpoint import CheckpointError, find_checkpoint, list_checkpoints
from opdengine.models.manifest import find_damage
from opdengine.training.run import train
from opdengine.training.step import Engine
from opdengine.training.writer import MetricsWriter, read_metrics

STEPS = 6


class Died(BaseException):
    """Stands for SIGKILL."""


@pytest.fixture(scope="module")
def finished(models: dict[str, str], prompt_file: str, tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """A run of six steps with every second one saved."""
    folder = tmp_path_factory.mktemp("resume") / "run"
    config = make_config(
        models, prompt_file, folder, method="opd", teachers=[{"model": models["big"]}], log_completions=True,
        max_steps=STEPS, save_steps=2, eval_data=[prompt_file], eval_max_prompts=1, eval_steps=3,
        report_to=["tensorboard"],
    )  # fmt: skip
    train(config, progress=False)
    return SimpleNamespace(config=config, folder=folder)


@pytest.fixture
def run(finished: SimpleNamespace, tmp_path: Path) -> SimpleNamespace:
    """A copy of that run."""
    folder = Path(shutil.copytree(finished.folder, tmp_path / "run"))
    stored = (folder / "config.yaml").read_text()
    (folder / "config.yaml").write_text(stored.replace(str(finished.folder), str(folder)))
    return SimpleNamespace(config=dataclasses.replace(finished.config, output_dir=str(folder)), folder=folder)


def resumed(config: TrainConfig, place: Path | str = "latest") -> TrainConfig:
    return dataclasses.replace(config, resume_from_checkpoint=str(place))


def steps(folder: Path) -> list[int]:
    return [row["step"] for row in read_metrics(folder / "metrics.jsonl")]


def saved(folder: Path) -> list[str]:
    return [path.name for path in list_checkpoints(folder / "checkpoints")]


def logged(folder: Path, name: str) -> list[str]:
    return sorted(path.name for path in (folder / name).glob("step_*.jsonl"))


def assert_same_weights(one: Path, other: Path) -> None:
    ours, theirs = (load_file(folder / "final" / "model.safetensors") for folder in (one, other))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def flip(file: Path, place: float = 0.9) -> None:
    """Turn one bit of a file."""
    content = bytearray(file.read_bytes())
    content[int(len(content) * place)] ^= 1
    file.write_bytes(content)


def cut(file: Path, share: float = 0.5) -> None:
    file.write_bytes(file.read_bytes()[: int(file.stat().st_size * share)])


# -------------------------------------------------------------------------------------- damage

DAMAGES: list[tuple[str, Callable[[Path], object], str]] = [
    ("a bit of the weights", lambda c: flip(c / "model" / "model.safetensors"), "model/model.safetensors is not what"),
    ("a bit of the header", lambda c: flip(c / "model" / "model.safetensors", 0.001), "model/model.safetensors is not"),
    ("a bit of the moments", lambda c: flip(c / "optimizer.safetensors"), "optimizer.safetensors is not what was"),
    ("a bit of the tokenizer", lambda c: flip(c / "model" / "tokenizer.json"), "model/tokenizer.json is not what was"),
    ("a bit of the random states", lambda c: flip(c / "rng.safetensors"), "rng.safetensors is not what was written"),
    ("a digit of the state", lambda c: flip(c / "state.json", 0.02), "state.json is not"),
    ("a bit of the manifest", lambda c: flip(c / "manifest.json", 0.5), "manifest.json is not"),
    ("moments cut off", lambda c: cut(c / "optimizer.safetensors"), "optimizer.safetensors is not what was written"),
    ("weights cut off", lambda c: cut(c / "model" / "model.safetensors", 0), "model/model.safetensors is not what"),
    ("state cut off", lambda c: cut(c / "state.json"), "state.json is not JSON"),
    ("manifest cut off", lambda c: cut(c / "manifest.json"), "manifest.json is not JSON"),
    ("state is a list", lambda c: (c / "state.json").write_text("[]"), "state.json is not a JSON object"),
    ("moments are missing", lambda c: (c / "optimizer.safetensors").unlink(), "optimizer.safetensors is missing"),
    ("weights are missing", lambda c: (c / "model" / "model.safetensors").unlink(), "model.safetensors is missing"),
    ("state is missing", lambda c: (c / "state.json").unlink(), "state.json is missing"),
    ("manifest is missing", lambda c: (c / "manifest.json").unlink(), "manifest.json is missing"),
    ("model is missing", lambda c: shutil.rmtree(c / "model"), "model/.* and . more is missing"),
    (
        "moments of another step",
        lambda c: shutil.copy(c.parent / "step_4" / "optimizer.safetensors", c),
        "optimizer.safetensors is not what was written",
    ),
    (
        "a model of another step",
        lambda c: shutil.copytree(c.parent / "step_4" / "model", c / "model", dirs_exist_ok=True),
        "model/model.safetensors is not what was written",
    ),
    (
        "all of another step",
        lambda c: shutil.copytree(c.parent / "step_4", c, dirs_exist_ok=True),
        "it is the checkpoint of step 4",
    ),
    (
        "one more file",
        lambda c: (c / "model" / "adapter_config.json").write_text("{}"),
        "adapter_config.json was added",
    ),
]


@pytest.mark.parametrize(("damage", "message"), [d[1:] for d in DAMAGES], ids=[d[0] for d in DAMAGES])
def test_damage_is_named_with_what_is_whole_and_the_run_can_go_on_from_there(
    run: SimpleNamespace, damage: Callable[[Path], object], message: str, caplog: pytest.LogCaptureFixture
) -> None:
    newest = run.folder / "checkpoints" / "step_6"
    damage(newest)
    with pytest.raises(
        CheckpointError, match=rf"step_6' is damaged: .*{message}.*step_4 is whole: resume with --resume"
    ):
        find_checkpoint(run.folder, str(newest))
    with caplog.at_level(logging.WARNING, logger="opdengine"):
        assert find_checkpoint(run.folder, "latest") == run.folder / "checkpoints" / "step_4"
    assert "step_6' is damaged" in caplog.text and "whole is" in caplog.text


def test_a_run_goes_on_from_the_newest_whole_checkpoint_to_the_same_end(
    finished: SimpleNamespace, run: SimpleNamespace
) -> None:
    checkpoints = run.folder / "checkpoints"
    flip(checkpoints / "step_6" / "model" / "model.safetensors")
    cut(checkpoints / "step_4" / "optimizer.safetensors")
    train(resumed(run.config), progress=False)
    assert_same_weights(finished.folder, run.folder)
    assert steps(run.folder) == list(range(STEPS + 1))
    assert saved(run.folder) == ["step_2", "step_4", "step_6"]
    assert all(find_damage(checkpoint) is None for checkpoint in list_checkpoints(checkpoints))
    kept = run.folder / "abandoned" / "after_step_2" / "checkpoints"
    assert "not what was written" in (find_damage(kept / "step_6") or "")


def test_where_nothing_is_whole_the_run_is_refused(run: SimpleNamespace) -> None:
    for number in (2, 4, 6):
        flip(run.folder / "checkpoints" / f"step_{number}" / "model" / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"step_6' is damaged.*step_2' is damaged.*None is whole: restore one"):
        train(resumed(run.config), progress=False)
    with pytest.raises(CheckpointError, match="no older checkpoint beside it is whole"):
        train(resumed(run.config, run.folder / "checkpoints" / "step_4"), progress=False)
    assert steps(run.folder) == list(range(STEPS + 1))


def test_what_looks_like_a_checkpoint_is_none(run: SimpleNamespace) -> None:
    checkpoints = run.folder / "checkpoints"
    (checkpoints / "step_6" / "model" / ".DS_Store").write_text("what a file manager leaves")
    for name in ("step_8.bak", "step_", "step_08", "step_-8", "step_8 ", "step_\u0668", "xstep_8", "copy of step_8"):
        shutil.copytree(checkpoints / "step_6", checkpoints / name)
    (checkpoints / "step_9").write_text("a file")
    (checkpoints / ".step_7.1.partial").mkdir()
    assert saved(run.folder) == ["step_2", "step_4", "step_6"]
    assert find_checkpoint(run.folder, "latest") == checkpoints / "step_6"
    assert find_checkpoint(run.folder, str(checkpoints / "step_8.bak")) == checkpoints / "step_8.bak"  # on request
    for path, message in ((checkpoints / "step_9", "no such folder"), (run.folder / "final", "has no state.json")):
        with pytest.raises(CheckpointError, match=f"is not a checkpoint: .*{message}"):
            find_checkpoint(run.folder, str(path))


def test_a_checkpoint_of_an_earlier_version_is_taken_with_a_warning(
    run: SimpleNamespace, caplog: pytest.LogCaptureFixture
) -> None:
    checkpoint = run.folder / "checkpoints" / "step_6"
    state = json.loads((checkpoint / "state.json").read_text())
    del state["manifest"]
    (checkpoint / "state.json").write_text(json.dumps(state))
    (checkpoint / "manifest.json").unlink()
    assert find_checkpoint(run.folder, "latest") == checkpoint
    assert "step_6 has no manifest.json, as an earlier version wrote it" in caplog.text
    cut(checkpoint / "optimizer.safetensors")  # what can be seen without hashes is
    with pytest.raises(CheckpointError, match=r"optimizer.safetensors' is damaged or cut off.*step_4 is whole"):
        find_checkpoint(run.folder, str(checkpoint))


def test_large_files_are_hashed_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(manifest, "PART_BYTES", 10)
    content = bytes(range(25))
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "large").write_bytes(content)
    (tmp_path / "small").write_bytes(b"12")
    (tmp_path / "empty").write_bytes(b"")
    (tmp_path / "state.json").write_text(json.dumps({"step": 3, "manifest": True}))
    manifest.seal(tmp_path, 3)
    files = json.loads((tmp_path / "manifest.json").read_text())["files"]
    parts = [hashlib.sha256(content[i : i + 10]).hexdigest() for i in (0, 10, 20)]
    assert files["model/large"] == parts and files["small"] == [hashlib.sha256(b"12").hexdigest()]
    assert files["empty"] == [hashlib.sha256(b"").hexdigest()]
    monkeypatch.undo()  # the manifest says how long its parts are
    assert find_damage(tmp_path) is None
    (tmp_path / "model" / "large").write_bytes(content + b"x")
    assert find_damage(tmp_path) == "model/large is not what was written"
    (tmp_path / "model" / "large").write_bytes(content[:20])
    assert find_damage(tmp_path) == "model/large is not what was written"
    (tmp_path / "model" / "large").write_bytes(content)
    (tmp_path / "empty").write_bytes(b"x")
    assert find_damage(tmp_path) == "empty is not what was written"


# --------------------------------------------------------------------------------------- rows


def dies_in(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    plain = Engine.update

    def update(self: Engine, *args: Any, **kwargs: Any) -> Any:
        if self.version + 1 == step:
            raise Died
        return plain(self, *args, **kwargs)

    monkeypatch.setattr(Engine, "update", update)


def test_a_run_that_went_back_and_died_has_one_line_only(
    finished: SimpleNamespace, run: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """From step 2 to the middle of step 4, then to the end: nothing of the line given up is mixed in."""
    with monkeypatch.context() as patch:
        dies_in(patch, 4)
        with pytest.raises(Died):
            train(resumed(run.config, run.folder / "checkpoints" / "step_2"), progress=False)
    assert "continuing from step 2: the checkpoints up to step 6" in caplog.text
    assert saved(run.folder) == ["step_2"] and steps(run.folder) == [0, 1, 2, 3]
    assert logged(run.folder, "rollouts") == ["step_1.jsonl", "step_2.jsonl", "step_3.jsonl"]
    assert logged(run.folder, "evaluations") == ["step_0.jsonl", "step_3.jsonl"]
    assert not (run.folder / "final").exists()
    old = run.folder / "abandoned" / "after_step_2"
    assert steps(old) == list(range(STEPS + 1)) and saved(old) == ["step_4", "step_6"]
    assert logged(old, "rollouts") == [f"step_{n}.jsonl" for n in (3, 4, 5, 6)]
    assert (old / "final" / "model.safetensors").is_file()
    train(resumed(run.config), progress=False)
    assert_same_weights(finished.folder, run.folder)
    assert steps(run.folder) == list(range(STEPS + 1)) and saved(run.folder) == ["step_2", "step_4", "step_6"]
    assert [p.name for p in (run.folder / "abandoned").iterdir()] == ["after_step_2"]
    train(resumed(run.config, run.folder / "checkpoints" / "step_2"), progress=False)
    assert sorted(p.name for p in (run.folder / "abandoned").iterdir()) == ["after_step_2", "after_step_2.2"]


def test_what_an_interrupted_run_wrote_after_its_checkpoint_is_not_taken_for_the_next_one(
    run: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.rmtree(run.folder / "checkpoints" / "step_6")
    shutil.rmtree(run.folder / "final")
    (run.folder / "rollouts" / "notes.txt").write_text("mine")
    (run.folder / "rollouts" / "step_best.jsonl").write_text("mine")
    dies_in(monkeypatch, 5)
    with pytest.raises(Died):
        train(resumed(run.config), progress=False)
    assert steps(run.folder) == [0, 1, 2, 3, 4] and not (run.folder / "abandoned").exists()
    assert logged(run.folder, "rollouts") == [*(f"step_{n}.jsonl" for n in (1, 2, 3, 4)), "step_best.jsonl"]
    assert logged(run.folder, "evaluations") == ["step_0.jsonl", "step_3.jsonl"]


def test_a_garbage_line_costs_itself_alone(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = [
        b'{"step": 0, "loss": 1.0}', b'{"step": 1, "lo', b"\xff\x00\xfe", b"[1]", b"null", b'{"loss": 1}',
        b'{"step": "2"}', b"[" * 100_000, b"", b'{"step": 2, "loss": NaN}', b'{"step": 3}', b'{"step": 4',
    ]  # fmt: skip
    (tmp_path / "metrics.jsonl").write_bytes(b"\n".join(rows))
    assert [row["step"] for row in read_metrics(tmp_path / "metrics.jsonl")] == [0, 2, 3]
    assert "line(s) 2, 3, 4, 5, 6, 7, 8, 12 are no metrics and are left out" in caplog.text
    writer = MetricsWriter(tmp_path, last_step=2)
    writer.write(3, {"loss": 0.5})
    writer.close()
    assert [row["step"] for row in read_metrics(tmp_path / "metrics.jsonl")] == [0, 2, 3]
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 3


def test_tensorboard_shows_every_step_once(run: SimpleNamespace) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train(resumed(run.config, run.folder / "checkpoints" / "step_2"), progress=False)
    shown = EventAccumulator(str(run.folder / "tensorboard"))
    shown.Reload()
    assert [event.step for event in shown.Scalars("loss")] == list(range(1, STEPS + 1))
    assert [event.step for event in shown.Scalars("eval/accuracy")] == [0, 3, 6]
