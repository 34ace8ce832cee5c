"""Adapters and frozen heads: gradients against the chain rule, what is stored, what is refused."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from engine_helpers import loss_and_gradient, make_config, make_engine, make_samples
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file
from test_backbone import make_model
from test_sampler import Digits
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, AutoTokenizer

from opdengine.cli import main
from opdengine.config.loading import from_mapping
from opdengine.config.train import ConfigError, LoRAConfig
from opdengine.data.prompts import load_prompts
from opdengine.errors import ModelFileError
from opdengine.methods import build_method
from opdengine.models.backbone import Backbone, load_model
from opdengine.models.chat import load_tokenizer
from opdengine.models.checkpoint import list_checkpoints
from opdengine.models.lora import (
    add_adapter,
    architecture,
    base_of,
    load_adapter,
    merge_adapter,
    restore_model,
    save_model,
)
from opdengine.models.policy import policy
from opdengine.rollout.transformers import TransformersSampler
from opdengine.training.build import build_engine
from opdengine.training.run import train
from opdengine.types import Prompt, Request, SamplingParams

Models = dict[str, str]
LORA = {"r": 4, "lora_alpha": 12.0}
IDS = torch.tensor([[5, 9, 11, 30, 31, 7, 8]])


@pytest.fixture(scope="module")
def prompts(prompt_file: str) -> Sequence[Prompt]:
    return load_prompts([prompt_file]).prompts


def disturb(model: Any, scale: float = 0.1) -> Any:
    """A new adapter changes nothing, and half of its gradients are zero: move it away from there."""
    torch.manual_seed(9)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(0, scale)
    return model


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


# --- gradients -------------------------------------------------------------------------------


def test_gradients_follow_from_those_of_the_whole_weights(
    models: Models, prompt_file: str, prompts: Sequence[Prompt], tmp_path: Path
) -> None:
    """W = W0 + s B A, hence dB = s dW A' and dA = s B' dW."""
    engine = make_engine(make_config(models, prompt_file, tmp_path, lora=LORA))
    student = disturb(engine.student.model)
    samples = make_samples(engine, prompts[:4])
    loss, gradients = loss_and_gradient(engine, samples)
    factors = {n: p.detach().clone() for n, p in student.named_parameters() if "lora_" in n}
    assert gradients.keys() == factors.keys()

    whole = make_engine(make_config(models, prompt_file, tmp_path))
    base, low_rank = policy(student)
    assert low_rank is not None
    merged = {n: w + low_rank[n][0] @ low_rank[n][1] if n in low_rank else w for n, w in base}
    whole.student.model.load_state_dict(merged)
    expected_loss, expected = loss_and_gradient(whole, samples)
    assert loss == pytest.approx(expected_loss, rel=1e-5)
    scale = LORA["lora_alpha"] / LORA["r"]
    assert len(low_rank) == 14  # seven linear layers in each of two blocks
    for name in low_rank:
        stem = "base_model.model." + name.removesuffix(".weight")
        a, b = f"{stem}.lora_A.default.weight", f"{stem}.lora_B.default.weight"
        bound = {"rtol": 1e-3, "atol": 1e-4 * expected[name].abs().max().item()}
        torch.testing.assert_close(gradients[b], scale * expected[name] @ factors[a].T, **bound)
        torch.testing.assert_close(gradients[a], scale * factors[b].T @ expected[name], **bound)


def test_a_step_moves_the_adapter_alone_and_the_sampler_sees_it(
    models: Models, prompt_file: str, prompts: Sequence[Prompt], tmp_path: Path
) -> None:
    engine = make_engine(make_config(models, prompt_file, tmp_path, lora=LORA, learning_rate=0.05))
    before = {n: p.detach().clone() for n, p in engine.student.model.named_parameters()}
    for _ in range(2):
        asyncio.run(engine.step(prompts[:4]))
    moved = {n for n, p in engine.student.model.named_parameters() if not torch.equal(p, before[n])}
    assert moved == {n for n in before if "lora_" in n}
    request = Request("r", tuple(IDS[0].tolist()), 3)
    ((completion,),) = engine.sampler.generate([request], SamplingParams(max_tokens=8, top_k=5))
    ids = np.concatenate([IDS[0].numpy(), completion.token_ids])
    gaps = []
    for model in (base_of(engine.student.model), AutoModelForCausalLM.from_pretrained(models["student"])):
        with torch.no_grad():
            rows = model.eval()(input_ids=torch.from_numpy(ids)[None]).logits[0, IDS.shape[1] - 1 : -1, :300]
        threshold = rows.topk(5).values[:, -1:]
        logprobs = rows.masked_fill(rows < threshold, -torch.inf).log_softmax(-1)
        chosen = logprobs.gather(1, torch.from_numpy(completion.token_ids)[:, None])[:, 0]
        gaps.append((chosen - torch.from_numpy(completion.logprobs)).abs().max().item())
    assert gaps[0] < 1e-4 < 0.01 < gaps[1]


@pytest.mark.parametrize("family", ["qwen3", "qwen3_moe"])
def test_a_sampler_with_a_model_of_its_own_adds_the_adapter(family: str) -> None:
    own, student = make_model(family, True), add_adapter(make_model(family, True), LoRAConfig(r=3))
    sampler = TransformersSampler(own, Digits())
    for version in (1, 2):
        disturb(student, 0.1 * version)
        sampler.load_policy(version, *policy(student))
        expected = logits(student)
        torch.testing.assert_close(logits(own), expected, rtol=1e-3, atol=1e-4 * expected.abs().max().item())


@pytest.mark.parametrize("tied", [False, True])
def test_a_frozen_head_stays_and_costs_no_gradient(
    models: Models, prompt_file: str, prompts: Sequence[Prompt], tmp_path: Path, tied: bool
) -> None:
    settings = {"model": models["student" if tied else "big"], "teachers": [{"model": models["small"]}]}
    frozen = make_engine(make_config(models, prompt_file, tmp_path, method="opd", freeze_head=True, **settings))
    free = make_engine(make_config(models, prompt_file, tmp_path, method="opd", **settings))
    samples = make_samples(free, prompts[:4])

    def update(engine: Any) -> tuple[int, dict[str, torch.Tensor]]:
        with FlopCounterMode(display=False) as counter:
            _, gradients = loss_and_gradient(engine, samples)
        return counter.get_total_flops(), gradients

    flops, gradients = update(frozen)
    more, all_gradients = update(free)
    weight = frozen.student.head.weight
    rows = sum(len(sample.target_ids) for sample in samples)
    vocabulary = frozen.vocab_size
    assert more - flops == 2 * rows * vocabulary * weight.shape[1]
    head = "model.embed_tokens.weight" if tied else "lm_head.weight"
    assert all_gradients.keys() - gradients.keys() == {head}
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, all_gradients[name])
    before = weight.detach().clone()
    asyncio.run(frozen.step(prompts[:4]))
    assert torch.equal(frozen.student.head.weight, before)


# --- what an adapter is to the rest ----------------------------------------------------------


@pytest.mark.parametrize("family", ["qwen3", "gemma2", "gpt2", "cohere", "qwen3_moe", "phi"])
@pytest.mark.parametrize("rslora", [False, True])
def test_what_is_sent_is_the_merged_model(family: str, rslora: bool) -> None:
    """gpt2 stores its linear weights transposed."""
    plain = make_model(family, True)
    names = set(plain.state_dict())
    student = disturb(add_adapter(plain, LoRAConfig(r=3, lora_alpha=5, use_rslora=rslora)))
    Backbone(student)  # proves that the head and the packed input are the model's own
    base, low_rank = policy(student)
    weights = dict(base)
    assert low_rank and weights.keys() == names
    expected = logits(student)
    merged = {n: w + low_rank[n][0] @ low_rank[n][1] if n in low_rank else w for n, w in weights.items()}
    other = make_model(family, True)
    other.load_state_dict(merged)
    torch.testing.assert_close(logits(other), expected, rtol=1e-3, atol=1e-4 * expected.abs().max().item())
    assert (logits(make_model(family, True)) - expected).abs().max() > 0.01 * expected.abs().max()


def test_a_bfloat16_base_has_a_float32_adapter(models: Models) -> None:
    student = add_adapter(load_model(models["student"], dtype="bfloat16"), from_mapping(LoRAConfig, LORA))
    trained = {p.dtype for p in student.parameters() if p.requires_grad}
    assert trained == {torch.float32}
    _, low_rank = policy(student)
    assert low_rank and {t.dtype for pair in low_rank.values() for t in pair} == {torch.float32}


def test_dropout_does_not_hide_the_sampler(
    models: Models, prompt_file: str, prompts: Sequence[Prompt], tmp_path: Path
) -> None:
    """The trainer's log-probs under dropout are others than the sampler's; agreement is measured without it."""
    engine = make_engine(make_config(models, prompt_file, tmp_path, lora={**LORA, "lora_dropout": 0.5}))
    disturb(engine.student.model)
    metrics = asyncio.run(engine.step(prompts[:4])).metrics
    assert metrics["sampling/logprob_difference"] < 1e-4
    assert engine.student.has_dropout
    assert not make_engine(make_config(models, prompt_file, tmp_path, lora=LORA)).student.has_dropout


# --- folders ---------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["qwen3", "qwen3_moe", "gpt2"])
def test_a_saved_adapter_is_small_and_comes_back(family: str, tmp_path: Path) -> None:
    base, tmp_path = str(tmp_path / "base"), tmp_path / "adapter"
    make_model(family, True).save_pretrained(base)
    student = disturb(add_adapter(load_model(base), from_mapping(LoRAConfig, LORA)))
    save_model(student, tmp_path)
    assert {f.name for f in tmp_path.iterdir()} == {
        "adapter_model.safetensors", "adapter_config.json", "base_model.json",
    }  # fmt: skip
    expected = logits(student)
    again = load_adapter(load_model(base), tmp_path)
    assert torch.equal(logits(again), expected)
    assert {n for n, p in again.named_parameters() if p.requires_grad} == {
        n for n, p in student.named_parameters() if p.requires_grad
    }
    merged = load_model(str(tmp_path))  # the way of teachers and of "opdengine eval"
    assert type(merged) is type(base_of(student))
    torch.testing.assert_close(logits(merged), expected, rtol=1e-4, atol=1e-4)


def test_the_same_adapter_is_written_with_the_same_bytes_whatever_the_order_of_a_set(tmp_path: Path) -> None:
    make_model("qwen3", True).save_pretrained(tmp_path / "base")
    student = add_adapter(load_model(str(tmp_path / "base")), from_mapping(LoRAConfig, LORA))
    names = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    student.peft_config["default"].target_modules = names
    student.peft_config["default"].exclude_modules = {"lm_head", "embed_tokens", "score"}
    save_model(student, tmp_path / "adapter")
    stored = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert stored["target_modules"] == sorted(names)
    assert stored["exclude_modules"] == ["embed_tokens", "lm_head", "score"]
    save_model(load_adapter(load_model(str(tmp_path / "base")), tmp_path / "adapter"), tmp_path / "again")
    files = [(tmp_path / name / "adapter_config.json").read_bytes() for name in ("adapter", "again")]
    assert files[0] == files[1]


@pytest.mark.parametrize("adapted", [False, True])
@pytest.mark.parametrize("family", ["qwen3", "qwen3_moe", "gpt2"])
def test_saved_weights_come_back_in_place(family: str, adapted: bool, tmp_path: Path) -> None:
    base = str(tmp_path / "base")
    make_model(family, True).save_pretrained(base)
    student = load_model(base)
    if adapted:
        student = disturb(add_adapter(student, from_mapping(LoRAConfig, LORA)))
    save_model(student, tmp_path / "saved")
    expected, parameters = logits(student), list(student.parameters())
    with torch.no_grad():
        for parameter in (p for p in parameters if p.requires_grad):
            parameter.add_(torch.randn_like(parameter))
    assert not torch.equal(logits(student), expected)
    restore_model(student, tmp_path / "saved")
    assert torch.equal(logits(student), expected)
    assert all(one is other for one, other in zip(parameters, student.parameters(), strict=True))


def test_weights_of_another_model_are_not_taken(tmp_path: Path) -> None:
    make_model("qwen3", True).save_pretrained(tmp_path)
    with pytest.raises(ModelFileError):
        restore_model(make_model("qwen3_moe", True), tmp_path)


def test_an_adapter_without_a_tokenizer_has_its_bases(models: Models, tmp_path: Path) -> None:
    save_model(add_adapter(load_model(models["student"]), from_mapping(LoRAConfig, LORA)), tmp_path)
    base = load_tokenizer(models["student"])
    assert load_tokenizer(str(tmp_path)).get_vocab() == base.get_vocab()
    base.add_tokens(["<own>"])
    base.save_pretrained(tmp_path)
    assert load_tokenizer(str(tmp_path)).get_vocab() == base.get_vocab()


def test_an_adapter_is_refused_on_another_base(
    models: Models, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    save_model(add_adapter(load_model(models["student"]), from_mapping(LoRAConfig, LORA)), tmp_path)
    other = load_model(models["student"])
    with torch.no_grad():
        other.model.layers[1].mlp.up_proj.weight.add_(0.01)
    with pytest.raises(ConfigError, match=r"trained on other weights .*put that model back, or start a new run"):
        load_adapter(other, tmp_path)
    merge_adapter(other, tmp_path)
    assert "trained on other weights" in caplog.text


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_a_resumed_run_ends_with_the_same_adapter(
    models: Models, prompt_file: str, tmp_path: Path, dropout: float
) -> None:
    lora = {**LORA, "lora_dropout": dropout, "merge_final": True}
    settings = {"lora": lora, "save_steps": 1, "method": "opd", "teachers": [{"model": models["big"]}]}
    for name in ("whole", "halted"):
        train(make_config(models, prompt_file, tmp_path / name, **settings), progress=False)
    halted = tmp_path / "halted"
    for folder in (*list_checkpoints(halted / "checkpoints")[1:], halted / "final", halted / "merged"):
        shutil.rmtree(folder)
    train(make_config(models, prompt_file, halted, **settings, resume_from_checkpoint="latest"), progress=False)
    one, other = (load_file(tmp_path / n / "final" / "adapter_model.safetensors") for n in ("whole", "halted"))
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert any(value.abs().max() > 0 for name, value in one.items() if "lora_B" in name)
    merged = AutoModelForCausalLM.from_pretrained(halted / "merged")
    torch.testing.assert_close(logits(merged), logits(load_model(str(halted / "final"))), rtol=1e-5, atol=1e-5)
    assert len(AutoTokenizer.from_pretrained(halted / "final")) == len(AutoTokenizer.from_pretrained(halted / "merged"))
    assert not list((halted / "checkpoints" / "step_2" / "model").glob("model*.safetensors"))


def test_a_finished_adapter_is_a_model_like_any_other(
    models: Models, prompt_file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is graded, teaches, and is the base of a next adapter and of a next run without one."""
    settings = {"method": "opd", "teachers": [{"model": models["big"]}], "max_steps": 1, "learning_rate": 0.01}
    first, second, third = (tmp_path / name for name in ("first", "second", "third"))
    train(make_config(models, prompt_file, first, lora=LORA, **settings), progress=False)
    teachers = [{"model": str(first / "final")}, {"model": models["big"]}]
    again = {**settings, "model": str(first / "final"), "method": "mt_opd", "teachers": teachers}
    train(make_config(models, prompt_file, second, lora=LORA, save_steps=1, **again), progress=False)
    train(make_config(models, prompt_file, third, **again), progress=False)

    assert architecture(str(second / "final")) == str(Path(models["student"]).resolve())
    added, more = factors(first / "final"), factors(second / "final")
    assert len(added) == len(more) == 14
    base = load_model(models["student"]).state_dict()
    whole = load_model(str(second / "final")).state_dict()
    for name, weight in base.items():
        expected = weight + added[name] + more[name] if name in added else weight
        torch.testing.assert_close(whole[name], expected, rtol=1e-4, atol=1e-5)
    assert "model.safetensors" in {file.name for file in (third / "final").iterdir()}

    last = second / "checkpoints" / "step_1"
    config = make_config(models, prompt_file, second, lora=LORA, save_steps=1, **again)
    resumed = build_engine(config, build_method(config), load_tokenizer(config.model), last).student
    torch.testing.assert_close(logits(resumed.model), logits(load_model(str(second / "final"))), rtol=1e-4, atol=1e-4)
    data = {"train_data": [prompt_file], "eval_data": [prompt_file]}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump({"model": "m", "output_dir": "o", **data}))
    capsys.readouterr()
    assert main(["eval", "--config", str(tmp_path / "run.yaml"), "--model", str(second / "final")]) == 0
    assert "eval/accuracy" in json.loads(capsys.readouterr().out)


