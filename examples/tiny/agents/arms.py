"""What the demos of agents share: methods side by side on one student, with intervals, a table and a figure.

Each arm is an ordinary run of the engine in its own process, configured by a YAML file that is left beside
its results. Before anything is trained the student plays: who never succeeds learns nothing from its own
trajectories.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from opdengine.training.writer import read_metrics
from opdengine.workers.printing import quiet_imports
from tiny.agents import world
from tiny.agents.house import HOUSE, House
from tiny.agents.results import SPLITS, build_table, draw
from tiny.workers import begin_worker

MODELS = Path(__file__).parent / "models"
LEAST_SUCCESS = 0.03
"""Of the student's sampled episodes; below it the demo stops."""
CURVES = ("episodes/success", "sage/skip", "sage/weak", "sage/strong", "sage/det_fail")


@dataclass(frozen=True)
class Arm:
    """One row of the table: a method and its settings on top of the shared ones."""

    name: str
    title: str
    settings: Mapping[str, Any]


def parser(
    description: str | None, *, steps: int, learning_rate: float, batch_size: int, test_games: int
) -> argparse.ArgumentParser:
    """The options of a demo.

    Other models set the defaults ``dtype`` (of all models), ``longest`` (tokens of a turn), ``window`` (of a chat) and
    ``more`` (settings of all arms).
    """
    p = argparse.ArgumentParser(
        description=description,
        epilog="With --config FILE your own models and environment are trained instead.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("--seeds", type=int, default=None, help="number of seeds (default 1; 5 with --ablate)")
    p.add_argument("--ablate", action="store_true", help="all controls instead of the short list")
    p.add_argument("--arms", nargs="+", help="only the arms with these names")
    p.add_argument("--steps", type=int, default=steps)
    p.add_argument("--batch_size", type=int, default=batch_size, help="episodes of a step")
    p.add_argument("--learning_rate", type=float, default=learning_rate)
    p.add_argument("--train_games", type=int, default=1000)
    p.add_argument("--test_games", type=int, default=test_games, help="of each split")
    p.add_argument("--student", default=str(MODELS / "student"), help="model folder")
    p.add_argument("--force", action="store_true", help="train even if the student never succeeds")
    p.add_argument("--output_dir", type=Path, default=Path("runs/agents"))
    p.add_argument("--save_results", type=Path, help="also write the numbers to this file")
    p.add_argument("--resume", action="store_true", help="keep the runs that --save_results holds already")
    p.add_argument("--figure", type=Path, help="also draw the figure to this file")
    p.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="runs at a time")
    p.set_defaults(dtype="float32", longest=world.MAX_TOKENS, window=512, more={})
    return p


def shared_settings(options: argparse.Namespace, seed: int) -> dict[str, Any]:
    """What all arms have in common."""
    return {
        "model": options.student,
        "dtype": options.dtype,
        "environment": {
            "name": HOUSE,
            "options": {**world.OPTIONS, "count": options.train_games},
            "max_turns": world.MAX_TURNS,
            "num_environments": min(16, options.batch_size),
        },
        "loss_normalization": "token",
        "temperature": 1.0,
        "top_p": 1.0,
        "top_k": 0,
        "repetition_penalty": 1.0,
        "max_completion_length": options.longest,
        "per_device_train_batch_size": options.batch_size,
        "max_steps": options.steps,
        "learning_rate": options.learning_rate,
        "lr_scheduler_type": "cosine",
        "warmup_ratio": 0.05,
        "weight_decay": 0.0,
        "seed": seed,
        "log_completions": False,
        **options.more,
    }


