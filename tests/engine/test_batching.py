"""What a batch does to a sequence: position encodings, layouts, causality, and what is random in training."""

from __future__ import annotations

import asyncio
import copy
import dataclasses
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as hf
from engine_helpers import make_config, make_engine
from test_backbone import COMMON, VOCAB, make_model
from test_sampler import Digits

from opdengine.config.train import ConfigError
from opdengine.data.prompts import load_prompts
from opdengine.models.backbone import Backbone
from opdengine.models.batching import find_regimes, forward_options
from opdengine.models.packing import Regimes, pack
from opdengine.rollout.transformers import TransformersSampler
from opdengine.teachers import prefix
from opdengine.teachers.prefix import PrefixScorer
from opdengine.types import Completion, Request, SamplingParams

LONG = {"max_position_embeddings": 256, "original_max_position_embeddings": 64}
SWITCHING: dict[str, Any] = {
    "longrope": lambda: hf.Phi3Config(
        **COMMON | LONG,
        rope_scaling={"type": "longrope", "short_factor": [1.0] * 4, "long_factor": [1.5, 4.0, 16.0, 40.0]},
    ),
    "dynamic": lambda: hf.LlamaConfig(
        **COMMON | {"max_position_embeddings": 64}, rope_scaling={"rope_type": "dynamic", "factor": 4.0}
    ),
}


def switching(name: str) -> Any:
    torch.manual_seed(0)
    model = hf.AutoModelForCausalLM.from_config(SWITCHING[name]()).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(8.0)
    return model


def alone(model: Any, ids: Any) -> torch.Tensor:
    """[L, V] log-probs of a copy of the model that has never read anything else."""
    fresh = copy.deepcopy(model)
    for module in fresh.modules():
        if hasattr(module, "original_inv_freq"):
            module.inv_freq = module.original_inv_freq.clone()
            module.max_seq_len_cached = module.original_max_seq_len
    with torch.no_grad():
        return fresh(input_ids=torch.as_tensor(ids)[None], use_cache=False).logits[0].log_softmax(-1)


# ------------------------------------------------------- position encodings of the longest sequence


