"""The example with pictures: what is drawn and asked, how its models are made, and a short run of its settings."""

from __future__ import annotations

import io
import json
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from opdengine.config.loading import from_mapping
from opdengine.config.train import TrainConfig
from opdengine.methods import METHODS, build_method
from tiny import study as studies
from tiny.pictures import build, study, world
from tiny.pictures.models import build_tokenizer


def pixels(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)), dtype=float)


@pytest.mark.parametrize("colour", world.COLOURS)
def test_a_thing_has_its_colour_and_its_place(colour: str) -> None:
    """The middle of a picture is inside its shape; two shapes stand in halves of their own."""
    one = pixels(world.draw([(colour, "square")], random.Random(0)))
    assert one.shape == (world.SIDE, world.SIDE, 3)
    assert np.abs(one[14:18, 14:18].mean(axis=(0, 1)) - world.COLOURS[colour]).max() < 60
    other = next(c for c in world.COLOURS if c != colour)
    two = pixels(world.draw([(colour, "square"), (other, "circle")], random.Random(0)))
    assert two.shape == (world.SIDE, 2 * world.SIDE, 3)
    for half, name in ((two[:, : world.SIDE], colour), (two[:, world.SIDE :], other)):
        assert np.abs(half[14:18, 14:18].mean(axis=(0, 1)) - world.COLOURS[name]).max() < 60


def test_shapes_differ_in_area() -> None:
    """Of the same size a square covers most, then the circle; a cross and a triangle cover about half."""

    def area(shape: str) -> float:
        drawn = [pixels(world.draw([("blue", shape)], random.Random(seed)))[..., 0] < 140 for seed in range(40)]
        return float(np.mean(drawn))

    square, circle, cross, triangle = (area(shape) for shape in ("square", "circle", "cross", "triangle"))
    assert square > circle > cross > triangle > 0.1


def test_rows_are_the_same_again_and_differ_by_split(tmp_path: Path) -> None:
    rows = world.rows("train", "two", 20, tmp_path)
    drawn = {row["images"][0]: (tmp_path / row["images"][0]).read_bytes() for row in rows}
    assert world.rows("train", "two", 20, tmp_path) == rows and len(set(drawn.values())) == 20
    assert all((tmp_path / name).read_bytes() == data for name, data in drawn.items())
    held_out = world.rows("test", "two", 20, tmp_path)
    assert not {(tmp_path / row["images"][0]).read_bytes() for row in held_out} & set(drawn.values())
    for row in rows:
        colour, shape, second_colour, second_shape = row["answer"].split()
        first, second = f"a {shape} in {colour}", f"a {second_shape} in {second_colour}"
        assert row["image_text"] in ([f"{first} left of {second}"], [f"{second} right of {first}"])
        assert world.verify(row["answer"], row["answer"]) == 1.0
        assert world.verify(f"{colour} {shape}", row["answer"]) == 0.0


def test_a_careless_teacher_swaps_some_words() -> None:
    rng = random.Random(0)
    said = [build.mixed_up("green circle", 0.6, rng) for _ in range(1000)]
    assert set(said) == {"green circle", "blue circle"}
    assert np.mean([s == "blue circle" for s in said]) == pytest.approx(0.6, abs=0.05)
    assert build.mixed_up("red square", 1.0, rng) == "red square"
    assert build.mixed_up("blue triangle", 1.0, rng) == "green cross"


def test_models_are_made_and_measured(tmp_path: Path) -> None:
    """The student continues the teacher; the reader has no marks of pictures in its vocabulary."""
    threads = torch.get_num_threads()
    try:
        for name, plan in build.PLANS.items():
            assert build.make(name, replace(plan, rows=4, steps=3), tmp_path, 0)["steps"] == 3
    finally:
        torch.set_num_threads(threads)
    found = build.report(tmp_path, 2)["accuracy"]
    assert set(found) == set(build.PLANS) and all(0 <= f["eval/accuracy/two"] <= 1 for f in found.values())
    weights = {name: load_file(tmp_path / name / "model.safetensors") for name in found}
    moved = [(weights["student"][n].float() - w.float()).abs().max().item() for n, w in weights["teacher"].items()]
    assert 0 < max(moved) < 0.01
    assert len(build_tokenizer(False)) == len(build_tokenizer()) - 4


def test_the_bundled_models_are_as_reported() -> None:
    """The teachers know what the student mixes up; all that is committed is small."""
    found = json.loads((study.MODELS / "report.json").read_text())["accuracy"]
    assert found["teacher"]["eval/accuracy"] > 0.8 and found["reader"]["eval/accuracy"] > 0.95
    assert found["student"]["eval/accuracy"] < 0.4
    assert sum(file.stat().st_size for file in study.MODELS.rglob("*") if file.is_file()) < 2 << 20


def test_every_arm_trains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All arms' settings make a recipe; the teacher that sees and the one that reads each judge a step."""
    monkeypatch.setattr(study, "TRAIN_PICTURES", 6)
    monkeypatch.setattr(study, "TEST_PICTURES", 3)
    study.prepare(tmp_path, [0], "dev")
    for arm in study.ARMS:
        base = {**study.settings(tmp_path, 0), "seed": 0, "output_dir": str(tmp_path / arm.name)}
        settings = studies.merged(base, studies.filled(arm.settings, folder=str(tmp_path), seed=0))
        settings = studies.merged(settings, {"max_steps": 1, "eval_steps": 0, "per_device_train_batch_size": 2})
        assert type(build_method(from_mapping(TrainConfig, settings))) is METHODS["uni_opd"]
        if arm.name in ("uni_opd", "cross_modal"):
            found = studies.run(arm.name, 0, json.loads(json.dumps(settings)), ["reward/mean"])
            assert found["metrics"] and [point["step"] for point in found["curve"]] == [0, 1]
            assert set(study.STUDY.skills) <= {name.rpartition("/")[2] for name in found["curve"][0]}
