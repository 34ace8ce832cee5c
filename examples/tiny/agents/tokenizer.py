"""A real fast tokenizer for the house: one token per word, alone or behind a space."""

from __future__ import annotations

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tiny.agents.world import WORDS
from tiny.tokenizer import ASSISTANT, CHAT_TEMPLATE, END, FRAGMENTS, PAD, UNKNOWN, USER

CHARACTERS = "0123456789.,:|?\nAB "


def build_tokenizer() -> PreTrainedTokenizerFast:
    """The tokenizer that all tiny agents share."""
    special = [PAD, UNKNOWN, USER, ASSISTANT, END]
    words = [form for word in WORDS for form in (word, f" {word}")]
    vocabulary = {token: i for i, token in enumerate([*special, *words, *CHARACTERS])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(" ?[A-Za-z]+|[^A-Za-z]"), behavior="isolated")
    backend.decoder = decoders.Fuse()
    backend.add_special_tokens([AddedToken(token, special=True) for token in special])
    backend.add_tokens([AddedToken(fragment, normalized=False) for fragment in FRAGMENTS])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=PAD,
        unk_token=UNKNOWN,
        eos_token=END,
        additional_special_tokens=[USER, ASSISTANT],
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_max_length=512,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer
