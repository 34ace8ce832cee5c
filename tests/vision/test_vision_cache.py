"""Pictures are processed once for all sequences of a prompt, and kept up to a bound."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from vision_helpers import chat, make_picture

from opdengine.models import vision
from opdengine.models.chat import encode_chat, load_tokenizer


@pytest.fixture
def counted(seeing: Any) -> Any:
    """A tokenizer that sees, and the texts that its processor was given."""
    tokenizer, texts = load_tokenizer(seeing("qwen3_vl")), []
    processor = tokenizer.vision.processor

    class Counting:
        def __getattr__(self, name: str) -> Any:
            return getattr(processor, name)

        def __call__(self, text: list[str], **inputs: Any) -> Any:
            texts.extend(text)
            return processor(text=text, **inputs)

    tokenizer.vision.processor = Counting()
    return tokenizer, texts


def test_pictures_are_processed_once_for_all_rollouts(counted: Any) -> None:
    """Another text around the same pictures is read as it is; the same ids come out as without anything kept."""
    tokenizer, texts = counted
    first, other = chat(make_picture(0), "words"), chat(make_picture(0), "other words")
    encoded = encode_chat(tokenizer, first)
    again = [encode_chat(tokenizer, first) for _ in range(3)]
    assert len(texts) == 1 and all(e == encoded and e.images == encoded.images for e in again)
    again[0].append(0)
    assert encode_chat(tokenizer, first) == encoded
    changed = encode_chat(tokenizer, other)
    assert len(texts) == 2 and len(changed) > len(encoded) and changed.images == encoded.images
    tokenizer.vision.pixels(encoded.images)
    assert len(texts) == 2
    tokenizer.vision._kept.clear()
    assert encode_chat(tokenizer, first) == encoded and encode_chat(tokenizer, other) == changed


def test_pixels_are_kept_up_to_a_bound(counted: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was not used for longest goes first and is processed again when it is needed."""
    tokenizer, texts = counted
    chats = [chat(make_picture(seed)) for seed in range(4)]
    shown = [encode_chat(tokenizer, messages).images for messages in chats]
    pixels = [tokenizer.vision.pixels(images).inputs["pixel_values"] for images in shown]
    size = sum(t.numel() * t.element_size() for t in tokenizer.vision.pixels(shown[0]).inputs.values())
    monkeypatch.setattr(vision, "MOST_BYTES", 2 * size)
    encode_chat(tokenizer, chats[2])
    assert list(tokenizer.vision._kept) == [(image.sha256,) for (image,) in (shown[0], shown[2])]
    assert len(texts) == 4
    for images, expected in zip(shown, pixels, strict=True):
        torch.testing.assert_close(tokenizer.vision.pixels(images).inputs["pixel_values"], expected, rtol=0, atol=0)
        assert tokenizer.vision._bytes == size * len(tokenizer.vision._kept) <= 2 * size
    assert len(texts) == 7
