"""Pictures in the questions to an exact teacher elsewhere: each one once, as the bytes of its file, and bounded.

Whoever asks is not trusted: the server decodes what :mod:`opdengine.models.pictures` lets through, and fetches nothing.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from opdengine.errors import ConfigError
from opdengine.models.pictures import MOST_BYTES, MOST_IMAGES, MOST_PIXELS, PictureError, bytes_of, read_picture
from opdengine.teachers.wire import digest_of
from opdengine.types import Image, Prompt, images_of

MOST_CHARACTERS = -(-MOST_BYTES // 3) * 4
"""Of all pictures of one question in base64: one picture may be as large as any."""

MOST_PIXELS_TOGETHER = 4 * MOST_PIXELS
"""Of all pictures of one question, sequence by sequence; sequences with the same pictures count once.

Each is decoded, and made into what the model reads, on behalf of whoever asks."""

Encoded = Mapping[str, str]
"""Base64 of the bytes of pictures, by their SHA-256."""


def encoded(sequences: Iterable[Sequence[Image]]) -> dict[str, str]:
    """The pictures of some sequences, each one once.

    Raises:
        PictureError: a file is no longer what it was when the data were read.
    """
    found: dict[str, str] = {}
    for image in (image for images in sequences for image in images):
        if image.sha256 not in found:
            found[image.sha256] = base64.b64encode(bytes_of(image)).decode()
    return found


def asked_with(sequences: Sequence[Sequence[Image]], texts: Encoded) -> tuple[list[str], list[dict[str, Any]]]:
    """The list of pictures of a question, and for each sequence the field with the places of its own in it."""
    places: dict[str, int] = {}
    fields = [[places.setdefault(image.sha256, len(places)) for image in images] for images in sequences]
    return [texts[name] for name in places], [{"pictures": own} if own else {} for own in fields]


def received(texts: Sequence[str]) -> list[Image]:
    """The pictures of a question, each decoded once, as long as they have no more pixels together than they may have.

    Raises:
        PictureError: one is none, or too large; says which.
    """
    found: list[Image] = []
    left, smaller = MOST_PIXELS_TOGETHER, "make it smaller, or ask in parts"
    for number, text in enumerate(texts, start=1):
        try:
            data = base64.b64decode(text, validate=True)
            found.append(read_picture(data, max_pixels=min(MOST_PIXELS, left), remedy=smaller))
            left -= pixels_of(found[-1:])
        except (binascii.Error, ValueError) as error:
            said = error if isinstance(error, PictureError) else "is no base64"
            raise PictureError(f"picture {number} of the question {said}") from None
    return found


def pixels_of(images: Iterable[Image]) -> int:
    """How many the pictures have together."""
    return sum(image.width * image.height for image in images)


def names_of(images: Iterable[Image]) -> tuple[str, ...]:
    """Their contents, in order: sequences with equal names have the same pictures."""
    return tuple(image.sha256 for image in images)


def processor_fingerprint(tokenizer: Any) -> str | None:
    """Identifies what a model's processor makes of a picture, by its settings; None where the model is given none."""
    if (vision := getattr(tokenizer, "vision", None)) is None:
        return None
    processor = vision.processor
    own = {k: v for k, v in processor.to_dict().items() if k not in ("tokenizer", "image_processor", "video_processor")}
    settings = {**processor.image_processor.to_dict(), "of_processor": own}
    told = {k: v for k, v in settings.items() if "version" not in k}
    return digest_of([vision.marker, sorted(vision.token_ids), told])


def check_sendable(teacher: str, prompts: Iterable[Prompt]) -> None:
    """Raise ConfigError where a prompt has more pictures than a question to a teacher may have."""
    for prompt in prompts:
        images = images_of(prompt.messages)
        files = {i.sha256: len(i.data) if i.data is not None else Path(i.path).stat().st_size for i in images}
        found = (
            (len(images), MOST_IMAGES, "pictures"),
            (sum(files.values()), MOST_BYTES, "bytes of pictures"),
            (pixels_of(images), MOST_PIXELS_TOGETHER, "pixels of pictures"),
        )
        for count, most, what in found:
            if count > most:
                raise ConfigError(
                    f"prompt {prompt.id!r} has {count} {what}, and at most {most} are sent to teacher {teacher!r} "
                    "(hidden_states_url) at a time: make them smaller or leave the prompt out"
                )
