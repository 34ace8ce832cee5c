"""Runs from Python: objects in place of paths, a running event loop, callbacks, and what a run returns."""

from __future__ import annotations

import asyncio
import copy
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from PIL import Image as Pillow
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from opdengine import Callback, Event, TrainConfig, train
from opdengine.cli import main
from opdengine.data.prompts import load_prompts
from opdengine.errors import ConfigError
from opdengine.models.given import given
from opdengine.training.api import lift
from opdengine.training.signals import Interrupted
from opdengine.training.step import Engine
from opdengine.training.writer import read_metrics

ROWS = [{"prompt": f"What is {i} + {i}?", "answer": str(2 * i)} for i in range(8)]


@pytest.fixture
def settings(models: dict[str, str], tmp_path: Path) -> dict[str, Any]:
    """Four steps of OPD with folders in place of objects."""
    return {
        "model": models["student"],
        "teachers": [{"model": models["big"], "name": "large"}],
        "train_data": ROWS,
        "method": "opd",
        "output_dir": str(tmp_path / "run"),
        "per_device_train_batch_size": 2,
        "max_completion_length": 5,
        "max_steps": 4,
        "learning_rate": 3e-3,
        "save_steps": 2,
    }


@pytest.fixture
def student(models: dict[str, str]) -> Any:
    return AutoModelForCausalLM.from_pretrained(models["student"])


@pytest.fixture
def teacher(models: dict[str, str]) -> Any:
    return AutoModelForCausalLM.from_pretrained(models["big"])


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def assert_equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    for name, value in a.items():
        assert torch.equal(value, b[name]), name


def test_objects_train_as_their_folders_do(
    settings: dict[str, Any], student: Any, teacher: Any, tokenizer: Any, tmp_path: Path
) -> None:
    """The same rows as a list, as a data set and as a file, and the same models."""
    file = tmp_path / "train_data.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    want = train({**settings, "train_data": [str(file)], "output_dir": str(tmp_path / "folders")})
    before = copy.deepcopy(student.state_dict())
    data = datasets.Dataset.from_list(ROWS)
    teachers = [{"model": teacher, "tokenizer": tokenizer, "name": "large"}]
    got = train(settings, model=student, tokenizer=tokenizer, teachers=teachers, train_data=data)
    assert_equal(weights(want.final_model), weights(got.final_model))
    assert got.model is student and got.step == 4
    assert any(not torch.equal(before[name], value) for name, value in student.state_dict().items())
    assert [line["step"] for line in got.history] == [1, 2, 3, 4]
    assert got.history[-1].items() <= {**got.metrics, "step": 4}.items()
    text = (got.output_dir / "config.yaml").read_text()
    assert text.startswith('# What begins with "in memory: " was given to opdengine.train in Python')
    assert "in memory: Qwen3ForCausalLM of" in text and "train_data of 8 rows with the content" in text


@pytest.mark.parametrize("form", [None, "torch", "numpy"])
def test_a_data_set_in_memory_has_the_rows_of_one_on_disk(form: str | None, tmp_path: Path) -> None:
    """Arrow gives every tool all tools' fields, and a format makes arrays of numbers: neither reaches a prompt."""

    def tool(name: str, properties: dict[str, Any]) -> dict[str, Any]:
        return {"name": name, "parameters": {"type": "object", "properties": properties}}

    data = datasets.Dataset.from_list([
        {"prompt": "Rome?", "answer": 4, "tools": [tool("weather", {"city": {"type": "string"}})]},
        {"prompt": "ACME?", "answer": 5, "tools": [tool("price", {"stock": {"type": "string"}})]},
    ]).with_format(form)  # fmt: skip
    data.save_to_disk(tmp_path / "data")
    plain, objects = lift({"train_data": data})
    with given(objects):
        found = load_prompts(plain["train_data"]).prompts
    stored = load_prompts([str(tmp_path / "data")]).prompts
    assert [(p.messages, p.tools, p.answer, type(p.answer)) for p in found] == [
        (p.messages, p.tools, p.answer, int) for p in stored
    ]
    assert found[0].tools == (tool("weather", {"city": {"type": "string"}}),)


