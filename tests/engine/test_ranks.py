"""What the ranks share without any process group: shares, agreement, merged metrics, refusals."""

from __future__ import annotations

import asyncio
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
from engine_helpers import make_config
from ranks_helpers import torchrun

from opdengine.config.loading import from_mapping, to_mapping
from opdengine.config.train import ConfigError, TrainConfig
from opdengine.distributed import PeerError, Ranks, start
from opdengine.metrics import Mean, mean, merge
from opdengine.training.build import check_ranks


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
    # Within another agreement the rank that failed still decides.
    known = PeerError("rank 1 failed (OSError): full", OSError)
    with (
        pytest.raises(PeerError, match=r"^rank 1 failed \(OSError\): full$"),
        scripted([], [(OSError, "full")]).agree(),
    ):
        raise known
    with pytest.raises(OSError, match="full"), scripted([None], []).agree():
        raise OSError("full")


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


class Counting(Ranks):
    """A rank of equal ones, which counts how often they met."""

    def gather(self, value: Any) -> list[Any]:
        self.__dict__["met"] = self.__dict__.get("met", 0) + 1
        return [value] * self.world_size

    @property
    def met(self) -> int:
        return int(self.__dict__.get("met", 0))


class Reporting(Counting):
    """The first of two ranks of a machine; the other one's turn fails."""

    def gather(self, value: Any) -> list[Any]:
        (mine, _), number = super().gather(value), self.met
        return [mine, {1: 2, 2: None, 3: (OSError, "no room")}[number]]


@pytest.mark.parametrize("local_rank", [0, 1, 2])
def test_the_ranks_of_a_machine_take_turns(local_rank: int) -> None:
    """Before a rank's turn all have met once for each rank before it, and after it once for each one that follows."""
    ranks = Counting(local_rank, 3, local_rank, 3)
    assert ranks.in_turn(lambda: ranks.met) == 1 + local_rank  # once to know how many turns there are
    assert ranks.met == 1 + 3
    assert Ranks().in_turn(lambda: "alone") == "alone"


def test_what_fails_in_one_turn_ends_all_ranks() -> None:
    ranks = Reporting(0, 2, 0, 2)
    done: list[str] = []
    with pytest.raises(PeerError, match="rank 1 failed"):
        ranks.in_turn(lambda: done.append("mine"))
    assert done == ["mine"]  # the second turn was the other rank's


def test_more_processes_than_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": 5, "WORLD_SIZE": 8, "LOCAL_RANK": 1, "LOCAL_WORLD_SIZE": 4}.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,3")
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    with (
        pytest.raises(ConfigError, match=r"4 processes on a machine with 2 GPUs \(CUDA_VISIBLE_DEVICES='2,3'\)"),
        start(),
    ):
        pass


EXCHANGE_AND_END = """
import sys
from opdengine.distributed import start
sys.setswitchinterval(100)  # this thread keeps the interpreter as long as it does not wait for anything
with start() as ranks:
    group = __import__("torch").distributed.group.WORLD  # as a split model holds it
    for i in range(5):
        assert ranks.gather(ranks.rank) == [0, 1, 2, 3]
print("done")
"""


def test_processes_that_end_right_after_an_exchange_end_well(tmp_path: Path) -> None:
    """The threads of the exchange must not need the interpreter when it is gone: that aborts a process."""
    program = tmp_path / "program.py"
    program.write_text(EXCHANGE_AND_END)
    for _ in range(4):  # without the wait two of three such runs fail
        done = torchrun(4, str(program), OMP_NUM_THREADS="1")
        assert done.returncode == 0, done.stderr[-2000:]
        assert done.stdout.count("done") == 4
