"""A whole step beside TRL's trainers with a real language model: sampling, teacher, loss, backward, AdamW.

    python benchmarks/real_trainers.py --model models/smollm2 [--save] [--rounds 2] [--steps 3] [--cases short long]

Every trainer takes the likeliest token (``top_k: 1``), so that all train on the same completions, which end where
the model ends them. The teacher is the same model with sharper distributions: its last norm is multiplied by 1.2. Each
trainer runs in processes of its own, in turns. In the cases with ``bf16`` all run under autocast to bfloat16 with
float32 weights of the student and bfloat16 weights of the teacher; completions differ there where the likeliest token
is a matter of rounding. With two processes each has half of the prompts and of the threads, and the figures are those
of the first: FSDP2 in ours, DDP in TRL's, gloo in both. Every run is printed: time by the clock, processor seconds
(which other programs hardly stretch), peak memory, and the first step's loss. Only the loss of ``DistillationTrainer``
compares with ours: ``GKDTrainer`` divides by the tokens of the given answers, not of samples.

``--save`` writes the medians over the rounds to ``benchmarks/results/real/steps.json``.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "benchmarks")]

import torch
from conftest import environment
from real_rows import PROMPTS
from test_trainers import PROVIDERS, launch

CASES: dict[str, dict[str, Any]] = {
    "short": {"tokens": 32},
    "long": {"tokens": 160},
    "lora": {"tokens": 32, "lora": 16},
    "short bf16": {"tokens": 32, "bf16": True},
    "long bf16": {"tokens": 160, "bf16": True},
    "short, 2 processes": {"tokens": 32, "processes": 2},
}
TRAINERS = (*PROVIDERS, "ours sampled")
SHARPER = 1.2
FIGURES = ("step_s", "processor_s", "peak_bytes")


def sharper(folder: str, out: Path) -> str:
    """A copy of a model whose last norm is scaled, with its tokenizer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder)
    model.base_model.norm.weight.data.mul_(SHARPER)
    model.save_pretrained(out)
    AutoTokenizer.from_pretrained(folder).save_pretrained(out)
    return str(out)


def measure(settings: dict[str, Any], folder: Path, rounds: int) -> dict[str, Any]:
    """Medians over rounds of every trainer, in turns."""
    file = folder / "settings.json"
    file.write_text(json.dumps(settings))
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in TRAINERS}
    for _ in range(rounds):
        for name, runs in found.items():
            runs.append(launch(name, file))
            print(name, {key: round(runs[-1][key], 2) for key in FIGURES}, "loss", runs[-1]["losses"][0], flush=True)
    case: dict[str, Any] = {
        name: {key: statistics.median(run[key] for run in runs) for key in FIGURES} for name, runs in found.items()
    }
    for name, runs in found.items():
        case[name]["first_loss"] = runs[0]["losses"][0]
    return {**case, "completion_tokens": found["ours"][0]["tokens"], "prompts": settings["prompts"]}


def main(arguments: list[str]) -> int:
    """Measure the cases, print them, and keep them where that is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder of the model")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=3, help="the first is not timed")
    parser.add_argument("--prompts", type=int, default=8, choices=range(1, len(PROMPTS) + 1), metavar="N")
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--save", action="store_true")
    options = parser.parse_args(arguments)
    if options.steps < 2 or options.rounds < 1:
        parser.error("--steps is at least 2, of which the first is not timed, and --rounds at least 1")
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        data = folder / "prompts.jsonl"
        rows = [{"prompt": [{"role": "user", "content": text}]} for text in PROMPTS[: options.prompts]]
        data.write_text("".join(json.dumps(row) + "\n" for row in rows))
        settings = {
            "student": options.model,
            "teacher": sharper(options.model, folder / "teacher"),
            "data": str(data),
            "folder": str(folder / "run"),
            "prompts": options.prompts,
            "steps": options.steps,
            "learning_rate": 1e-6,
            "threads": torch.get_num_threads(),
            "top_k": 1,
        }
        for case in options.cases:
            print(case, flush=True)
            results[case] = measure({**settings, **CASES[case]}, folder, options.rounds)
            if options.save:  # what was measured stays where a later case is stopped
                document = {**environment(), "threads": settings["threads"], "rounds": options.rounds, "cases": results}
                file = ROOT / "benchmarks" / "results" / "real" / "steps.json"
                file.write_text(json.dumps(document, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
