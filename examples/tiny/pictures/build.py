"""Make the tiny models that see: ``python examples/tiny/pictures/build.py --out DIR``.

Trains a teacher that sees and one that reads captions; the student continues the teacher that sees with careless
captions, which mix up half of the words. All are measured on held-out pictures. Deterministic for a seed, a machine
and a version of torch.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import random
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
import transformers

from opdengine.data.prompts import load_prompts
from opdengine.metrics import write_jsonl
from tiny.pictures import world
from tiny.pictures.models import build_tokenizer, lessons, new_model, save, supervise
from tiny.study import grade
from tiny.training import new_model as new_reader

MODELS = Path(__file__).parent / "models"
MIXED_UP = {"green": "blue", "blue": "green", "triangle": "cross", "cross": "triangle"}
CARELESS = 0.7
"""How often each of these words stood for its counterpart in what the student was taught."""


@dataclass(frozen=True)
class Plan:
    """How one model is made.

    Args:
        sees: whether it reads pictures, or captions.
        hidden: its width.
        rows: different pictures of each skill that it is taught.
        steps: of supervised learning, 32 answers each.
        seed: added to the seed of all.
        unsure, corrupt: see :func:`tiny.pictures.models.supervise`.
        careless: how often a word of ``MIXED_UP`` is taught wrongly.
        learning_rate: the highest.
        start: the model that it continues; "" begins with random weights.
    """

    sees: bool
    hidden: int
    rows: int
    steps: int
    seed: int
    unsure: float = 0.05
    corrupt: float = 0.3
    careless: float = 0.0
    learning_rate: float = 3e-3
    start: str = ""


PLANS = {
    "teacher": Plan(True, 64, 2500, 1300, 0),
    "reader": Plan(False, 48, 1000, 400, 1),
    "student": Plan(True, 64, 400, 120, 2, careless=CARELESS, learning_rate=1e-3, start="teacher"),
}


def mixed_up(answer: str, share: float, rng: random.Random) -> str:
    """The answer with some of its words replaced by their counterparts."""
    words = [MIXED_UP.get(word, word) if rng.random() < share else word for word in answer.split()]
    return " ".join(words)


def make(name: str, plan: Plan, out: Path, seed: int) -> dict[str, float]:
    """Train one model and save its folder in ``out``; returns its seed, steps and seconds of processor time."""
    torch.set_num_threads(1)
    transformers.logging.disable_progress_bar()
    started, seed = time.process_time(), seed + plan.seed
    rng, tokenizer = random.Random(seed), build_tokenizer(plan.sees)
    model: Any = (new_model if plan.sees else new_reader)(tokenizer, plan.hidden, 2, seed)
    if plan.start:
        model = type(model).from_pretrained(out / plan.start, dtype=torch.float32)
    done = 0

    def progress(text: str) -> None:
        nonlocal done
        done += 1
        if done % 100 == 0 or done == plan.steps:
            print(f"{name}: step {done} of {plan.steps}, {text}", flush=True)

    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        save(model, tokenizer, folder / "start")
        rows = [row for skill in world.SKILLS for row in world.rows("train", skill, plan.rows, folder, seed)]
        write_jsonl(folder / "rows.jsonl", rows)
        answers = [mixed_up(row["answer"], plan.careless, rng) for row in rows]
        taught = lessons(folder / "start", load_prompts([str(folder / "rows.jsonl")]).prompts, answers)
    supervise(model.float(), taught, plan.steps, plan.learning_rate, rng, plan.unsure, plan.corrupt, progress)
    save(model, tokenizer, out / name)
    return {"seed": seed, "steps": plan.steps, "cpu_seconds": round(time.process_time() - started, 1)}


def main() -> None:
    """Train the models of the example, and measure them in ``report.json``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=MODELS, help="where the model folders go")
    parser.add_argument("--only", nargs="+", choices=PLANS, default=list(PLANS), help="make these again")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    file = args.out / "report.json"
    made: dict[str, Any] = json.loads(file.read_text())["made"] if file.is_file() else {}
    with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("spawn")) as pool:
        for stage in (False, True):
            names = [name for name in args.only if bool(PLANS[name].start) == stage]
            jobs = {name: pool.submit(make, name, PLANS[name], args.out, args.seed) for name in names}
            made |= {name: job.result() for name, job in jobs.items()}
    file.write_text(json.dumps({"made": made, **report(args.out)}, indent=1) + "\n")


def report(out: Path, count: int = 150) -> dict[str, Any]:
    """Measure the models as they lie on disk, greedy, on ``count`` held-out pictures of each skill."""
    models = {name: str(out / name) for name in PLANS if (out / name).is_dir()}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        rows = [row for skill in world.SKILLS for row in world.rows("test", skill, count, folder)]
        write_jsonl(folder / "held_out.jsonl", rows)
        verifier = f"{Path(world.__file__).resolve()}:verify"
        images = {name: "image" if PLANS[name].sees else "text" for name in models}
        graded = grade(models, folder / "held_out.jsonl", verifier, world.LONGEST, images)
    return {
        "pictures_per_skill": count,
        "accuracy": graded,
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }


if __name__ == "__main__":
    main()
