"""Pictures of untrusted data: every one that cannot be used is refused with one sentence when the data are read."""

from __future__ import annotations

import base64
import io
import json
import os
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image as Pillow
from vision_helpers import make_picture

from opdengine.config.sections import DataConfig
from opdengine.data.files import DataError
from opdengine.data.prompts import load_prompts
from opdengine.models.pictures import MOST_BYTES, PictureError, open_picture
from opdengine.types import Image, images_of


def saved(kind: str, mode: str = "RGB", size: tuple[int, int] = (40, 30), **how: Any) -> bytes:
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    data = io.BytesIO()
    picture = Pillow.fromarray(pixels)
    (picture.convert(mode) if mode != "RGB" else picture).save(data, kind, **how)
    return data.getvalue()


def bomb(width: int, height: int) -> bytes:
    """A PNG of a few bytes that says it is enormous."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"\0" * 999)) + chunk(b"IEND", b"")
    )


def animated() -> bytes:
    data = io.BytesIO()
    frames = [Pillow.new("RGB", (20, 20), colour) for colour in ("red", "blue")]
    frames[0].save(data, "GIF", save_all=True, append_images=frames[1:])
    return data.getvalue()


def deep() -> bytes:
    data = io.BytesIO()
    Pillow.fromarray(np.arange(400, dtype=np.uint16).reshape(20, 20) * 100).save(data, "PNG")
    return data.getvalue()


def floats() -> bytes:
    data = io.BytesIO()
    Pillow.fromarray(np.ones((20, 20), dtype=np.float32)).save(data, "TIFF")
    return data.getvalue()


def damaged() -> bytes:
    whole = bytearray(saved("PNG"))
    whole[len(whole) // 2] ^= 0xFF
    return bytes(whole)


PNG, JPEG = saved("PNG"), saved("JPEG")
FILES = {
    "fine.png": PNG,
    "empty.png": b"",
    "text.png": b"not a picture at all",
    "cut.png": PNG[: len(PNG) // 2],
    "cut.jpg": JPEG[: len(JPEG) * 2 // 3],
    "cut.webp": saved("WEBP")[:-200],
    "head.png": PNG[:20],
    "damaged.png": damaged(),
    "bomb.png": bomb(60000, 60000),
    "large.png": bomb(5000, 5000),
    "negative.png": bomb(2**31 - 1, 2**31 - 1),
    "nothing.png": bomb(0, 10),
    "animated.gif": animated(),
    "deep.png": deep(),
    "floats.tiff": floats(),
    "drawing.svg": b"<svg xmlns='http://www.w3.org/2000/svg'><rect width='9' height='9'/></svg>",
    "program.eps": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n",
    "page.pdf": b"%PDF-1.4\n1 0 obj <<>> endobj\ntrailer <<>>\n%%EOF",
    "pointer.png": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n",
    "archive.png": b"PK\x03\x04" + bytes(60),
    "line.png": saved("PNG", size=(40, 1)),
}
URL_OF_TEXT = "data:text/plain;base64," + base64.b64encode(b"hello").decode()

BAD: list[tuple[dict[str, Any], str]] = [
    ({"images": "none.png"}, "'none.png' does not exist below"),
    ({"images": "../outside.png"}, "is outside of"),
    ({"images": "/etc/passwd"}, "is outside of"),
    ({"images": "link.png"}, "is outside of"),
    ({"images": "circle.png"}, "'circle.png'"),
    ({"images": "folder"}, "is no file"),
    ({"images": "pipe"}, "is no file"),
    ({"images": "empty.png"}, "is empty"),
    ({"images": "text.png"}, "is no picture that can be read; save it as one of PNG, JPEG"),
    ({"images": "cut.png"}, "is damaged or cut off"),
    ({"images": "cut.jpg"}, "is damaged or cut off"),
    ({"images": "cut.webp"}, "is damaged or cut off"),
    ({"images": "head.png"}, "is damaged or cut off"),
    ({"images": "damaged.png"}, "is damaged or cut off"),
    ({"images": "bomb.png"}, "is far too large"),
    ({"images": "large.png"}, "has 5000x5000 pixels, and 16777216 are allowed; make it smaller, or raise max_image"),
    ({"images": "negative.png"}, "is far too large"),
    ({"images": "nothing.png"}, "is no picture that can be read"),
    ({"images": "animated.gif"}, "has 2 frames; save the one that is meant"),
    ({"images": "deep.png"}, "more than 8 bits a channel"),
    ({"images": "floats.tiff"}, "more than 8 bits a channel"),
    ({"images": "drawing.svg"}, "is no picture that can be read"),
    ({"images": "program.eps"}, "is no picture that can be read"),
    ({"images": "page.pdf"}, "is no picture that can be read"),
    ({"images": "pointer.png"}, "is no picture that can be read"),
    ({"images": "archive.png"}, "is no picture that can be read"),
    ({"images": "line.png"}, "40x1"),
    ({"images": "http://host/a.png"}, "is a URL, and nothing is fetched from elsewhere; download it"),
    ({"images": "HTTPS://host/a.png"}, "is a URL"),
    ({"images": "s3://bucket/a.png"}, "is a URL"),
    ({"images": "file:///etc/passwd"}, "is a URL; give the path alone"),
    ({"images": "data:image/png,abc"}, "is a data URL without ';base64,'"),
    ({"images": "data:image/png;base64,@@@"}, "is no base64"),
    ({"images": URL_OF_TEXT}, "is no picture"),
    ({"images": 5}, "is of type int"),
    ({"images": True}, "is of type bool"),
    ({"images": [None]}, "is of type NoneType"),
    ({"images": [["fine.png"]]}, "is of type list"),
    ({"images": {}}, "is a mapping with []"),
    ({"images": {"file": "fine.png"}}, "is a mapping with ['file']; give it 'bytes' or 'path'"),
    ({"images": {"url": "https://host/a.png"}}, "is a URL"),
    ({"images": {"base64": 7}}, "base64 of type int"),
    ({"images": ["fine.png", "none.png"]}, "picture 2 'none.png' does not exist"),
    ({"images": [""]}, "is no path"),
    ({"images": "a\0b.png"}, "is no path"),
    ({"images": "a" * 5000}, "cannot be read"),
    ({"images": ["fine.png"] * 65}, "has 65 pictures; at most 64"),
    ({"prompt": "<image> and <image>?", "images": "fine.png"}, "2 places for 1 pictures"),
    ({"prompt": "<image>?", "images": ["fine.png"] * 2}, "1 places for 2 pictures"),
    ({"prompt": [{"role": "user", "content": [{"type": "image"}]}]}, "has no 'images'"),
    ({"prompt": [{"role": "user", "content": [{"type": "image", "image": "fine.png"}]}], "images": "fine.png"},
     "keep them in one place"),
    ({"prompt": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "ftp://x/y"}}]}]}, "is a URL"),
    ({"prompt": [{"role": "user", "content": [{"type": "video", "video": "a.mp4"}]}]}, "part of type 'video'"),
    ({"prompt": [{"role": "user", "content": [{"type": "audio"}]}], "images": "fine.png"}, "part of type 'audio'"),
    ({"prompt": [{"role": "system", "content": "x"}], "images": "fine.png"}, "no message is the user's"),
    ({"images": "fine.png", "image_text": ["a", "b"]}, "2 texts for 1 pictures"),
    ({"images": "fine.png", "image_text": 5}, "neither text nor a list of texts"),
    ({"image_text": "a square"}, "but the row has no 'images'"),
]  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of pictures that are all bad but one."""
    folder = tmp_path_factory.mktemp("bad") / "data"
    (folder / "folder").mkdir(parents=True)
    for name, content in FILES.items():
        (folder / name).write_bytes(content)
    (folder.parent / "outside.png").write_bytes(PNG)
    (folder / "link.png").symlink_to(folder.parent / "outside.png")
    (folder / "circle.png").symlink_to(folder / "circle.png")
    os.mkfifo(folder / "pipe")
    return folder