def test_an_adapter_as_peft_writes_it_teaches_and_is_trained(models: Models, prompt_file: str, tmp_path: Path) -> None:
    """It has neither a tokenizer nor our note on its base."""
    adapter = tmp_path / "adapter"
    disturb(add_adapter(load_model(models["student"]), from_mapping(LoRAConfig, LORA))).save_pretrained(adapter)
    assert {"tokenizer.json", "tokenizer_config.json", "base_model.json"}.isdisjoint(f.name for f in adapter.iterdir())
    assert load_tokenizer(str(adapter)).get_vocab() == load_tokenizer(models["student"]).get_vocab()
    mine = '{{ "mine" }}{% for m in messages %}{{ m.content }}{% endfor %}'
    assert load_tokenizer(str(adapter), chat_template=mine).chat_template == mine
    assert main(["eval", "--model", str(adapter), "--eval_data", prompt_file]) == 0
    settings: dict[str, Any] = {"method": "opd", "max_steps": 1, "model": str(adapter)}
    settings["teachers"] = [{"model": models["big"]}]
    train(make_config(models, prompt_file, tmp_path / "other", **settings), progress=False)
    assert (tmp_path / "other" / "final" / "tokenizer.json").is_file()
    settings |= {"model": models["student"], "teachers": [{"model": str(adapter)}], "lora": LORA}
    train(make_config(models, prompt_file, tmp_path / "third", **settings), progress=False)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("layers", [["lm_head"], ["embed_tokens"], ["lm_head", "embed_tokens"]])