@pytest.mark.parametrize("name", SWITCHING)
def test_a_sequence_keeps_its_position_encoding_beside_longer_ones(name: str) -> None:
    model = switching(name)
    backbone = Backbone(model, max_tokens=1000)
    assert backbone.regimes == Regimes(64, moving=name == "dynamic")
    rng = np.random.default_rng(0)
    sequences = [rng.integers(2, VOCAB, n) for n in (120, 30, 64, 65, 100, 20, 120)]
    for _ in range(2):  # a dynamic encoding keeps that of the longest sequence
        states = backbone.score(sequences, [np.arange(1, len(s)) for s in sequences])
        for ids, hidden in zip(sequences, states, strict=True):
            ours = backbone.head.logits(hidden).log_softmax(-1)
            torch.testing.assert_close(ours, alone(model, ids)[:-1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3", "mixtral"])
def test_one_regime(family: str) -> None:
    assert Backbone(make_model(family, True)).regimes == Regimes()


def test_a_model_that_does_not_say_how_long_its_sequences_may_be() -> None:
    config = hf.MambaConfig(vocab_size=VOCAB, hidden_size=32, state_size=8, num_hidden_layers=1)
    model = hf.AutoModelForCausalLM.from_config(config)
    assert find_regimes(model, lambda ids, positions: pytest.fail("it has no positions")) == Regimes()


@pytest.mark.parametrize("moving", [False, True])
def test_batches_hold_one_regime(moving: bool) -> None:
    lengths = [3, 70, 65, 64, 70, 9, 200]
    sequences = [np.arange(n) for n in lengths]
    regimes = Regimes(64, moving)
    for layout in ("rows", "one_row", "padded", "alone"):
        batches = pack(sequences, max_tokens=500, layout=layout, regimes=regimes)
        assert sorted(i for b in batches for i in b.members) == list(range(7))
        for batch in batches:
            assert len({regimes.of(lengths[i]) for i in batch.members}) == 1
            assert not moving or len({lengths[i] for i in batch.members if lengths[i] > 64}) <= 1
            if max(lengths[i] for i in batch.members) <= 64:
                assert batch.position_ids.max() < 64
        assert layout != "alone" or len(batches) == 7


def check_sampled(model: Any, request: Request, completion: Completion) -> None:
    """Every token has the log-prob that the model gives after exactly the tokens before it."""
    ids = [*request.token_ids, *completion.token_ids.tolist()]
    for place, logprob in enumerate(completion.logprobs.tolist(), start=len(request.token_ids)):
        assert alone(model, ids[:place])[-1, ids[place]].item() == pytest.approx(logprob, abs=1e-4)


def test_the_sampler_keeps_regimes_apart_and_reads_anew_where_a_sequence_comes_into_another() -> None:
    model = switching("longrope")
    sampler = TransformersSampler(model, Digits())
    sampler.stop_ids = tuple(range(8))
    rng = np.random.default_rng(0)
    requests = [Request(str(n), tuple(rng.integers(8, VOCAB, n).tolist()), n) for n in (5, 60, 90, 40, 64, 70)]
    result = sampler.generate(requests, SamplingParams(max_tokens=12, n=2, seed=1))
    for request, completions in zip(requests, result, strict=True):
        for completion in completions:
            check_sampled(model, request, completion)


def test_a_student_that_would_be_sampled_across_the_switch_is_refused(
    models: dict[str, str], prompt_file: str, tmp_path: Path, tokenizer: Any
) -> None:
    config = SWITCHING["longrope"]()
    config.vocab_size, config.eos_token_id = len(tokenizer), tokenizer.eos_token_id
    student = hf.AutoModelForCausalLM.from_config(config)
    student.save_pretrained(tmp_path / "student")
    tokenizer.save_pretrained(tmp_path / "student")
    mine = models | {"student": str(tmp_path / "student")}
    fits = make_config(mine, prompt_file, tmp_path / "out", max_prompt_length=40, max_completion_length=24)
    assert make_engine(fits).student.regimes.switch == 64
    with pytest.raises(ConfigError, match=r"more than 64 tokens.*max_completion_length to at most 64 \(now 65\)"):
        make_engine(dataclasses.replace(fits, max_completion_length=25))


def test_a_shared_prefix_is_read_once_within_one_regime_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefix, "LEAST_SAVED", 1)
    model = switching("longrope")
    scorer = PrefixScorer(Backbone(model))
    rng = np.random.default_rng(0)
    for lengths in ((50, 60, 64), (50, 60, 90)):
        start = rng.integers(2, VOCAB, 45)
        sequences = [np.concatenate([start, rng.integers(2, VOCAB, n - 45)]) for n in lengths]
        found = scorer.score(sequences, [np.arange(46, n) for n in lengths])
        for ids, hidden in zip(sequences, found, strict=True):
            ours = scorer.backbone.head.logits(hidden).log_softmax(-1)
            torch.testing.assert_close(ours, alone(model, ids)[45:-1], rtol=1e-4, atol=1e-4)


def test_a_prefix_is_shared_where_its_products_cost_more_than_two_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two sequences of 40 + 8 tokens: 96 are read where sharing does not pay, and 39 + 9 + 9 where it does."""
    scorer = PrefixScorer(Backbone(make_model("llama", True)))
    trunk = scorer.backbone.trunk
    weights = sum(p.numel() for p in trunk.parameters()) - trunk.get_input_embeddings().weight.numel()
    rng = np.random.default_rng(0)
    start = rng.integers(2, VOCAB, 40)
    sequences = [np.concatenate([start, rng.integers(2, VOCAB, 8)]) for _ in range(2)]
    read: list[int] = []
    trunk.register_forward_pre_hook(lambda _, args, kwargs: read.append(kwargs["input_ids"].numel()), with_kwargs=True)
    for saved, expected in ((40, 96), (39, 57)):
        monkeypatch.setattr(prefix, "LEAST_WORK", 2.0 * weights * saved)
        scorer._exact = True
        read.clear()
        scorer.score(sequences, [np.arange(40, 48)] * 2)
        assert sum(read) == expected
    # One long continuation: the others would be filled up to it, which costs more than their start saves.
    monkeypatch.setattr(prefix, "LEAST_WORK", 2.0 * weights)
    sequences.append(np.concatenate([start, rng.integers(2, VOCAB, 60)]))
    read.clear()
    scorer.score(sequences, [np.arange(40, len(ids)) for ids in sequences])
    assert sum(read) < 39 + 3 * 61
    monkeypatch.setattr(type(scorer.backbone), "device", torch.device("cuda"))
    assert scorer.least_saved == prefix.LEAST_SAVED


# -------------------------------------------------------------------------- layouts and causality


def meddle(model: Any, change: Any) -> Any:
    """Change the output [B, L, d] of the last layer's feed-forward part."""
    model.model.layers[-1].mlp.register_forward_hook(lambda module, inputs, output: change(output))
    return model


def test_sequences_that_change_each_other_in_every_batch_are_read_alone(caplog: pytest.LogCaptureFixture) -> None:
    model = meddle(make_model("llama", True), lambda x: x + x[:, :1].mean(0, keepdim=True) * (len(x) > 1)).eval()
    backbone = Backbone(model, "student")
    assert backbone.layout == "alone" and "alone, which is slow" in caplog.text
    sequences = [np.arange(2, n) for n in (9, 30, 17)]
    states = backbone.score(sequences, [np.arange(1, len(s)) for s in sequences])
    for ids, hidden in zip(sequences, states, strict=True):
        ours = backbone.head.logits(hidden).log_softmax(-1)
        torch.testing.assert_close(ours, alone(model, ids)[:-1], rtol=1e-4, atol=1e-4)


def test_a_window_that_only_longer_sequences_reach_is_crossed(caplog: pytest.LogCaptureFixture) -> None:
    """Beyond 50 tokens this model mixes the sequences of a batch; its configuration names that length."""
    model = make_model("llama", True)
    model.config.block_size = 50
    meddle(model, lambda x: x + x[:, 50:].mean((0, 1)) if x.shape[1] > 50 and len(x) > 1 else x)
    assert Backbone(model).layout == "alone"
    model.config.block_size = 200  # beyond its window: never crossed
    assert Backbone(model).layout != "alone"


def test_models_whose_tokens_see_later_ones_are_refused() -> None:
    seeing = hf.BertGenerationConfig(**COMMON, is_decoder=False)
    with pytest.raises(ValueError, match=r"teacher 'b': .* depend on later tokens .*only causal"):
        Backbone(hf.AutoModelForCausalLM.from_config(seeing), "teacher 'b'")
    model = meddle(make_model("llama", True), lambda x: x + 0.1 * x.flip(1).cumsum(1).flip(1))
    with pytest.raises(ValueError, match="depend on later tokens"):
        Backbone(model)


def test_in_16_bits_a_token_may_round_otherwise_in_a_longer_pass_and_may_not_see_later_tokens() -> None:
    """The states move by some percent with the number of tokens, as those of a deep model do."""

    def rounded(x: torch.Tensor) -> torch.Tensor:
        noise = torch.rand(x.shape[-1], generator=torch.Generator().manual_seed(x.shape[1]))
        return x + 0.4 * (x[:, :1].abs().amax(-1, keepdim=True) * (noise - 0.5)).to(x.dtype)

    with pytest.raises(ValueError, match="depend on later tokens"):
        Backbone(meddle(make_model("llama", True), rounded))
    deep = Backbone(meddle(make_model("llama", True).bfloat16(), rounded))
    assert 0.05 < deep.tolerance <= 0.2 and deep.layout != "alone"
    meddled = meddle(make_model("llama", True).bfloat16(), lambda x: x + 0.1 * x.flip(1).cumsum(1).flip(1))
    bert = hf.AutoModelForCausalLM.from_config(hf.BertGenerationConfig(**COMMON, is_decoder=False)).bfloat16()
    for seeing in (meddled, bert):
        with pytest.raises(ValueError, match="depend on later tokens"):
            Backbone(seeing)


def test_a_model_that_is_random_in_evaluation_mode_is_refused() -> None:
    model = meddle(make_model("llama", True), lambda x: x + 0.1 * torch.randn(x.shape))
    with pytest.raises(ValueError, match="student: the same tokens get different hidden states"):
        Backbone(model, "student")


@pytest.mark.parametrize(
    "config",
    [
        lambda: hf.BartConfig(vocab_size=VOCAB, d_model=32, decoder_layers=1, decoder_attention_heads=2),
        lambda: hf.ElectraConfig(**COMMON, is_decoder=True),
        lambda: hf.BertConfig(**COMMON, is_decoder=True),
    ],
)
def test_what_is_no_decoder_with_a_linear_head_is_refused_without_a_traceback(config: Any) -> None:
    with pytest.raises(ValueError, match=r"teacher 'x': \w+ (has no separate|computes its logits|has another layer)"):
        Backbone(hf.AutoModelForCausalLM.from_config(config()), "teacher 'x'")


# ------------------------------------------------------------------------------ random in training


GPT2 = {"vocab_size": VOCAB, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128}
OPT = {"vocab_size": VOCAB, "hidden_size": 32, "ffn_dim": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
       "max_position_embeddings": 128, "word_embed_proj_dim": 32, "attention_dropout": 0.0}  # fmt: skip
RANDOM: dict[str, Any] = {
    "granite, attention": lambda: hf.GraniteConfig(**COMMON, attention_dropout=0.1),
    "qwen3, attention": lambda: hf.Qwen3Config(**COMMON, head_dim=8, attention_dropout=0.001),
    "gpt2, residuals": lambda: hf.GPT2Config(**GPT2, attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.1),
    "opt, functional": lambda: hf.OPTConfig(**OPT, dropout=0.1),
    "opt, layers": lambda: hf.OPTConfig(**OPT, dropout=0.0, layerdrop=0.001),
    "phimoe, router": lambda: hf.PhimoeConfig(**COMMON, num_local_experts=4, router_jitter_noise=0.01),
    "mixtral, router": lambda: hf.MixtralConfig(**COMMON, num_local_experts=4, router_jitter_noise=0.01),
}


@pytest.mark.parametrize("name", RANDOM)
def test_whatever_is_random_in_training_is_seen(name: str) -> None:
    model = hf.AutoModelForCausalLM.from_config(RANDOM[name]())
    model.train()
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    assert Backbone(model).has_dropout
    assert model.training
    assert torch.equal(torch.get_rng_state(), states[0])
    assert (random.getstate(), np.random.get_state()[1].tolist()) == states[1:]
    assert not Backbone(model.requires_grad_(False)).has_dropout  # it is never trained


@pytest.mark.parametrize("family", ["qwen3", "granite", "gpt2", "mixtral", "gemma2"])
def test_nothing_is_random_without_dropout(family: str) -> None:
    assert not Backbone(make_model(family, True)).has_dropout


def test_attention_dropout_is_left_out_of_what_is_compared_with_the_sampler(
    models: dict[str, str], prompt_file: str, tmp_path: Path, tokenizer: Any
) -> None:
    torch.manual_seed(1)
    settings = COMMON | {"vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id,
                         "pad_token_id": tokenizer.pad_token_id, "max_position_embeddings": 1024}  # fmt: skip
    model = hf.AutoModelForCausalLM.from_config(hf.GraniteConfig(**settings, attention_dropout=0.1))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.copy_(torch.randn_like(parameter) / parameter.shape[1] ** 0.5 * 1.5)
    model.save_pretrained(tmp_path / "student")
    tokenizer.save_pretrained(tmp_path / "student")
    mine = models | {"student": str(tmp_path / "student")}
    engine = make_engine(make_config(mine, prompt_file, tmp_path / "out", max_completion_length=24))
    metrics = asyncio.run(engine.step(load_prompts([prompt_file]).prompts[:4])).metrics
    assert metrics["sampling/logprob_difference"] < 1e-5


# --------------------------------------------------------------------- what a configuration asks for


FLAGS = [
    {"output_router_logits": True},
    {"output_hidden_states": True},
    {"use_cache": False},
    {"return_dict": False},
    {"output_router_logits": True, "output_hidden_states": True, "use_cache": False, "return_dict": False},
]


@pytest.mark.parametrize("flags", FLAGS, ids=lambda flags: "+".join(flags))
@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral"])
def test_what_a_saved_configuration_asks_for_besides_changes_nothing(family: str, flags: dict[str, bool]) -> None:
    plain = make_model(family, True).eval()
    config = copy.deepcopy(plain.config)
    for name, value in flags.items():
        setattr(config, name, value)
    model = hf.AutoModelForCausalLM.from_config(config).eval()
    model.load_state_dict(plain.state_dict())
    before = json.loads(model.config.to_json_string()) | {"return_dict": True}  # else transformers itself fails
    requests = [Request("a", (3, 4, 5)), Request("b", (3, 4, 5, 6, 7))]
    found = []
    for one in (plain, model):
        sampler = TransformersSampler(one, Digits())
        samples = sampler.generate(requests, SamplingParams(max_tokens=4, n=2, seed=3))
        backbone = Backbone(one)
        sequence = np.arange(2, 20)
        (states,) = backbone.score([sequence], [np.arange(1, 18)])
        found.append(([c.token_ids.tolist() for cs in samples for c in cs], states, backbone.layout))
    assert found[0][0] == found[1][0] and found[0][2] == found[1][2]
    torch.testing.assert_close(found[0][1], found[1][1])
    after = json.loads(model.config.to_json_string())
    assert {"return_dict": True} | after == before  # what is saved later stays as it was


def test_attentions_are_not_returned_either() -> None:
    config = hf.LlamaConfig(**COMMON, attn_implementation="eager", output_attentions=True)
    model = hf.AutoModelForCausalLM.from_config(config).eval()
    assert forward_options(model) == {"output_attentions": False}
    assert Backbone(model).layout == "rows"
    TransformersSampler(model, Digits()).generate([Request("a", (3, 4, 5))], SamplingParams(max_tokens=3))
