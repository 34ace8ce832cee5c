"""Tiny models that see, made once per session; helpers of the engine's tests are used here too."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from vision_helpers import make_picture, make_seeing

sys.path += [str(Path(__file__).parents[1] / folder) for folder in ("engine", "teachers")]


@pytest.fixture(scope="session")
def seeing(tmp_path_factory: pytest.TempPathFactory, tiny: SimpleNamespace) -> Any:
    """(kind, seed, width) -> the folder of a random model of that architecture."""
    made: dict[tuple[str, int, int], str] = {}

    def make(kind: str, seed: int = 0, hidden: int = 32) -> str:
        key = (kind, seed, hidden)
        if key not in made:
            folder = tmp_path_factory.mktemp("seeing") / f"{kind}_{seed}_{hidden}"
            made[key] = make_seeing(folder, kind, tiny.make_tokenizer, seed=seed, hidden=hidden)
        return made[key]

    return make


@pytest.fixture(scope="session")
def picture_rows(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Rows with one picture, with two, with none; all pictures have other sizes."""
    folder = tmp_path_factory.mktemp("pictures")
    for i, (width, height) in enumerate([(56, 56), (112, 70), (40, 90), (64, 30)]):
        make_picture(i, width, height, path=str(folder / f"{i}.png"))
    rows = [
        {"prompt": "What is this?", "images": "0.png", "image_text": "a square", "answer": "a"},
        {"prompt": "<image> or <image>?", "images": ["1.png", "2.png"], "image_text": ["wide", "high"], "answer": "b"},
        {"prompt": "Say a word.", "answer": "c"},
        {"messages": [{"role": "system", "content": "Be brief."},
                      {"role": "user", "content": [{"type": "text", "text": "And "}, {"type": "image"}]}],
         "images": ["3.png"], "image_text": "flat", "answer": "d"},
    ]  # fmt: skip
    file = folder / "rows.jsonl"
    file.write_text("".join(json.dumps({"id": f"p{i}", **row}) + "\n" for i, row in enumerate(rows)))
    return str(file)