def test_an_adapter_of_the_embeddings_is_what_peft_makes_of_it(
    tiny: Any, tmp_path: Path, tied: bool, layers: list[str]
) -> None:
    """peft saves the embeddings beside such an adapter; of a tied pair each then has a change of its own."""
    base = tiny.make_model(tmp_path / "base", tiny.make_tokenizer(), seed=0, tied=tied)
    torch.manual_seed(1)
    config = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj", *layers])
    adapted = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.normal_(0, 0.1)
    expected = logits(adapted)
    adapted.save_pretrained(tmp_path / "adapter")
    model = load_model(str(tmp_path / "adapter"))
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-4)
    model.save_pretrained(tmp_path / "merged")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits(again), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("config", "kind"),
    [
        (PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3), "of the kind PROMPT_TUNING"),
        (LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], lora_bias=True), "one .*lora_bias"),
    ],
)
def test_an_adapter_that_cannot_be_merged_is_refused(models: Models, tmp_path: Path, config: Any, kind: str) -> None:
    get_peft_model(AutoModelForCausalLM.from_pretrained(models["student"]), config).save_pretrained(tmp_path)
    with pytest.raises(ModelFileError, match=f"{tmp_path.name}' is {kind}.*cannot be merged.*take one that can"):
        load_model(str(tmp_path))


