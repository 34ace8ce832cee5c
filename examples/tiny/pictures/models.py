"""Tiny models that see, in the shape of Qwen3-VL, and their supervised lessons."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from torch.nn.functional import nll_loss
from transformers import PreTrainedTokenizerFast, Qwen3VLConfig, Qwen3VLForConditionalGeneration

from tiny.pictures import world

PAD, UNKNOWN, USER, ASSISTANT, END = "<|pad|>", "<|unk|>", "<|user|>", "<|assistant|>", "<|end|>"
IMAGE = ("<|vision_start|>", "<|image_pad|>", "<|vision_end|>", "<|video_pad|>")
ANSWERS = (*world.COLOURS, *world.SHAPES)
WORDS = (*ANSWERS, "What", "is", "there?", "a", "in", "left", "right", "of")
PATCH = 8
"""Pixels; a token of a picture stands for 2 x 2 patches."""
FIRST_WORD = 5
"""The id of the first of ANSWERS, which stand behind the special tokens."""
IGNORE = -100
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}{{ '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def build_tokenizer(sees: bool = True) -> PreTrainedTokenizerFast:
    """One token a word; the marks of pictures come last, as a model of text does without them.

    Args:
        sees: whether there are marks of pictures.
    """
    special, marks = [PAD, UNKNOWN, USER, ASSISTANT, END], IMAGE if sees else ()
    vocabulary = {token: i for i, token in enumerate([*special, *WORDS])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.add_special_tokens([AddedToken(token, special=True) for token in (*special, *marks)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=PAD,
        unk_token=UNKNOWN,
        eos_token=END,
        additional_special_tokens=[USER, ASSISTANT, *marks],
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_max_length=128,
        chat_template=CHAT_TEMPLATE,
    )


def new_model(
    tokenizer: PreTrainedTokenizerFast, hidden: int, layers: int, seed: int
) -> Qwen3VLForConditionalGeneration:
    """A small Qwen3-VL with random weights."""
    torch.manual_seed(seed)
    names = ("vision_start_token_id", "image_token_id", "vision_end_token_id", "video_token_id")
    config = Qwen3VLConfig(
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": hidden,
            "intermediate_size": 3 * hidden,
            "num_hidden_layers": layers,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "rope_parameters": {
                "rope_type": "default", "mrope_section": [4, 2, 2], "mrope_interleaved": True, "rope_theta": 100.0,
            },
            "max_position_embeddings": 128,
            "bos_token_id": None,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
        },
        vision_config={
            "depth": 2,
            "hidden_size": hidden,
            "intermediate_size": 2 * hidden,
            "num_heads": 4,
            "patch_size": PATCH,
            "num_position_embeddings": 64,
            "deepstack_visual_indexes": [0],
            "out_hidden_size": hidden,
        },
        tie_word_embeddings=True,
        **dict(zip(names, tokenizer.convert_tokens_to_ids(list(IMAGE)), strict=True)),
    )  # fmt: skip
    return Qwen3VLForConditionalGeneration(config)


def save(model: Any, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write a model folder in half precision, with a processor where the model sees."""
    model.half().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    if not isinstance(model, Qwen3VLForConditionalGeneration):
        return
    side = 2 * PATCH
    pictures = {
        "image_processor_type": "Qwen2VLImageProcessor",
        "patch_size": PATCH,
        "temporal_patch_size": 2,
        "merge_size": 2,
        "size": {"shortest_edge": 4 * side**2, "longest_edge": 64 * side**2},
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(pictures))
    (folder / "processor_config.json").write_text(json.dumps({"processor_class": "Qwen3VLProcessor"}))


@dataclass(frozen=True)
class Lesson:
    """What a model reads, the pixels of its pictures by the names of its arguments, and what it shall answer."""

    prompt: list[int]
    pixels: Mapping[str, torch.Tensor]
    answer: list[int]


def lessons(folder: Path, prompts: Sequence[Any], answers: Sequence[str]) -> list[Lesson]:
    """Prompts as the model in ``folder`` reads them: with their pictures, or with the captions in their place."""
    from opdengine.models.chat import encode_chat, load_tokenizer

    sees = (folder / "preprocessor_config.json").is_file()
    tokenizer = load_tokenizer(str(folder), images="image" if sees else "text")
    found = []
    for prompt, answer in zip(prompts, answers, strict=True):
        ids = encode_chat(tokenizer, prompt.messages)
        pixels = tokenizer.vision.pixels(ids.images).inputs if sees else {}
        words = tokenizer(answer, add_special_tokens=False)["input_ids"]
        found.append(Lesson(list(ids), pixels, [*words, tokenizer.eos_token_id]))
    return found


def supervise(
    model: Any,
    taught: Sequence[Lesson],
    steps: int,
    learning_rate: float,
    rng: random.Random,
    unsure: float = 0.0,
    corrupt: float = 0.0,
    progress: Callable[[str], None] = lambda text: None,
) -> None:
    """AdamW with warm-up and cosine decay on the answers, in batches of 32.

    Args:
        model: to be trained.
        taught: drawn at random.
        steps, learning_rate: of the optimiser.
        rng: the source of the order and of the corruption.
        unsure: the share of the labels that is spread evenly over all words of answers, so that no word is impossible.
        corrupt: the share of the answers' words that are random in the input while the labels stay right, so that a
            teacher can judge the prefixes of a student that has gone wrong.
        progress: told after each step.
    """
    optimizer = torch.optim.AdamW(model.parameters(), learning_rate, weight_decay=0.01)
    model.train()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * min((step + 1) / 20, 0.5 + 0.5 * math.cos(math.pi * step / steps))
        loss = _loss(model, rng.choices(taught, k=32), rng, unsure, corrupt)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        progress(f"loss {loss.item():.3f}")
    model.eval()


def _loss(model: Any, batch: Sequence[Lesson], rng: random.Random, unsure: float, corrupt: float) -> torch.Tensor:
    # Padding stands on the right, where causal attention never sees it.
    words = torch.arange(FIRST_WORD, FIRST_WORD + len(ANSWERS))
    longest = max(len(lesson.prompt) + len(lesson.answer) for lesson in batch)
    ids = torch.zeros(len(batch), longest, dtype=torch.long)
    labels, mask = torch.full_like(ids, IGNORE), torch.zeros_like(ids)
    for row, lesson in enumerate(batch):
        said = [rng.choice(words.tolist()) if rng.random() < corrupt else i for i in lesson.answer]
        start, length = len(lesson.prompt), len(lesson.prompt) + len(lesson.answer)
        ids[row, :length] = torch.tensor([*lesson.prompt, *said])
        labels[row, start - 1 : length - 1] = torch.tensor(lesson.answer)
        mask[row, :length] = 1
    shown = {name: torch.cat([lesson.pixels[name] for lesson in batch]) for name in batch[0].pixels}
    if shown:
        shown["mm_token_type_ids"] = (ids == model.config.image_token_id).int()
    kept = labels != IGNORE
    hidden = model.model(input_ids=ids, attention_mask=mask, **shown).last_hidden_state[kept]
    logprobs = model.lm_head(hidden).log_softmax(-1)
    return (1 - unsure) * nll_loss(logprobs, labels[kept]) - unsure * logprobs[:, words].mean()
