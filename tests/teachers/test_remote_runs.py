"""Whole runs with exact teachers elsewhere: faults end them with a checkpoint, and they go on where they stopped."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from engine_helpers import make_config
from ranks_helpers import torchrun
from remote_helpers import Spoiled, answering, nobody, plain, teacher_serve
from safetensors.torch import load_file

from opdengine.cli import main
from opdengine.config.loading import to_mapping
from opdengine.config.train import TrainConfig
from opdengine.errors import ConfigError, ProbeError
from opdengine.models.checkpoint import list_checkpoints
from opdengine.teachers import TeacherError
from opdengine.teachers.pool import OtherWeightsError
from opdengine.teachers.served_model import Served
from opdengine.training.callbacks import Callbacks, Event
from opdengine.training.run import train
from opdengine.training.writer import read_metrics

WORKER = Path(__file__).parents[1] / "distributed" / "train_worker.py"


@pytest.fixture(scope="module")
def served(models: dict[str, str]) -> Served:
    return Served(models["big"])


def config_of(
    models: dict[str, str], prompt_file: str, folder: Path, *urls: str, teacher: dict[str, Any] | None = None,
    **changes: Any,
) -> TrainConfig:  # fmt: skip
    """MAD-OPD with a teacher elsewhere and one here, three steps of two prompts."""
    far = {"model": models["big"], "name": "far", "hidden_states_url": list(urls), "max_retries": 1, **(teacher or {})}
    near = {"model": models["small"], "name": "near"}
    data = {"method": "mad_opd", "teachers": [far, near], "debate": {"rounds": 1}, "per_device_train_batch_size": 2,
            "max_completion_length": 4}  # fmt: skip
    return make_config(models, prompt_file, folder, **{**data, **changes})


def after(step: int, what: Callable[[], Any]) -> Callbacks:
    """Do something once a step is finished."""

    class Then:
        def on_step(self, event: Event) -> None:
            if event.step == step:
                what()

    return Callbacks([Then()])


def final(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "final" / "model.safetensors")


def assert_same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor], atol: float = 0.0) -> None:
    for name, expected in other.items():
        torch.testing.assert_close(one[name], expected, rtol=0, atol=atol, msg=name)


@pytest.fixture(scope="module")
def whole(
    served: Served, models: dict[str, str], prompt_file: str, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, list[dict[str, Any]]]:
    """A run without any fault, and its metrics."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    with answering(served) as url:
        train(config_of(models, prompt_file, folder, url), progress=False)
    return folder, read_metrics(folder / "metrics.jsonl")


def test_it_learns_what_it_learns_from_the_same_teacher_here(
    whole: tuple[Path, list[dict[str, Any]]], models: dict[str, str], prompt_file: str, tmp_path: Path
) -> None:
    config = config_of(models, prompt_file, tmp_path, "http://127.0.0.1:9")
    here = [dataclasses.replace(t, hidden_states_url=[]) for t in config.teachers]
    train(dataclasses.replace(config, teachers=here), progress=False)
    for mine, theirs in zip(whole[1], read_metrics(tmp_path / "metrics.jsonl"), strict=True):
        assert mine.keys() == theirs.keys()
        for name in ("loss", "grad_norm", "teacher_kl/far", "teacher_kl/near", "gap/mean", "debate/confidence/far"):
            if name in theirs:
                assert mine[name] == pytest.approx(theirs[name], rel=1e-5, abs=1e-6), name
    assert_same(final(whole[0]), final(tmp_path), atol=1e-5)


def test_a_server_that_is_killed_stops_the_run_which_another_one_continues(
    whole: tuple[Path, list[dict[str, Any]]], models: dict[str, str], prompt_file: str, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    with teacher_serve(models["big"]) as server:
        config = config_of(models, prompt_file, tmp_path, server.url)
        with pytest.raises(TeacherError, match=rf"teacher 'far' failed \(connection\): {server.url}"):
            train(config, progress=False, callbacks=after(1, server.stop))
    assert [p.name for p in list_checkpoints(tmp_path / "checkpoints")] == ["step_1"]
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(to_mapping(config)))
    arguments = ["train", "--config", str(tmp_path / "run.yaml"), "--resume_from_checkpoint", "latest"]
    assert main(arguments) == 2  # it is still dead
    assert "no endpoint answers as it should" in capsys.readouterr().err
    with teacher_serve(models["big"]) as moved:
        assert main([*arguments, "--teachers.0.hidden_states_url", moved.url]) == 0
    assert_same(final(tmp_path), final(whole[0]))


