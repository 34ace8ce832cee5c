"""Tiny real models and tokenizers, made once per session and saved like any other model folder."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from types import SimpleNamespace

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # a job in the background; some tests send it
    signal.signal(signal.SIGINT, signal.default_int_handler)

import pytest
import torch

CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TEXT = [
    "The quick brown fox jumps over the lazy dog. 0123456789 + - * / = ( ) [ ]",
    "Expert A Round 1 thinks about the task and gives an answer with confidence.",
    "def add(a, b):\n    return a + b\n",
]


def make_tokenizer(extra: tuple[str, ...] = ()):
    """A byte-level BPE tokenizer (it can encode any text) with ChatML markup."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    bpe.train_from_iterator(TEXT, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe, eos_token="<|im_end|>", pad_token="<|pad|>", clean_up_tokenization_spaces=False
    )
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", *extra]})
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def make_model(
    folder: Path, tokenizer, *, seed: int, hidden: int = 32, tied: bool = True, pad_vocab: int = 0, window: int = 1024
) -> str:
    """A random Qwen3 saved with ``save_pretrained``; wide enough to sample varied text."""
    from transformers import AutoModelForCausalLM, Qwen3Config

    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=len(tokenizer) + pad_vocab,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=window,
        tie_word_embeddings=tied,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(3)
        model.get_output_embeddings().weight.mul_(3)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def tiny() -> SimpleNamespace:
    """The two functions above, for tests that need a model or a tokenizer of their own."""
    return SimpleNamespace(make_tokenizer=make_tokenizer, make_model=make_model)


@pytest.fixture(scope="session")
def tokenizer():
    return make_tokenizer()


@pytest.fixture(scope="session")
def models(tmp_path_factory, tokenizer) -> dict[str, str]:
    """Folders of a student and two teachers of other widths, heads and padded vocabularies."""
    root = tmp_path_factory.mktemp("models")
    return {
        "student": make_model(root / "student", tokenizer, seed=0, hidden=32, tied=True),
        "big": make_model(root / "big", tokenizer, seed=1, hidden=64, tied=False, pad_vocab=13),
        "small": make_model(root / "small", tokenizer, seed=2, hidden=48, tied=True, pad_vocab=5),
    }


@pytest.fixture(scope="session")
def prompt_file(tmp_path_factory) -> str:
    """Twelve prompts of two tasks."""
    path = tmp_path_factory.mktemp("data") / "train.jsonl"
    rows = [
        {
            "id": f"p{i}",
            "prompt": f"What is {i} + {i}?",
            "answer": str(2 * i),
            "data_source": "agentic" if i % 2 else "code",
        }
        for i in range(12)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture(scope="session")
def smollm2() -> str:
    """The folder of SmolLM2-135M-Instruct: ``opdengine fetch smollm2-135m --out FOLDER``, and SMOLLM2=FOLDER."""
    given = os.environ.get("SMOLLM2", "")
    if not Path(given, "config.json").is_file():
        pytest.fail(f"SMOLLM2={given!r} is no model; run opdengine fetch smollm2-135m --out FOLDER and set SMOLLM2")
    return given
