"""A teacher that sees behind ``opdengine teacher-serve``: it judges and writes as one here, and trusts nobody."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from engine_helpers import assert_same_gradients, make_engine
from remote_helpers import answering, remote
from test_vision_step import vision_config, whole_step
from vision_helpers import chat, make_picture

from opdengine.config.sections import TeacherConfig
from opdengine.data.prompts import load_prompts
from opdengine.errors import ConfigError, ProbeError
from opdengine.models.chat import encode_chat, load_tokenizer
from opdengine.teachers import pictures, serve
from opdengine.teachers import remote as remote_teacher
from opdengine.teachers.local import LocalTeacher
from opdengine.teachers.pictures import check_sendable
from opdengine.teachers.remote import parts_of
from opdengine.teachers.served_model import RefusedError, Served
from opdengine.types import Failure, Prompt, Request, SamplingParams, TeacherContext

KIND = "qwen3_vl"


@pytest.fixture(scope="module")
def served(seeing: Any) -> Served:
    return Served(seeing(KIND, 1, 48), max_tokens=200)


@pytest.fixture(scope="module")
def url(served: Served) -> Iterator[str]:
    with answering(served) as address:
        yield address


def test_it_judges_a_step_as_in_this_process(seeing: Any, picture_rows: str, tmp_path: Path, url: str) -> None:
    """Loss and gradient; a question has several contexts, and a step several questions."""
    teachers = [{"model": seeing(KIND, 1, 48), "hidden_states_url": [url]}]
    found = []
    for settings in ({}, {"teachers": teachers}):
        config = vision_config(
            seeing(KIND), seeing(KIND, 1, 48), picture_rows, tmp_path, num_generations=2, temperature=1.0, **settings
        )
        found.append(whole_step(make_engine(config), load_prompts([picture_rows]).prompts))
    (here, local), (there, elsewhere) = found
    assert {len(c.images) for s in there.samples for c in s.contexts} == {0, 1, 2}
    assert there.metrics["loss"] == pytest.approx(here.metrics["loss"], rel=1e-6)
    assert_same_gradients(elsewhere, local, rtol=1e-6)


def test_it_writes_what_it_writes_in_this_process(seeing: Any, url: str) -> None:
    path = seeing(KIND, 1, 48)
    here, there = LocalTeacher(TeacherConfig(model=path, name="t")), remote(path, url)
    asyncio.run(there.probe(judges=False))
    chats = [chat(make_picture(0, 90, 50), "b"), chat("word"), chat(make_picture(1), "or", make_picture(2, 40, 64))]
    requests = [Request(str(i), there.encode(messages), seed=i) for i, messages in enumerate(chats)]
    assert [len(request.images) for request in requests] == [1, 0, 2]
    params = SamplingParams(max_tokens=6, temperature=1.0)
    written = [[c.token_ids.tolist() for c in asyncio.run(t.generate(requests, params))] for t in (here, there)]
    assert written[0] == written[1]


def test_who_is_given_no_pictures_or_reads_them_otherwise_is_refused(seeing: Any, tmp_path: Path, url: str) -> None:
    path = seeing(KIND, 1, 48)
    with answering(Served(path, images="omit")) as blind, pytest.raises(ProbeError, match=r"no pictures.*--images"):
        asyncio.run(remote(path, blind).probe(judges=False))
    other = tmp_path / Path(path).name
    shutil.copytree(path, other)
    settings = json.loads((other / "preprocessor_config.json").read_text())
    (other / "preprocessor_config.json").write_text(json.dumps({**settings, "image_mean": [0.5, 0.5, 0.5]}))
    with pytest.raises(ProbeError, match="has another processor, and here pictures are read as"):
        asyncio.run(remote(path, url, tokenizer=str(other)).probe(judges=False))
    first, second = Served(path), Served(str(other))
    assert first.fingerprint != second.fingerprint and first.contents["processor"] != second.contents["processor"]


def bomb() -> bytes:
    """A small PNG of 10000 x 10000 pixels."""
    from PIL import Image as Pillow

    data = io.BytesIO()
    Pillow.new("1", (10_000, 10_000)).save(data, "PNG")
    return data.getvalue()


def text_of(data: bytes) -> str:
    return base64.b64encode(data).decode()


@pytest.mark.parametrize(
    ("listed", "places", "words"),
    [
        (["http://127.0.0.1/a.png"], [0], "picture 1 of the question is no base64"),
        (["/etc/passwd"], [0], "picture 1 of the question is no base64"),
        ([text_of(b"GIF89a")], [0], "picture 1 of the question is damaged|is no picture"),
        (["GOOD", text_of(bomb())], [0, 1], "picture 2 of the question is far too large|10000x10000 pixels"),
        (["GOOD"], [1], "context 'c' has a picture that is not in the question"),
        (["GOOD"], [0, 0], "context 'c' has other image tokens than the pictures have features"),
        (["OTHER"], [0], "context 'c' has other image tokens than the pictures have features"),
        (["FLAT"], [0], "context 'c': the model's processor cannot read the pictures"),
        (["GOOD"], [-1], "contexts.0.pictures.0"),
        (["GOOD"], [0] * 65, "contexts.0.pictures"),
        (["GOOD", text_of(bomb()), "?"], [0], "no sequence has 2 of the pictures of the question"),
        ("GOOD", [0], "pictures"),
    ],
)
def test_questions_of_somebody_who_is_not_trusted(served: Served, listed: Any, places: list[int], words: str) -> None:
    """Each is refused in one sentence; the model goes on."""
    tokenizer = load_tokenizer(str(served_path(served)))
    drawn = {"GOOD": make_picture(0, 56, 56), "OTHER": make_picture(1, 120, 80), "FLAT": make_picture(2, 900, 4)}
    ids = list(encode_chat(tokenizer, chat(drawn["GOOD"], "?")))
    texts = {name: text_of(image.data or b"") for name, image in drawn.items()}
    asked = listed if isinstance(listed, str) else [texts.get(text, text) for text in listed]
    context = {"name": "c", "ids": ids, "targets": [len(ids) - 1], "pictures": places}
    body = json.dumps({"contexts": [context], "dtype": "auto", "pictures": asked}).encode()
    with pytest.raises(RefusedError, match=words):
        served.score(body, lambda: True)
    good = {"contexts": [{**context, "pictures": [0]}], "dtype": "auto", "pictures": [texts["GOOD"]]}
    assert served.score(json.dumps(good).encode(), lambda: True)[1][0].shape == (1, 48)


def served_path(served: Served) -> str:
    return str(served.backbone.model.name_or_path)


def test_a_model_of_text_refuses_pictures(models: dict[str, str]) -> None:
    question = {"contexts": [{"name": "c", "ids": [1, 2], "targets": [1]}], "dtype": "auto", "pictures": ["AAAA"]}
    with pytest.raises(RefusedError, match="is given no pictures here: set the teacher's images"):
        Served(models["big"]).score(json.dumps(question).encode(), lambda: True)


def test_pictures_are_bounded_together(
    seeing: Any, served: Served, url: str, monkeypatch: pytest.MonkeyPatch, picture_rows: str
) -> None:
    path = seeing(KIND, 1, 48)
    teacher = remote(path, url, stop=False)
    asyncio.run(teacher.probe(judges=False))
    ids = encode_chat(teacher.tokenizer, chat(make_picture(0), "and", make_picture(1), "?"))
    context = TeacherContext("c", "t", np.array(ids), np.array([len(ids) - 1]), ids.images)
    monkeypatch.setattr("opdengine.teachers.served_model.MOST_PIXELS_TOGETHER", 5000)
    assert "6272 pixels of pictures in one question" in str(asyncio.run(teacher.score([context]))[0])
    with monkeypatch.context() as patch:  # what is beyond is not decoded
        patch.setattr(pictures, "MOST_PIXELS_TOGETHER", 4000)
        assert "picture 2 of the question has 56x56 pixels, and 864 are allowed; make it smaller, or ask in" in str(
            asyncio.run(teacher.score([context]))[0]
        )
    monkeypatch.setattr("opdengine.teachers.served_model.MOST_PIXELS_TOGETHER", 6272)
    monkeypatch.setattr(remote_teacher, "MOST_PIXELS_TOGETHER", 6272)
    half = encode_chat(teacher.tokenizer, chat(make_picture(0), "?"))
    other = TeacherContext("d", "t", np.array(half), np.array([len(half) - 1]), half.images)
    assert not any(isinstance(found, Failure) for found in asyncio.run(teacher.score([context, context, other])))
    monkeypatch.setattr(serve, "MOST_BYTES", 1000)
    monkeypatch.setattr(serve, "MOST_CHARACTERS", 1000)
    assert "a question of" in str(asyncio.run(teacher.score([context]))[0])
    prompts = load_prompts([picture_rows]).prompts
    check_sendable("t", prompts)
    for name, most, words in (("MOST_IMAGES", 1, "2 pictures"), ("MOST_BYTES", 10_000, "bytes of pictures"),
                              ("MOST_PIXELS_TOGETHER", 10_000, "11440 pixels")):  # fmt: skip
        before = getattr(pictures, name)
        monkeypatch.setattr(pictures, name, most)
        with pytest.raises(ConfigError, match=f"prompt 'p1' has .*{words}"):
            check_sendable("t", prompts)
        monkeypatch.setattr(pictures, name, before)
    many = Prompt("many", tuple(chat(*[make_picture(0)] * 64)))
    check_sendable("t", [many])


def test_a_question_has_as_many_pictures_as_it_may_have() -> None:
    """Those that its contexts share count once."""
    sizes = [{"a": 6}, {"a": 6}, {"b": 5}, {"c": 4, "b": 5}, {"d": 11}, {}]
    assert [list(part) for part in parts_of([1] * 6, 100, [(sizes, 10)])] == [[0, 1], [2, 3], [4], [5]]
    assert [list(part) for part in parts_of([1] * 6, 2, [(sizes, 100)])] == [[0, 1], [2, 3], [4, 5]]
    assert [list(part) for part in parts_of([1] * 6, 4, [(sizes, 100), ([{i: 1} for i in range(6)], 3)])] == [
        [0, 1, 2], [3, 4, 5]
    ]  # fmt: skip
