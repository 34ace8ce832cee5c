"""Make the tiny world's models: ``python examples/tiny/build.py --out DIR``.

Trains two teachers (in two processes), calibrates their confidences in real debates, warm-starts
the student, measures everything on held-out prompts and writes three Hugging Face folders and
``report.json``. Deterministic for a seed, a machine and a version of torch.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import transformers
from tqdm import tqdm
from transformers import AutoModelForCausalLM

from tiny import training
from tiny.measure import measure_student, measure_teachers
from tiny.tokenizer import build_tokenizer

TEACHERS = (
    {"name": "teacher_convert", "hidden": 80, "layers": 3},
    {"name": "teacher_compile", "hidden": 64, "layers": 3},
)
STUDENT = {"hidden": 64, "layers": 2, "steps": 140, "problems": {"convert": 300, "compile": 150, "both": 100}}
TEACHER_STEPS = (250, 750)
CALIBRATION_STEPS = 80
# Teachers use seed and seed + 1: a student that starts from a teacher's weights would be no stranger to it.
# Warm starts differ widely, from nothing learned to the task solved; this one is weak in both skills.
STUDENT_SEED = 101
FOLDERS = (*(str(teacher["name"]) for teacher in TEACHERS), "student")


def main() -> None:
    """Train the models of the demo, and measure them in ``report.json``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="where the model folders go")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--split", choices=("dev", "test"), default="test", help="what report.json measures")
    parser.add_argument("--prompts", type=int, default=200, help="prompts per skill in report.json")
    parser.add_argument("--report-only", action="store_true", help="measure the models in --out again")
    args = parser.parse_args()
    torch.set_num_threads(1)
    transformers.logging.disable_progress_bar()
    if args.report_only:
        old = json.loads((args.out / "report.json").read_text())
        made = {key: old[key] for key in ("seed", "training_cpu_seconds")}
    else:
        made = make_models(args.out, args.seed)
    write_report(args.out, made, args.split, args.prompts)


def make_models(out: Path, seed: int) -> dict:
    """Train everything and save three model folders; returns what the report says about the making."""
    tokenizer = build_tokenizer()
    with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("spawn")) as pool:
        states = list(pool.map(_train_teacher, range(len(TEACHERS)), [seed] * len(TEACHERS)))
    teachers = []
    for expert, (state, _) in enumerate(states):
        model = training.new_model(tokenizer, TEACHERS[expert]["hidden"], TEACHERS[expert]["layers"], 0)
        model.load_state_dict(state)
        teachers.append(model.eval())
    with tqdm(total=len(teachers) * CALIBRATION_STEPS, desc="calibration", unit="step") as bar:
        for expert in range(len(teachers)):
            training.calibrate(teachers, tokenizer, expert, CALIBRATION_STEPS, seed, _progress(bar))
    with tqdm(total=STUDENT["steps"], desc="student", unit="step") as bar:
        student = training.warm_start(tokenizer, **STUDENT, seed=seed + STUDENT_SEED, progress=_progress(bar))

    for folder, model in zip(FOLDERS, [*teachers, student], strict=True):
        model.half().save_pretrained(out / folder)
        tokenizer.save_pretrained(out / folder)
    return {
        "seed": seed,
        "training_cpu_seconds": {t["name"]: round(s, 1) for t, (_, s) in zip(TEACHERS, states, strict=True)},
    }


def write_report(out: Path, made: dict, split: str, n: int) -> None:
    """Measure the models as they lie on disk and write ``report.json``.

    Args:
        out: the folder of the three models.
        made: how they were made; copied into the report.
        split: the prompts to measure on.
        n: prompts per skill.
    """
    tokenizer = build_tokenizer()
    models = {f: AutoModelForCausalLM.from_pretrained(out / f, dtype=torch.float32).eval() for f in FOLDERS}
    *teachers, student = models.values()
    results = measure_teachers(teachers, tokenizer, split, n)
    report = {
        **made,
        "split": split,
        "prompts_per_skill": n,
        "decoding": "greedy",
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "parameters": {folder: sum(p.numel() for p in model.parameters()) for folder, model in models.items()},
        "teachers": dict(zip(FOLDERS, results, strict=False)),
        "student_before": measure_student(student, tokenizer, split, n),
    }
    (out / "report.json").write_text(json.dumps(report, indent=2) + "\n")


def _train_teacher(expert: int, seed: int) -> tuple[dict[str, torch.Tensor], float]:
    torch.set_num_threads(1)
    started = time.process_time()
    spec = TEACHERS[expert]
    with tqdm(total=sum(TEACHER_STEPS), desc=spec["name"], position=expert, unit="step") as bar:
        model = training.train_teacher(
            build_tokenizer(), expert, spec["hidden"], spec["layers"], TEACHER_STEPS, seed, _progress(bar)
        )
    return model.state_dict(), time.process_time() - started


def _progress(bar: tqdm) -> training.Progress:
    def update(text: str) -> None:
        bar.set_postfix_str(text, refresh=False)
        bar.update()

    return update


if __name__ == "__main__":
    main()