def test_sections_are_dicts(settings: dict[str, Any], models: dict[str, str]) -> None:
    config = TrainConfig(
        **{**settings, "train_data": [], "eval_data": [{"path": "x.jsonl", "format": "gsm8k"}]}, lora={"r": 2}
    )
    assert config.lora is not None and config.lora.r == 2 and config.teachers[0].model == models["big"]
    with pytest.raises(ConfigError, match=r"unknown setting 'lora\.rank'"):
        train(settings, lora={"rank": 2})
    with pytest.raises(ConfigError, match="unknown setting 'learning_rat'"):
        train(settings, learning_rat=1.0)


def test_a_run_of_objects_continues(settings: dict[str, Any], models: Any, teacher: Any, tokenizer: Any) -> None:
    """With the checkpoint's weights, whatever the student that is given has become."""
    given = {**settings, "teachers": [teacher], "tokenizer": tokenizer}

    def fresh() -> Any:
        return AutoModelForCausalLM.from_pretrained(models["student"])

    whole = train({**settings, "output_dir": settings["output_dir"] + "_whole"}, teachers=[teacher],
                  model=fresh(), tokenizer=tokenizer)  # fmt: skip
    tokenizer = given.pop("tokenizer")

    class StopAfterTwo(Callback):
        def on_step(self, event: Event) -> None:
            if event.step == 2:
                event.stop()

    first = train(given, model=fresh(), tokenizer=tokenizer, callbacks=[StopAfterTwo()])
    assert first.step == 2
    result = train(given, model=first.model, tokenizer=tokenizer, resume_from_checkpoint="latest")
    assert result.model is first.model and [line["step"] for line in result.history] == [1, 2, 3, 4]
    assert_equal(weights(whole.final_model), weights(result.final_model))
    other = copy.deepcopy(teacher)
    with torch.no_grad():
        other.lm_head.weight.mul_(1.01)
    for changed, message in (
        ({"teachers": [other]}, "is another model than the run to resume had"),
        ({"train_data": ROWS[:-1]}, "the checkpoint was written with other training data"),
    ):
        with pytest.raises(ValueError, match=message):
            train({**given, **changed}, model=fresh(), tokenizer=tokenizer, resume_from_checkpoint="latest")


def test_a_run_of_objects_is_not_repeated_from_a_file(
    settings: dict[str, Any], student: Any, tokenizer: Any, capsys: Any, tmp_path: Path
) -> None:
    result = train(settings, model=student, tokenizer=tokenizer, max_steps=1)
    arguments = ["train", "--config", str(result.output_dir / "config.yaml"), "--output_dir", str(tmp_path / "again")]
    assert main(arguments) == 2
    assert "stands for an object that train() was given in Python, and it is not here" in capsys.readouterr().err


