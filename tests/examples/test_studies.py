"""The studies of Uni-OPD and CaMOPD: their worlds, their statistics, and a short run of every arm's settings."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import random
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from opdengine.config.loading import from_mapping
from opdengine.config.train import TrainConfig
from opdengine.methods import METHODS, build_method
from opdengine.metrics import write_jsonl
from tiny import camopd_study, study, study_tables, task, uni_study


@pytest.mark.parametrize(("prompt", "answer", "said"), [("C(7+1)*0", "71+0*", "*+710"), ("C7-(1*0)", "710*-", "-7*10")])
def test_the_dialect_puts_operators_first(prompt: str, answer: str, said: str) -> None:
    assert camopd_study.dialect(prompt, answer) == ("D" + prompt[1:], said)


def test_the_dialect_computes_the_same() -> None:
    """Evaluated with operators first, each answer has the value of its expression."""

    def value(symbols: list[str]) -> int:
        symbol = symbols.pop(0)
        if symbol.isdigit():
            return int(symbol)
        left, right = value(symbols), value(symbols)
        return {"+": left + right, "-": left - right, "*": left * right}[symbol]

    for row in camopd_study.rows("train", camopd_study.DOMAIN, 100):
        assert value(list(row["answer"])) == eval(row["prompt"][1:])
        assert row["prompt"][0] == "D" and row["data_source"] == camopd_study.DOMAIN


def test_fine_tuning_problems_are_mostly_dialect_and_never_held_out() -> None:
    rng = random.Random(0)
    drawn = [camopd_study.problem(rng) for _ in range(2000)]
    share = np.mean([prompt[0] == "C" for prompt, _, _ in drawn])
    assert share == pytest.approx(camopd_study.REMEMBERED, abs=0.012)
    assert {task.split_of("C" + prompt[1:]) for prompt, _, _ in drawn} == {"train"}


def test_interval_is_students() -> None:
    values = np.array([1.0, 2.0, 3.0, 4.0, 5.0])
    assert study_tables.interval(values) == pytest.approx(2.776 * math.sqrt(2.5) / math.sqrt(5))
    assert math.isnan(study_tables.interval(values[:1]))


def results() -> dict[str, Any]:
    def run(arm: str, seed: int, a: float) -> dict[str, Any]:
        point = {"eval/accuracy": a, "eval/accuracy/x": a, "eval/accuracy/y": a}
        return {"arm": arm, "seed": seed, "seconds": 3.0, "curve": [{"step": 0, **point}, {"step": 4, **point}]}

    runs = [run("m", s, 0.5 + 0.1 * s) for s in range(3)] + [run("b", s, 0.4 + 0.1 * s) for s in (2, 0, 1)]
    return {
        "arms": [{"name": "m", "title": "method"}, {"name": "b", "title": "baseline"}],
        "skills": {"x": "first", "y": "second"},
        "seeds": [0, 1, 2],
        "models": {"teacher": {"eval/accuracy": 1.0, "eval/accuracy/x": 1.0, "eval/accuracy/y": 1.0}},
        "runs": runs,
    }


def test_differences_are_taken_seed_by_seed(tmp_path: Path) -> None:
    """The arms vary widely over seeds and their difference not at all."""
    teacher, method, baseline = study_tables.table_rows(results())
    assert teacher[:2] == ["teacher", "100.0"]
    assert method[1] == "60.0 ± 24.8" and baseline[4] == "-10.0 ± 0.0" and method[4] == ""
    assert len(study_tables.headings(results())) == len(method)
    study_tables.draw(results(), tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 5000


def test_one_seed_has_the_interval_of_its_prompts(tmp_path: Path) -> None:
    """Wilson's, by hand for 150 of 200; over several seeds the number of prompts changes nothing."""
    assert study_tables.shown(np.array([75.0]), 200) == "75.0 (69 to 80)"
    assert study_tables.shown(np.array([75.0]), None) == "75.0"
    assert study_tables.shown(np.array([74.0, 76.0]), 200) == f"75.0 ± {12.706:.1f}"
    file = tmp_path / "held_out.jsonl"
    write_jsonl(file, [{"data_source": "x"}, {"data_source": "y"}, {"data_source": "x"}])
    assert study.held_out(file) == {"eval/accuracy": 3, "eval/accuracy/x": 2, "eval/accuracy/y": 1}
    found = results() | {"held_out": {"eval/accuracy": 200, "eval/accuracy/x": 200, "eval/accuracy/y": 200}}
    teacher, method, _ = study_tables.table_rows(found)
    assert teacher[1] == "100.0 (98 to 100)" and method[1] == "60.0 ± 24.8"


@pytest.mark.parametrize("of", [uni_study, camopd_study])
def test_every_arm_trains(of: Any, tmp_path: Path) -> None:
    """All arms' settings make a recipe; the method and one control are trained for a step on the bundled models."""
    for skill in ("compile", "convert"):
        write_jsonl(tmp_path / f"{skill}_0.jsonl", task.prompts("train", skill, 8))
    write_jsonl(tmp_path / "dialect_0.jsonl", camopd_study.rows("train", "dialect", 8))
    every = [*task.prompts("train", "compile", 8), *task.prompts("train", "convert", 8)]
    for name in ("raw", "balanced"):
        write_jsonl(tmp_path / f"{name}_0.jsonl", every)
    for name in ("specialised", "student_start", "teacher_convert", "teacher_compile"):
        (tmp_path / name).symlink_to(study.MODELS / ("teacher_compile" if "teacher" in name else "student"))
    write_jsonl(tmp_path / "held_out.jsonl", every if of is uni_study else camopd_study.rows("test", "dialect", 4))
    for number, arm in enumerate(of.STUDY.arms):
        base = {**of.STUDY.settings(tmp_path, 0), "seed": 0, "output_dir": str(tmp_path / arm.name)}
        settings = study.merged(base, study.filled(arm.settings, folder=str(tmp_path), seed=0))
        settings = study.merged(settings, {"max_steps": 1, "eval_steps": 0, "per_device_train_batch_size": 2})
        assert type(build_method(from_mapping(TrainConfig, settings))) is METHODS[of.STUDY.name]
        if number < 2:
            found = study.run(arm.name, 0, json.loads(json.dumps(settings)), ["reward/mean", "camopd/general/selected"])
            assert found["metrics"] and [point["step"] for point in found["curve"]] == [0, 1]


