"""Which runs may be continued in which folder."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import yaml

from opdengine.config.loading import from_mapping, to_mapping
from opdengine.config.train import ConfigError, TrainConfig
from opdengine.training.run_folder import RunFolder


@pytest.mark.parametrize("jsd_beta", [0.5, 0.3])
def test_a_setting_that_is_newer_than_the_run_has_its_default(tmp_path: Path, jsd_beta: float) -> None:
    checkpoint = tmp_path / "checkpoints" / "step_1"
    checkpoint.mkdir(parents=True)
    (checkpoint / "state.json").write_text(json.dumps({"step": 1}))
    settings = {"model": "m", "train_data": ["d.jsonl"], "output_dir": str(tmp_path)}
    stored = to_mapping(from_mapping(TrainConfig, settings))
    del stored["jsd_beta"]
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(stored))
    now = from_mapping(TrainConfig, {**settings, "jsd_beta": jsd_beta, "resume_from_checkpoint": "latest"})
    if jsd_beta == 0.5:
        assert RunFolder(now).state == {"step": 1}
    else:
        with pytest.raises(ConfigError, match=r"jsd_beta: 0.5 then, 0.3 now"):
            RunFolder(now)


def folder(path: Path, **changes: object) -> RunFolder:
    settings = {"model": "m", "train_data": ["d.jsonl"], "output_dir": str(path), **changes}
    return RunFolder(from_mapping(TrainConfig, settings))


def test_two_runs_cannot_write_to_one_folder_at_the_same_time(tmp_path: Path) -> None:
    first, second = folder(tmp_path / "run"), folder(tmp_path / "run")
    first.claim()
    with pytest.raises(ConfigError, match="is being written by another process"):
        second.claim()
    for again in ({}, {"resume_from_checkpoint": "latest"}):
        with pytest.raises(ConfigError, match="is being written by another process"):
            folder(tmp_path / "run", **again)
    first.release()
    second.claim()


def test_a_run_that_ended_while_another_one_was_loading_is_kept(tmp_path: Path) -> None:
    first, second = folder(tmp_path), folder(tmp_path)
    first.claim()
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n')
    first.release()
    with pytest.raises(ConfigError, match="already holds a run"):
        second.claim()
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1}\n'


def test_a_folder_that_cannot_be_is_refused_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"'.*/file' is a file; name a folder"):
        folder(tmp_path / "file" / "run" / "one")
    monkeypatch.setattr(os, "access", lambda place, mode: place != tmp_path)  # as root everything can be written
    with pytest.raises(ConfigError, match=rf"'{tmp_path}' cannot be written to"):
        folder(tmp_path / "run" / "one")
    assert not (tmp_path / "run").exists()
