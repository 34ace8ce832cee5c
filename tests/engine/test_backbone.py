"""Backbone, head and packing of many architectures against each model's own logits."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import transformers as hf

from opdengine.loss.objective import Objective
from opdengine.models.backbone import Backbone
from opdengine.models.packing import LAYOUTS, pack, split_by_tokens
from opdengine.types import Hidden, Prompt, Sample, TeacherContext, Turn

VOCAB = 120
COMMON: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": None,
    "eos_token_id": 1,
    "pad_token_id": 0,
}
GEMMA = {"head_dim": 8, "sliding_window": 4, "query_pre_attn_scalar": 8, "final_logit_softcapping": 3.0}
MOE = {"num_experts_per_tok": 2}
FAMILIES: dict[str, Callable[[bool], Any]] = {
    "qwen3": lambda tied: hf.Qwen3Config(**COMMON, head_dim=8, tie_word_embeddings=tied),
    "llama": lambda tied: hf.LlamaConfig(**COMMON, tie_word_embeddings=tied),
    "gemma2": lambda tied: hf.Gemma2Config(**COMMON, **GEMMA, attn_logit_softcapping=5.0, tie_word_embeddings=tied),
    "gemma3": lambda tied: hf.Gemma3TextConfig(**COMMON, **GEMMA, tie_word_embeddings=tied),
    "mixtral": lambda tied: hf.MixtralConfig(**COMMON, **MOE, num_local_experts=4, tie_word_embeddings=tied),
    "qwen3_moe": lambda tied: hf.Qwen3MoeConfig(
        **COMMON, **MOE, head_dim=8, num_experts=4, moe_intermediate_size=24, tie_word_embeddings=tied
    ),
    "granite": lambda tied: hf.GraniteConfig(
        **COMMON, logits_scaling=4.0, embedding_multiplier=3.0, tie_word_embeddings=tied
    ),
    "cohere": lambda tied: hf.CohereConfig(**COMMON, logit_scale=0.25, tie_word_embeddings=tied),
    "gpt2": lambda tied: hf.GPT2Config(
        vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=4, n_positions=128, bos_token_id=None, eos_token_id=1,
        attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0, tie_word_embeddings=tied,
    ),
    "phi": lambda tied: hf.PhiConfig(**COMMON, tie_word_embeddings=tied),
}  # fmt: skip
LENGTHS = (17, 5, 9, 3, 3, 7, 11)


def make_model(family: str, tied: bool, *, scale: float = 4.0) -> Any:
    """Random weights large enough that a wrong position, neighbour or scale shows."""
    torch.manual_seed(0)
    config = FAMILIES[family](tied)
    config._attn_implementation = "eager" if getattr(config, "attn_logit_softcapping", None) else "sdpa"
    model = hf.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() >= 2:
                parameter.mul_(scale)
            elif name.endswith("bias"):
                parameter.normal_()
    return model


def make_sequences() -> tuple[list[np.ndarray], list[np.ndarray]]:
    rng = np.random.default_rng(0)
    sequences = [rng.integers(2, VOCAB, size=n) for n in LENGTHS]
    return sequences, [np.arange(2, n) for n in LENGTHS]


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("family", FAMILIES)
def test_hidden_states_and_head_give_the_models_own_logits_in_every_layout(family: str, tied: bool) -> None:
    model = make_model(family, tied)
    backbone = Backbone(model)
    model.eval()
    assert (model.get_input_embeddings().weight is model.get_output_embeddings().weight) == tied
    assert backbone.layout == "rows"
    sequences, positions = make_sequences()
    for layout in LAYOUTS:
        rows_shared = False
        for batch in pack(sequences, max_tokens=48, layout=layout):
            rows_shared |= len(batch.members) > batch.input_ids.shape[0]
            with torch.no_grad():
                hidden = backbone.hidden(batch, [positions[i] for i in batch.members])
                ours = backbone.head.logits(hidden)
                theirs = torch.cat(
                    [
                        model(input_ids=torch.from_numpy(sequences[i])[None]).logits[0, positions[i] - 1]
                        for i in batch.members
                    ]
                )
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
        assert rows_shared == (layout in ("one_row", "rows"))


@pytest.mark.parametrize(
    ("family", "tied"),
    [(f, t) for f in FAMILIES for t in (True, False) if t or f in ("qwen3", "gemma2", "mixtral")],
)
def test_packed_and_padded_batches_give_the_same_loss_and_gradient(family: str, tied: bool) -> None:
    student, teacher = Backbone(make_model(family, tied)), Backbone(make_model("llama", False, scale=6.0))
    sequences, positions = make_sequences()
    samples = [
        Sample(str(i), Prompt(str(i), ()), (Turn("prompt", s[:2]), Turn("assistant", s[2:], trains=True)))
        for i, s in enumerate(sequences)
    ]
    judged = teacher.score(sequences, positions)
    total = sum(map(len, positions))
    for sample, hidden, p in zip(samples, judged, positions, strict=True):
        sample.contexts = (TeacherContext(sample.id, "t", sample.token_ids, p),)
        sample.teacher_targets = (Hidden(hidden),)
        sample.kl_weight = np.full(len(p), 1 / total, np.float32)
    objective = Objective({"t": teacher.head}, lambda key: "jsd")
    found = {}
    for layout, max_tokens in [("padded", 1), ("padded", 60), ("rows", 60), ("rows", 1000), ("one_row", 1000)]:
        student.model.zero_grad()
        loss = 0.0
        for batch in pack(sequences, max_tokens=max_tokens, layout=layout):
            hidden = student.hidden(batch, [positions[i] for i in batch.members])
            part = objective(hidden, student.head, [samples[i] for i in batch.members])
            part.backward()
            loss += part.item()
        found[layout, max_tokens] = (loss, {n: p.grad.clone() for n, p in student.model.named_parameters()
                                            if p.grad is not None})  # fmt: skip
    alone_loss, alone = found.pop(("padded", 1))
    assert alone_loss > 1e-3
    largest = max(g.abs().max().item() for g in alone.values())
    for loss, gradients in found.values():
        assert loss == pytest.approx(alone_loss, rel=1e-5)
        for name, expected in alone.items():
            torch.testing.assert_close(gradients[name], expected, rtol=1e-3, atol=2e-5 * largest, msg=name)


def test_the_padded_fallback_of_a_recurrent_model(caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(0)
    config = hf.MambaConfig(
        vocab_size=VOCAB, hidden_size=32, state_size=8, num_hidden_layers=2, bos_token_id=None, eos_token_id=1
    )
    model = hf.AutoModelForCausalLM.from_config(config).eval()
    with caplog.at_level(logging.WARNING, "opdengine"):
        backbone = Backbone(model, "mamba")
    assert backbone.layout == "padded"
    assert "padded" in caplog.text
    sequences, positions = make_sequences()
    for ours, ids, where in zip(backbone.score(sequences, positions), sequences, positions, strict=True):
        with torch.no_grad():
            theirs = model(input_ids=torch.from_numpy(ids)[None]).logits[0, where - 1]
        torch.testing.assert_close(backbone.head.logits(ours), theirs, rtol=1e-4, atol=1e-4)


def test_a_head_that_is_something_else_is_refused() -> None:
    model = make_model("llama", False)

    class Clipped(torch.nn.Linear):
        def forward(self, hidden: torch.Tensor) -> torch.Tensor:
            return super().forward(hidden).clamp(max=0.1)

    model.lm_head.__class__ = Clipped
    with pytest.raises(ValueError, match=r"teacher 'x'.*LlamaForCausalLM.*cannot be used in a fused loss"):
        Backbone(model, "teacher 'x'")


def test_a_scale_that_the_configuration_does_not_tell_is_refused() -> None:
    model = make_model("granite", True)
    model.config.logits_scaling = 5.0
    plain = model.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        output = plain(*args, **kwargs)
        output.logits = output.logits * 3
        return output

    model.forward = forward
    with pytest.raises(ValueError, match="cannot be used in a fused loss"):
        Backbone(model)


def test_a_model_without_a_head_is_refused() -> None:
    model = hf.AutoModel.from_config(FAMILIES["llama"](True))
    with pytest.raises(ValueError, match="no separate backbone"):
        Backbone(model)


def test_batches_stay_within_the_token_budget_and_hold_every_sequence_once() -> None:
    rng = np.random.default_rng(1)
    lengths = rng.integers(1, 60, size=200).tolist()
    sequences = [np.arange(n) for n in lengths]
    for layout in LAYOUTS:
        batches = pack(sequences, max_tokens=100, layout=layout)
        assert sorted(i for b in batches for i in b.members) == list(range(200))
        for batch in batches:
            used = sum(lengths[i] for i in batch.members)
            assert used <= 100
            flat, places = batch.input_ids.flatten(), batch.position_ids.flatten()
            for i, start in zip(batch.members, batch.offsets, strict=True):
                assert flat[start : start + lengths[i]].tolist() == list(range(lengths[i]))
                assert places[start : start + lengths[i]].tolist() == list(range(lengths[i]))
            if layout == "padded":  # what is held, not only what is used
                assert batch.input_ids.numel() <= 100
    # Longer than the budget: alone, not refused.
    assert split_by_tokens([3, 500, 4], 100) == [[1], [2, 0]]
    with pytest.raises(ValueError, match="sequence 1 is empty"):
        pack([np.arange(3), np.arange(0)], max_tokens=10)
