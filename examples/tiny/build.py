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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="where the model folders go")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--split", choices=("dev", "test"), default="test", help="what report.json measures")
    parser.add_argument("--prompts", type=int, default=200, help="prompts per skill in report.json")
    args = parser.parse_args()
    torch.set_num_threads(1)
    transformers.logging.disable_progress_bar()
    started = time.perf_counter()

    tokenizer = build_tokenizer()
    with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("spawn")) as pool:
        states = list(pool.map(_train_teacher, range(len(TEACHERS)), [args.seed] * len(TEACHERS)))
    teachers = []
    for expert, (state, _) in enumerate(states):
        model = training.new_model(tokenizer, TEACHERS[expert]["hidden"], TEACHERS[expert]["layers"], 0)
        model.load_state_dict(state)
        teachers.append(model.eval())
    with tqdm(total=len(teachers) * CALIBRATION_STEPS, desc="calibration", unit="step") as bar:
        for expert in range(len(teachers)):
            training.calibrate(teachers, tokenizer, expert, CALIBRATION_STEPS, args.seed, _progress(bar))
    with tqdm(total=STUDENT["steps"], desc="student", unit="step") as bar:
        student = training.warm_start(tokenizer, **STUDENT, seed=args.seed, progress=_progress(bar))

    for folder, model in zip([*(t["name"] for t in TEACHERS), "student"], [*teachers, student], strict=True):
        # Measure what is shipped: the weights as they are after the rounding to fp16.
        model.half().save_pretrained(args.out / folder)
        tokenizer.save_pretrained(args.out / folder)
        model.float()
    report = {
        "seed": args.seed,
        "split": args.split,
        "prompts_per_skill": args.prompts,
        "decoding": "greedy",
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "parameters": {
            folder: sum(p.numel() for p in model.parameters())
            for folder, model in zip([*(t["name"] for t in TEACHERS), "student"], [*teachers, student], strict=True)
        },
        "training_cpu_seconds": {
            t["name"]: round(seconds, 1) for t, (_, seconds) in zip(TEACHERS, states, strict=True)
        },
        "teachers": {
            teacher["name"]: result
            for teacher, result in zip(
                TEACHERS, measure_teachers(teachers, tokenizer, args.split, args.prompts), strict=True
            )
        },
        "student_before": measure_student(student, tokenizer, args.split, args.prompts),
        "wall_seconds": round(time.perf_counter() - started, 1),
    }
    (args.out / "report.json").write_text(json.dumps(report, indent=2) + "\n")


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