def play_student(console: Console, options: argparse.Namespace) -> tuple[dict[str, float], bool]:
    """The student before training, greedy; and whether it succeeds often enough to learn from its episodes."""
    from transformers.utils import logging as transformers_logging

    from opdengine.models.backbone import load_model
    from opdengine.models.chat import load_tokenizer
    from tiny.agents.measure import play

    transformers_logging.disable_progress_bar()
    student, tokenizer = load_model(options.student, dtype=options.dtype), load_tokenizer(options.student)
    games, bounds = held_out(options.test_games), (options.longest, options.window)
    sampled = play(student, tokenizer, games, 1.0, *bounds)
    shares = [sampled[f"{split}/success"] for split in SPLITS]
    enough = min(shares) >= LEAST_SUCCESS
    console.print(
        f"The student, sampled at temperature 1, wins {100 * shares[0]:.0f} % of {options.test_games} seen and "
        f"{100 * shares[1]:.0f} % of {options.test_games} unseen games before training."
    )
    if not enough:
        console.print(
            f"[bold red]That is below {100 * LEAST_SUCCESS:.0f} %:[/bold red] its own episodes hardly ever reach the "
            "states in which success is decided, so no method has anything to teach there, however small its loss "
            "becomes. Give it a longer warm start (examples/tiny/agents/build.py --student_steps), a stronger "
            "--student, or easier games; --force trains it anyway."
        )
    return play(student, tokenizer, games, 0.0, *bounds), enough or options.force


