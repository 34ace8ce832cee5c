"""The demo: every method on the bundled tiny models, measured on held-out prompts.

Each arm is an ordinary run of the engine in its own process (two at a time), configured by a YAML
file that is left beside its results. ``python examples/train_mad_opd.py`` calls :func:`main`; with
``--config FILE`` it trains your own models instead.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from opdengine.methods.debate.prompts import parse_confidence
from opdengine.metrics import write_jsonl
from opdengine.tools.figures import curve, figure
from opdengine.training.writer import read_metrics
from opdengine.workers.printing import quiet_imports
from tiny import task

HERE = Path(__file__).parent
MODELS = HERE / "models"
CONVERT, COMPILE, STUDENT = (str(MODELS / n) for n in ("teacher_convert", "teacher_compile", "student"))


@dataclass(frozen=True)
class Arm:
    """One row of the table: a method and its settings on top of the shared ones."""

    name: str
    title: str
    settings: Mapping[str, Any]


def arms() -> list[Arm]:
    """All compared methods; the debate comes first because it takes longest."""
    both = [{"model": CONVERT}, {"model": COMPILE}]
    confidence = {"method": "mad_opd", "teachers": both}
    return [
        Arm("mad_opd", "MAD-OPD (debate of 2 rounds)", {**confidence, "debate": _debate(rounds=2)}),
        Arm("opd_convert", "OPD, teacher_convert", {"method": "opd", "teachers": both[:1]}),
        Arm("opd_compile", "OPD, teacher_compile", {"method": "opd", "teachers": both[1:]}),
        Arm("mt_opd", "MT-OPD (uniform weights)", {"method": "mt_opd", "teachers": both}),
        Arm(
            "mt_opd_confidence",
            "MT-OPD + confidences, no transcript",
            {**confidence, "debate": _debate(rounds=1, use_transcript=False)},
        ),
    ]


def _debate(**settings: Any) -> dict[str, Any]:
    return {
        "prompts": task.DEBATE_PROMPTS,
        "tau": 0.2,
        "temperature": 0.0,
        "top_p": 1.0,
        "top_k": 0,
        "repetition_penalty": 1.0,
        "max_tokens": 16,
        **settings,
    }


def shared_settings(options: argparse.Namespace, data: Path, seed: int) -> dict[str, Any]:
    """What all arms have in common."""
    return {
        "model": STUDENT,
        "dtype": "float32",
        "train_data": [str(data / f"train_seed_{seed}.jsonl")],
        "eval_data": [str(data / "test.jsonl")],
        "verifier": f"{HERE / 'task.py'}:verify",
        "divergence": "reverse_kl",
        "temperature": 1.0,
        "top_p": 1.0,
        "top_k": 0,
        "repetition_penalty": 1.0,
        "max_completion_length": 14,
        "per_device_train_batch_size": options.batch_size,
        "max_steps": options.steps,
        "learning_rate": options.learning_rate,
        "loss_normalization": "sequence",
        "lr_scheduler_type": "cosine",
        "warmup_ratio": 0.05,
        "weight_decay": 0.0,
        "eval_steps": max(1, options.steps // 10),
        "seed": seed,
        "log_completions": True,
    }


def write_data(folder: Path, seeds: Sequence[int], options: argparse.Namespace) -> None:
    """Training prompts without answers (one order per seed) and the test set with answers."""
    for seed in seeds:
        rows = [r for skill in task.SKILLS for r in task.prompts("train", skill, options.train_prompts, seed=seed)]
        write_jsonl(
            folder / f"train_seed_{seed}.jsonl",
            [{k: v for k, v in row.items() if k != "answer"} for row in rows],
        )
    test = [row for skill in task.SKILLS for row in task.prompts("test", skill, options.test_prompts)]
    write_jsonl(folder / "test.jsonl", test)


def run_arm(arm: Arm, seed: int, folder: Path, shared: Mapping[str, Any], progress: Progress) -> dict[str, Any]:
    """Train one arm in its own process; returns accuracies by step."""
    name = f"{arm.name}_seed_{seed}"
    output = folder / name
    config = {**shared, **arm.settings, "output_dir": str(output), "run_name": name}
    if "debate" in config:
        config["debate"] = {**config["debate"], "cache_dir": str(folder / "debate_cache")}
    config["teachers"] = [{**teacher, "dtype": "float32"} for teacher in config["teachers"]]
    file = folder / f"{name}.yaml"
    file.write_text(yaml.safe_dump(config, sort_keys=False))
    bar = progress.add_task(f"{arm.title}, seed {seed}", total=shared["max_steps"])
    start = time.perf_counter()
    with (folder / f"{name}.log").open("w") as log:
        child = subprocess.Popen(
            [sys.executable, "-m", "opdengine", "train", "--config", str(file)],
            stdout=log,
            stderr=subprocess.STDOUT,
            env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        )
        while child.poll() is None:
            time.sleep(0.5)
            lines = read_metrics(output / "metrics.jsonl") if (output / "metrics.jsonl").is_file() else []
            progress.update(bar, completed=lines[-1]["step"] if lines else 0)
    if child.returncode:
        raise RuntimeError(f"{arm.title}, seed {seed} failed:\n{(folder / f'{name}.log').read_text()[-3000:]}")
    lines = read_metrics(output / "metrics.jsonl")
    progress.update(bar, completed=shared["max_steps"])
    return {
        "arm": arm.name,
        "title": arm.title,
        "seed": seed,
        "wall_seconds": time.perf_counter() - start,
        "curve": [
            {"step": line["step"], **{k: v for k, v in line.items() if k.startswith("eval/accuracy")}}
            for line in lines
            if "eval/accuracy" in line
        ],
        "tokens_per_second": float(np.median([line["perf/tokens_per_second"] for line in lines[1:]])),
        "seconds": {
            phase: sum(line.get(f"timing/{phase}", 0.0) for line in lines)
            for phase in ("rollout", "debate", "score", "update", "sync")
        },
        "debates_generated": sum(line.get("debate/generated", 0) for line in lines),
        "debates_cached": sum(line.get("debate/cached", 0) for line in lines),
    }


def grade_teachers(test: Path) -> dict[str, dict[str, float]]:
    """Each teacher on the test set, asked plainly."""
    from transformers.utils import logging as transformers_logging

    from opdengine.data.prompts import load_prompts
    from opdengine.models.backbone import load_model
    from opdengine.models.chat import encode_chat, load_tokenizer
    from opdengine.rollout.transformers import TransformersSampler
    from opdengine.training.evaluate import evaluate
    from opdengine.types import SamplingParams

    transformers_logging.disable_progress_bar()
    prompts = load_prompts([str(test)]).prompts
    result = {}
    for path in (CONVERT, COMPILE):
        tokenizer = load_tokenizer(path)
        sampler = TransformersSampler(load_model(path, dtype="float32"), tokenizer)
        greedy = SamplingParams(max_tokens=14, temperature=0.0)
        graded = evaluate(sampler, prompts, lambda p, t=tokenizer: encode_chat(t, p.messages), task.verify, greedy)
        result[Path(path).name] = graded.metrics()
    return result


def stated_confidences(cache: Path) -> list[dict[str, int]]:
    """What the teachers state in all debates of a cache: for each round how often each pair, as "95, 5"."""
    rounds: list[Counter[str]] = []
    for file in sorted(cache.glob("*/*.json")):
        for number, texts in enumerate(json.loads(file.read_text())["rounds"]):
            if number == len(rounds):
                rounds.append(Counter())
            stated = [parse_confidence(text) for text in texts]
            rounds[number][", ".join("none" if c is None else f"{c:g}" for c in stated)] += 1
    return [dict(counts.most_common()) for counts in rounds]


def build_table(results: Mapping[str, Any]) -> Table:
    """Accuracy on held-out prompts, mean over seeds (standard deviation where there are several)."""
    seeds = results["seeds"]
    table = Table(
        title=f"Held-out accuracy after {results['steps']} steps "
        f"({results['test_prompts']} test prompts a skill, seeds {', '.join(map(str, seeds))})"
    )
    columns = ["eval/accuracy", *(f"eval/accuracy/{skill}" for skill in task.SKILLS)]
    table.add_column("", overflow="fold", min_width=24)
    for heading in ("mean", *task.SKILLS):
        table.add_column(heading, justify="right")
    table.add_column("seconds", justify="right")

    def cells(rows: Sequence[Mapping[str, float]]) -> list[str]:
        values = np.array([[row[c] for c in columns] for row in rows])
        spread = values.std(axis=0, ddof=1) if len(rows) > 1 else None
        return [
            f"{100 * mean:.1f}" + ("" if spread is None else f" ± {100 * spread[i]:.1f}")
            for i, mean in enumerate(values.mean(axis=0))
        ]

    for name, metrics in results["teachers"].items():
        table.add_row(name, *cells([metrics]), "")
    table.add_section()
    runs = results["runs"]
    table.add_row("student before", *cells([r["curve"][0] for r in runs if r["arm"] == "mad_opd"][:1]), "")
    for arm in arms():
        of_arm = [r for r in runs if r["arm"] == arm.name]
        seconds = np.mean([r["wall_seconds"] for r in of_arm])
        table.add_row(arm.title, *cells([r["curve"][-1] for r in of_arm]), f"{seconds:.0f}")
    return table


def draw(results: Mapping[str, Any], file: Path) -> None:
    """Accuracy over steps, one line per arm, a band of one standard deviation over seeds."""
    panels = [("mean of the skills", "eval/accuracy"), *((s, f"eval/accuracy/{s}") for s in task.SKILLS)]
    with figure(file, (14, 3.6), columns=len(panels), legend_below=True, sharey=True) as axes:
        for axis, (title, metric) in zip(axes, panels, strict=True):
            for arm in arms():
                runs = [r["curve"] for r in results["runs"] if r["arm"] == arm.name]
                steps = [point["step"] for point in runs[0]]
                values = np.array([[point[metric] for point in run] for run in runs])
                spread = values.std(axis=0, ddof=1) if len(runs) > 1 else None
                curve(axis, steps, values, arm.title, spread, 2.4 if arm.name == "mad_opd" else 1.4)
            axis.set_title(title)
            axis.set_xlabel("optimiser step")
            axis.grid(alpha=0.3)
        axes[0].set_ylabel("held-out accuracy")
        axes[0].set_ylim(-0.02, 1.02)


def show_debate(console: Console, folder: Path, seed: int) -> None:
    """One whole debate of the MAD-OPD run about a combined problem."""
    rows = (json.loads(line) for line in (folder / f"mad_opd_seed_{seed}/debates/step_1.jsonl").open())
    debate = next(row for row in rows if row["prompt_id"].startswith("train/M") and "C" in row["prompt_id"])
    console.rule("one debate")
    console.print("task:", debate["prompt_id"].removeprefix("train/"), markup=False)
    for number, texts in enumerate(debate["rounds"], start=1):
        for name, text in zip(debate["teachers"], texts, strict=True):
            console.print(f"round {number}  {name:16s} {text}", markup=False, highlight=False)
    weights = "  ".join(f"{n} {w:.2f}" for n, w in zip(debate["teachers"], debate["weights"], strict=True))
    console.print("weights:", weights, markup=False)


def main(arguments: Sequence[str] = ()) -> int:
    """Run all arms and report."""
    quiet_imports()
    parser = argparse.ArgumentParser(
        description="Every method on the bundled tiny models, measured on held-out prompts. With --config FILE it "
        "trains your own models instead.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--seeds", type=int, default=1, help="number of seeds")
    parser.add_argument("--steps", type=int, default=200, help="of each run")
    parser.add_argument("--batch_size", type=int, default=64, help="prompts of a step")
    parser.add_argument("--learning_rate", type=float, default=3e-3, help="of AdamW")
    parser.add_argument("--train_prompts", type=int, default=1500, help="training prompts of each skill")
    parser.add_argument("--test_prompts", type=int, default=200, help="test prompts of each skill")
    parser.add_argument("--output_dir", type=Path, default=Path("runs/demo"), help="gets a folder for every demo")
    parser.add_argument("--save_results", type=Path, help="also write the numbers to this file")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="runs at a time")
    options = parser.parse_args(arguments)
    console = Console()
    if not console.is_terminal:
        console = Console(width=120)
    folder = options.output_dir / time.strftime("%Y%m%d-%H%M%S")
    seeds = list(range(options.seeds))
    folder.mkdir(parents=True)
    write_data(folder, seeds, options)
    console.print(f"[bold]MAD-OPD demo[/bold]: {len(arms())} methods x {len(seeds)} seed(s), results in {folder}")
    start = time.perf_counter()
    with (
        Progress(
            TextColumn("{task.description:<56}"), BarColumn(), TextColumn("{task.percentage:3.0f} %"),
            TimeElapsedColumn(), console=console,
        ) as progress,
        ThreadPoolExecutor(max(1, options.jobs)) as pool,
    ):  # fmt: skip
        jobs = [
            pool.submit(run_arm, arm, seed, folder, shared_settings(options, folder, seed), progress)
            for arm in arms()
            for seed in seeds
        ]
        runs = [job.result() for job in jobs]
    results = {
        "steps": options.steps,
        "batch_size": options.batch_size,
        "learning_rate": options.learning_rate,
        "train_prompts": options.train_prompts,
        "test_prompts": options.test_prompts,
        "seeds": seeds,
        "teachers": grade_teachers(folder / "test.jsonl"),
        "runs": runs,
        "tau": _debate()["tau"],
        "confidences": stated_confidences(folder / "debate_cache"),
        "wall_seconds": time.perf_counter() - start,
        "cores": os.cpu_count(),
        "versions": {
            "python": platform.python_version(),
            **{name: metadata.version(name) for name in ("opdengine", "torch", "transformers")},
        },
    }
    for file in filter(None, (folder / "results.json", options.save_results)):
        file.write_text(json.dumps(results, indent=1) + "\n")
    draw(results, folder / "accuracy.png")
    show_debate(console, folder, seeds[0])
    console.print(build_table(results))
    console.print(f"figure: {folder / 'accuracy.png'}   numbers: {folder / 'results.json'}")
    return 0
