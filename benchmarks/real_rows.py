"""Gradients from sampled columns beside dense ones, on rows of a real language model.

    python benchmarks/real_rows.py --model FOLDER [--save] [--prompts 24] [--tokens 48] [--rounds 5]

Rows are the model's own samples (temperature 1) after the prompts below; the teacher is the same model with noise in
every matrix. Both heads are the model's. Every setting takes its turn in every round, in processor time, which other
programs on the machine stretch less than they do wall time; errors are those of the whole gradient against the dense
one. ``--save`` writes ``benchmarks/results/<device>/real_rows.json``. ``opdengine fetch smollm2-135m --out FOLDER``
gets a small model.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "benchmarks")]

import numpy as np
import torch
from conftest import device_name, save_results
from torch import Tensor

from opd_kernels import TeacherHead, linear_divergence

PROMPTS = (
    "Why is the sky blue?",
    "Write a function that reverses a linked list.",
    "What is 17 times 23?",
    "Tell me about the history of Lisbon.",
    "Give three tips for a job interview.",
    "Explain photosynthesis to a child.",
    "How does a bicycle stay upright?",
    "Name the planets in order.",
    "Write a haiku about rain.",
    "What causes inflation?",
    "How do I boil an egg?",
    "Summarise the plot of Hamlet.",
    "What is a prime number?",
    "Describe a sunset over the sea.",
    "How do vaccines work?",
    "Write an e-mail that declines an invitation.",
    "What is the capital of Australia?",
    "Compare cats and dogs as pets.",
    "Why do leaves change their colour?",
    "Give a recipe for tomato soup.",
    "What is machine learning?",
    "How far away is the moon?",
    "Write a limerick about a baker.",
    "What should I pack for a hike?",
)
SHARES = (0.05, 0.1, 0.2)
KINDS = ("reverse_kl", "jsd")
NOISE = 0.03
"""Standard deviation of the noise in the teacher's matrices, over that of their entries."""


def rows_of(folder: str, prompts: int, tokens: int) -> tuple[Tensor, Tensor, Tensor, dict[str, float]]:
    """(student's states [N, d], teacher's states [N, d], head [V, d], what they are like)."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    torch.manual_seed(0)
    texts, starts = [], []
    for prompt in PROMPTS[:prompts]:
        ids = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], add_generation_prompt=True, return_tensors="pt", return_dict=True
        )["input_ids"]
        out = model.generate(ids, do_sample=True, temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=tokens)
        texts.append(out), starts.append(ids.shape[1] - 1)

    def states() -> Tensor:
        return torch.cat([model.model(x)[0][0, start:-1] for x, start in zip(texts, starts, strict=True)])

    with torch.no_grad():
        student, head = states(), model.lm_head.weight.detach().clone()
        for matrix in model.model.layers.parameters():
            if matrix.dim() == 2:
                matrix.add_(torch.randn_like(matrix), alpha=NOISE * float(matrix.std()))
        teacher = states()
        p, q = ((x @ head.t()).log_softmax(1) for x in (student, teacher))
        kl, entropy = (p.exp() * (p - q)).sum(1), -(p.exp() * p).sum(1)
    about = {"rows": len(student), "vocab": head.shape[0], "width": head.shape[1]}
    return student, teacher, head, about | {"kl": float(kl.mean()), "entropy": float(entropy.mean())}


Step = Callable[[], tuple[Any, tuple[Tensor, ...]]]


def step_of(rows: tuple[Tensor, Tensor, Tensor], count: int, **options: Any) -> Step:
    """Forward and backward of ``count`` rows."""
    hidden, weight = rows[0][:count].clone().requires_grad_(), rows[2].clone().requires_grad_()
    teacher = TeacherHead(rows[1][:count], rows[2])

    def step() -> tuple[Any, tuple[Tensor, ...]]:
        out = linear_divergence(hidden, weight, [teacher], **options)
        return out, torch.autograd.grad(out.loss, (hidden, weight))

    return step


def rotated(steps: dict[str, Step], rounds: int) -> dict[str, list[float]]:
    """Seconds of the processor of every step in every round."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for i in range(rounds + 1):
        for name, step in steps.items():
            start = time.process_time()
            step()
            if i:
                seconds[name].append(time.process_time() - start)
    return seconds


def errors(found: Sequence[Tensor], exact: Sequence[Tensor]) -> list[float]:
    return [float((x - y).norm() / y.norm()) for x, y in zip(found, exact, strict=True)]


def compare(rows: tuple[Tensor, Tensor, Tensor], count: int, kind: str, rounds: int) -> dict[str, Any]:
    """Times over dense and noise of every share, for ``count`` rows."""
    dense = step_of(rows, count, divergence=kind)
    steps = {"dense": dense} | {
        f"{share:.0%}": step_of(rows, count, divergence=kind, vocab_sample=share, sample_seed=1) for share in SHARES
    }
    seconds = rotated(steps, rounds)
    exact = dense()[1]
    out: dict[str, Any] = {"dense": {"ms": 1e3 * float(np.median(seconds["dense"]))}}
    for share in SHARES:
        name = f"{share:.0%}"
        ratio = np.array(seconds[name]) / np.array(seconds["dense"])
        draws = [
            step_of(rows, count, divergence=kind, vocab_sample=share, sample_seed=seed)() for seed in range(rounds)
        ]
        noise = np.array([errors(gradients, exact) for _, gradients in draws])
        mean = errors([torch.stack(x).mean(0) for x in zip(*(g for _, g in draws), strict=True)], exact)
        report = draws[0][0].sampling
        out[name] = {
            "ms": 1e3 * float(np.median(seconds[name])),
            "over_dense": float(np.median(ratio)),
            "over_dense_quartiles": [float(x) for x in np.percentile(ratio, [25, 75])],
            "hidden_noise": float(np.sqrt((noise[:, 0] ** 2).mean())),
            "weight_noise": float(np.sqrt((noise[:, 1] ** 2).mean())),
            "predicted_hidden_noise": float(report.hidden_noise),
            "predicted_weight_noise": float(report.weight_noise),
            f"hidden_noise_mean_of_{rounds}": mean[0],
            "loss": float(draws[0][0].loss),
            "loss_error": float(report.loss_error),
            "dense_loss": float(dense()[0].loss),
        }
    return out


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder of a causal language model with tokenizer")
    parser.add_argument("--prompts", type=int, default=len(PROMPTS))
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--save", action="store_true")
    options = parser.parse_args(arguments)
    student, teacher, head, about = rows_of(options.model, options.prompts, options.tokens)
    print(json.dumps(about), flush=True)
    results: dict[str, Any] = {"rows": about}
    for kind in KINDS:
        for count in sorted({min(256, len(student)), len(student)}):
            found = compare((student, teacher, head), count, kind, options.rounds)
            results[f"{kind}, {count} rows"] = found
            print(f"{kind}, {count} rows", json.dumps(found, indent=1), flush=True)
    if options.save:
        save_results(ROOT / "benchmarks" / "results" / device_name() / "real_rows.json", results)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
