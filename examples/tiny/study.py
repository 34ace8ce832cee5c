"""Arms x seeds on the tiny world: ordinary runs of the engine; :mod:`tiny.study_tables` says what comes out.

A study prepares its models and data once, then trains every arm with every seed, several at a time.
The same seed gives every arm the same prompts in the same order, so differences are taken seed by seed.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import random
import shutil
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from opdengine.workers.printing import quiet_imports
from tiny.study_tables import draw, headings, table_rows
from tiny.workers import begin_quiet_worker

HERE = Path(__file__).parent
MODELS = HERE / "models"
Problem = Callable[[random.Random], tuple[str, str, str]]
CORRUPT = 0.7
"""As the bundled models were taught; makes a model that has seen little unsure."""
FINISHED = "run.json"
"""A run that has come to its end leaves its settings and results in this file of its folder."""


@dataclass(frozen=True)
class Arm:
    """One row of the table.

    Args:
        name: in result files.
        title: for people.
        settings: on top of the shared ones; sections are merged, ``{folder}`` and ``{seed}`` are filled in.
        demo: whether it is part of the short demo, or of ``--ablate`` only.
    """

    name: str
    title: str
    settings: Mapping[str, Any]
    demo: bool = False


@dataclass(frozen=True)
class Study:
    """What is compared.

    Args:
        name: of the method; the first arm is the method itself.
        arms: rows of the table.
        skills: data sources that are evaluated, with what they stand for.
        prepare: writes models and data into the folder, given the seeds and the split to evaluate on;
            returns the models to grade beside the student, by title.
        settings: (folder, seed) -> the settings that all arms share.
        reported: metrics whose mean over the steps belongs into the results.
        images: what a model of ``prepare`` reads in place of pictures, by title; "image" where nothing is said.
    """

    name: str
    arms: Sequence[Arm]
    skills: Mapping[str, str]
    prepare: Callable[[Path, Sequence[int], str], dict[str, str]]
    settings: Callable[[Path, int], dict[str, Any]]
    reported: Sequence[str] = ()
    images: Mapping[str, str] = field(default_factory=dict)


def specialise(
    base: str, problem: Problem, steps: int, learning_rate: float, out: Path, corrupt: float = CORRUPT
) -> str:
    """Fine-tune a model for a few seconds; returns the folder.

    Args:
        base: name of a bundled model.
        problem: source of randomness -> prompt, answer, skill; at the cost of what it could before.
        steps, learning_rate: of supervised training, 64 problems a step.
        out: where it goes.
        corrupt: share of the answers that are taught off the track.
    """
    import torch
    from transformers import AutoModelForCausalLM

    from tiny.lessons import Chat, encode, user_chat
    from tiny.tokenizer import build_tokenizer
    from tiny.training import BATCH, supervise

    torch.set_num_threads(1)
    tokenizer, rng = build_tokenizer(), random.Random(f"specialise/{out.name}")
    model = AutoModelForCausalLM.from_pretrained(MODELS / base, dtype=torch.float32)

    def batch(step: int) -> list[Any]:
        drawn = [problem(rng) for _ in range(BATCH)]
        chats = [Chat(user_chat(prompt), answer, skill=skill) for prompt, answer, skill in drawn]
        return encode(tokenizer, chats, rng, corrupt)

    supervise(model, batch, steps, learning_rate, lambda text: None)
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    return str(out)


def damage(base: str, amount: float, seed: int, out: Path) -> str:
    """A model with noise on every weight matrix, ``amount`` of its standard deviation; returns the folder."""
    import torch
    from transformers import AutoModelForCausalLM

    from tiny.tokenizer import build_tokenizer

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.add_(amount * parameter.std() * torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(out)
    build_tokenizer().save_pretrained(out)
    return str(out)


def merged(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Settings with changes; sections are merged key by key."""
    result = dict(base)
    for key, value in changes.items():
        section = isinstance(value, Mapping) and isinstance(result.get(key), Mapping)
        result[key] = merged(result[key], value) if section else value
    return result