def stand_in(of: study.Study = uni_study.STUDY) -> study.Study:
    """Two arms of one step whose models need no preparation."""

    def prepare(folder: Path, seeds: Any, split: str) -> dict[str, str]:
        rows = [row for skill in uni_study.SKILLS for row in task.prompts(split, skill, 4)]
        write_jsonl(folder / "held_out.jsonl", rows)
        write_jsonl(folder / "train.jsonl", [row for s in uni_study.SKILLS for row in task.prompts("train", s, 8)])
        return {"student before": str(study.MODELS / "student")}

    def settings(folder: Path, seed: int) -> dict[str, Any]:
        student = str(study.MODELS / "student")
        experts = {skill: str(study.MODELS / f"teacher_{skill}") for skill in uni_study.SKILLS}
        teachers = [{"name": s, "model": expert, "key": [s], "dtype": "float32"} for s, expert in experts.items()]
        few = {"model": student, "teachers": teachers, "train_data": [str(folder / "train.jsonl")], "max_steps": 1}
        return {**of.settings(folder, seed), **few, "per_device_train_batch_size": 2, "num_generations": 2}

    arms = (study.Arm("opd", "OPD", {"method": "opd"}, demo=True), study.Arm("mt", "MT", {"method": "mt_opd"}))
    return study.Study("stand_in", arms, {s: s for s in uni_study.SKILLS}, prepare, settings)


def test_settings_that_a_run_would_refuse_end_a_study_before_its_models_are_made(tmp_path: Path) -> None:
    def prepare(folder: Path, seeds: Any, split: str) -> dict[str, str]:
        raise AssertionError("models are made")

    bad = study.Arm("bad", "bad", {"method": "uni_opd", "divergence": "forward_kl"}, demo=True)
    of = dataclasses.replace(stand_in(), arms=(*stand_in().arms[:1], bad), prepare=prepare)
    with pytest.raises(SystemExit, match=r"bad: divergence='forward_kl' is not possible"):
        study.main(of, "", ["--output_dir", str(tmp_path)])


def test_settings_of_the_command_line_are_plain_values() -> None:
    assert study._changes(["--max_steps", "40", "--debate.tau", "0.5"]) == {"max_steps": 40, "debate": {"tau": 0.5}}
    assert type(study._changes(["--max_steps", "40"])["max_steps"]) is int


def test_a_study_that_was_stopped_runs_only_what_is_missing(tmp_path: Path) -> None:
    """Finished runs are taken as they are, unfinished ones begin again, and other settings are refused."""
    kept = tmp_path / "results.json"
    common = ["--output_dir", str(tmp_path / "runs"), "--jobs", "1", "--save_results", str(kept)]
    assert study.main(stand_in(), "", [*common, "--arms", "opd"]) == 0
    first = json.loads(kept.read_text())
    (folder,) = (tmp_path / "runs").iterdir()
    (folder / "mt_0").mkdir()
    (folder / "mt_0" / "metrics.jsonl").write_text("{of a run that was killed\n")
    assert study.main(stand_in(), "", [*common, "--arms", "opd", "mt", "--resume", str(folder)]) == 0
    both = json.loads(kept.read_text())
    assert both["runs"][0] == first["runs"][0], "the finished run was run again"
    assert [r["arm"] for r in both["runs"]] == ["opd", "mt"] and both["runs"][1]["curve"][-1]["step"] == 1
    with pytest.raises(SystemExit, match="opd_0 was run with other settings"):
        study.main(stand_in(), "", [*common, "--arms", "opd", "--resume", str(folder), "--learning_rate", "0.1"])
    with pytest.raises(SystemExit, match="other held-out prompts"):
        study.main(stand_in(), "", [*common, "--arms", "opd", "--resume", str(folder), "--split", "dev"])
    with pytest.raises(SystemExit, match="there is no such folder"):
        study.main(stand_in(), "", [*common, "--resume", str(tmp_path / "nowhere")])


def test_workers_end_with_a_study_that_is_killed() -> None:
    """They hold its standard output, which is at its end when the last of them is gone."""
    code = (
        "import multiprocessing, os, signal, time\n"
        "from concurrent.futures import ProcessPoolExecutor\n"
        "from tiny import workers\n"
        "pool = ProcessPoolExecutor(1, multiprocessing.get_context('spawn'), workers.begin_quiet_worker)\n"
        "print(pool.submit(os.getppid).result() == os.getpid(), flush=True)\n"
        "pool.submit(time.sleep, 3600)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    places = os.pathsep.join(path for path in sys.path if path)
    environment = {**os.environ, "PYTHONPATH": places}
    ended = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=300)
    assert (ended.stdout, ended.returncode) == ("True\n", -signal.SIGKILL)
