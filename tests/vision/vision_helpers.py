"""Tiny random models that see, with their processors, saved like any other model folder; pictures drawn here."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from opdengine.models.pictures import read_picture
from opdengine.types import Image

PARTS = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['content'] is string %}{{ m['content'] }}{% else %}{% for part in m['content'] %}"
    "{% if part['type'] == 'image' %}MARK{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""A chat template in the manner of Qwen's."""

QWEN = ("<|vision_start|>", "<|image_pad|>", "<|vision_end|>", "<|video_pad|>")
IDEFICS = ("<image>", "<fake_token_around_image>", "<end_of_utterance>", "<global-img>")
IDEFICS += tuple(f"<row_{i}_col_{j}>" for i in (1, 2) for j in (1, 2))
GEMMA = ("<start_of_image>", "<image_soft_token>", "<end_of_image>")

KINDS = ("qwen2_5_vl", "qwen3_vl", "idefics3", "smolvlm", "gemma3")


def make_picture(seed: int, width: int = 56, height: int = 56, text: str | None = None, path: str = "") -> Image:
    """A picture of noise; pictures of one seed and size are the same."""
    from PIL import Image as Pillow

    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    data = io.BytesIO()
    Pillow.fromarray(pixels).save(data, "PNG")
    if path:
        Path(path).write_bytes(data.getvalue())
    return read_picture(data.getvalue(), path=path, text=text)


def chat(*parts: str | Image) -> list[dict[str, Any]]:
    """A user's message of texts and pictures."""
    shown = [{"type": "text", "text": p} if isinstance(p, str) else {"type": "image", "image": p} for p in parts]
    return [{"role": "user", "content": shown}]


def make_seeing(folder: Path, kind: str, make_tokenizer: Callable[..., Any], *, seed: int = 0, hidden: int = 32) -> str:
    """A random model of one architecture with its tokenizer and processor."""
    config, tokenizer, settings = {
        "qwen2_5_vl": _qwen2_5,
        "qwen3_vl": _qwen3,
        "idefics3": _idefics,
        "smolvlm": _idefics,
        "gemma3": _gemma,
    }[kind](kind, make_tokenizer, hidden)
    return save_model(folder, config, tokenizer, settings, seed)