def test_one_of_two_servers_is_killed_and_the_run_goes_on(
    whole: tuple[Path, list[dict[str, Any]]], served: Served, models: dict[str, str], prompt_file: str, tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    with teacher_serve(models["big"]) as killed, answering(served) as stays:
        config = config_of(models, prompt_file, tmp_path, killed.url, stays)
        train(config, progress=False, callbacks=after(1, killed.stop))
    assert f"teacher 'far' has lost {killed.url} (connection: " in caplog.text and f"{stays} takes over" in caplog.text
    lines = read_metrics(tmp_path / "metrics.jsonl")
    assert [line["step"] for line in lines] == [1, 2, 3] and lines[1]["teacher_retries/far"] >= 1
    assert_same(final(tmp_path), final(whole[0]), atol=1e-5)


@pytest.mark.parametrize("mode", ["stop", "drop"])
def test_other_weights_end_the_run_with_a_checkpoint(
    served: Served, models: dict[str, str], prompt_file: str, tmp_path: Path, mode: str
) -> None:
    restarted = Spoiled(served, plain)
    with answering(restarted) as url:
        config = config_of(models, prompt_file, tmp_path, url, on_teacher_failure=mode)
        with pytest.raises(OtherWeightsError, match=f"teacher 'far': {url} answers with other weights"):
            train(config, progress=False, callbacks=after(1, lambda: setattr(restarted, "fingerprint", "another")))
    assert [p.name for p in list_checkpoints(tmp_path / "checkpoints")] == ["step_1"]
    other = Spoiled(served, plain, fingerprint="another", contents={**served.contents, "model.safetensors": "0" * 64})
    other.about = lambda: ({**served.about()[0], "contents": other.contents}, ())  # type: ignore[attr-defined]
    with answering(other) as url:
        again = config_of(models, prompt_file, tmp_path, url, resume_from_checkpoint="latest")
        with pytest.raises(ConfigError, match=r"teachers.0.model=.*another model .*what differs: model.safetensors"):
            train(again, progress=False)
    with answering(served) as url:
        train(
            dataclasses.replace(again, teachers=config_of(models, prompt_file, tmp_path, url).teachers), progress=False
        )
    assert [line["step"] for line in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2, 3]


def test_another_dtype_is_another_teacher(
    served: Served, models: dict[str, str], prompt_file: str, tmp_path: Path
) -> None:
    with answering(served) as url:
        config = config_of(models, prompt_file, tmp_path, url, max_steps=1, save_steps=1)
        train(config, progress=False)
    with answering(Served(models["big"], dtype="bfloat16")) as url:
        again = config_of(models, prompt_file, tmp_path, url, max_steps=2, resume_from_checkpoint="latest")
        with pytest.raises(ConfigError, match=r"teachers.0.model=.*what differs: dtype"):
            train(again, progress=False)


def test_a_run_may_move_between_a_teacher_here_and_elsewhere(
    whole: tuple[Path, list[dict[str, Any]]], served: Served, models: dict[str, str], prompt_file: str, tmp_path: Path
) -> None:
    """They are compared by content, so that it is the same teacher."""
    with answering(served) as url:
        config = config_of(models, prompt_file, tmp_path, url, save_steps=1)
        here = [dataclasses.replace(t, hidden_states_url=[]) for t in config.teachers]
        begun = dataclasses.replace(config, teachers=here)
        with pytest.raises(KeyboardInterrupt):
            train(begun, progress=False, callbacks=after(2, interrupt))
        train(dataclasses.replace(config, resume_from_checkpoint="latest"), progress=False)
    assert_same(final(tmp_path), final(whole[0]), atol=1e-5)


def interrupt() -> None:
    raise KeyboardInterrupt


def test_drop_goes_on_with_the_other_teacher(
    served: Served, models: dict[str, str], prompt_file: str, tmp_path: Path
) -> None:
    state = {"broken": False}

    def spoil(reply: Any) -> Any:
        if state["broken"]:
            raise RuntimeError("out of memory")
        return reply

    with answering(Spoiled(served, spoil)) as url:
        config = config_of(models, prompt_file, tmp_path, url, on_teacher_failure="drop", teacher={"max_retries": 0})
        train(config, progress=False, callbacks=after(1, lambda: state.update(broken=True)))
    first, second, third = read_metrics(tmp_path / "metrics.jsonl")
    assert "teacher_failures/far/http_500" not in first
    assert second["teacher_failures/far/http_500"] == 2 and "teacher_kl/near" in second
    assert "teacher_kl/far" not in second and third["completions/kept"] == 2


def test_states_that_are_nowhere_finite_end_the_run(
    served: Served, models: dict[str, str], prompt_file: str, tmp_path: Path
) -> None:
    spoiled = Spoiled(served, lambda r: (r[0], [t * float("nan") for t in r[1]]))
    broken = "teacher 'far' is broken: its hidden states are NaN or inf"
    with answering(spoiled) as url, pytest.raises(ProbeError, match=broken):
        train(config_of(models, prompt_file, tmp_path, url), progress=False)


def test_the_token_is_in_no_file_of_the_run(
    served: Served, models: dict[str, str], prompt_file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    token = "a-token-of-the-test-0123456789"
    monkeypatch.setenv("TEACHER", token)
    with answering(served, token) as url:
        config = config_of(models, prompt_file, tmp_path / "run", url, teacher={"api_key_env": "TEACHER"}, max_steps=1,
                           save_steps=1, log_completions=True)  # fmt: skip
        train(config, progress=False)
    files = [file for file in (tmp_path / "run").rglob("*") if file.is_file()]
    assert len(files) > 8 and not any(token.encode() in file.read_bytes() for file in files)
    assert token not in caplog.text


def test_writing_alone_takes_no_head(
    served: Served, models: dict[str, str], prompt_file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse() -> Any:
        raise AssertionError("nobody judges")

    spoiled = Spoiled(served, plain)
    spoiled.send_head = refuse  # type: ignore[attr-defined]
    with answering(spoiled) as url:
        config = config_of(models, prompt_file, tmp_path, url, method="mt_seqkd", max_steps=1)
        train(dataclasses.replace(config, teachers=config.teachers[:1]), progress=False)
    assert read_metrics(tmp_path / "metrics.jsonl")[0]["loss"] > 0


def test_a_debate_on_the_command_line(
    served: Served, models: dict[str, str], prompt_file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with answering(served) as url:
        config = config_of(models, prompt_file, tmp_path / "run", url)
        (tmp_path / "run.yaml").write_text(yaml.safe_dump(to_mapping(config)))
        assert main(["debate", "--config", str(tmp_path / "run.yaml"), "--prompt", "What is 1 + 1?"]) == 0
    assert "--- round 1, far\n" in capsys.readouterr().out


def test_two_processes_ask_for_their_own_samples(
    served: Served, models: dict[str, str], prompt_file: str, tmp_path: Path
) -> None:
    changes: dict[str, Any] = {"method": "opd", "adam_epsilon": 1e-2, "max_steps": 2}
    with answering(served) as url:
        config = config_of(models, prompt_file, tmp_path / "one", url, **changes, per_device_train_batch_size=4)
        config = dataclasses.replace(config, teachers=config.teachers[:1])
        alone = train(config, progress=False)
        two = dataclasses.replace(config, per_device_train_batch_size=2, output_dir=str(tmp_path / "two"))
        (tmp_path / "two.yaml").write_text(yaml.safe_dump(to_mapping(two)))
        done = torchrun(2, str(WORKER), "--config", str(tmp_path / "two.yaml"))
    assert done.returncode == 0, done.stderr[-4000:]
    assert_same(final(tmp_path / "two"), final(alone.output_dir), atol=1e-5)


@pytest.mark.slow
def test_two_processes_end_when_their_teacher_is_gone(models: dict[str, str], prompt_file: str, tmp_path: Path) -> None:
    with nobody() as dead:
        config = config_of(models, prompt_file, tmp_path / "run", dead, teacher={"max_retries": 0})
        (tmp_path / "run.yaml").write_text(yaml.safe_dump(to_mapping(config)))
        done = torchrun(2, str(WORKER), "--config", str(tmp_path / "run.yaml"))
    assert done.returncode != 0 and "teacher 'far': no endpoint answers as it should" in done.stderr


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (
            {"hidden_states_url": "ftp://h"},
            r"hidden_states_url=\['ftp://h'\] is not possible; give a URL such as http://h",
        ),
        ({"hidden_states_url": "http://h?x=1"}, "hidden_states_url holds a credential or a query"),
        ({"hidden_states_url": "http://user:pw@h"}, "hidden_states_url looks like a secret"),
        ({"hidden_states_url": ["http://h:1", "http://h:1/"]}, "an address is named twice"),
        ({"base_url": "http://h/v1"}, "base_url=.*leave one of the two out"),
        ({"dtype": "bfloat16"}, "dtype='bfloat16'.*teacher-serve --dtype"),
        ({"offload": True}, "offload=True.*are not here"),
        ({"shard": True}, "shard=True.*are not here"),
        ({"model": "self"}, "no server follows the student"),
        ({"hidden_states_url": [], "hidden_states_dtype": "bfloat16"}, "it belongs to hidden_states_url"),
        ({"hidden_states_dtype": "float16"}, "choose one of"),
        ({"weights": "base"}, "weights='base'"),
        ({"api_key_env": "sk-abc"}, "name of an environment variable"),
    ],
)
def test_settings_that_do_not_fit_are_refused(
    models: dict[str, str], prompt_file: str, tmp_path: Path, settings: dict[str, Any], words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        config_of(models, prompt_file, tmp_path, "http://h:1", teacher=settings)
