"""Parameters, FLOPs and bytes of decoder language models, counted from their shapes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from opdengine.errors import ModelFileError


@dataclass(frozen=True)
class Shape:
    """The sizes of a decoder with grouped-query attention and a gated MLP, dense or mixture of experts.

    Args:
        hidden, layers, heads, kv_heads, head_dim, intermediate, vocab: as in Hugging Face configurations.
        tied: whether embedding and head are one matrix.
        experts, experts_per_token: 0 for a dense MLP; ``intermediate`` is then that of one expert.
    """

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocab: int
    tied: bool = False
    experts: int = 0
    experts_per_token: int = 0

    @property
    def attention_parameters(self) -> int:
        """Of one layer: the four projections."""
        return self.hidden * self.head_dim * (2 * self.heads + 2 * self.kv_heads)

    @property
    def expert_parameters(self) -> int:
        """Of one MLP or one expert: three matrices."""
        return 3 * self.hidden * self.intermediate

    @property
    def head_parameters(self) -> int:
        """Of the LM head."""
        return self.hidden * self.vocab

    @property
    def parameters(self) -> int:
        """All matrices (norms are left out: less than 1e-4 of a real model)."""
        mlp = self.expert_parameters * max(self.experts, 1) + self.hidden * self.experts
        body = self.layers * (self.attention_parameters + mlp)
        return body + self.head_parameters * (1 if self.tied else 2)

    @property
    def active_parameters(self) -> int:
        """Those that one token is multiplied with in the layers; without embedding and head."""
        mlp = self.expert_parameters * (self.experts_per_token or 1) + self.hidden * self.experts
        return self.layers * (self.attention_parameters + mlp)

    def body_flops(self, tokens: float, context: float) -> float:
        """FLOPs of one forward pass through the layers.

        Args:
            tokens: processed.
            context: tokens that each of them attends to, on average (half the length of a sequence that
                is read as a whole, with causal attention).
        """
        attention = 4 * self.layers * self.heads * self.head_dim * context
        return tokens * (2 * self.active_parameters + attention)

    def head_flops(self, tokens: float) -> float:
        """FLOPs of one product of hidden states with the head."""
        return 2.0 * tokens * self.head_parameters

    def cache_bytes(self, tokens: float, element: int = 2) -> float:
        """Bytes of keys and values."""
        return 2.0 * self.layers * self.kv_heads * self.head_dim * element * tokens


QWEN3 = {
    "Qwen3-0.6B": Shape(1024, 28, 16, 8, 128, 3072, 151936, tied=True),
    "Qwen3-1.7B": Shape(2048, 28, 16, 8, 128, 6144, 151936, tied=True),
    "Qwen3-4B": Shape(2560, 36, 32, 8, 128, 9728, 151936, tied=True),
    "Qwen3-8B": Shape(4096, 36, 32, 8, 128, 12288, 151936),
    "Qwen3-14B": Shape(5120, 40, 40, 8, 128, 17408, 151936),
    "Qwen3-32B": Shape(5120, 64, 64, 8, 128, 25600, 151936),
    "Qwen3-30B-A3B": Shape(2048, 48, 32, 4, 128, 768, 151936, experts=128, experts_per_token=8),
}
"""Shapes by the last part of the hub name, for plans on machines without the models."""


def shape_of(model: str, *, trust_remote_code: bool = False) -> Shape:
    """The shape of a model folder or hub name.

    Raises:
        ValueError: its configuration cannot be read, or lacks a size.
    """
    name = model.rstrip("/").rpartition("/")[2]
    if not Path(model).expanduser().is_dir():
        for known in (name, name.removesuffix("-Instruct-2507"), name.removesuffix("-Base")):
            if known in QWEN3:
                return QWEN3[known]
    from opdengine.models.files import read_config

    try:
        config = read_config(model, trust_remote_code).get_text_config()
    except ModelFileError as error:
        raise ValueError(f"{error}; give a folder that has one, or one of {sorted(QWEN3)}") from error
    return _from_config(model, config.to_dict())


def _from_config(model: str, values: Mapping[str, Any]) -> Shape:
    needed = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "vocab_size")
    if missing := [name for name in needed if values.get(name) is None]:
        raise ValueError(f"the configuration of {model!r} lacks {missing}; its cost cannot be counted")
    heads = values["num_attention_heads"]
    experts = values.get("num_experts") or values.get("num_local_experts") or 0
    return Shape(
        hidden=values["hidden_size"],
        layers=values["num_hidden_layers"],
        heads=heads,
        kv_heads=values.get("num_key_value_heads") or heads,
        head_dim=values.get("head_dim") or values["hidden_size"] // heads,
        intermediate=(values.get("moe_intermediate_size") if experts else None) or values["intermediate_size"],
        vocab=values["vocab_size"],
        tied=bool(values.get("tie_word_embeddings")),
        experts=experts,
        experts_per_token=(values.get("num_experts_per_tok") or 0) if experts else 0,
    )
