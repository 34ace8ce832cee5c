"""``opdengine bench``: what is refused before a model is loaded, what is kept, and how it is told."""

from __future__ import annotations

import base64
import json
import os
import pickle
import zlib
from pathlib import Path
from typing import Any

import pytest

from opdengine.cli import main
from opdengine.config.sections import DataConfig
from opdengine.data.benchmarks import BENCHMARKS
from opdengine.data.prompts import DataError, load_prompts
from opdengine.tools.bench import loop
from opdengine.tools.bench.lm_eval import TASKS
from opdengine.tools.bench.questions import first_of_each
from opdengine.tools.bench.record import Outcome, Record, file_of
from opdengine.training.evaluate import wilson
from opdengine.types import Prompt
from opdengine.verifiers.bfcl import arithmetic
from opdengine.verifiers.grader import Grader
from opdengine.verifiers.score import VerifierSettings

PROBLEM = {
    "prompt": 'def total(xs):\n    """Sum."""\n',
    "canonical_solution": "    return sum(xs)\n",
    "test": "def check(candidate):\n    assert candidate([1, 2]) == 3\n",
    "entry_point": "total",
}


@pytest.fixture
def problems(tmp_path: Path) -> str:
    """Three problems in the layout of HumanEval; the third is too long for the tiny model's window."""
    rows = [{"task_id": f"HumanEval/{i}", **PROBLEM} for i in range(3)]
    rows[2]["prompt"] = rows[2]["prompt"].replace("Sum.", "Sum. " * 400)
    file = tmp_path / "problems.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


def run(model: str, problems: str, out: Path, *more: str) -> int:
    arguments = ["bench", "humaneval", "--model", model, "--data", problems, "--out", str(out)]
    return main([*arguments, "--max_completion_length", "8", *more])


