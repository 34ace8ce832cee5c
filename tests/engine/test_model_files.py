"""Model folders: what is loaded is in the files, all of it, and is no part of them afterwards."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_helpers import make_config
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, Qwen3MoeConfig

from opdengine.config.loading import from_mapping
from opdengine.config.train import LoRAConfig
from opdengine.errors import ModelFileError
from opdengine.methods import build_method
from opdengine.models.backbone import check_model_path, load_model, read_dtype, read_window
from opdengine.models.chat import load_tokenizer
from opdengine.models.checkpoint import restore_optimizer
from opdengine.models.lora import add_adapter, load_adapter, save_model
from opdengine.tools.shapes import shape_of
from opdengine.training.build import build_engine
from opdengine.training.build_student import load_student
from opdengine.training.run import train

Tensors = dict[str, torch.Tensor]
LORA = from_mapping(LoRAConfig, {"r": 2, "target_modules": ["q_proj", "v_proj"]})
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0123456789abcdef\nsize 1234567\n"
NORM, EMBEDDING = "model.norm.weight", "model.embed_tokens.weight"


@pytest.fixture
def folder(models: dict[str, str], tmp_path: Path) -> Callable[[str], Path]:
    """Copies one of the models, to be damaged."""

    def copy(name: str) -> Path:
        return Path(shutil.copytree(models[name], tmp_path / f"model_{name}"))

    return copy


def change(folder: Path, edit: Callable[[Tensors], Tensors | None]) -> Tensors:
    """Edit the weights of a folder; returns those it had."""
    file = folder / "model.safetensors"
    before = load_file(file)
    weights = dict(before)
    save_file(edit(weights) or weights, file, metadata={"format": "pt"})
    return before


def without(name: str) -> Callable[[Tensors], Tensors]:
    return lambda weights: {key: value for key, value in weights.items() if key != name}


def set_config(folder: Path, **changes: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def scramble(file: Path) -> None:
    """Write other values into a safetensors file, in its place."""
    size = file.stat().st_size
    header = 8 + int.from_bytes(file.read_bytes()[:8], "little")
    with file.open("r+b") as content:
        content.seek(header)
        content.write(b"\x3e" * (size - header))


def mapped() -> set[str]:
    """The safetensors files that this process has in its memory; other tests may have left some."""
    return {line for line in Path("/proc/self/maps").read_text().splitlines() if ".safetensors" in line}


# -------------------------------------------------------------------------------------- memory


@pytest.mark.parametrize("damage", ["overwritten", "cut off"])
def test_a_model_does_not_change_with_its_file(folder: Callable[[str], Path], damage: str) -> None:
    path, others = folder("student"), mapped()
    model = load_model(str(path))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert not mapped() - others
    if damage == "overwritten":
        scramble(path / "model.safetensors")
    else:
        (path / "model.safetensors").write_bytes(b"")
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight


def test_nothing_of_a_run_stays_a_view_of_a_file(models: dict[str, str], prompt_file: str, tmp_path: Path) -> None:
    """Of the first life of a run and of its next one: student, teachers, optimiser and adapter."""
    run, others = tmp_path / "run", mapped()
    config = make_config(models, prompt_file, run, method="mt_opd", max_steps=1, save_steps=1)
    train(config, progress=False)
    checkpoint = run / "checkpoints" / "step_1"
    recipe, tokenizer = build_method(config), load_tokenizer(config.model)
    engine = build_engine(config, recipe, tokenizer, checkpoint)
    restore_optimizer(checkpoint, engine.student.model, engine.optimizer)
    assert not mapped() - others
    tensors = [*engine.student.model.parameters(), *(v for s in engine.optimizer.state.values() for v in s.values())]
    assert all(tensor.data_ptr() % 64 == 0 for tensor in tensors)  # as torch allocates them: results depend on it
    adapted = make_config(models, prompt_file, tmp_path / "adapted", lora={"r": 2}, max_steps=1, save_steps=1)
    train(adapted, progress=False)
    student = load_student(adapted, torch.device("cpu"), tmp_path / "adapted" / "checkpoints" / "step_1")
    teacher = load_model(str(tmp_path / "adapted" / "final"))
    assert not mapped() - others
    assert all(parameter.data_ptr() % 64 == 0 for m in (student, teacher) for parameter in m.parameters())


# ------------------------------------------------------------------------------ missing weights


@pytest.mark.parametrize(
    ("name", "edit", "message"),
    [
        ("student", without(NORM), rf"lacks weights that Qwen3ForCausalLM needs: {NORM}; they would"),
        ("big", without("lm_head.weight"), "lacks weights .*: lm_head.weight"),
        ("student", without(EMBEDDING), f"lacks weights .*: lm_head.weight, {EMBEDDING}"),
        ("student", lambda w: {f"module.{k}": v for k, v in w.items()}, "lacks weights .* and 20 more"),
        ("student", lambda w: w.update({"model.layers.0.mlp.up_proj.bias": torch.ones(64)}), "no place for: .*up_proj"),
        ("student", lambda w: w.update({"score.weight": torch.ones(2, 32)}), "no place for: score.weight"),
        ("big", lambda w: w.update({"lm_head.bias": torch.ones(316)}), "no place for: lm_head.bias"),
        ("student", lambda w: w.update({NORM: torch.ones(33)}), rf"{NORM} \(33,\) instead of \(32,\)"),
    ],
)  # fmt: skip
def test_weights_that_do_not_fit_are_refused_by_name(
    folder: Callable[[str], Path], name: str, edit: Callable[[Tensors], Tensors | None], message: str,
    capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    path = folder(name)
    change(path, edit)
    with pytest.raises(ModelFileError, match=message):
        load_model(str(path))
    assert "LOAD REPORT" not in capfd.readouterr().err


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"num_hidden_layers": 3, "layer_types": None},
            r"lacks weights .*: model.layers.2.input_layernorm.weight.* and 6 more",
        ),
        (
            {"num_hidden_layers": 1, "layer_types": None},
            r"no place for: model.layers.1.input_layernorm.weight.* and 6 more",
        ),
        ({"attention_bias": True}, "lacks weights .*k_proj.bias"),
        ({"intermediate_size": 72}, r"of other shapes .*down_proj.weight \(32, 64\) instead of \(32, 72\)"),
        ({"tie_word_embeddings": False}, "lacks weights .*: lm_head.weight;"),
        ({"num_hidden_layers": 1}, "cannot be read: .*must be equal to the number of `layer_types`"),
    ],
)
def test_a_configuration_of_another_model_is_refused(
    folder: Callable[[str], Path], changes: dict[str, Any], message: str
) -> None:
    path = folder("student")
    set_config(path, **changes)
    with pytest.raises(ModelFileError, match=message):
        load_model(str(path))


def test_what_a_model_does_not_need_is_no_fault(
    folder: Callable[[str], Path], caplog: pytest.LogCaptureFixture
) -> None:
    """Buffers of older versions, a vision tower, a value head, layers that predict later tokens, dtypes."""
    path = folder("student")
    set_config(path, num_nextn_predict_layers=1)
    extra = ["model.visual.blocks.0.attn.qkv.weight", "multi_modal_projector.linear_1.bias", "v_head.summary.weight",
             "mtp.layers.0.mlp.up_proj.weight", "model.layers.2.mlp.up_proj.weight"]  # fmt: skip
    weights = change(
        path,
        lambda w: {
            **{name: value.clone() for name, value in w.items() if name != NORM},
            NORM: w[NORM].double(),
            "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8),
            **{name: torch.ones(2, 2) for name in extra},
        },
    )
    with caplog.at_level(logging.INFO, logger="opdengine"):
        model = load_model(str(path))
    assert all(torch.equal(model.state_dict()[name], value) for name, value in weights.items())
    assert "not part of the language model and left out: model.layers.2.mlp.up_proj.weight" in caplog.text


def test_experts_that_are_one_tensor_in_memory_are_refused_by_name(tokenizer: Any, tmp_path: Path) -> None:
    config = Qwen3MoeConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=16, moe_intermediate_size=8, num_experts=4,
        num_experts_per_tok=2, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1, head_dim=8,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(tmp_path)
    again = load_model(str(tmp_path))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    whole = load_file(tmp_path / "model.safetensors")
    for gone in ("mlp.experts.2.", "mlp.experts.2.up_proj", "mlp.experts."):
        save_file({n: w for n, w in whole.items() if gone not in n}, tmp_path / "model.safetensors", {"format": "pt"})
        with pytest.raises(ModelFileError, match=r"model.layers.0.mlp.experts.gate_up_proj"):
            load_model(str(tmp_path))


@pytest.mark.parametrize("name", ["student", "big"], ids=["tied", "not tied"])
def test_a_classifier_is_no_language_model(folder: Callable[[str], Path], name: str, tmp_path: Path) -> None:
    path = folder(name)
    model = AutoModelForSequenceClassification.from_pretrained(path, num_labels=2)
    model.save_pretrained(tmp_path / "classifier")
    with pytest.raises(ModelFileError, match=r"(score|lm_head).weight \(it was saved as Qwen3ForSequenceCl"):
        load_model(str(tmp_path / "classifier"))


def test_an_adapter_that_lacks_weights_is_refused(models: dict[str, str], tmp_path: Path) -> None:
    save_model(add_adapter(load_model(models["student"]), LORA), tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    whole = load_file(file)
    first = sorted(whole)[0]

    def refused(weights: Tensors, message: str) -> None:
        save_file(weights, file, metadata={"format": "pt"})
        for load in (lambda: load_adapter(load_model(models["student"]), tmp_path), lambda: load_model(str(tmp_path))):
            with pytest.raises(ModelFileError, match=message):
                load()

    refused({n: w for n, w in whole.items() if n != first}, f"lacks weights: {first}")
    refused({**whole, first.replace("q_proj", "o_proj"): whole[first].clone()}, "no place for: .*o_proj")
    refused({**whole, first: torch.ones(3, 32)}, "does not fit the model .*size mismatch")
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(ModelFileError, match=r"adapter_model.safetensors' is damaged or cut off"):
        load_model(str(tmp_path))


# --------------------------------------------------------------------------------------- files


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
def test_a_pointer_of_git_lfs_is_named(folder: Callable[[str], Path], name: str) -> None:
    path = folder("big")
    (path / name).write_text(POINTER)
    with pytest.raises(ModelFileError, match=rf"{name}' is a git-LFS pointer.*git lfs pull"):
        check_model_path(str(path))
    with pytest.raises(ModelFileError, match="git-LFS pointer"):
        load_tokenizer(str(path))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda p: (p / "model.safetensors").write_bytes(b""), "damaged or cut off"),
        (lambda p: (p / "model.safetensors").write_bytes(b"not safetensors at all"), "damaged or cut off"),
        (lambda p: (p / "model.safetensors").write_bytes((p / "model.safetensors").read_bytes()[:-4]), "cut off"),
        (lambda p: (p / "config.json").write_text("{"), "config.json' is not JSON"),
        (lambda p: (p / "config.json").write_text("[]"), "config.json' is not a JSON object"),
        (lambda p: (p / "config.json").write_text("[" * 100_000), "config.json' is not JSON"),
    ],
)
def test_damaged_files_are_refused_before_anything_is_loaded(
    folder: Callable[[str], Path], damage: Callable[[Path], object], message: str
) -> None:
    path = folder("student")
    damage(path)
    with pytest.raises(ModelFileError, match=message):
        check_model_path(str(path))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"model_type": "qwen3", "hidden_size": "wide"}', "expected int, got str"),
        ('{"model_type": "no such model"}', "no such model"),
        ("{}", "model_type"),
    ],
)
def test_a_configuration_that_cannot_be_read_is_one_sentence(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "config.json").write_text(text)
    for read in (read_window, read_dtype, shape_of):
        with pytest.raises(ValueError, match=rf"the configuration of the model .* cannot be read: .*{message}"):
            read(str(tmp_path))


@pytest.mark.parametrize(
    ("base", "message"),
    [
        (None, "does not name the model that the adapter belongs to"),
        ("./adapter_of_itself", "is said to be its own base"),
        ("/no/such/folder", "'/no/such/folder' does not exist"),
    ],
)
def test_an_adapter_without_its_base_is_refused(
    tmp_path: Path, base: str | None, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = Path("adapter_of_itself")
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": base}))
    save_file({"x": torch.ones(1)}, folder / "adapter_model.safetensors")
    with pytest.raises(ModelFileError if base != "/no/such/folder" else ValueError, match=message):
        check_model_path("./adapter_of_itself")


def test_a_tokenizer_that_is_cut_off_is_one_sentence(folder: Callable[[str], Path]) -> None:
    path = folder("student")
    (path / "tokenizer.json").write_text((path / "tokenizer.json").read_text()[:200])
    with pytest.raises(ValueError, match="no tokenizer could be loaded from the folder"):
        load_tokenizer(str(path))


def test_files_in_parts_are_all_needed(folder: Callable[[str], Path]) -> None:
    path = folder("big")
    model = load_model(str(path))
    (path / "model.safetensors").unlink()
    model.save_pretrained(path, max_shard_size="60KB")
    parts = sorted(path.glob("model-*.safetensors"))
    assert len(parts) > 2
    again = load_model(str(path))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))

    kept = parts[1].read_bytes()
    parts[1].unlink()
    with pytest.raises(ModelFileError, match=rf"'.*{parts[1].name}' that model.safetensors.index.json names is mis"):
        check_model_path(str(path))
    parts[1].write_bytes(parts[0].read_bytes())
    with pytest.raises(ModelFileError, match=rf"'.*{parts[1].name}' has tensors which it lacks: "):
        check_model_path(str(path))
    parts[1].write_text(POINTER)
    with pytest.raises(ModelFileError, match="git-LFS pointer"):
        check_model_path(str(path))
    parts[1].write_bytes(kept)
    check_model_path(str(path))
    (path / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(ModelFileError, match="no 'weight_map'"):
        check_model_path(str(path))