def factors(folder: Path) -> dict[str, torch.Tensor]:
    """Name of a weight -> what the adapter adds to it."""
    stored = load_file(folder / "adapter_model.safetensors")
    scale = LORA["lora_alpha"] / LORA["r"]
    return {
        name.removeprefix("base_model.model.").replace(".lora_A", ""): scale
        * stored[name.replace("lora_A", "lora_B")]
        @ stored[name]
        for name in stored
        if ".lora_A" in name
    }


# --- what is refused -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"target_modules": ["q_proj", "lm_head"]}, "takes in an embedding.*the loss needs the head as one matrix"),
        ({"target_modules": ["embed_tokens"]}, "takes in an embedding"),
        ({"target_modules": ["nothing"]}, r"target_modules=\['nothing'\] is not possible.*not found"),
        ({"r": 0}, r"lora\.r=0 is not possible"),
        ({"lora_dropout": 1.0}, r"lora\.lora_dropout=1\.0 is not possible"),
        ({"lora_alpha": 0.0}, r"lora\.lora_alpha=0\.0 is not possible"),
        ({"target_modules": []}, r"lora\.target_modules=\[\] is not possible"),
        ({"alpha": 3}, r"unknown setting 'lora\.alpha'; did you mean 'lora\.lora_alpha'"),
    ],
)
def test_what_cannot_be_trained_is_refused(
    models: Models, prompt_file: str, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        make_engine(make_config(models, prompt_file, tmp_path, lora={**LORA, **change}))


def test_missing_peft_names_the_remedy(
    models: Models, prompt_file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "peft" else found(name))
    with pytest.raises(ConfigError, match=r'pip install "opdengine\[train\]"'):
        make_engine(make_config(models, prompt_file, tmp_path, lora=LORA))
