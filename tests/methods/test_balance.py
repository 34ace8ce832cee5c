"""Difficulty-aware balancing: shapes and copies by hand, and the command with a killed process."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from opdengine.config.train import TrainConfig
from opdengine.data.prompts import DataError, PromptSet, load_prompts
from opdengine.errors import ConfigError
from opdengine.models.chat import load_tokenizer
from opdengine.tools.balance import (
    BalanceSettings,
    chosen,
    depends_on,
    histogram,
    pass_counts,
    repetitions,
    rows,
    shape,
    write,
)
from opdengine.types import Prompt, SamplingParams


@pytest.mark.parametrize(
    ("bins", "kind", "repeated"),
    [
        ([9, 1, 2, 1, 8], "u", [1, 2, 3]),
        ([9, 4, 2, 1, 3], "hard", [1, 2, 3, 4]),
        ([3, 1, 2, 4, 9], "easy", [0, 1, 2, 3]),
        ([1, 5, 9, 5, 1], "other", []),
        ([4, 4, 4, 4, 4], "other", []),
    ],
)
def test_shapes(bins: list[int], kind: str, repeated: list[int]) -> None:
    assert shape(bins) == kind
    assert list(chosen(kind, 4)) == repeated


def counts_of(bins: Sequence[int]) -> dict[str, int]:
    return {f"p{count}.{i}": count for count, size in enumerate(bins) for i in range(size)}


def settings(folder: Path, **changes: Any) -> BalanceSettings:
    return BalanceSettings(folder / "out.jsonl", **{"rollouts": 4, **changes})


@pytest.mark.parametrize(
    ("bins", "cap", "target", "after"),
    [
        ([10, 3, 5, 0, 10], 9, "largest", [10, 10, 10, 0, 10]),  # flat where there is any prompt
        ([10, 3, 5, 0, 10], 2, "largest", [10, 6, 10, 0, 10]),  # at most twice each
        ([10, 3, 5, 1, 4], 9, "largest", [10, 10, 10, 9, 10]),  # the easy end is raised, too
        ([20, 3, 8, 4, 2], 9, "median", [20, 4, 8, 4, 4]),
        ([2, 3, 5, 3, 2], 9, "largest", [2, 3, 5, 3, 2]),
    ],
)
def test_scarce_counts_are_raised_and_nothing_is_removed(
    tmp_path: Path, bins: list[int], cap: float, target: str, after: list[int]
) -> None:
    counts = counts_of(bins)
    times = repetitions(counts, settings(tmp_path, cap=cap, target=target), seed=0)
    assert times.keys() == counts.keys() and min(times.values()) >= 1 and max(times.values()) <= cap
    assert histogram([c for id, c in counts.items() for _ in range(times[id])], 4) == after
    for count in range(5):  # no prompt of a count occurs much more often than another
        same = [times[id] for id, c in counts.items() if c == count]
        assert not same or max(same) - min(same) <= 1


def test_who_occurs_once_more_depends_on_the_seed(tmp_path: Path) -> None:
    counts = counts_of([30, 20, 0, 0, 0])
    one, again, other = (repetitions(counts, settings(tmp_path), seed) for seed in (0, 0, 1))
    assert one == again != other
    assert sum(one.values()) == sum(other.values()) == 60


def prompts(bins: Sequence[int], key: str = "") -> list[Prompt]:
    return [
        Prompt(f"{key}{id}", ({"role": "user", "content": id},), key=key, answer=str(c), extra={"level": c})
        for id, c in counts_of(bins).items()
    ]


def test_the_new_file_holds_every_row_and_copies_with_ids_of_their_own(tmp_path: Path) -> None:
    data = prompts([6, 1, 0, 0, 5])
    data.append(Prompt("p1.0#2", ({"role": "user", "content": "an id in use"},), answer="4"))
    counts = {p.id: int(p.answer) for p in data}
    report = write(data, counts, settings(tmp_path), seed=0)
    loaded = load_prompts([str(tmp_path / "out.jsonl")]).prompts
    assert [p.id for p in loaded if p.messages[0]["content"] == "p1.0"] == ["p1.0", "p1.0#3", "p1.0#4", "p1.0#5"]
    assert {p.id for p in data} <= {p.id for p in loaded}
    copies = [p for p in loaded if p.id.startswith("p1.0#") and p.id != "p1.0#2"]
    assert all(p.answer == "1" and p.extra == {"level": 1} for p in copies)
    assert report["prompts_before"] == 13 and report["prompts_after"] == len(loaded) == 16


def test_each_routing_key_is_balanced_alone(tmp_path: Path) -> None:
    data = prompts([6, 2, 0, 0, 0], "math") + prompts([1, 2, 4, 1, 1], "code")
    report = write(data, {p.id: int(p.answer) for p in data}, settings(tmp_path), seed=0)["keys"]
    assert report["math"] == {"shape": "hard", "before": [6, 2, 0, 0, 0], "after": [6, 6, 0, 0, 0]}
    assert report["code"]["before"] == report["code"]["after"] and report["code"]["shape"] == "other"


def test_tools_survive(tmp_path: Path) -> None:
    tool = {"type": "function", "function": {"name": "f"}}
    (row,) = rows([Prompt("a", ({"role": "user", "content": "x"},), tools=(tool,))], {"a": 1})
    assert row["tools"] == [tool] and "answer" not in row and "data_source" not in row


# -------------------------------------------------------------------------------- counting


class Student:
    """Answers right as often as the prompt's answer says; may die after some chunks."""

    def __init__(self, lives: int = 99) -> None:
        self.lives = lives
        self.asked: list[str] = []

    def sample(self, prompts: Sequence[Prompt]) -> list[list[str]]:
        if not self.lives:
            raise KeyboardInterrupt
        self.lives -= 1
        self.asked += [p.id for p in prompts]
        return [["right" if i < int(p.answer) else "wrong" for i in range(4)] for p in prompts]

    @staticmethod
    def grade(texts: Sequence[str], prompts: Sequence[Prompt]) -> list[float]:
        assert len(texts) == len(prompts)
        return [float(t == "right") for t in texts]


