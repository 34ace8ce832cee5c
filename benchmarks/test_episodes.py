"""Turns of episodes that `transformers` samples: what was read of a chat is kept, beside reading it anew."""

from __future__ import annotations

from contextlib import nullcontext

import numpy as np
import torch
from transformers import AutoTokenizer, Qwen3Config, Qwen3ForCausalLM

from opdengine.rollout.transformers import TransformersSampler
from opdengine.types import Request, SamplingParams

CHATS, TURNS, SAID, ANSWERED, OPENING, ROUNDS = 8, 10, 6, 24, 60, 5
VOCABULARY = 4096


def test_turns_of_episodes(tmp_path, record, guard, interleaved) -> None:
    """Seconds of all turns with what was read kept, over those without: a turn then costs its own tokens."""
    from test_rollout import save_model

    tokenizer = AutoTokenizer.from_pretrained(save_model(tmp_path, 0))
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=VOCABULARY, hidden_size=384, intermediate_size=1024, num_hidden_layers=12, num_attention_heads=6,
        num_key_value_heads=2, head_dim=64, max_position_embeddings=1024, tie_word_embeddings=True, eos_token_id=1,
        bos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    sampler = TransformersSampler(Qwen3ForCausalLM(config).eval(), tokenizer)
    sampler.stop_ids = ()
    sampler.prove()
    params = SamplingParams(max_tokens=SAID, seed=1)
    kinds = {"kept": sampler.chats, "anew": nullcontext}
    said: dict[str, list[list[int]]] = {}

    def play(kind: str) -> None:
        rng = np.random.default_rng(0)
        chats = [rng.integers(2, VOCABULARY, OPENING + 2 * i).tolist() for i in range(CHATS)]
        with kinds[kind]():
            for turn in range(TURNS):
                requests = [Request(str(i), tuple(ids), turn) for i, ids in enumerate(chats)]
                for ids, (completion,) in zip(chats, sampler.generate(requests, params), strict=True):
                    ids += [*completion.token_ids.tolist(), *rng.integers(2, VOCABULARY, ANSWERED).tolist()]
        said[kind] = chats

    seconds = interleaved({kind: lambda kind=kind: play(kind) for kind in kinds}, rounds=ROUNDS)
    assert said["kept"] == said["anew"]
    ratio = float(np.median([a / b for a, b in zip(seconds["kept"], seconds["anew"], strict=True)]))
    medians = {kind: float(np.median(values)) for kind, values in seconds.items()}
    record("turns", {"chats": CHATS, "turns": TURNS, "seconds": medians, "kept_over_anew": ratio})
    guard("turns", {"kept_over_anew": (ratio, 0.2)}, CHATS * TURNS * SAID / medians["kept"])
