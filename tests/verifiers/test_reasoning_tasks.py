"""Every allowed data set of reasoning-gym takes the right answer, takes no junk, and runs nothing that it is told."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from opdengine.config.loading import from_mapping
from opdengine.config.sections import DataConfig
from opdengine.config.train import TrainConfig
from opdengine.data.prompts import DataError, load_prompts
from opdengine.data.reasoning_tasks import DENIED, allowed, generate, split_of
from opdengine.training.run import train
from opdengine.types import Prompt
from opdengine.verifiers import load_verifier
from opdengine.verifiers.grader import Grader
from opdengine.verifiers.reasoning_tasks import EVALUATED, extract_answer
from opdengine.verifiers.score import VerifierSettings
from opdengine.workers.plain import decode

JUNK = (
    "", "0", "1", "2", "7", "-1", "10", "100", "zzz", "True", "False", "None", "yes", "no", "[]", "{}", "[[0]]", "a",
    "A", "0.5", "1/2", "x", "()", "null", "nan", "inf", "-inf", "1e999", "the answer", "0 0 0", "1,2,3", "[1, 2, 3]",
    "north", "?", "0" * 50, "9" * 200, "word " * 200, "1 " * 200, '{"a": 1}', "0.0", "+", ".", "e", "x**2", "C",
    "00:00", "2020-01-01", "Monday", "nan+nanj", "<answer></answer>", "\\boxed{1}", "\x00", "𝟙",
)  # fmt: skip
SLOW = {"knight_swap", "futoshiki", "zebra_puzzles", "sokoban", "puzzle24", "intermediate_integration", "quantum_lock"}


def tasks(name: str) -> list[dict[str, Any]]:
    return list(generate(f"reasoning_gym:{name}?size={1 if name in SLOW else 5}&seed=11"))


def equal(junk: str, gold: Any) -> bool:
    """Whether junk happens to be the right answer, written like it or as a number."""
    try:
        return float(junk) == float(gold)
    except (TypeError, ValueError):
        return junk.strip().casefold() == str(gold).strip().casefold()


@pytest.mark.parametrize("name", allowed())
def test_right_answers_pass_and_junk_does_not(name: str) -> None:
    verify = load_verifier("reasoning_gym", VerifierSettings())
    for row in tasks(name):
        answer = json.loads(json.dumps(row["answer"]))  # as it reaches a worker
        gold = decode(answer["entry"])["answer"]
        if gold is not None:
            for text in (str(gold), f"<think>no</think> So <answer>1</answer> no: <answer>\n{gold}\n</answer>."):
                score = verify(text, answer, ())
                assert (score.value, score.failure) == (1, ""), (gold, score)
        for junk in JUNK:
            score = verify(junk, answer, ())
            assert not score.failure
            assert score.value < 0.5 or equal(junk, gold), (junk, gold, score)


@pytest.mark.parametrize("name", sorted(EVALUATED))
def test_answers_are_never_run(name: str, tmp_path: Path) -> None:
    """These scorers evaluate what they are given: without a guard the first attack writes the file."""
    verify = load_verifier("reasoning_gym", VerifierSettings())
    mark = tmp_path / "mark"
    write = f"__import__('pathlib').Path({str(mark)!r}).write_text('')"
    spelled = "+".join(f"chr({ord(c)})" for c in write)
    (row, *_) = tasks(name)
    for attack in (write, f"[{write}]", f"[[{write}]]", f"exec({spelled})", f"eval({spelled})", f"(lambda: {write})()"):
        score = verify(f"<answer>{attack}</answer>", row["answer"], ())
        assert score.value == 0 and "no plain expression" in score.detail
    assert not mark.exists()


def test_the_attack_works_without_the_guard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the test above would show nothing."""
    monkeypatch.setattr("opdengine.verifiers.reasoning_tasks.EVALUATED", {})
    (row, *_) = tasks("n_queens")
    mark = tmp_path / "mark"
    write = f"__import__('pathlib').Path({str(mark)!r}).write_text('')"
    load_verifier("reasoning_gym", VerifierSettings())(write, row["answer"], ())
    assert mark.exists()


@pytest.mark.parametrize(
    ("name", "junk"), [("game_of_life_halting", "zzz"), ("coin_flip", "0"), ("complex_arithmetic", "nan")]
)
def test_denied_scorers_are_still_unsound(name: str, junk: str) -> None:
    """When this fails, a newer version may have repaired a scorer."""
    import reasoning_gym

    entries = reasoning_gym.create_dataset(name, size=20, seed=1)
    score = reasoning_gym.get_score_answer_fn(name)
    assert sum(score(junk, entry) >= 0.99 and junk != entry["answer"] for entry in entries) > 5


