"""A served teacher is asked before step 0 whether it answers what will be needed."""

from __future__ import annotations

import asyncio
import dataclasses
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from engine_helpers import make_config, make_engine
from teacher_helpers import Server, context, served
from transformers import AutoModelForCausalLM

from opdengine.config.train import ConfigError, TeacherConfig
from opdengine.errors import ProbeError
from opdengine.training.build_teachers import teacher_tokenizer
from opdengine.training.run import train
from opdengine.training.run_folder import RunFolder
from opdengine.types import Failure


def probe(teacher: Any, judges: bool = True) -> None:
    asyncio.run(teacher.probe(judges=judges))


def refused(teacher: Any, judges: bool = True) -> str:
    with pytest.raises(ProbeError) as error:
        probe(teacher, judges)
    return str(error.value)


def test_a_good_server_passes_and_tells_its_window(real_server: Server, tokenizer: Any) -> None:
    real_server.control(window=300)
    teacher = served(real_server, tokenizer)
    probe(teacher)
    assert teacher.window == 299  # a scoring call asks for one new token
    assert real_server.seen["score"] == 1 and teacher.counts() == {}
    real_server.control(window=None, tokenize=False)
    probe(teacher)
    assert teacher.window is None


def test_nobody_there(tokenizer: Any, bigrams: Server) -> None:
    teacher = served(bigrams, tokenizer, max_retries=0)
    teacher.endpoint.base_url = "http://127.0.0.1:1/v1"
    message = refused(teacher)
    assert "teacher 'served' failed (connection): http://127.0.0.1:1/v1" in message


def test_another_model_is_served(bigrams: Server, tokenizer: Any) -> None:
    bigrams.control(names=["qwen-4b", "qwen-8b"])
    message = refused(served(bigrams, tokenizer))
    assert "does not serve 'tiny' but ['qwen-4b', 'qwen-8b']" in message and "'model'" in message


def test_no_prompt_logprobs(bigrams: Server, tokenizer: Any) -> None:
    bigrams.control(faults=[{"kind": "no_logprobs"}], say="x")
    message = refused(served(bigrams, tokenizer))
    assert "usable prompt log-probs (no_logprobs" in message and "vLLM" in message
    probe(served(bigrams, tokenizer), judges=False)  # a teacher that only writes needs none


@pytest.mark.parametrize("way", ["text", "token", "id"])
@pytest.mark.parametrize("known", ["ignored", "refused"])
def test_a_server_that_echoes_prompts_judges_as_well(
    real_server: Server, tokenizer: Any, models: dict[str, str], way: str, known: str
) -> None:
    """Against the model itself. Half of the bytes are no text of their own: those stay in the tail."""
    real_server.control(prompt_logprobs=known, echo=way)
    teacher = served(real_server, tokenizer, k=40)
    probe(teacher)
    ids = [*tokenizer.encode("naïve façade 3 × 4", add_special_tokens=False), tokenizer.eos_token_id, 40]
    asked = context(ids, len(ids) - 1)
    (found,) = asyncio.run(teacher.score([asked]))
    model = AutoModelForCausalLM.from_pretrained(models["big"])
    with torch.no_grad():
        rows = model(torch.tensor([ids])).logits[0, :-1].double().log_softmax(-1)
    assert found.ids[:, 0].tolist() == ids[1:]
    known = found.ids >= 0  # a row keeps what the server lists there
    expected = rows.gather(1, torch.from_numpy(found.ids).clamp(min=0)).numpy()
    np.testing.assert_allclose(found.logprobs[known], expected[known], atol=1e-5)
    texts = [tokenizer.decode([i]) for i in range(len(tokenizer))]
    shared = {i for i, text in enumerate(texts) if texts.count(text) > 1}
    assert shared & set(ids)
    assert bool(shared & set(found.ids[:, 1:].ravel().tolist())) == (way != "text")


def test_an_echo_of_other_tokens_is_a_failure(real_server: Server, tokenizer: Any) -> None:
    real_server.control(prompt_logprobs="ignored", echo="text")
    teacher = served(real_server, tokenizer)
    probe(teacher)
    real_server.control(prompt_logprobs="ignored", echo="token")
    (failure,) = asyncio.run(teacher.score([context([40, 41, tokenizer.encode(" ")[0], 42], 3)]))
    assert isinstance(failure, Failure) and failure.reason == "wrong_ids"


def test_neither_way_of_scoring(bigrams: Server, tokenizer: Any) -> None:
    bigrams.control(prompt_logprobs="refused", say="x")
    assert "unknown field prompt_logprobs" in refused(served(bigrams, tokenizer))
    bigrams.control(prompt_logprobs="ignored", say="x")
    assert "nor with those of an echoed prompt" in refused(served(bigrams, tokenizer))