def test_counting_goes_on_where_it_stopped(tmp_path: Path) -> None:
    data, file = prompts([3, 2, 4, 1, 2]), tmp_path / "counts.jsonl"
    expected = {p.id: int(p.answer) for p in data}
    first = Student(lives=2)
    with pytest.raises(KeyboardInterrupt):
        pass_counts(data, first.sample, first.grade, file, {"seed": 1}, chunk=3)
    with file.open("a") as out:
        out.write('{"id": "p4.1", "corr')  # the process died within a line
    second = Student()
    assert pass_counts(data, second.sample, second.grade, file, {"seed": 1}, chunk=3) == expected
    assert first.asked + second.asked == [p.id for p in data]
    third = Student(lives=0)
    assert pass_counts(data, third.sample, third.grade, file, {"seed": 1}, chunk=3) == expected
    with pytest.raises(DataError, match="counts for other settings"):
        pass_counts(data, third.sample, third.grade, file, {"seed": 2}, chunk=3)


def test_counts_belong_to_weights_and_template(models: dict[str, str], tmp_path: Path) -> None:
    """Under the same name there may be other weights by now, and a template that lets the student think."""
    data, folder = PromptSet(tuple(prompts([1])), {}), tmp_path / "model"
    shutil.copytree(models["student"], folder)

    def header(**changes: Any) -> dict[str, Any]:
        config = TrainConfig(model=str(folder), output_dir=str(tmp_path), **changes)
        tokenizer = load_tokenizer(config.model, chat_template=config.chat_template)
        return depends_on(config, data, tokenizer, SamplingParams())

    before = header()
    assert header() == before
    for changes in ({"chat_template_kwargs": {"enable_thinking": False}}, {"chat_template": "{{ messages }}"},
                    {"dtype": "bfloat16"}, {"bf16": True}):  # fmt: skip
        assert header(**changes) != before
    shutil.copy(Path(models["small"]) / "model.safetensors", folder / "model.safetensors")
    assert header() != before