def test_lora_of_an_object(settings: dict[str, Any], models: Any, student: Any, tokenizer: Any, tmp_path: Path) -> None:
    given = {**settings, "lora": {"r": 2}, "tokenizer": tokenizer}
    want = train({**settings, "lora": {"r": 2}}, output_dir=str(tmp_path / "folders"))
    got = train(model=student, **{name: value for name, value in given.items() if name != "model"})
    a, b = (load_file(result.final_model / "adapter_model.safetensors") for result in (want, got))
    assert_equal(a, b)
    given["output_dir"] = str(tmp_path / "next")
    with pytest.raises(ConfigError, match="still has the layers of an adapter"):
        train({**settings, "output_dir": given["output_dir"]}, model=student, tokenizer=tokenizer)
    plain = got.model.unload()
    assert plain is student
    with pytest.raises(ConfigError, match=r"call model\.requires_grad_\(True\)"):
        train({**settings, "output_dir": given["output_dir"]}, model=student, tokenizer=tokenizer)
    student.model.layers.requires_grad_(True)
    kept = student.lm_head.weight.clone()
    train({**settings, "output_dir": given["output_dir"]}, model=student, tokenizer=tokenizer, max_steps=1)
    assert torch.equal(kept, student.lm_head.weight)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s, t, k: {"model": s}, "give its tokenizer, too"),
        (lambda s, t, k: {"tokenizer": k}, "tokenizer= belongs to a student that is given as an object"),
        (lambda s, t, k: {"teachers": [t]}, r"teachers\.0 is given as an object: give its tokenizer"),
        (
            lambda s, t, k: {"model": s, "teachers": [s], "tokenizer": k},
            "the student itself, which is trained in place",
        ),
        (lambda s, t, k: {"model": torch.nn.Linear(2, 2), "tokenizer": k}, "the student is a Linear; give a causal"),
        (
            lambda s, t, k: {"model": get_peft_model(s, LoraConfig(target_modules=["q_proj"])), "tokenizer": k},
            "the student has an adapter of peft; give the model itself",
        ),
        (
            lambda s, t, k: {"model": s, "tokenizer": k, "dtype": "bfloat16"},
            "dtype='bfloat16' is not that of the Qwen3",
        ),
        (lambda s, t, k: {"model": s.half(), "tokenizer": k}, "float16"),
        (
            lambda s, t, k: {"model": s, "tokenizer": k, "attn_implementation": "flash_attention_2"},
            "attn_implementation='flash_attention_2' is not that of the object",
        ),
        (
            lambda s, t, k: {"model": s, "tokenizer": k, "use_vllm": True},
            "use_vllm reads the files of the student, which is given as an object",
        ),
        *(
            (
                lambda s, t, k, w=weights: {
                    "model": s,
                    "tokenizer": k,
                    "teachers": [{"model": "self", "weights": w}],
                },
                rf"teachers\.0\.weights='{weights}' holds weights beside the student's.*{remedy}",
            )
            for weights, remedy in (("base", r"or give copy.deepcopy\(model\)"), ("ema", "name the folder"))
        ),
        (
            lambda s, t, k: {"model": s, "tokenizer": k, "lora": {"merge_final": True}},
            r"lora\.merge_final reads the files",
        ),
        (
            lambda s, t, k: {"train_data": datasets.DatasetDict({"train": datasets.Dataset.from_list(ROWS)})},
            r"train_data is a mapping of \['train'\]; choose one split",
        ),
        (lambda s, t, k: {"train_data": [{"prompt": 3}]}, "in memory: train_data of 1 rows.*row 1"),
        (lambda s, t, k: {"train_data": [{"question": "3?"}]}, "row 1: "),
        (lambda s, t, k: {"callbacks": [print]}, "has neither on_step"),
    ],
)
def test_objects_that_cannot_be_used(
    settings: dict[str, Any], student: Any, teacher: Any, tokenizer: Any, change: Callable[..., Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        train(settings, **change(student, teacher, tokenizer))
    assert not Path(settings["output_dir"]).exists()


def test_rows_are_named_by_what_they_hold() -> None:
    """Pictures and arrays of equal content in other objects give the same name; any other value another one."""

    def name(value: Any) -> str:
        plain, _ = lift({"train_data": [{"prompt": "What is this?", "images": value}]})
        return str(plain["train_data"][0])

    def picture(shade: int, mode: str = "L", size: tuple[int, int] = (4, 6)) -> Any:
        return Pillow.new(mode, size, shade)

    def painted(colour: int) -> Any:
        made = picture(0, "P")
        made.putpalette([colour] * 3)
        return made

    many = np.arange(5000)
    same = [lambda: picture(3), lambda: [picture(3)], lambda: many.copy(), lambda: b"png", lambda: bytearray(b"png")]
    assert all(name(make()) == name(make()) for make in same)
    other = many.copy()
    other[2500] = 7  # printed, both are "[0 1 2 ... 4999]"
    values = [picture(3), picture(4), painted(1), painted(2), picture(3, size=(6, 4)), [picture(3)], many, other,
              many.reshape(50, 100), many.astype(np.float64), b"png", b"pnh", "png"]  # fmt: skip
    assert len({name(value) for value in values}) == len(values)


class Recorder(Callback):
    """Writes down what it hears."""

    def __init__(self, stop_at: int = 0) -> None:
        self.heard: list[tuple[str, int, int, set[str]]] = []
        self.stop_at = stop_at

    def on_step(self, event: Event) -> None:
        self.heard.append(("step", event.step, len(event.samples), set(event.metrics)))
        if event.step == self.stop_at:
            event.stop()

    def on_evaluate(self, event: Event) -> None:
        self.heard.append(("evaluate", event.step, len(event.samples), set(event.metrics)))


def test_callbacks_hear_and_end_a_run(settings: dict[str, Any]) -> None:
    """A checkpoint of the step at which the run was ended is there although it was not due."""
    heard = Recorder(stop_at=3)
    result = train(settings, eval_data=ROWS[:3], eval_steps=2, callbacks=[heard])
    assert [entry[:3] for entry in heard.heard] == [
        ("evaluate", 0, 3), ("step", 1, 2), ("evaluate", 2, 3), ("step", 2, 2), ("step", 3, 2),
    ]  # fmt: skip
    assert "eval/accuracy" in heard.heard[0][3] and "loss" in heard.heard[1][3]
    assert result.step == 3 and (result.final_model / "config.json").is_file()
    assert (result.output_dir / "checkpoints" / "step_3").is_dir()


def test_a_callback_that_fails_ends_the_run_and_loses_nothing(settings: dict[str, Any]) -> None:
    class Failing:
        def on_step(self, event: Event) -> None:
            if event.step == 3:
                raise RuntimeError("of the callback")

    with pytest.raises(RuntimeError, match="of the callback"):
        train(settings, callbacks=[Failing()])
    assert (Path(settings["output_dir"]) / "checkpoints" / "step_3").is_dir()
    assert train(settings, resume_from_checkpoint="latest").step == 4


@pytest.mark.parametrize("at", [0, 2])
def test_a_callback_that_fails_at_an_evaluation_loses_nothing(settings: dict[str, Any], at: int) -> None:
    class Failing:
        def on_evaluate(self, event: Event) -> None:
            if event.step == at:
                raise RuntimeError("of the callback")

    folder, wanted = Path(settings["output_dir"]), {"eval_data": ROWS[:3], "eval_steps": 2, "log_completions": True}
    with pytest.raises(RuntimeError, match="of the callback"):
        train(settings, **wanted, save_steps=3, callbacks=[Failing()])
    lines = read_metrics(folder / "metrics.jsonl")
    assert [line["step"] for line in lines] == list(range(at + 1)) and "eval/accuracy" in lines[-1]
    assert [(folder / "rollouts" / f"step_{step}.jsonl").is_file() for step in (1, 2)] == [at == 2] * 2
    result = train(settings, **wanted, resume_from_checkpoint="latest")
    assert [line["step"] for line in result.history] == [0, 1, 2, 3, 4]
    assert "eval/accuracy" in result.history[2]
    assert sorted(path.name for path in (folder / "rollouts").iterdir()) == [f"step_{i}.jsonl" for i in (1, 2, 3, 4)]


def test_a_callback_ends_a_run_before_its_first_step(settings: dict[str, Any]) -> None:
    heard: list[str] = []

    class Content:
        def on_evaluate(self, event: Event) -> None:
            heard.append(f"evaluate {event.step}")
            event.stop()

        def on_step(self, event: Event) -> None:
            heard.append(f"step {event.step}")

    result = train(settings, eval_data=ROWS[:3], eval_steps=2, callbacks=[Content()])
    assert heard == ["evaluate 0"] and result.step == 0
    assert [line["step"] for line in result.history] == [0]
    given = weights(Path(settings["model"]))
    final = weights(result.final_model)
    assert final and all(torch.equal(value, given[name]) for name, value in final.items())
    assert not (result.output_dir / "checkpoints").exists()


def test_a_run_in_a_running_event_loop(settings: dict[str, Any], tmp_path: Path) -> None:
    """As in a notebook, with the results of a run outside of one."""
    want = train(settings)

    async def cell() -> Any:
        return train(settings, output_dir=str(tmp_path / "within"))

    got = asyncio.run(cell())
    assert_equal(weights(want.final_model), weights(got.final_model))


@pytest.mark.parametrize("place", ["prepare", "finish"])
def test_a_signal_in_a_running_event_loop(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    """A rollout is given up, an update is finished; the run continues to the same weights."""
    whole = train(settings, output_dir=settings["output_dir"] + "_whole")
    plain, calls = getattr(Engine, place), []

    async def interrupted(self: Engine, *args: Any) -> Any:
        calls.append(place)
        if len(calls) == 3:
            os.kill(os.getpid(), signal.SIGINT)
            await asyncio.sleep(0.3)
        return await plain(self, *args)

    monkeypatch.setattr(Engine, place, interrupted)

    async def cell() -> Any:
        return train(settings, save_steps=0)

    with pytest.raises(Interrupted):
        asyncio.run(cell())
    finished = 2 if place == "prepare" else 3
    assert [p.name for p in (Path(settings["output_dir"]) / "checkpoints").iterdir()] == [f"step_{finished}"]
    monkeypatch.setattr(Engine, place, plain)
    assert_equal(weights(whole.final_model), weights(train(settings, resume_from_checkpoint="latest").final_model))


def test_the_import_is_light() -> None:
    code = (
        "import sys, opdengine; assert not {'torch', 'transformers', 'pydantic'} & set(sys.modules); opdengine.nothing"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "module 'opdengine' has no attribute 'nothing'" in run.stderr