def filled(value: Any, **names: Any) -> Any:
    """Settings with ``{folder}`` and ``{seed}`` in texts replaced."""
    if isinstance(value, Mapping):
        return {key: filled(inner, **names) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [filled(inner, **names) for inner in value]
    return value.format(**names) if isinstance(value, str) else value


def run(arm: str, seed: int, settings: Mapping[str, Any], reported: Sequence[str]) -> dict[str, Any]:
    """Train one arm in this process; returns its accuracies by step."""
    import torch

    from opdengine.config.loading import from_mapping
    from opdengine.config.train import TrainConfig
    from opdengine.training.run import train
    from opdengine.training.writer import read_metrics

    torch.set_num_threads(1)
    started, used = time.perf_counter(), time.process_time()
    result = train(from_mapping(TrainConfig, settings), progress=False)
    lines = read_metrics(result.output_dir / "metrics.jsonl")
    found = summary(arm, seed, lines, reported, time.perf_counter() - started)
    found["processor_seconds"] = time.process_time() - used
    kept = json.dumps({"settings": settings, "run": found}, default=str)
    partial = result.output_dir / f"{FINISHED}.partial"
    partial.write_text(kept + "\n")
    partial.replace(result.output_dir / FINISHED)
    return found


def finished(settings: Mapping[str, Any]) -> dict[str, Any] | None:
    """What an earlier call found in a run of these settings, or None; the folder of an unfinished run is emptied.

    Args:
        settings: of the run, its ``output_dir`` included.

    Raises:
        SystemExit: the folder holds a finished run of other settings.
    """
    folder = Path(settings["output_dir"])
    if not (folder / FINISHED).exists():
        shutil.rmtree(folder, ignore_errors=True)
        return None
    kept = json.loads((folder / FINISHED).read_text())
    if kept["settings"] != json.loads(json.dumps(settings, default=str)):
        raise SystemExit(f"{folder} was run with other settings: give those of the first call, or leave --resume out")
    return dict(kept["run"])


def summary(
    arm: str, seed: int, lines: Sequence[Mapping[str, float]], reported: Sequence[str], seconds: float
) -> dict[str, Any]:
    """What the results hold of one run.

    Args:
        arm, seed: of the run.
        lines: its metrics, one mapping a step.
        reported: metrics whose mean is kept.
        seconds: that it took.
    """
    means = {}
    for name in reported:
        values = [line[name] for line in lines if name in line]
        if values:
            means[name] = float(np.mean(values))
    return {
        "arm": arm,
        "seed": seed,
        "seconds": seconds,
        "update_seconds": sum(line.get("timing/update", 0.0) for line in lines),
        "curve": [
            {"step": line["step"], **{k: v for k, v in line.items() if k.startswith("eval/accuracy")}}
            for line in lines
            if "eval/accuracy" in line
        ],
        "metrics": means,
    }


def grade(
    models: Mapping[str, str],
    test: Path,
    verifier: Any,
    longest: int = 14,
    images: Mapping[str, str] | None = None,
    dtype: str = "float32",
) -> dict[str, dict[str, float]]:
    """Accuracy of each model by skill, greedy, in at most ``longest`` tokens.

    Args:
        models: title -> folder.
        test: the data file.
        verifier: as in a configuration.
        longest: answer.
        images: what a model reads of pictures, by title; "image" where nothing is said.
        dtype: of the models.
    """
    from transformers.utils import logging

    from opdengine.data.prompts import load_prompts
    from opdengine.models.backbone import load_model
    from opdengine.models.chat import encode_chat, load_tokenizer
    from opdengine.rollout.transformers import TransformersSampler
    from opdengine.training.evaluate import evaluate
    from opdengine.types import SamplingParams
    from opdengine.verifiers.grader import Grader

    logging.disable_progress_bar()
    greedy = SamplingParams(max_tokens=longest, temperature=0.0)
    prompts, found = load_prompts([str(test)]).prompts, {}
    with Grader(verifier) as grader:
        for title, path in models.items():
            tokenizer = load_tokenizer(path, images=(images or {}).get(title, "image"))
            sampler = TransformersSampler(load_model(path, dtype=dtype), tokenizer)
            graded = evaluate(sampler, prompts, lambda p, t=tokenizer: encode_chat(t, p.messages), grader, greedy)
            found[title] = graded.metrics()
    return found


def held_out(file: Path) -> dict[str, int]:
    """Metric -> number of prompts that it is a mean over."""
    keys = Counter(json.loads(line)["data_source"] for line in file.read_text().splitlines())
    return {"eval/accuracy": keys.total(), **{f"eval/accuracy/{key}": n for key, n in keys.items()}}


def main(study: Study, description: str, arguments: Sequence[str]) -> int:
    """The demo, or all controls with ``--ablate``."""
    quiet_imports()
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ablate", action="store_true", help="all controls (default 5 seeds) in place of the demo")
    parser.add_argument("--seeds", type=int, help="number of seeds (default 1)")
    parser.add_argument("--arms", nargs="+", choices=[arm.name for arm in study.arms], help="only these")
    parser.add_argument("--split", choices=("dev", "test"), default="test", help="held-out prompts to measure on")
    parser.add_argument("--output_dir", type=Path, default=Path("runs") / study.name)
    parser.add_argument("--save_results", type=Path, help="also write the numbers to this file")
    parser.add_argument("--resume", type=Path, help="folder of an earlier call; its finished runs are not run again")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="runs at a time")
    options, rest = parser.parse_known_args(arguments)
    changes = _changes(rest)
    console = Console()
    if not console.is_terminal:
        console = Console(width=140)
    arms = [a for a in study.arms if a.name in options.arms] if options.arms else [
        a for a in study.arms if a.demo or options.ablate
    ]  # fmt: skip
    seeds = list(range(options.seeds or (5 if options.ablate else 1)))
    folder = options.resume or options.output_dir / time.strftime("%Y%m%d-%H%M%S")
    if options.resume and not folder.is_dir():
        raise SystemExit(f"--resume {folder}: there is no such folder; give the one that the earlier call named")
    folder.mkdir(parents=True, exist_ok=True)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    console.print(f"[bold]{study.name}[/bold]: {len(arms)} arm(s) x {len(seeds)} seed(s), results in {folder}")
    jobs = {}
    for seed in seeds:
        for arm in arms:
            place = {"seed": seed, "output_dir": str(folder / f"{arm.name}_{seed}")}
            own = merged(filled(arm.settings, folder=str(folder), seed=seed), changes)
            jobs[arm.name, seed] = merged({**study.settings(folder, seed), **place}, own)
    _check(jobs)
    start = time.perf_counter()
    held_out_file = folder / "held_out.jsonl"
    earlier = held_out_file.read_bytes() if options.resume and held_out_file.exists() else None
    models = study.prepare(folder, seeds, options.split)
    if earlier not in (None, held_out_file.read_bytes()):
        raise SystemExit(f"{folder} was graded on other held-out prompts: give the --split of the first call")
    of_first = jobs[arms[0].name, 0]
    longest = max(14, of_first["max_completion_length"])
    graded = grade(models, held_out_file, of_first["verifier"], longest, study.images, of_first["dtype"])
    runs = [found for settings in jobs.values() if (found := finished(settings))]
    have = {(found["arm"], found["seed"]) for found in runs}
    if options.resume:
        console.print(f"{len(have)} of {len(jobs)} runs are finished; the others begin anew")
    runs += _run_all(study, {key: s for key, s in jobs.items() if key not in have}, options.jobs, console)
    results = {
        "method": study.name,
        "arms": [{"name": arm.name, "title": arm.title, "settings": dict(arm.settings)} for arm in arms],
        "skills": dict(study.skills),
        "seeds": seeds,
        "split": options.split,
        "held_out": held_out(held_out_file),
        "settings": {k: v for k, v in jobs[arms[0].name, 0].items() if "/" not in str(v)},
        "models": graded,
        "runs": sorted(runs, key=lambda r: ([a.name for a in arms].index(r["arm"]), r["seed"])),
        "wall_seconds": time.perf_counter() - start,
        "cores": os.cpu_count(),
        "versions": {
            "python": platform.python_version(),
            **{name: metadata.version(name) for name in ("opdengine", "torch", "transformers")},
        },
    }
    for file in filter(None, (folder / "results.json", options.save_results)):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(results, indent=1, default=str) + "\n")
    draw(results, folder / "accuracy.png")
    console.print(_table(results))
    console.print(f"figure: {folder / 'accuracy.png'}   numbers: {folder / 'results.json'}")
    return 0


