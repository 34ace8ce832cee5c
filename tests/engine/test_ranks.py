"""What the ranks share without any process group: shares, agreement, merged metrics, refusals."""

from __future__ import annotations

import asyncio
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
from engine_helpers import make_config

from opdengine.build import check_ranks
from opdengine.config import ConfigError, TrainConfig
from opdengine.distributed import PeerError, Ranks
from opdengine.metrics import Mean, mean, merge
from opdengine.settings import from_mapping, to_mapping


@pytest.mark.parametrize("world", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("count", [0, 1, 5, 8])
def test_shares_are_consecutive_and_take_everything_once(count: int, world: int) -> None:
    shares = [Ranks(rank, world).share(count) for rank in range(world)]
    assert [place for share in shares for place in share] == list(range(count))
    sizes = [len(share) for share in shares]
    assert max(sizes) - min(sizes) <= 1


class Scripted(Ranks):
    """A rank whose peers report what the test says."""

    def gather(self, value: Any) -> list[Any]:
        return [*self.__dict__["before"], value, *self.__dict__["after"]]


def scripted(before: list[Any], after: list[Any]) -> Scripted:
    ranks = Scripted(len(before), len(before) + 1 + len(after))
    ranks.__dict__.update(before=before, after=after)
    return ranks


def test_the_error_of_the_first_rank_that_failed_decides() -> None:
    mine = ValueError("mine")
    with pytest.raises(ValueError, match="mine"), scripted([None], [(KeyError, "theirs")]).agree():
        raise mine
    theirs = pytest.raises(PeerError, match=r"rank 0 failed \(KeyError\): theirs")
    with theirs as found, scripted([(KeyError, "theirs")], []).agree():
        raise mine
    assert found.value.kind is KeyError and found.value.__cause__ is mine
    with pytest.raises(PeerError, match="rank 2 failed"), scripted([None], [(OSError, "full")]).agree():
        pass
    with scripted([None], [None]).agree():
        pass


def test_what_is_awaited_fails_on_all_ranks() -> None:
    async def work(error: Exception | None = None) -> int:
        if error is not None:
            raise error
        return 3

    assert asyncio.run(scripted([None], []).agreed(work())) == 3
    with pytest.raises(PeerError):
        asyncio.run(scripted([(OSError, "gone")], []).agreed(work()))
    with pytest.raises(ValueError, match="mine"):
        asyncio.run(Ranks().agreed(work(ValueError("mine"))))


def test_counts_are_added_and_means_weighted() -> None:
    parts = [{"count": 2.0, "mean": mean([1.0, 3.0])}, {"count": 3.0, "mean": mean([8.0]), "other": Mean(0.5, 4)}]
    assert merge(parts) == {"count": 5.0, "mean": 4.0, "other": 0.5}
    assert merge([{"empty": Mean(0.0, 0)}, {"empty": Mean(0.0, 0)}]) == {"empty": 0.0}
    again = pickle.loads(pickle.dumps(Mean(0.25, 8)))
    assert again == 0.25 and again.weight == 8
    assert json.dumps(Mean(0.25, 8)) == "0.25"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"use_vllm": True, "vllm_tensor_parallel_size": 4}, "vllm_tensor_parallel_size=4.*2 processes on a machine"),
        (
            {"use_vllm": True, "vllm_tensor_parallel_size": 2, "vllm_enable_sleep_mode": True},
            "vllm_enable_sleep_mode.*lower vllm_gpu_memory_utilization",
        ),
    ],
)
def test_what_several_processes_cannot_do_is_refused(
    models: dict[str, str], prompt_file: str, tmp_path: Path, changes: dict[str, Any], words: str
) -> None:
    plain = to_mapping(make_config(models, prompt_file, tmp_path))
    config = from_mapping(TrainConfig, {**plain, **changes})
    check_ranks(config, Ranks())
    with pytest.raises(ConfigError, match=words):
        check_ranks(config, Ranks(1, 4, 1, 2))


@pytest.mark.parametrize("changes", [{"vllm_mode": "server"}, {"vllm_tensor_parallel_size": 2}])
def test_several_processes_may_share_an_engine(
    models: dict[str, str], prompt_file: str, tmp_path: Path, changes: dict[str, Any]
) -> None:
    plain = to_mapping(make_config(models, prompt_file, tmp_path))
    config = from_mapping(TrainConfig, {**plain, "use_vllm": True, **changes})
    check_ranks(config, Ranks(1, 4, 1, 2))
