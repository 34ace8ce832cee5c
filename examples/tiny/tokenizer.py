"""A real fast tokenizer for the tiny world: characters, and the debate's fragments as one token each."""

from __future__ import annotations

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

CHARACTERS = "0123456789+-*()MC|ABDEFGH\n"
# No fragment can be spelt with characters or with other fragments, so text and ids determine
# each other: encode(decode(ids)) == ids for every sequence of ordinary tokens.
FRAGMENTS = (
    "[Debate Start]\n",
    "[Expert ",
    " Round ",
    "]: ",
    "\n[Debate End]",
    "<<CONFIDENCE=",
    ">>",
    "\nYou are Expert ",
    ". Answer again.",
    ". Give the final answer.",
    " How sure are you?",
)
PAD, UNKNOWN, USER, ASSISTANT, END = "<|pad|>", "<|unk|>", "<|user|>", "<|assistant|>", "<|end|>"
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def build_tokenizer() -> PreTrainedTokenizerFast:
    """The tokenizer that both teachers and the student share."""
    special = [PAD, UNKNOWN, USER, ASSISTANT, END]
    vocabulary = {token: i for i, token in enumerate([*special, *CHARACTERS])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    backend.pre_tokenizer = pre_tokenizers.Split("", behavior="isolated")
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
