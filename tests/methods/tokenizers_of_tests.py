"""Small tokenizers of other kinds than the one of the tests' models, made here."""

from __future__ import annotations

import json
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

WORDS = ["the answer is of course forty two", "naive fox jumps", "What is one and one? It is two.", "0 1 2 3 4 5 6"]
BRACKETS = (
    "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)


def byte_level(vocab_size: int = 330, lower: bool = False, end: str = "</s>") -> PreTrainedTokenizerFast:
    """Byte-level BPE with other merges; ``lower``: of a text in small letters."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    if lower:
        bpe.normalizer = normalizers.Lowercase()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, initial_alphabet=alphabet, show_progress=False)
    bpe.train_from_iterator(WORDS, trainer)
    return _finished(bpe, end)


def sentencepiece(vocab_size: int = 420) -> PreTrainedTokenizerFast:
    """As of SentencePiece: a mark for spaces, also before a text, and tokens for bytes; merges cross words."""
    bpe = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    bpe.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    bpe.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    first = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256))]
    bpe.train_from_iterator(
        WORDS, trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=first, show_progress=False)
    )
    state = json.loads(bpe.to_str())
    state["added_tokens"] = [token for token in state["added_tokens"] if token["content"] == "<unk>"]
    return _finished(Tokenizer.from_str(json.dumps(state)), unk_token="<unk>")


def word_piece() -> PreTrainedTokenizerFast:
    """A kind that does not tell what a token stands for."""
    backend = Tokenizer(models.WordPiece({"[UNK]": 0, "a": 1, "##b": 2}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.decoder = decoders.WordPiece()
    return _finished(backend, unk_token="[UNK]")


def _finished(backend: Tokenizer, end: str = "</s>", **special: Any) -> PreTrainedTokenizerFast:
    backend.add_special_tokens([AddedToken(end, special=True), AddedToken("<think>", special=True)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token=end, pad_token=end, clean_up_tokenization_spaces=False, **special
    )
    tokenizer.chat_template = BRACKETS.replace("</s>", end)
    return tokenizer
