"""Pictures in rows of data: wherever a row may hold one, what is read is bounded, local and decoded once.

A row has an ``images`` column, a list or one, and marks their places with ``<image>`` in its text or with parts of type
"image"; without marks they stand before the words of the user's last message. A message's part may also bring its own.
"""

from __future__ import annotations

import base64
import binascii
import io
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from opdengine.config.fields import at_home
from opdengine.config.sections import DataConfig
from opdengine.models.pictures import MOST_BYTES, MOST_IMAGES, PictureError, read_picture
from opdengine.models.rendering import image_part, text_part
from opdengine.types import Image, Message

logger = logging.getLogger(__name__)

MARK = "<image>"
SOURCES = ("image", "image_url", "path", "url", "bytes", "base64")
"""Fields of a part that may hold its picture."""

URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://")


class Pictures:
    """Reads the pictures of the rows of one source.

    Args:
        source: says where paths begin and how large pictures may be.
    """

    def __init__(self, source: DataConfig) -> None:
        file = Path(at_home(source.path))
        self.folder = Path(at_home(source.image_folder)) if source.image_folder else file.parent
        self.max_pixels = source.max_image_pixels
        self.path = source.path
        self._told = False

    def place(self, messages: Sequence[Any], images: Any = None, texts: Any = None) -> Sequence[Any]:
        """The messages with every picture read and in its place; those without any stay as they are.

        Args:
            messages: of a row, as they are written there.
            images: its column of pictures.
            texts: what stands in their place for a model that is given none: one for each, or one for all of them.

        Raises:
            ValueError: a picture cannot be used, or there are other places than pictures; says which.
        """
        given = _listed(images)
        own = [part for message in messages for part in _parts(message) if _is_picture(part) and _source(part)]
        if not given and not own:
            if any(_is_picture(part) for message in messages for part in _parts(message)):
                raise ValueError("a message has a place for a picture, but the row has no 'images'")
            if _listed(texts):
                raise ValueError("'image_text' has a text, but the row has no 'images'")
            if not self._told and any(map(_places, messages)):
                self._told = True
                logger.warning(
                    "%s: a text holds %r and its row no 'images', so it is read as words; name the column of "
                    "pictures in the source's columns",
                    self.path,
                    MARK,
                )
            return messages
        if given and own:
            raise ValueError("the row has pictures in 'images' and others in its messages; keep them in one place")
        found = given or [_source(part) for part in own]
        if len(found) > MOST_IMAGES:
            raise ValueError(f"the row has {len(found)} pictures; at most {MOST_IMAGES} are read")
        pictures = [
            self.read(value, f"picture {number}" if len(found) > 1 else "the picture", text)
            for number, (value, text) in enumerate(zip(found, _texts(texts, len(found)), strict=True), start=1)
        ]
        return _placed(messages, pictures)

    def read(self, value: Any, name: str = "the picture", text: str | None = None) -> Image:
        """One picture: a path below the folder, the bytes of a file, a data URL, an open picture of Pillow, or a
        mapping that holds one of them.

        Args:
            value: of the row.
            name: of the picture in the row, for messages.
            text: what stands in its place.

        Raises:
            ValueError: it cannot be used; says why and what to do.
        """
        try:
            data, path = self._bytes(value)
            return read_picture(data, path, self.max_pixels, text)
        except PictureError as error:
            shown = f" {str(value)[:80]!r}" if isinstance(value, str) and not value.startswith("data:") else ""
            raise ValueError(f"{name}{shown} {error}") from error

    def _bytes(self, value: Any) -> tuple[bytes, str]:
        """The bytes of a picture's file, and its path where that is to be read again."""
        if isinstance(value, Mapping):
            if value.get("bytes") is None and value.get("base64") is not None:
                return _decoded(value["base64"]), ""
            held = [value[field] for field in ("bytes", "path", "url") if value.get(field) is not None]
            if not held:
                raise PictureError(f"is a mapping with {sorted(map(str, value))[:5]}; give it 'bytes' or 'path'")
            return self._bytes(held[0])
        if isinstance(value, (bytes, bytearray)):
            return bytes(value), ""
        if isinstance(value, str):
            return (_decoded(value), "") if value.startswith("data:") else self._file(value)
        if hasattr(value, "save") and hasattr(value, "size"):
            return self._saved(value), ""
        raise PictureError(
            f"is of type {type(value).__name__}; give a path, the bytes of a file or a picture of Pillow"
        )

    def _saved(self, picture: Any) -> bytes:
        width, height = picture.size
        if width * height > self.max_pixels:
            raise PictureError(f"has {width}x{height} pixels, and {self.max_pixels} are allowed (max_image_pixels)")
        if (frames := getattr(picture, "n_frames", 1)) > 1:
            raise PictureError(f"has {frames} frames; save the one that is meant")
        data = io.BytesIO()
        try:
            # What says which way is up goes along; PNG has no CMYK.
            picture.save(data, "TIFF" if picture.mode == "CMYK" else "PNG", exif=picture.getexif())
        except Exception as error:  # Pillow raises what it likes
            raise PictureError(f"cannot be read: {error}") from error
        return data.getvalue()

    def _file(self, text: str) -> tuple[bytes, str]:
        if text.lower().startswith("file:"):
            raise PictureError("is a URL; give the path alone")
        if URL.match(text):
            raise PictureError("is a URL, and nothing is fetched from elsewhere; download it and give its path")
        if "\0" in text or not text.strip():
            raise PictureError("is no path")
        try:
            folder = self.folder.resolve()
            path = (folder / text).resolve()
            if not path.is_relative_to(folder):
                raise PictureError(
                    f"is outside of {str(self.folder)!r}; put it there, or set image_folder of its source"
                )
            if not path.exists():
                raise PictureError(f"does not exist below {str(self.folder)!r}; set image_folder of its source")
            if not path.is_file():
                raise PictureError("is no file")
            if (size := path.stat().st_size) > MOST_BYTES:
                raise PictureError(f"has {size} bytes; at most {MOST_BYTES} are read")
            return path.read_bytes(), str(path)
        except (OSError, RuntimeError) as error:  # no permission, a name that is too long, links in a circle
            raise PictureError(f"cannot be read: {getattr(error, 'strerror', None) or error}") from error


