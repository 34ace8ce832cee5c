"""Pictures of one or two coloured shapes, the question that goes with them, and the verifier.

``one``  a square picture with one shape                ``red circle``
``two``  a picture twice as wide with one in each half  ``blue cross green square``, from left to right

Size, place, brightness and noise are drawn anew for every picture, so that no two are the same.
"""

from __future__ import annotations

import io
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

SKILLS = ("one", "two")
"""The ``data_source`` of a row by the number of shapes."""
COLOURS = {"red": (215, 45, 45), "green": (45, 170, 60), "blue": (50, 80, 215), "yellow": (225, 200, 40)}
SHAPES = ("circle", "square", "triangle", "cross")
QUESTION = "What is there?"
LONGEST = 6
"""Tokens of an answer, at most; the longest right one has five with its end."""
SIDE = 32
"""Pixels: the height of a picture, and its width for each shape."""


def answer_of(things: Sequence[tuple[str, str]]) -> str:
    """The words for (colour, shape) pairs from left to right."""
    return " ".join(f"{colour} {shape}" for colour, shape in things)


def draw(things: Sequence[tuple[str, str]], rng: random.Random) -> bytes:
    """A PNG file with (colour, shape) pairs from left to right."""
    ground = rng.randrange(200, 256)
    picture = Image.new("RGB", (SIDE * len(things), SIDE), (ground,) * 3)
    pen = ImageDraw.Draw(picture)
    for place, (colour, shape) in enumerate(things):
        size = rng.randrange(16, 25)
        left = SIDE * place + rng.randrange(2, SIDE - size - 1)
        top = rng.randrange(2, SIDE - size - 1)
        paint = tuple(min(255, max(0, channel + rng.randrange(-40, 41))) for channel in COLOURS[colour])
        _draw_shape(pen, shape, left, top, size, paint)
    noise = np.random.default_rng(rng.getrandbits(32)).normal(0, 12, (SIDE, SIDE * len(things), 3))
    pixels = (np.asarray(picture) + noise).clip(0, 255).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def _draw_shape(pen: ImageDraw.ImageDraw, shape: str, left: int, top: int, size: int, paint: tuple[int, ...]) -> None:
    right, bottom = left + size - 1, top + size - 1
    if shape == "circle":
        pen.ellipse((left, top, right, bottom), fill=paint)
    elif shape == "square":
        pen.rectangle((left, top, right, bottom), fill=paint)
    elif shape == "triangle":
        pen.polygon(((left, bottom), (right, bottom), ((left + right) / 2, top)), fill=paint)
    else:
        arm = size // 3
        pen.rectangle((left + arm, top, right - arm, bottom), fill=paint)
        pen.rectangle((left, top + arm, right, bottom - arm), fill=paint)


def rows(split: str, skill: str, n: int, folder: Path, seed: int = 0) -> list[dict[str, Any]]:
    """``n`` prompts as rows of a data set; their pictures are written to ``folder / "pictures"``.

    Args:
        split: "train", "dev" or "test".
        skill: "one" or "two".
        n: how many.
        folder: of the data file.
        seed: which ones.

    Returns:
        Rows with ``id``, ``prompt``, ``images``, ``image_text`` (the caption, for a model of text), ``answer``
        and ``data_source`` (the skill).
    """
    rng, found = random.Random(f"{split}/{skill}/{seed}"), []
    (folder / "pictures").mkdir(parents=True, exist_ok=True)
    for number in range(n):
        things = [(rng.choice(list(COLOURS)), rng.choice(SHAPES)) for _ in range(1 + SKILLS.index(skill))]
        name = f"pictures/{split}_{skill}_{seed}_{number}.png"
        (folder / name).write_bytes(draw(things, rng))
        answer = answer_of(things)
        found.append(
            {
                "id": f"{split}/{skill}/{seed}/{number}",
                "prompt": f"<image>{QUESTION}",
                "images": [name],
                "image_text": [caption(things, rng)],
                "answer": answer,
                "data_source": skill,
            }
        )
    return found


def caption(things: Sequence[tuple[str, str]], rng: random.Random) -> str:
    """The picture in words that do not stand in the order of an answer."""
    words = [f"a {shape} in {colour}" for colour, shape in things]
    return " right of ".join(reversed(words)) if rng.random() < 0.5 else " left of ".join(words)


def verify(text: str, answer: Any, prompt_messages: Sequence[Mapping[str, Any]] = ()) -> float:
    """1.0 if the completion is the row's answer, else 0.0."""
    return float(text == str(answer))