@pytest.mark.parametrize("name", DENIED)
def test_denied_data_sets_are_refused_with_the_reason(name: str) -> None:
    with pytest.raises(DataError, match=f"'{name}' cannot be used to judge answers: .*{DENIED[name][:20]}"):
        load_prompts([f"reasoning_gym:{name}"])


def test_training_and_evaluation_share_no_question() -> None:
    names = "tower_of_hanoi,chain_sum,simple_equations"
    sets = {
        (split, seed): {row["prompt"] for row in generate(f"reasoning_gym:{names}?size=8&split={split}&seed={seed}")}
        for split in ("train", "eval")
        for seed in (0, 1, 5)
    }
    assert all(len(questions) == 24 for questions in sets.values()), "no question twice, and as many as asked for"
    train = set.union(*(questions for (split, _), questions in sets.items() if split == "train"))
    held_out = set.union(*(questions for (split, _), questions in sets.items() if split == "eval"))
    assert not train & held_out
    assert {split_of(question) for question in train} == {"train"}


def test_the_same_seed_gives_the_same_tasks_and_options_are_handed_on() -> None:
    path = "reasoning_gym:chain_sum?size=5&seed=4&min_terms=2&max_terms=2"
    first, second = load_prompts([path]).prompts, load_prompts([path]).prompts
    assert first == second and len({p.id for p in first}) == 5
    assert first != load_prompts([path.replace("seed=4", "seed=5")]).prompts
    expressions = [decode(p.answer["entry"])["metadata"]["expression"] for p in first]
    assert all(len(e.split()) == 3 for e in expressions)
    assert first[0].key == "reasoning_gym" and "<answer>" in first[0].messages[-1]["content"]
    bare = load_prompts([DataConfig(path, data_source="sums", suffix="")]).prompts
    assert bare[0].key == "sums" and "<answer>" not in bare[0].messages[-1]["content"]


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("chainsum", "no data set 'chainsum'; it has"),
        ("chain_sum?size=many", "size='many' is not possible"),
        ("chain_sum?size=0", "size=0 is not possible"),
        ("chain_sum?seed=-1", "seed=-1 is not possible"),
        ("chain_sum?split=test", r"split='test' is not possible; choose one of \['train', 'eval'\]"),
        ("chain_sum?terms=3", "unexpected keyword argument 'terms'"),
        ("chain_sum?min_terms=9&max_terms=2", "max_terms must be >= min_terms"),
        ("tower_of_hanoi?size=100&min_disks=3&max_disks=3", "has only 1. different questions in split='train'"),
        ("chain_sum?size", "bad query field"),
        ("", "no prompts"),
    ],
)
def test_impossible_requests_name_the_value(path: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        load_prompts([f"reasoning_gym:{path}"])


def test_answers_are_found_in_completions() -> None:
    assert extract_answer("<answer>1</answer> or <answer> 2\n</answer>.") == "2"
    assert extract_answer("<think><answer>1</answer></think> 3 ") == "3"


def test_workers_grade_generated_tasks() -> None:
    prompts = load_prompts(["reasoning_gym:chain_sum,arc_agi?size=3"]).prompts
    golds = [decode(p.answer["entry"])["answer"] for p in prompts]
    with Grader("reasoning_gym", VerifierSettings(workers=1)) as grader:
        right = grader.grade([f"<answer>{gold}</answer>" for gold in golds], prompts)
        wrong = grader.grade(["<answer>12345</answer>"] * 6, prompts)
        assert [s.value for s in right] == [1] * 6 and [s.value for s in wrong] == [0] * 6
        (denied,) = grader.grade(["0"], [Prompt("p", (), answer={"dataset": "coin_flip", "entry": {}})])
        assert denied.failure == "error" and "cannot be used" in denied.detail


def test_a_run_trains_and_evaluates_on_generated_tasks(models: dict[str, str], tmp_path: Path) -> None:
    task = "reasoning_gym:chain_sum?min_terms=2&max_terms=2&max_digits=1&size="
    config = {
        "model": models["student"],
        "teachers": [{"model": models["big"]}],
        "method": "opd",
        "train_data": [f"{task}4", {"path": f"{task}2&seed=90", "suffix": "", "data_source": "bare"}],
        "eval_data": [f"{task}3&split=eval"],
        "verifier": {"reasoning_gym": "reasoning_gym"},
        "verifier_workers": 1,
        "output_dir": str(tmp_path / "run"),
        "per_device_train_batch_size": 2,
        "max_completion_length": 4,
        "max_steps": 1,
    }
    result = train(from_mapping(TrainConfig, config), progress=False)
    assert 0 <= result.metrics["eval/accuracy"] <= 1 and "eval/verifier_failed/error" not in result.metrics
    rows = [json.loads(line) for line in (tmp_path / "run/evaluations/step_1.jsonl").read_text().splitlines()]
    assert len(rows) == 3 and all(row["prompt_id"].startswith("reasoning_gym:chain_sum") for row in rows)