@pytest.mark.parametrize(("row", "said"), BAD, ids=[str(i) for i in range(len(BAD))])
def test_bad_pictures_are_refused(folder: Path, row: dict[str, Any], said: str) -> None:
    file = folder / "rows.jsonl"
    file.write_text(json.dumps({"prompt": "What is it?", **row}) + "\n")
    with pytest.raises(DataError) as caught:
        load_prompts([str(file)])
    assert said in str(caught.value) and "row 1" in str(caught.value)
    assert "Traceback" not in str(caught.value) and len(str(caught.value)) < 700


def test_bad_rows_can_be_left_out(folder: Path) -> None:
    file = folder / "rows.jsonl"
    rows = [{"prompt": "x", **row} for row, _ in BAD[:20]] + [{"prompt": "y", "images": "fine.png"}]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = load_prompts([str(file)], skip_bad_rows=True)
    assert len(found.prompts) == 1 and sum(found.dropped.values()) == 20


def read(value: Any, tmp_path: Path, **source: Any) -> Image:
    from opdengine.data.images import Pictures

    return Pictures(DataConfig(str(tmp_path / "rows.jsonl"), **source)).read(value)


def test_every_way_to_give_a_picture(tmp_path: Path) -> None:
    """A path, bytes, base64 and an open picture all give the same pixels."""
    (tmp_path / "a.png").write_bytes(PNG)
    coded = base64.b64encode(PNG).decode()
    ways = [
        "a.png", str(tmp_path / "a.png"), PNG, bytearray(PNG), {"bytes": PNG, "path": "elsewhere.png"},
        {"bytes": None, "path": "a.png"}, {"base64": coded}, f"data:image/png;base64,{coded}",
        {"url": f"data:image/png;base64,{coded}"}, Pillow.open(io.BytesIO(PNG)),
    ]  # fmt: skip
    expected = np.asarray(Pillow.open(io.BytesIO(PNG)))
    for way in ways:
        image = read(way, tmp_path)
        assert (image.width, image.height) == (40, 30)
        np.testing.assert_array_equal(np.asarray(open_picture(image)), expected)