def test_a_result_is_kept_continued_and_never_mixed(
    models: dict[str, str], problems: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "result.json"
    sampled = ["--eval_temperature", "1", "--eval_num_generations", "2"]
    assert run(models["student"], problems, out, *sampled) == 0
    assert "| humaneval | 3 | 0.0 | 0.0 to 56.2 | 0.0 |" in capsys.readouterr().out
    first = json.loads(out.read_text())
    assert first["seeds"]["0"]["scores"] == {f"HumanEval/{i}": [0.0, 0.0] for i in range(3)}
    assert first["seeds"]["0"]["too_long"] == 1 and first["settings"]["sampling"]["n"] == 2
    answers = [json.loads(line) for line in out.with_suffix(".seed_0.jsonl").read_text().splitlines()]
    assert [a["id"] for a in answers] == ["HumanEval/0", "HumanEval/0", "HumanEval/1", "HumanEval/1"]

    assert run(models["student"], problems, out, *sampled, "--seeds", "2") == 0
    second = json.loads(out.read_text())
    assert second["seeds"]["0"] == first["seeds"]["0"] and list(second["seeds"]) == ["0", "1"]
    assert second["table"][0]["seeds"] == [0.0, 0.0]

    for other, named in (
        (["--limit", "1"], "fingerprint, limit, questions"),
        (["--eval_temperature", "0.5"], "sampling"),
        (["--chat_template", "{{ messages[0].content }}"], "chat_template"),
        (["--dtype", "bfloat16"], "dtype"),
    ):
        given = sampled[:2] * ("eval_temperature" not in other[0][2:]) + sampled[2:] + other
        assert run(models["student"], problems, out, *given) == 2
        assert f"holds results of other settings ({named}); remove it" in capsys.readouterr().err
    assert run(models["big"], problems, out, *sampled) == 2
    assert "other settings (model)" in capsys.readouterr().err
    assert json.loads(out.read_text()) == second


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["bench", "humanevil"], "the benchmark 'humanevil' is unknown; choose one of"),
        (["bench", "humaneval:easy", "--data", "a.jsonl"], "leave 'easy' out of the name"),
        (["bench", "humanevall"], "did you mean 'humaneval'?"),
        (["bench", "tau2"], "needs a checkout of tau2-bench"),
        (["bench", "alfworld"], "opdengine eval --environment.name alfworld"),
        (["bench", "livecodebench"], "name a file of them (a file test*.jsonl of the hub's livecodebench"),
        (["bench", "humaneval", "--limit", "0"], "--limit 0 is not possible"),
        (["bench", "humaneval", "--seeds", "-1"], "--seeds -1 is not possible"),
        (["bench", "humaneval", "--seeds", "3"], "set --eval_temperature 0.7"),
        (["bench", "humaneval", "--data", "nowhere.jsonl"], "data file 'nowhere.jsonl' does not exist"),
        (["bench", "humaneval", "--out", "."], "--out '.' is a folder"),
        (["bench", "humaneval", "--data", str(Path(__file__).with_name("none.jsonl"))], "none.jsonl' does not exist"),
    ],
)
def test_what_is_wrong_is_said_before_a_model_is_loaded(
    arguments: list[str], said: str, models: dict[str, str], capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    monkeypatch.setattr("opdengine.cli._load_student", lambda config: pytest.fail("a model was loaded"))
    assert main([*arguments, "--model", models["student"]]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1


@pytest.mark.parametrize("name", sorted(set(BENCHMARKS) - {"livecodebench"}))
def test_a_missing_package_is_named_with_its_command(
    name: str, models: dict[str, str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda module: None)
    assert main(["bench", name, "--model", models["student"]]) == 2
    error = capsys.readouterr().err
    assert f"the package {next(iter(BENCHMARKS[name].packages))} is missing: pip install" in error
    with pytest.raises(DataError, match="is missing: pip install"):
        load_prompts([f"bench:{name}"])


def test_lm_eval_is_asked_for_before_a_model_is_loaded(
    models: dict[str, str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda module: None)
    for name in ("ifeval", "lm_eval:gsm8k"):
        assert main(["bench", name, "--model", models["student"]]) == 2
        assert "the package lm-eval is missing: pip install 'opdengine[bench]'" in capsys.readouterr().err


LIVE = {
    "question_id": "1",
    "question_content": "Add up.",
    "starter_code": "",
    "public_test_cases": json.dumps([{"input": "1 2\n", "output": "3\n", "testtype": "stdin"}]),
    "metadata": "{}",
}
METHOD = {
    **LIVE,
    "question_id": "2",
    "starter_code": "class Solution:\n    def total(self, xs: List[int], more: int) -> int:\n        ",
    "public_test_cases": json.dumps([{"input": "[1, 2]\n3", "output": "6", "testtype": "functional"}]),
    "metadata": json.dumps({"func_name": "total"}),
}


def packed(value: object) -> str:
    return base64.b64encode(zlib.compress(pickle.dumps(value))).decode()


def test_live_code_bench_is_read_and_graded(tmp_path: Path) -> None:
    file = tmp_path / "test6.jsonl"
    hidden = packed(json.dumps([{"input": "5 5\n", "output": "10", "testtype": "stdin"}]))
    file.write_text("".join(json.dumps(row) + "\n" for row in ({**LIVE, "private_test_cases": hidden}, METHOD)))
    prompts = load_prompts([DataConfig(str(file), format="livecodebench")]).prompts
    assert prompts[0].answer["inputs"] == ["1 2\n", "5 5\n"] and prompts[1].answer["inputs"] == [[[1, 2], 3]]
    texts = [
        "```python\nprint(sum(map(int, input().split())))\n```",
        "```python\nclass Solution:\n    def total(self, xs: List[int], more):\n        return sum(xs) + more\n```",
        *(
            "```python\nprint(3)\n```",
            "```python\nclass Solution:\n    def total(self, xs, more):\n        return 5\n```",
        ),
    ]
    with Grader("code", VerifierSettings(workers=1)) as grader:
        assert [score.value for score in grader.grade(texts, [*prompts, *prompts])] == [1, 1, 0, 0]


class Harmful:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("harmed",)


@pytest.mark.parametrize(
    "given", [packed(Harmful()), packed([1]), "!", packed(json.dumps({"a": 1})), "[{}]", "[1", "QUJD"]
)
def test_hidden_tests_run_nothing_when_they_are_read(
    given: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a.jsonl").write_text(json.dumps({**LIVE, "private_test_cases": given}) + "\n")
    with pytest.raises(DataError, match="'private_test_cases'"):
        load_prompts([DataConfig("a.jsonl", format="livecodebench")])
    assert not Path("harmed").exists()


def test_the_benchmarks_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench"]) == 0
    names = {line.split()[0] for line in capsys.readouterr().out.splitlines()}
    assert names == {*BENCHMARKS, *TASKS, "lm_eval:TASK,..."}
    assert main(["bench", "--config", "run.yaml"]) == 2
    assert "the name of the benchmark is missing" in capsys.readouterr().err


def test_results_lie_beside_the_model() -> None:
    assert file_of("runs/a/final", "bfcl:live,multiple") == Path("runs/a/bench/bfcl_live_multiple.json")
    assert file_of("runs/a/checkpoints/step_9", "humaneval") == Path("runs/a/bench/step_9/humaneval.json")
    assert file_of("models/other", "humaneval") == Path("bench/other/humaneval.json")


def test_the_table_is_the_mean_over_seeds_with_an_interval(tmp_path: Path) -> None:
    record = Record(tmp_path / "a.json", "some", {"x": 1}, "m")
    for seed, value in enumerate((0.2, 0.4)):
        record.add(
            seed,
            Outcome(
                {"a": {"value": value, "questions": 50}, "b": {"value": 10 * value, "questions": 9, "stderr": 0.1}}
            ),
        )
    a, b = Record(tmp_path / "a.json", "some", {"x": 1}, "m").table()
    assert a["mean"] == pytest.approx(0.3) and (a["low"], a["high"]) == pytest.approx(wilson(15, 50))
    assert (b["low"], b["high"]) == pytest.approx((3 - 0.196, 3 + 0.196)) and b["seeds"] == [2, 4]
    (tmp_path / "a.json").write_text('{"other": 1}')
    with pytest.raises(ValueError, match="holds no results of opdengine bench"):
        Record(tmp_path / "a.json", "some", {"x": 1}, "m")


def test_a_place_that_cannot_be_written_to_is_said_before_a_model_is_loaded(
    models: dict[str, str], problems: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setattr("opdengine.cli._load_student", lambda config: pytest.fail("a model was loaded"))
    assert run(models["student"], problems, tmp_path / "file" / "out.json") == 2
    assert "file" in capsys.readouterr().err


def test_answers_longer_than_the_window_are_refused(
    models: dict[str, str], problems: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [
        "bench",
        "humaneval",
        "--model",
        models["student"],
        "--data",
        problems,
        "--out",
        str(tmp_path / "o.json"),
    ]
    assert main([*arguments, "--max_completion_length", "1024"]) == 2
    assert (
        "max_completion_length=1024 leaves no room for a prompt in the model's window of 1024"
        in capsys.readouterr().err
    )


def test_a_limit_is_of_every_kind() -> None:
    prompts = [Prompt(str(i), (), key="ab"[i % 2]) for i in range(6)]
    assert [p.id for p in first_of_each(prompts, 2)] == ["0", "1", "2", "3"]
    assert first_of_each(prompts, None) == prompts


def test_a_run_is_asked_for_what_is_missing_alone(
    models: dict[str, str], problems: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "result.json"
    assert run(models["student"], problems, out) == 0
    monkeypatch.setattr(loop.Questions, "run", lambda *a: pytest.fail("answered again"))
    assert run(models["student"], problems, out) == 0


@pytest.mark.parametrize(
    ("text", "value"),
    [("2*3", 6), ("10 - 2.5", 7.5), ("-3 + 4", 1), ("10**6", 10**6), ("'a' + 'b'", "ab"), ("7 // 2", 3)],
)
def test_sums_in_arguments_are_worked_out(text: str, value: object) -> None:
    assert arithmetic(text) == value


@pytest.mark.parametrize(
    "text",
    [
        *("__import__('os').getcwd() + 'x'", "open('/etc/passwd') + 1", "x + 1", "(lambda: 1)() + 1", "[1] * 9**9"),
        *(
            "9**9**9",
            "2**65",
            "2**(8*8)",
            "'a' * 10**10",
            "'%999999999d' % 1",
            "True + 1",
            "1 << 99",
            "1 + " * 999 + "1",
        ),
        *("(1).__class__ + 1", "f'{1}' + 'a'", "[i for i in '1'] + [2]", "2**2**2", "b'a' + b'b'"),
    ],
)
def test_what_a_model_writes_is_never_run(text: str) -> None:
    with pytest.raises(ValueError, match="is no plain arithmetic"):
        arithmetic(text)