def save_model(folder: Path, config: Any, tokenizer: Any, settings: dict[str, Any], seed: int) -> str:
    from transformers import AutoModelForImageTextToText

    torch.manual_seed(seed)
    model = AutoModelForImageTextToText.from_config(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() >= 2 and "embed" not in name:
                parameter.mul_(3)
        # No token of a picture is sampled often.
        model.get_output_embeddings().weight.mul_(3)
        model.get_input_embeddings().weight.mul_(3)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    for name, content in settings.items():
        (Path(folder) / name).write_text(json.dumps(content))
    return str(folder)


def _text(tokenizer: Any, hidden: int, **more: Any) -> dict[str, Any]:
    return {
        "vocab_size": len(tokenizer),
        "hidden_size": hidden,
        "intermediate_size": 2 * hidden,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 1024,
        "eos_token_id": tokenizer.eos_token_id,
        "bos_token_id": None,
        "pad_token_id": tokenizer.pad_token_id,
        **more,
    }


def _qwen_tokenizer(make_tokenizer: Callable[..., Any]) -> tuple[Any, dict[str, int]]:
    tokenizer = make_tokenizer(QWEN)
    tokenizer.chat_template = PARTS.replace("MARK", "<|vision_start|><|image_pad|><|vision_end|>")
    names = ("vision_start_token_id", "image_token_id", "vision_end_token_id", "video_token_id")
    return tokenizer, dict(zip(names, tokenizer.convert_tokens_to_ids(list(QWEN)), strict=True))


def _qwen_pictures(patch: int) -> dict[str, Any]:
    return {
        "image_processor_type": "Qwen2VLImageProcessor",
        "patch_size": patch,
        "temporal_patch_size": 2,
        "merge_size": 2,
        "size": {"shortest_edge": 4 * (2 * patch) ** 2, "longest_edge": 36 * (2 * patch) ** 2},
    }


def _qwen2_5(kind: str, make_tokenizer: Callable[..., Any], hidden: int) -> tuple[Any, Any, dict[str, Any]]:
    from transformers import Qwen2_5_VLConfig

    tokenizer, ids = _qwen_tokenizer(make_tokenizer)
    config = Qwen2_5_VLConfig(
        text_config=_text(
            tokenizer,
            hidden,
            rope_parameters={"rope_type": "default", "mrope_section": [hidden // 8 - 2, 1, 1], "rope_theta": 1e4},
        ),
        vision_config={
            "depth": 2,
            "hidden_size": 32,
            "intermediate_size": 32,
            "num_heads": 2,
            "patch_size": 7,
            "window_size": 28,
            "fullatt_block_indexes": [1],
            "out_hidden_size": hidden,
        },
        tie_word_embeddings=False,
        **ids,
    )
    files = {"preprocessor_config.json": {**_qwen_pictures(7), "processor_class": "Qwen2_5_VLProcessor"}}
    return config, tokenizer, files


def _qwen3(kind: str, make_tokenizer: Callable[..., Any], hidden: int) -> tuple[Any, Any, dict[str, Any]]:
    from transformers import Qwen3VLConfig

    tokenizer, ids = _qwen_tokenizer(make_tokenizer)
    config = Qwen3VLConfig(
        text_config=_text(
            tokenizer,
            hidden,
            head_dim=16,
            rope_parameters={
                "rope_type": "default", "mrope_section": [4, 2, 2], "mrope_interleaved": True, "rope_theta": 1e4,
            },
        ),
        vision_config={
            "depth": 2,
            "hidden_size": 32,
            "intermediate_size": 32,
            "num_heads": 2,
            "patch_size": 8,
            "num_position_embeddings": 64,
            "deepstack_visual_indexes": [0],
            "out_hidden_size": hidden,
        },
        tie_word_embeddings=True,
        **ids,
    )  # fmt: skip
    files = {
        "preprocessor_config.json": _qwen_pictures(8),
        "processor_config.json": {"processor_class": "Qwen3VLProcessor"},
    }
    return config, tokenizer, files


def _idefics(kind: str, make_tokenizer: Callable[..., Any], hidden: int) -> tuple[Any, Any, dict[str, Any]]:
    from transformers import Idefics3Config, SmolVLMConfig

    tokenizer = make_tokenizer(IDEFICS)
    # As SmolVLM's: every message has parts.
    tokenizer.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% for part in m['content'] %}"
        "{% if part['type'] == 'image' %}<image>{% elif part['type'] == 'text' %}{{ part['text'] }}{% endif %}"
        "{% endfor %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    build = SmolVLMConfig if kind == "smolvlm" else Idefics3Config
    config = build(
        text_config={"model_type": "llama", **_text(tokenizer, hidden)},
        vision_config={
            "hidden_size": 32,
            "intermediate_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": 32,
            "patch_size": 8,
        },
        scale_factor=2,
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        pad_token_id=tokenizer.pad_token_id,
    )
    files = {
        "preprocessor_config.json": {
            "image_processor_type": "Idefics3ImageProcessor",
            "size": {"longest_edge": 64},
            "max_image_size": {"longest_edge": 32},
            "do_image_splitting": True,
        },
        "processor_config.json": {"processor_class": "Idefics3Processor", "image_seq_len": 4},
    }
    return config, tokenizer, files


def _gemma(kind: str, make_tokenizer: Callable[..., Any], hidden: int) -> tuple[Any, Any, dict[str, Any]]:
    from transformers import Gemma3Config

    tokenizer = make_tokenizer(GEMMA)
    tokenizer.chat_template = PARTS.replace("MARK", "<start_of_image>")
    named = dict(zip(("boi_token", "image_token", "eoi_token"), GEMMA, strict=True))
    tokenizer._set_model_specific_special_tokens(named)
    config = Gemma3Config(
        text_config=_text(
            tokenizer,
            hidden,
            head_dim=16,
            sliding_window=48,
            layer_types=["sliding_attention", "full_attention"],
        ),
        vision_config={
            "hidden_size": 32,
            "intermediate_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": 32,
            "patch_size": 8,
        },
        mm_tokens_per_image=4,
        boi_token_index=tokenizer.convert_tokens_to_ids(GEMMA[0]),
        image_token_id=tokenizer.convert_tokens_to_ids(GEMMA[1]),
        image_token_index=tokenizer.convert_tokens_to_ids(GEMMA[1]),
        eoi_token_index=tokenizer.convert_tokens_to_ids(GEMMA[2]),
        eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    files = {
        "preprocessor_config.json": {
            "image_processor_type": "Gemma3ImageProcessor",
            "size": {"height": 32, "width": 32},
            "image_seq_length": 4,
        },
        "processor_config.json": {"processor_class": "Gemma3Processor", "image_seq_length": 4},
    }
    return config, tokenizer, files
