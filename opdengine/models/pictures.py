"""Pictures of untrusted data: bounded in bytes and pixels before anything is decoded, and decoded by few readers."""

from __future__ import annotations

import base64
import hashlib
import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from opdengine.types import Image

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
"""Readers of Pillow that are asked; others run programs, or read what is no picture of pixels."""

DEEP = ("I", "F")
"""First letters of modes with more than 8 bits a channel, which become white or black as RGB."""

MOST_BYTES = 64 << 20
MOST_PIXELS = 1 << 26
"""The most pixels that a picture may have wherever it comes from: 8192 x 8192."""

LEAST_SIDE = 2
"""Pixels; a picture that is one pixel wide cannot be resized by every processor."""


MOST_IMAGES = 64
"""Of one row of data, and so of one sequence that goes to a teacher elsewhere or to vLLM."""


class PictureError(ValueError):
    """A picture that cannot be used; the message follows its name."""


def read_picture(
    data: bytes,
    path: str = "",
    max_pixels: int = MOST_PIXELS,
    text: str | None = None,
    remedy: str = "make it smaller, or raise max_image_pixels of its source",
) -> Image:
    """A picture from the bytes of its file, all of which have been decoded once.

    Args:
        data: of the file.
        path: where it can be read again; "" keeps the bytes.
        max_pixels: the most that it may have.
        text: what is read in its place without pictures.
        remedy: what is said of one with more pixels.

    Raises:
        PictureError: it is none, is cut off or too large, or is none that can be shown as one RGB picture.
    """
    if not data:
        raise PictureError("is empty")
    if len(data) > MOST_BYTES:
        raise PictureError(f"has {len(data)} bytes; at most {MOST_BYTES} are read")
    with _opened(data) as picture:
        width, height = picture.size
        if width * height > max_pixels:
            raise PictureError(f"has {width}x{height} pixels, and {max_pixels} are allowed; {remedy}")
        if min(width, height) < LEAST_SIDE:
            raise PictureError(f"has {width}x{height} pixels; each side needs at least {LEAST_SIDE}")
        if picture.mode[0] in DEEP:
            raise PictureError(f"has more than 8 bits a channel (mode {picture.mode}); save it with 8")
        if (frames := getattr(picture, "n_frames", 1)) > 1:
            raise PictureError(f"has {frames} frames; save the one that is meant")
        turned = picture.getexif().get(0x0112, 1) in (5, 6, 7, 8)
        picture.draft("RGB", (1, 1))  # a JPEG is read to its end, and only as large as that needs
        picture.load()
    size = (height, width) if turned else (width, height)
    return Image(hashlib.sha256(data).hexdigest(), *size, None if path else data, path, text)


def data_url(image: Image) -> str:
    """The picture as text that a row may hold."""
    return f"data:image/*;base64,{base64.b64encode(bytes_of(image)).decode()}"


def open_picture(image: Image) -> Any:
    """The picture as Pillow's RGB, the right way up.

    Raises:
        PictureError: its file is no longer what it was when the data were read.
    """
    from PIL import ImageOps

    with _opened(bytes_of(image)) as picture:
        upright: Any = ImageOps.exif_transpose(picture)
        return upright.convert("RGB")


def bytes_of(image: Image) -> bytes:
    """The bytes of a picture's file, which must be those that were checked.

    Raises:
        PictureError: its file is no longer what it was when the data were read.
    """
    data = image.data
    if data is None:
        try:
            data = Path(image.path).read_bytes()
        except OSError as error:
            raise PictureError(f"the picture {image.path!r} cannot be read any more: {error}") from error
        if hashlib.sha256(data).hexdigest() != image.sha256:
            raise PictureError(f"the picture {image.path!r} has changed since the data were read; start the run again")
    return data


@contextmanager
def _opened(data: bytes) -> Iterator[Any]:
    """The picture in some bytes; whatever Pillow raises becomes one sentence."""
    from PIL import Image as Pillow
    from PIL import UnidentifiedImageError

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of sizes, which are bounded here, and of damaged metadata
            with Pillow.open(io.BytesIO(data), formats=FORMATS) as picture:
                yield picture
    except UnidentifiedImageError:
        raise PictureError(f"is no picture that can be read; save it as one of {', '.join(FORMATS)}") from None
    except Pillow.DecompressionBombError as error:
        raise PictureError(f"is far too large: {error}") from None
    except PictureError:
        raise
    except Exception as error:  # readers of files raise what they like
        raise PictureError(f"is damaged or cut off: {str(error) or type(error).__name__}") from None
