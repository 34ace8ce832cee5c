"""Weights are sent to vLLM by the names of the checkpoint, or not at all."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file

from opdengine.errors import ConfigError
from opdengine.models.backbone import load_model
from opdengine.models.policy import policy
from opdengine.rollout.vllm.weight_names import as_in_checkpoint, checkpoint_names, find_naming

TEXT: dict[str, Any] = {
    "vocab_size": 160, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 1,
}  # fmt: skip
HYBRID = {
    "layer_types": ["linear_attention", "full_attention"], "linear_num_key_heads": 2, "linear_num_value_heads": 4,
    "linear_key_head_dim": 8, "linear_value_head_dim": 8,
}  # fmt: skip
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
SEEN = {"depth": 1, "hidden_size": 16, "num_heads": 2, "intermediate_size": 16, "out_hidden_size": 32}
SIGLIP = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
          "image_size": 28, "patch_size": 14}  # fmt: skip
IDS = {"image_token_id": 150, "video_token_id": 151, "vision_start_token_id": 152, "vision_end_token_id": 153}

CHECKPOINTS: dict[str, Any] = {
    "qwen3.5": lambda: hf.AutoModelForImageTextToText.from_config(
        hf.Qwen3_5Config(text_config=TEXT | HYBRID, vision_config=SEEN, **IDS)
    ),
    "qwen3.5 moe": lambda: hf.AutoModelForImageTextToText.from_config(
        hf.Qwen3_5MoeConfig(
            text_config=TEXT | HYBRID | EXPERTS | {"shared_expert_intermediate_size": 16}, vision_config=SEEN, **IDS
        )
    ),
    "gemma3": lambda: hf.AutoModelForImageTextToText.from_config(
        hf.Gemma3Config(text_config=TEXT, vision_config=SIGLIP, mm_tokens_per_image=4, image_token_index=150,
                        boi_token_index=151, eoi_token_index=152)
    ),
    "tied": lambda: hf.Qwen3ForCausalLM(hf.Qwen3Config(**TEXT, tie_word_embeddings=True)),
    "experts": lambda: hf.Qwen3MoeForCausalLM(hf.Qwen3MoeConfig(**TEXT, **EXPERTS)),
    "fused experts": lambda: hf.GptOssForCausalLM(hf.GptOssConfig(**TEXT, num_local_experts=4, num_experts_per_tok=2)),
}  # fmt: skip


def save(name: str, folder: Path) -> dict[str, torch.Tensor]:
    """The checkpoint's weights."""
    torch.manual_seed(0)
    CHECKPOINTS[name]().save_pretrained(folder)
    return load_file(folder / "model.safetensors")


def send(folder: Path) -> dict[str, torch.Tensor]:
    return dict(as_in_checkpoint(policy(load_model(str(folder)))[0], str(folder), False))


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_every_name_that_is_sent_is_the_checkpoints(name: str, tmp_path: Path) -> None:
    stored = save(name, tmp_path)
    sent = send(tmp_path)
    tied = sent.keys() - stored.keys()  # vLLM ties the two at its first load only
    assert len(tied) == (name in ("tied", "gemma3")) and all(weight.endswith("lm_head.weight") for weight in tied)
    embedding = next(tensor for weight, tensor in sent.items() if weight.endswith("embed_tokens.weight"))
    assert all(torch.equal(tensor, stored.get(weight, embedding)) for weight, tensor in sent.items())
    assert not [name for name in stored.keys() - sent.keys() if "visual" not in name]


def test_weights_that_are_stored_as_transformers_holds_them_stay_as_they_are(tmp_path: Path) -> None:
    CHECKPOINTS["experts"]().save_pretrained(tmp_path, save_original_format=False)
    stored = load_file(tmp_path / "model.safetensors")
    assert any("gate_up_proj" in name for name in stored)
    assert send(tmp_path).keys() == stored.keys()


def test_names_of_a_checkpoint_in_several_files(tmp_path: Path) -> None:
    whole = save("tied", tmp_path)
    (tmp_path / "model.safetensors").unlink()
    CHECKPOINTS["tied"]().save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]) == len(whole)
    assert checkpoint_names(str(tmp_path)) == set(whole)


def test_a_checkpoint_of_other_names_is_refused(tmp_path: Path) -> None:
    stored = save("tied", tmp_path)
    renamed = {name.replace("model.layers", "model.blocks"): tensor for name, tensor in stored.items()}
    save_file(renamed, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ConfigError, match=r"22 weights of Qwen3ForCausalLM .*'model.layers.0.*use_vllm to false"):
        find_naming(str(tmp_path), False)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match="no safetensors"):
        checkpoint_names(str(tmp_path))