@pytest.mark.parametrize(
    "line",
    ["garbage", "[]", "{}", '{"id": "p0.0"}', '{"id": 5, "correct": 1}', '{"id": "p0.0", "correct": NaN}',
     '{"id": "p0.0", "correct": 1.5}', '{"id": "p0.0", "correct": -1}', '{"id": "p0.0", "correct": "1"}',
     '{"id": "p0.0", "correct": 5}', '{"id": "p0.0", "correct": true}', '{"id": "p0.0", "correct": 1e999}'],
)  # fmt: skip
def test_counts_that_are_none_are_refused_with_their_line(tmp_path: Path, line: str) -> None:
    file = tmp_path / "counts.jsonl"
    file.write_text(f'{{"n": 4}}\n{{"id": "p3.0", "correct": 4}}\n{line}\n')
    before = file.read_text()
    student = Student()
    with pytest.raises(DataError, match=r"counts.jsonl, line 3: .*; remove the line"):
        pass_counts(prompts([3]), student.sample, student.grade, file, {"n": 4}, chunk=1)
    assert file.read_text() == before
    file.write_text("no header\n")
    with pytest.raises(DataError, match="counts for other settings"):
        pass_counts(prompts([3]), student.sample, student.grade, file, {"n": 4}, chunk=1)


def test_only_whole_rewards_count_as_right(tmp_path: Path) -> None:
    rewards = iter([1.0, 0.99, 0.5, 0.0])
    counts = pass_counts(
        prompts([1]), lambda asked: [["a"] * 4 for _ in asked], lambda texts, _: [next(rewards) for _ in texts],
        tmp_path / "counts.jsonl", {}, chunk=1,
    )  # fmt: skip
    assert list(counts.values()) == [1]


def command(models: dict[str, str], data: str, folder: Path, *more: str) -> subprocess.Popen[str]:
    settings = {"model": models["student"], "train_data": data, "output_dir": str(folder / "run"),
                "verifier": "numeric", "max_completion_length": "12", "method": "uni_opd"}  # fmt: skip
    arguments = [f"--{name}={value}" for name, value in settings.items()]
    return subprocess.Popen(
        [sys.executable, "-m", "opdengine", "balance", "--output", str(folder / "out.jsonl"), *more, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_the_command_killed_and_repeated_gives_the_same(models: dict[str, str], tmp_path: Path) -> None:
    """A random model is right now and then if the answer is a digit that it happens to write."""
    data = tmp_path / "data.jsonl"
    rows = [{"id": f"p{i}", "prompt": f"{i} + {i}?", "answer": str(i % 3)} for i in range(24)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    outputs = []
    for name in ("whole", "killed"):
        folder = tmp_path / name
        folder.mkdir()
        if name == "killed":
            child = command(models, str(data), folder, "--chunk", "1", "--rollouts", "4")
            assert child.stderr is not None
            for line in child.stderr:
                if "3 prompts counted" in line:
                    child.kill()
            child.wait()
            kept = (folder / "out.counts.jsonl").read_text().count("\n")
            assert 3 <= kept < 25 and not (folder / "out.jsonl").exists()
        child = command(models, str(data), folder, "--chunk", "8", "--rollouts", "4")
        out, err = child.communicate()
        assert child.returncode == 0, err
        assert "24 -> " in out
        report = json.loads((folder / "out.report.json").read_text())
        assert sum(report["keys"][""]["before"]) == 24
        counted = json.loads((folder / "out.counts.jsonl").read_text().split("\n")[0])
        sampled = [counted[name] for name in ("temperature", "top_p", "top_k", "repetition_penalty")]
        assert sampled == [1.0, 0.95, 50, 1.0]  # whatever the run samples with
        assert (folder / "out.png").stat().st_size > 1000
        outputs.append(((folder / "out.jsonl").read_text(), report, sorted((folder / "out.counts.jsonl").open())))
    assert outputs[0] == outputs[1]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rollouts": 1}, "--rollouts 1 is not possible"),
        ({"cap": 0.5}, "--cap 0.5 is not possible"),
        ({"temperature": 0.0}, "--temperature 0.0 is not possible; with 0 all rollouts"),
        ({"temperature": float("nan")}, "--temperature nan is not possible"),
        ({"top_p": 0.0}, "--top_p 0.0 is not possible"),
        ({"top_k": -1}, "--top_k -1 is not possible"),
        ({"target": "most"}, "choose largest or median"),
    ],
)
def test_impossible_settings_are_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        settings(tmp_path, **changes)
    assert np.isfinite(settings(tmp_path).cap)
