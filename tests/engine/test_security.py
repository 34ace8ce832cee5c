"""What must not happen however a run is configured: code from data, secrets on disk, open doors."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from engine_helpers import make_config
from safetensors.torch import load_file

from opdengine.config.train import ConfigError
from opdengine.models.backbone import load_model
from opdengine.training.run import train
from tiny.agents.house import HOUSE

Models = dict[str, str]


class Bomb:
    """Writes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return Path.touch, (self.path,)  # type: ignore[return-value]


def test_pickled_weights_are_not_read(models: Models, tmp_path: Path) -> None:
    folder, trap = tmp_path / "model", tmp_path / "sprung"
    shutil.copytree(models["student"], folder)
    state: dict[str, object] = dict(load_file(folder / "model.safetensors"))
    (folder / "model.safetensors").unlink()
    torch.save({**state, "bomb": Bomb(trap)}, folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match="only safetensors are read"):
        load_model(str(folder))
    assert not trap.exists()


def test_code_of_a_model_is_not_run_unless_asked(models: Models, tmp_path: Path) -> None:
    folder, trap = tmp_path / "model", tmp_path / "sprung"
    shutil.copytree(models["student"], folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "custom", "auto_map": {"AutoConfig": "custom.C", "AutoModelForCausalLM": "custom.M"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "custom.py").write_text(f"open({str(trap)!r}, 'w').close()\n")
    with pytest.raises(ValueError, match="trust_remote_code"):
        load_model(str(folder))
    assert not trap.exists()


def test_a_run_leaves_nothing_that_is_pickled(models: Models, prompt_file: str, tmp_path: Path) -> None:
    result = train(
        make_config(models, prompt_file, tmp_path / "run", max_steps=1, save_steps=1, method="mad_opd"), progress=False
    )
    written = [p for p in result.output_dir.rglob("*") if p.is_file()]
    assert len(written) > 10
    for path in written:
        head = path.read_bytes()[:4]
        assert not head.startswith((b"PK", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")), path
        assert path.suffix in (".safetensors", ".json", ".jsonl", ".yaml", ".jinja", ".md", ".lock", ""), path


def test_secrets_are_refused_where_they_would_be_written_down(models: Models, prompt_file: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"environment\.options\.api_key looks like a secret"):
        make_config(models, "", tmp_path, environment={"name": HOUSE, "options": {"api_key": "sk-1"}})
    served = {"model": "m", "base_url": "http://user:pw@host/v1"}
    with pytest.raises(ConfigError, match="credential"):
        make_config(models, prompt_file, tmp_path, teachers=[served])


def test_the_value_of_a_key_is_in_no_file(
    models: Models, prompt_file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A served teacher's key comes from the shell; here the server is not even there."""
    monkeypatch.setenv("SOME_KEY", "sk-very-secret")
    teachers = [
        {"model": models["big"]},
        {"model": "m", "base_url": "http://127.0.0.1:9/v1", "api_key_env": "SOME_KEY", "tokenizer": models["big"],
         "max_retries": 0, "timeout": 2},
    ]  # fmt: skip
    config = make_config(models, prompt_file, tmp_path / "run", teachers=teachers)
    with pytest.raises(Exception) as failure:  # noqa: PT011
        train(config, progress=False)
    assert "sk-very-secret" not in str(failure.value)
    for path in (tmp_path / "run").rglob("*"):
        assert not path.is_file() or b"sk-very-secret" not in path.read_bytes()
