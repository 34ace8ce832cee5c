"""Models stored in few bits, as transformers loads them; those that need packages run where these are installed.

``pip install -e ".[quantised]"`` installs torchao and bitsandbytes, both of which run on a CPU.
"""

from __future__ import annotations

import asyncio
import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from engine_helpers import make_config, make_engine
from transformers import AutoModelForCausalLM

from opdengine.config.sections import TeacherConfig
from opdengine.config.train import ConfigError
from opdengine.models import quantised
from opdengine.models.backbone import load_model
from opdengine.models.lora import fingerprint
from opdengine.teachers.local import LocalTeacher
from opdengine.training.build_student import load_student
from opdengine.training.run import train
from opdengine.types import TeacherContext

Models = dict[str, str]


def quantise(kind: str, folder: Path, source: str, tokenizer: Any) -> str:
    """A folder of the model ``source`` with fewer bits."""
    from transformers import BitsAndBytesConfig, TorchAoConfig

    pytest.importorskip(kind.partition("-")[0])
    if kind.startswith("torchao"):
        from torchao.quantization import Int8DynamicActivationInt8WeightConfig, Int8WeightOnlyConfig

        own = Int8DynamicActivationInt8WeightConfig() if kind == "torchao-dynamic" else Int8WeightOnlyConfig()
        config: Any = TorchAoConfig(own, include_input_output_embeddings=kind == "torchao-head")
    elif kind == "bitsandbytes-4":
        config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    else:
        whole = {"llm_int8_skip_modules": []} if kind == "bitsandbytes-head" else {}
        config = BitsAndBytesConfig(load_in_8bit=True, **whole)
    AutoModelForCausalLM.from_pretrained(source, quantization_config=config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


KINDS = ["torchao", "torchao-head", "bitsandbytes-4", "bitsandbytes-8", "bitsandbytes-head"]


@pytest.mark.parametrize("dtype", ["auto", "bfloat16"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_teacher_says_what_transformers_says(
    models: Models, tokenizer: Any, tmp_path: Path, kind: str, dtype: Any
) -> None:
    """Its head is one matrix in its dtype, and its weights stay quantised; the fingerprint tells both apart."""
    folder = quantise(kind, tmp_path / "few", models["big"], tokenizer)
    teacher = LocalTeacher(TeacherConfig(folder, name="few", dtype=dtype))
    ids = np.arange(5, 30)
    (hidden,) = asyncio.run(teacher.score([TeacherContext("s", "few", ids, np.arange(1, 25))]))
    assert type(teacher.head.weight) is torch.nn.Parameter and teacher.head.weight.dtype == hidden.states.dtype
    ours = teacher.head.logits(hidden.states).float().log_softmax(-1)
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    with torch.no_grad():
        theirs = plain(input_ids=torch.from_numpy(ids)[None]).logits[0, :-1].float().log_softmax(-1)
    rounds = dtype != "auto" or kind == "bitsandbytes-head"  # whose own head rounds the hidden states, too
    torch.testing.assert_close(ours.detach(), theirs, rtol=0, atol=0.1 if rounds else 1e-4)
    assert quantised.is_quantised(teacher.backbone.model)
    assert teacher.fingerprint != LocalTeacher(TeacherConfig(models["big"], name="whole", dtype=dtype)).fingerprint


@pytest.mark.parametrize("kind", ["torchao-head", "bitsandbytes-4"])
def test_a_run_with_a_quantised_teacher(
    models: Models, tokenizer: Any, prompt_file: str, tmp_path: Path, kind: str
) -> None:
    folder = quantise(kind, tmp_path / "few", models["big"], tokenizer)
    train(make_config(models, prompt_file, tmp_path / "run", method="opd", teachers=[{"model": folder}], max_steps=2))
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["grad_norm"] > 0 and rows[-1]["teacher_kl/few"] > 0


@pytest.mark.parametrize("kind", ["bitsandbytes-4", "bitsandbytes-8"])
def test_an_adapter_is_trained_on_a_quantised_student(
    models: Models, tokenizer: Any, prompt_file: str, tmp_path: Path, kind: str
) -> None:
    """QLoRA: only the adapter moves; a run that is cut in two goes on as one that was not."""
    # Products in 4 bits of CPUs with AVX-512 need rows of 64 numbers and more.
    folder = quantise(kind, tmp_path / "few", models["big"], tokenizer)
    settings: dict[str, Any] = {
        "method": "opd", "teachers": [{"model": models["student"]}], "lora": {"r": 4}, "save_steps": 1,
        "temperature": 0.7,
    }  # fmt: skip
    for name, stops in (("whole", [3]), ("cut", [1, 3])):
        for steps in stops:
            again = {"resume_from_checkpoint": "latest"} if steps != stops[0] else {}
            given = {**models, "student": folder}
            train(make_config(given, prompt_file, tmp_path / name, max_steps=steps, **settings, **again))
    for place in ("whole", "cut"):
        assert (tmp_path / place / "final" / "adapter_model.safetensors").is_file()
    one, other = (
        [json.loads(line)["loss"] for line in (tmp_path / place / "metrics.jsonl").read_text().splitlines()]
        for place in ("whole", "cut")
    )
    assert one == other and len(one) == 3
    ids = torch.arange(5, 30)[None]
    with torch.no_grad():  # an adapter's folder is a teacher like any other; it is not merged into what is rounded
        base, trained = (load_model(place)(input_ids=ids).logits for place in (folder, str(tmp_path / "cut" / "final")))
    assert 1e-4 < (base - trained).abs().max() < 10
    judge = LocalTeacher(TeacherConfig(str(tmp_path / "cut" / "final"), name="trained"))
    (hidden,) = asyncio.run(judge.score([TeacherContext("s", "trained", ids[0].numpy(), np.arange(1, 25))]))
    torch.testing.assert_close(judge.head.logits(hidden.states).detach(), trained[0, :-1], rtol=1e-4, atol=1e-3)


def test_a_pass_without_gradient_changes_no_later_gradient(
    models: Models, tokenizer: Any, prompt_file: str, tmp_path: Path
) -> None:
    """CPUs with AVX-512 and bfloat16 have a layout for 4-bit weights that passes no gradient on to the layers below."""
    folder = quantise("bitsandbytes-4", tmp_path / "few", models["big"], tokenizer)
    config = make_config(
        {**models, "student": folder}, prompt_file, tmp_path / "run", method="opd", lora={"r": 4, "lora_dropout": 0.0}
    )
    ids, found = torch.arange(5, 30)[None], []
    for sampled_before in (False, True):
        torch.manual_seed(0)
        student = load_student(config, torch.device("cpu"))
        before = fingerprint(student)
        if sampled_before:
            with torch.no_grad():
                student.eval()(input_ids=ids)
        student.train()(input_ids=ids).logits.square().mean().backward()
        assert fingerprint(student) == before
        found.append([p.grad for _, p in sorted(student.named_parameters()) if p.requires_grad])
    assert sum(float(gradient.norm()) > 0 for gradient in found[0]) >= len(found[0]) // 2
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=0)


def test_rounded_activations_are_named(models: Models, tokenizer: Any, tmp_path: Path) -> None:
    folder = quantise("torchao-dynamic", tmp_path / "few", models["big"], tokenizer)
    with pytest.raises(ConfigError, match="quantised by torchao: where activations are rounded"):
        LocalTeacher(TeacherConfig(folder, name="few", dtype="float32"))


# ------------------------------------------------------------------------------------------ without any package


def named(models: Models, folder: Path, kind: str, **more: Any) -> str:
    """A folder whose configuration says that it is quantised."""
    shutil.copytree(models["big"], folder)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": kind, **more}
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


@pytest.mark.parametrize(
    ("kind", "package"),
    [("torchao", "torchao"), ("bitsandbytes", "bitsandbytes"), ("compressed-tensors", "compressed-tensors"),
     ("gptq", "gptqmodel"), ("awq", "gptqmodel")],
)  # fmt: skip
def test_a_missing_package_is_named_before_a_model_is_loaded(
    models: Models, prompt_file: str, tmp_path: Path, kind: str, package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = named(models, tmp_path / "few", kind)
    found = importlib.util.find_spec
    hidden = package.replace("-", "_")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == hidden else found(name, *rest))
    refuse = lambda *_, **__: pytest.fail("a model was loaded")  # noqa: E731
    monkeypatch.setattr("opdengine.training.build_student.load_model", refuse)
    config = make_config(models, prompt_file, tmp_path / "run", method="opd", teachers=[{"model": folder}])
    with pytest.raises(ConfigError, match=f"quantised by {kind} and needs {package}.*: pip install {package}"):
        train(config)


def test_an_unknown_kind_is_refused(models: Models, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="quantised by 'zip', which transformers does not know"):
        load_model(named(models, tmp_path / "few", "zip"))


def test_what_cannot_be_loaded_names_the_quantisation(models: Models, tmp_path: Path, monkeypatch: Any) -> None:
    folder = named(models, tmp_path / "few", "fp8")

    def broken(*_: Any, **__: Any) -> Any:
        raise RuntimeError("No GPU found. A GPU is needed for this")

    monkeypatch.setattr("opdengine.models.backbone.read_model", broken)
    with pytest.raises(ConfigError, match="quantised by fp8 and cannot be loaded here: No GPU found"):
        load_model(folder)


def test_what_is_restored_at_load_is_said(models: Models, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """FP8 does not run on a CPU: transformers restores it."""
    if torch.cuda.is_available():
        pytest.skip("FP8 runs here")
    model = load_model(named(models, tmp_path / "few", "fp8", activation_scheme="dynamic", weight_block_size=[32, 32]))
    assert model.model.layers[0].mlp.up_proj.weight.is_floating_point()
    assert "quantised by fp8, which does not run here" in caplog.text


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, "training is not possible with the student .* set lora"),
        ({"lora": {"r": 4}, "kind": "torchao"}, "bitsandbytes' 4 and 8 bits only"),
        ({"lora": {"r": 4}, "use_vllm": True}, "use_vllm is not possible.*sample with transformers"),
        ({"lora": {"r": 4, "merge_final": True}}, "lora.merge_final is not possible"),
        ({"lora": {"r": 4}, "teachers": [{"model": "self", "weights": "ema"}]}, "a teacher with weights: ema"),
    ],
)
def test_what_a_quantised_student_cannot_do_is_refused(
    models: Models, prompt_file: str, tmp_path: Path, changes: dict[str, Any], said: str, monkeypatch: Any
) -> None:
    monkeypatch.setattr(quantised, "require_quantiser", lambda *_: None)
    kind = changes.get("kind", "bitsandbytes")
    more = {"load_in_4bit": True} if kind == "bitsandbytes" else {"quant_type": "int8_weight_only"}
    student = named(models, tmp_path / "few", kind, **more)
    settings = {"method": "opd", "teachers": [{"model": models["big"]}], **changes}
    settings.pop("kind", None)
    with pytest.raises(ConfigError, match=said):
        make_engine(make_config({**models, "student": student}, prompt_file, tmp_path / "run", **settings))


@pytest.mark.parametrize("setting", ["offload", "shard"])
def test_a_quantised_teacher_stays_where_it_is(
    models: Models, prompt_file: str, tmp_path: Path, setting: str, monkeypatch: Any
) -> None:
    monkeypatch.setattr(quantised, "require_quantiser", lambda *_: None)
    teachers = [{"model": named(models, tmp_path / "few", "gptq", bits=4), setting: True}]
    config = make_config(models, prompt_file, tmp_path / "run", method="opd", teachers=teachers)
    with pytest.raises(ConfigError, match=f"{setting} is not possible for teacher 'few', which is quantised by gptq"):
        make_engine(config)