def test_pictures_of_other_modes_are_shown_as_rgb(tmp_path: Path) -> None:
    for kind, mode in (("PNG", "L"), ("PNG", "RGBA"), ("PNG", "P"), ("PNG", "1"), ("JPEG", "CMYK"), ("GIF", "P")):
        image = read(saved(kind, mode), tmp_path)
        assert open_picture(image).mode == "RGB" and open_picture(image).size == (40, 30)


def test_a_turned_photograph_is_put_upright(tmp_path: Path) -> None:
    exif = Pillow.Exif()
    exif[0x0112] = 6
    data = saved("JPEG", exif=exif)
    for way in (data, Pillow.open(io.BytesIO(data))):
        image = read(way, tmp_path)
        assert (image.width, image.height) == (30, 40) == open_picture(image).size


def test_an_open_picture_is_read_as_its_file_is(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="has 2 frames"):
        read(Pillow.open(io.BytesIO(animated())), tmp_path)
    data = saved("JPEG", "CMYK")
    of_file, opened = (open_picture(read(way, tmp_path)) for way in (data, Pillow.open(io.BytesIO(data))))
    np.testing.assert_array_equal(np.asarray(opened), np.asarray(of_file))


def test_a_mark_without_a_picture_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = [{"prompt": "<image>How many?", "photo": "a.png"}, {"prompt": "<image>And here?"}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert len(load_prompts([DataConfig(str(tmp_path / "rows.jsonl"))]).prompts) == 2
    assert caplog.text.count("a text holds '<image>' and its row no 'images'") == 1


def test_a_file_that_changes_is_noticed(tmp_path: Path) -> None:
    image = make_picture(0, path=str(tmp_path / "a.png"))
    (tmp_path / "a.png").write_bytes(PNG)
    with pytest.raises(PictureError, match="has changed since the data were read"):
        open_picture(image)
    (tmp_path / "a.png").unlink()
    with pytest.raises(PictureError, match="cannot be read any more"):
        open_picture(image)


def test_a_file_that_is_too_large_is_not_read(tmp_path: Path) -> None:
    with (tmp_path / "a.png").open("wb") as file:
        file.truncate(MOST_BYTES + 1)
    with pytest.raises(ValueError, match=f"has {MOST_BYTES + 1} bytes"):
        read("a.png", tmp_path)
    with pytest.raises(ValueError, match=r"1200 pixels|40x30 pixels, and 1000 are allowed"):
        read(PNG, tmp_path, max_image_pixels=1000)


def test_places(tmp_path: Path) -> None:
    """Marks in text, places in messages, and none: then pictures stand before the user's last words."""
    (tmp_path / "a.png").write_bytes(PNG)
    (tmp_path / "b.png").write_bytes(saved("PNG", size=(20, 20)))
    rows: list[dict[str, Any]] = [
        {"prompt": "One <image>two<image> three", "images": ["a.png", "b.png"]},
        {"prompt": [{"role": "user", "content": "first"}, {"role": "assistant", "content": "yes"},
                    {"role": "user", "content": "last"}], "images": ["a.png", "b.png"]},
        {"prompt": [{"role": "user", "content": [{"type": "image", "image": "b.png"}, {"type": "text", "text": "x"}]}]},
        {"prompt": [{"role": "user", "content": "<image>"}], "images": [{"path": "a.png"}]},
    ]  # fmt: skip
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    prompts = load_prompts([str(file)]).prompts
    shown = [
        [p["text"] if p["type"] == "text" else p["image"].width for p in prompt.messages[-1]["content"]]
        for prompt in prompts
    ]
    assert shown == [["One ", 40, "two", 20, " three"], [40, 20, "last"], [20, "x"], [40]]
    assert [len(images_of(p.messages)) for p in prompts] == [2, 2, 1, 1]


def test_the_fingerprint_of_data_follows_the_pixels(tmp_path: Path) -> None:
    """The same pictures elsewhere are the same data; other pictures are others."""
    found = []
    for place, content in (("one", PNG), ("two", PNG), ("three", JPEG)):
        (tmp_path / place).mkdir()
        (tmp_path / place / "a.png").write_bytes(content)
        (tmp_path / place / "rows.jsonl").write_text(json.dumps({"prompt": "x", "images": "a.png"}))
        found.append(load_prompts([str(tmp_path / place / "rows.jsonl")]).fingerprint)
    assert found[0] == found[1] != found[2]


def test_pictures_of_a_data_set(tmp_path: Path) -> None:
    """A column of ``datasets.Image`` is read as the bytes that it holds; its bombs are refused like all others."""
    import datasets

    features = datasets.Features(
        {"prompt": datasets.Value("string"), "images": datasets.Sequence(datasets.Image()), "n": datasets.Value("int8")}
    )
    for content, whole in ((PNG, True), (bomb(60000, 60000), False)):
        rows = {"prompt": ["x"], "images": [[{"bytes": content, "path": None}]], "n": [3]}
        folder = tmp_path / str(whole)
        datasets.Dataset.from_dict(rows, features=features).save_to_disk(str(folder))
        if whole:
            (prompt,) = load_prompts([str(folder)]).prompts
            assert images_of(prompt.messages)[0].data == PNG and prompt.extra == {"n": 3}
        else:
            with pytest.raises(DataError, match="is far too large"):
                load_prompts([str(folder)])


def test_balanced_rows_keep_their_pictures(tmp_path: Path) -> None:
    from opdengine.tools.balance import _written, rows

    (tmp_path / "a.png").write_bytes(PNG)
    (tmp_path / "rows.jsonl").write_text(json.dumps({"prompt": "x", "images": "a.png", "image_text": "noise"}))
    found = load_prompts([str(tmp_path / "rows.jsonl")]).prompts
    (tmp_path / "out").mkdir()
    lines = [json.dumps(row, default=_written) + "\n" for row in rows(found, {found[0].id: 2})]
    (tmp_path / "out" / "rows.jsonl").write_text("".join(lines))
    again = load_prompts([str(tmp_path / "out" / "rows.jsonl")]).prompts
    images = [image for prompt in again for image in images_of(prompt.messages)]
    assert [(i.data, i.text) for i in images] == [(PNG, "noise")] * 2
