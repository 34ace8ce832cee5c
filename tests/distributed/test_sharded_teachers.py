"""A teacher whose weights are split over three ranks, each of which calls it differently often."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from ranks_helpers import torchrun

from opdengine.config.loading import from_mapping
from opdengine.config.train import ConfigError, TrainConfig

WORKER = Path(__file__).with_name("sharded_worker.py")


@pytest.fixture(scope="module", params=["big", "small"])
def found(request: pytest.FixtureRequest, models: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What every rank saw; the head of "small" is its input embedding."""
    out = tmp_path_factory.mktemp("sharded") / "out.json"
    done = torchrun(3, str(WORKER), models[request.param], str(out))
    assert done.returncode == 0, done.stderr[-5000:]
    return json.loads(out.read_text())


def test_every_rank_gets_what_a_whole_teacher_says(found: list[Any]) -> None:
    assert [rank["scored"] for rank in found] == [0, 2, 4]
    assert [len(rank["written"]) for rank in found] == [1, 2, 3]
    for rank in found:
        assert rank["difference"] < 1e-4
        assert rank["written"] == rank["expected"]


def test_all_but_the_head_is_split(found: list[Any]) -> None:
    for name, whole in found[0]["whole"].items():
        held = [rank["held"][name] for rank in found]
        if name == "lm_head.weight" or ("lm_head.weight" not in found[0]["whole"] and "embed_tokens" in name):
            assert held == [whole] * 3
        else:
            assert sum(held) == whole and max(held) <= -(-whole // 3) * 1.6, name


def test_a_call_that_fails_fails_on_its_rank_only(found: list[Any]) -> None:
    assert [bool(rank["errors"][1]) for rank in found] == [True, False, False]
    assert found[0]["errors"][0] == found[0]["errors"][1]


def test_without_the_other_ranks_it_cannot_be_called(found: list[Any]) -> None:
    assert all("within a session" in rank["outside"] for rank in found)


@pytest.mark.parametrize(
    ("teacher", "others", "words"),
    [
        ({"shard": True, "offload": True}, {}, "shard=True is not possible; with offload"),
        ({"shard": True}, {"max_staleness": 1, "use_vllm": True}, "shard=True is not possible; .*max_staleness: 0"),
        ({"shard": True, "base_url": "http://127.0.0.1:1/v1"}, {}, "shard=True is not possible; .*served"),
    ],
)
def test_what_cannot_be_split_is_refused(teacher: dict[str, Any], others: dict[str, Any], words: str) -> None:
    settings = {"model": "m", "output_dir": "o", "train_data": ["d.jsonl"], "teachers": [{"model": "t", **teacher}]}
    with pytest.raises(ConfigError, match=words):
        from_mapping(TrainConfig, {**settings, **others})