def _decoded(text: Any) -> bytes:
    """The bytes behind a data URL, or base64 alone."""
    if not isinstance(text, str):
        raise PictureError(f"holds base64 of type {type(text).__name__}, not text")
    body = text
    if text.startswith("data:"):
        head, comma, body = text.partition(",")
        if not comma or not head.endswith(";base64"):
            raise PictureError("is a data URL without ';base64,'")
    if len(body) > MOST_BYTES * 4 // 3 + 4:
        raise PictureError(f"has {len(body)} characters of base64; at most {MOST_BYTES} bytes are read")
    try:
        return base64.b64decode("".join(body.split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise PictureError(f"is no base64 ({error})") from error


def _listed(value: Any) -> list[Any]:
    if value is None or (isinstance(value, str) and not value):
        return []
    return list(value) if isinstance(value, (list, tuple)) else [value]


def _texts(texts: Any, count: int) -> list[str | None]:
    given = _listed(texts)
    if not all(isinstance(text, str) for text in given):
        raise ValueError("'image_text' is neither text nor a list of texts")
    if not given:
        return [None] * count
    if isinstance(texts, str):
        return [texts, *[""] * (count - 1)]
    if len(given) != count:
        raise ValueError(f"'image_text' has {len(given)} texts for {count} pictures; give one for each")
    return given


def _parts(message: Any) -> Iterator[Any]:
    content = message.get("content") if isinstance(message, Mapping) else None
    yield from content if isinstance(content, (list, tuple)) else ()


def _is_picture(part: Any) -> bool:
    return isinstance(part, Mapping) and part.get("type") in ("image", "image_url")


def _source(part: Mapping[str, Any]) -> Any:
    """What a part holds as its picture; None where it only marks a place."""
    found = {name: part[name] for name in SOURCES if part.get(name) is not None}
    if not found:
        return None
    value = found.get("image", found.get("image_url"))
    return found if value is None else value


def _placed(messages: Sequence[Any], pictures: Sequence[Image]) -> list[Any]:
    """The messages with pictures where places are marked, else before the words of the user's last message."""
    marked = sum(_places(message) for message in messages)
    if marked not in (0, len(pictures)):
        raise ValueError(f"the messages have {marked} places for {len(pictures)} pictures")
    left = iter(pictures)
    if marked:
        return [_filled(message, left) for message in messages]
    users = [i for i, m in enumerate(messages) if isinstance(m, Mapping) and m.get("role") == "user"]
    if not users:
        raise ValueError("no message is the user's, before whose words the pictures could stand")
    placed = list(messages)
    last = placed[users[-1]]
    words = last.get("content")
    rest = [text_part(words)] if isinstance(words, str) else list(words or [])
    placed[users[-1]] = {**last, "content": [*map(image_part, pictures), *rest]}
    return placed


def _places(message: Any) -> int:
    content = message.get("content") if isinstance(message, Mapping) else None
    if isinstance(content, str):
        return content.count(MARK)
    words = [p.get("text") for p in _parts(message) if isinstance(p, Mapping) and isinstance(p.get("text"), str)]
    return sum(map(_is_picture, _parts(message))) + sum(str(text).count(MARK) for text in words)


def _filled(message: Any, pictures: Iterator[Image]) -> Any:
    """The message with the next pictures in its places."""
    if not _places(message):
        return message
    content = message["content"]
    filled: list[Message] = []
    for part in [text_part(content)] if isinstance(content, str) else content:
        if _is_picture(part):
            filled.append(image_part(next(pictures)))
        elif isinstance(part, Mapping) and isinstance(part.get("text"), str):
            first, *others = part["text"].split(MARK)
            filled += [text_part(first)] if first else []
            for words in others:
                filled += [image_part(next(pictures)), *([text_part(words)] if words else [])]
        else:
            filled.append(part)
    return {**message, "content": filled}