def _changes(arguments: Sequence[str]) -> dict[str, Any]:
    """``--key value`` settings of the engine for all arms, such as ``--max_steps 20``."""
    from opdengine.config.loading import _assign, _parse_overrides
    from opdengine.config.yaml_text import plain

    data: dict[str, Any] = {}
    for key, value in _parse_overrides(arguments):
        _assign(data, key.split("."), value)
    return dict(plain(data))


def _check(jobs: Mapping[tuple[str, int], Mapping[str, Any]]) -> None:
    """Settings that a run would refuse end the study before its models are made and graded."""
    from opdengine.config.loading import from_mapping
    from opdengine.config.train import TrainConfig
    from opdengine.errors import ConfigError
    from opdengine.methods import build_method

    for (arm, _), settings in jobs.items():
        try:
            build_method(from_mapping(TrainConfig, settings))
        except ConfigError as error:
            raise SystemExit(f"{arm}: {error}") from error


def _run_all(
    study: Study, jobs: Mapping[tuple[str, int], Mapping[str, Any]], count: int, console: Console
) -> list[dict[str, Any]]:
    spawn = multiprocessing.get_context("spawn")
    runs = []
    with (
        Progress(
            TextColumn("{task.description:<40}"), BarColumn(), TextColumn("{task.completed}/{task.total}"),
            TimeElapsedColumn(), console=console,
        ) as progress,
        ProcessPoolExecutor(max(1, count), mp_context=spawn, initializer=begin_quiet_worker) as pool,
    ):  # fmt: skip
        bar = progress.add_task("runs", total=len(jobs))
        waiting = {
            pool.submit(run, arm, seed, settings, study.reported): (arm, seed) for (arm, seed), settings in jobs.items()
        }
        try:
            for job in as_completed(waiting):
                arm, seed = waiting[job]
                runs.append(job.result())
                progress.update(bar, advance=1, description=f"finished: {arm}, seed {seed}")
        finally:
            pool.shutdown(cancel_futures=True)  # where one failed, the others do not begin
    return runs


def _table(results: Mapping[str, Any]) -> Table:
    seeds, steps = results["seeds"], results["settings"]["max_steps"]
    spread = ", mean ± 95 % interval" if len(seeds) > 1 else " (95 % interval over the prompts)"
    table = Table(
        title=f"Accuracy on held-out prompts ({results['split']}) after {steps} steps, {len(seeds)} seed(s){spread}"
    )
    for place, heading in enumerate(headings(results)):
        table.add_column(heading, justify="right" if place else "left", overflow="fold")
    for number, cells in enumerate(table_rows(results)):
        table.add_row(*cells, end_section=number == len(results["models"]) - 1)
    return table
