"""Models of the Qwen3 shapes with random weights, made on the device, and data to run them on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from opdengine.types import Prompt, Request, Sample, Turn

COMMON = {"num_key_value_heads": 8, "head_dim": 128, "max_position_embeddings": 40960}
QWEN3_4B = COMMON | {
    "hidden_size": 2560,
    "intermediate_size": 9728,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "tie_word_embeddings": True,
}
QWEN3_8B = COMMON | {
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "tie_word_embeddings": False,
}
QWEN3_14B = COMMON | {
    "hidden_size": 5120,
    "intermediate_size": 17408,
    "num_hidden_layers": 40,
    "num_attention_heads": 40,
    "tie_word_embeddings": False,
}


def smaller(shape: dict[str, Any]) -> dict[str, Any]:
    """The same kind of model at a size for a CPU."""
    small = {"head_dim": 8, "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 2}
    return shape | small | {"hidden_size": shape["hidden_size"] // 80, "intermediate_size": 48}


def make_model(shape: dict[str, Any], vocab: int, dtype: torch.dtype, device: str) -> Any:
    """A causal language model; its weights are drawn where it will live."""
    from transformers import AutoModelForCausalLM, Qwen3Config

    config = Qwen3Config(vocab_size=vocab, bos_token_id=None, eos_token_id=None, **shape)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa")
    return model.to(device)


def parameters(model: Any) -> int:
    return sum(p.numel() for p in model.parameters())


@dataclass(frozen=True)
class Sizes:
    """One optimiser step: ``sequences`` prompts with one response each; a teacher also reads a transcript."""

    vocab: int
    sequences: int
    prompt: int
    response: int
    transcript: int
    sampled: int

    def ids(self, length: int, seed: int) -> list[np.ndarray]:
        rng = np.random.default_rng(seed)
        return [rng.integers(2, self.vocab, size=length) for _ in range(self.sequences)]

    def requests(self) -> list[Request]:
        return [Request(str(i), tuple(ids.tolist()), seed=i) for i, ids in enumerate(self.ids(self.prompt, 0))]

    def rollouts(self) -> list[Sample]:
        pairs = zip(self.ids(self.prompt, 0), self.ids(self.response, 1), strict=True)
        return [
            Sample(str(i), Prompt(str(i), ()), (Turn("prompt", ask), Turn("assistant", answer, trains=True)))
            for i, (ask, answer) in enumerate(pairs)
        ]


REAL = Sizes(vocab=151936, sequences=8, prompt=512, response=1024, transcript=2048, sampled=32)
TINY = Sizes(vocab=515, sequences=3, prompt=5, response=7, transcript=6, sampled=3)


class NoText:
    """Stands in for a tokenizer where only ids matter: nothing ends a completion, nothing is decoded."""

    eos_token_id = -1

    def __init__(self, vocab: int) -> None:
        self.vocab = vocab

    def get_vocab(self) -> dict[str, int]:
        return {"last": self.vocab - 1}

    def decode(self, ids: list[int], **options: bool) -> str:
        return ""