def run_arm(arm: Arm, seed: int, folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Train one arm and let it play; returns what is kept of it. Runs in a process of its own."""
    import torch
    from transformers.utils import logging as transformers_logging

    from opdengine.config.loading import load_config
    from opdengine.models.backbone import load_model
    from opdengine.models.chat import load_tokenizer
    from opdengine.training.run import train
    from tiny.agents.measure import play

    torch.set_num_threads(1)
    transformers_logging.disable_progress_bar()
    name = f"{arm.name}_seed_{seed}"
    config = {**shared_settings(options, seed), **arm.settings, "output_dir": str(folder / name), "run_name": name}
    if "debate" in config:
        config["debate"] = {**config["debate"], "cache_dir": str(folder / "debate_cache")}
    config["teachers"] = [{**teacher, "dtype": options.dtype} for teacher in config["teachers"]]
    file = folder / f"{name}.yaml"
    file.write_text(yaml.safe_dump(config, sort_keys=False))
    start = time.perf_counter()
    result = train(load_config(file), progress=False)
    seconds = time.perf_counter() - start
    learned = str(result.final_model)
    after = play(
        load_model(learned, dtype=options.dtype),
        load_tokenizer(learned),
        held_out(options.test_games),
        0.0,
        options.longest,
        options.window,
    )
    return summary(arm, seed, read_metrics(folder / name / "metrics.jsonl"), after, seconds)


def held_out(count: int) -> dict[str, Any]:
    """So many games of every split to evaluate on."""
    return {split: House.tasks(split, **{**world.OPTIONS, "count": count}) for split in SPLITS}


def summary(
    arm: Arm, seed: int, lines: Sequence[Mapping[str, float]], after: Mapping[str, float], seconds: float
) -> dict[str, Any]:
    """What is kept of a run."""
    health = [n for n in lines[0] if n.startswith(("sage/", "teacher_weight/", "tcod/")) and "turns_" not in n]
    phases = ("rollout", "debate", "score", "update")
    # The episodes of MT-SeqKD are the teacher's.
    curves = [n for n in CURVES if n in lines[0] and (n, arm.settings["method"]) != ("episodes/success", "mt_seqkd")]
    return {
        "arm": arm.name,
        "title": arm.title,
        "seed": seed,
        "seconds": round(seconds, 1),
        "phases": {p: round(sum(line.get(f"timing/{p}", 0.0) for line in lines), 1) for p in phases},
        "after": {name: round(value, 4) for name, value in after.items()},
        "mean": {n: round(float(np.mean([line[n] for line in lines if n in line])), 4) for n in health},
        "curve": {n: [round(line.get(n, 0.0), 3) for line in lines] for n in curves},
    }


def main(title: str, arms: Sequence[Arm], options: argparse.Namespace) -> int:
    """Gate, train all arms, report.

    Args:
        title: of the demo.
        arms: to compare.
        options: of :func:`parser`.

    Returns:
        0; 1 where the student never succeeds; 2 where the options cannot be used.
    """
    quiet_imports()
    console = Console()
    if not console.is_terminal:
        console = Console(width=150)
    if options.arms:
        known = {arm.name: arm for arm in arms}
        if unknown := [name for name in options.arms if name not in known]:
            console.print(f"unknown arms {unknown}; choose among {list(known)}")
            return 2
        arms = [known[name] for name in options.arms]
    seeds = list(range(options.seeds or (5 if options.ablate else 1)))
    described = {n: getattr(options, n) for n in ("steps", "batch_size", "learning_rate", "train_games", "test_games")}
    finished: list[dict[str, Any]] = []
    if options.resume and options.save_results and options.save_results.is_file():
        kept = json.loads(options.save_results.read_text())
        if different := {name: kept[name] for name in described if kept[name] != described[name]}:
            console.print(f"{options.save_results} has other settings ({different}); give them too, or another file")
            return 2
        finished = kept["runs"]
    before, ready = play_student(console, options)
    if not ready:
        return 1
    folder = options.output_dir / time.strftime("%Y%m%d-%H%M%S")
    folder.mkdir(parents=True)
    console.print(f"[bold]{title}[/bold]: {len(arms)} methods x {len(seeds)} seed(s), results in {folder}")
    results: dict[str, Any] = {
        **described,
        "before": {name: round(value, 4) for name, value in before.items()},
        "runs": finished,
        "cores": os.cpu_count(),
        "versions": {
            "python": platform.python_version(),
            **{name: metadata.version(name) for name in ("opdengine", "torch", "transformers")},
        },
    }
    files = [file for file in (folder / "results.json", options.save_results) if file]
    there = {(run["arm"], run["seed"]) for run in finished}
    wanted = [(arm, seed) for seed in seeds for arm in arms if (arm.name, seed) not in there]
    for result in train_all(console, wanted, folder, options):
        results["runs"].append(result)  # what is finished stays, whatever happens to the rest
        for file in files:
            file.write_text(json.dumps(results, indent=1) + "\n")
    for file in filter(None, (folder / "success.png", options.figure)):
        draw(results, file)
    console.print(build_table(results))
    console.print(f"figure: {folder / 'success.png'}   numbers: {folder / 'results.json'}")
    return 0


def train_all(
    console: Console, wanted: Sequence[tuple[Arm, int]], folder: Path, options: argparse.Namespace
) -> Iterator[dict[str, Any]]:
    """The results of all (arm, seed), in order; as many at a time as there are jobs."""
    columns = (TextColumn("{task.description:<56}"), BarColumn(), TextColumn("{task.percentage:3.0f} %"))
    with (
        Progress(*columns, TimeElapsedColumn(), console=console) as progress,
        ProcessPoolExecutor(max(1, options.jobs), multiprocessing.get_context("spawn"), begin_worker) as pool,
    ):
        jobs = {}
        for arm, seed in wanted:
            job = pool.submit(run_arm, arm, seed, folder, options)
            jobs[job] = folder / f"{arm.name}_seed_{seed}" / "metrics.jsonl"
            progress.add_task(f"{arm.title}, seed {seed}", total=options.steps, start=False)
        try:
            for number, job in enumerate(jobs):
                while not job.done():
                    time.sleep(0.5)
                    for bar, (other, file) in enumerate(jobs.items()):
                        if other.running() and file.is_file():
                            progress.start_task(TaskID(bar))
                            progress.update(TaskID(bar), completed=sum(1 for _ in file.open()))
                progress.update(TaskID(number), completed=options.steps)
                yield job.result()
        finally:
            pool.shutdown(cancel_futures=True)  # where one failed, the others do not begin
