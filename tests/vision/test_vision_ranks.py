"""Steps with pictures on one process and on two (gloo, CPU, float32): the same samples, losses, gradients and weights.

Rank 0 has prompts with pictures where rank 1 has one without: a tower runs in passes of one of them alone.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from ranks_helpers import STEP, run_cases, same_steps

NARROW = ("qwen3_vl", 0, 16)
"""Its tower has larger layers than its language model."""

CASES: dict[str, dict[str, Any]] = {
    "trained_tower": {
        "student": NARROW,
        "teachers": [{"model": ("qwen3_vl", 1, 48), "shard": True}],
        "freeze_vision_tower": False,
        "max_tokens_per_batch": 120,
        "num_generations": 2,
    },
    "split_vocabulary": {
        "student": ("smolvlm", 0, 32),
        "teachers": [{"model": ("smolvlm", 1, 48)}],
        "vocab_parallel_head": True,
        "gradient_checkpointing": True,
        "num_generations": 2,
    },
    # Nobody has a picture in the second step.
    "words_alone": {
        "student": ("qwen2_5_vl", 0, 32),
        "teachers": [{"model": ("qwen2_5_vl", 1, 32)}],
        "freeze_vision_tower": False,
        "rows": [0, 2],
    },
}


@pytest.fixture(scope="module")
def found(seeing: Any, picture_rows: str, tmp_path_factory: pytest.TempPathFactory) -> dict[int, Any]:
    """Results by number of processes, then by case."""
    root = tmp_path_factory.mktemp("seeing_ranks")
    results = {}
    for world in (1, 2):
        cases = {name: step_case(case, seeing, picture_rows, root / name) for name, case in CASES.items()}
        results[world] = run_cases(cases, world, root)
    return results


def step_case(case: dict[str, Any], seeing: Any, data: str, folder: Path) -> dict[str, Any]:
    """What ``step_worker.py`` reads: all four rows in each step, or one of the named ``rows`` after the other."""
    case = dict(case)
    student, rows = seeing(*case.pop("student")), case.pop("rows", None)
    teachers = [{**teacher, "model": seeing(*teacher["model"])} for teacher in case["teachers"]]
    if rows is not None:
        lines, data = Path(data).read_text().splitlines(), str(Path(data).with_name(f"{folder.name}.jsonl"))
        Path(data).write_text("\n".join(lines[row] for row in rows))
    config = {
        "model": student,
        "train_data": [data],
        "output_dir": str(folder),
        "method": "opd",
        **STEP,
        **case,
        "teachers": teachers,
    }
    return {"prompts": 4 if rows is None else 1, "config": config}


@pytest.mark.parametrize("case", CASES)
def test_a_step_with_pictures_does_not_depend_on_the_number_of_processes(found: dict[int, Any], case: str) -> None:
    one, two = found[1][case], found[2][case]
    same_steps(one, two, 1e-4)
    assert one["metrics"][0]["completions/kept"] >= (1 if "rows" in CASES[case] else 3)
    tower = {name for name in one["gradients"] if "vis" in name}
    assert bool(tower) == (not CASES[case].get("freeze_vision_tower", True))
    assert not tower or max(one["gradients"][name].abs().max() for name in tower) > 0
    assert not any(mail["sample"] and mail["sender"] != "vocab_parallel" for s in two["sent"] for mail in s["mail"])