def test_the_server_caps_the_log_probs(bigrams: Server, tokenizer: Any) -> None:
    bigrams.control(max_logprobs=4)
    assert "start the server with --max-logprobs 8, or lower score_top_k" in refused(served(bigrams, tokenizer))


def test_the_server_encodes_text_differently(bigrams: Server, tokenizer: Any) -> None:
    bigrams.control(tokenize=[1, 2, 3])
    message = refused(served(bigrams, tokenizer))
    assert "encodes text differently" in message and "'tokenizer'" in message


def test_the_tokenizer_of_a_served_teacher_is_found_and_compared(
    models: dict[str, str], real_server: Server, tiny: SimpleNamespace, prompt_file: str, tmp_path: Path
) -> None:
    real_server.control()
    config = make_config(models, prompt_file, tmp_path)
    away = TeacherConfig("tiny", base_url=real_server.url)
    with pytest.raises(ConfigError, match="set 'tokenizer' of the teacher 'tiny'"):
        teacher_tokenizer(config, dataclasses.replace(away, name="tiny"))
    other = tiny.make_tokenizer(extra=("<|tool|>",))
    other.save_pretrained(tmp_path / "other")
    teachers = [dataclasses.replace(away, tokenizer=str(tmp_path / "other")), config.teachers[1]]
    with pytest.raises(ValueError, match="'tiny' does not share the student's tokenizer"):
        make_engine(dataclasses.replace(config, teachers=teachers))


def test_the_probe_comes_before_any_model_is_loaded(
    models: dict[str, str], real_server: Server, prompt_file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_model(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", no_model)
    real_server.control(names=["other"])
    teachers = [{"model": "tiny", "base_url": real_server.url, "tokenizer": models["big"]}, {"model": models["small"]}]
    config = make_config(models, prompt_file, tmp_path / "run", teachers=teachers)
    with pytest.raises(ProbeError, match="does not serve 'tiny'"):
        train(config, progress=False)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("change", "settings", "message"),
    [
        ({"base_url": "localhost:8000"}, {}, "http://host:8000/v1"),
        ({"base_url": "http://me:pass@host/v1"}, {}, "api_key_env"),
        ({"base_url": "http://host/v1?key=abc"}, {}, "api_key_env"),
        ({"base_url": None, "api_key_env": "KEY"}, {}, "base_url"),
        ({"base_url": None, "tokenizer": "folder"}, {}, "base_url"),
        ({"offload": True}, {}, "offload"),
        ({"timeout": 0}, {}, "timeout"),
        ({"max_retries": -1}, {}, "max_retries"),
        ({"max_concurrency": 0}, {}, "max_concurrency"),
        ({"score_top_k": 0}, {}, "score_top_k"),
        ({}, {"divergence_temperature": 2.0}, "divergence_temperature"),
        ({}, {"teacher_reduction": "mixture"}, "teacher_reduction"),
        ({}, {"on_teacher_failure": "ignore"}, "on_teacher_failure"),
    ],
)
def test_impossible_settings(
    models: dict[str, str], prompt_file: str, tmp_path: Path, change: dict[str, Any], settings: dict[str, Any],
    message: str,
) -> None:  # fmt: skip
    teacher = {"model": "tiny", "base_url": "http://host/v1", **change}
    with pytest.raises(ConfigError, match=message) as error:
        make_config(models, prompt_file, tmp_path, teachers=[teacher, {"model": models["small"]}], **settings)
    assert "pass@" not in str(error.value) and "abc" not in str(error.value)


def test_a_resumed_run_may_find_its_teacher_elsewhere(
    models: dict[str, str], prompt_file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KEY", "secret")
    teacher = {"model": "tiny", "base_url": "http://one/v1", "api_key_env": "KEY", "score_top_k": 8}
    config = make_config(models, prompt_file, tmp_path, teachers=[teacher, {"model": models["small"]}])
    RunFolder(config).claim()
    text = (tmp_path / "config.yaml").read_text()
    assert "secret" not in text and yaml.safe_load(text)["teachers"][0]["api_key_env"] == "KEY"
    checkpoint = tmp_path / "checkpoints" / "step_1"
    checkpoint.mkdir(parents=True)
    (checkpoint / "state.json").write_text('{"step": 1}')
    moved = {"base_url": "http://two/v1", "timeout": 5.0, "max_retries": 1, "api_key_env": None}
    again = dataclasses.replace(config, resume_from_checkpoint="latest", on_teacher_failure="drop")
    RunFolder(
        dataclasses.replace(again, teachers=[dataclasses.replace(config.teachers[0], **moved), config.teachers[1]])
    )
    with pytest.raises(ConfigError, match="teachers"):
        RunFolder(
            dataclasses.replace(
                again, teachers=[dataclasses.replace(config.teachers[0], score_top_k=9), config.teachers[1]]
            )
        )
